"""Training with carried states: the long sequence's losses, cut gradients, order, exact resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scanlm.config import ScanLMConfig
from scanlm.data import Blocks, TokenizedCorpus, prepare
from scanlm.errors import ScanLMError
from scanlm.model import ScanLMForCausalLM
from scanlm.records import read_metrics
from scanlm.settings import TrainingSettings
from scanlm.streams import CarriedState, StreamedBlocks
from scanlm.training import train

SMALL: dict[str, Any] = {
    "model": "test",
    "corpus": "test",
    "carry_state": True,
    "seq_len": 8,
    "batch_size": 4,
    "steps": 12,
    "lr": 1e-2,
    "eval_every": 4,
    "log_every": 1,
    "save_every": 4,
    "eval_tokens": 64,
}


def small_model(**overrides: Any) -> ScanLMForCausalLM:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"vocab_size": 257, "n_embd": 8, "n_head": 2, "chunk_size": 4}
    fields |= {"t2_layers": 1, "position_embedding": "chunk"}
    return ScanLMForCausalLM(ScanLMConfig(**{**fields, **overrides}))


def no_dropout() -> dict[str, float]:
    return dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


def streams(rows: int, blocks: int, **changes: Any) -> StreamedBlocks:
    tokens = np.random.default_rng(0).integers(0, 257, 8 * blocks + 1).astype(np.uint16)
    return StreamedBlocks(Blocks(tokens, 8), rows, 100, **changes)


def batch(data: StreamedBlocks, step: int, rows: slice) -> dict[str, Tensor]:
    items = [data[step * data.rows + r] for r in range(data.rows)[rows]]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenizedCorpus:
    folder = tmp_path_factory.mktemp("text")
    words = ["the", "scan", "folds", "chunks", "of", "the", "text", "into", "states"]
    generator = np.random.default_rng(0)
    for split, number in (("train", 100), ("validation", 40)):
        (folder / f"{split}.txt").write_text(" ".join(generator.choice(words, number)))
    return prepare(folder, "bytes", folder / "cache")


@pytest.mark.parametrize("seq_len", [8, 6])  # whole chunks, and blocks that end within one
def test_blocks_have_the_losses_of_the_long_sequence(seq_len: int) -> None:
    model = small_model(**no_dropout()).double().train()
    tokens = np.random.default_rng(1).integers(0, 257, 2 * 5 * seq_len + 1).astype(np.uint16)
    data = StreamedBlocks(Blocks(tokens, seq_len), 2, 10)
    carried = CarriedState(model, data, parts=1)
    losses = []
    for step in range(5):
        loss = model(**batch(data, step, slice(None)), past_key_values=carried.take(step)).loss
        carried.cut()
        loss.backward()  # through this block alone: earlier graphs are gone
        losses.append(loss.item())
    ids = torch.from_numpy(tokens[:-1].astype(np.int64)).view(2, -1)
    targets = torch.from_numpy(tokens[1:].astype(np.int64)).view(2, -1)
    with torch.no_grad():
        logits = model(ids).logits
    for step, loss in enumerate(losses):
        part = slice(step * seq_len, (step + 1) * seq_len)
        expected = torch.nn.functional.cross_entropy(
            logits[:, part].flatten(0, 1), targets[:, part].flatten()
        )
        assert loss == pytest.approx(float(expected), abs=1e-10)


def test_gradients_stop_at_the_block() -> None:
    model, data = small_model(**no_dropout()).double().train(), streams(2, 10)
    carried = CarriedState(model, data, parts=1)
    model(**batch(data, 0, slice(None)), past_key_values=carried.take(0))
    carried.cut()
    assert not any(t.requires_grad for t in carried.caches[0].tensors)
    model(**batch(data, 1, slice(None)), past_key_values=carried.take(1)).loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    cache = model.new_cache()
    with torch.no_grad():
        model(**batch(data, 0, slice(None)), past_key_values=cache)
    model(**batch(data, 1, slice(None)), past_key_values=cache).loss.backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    # the carried state is an input of T1 and T2: without it the gradients are others
    model.zero_grad()
    model(**batch(data, 1, slice(None))).loss.backward()
    alone = [p.grad for p in model.parameters() if p.grad is not None]
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(found, alone, strict=True))


def test_streams_are_consecutive_and_begin_anew() -> None:
    data = streams(rows=3, blocks=16)
    assert data.length == 5
    rows = [[data.block(step * 3 + r) for step in range(7)] for r in range(3)]
    assert rows == [
        [0, 1, 2, 3, 4, 0, 1],
        [5, 6, 7, 8, 9, 5, 6],
        [10, 11, 12, 13, 14, 10, 11],
    ]
    assert [step for step in range(12) if data.begins(step)] == [0, 5, 10]
    often = streams(rows=3, blocks=16, reset_every=2)
    assert [step for step in range(12) if often.begins(step)] == [0, 2, 4, 5, 7, 9, 10]


def test_states_are_shared_out_anew_to_other_ranks(tmp_path: Path) -> None:
    model, data = small_model().double().eval(), streams(4, 20)
    layouts = [
        # (parts, ranks)
        (1, 1),
        (2, 1),
        (1, 2),
        (2, 2),
    ]
    folders = []
    with torch.no_grad():
        for parts, ranks in layouts:
            folder = tmp_path / f"{parts}-{ranks}"
            folders.append(folder)
            size = 4 // (parts * ranks)
            for rank in range(ranks):
                carried = CarriedState(model, data, parts, rank, ranks)
                for step in range(3):
                    for part in range(parts):
                        first = (part * ranks + rank) * size
                        mine = batch(data, step, slice(first, first + size))
                        model(**mine, past_key_values=carried.take(step))
                        carried.cut()
                carried.save(folder)
    for folder in folders:
        for parts, ranks in layouts:
            for rank in range(ranks):
                carried = CarriedState(model, data, parts, rank, ranks)
                carried.load(folder)
                reference = CarriedState(model, data, 1)
                reference.load(folders[0])
                size = 4 // (parts * ranks)
                for part, cache in enumerate(carried.caches):
                    first = (part * ranks + rank) * size
                    assert cache.length == 24
                    for a, b in zip(cache.tensors, reference.caches[0].tensors, strict=True):
                        torch.testing.assert_close(a, b[first : first + size])


def test_an_interrupted_run_repeats_the_uninterrupted_one(
    corpus: TokenizedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def curve(root: str) -> list[float]:
        settings = TrainingSettings(**SMALL, root=str(tmp_path / root))
        run = train(settings, small_model(), corpus)
        metrics = read_metrics(run.folder)
        return list(metrics[metrics["name"].isin(["loss", "grad_norm"])]["value"])

    def stop(*args: Any) -> float:
        raise KeyboardInterrupt

    def interrupted(root: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("scanlm.training._Session._score", stop)
            with pytest.raises(KeyboardInterrupt):
                train(
                    TrainingSettings(**{**SMALL, "eval_every": 6}, root=str(tmp_path / root)),
                    small_model(),
                    corpus,
                )

    monkeypatch.setitem(SMALL, "eval_every", 6)
    whole = curve("whole")
    interrupted("cut")
    (folder,) = (tmp_path / "cut").glob("*/*")
    assert len(list((folder / "checkpoint-4").glob("carried-*"))) == 1
    assert curve("cut") == whole
    # what the test can notice: a state that begins anew at the interruption
    interrupted("lost")
    monkeypatch.setattr("scanlm.streams.CarriedState.load", lambda self, folder: None)
    assert curve("lost") != whole


def test_accumulated_parts_are_one_batch(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    weights = []
    for parts in (1, 2):
        values = {**SMALL, "steps": 6, "gradient_accumulation": parts, "lr": 1e-3}
        model = small_model(**no_dropout()).double()
        train(TrainingSettings(**values, root=str(tmp_path)), model, corpus)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)


def test_mistakes(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    with pytest.raises(ScanLMError, match="reset_every=3 needs carry_state=true"):
        TrainingSettings(reset_every=3)
    absolute = small_model(position_embedding="absolute", n_positions=40)
    with pytest.raises(ScanLMError, match=r"positions end at 40.*reset_every=5"):
        train(TrainingSettings(**SMALL, root=str(tmp_path)), absolute, corpus)
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=8, n_head=2, n_layer=1))
    with pytest.raises(ScanLMError, match="'gpt2' has no state"):
        train(TrainingSettings(**SMALL, root=str(tmp_path)), gpt2, corpus)
    with pytest.raises(ScanLMError, match="batch_size=400 streams"):
        train(TrainingSettings(**{**SMALL, "batch_size": 400}), small_model(), corpus)
