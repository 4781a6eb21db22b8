"""Training: exact resume after SIGKILL, data order, weight decay, divergence, bad settings."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from scanlm.checkpoints import load_checkpoint
from scanlm.config import ScanLMConfig
from scanlm.data import Blocks, TokenizedCorpus, prepare
from scanlm.errors import ScanLMError
from scanlm.model import ScanLMForCausalLM
from scanlm.records import Run, read_metrics
from scanlm.settings import TrainingSettings
from scanlm.trainer import ExactTrainer, OrderedBlocks, decayed_parameters, saved_steps
from scanlm.training import train

SMALL = {
    "model": "test",
    "corpus": "test",
    "seq_len": 8,
    "batch_size": 4,
    "steps": 12,
    "lr": 1e-2,
    "eval_every": 4,
    "log_every": 2,
    "save_every": 4,
    "eval_tokens": 64,
}


def small_model(**overrides: object) -> ScanLMForCausalLM:
    torch.manual_seed(0)
    fields = {"vocab_size": 257, "n_embd": 8, "n_head": 2, "chunk_size": 2, "t2_layers": 1}
    return ScanLMForCausalLM(ScanLMConfig(**{**fields, **overrides}))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenizedCorpus:
    folder = tmp_path_factory.mktemp("text")
    words = ["the", "scan", "folds", "chunks", "of", "the", "text", "into", "states"]
    generator = np.random.default_rng(0)
    for split, number in (("train", 400), ("validation", 60)):
        (folder / f"{split}.txt").write_text(" ".join(generator.choice(words, number)))
    return prepare(folder, "bytes", folder / "cache")


def curve(folder: Path) -> list[tuple]:
    metrics = read_metrics(folder)
    metrics = metrics[metrics["name"].isin(["loss", "perplexity", "learning_rate", "grad_norm"])]
    columns = ["name", "split", "step", "tokens", "value"]
    return list(metrics[columns].itertuples(index=False, name=None))


CHILD = """
import sys, time, torch
sys.path.insert(0, {tests!r})
import test_training as t
from scanlm import training
from scanlm.data import prepare
if {slow}:
    evaluate = training._Session._score
    def slow(self):
        if self.trainer.state.global_step == 8:
            print("at 8", flush=True)
            time.sleep(600)
        return evaluate(self)
    training._Session._score = slow
settings = t.TrainingSettings(**t.SMALL, root={root!r})
training.train(settings, t.small_model(), prepare({text!r}, "bytes", {text!r} + "/cache"))
"""


def child(corpus: TokenizedCorpus, root: Path, slow: bool) -> subprocess.Popen:
    text = str(corpus["train"].path.parents[3])
    code = CHILD.format(tests=str(Path(__file__).parent), root=str(root), text=text, slow=slow)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_killed_run_repeats_the_uninterrupted_one(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    whole = child(corpus, tmp_path / "whole", slow=False)
    killed = child(corpus, tmp_path / "killed", slow=True)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("at 8"):
            break
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert whole.wait(timeout=120) == 0
    (folder,) = (tmp_path / "killed").glob("*/*")
    assert saved_steps(folder) == [4]
    before = read_metrics(folder)
    assert before["step"].max() == 8  # measured after the checkpoint: to be dropped
    assert Run.open(folder).status == "running"
    # what a crash while saving leaves behind
    (folder / ".saving" / "checkpoint-8").mkdir(parents=True)
    (folder / ".saving" / "checkpoint-8" / "model.safetensors").write_bytes(b"half")
    again = child(corpus, tmp_path / "killed", slow=False)
    assert again.wait(timeout=120) == 0
    (reference,) = (tmp_path / "whole").glob("*/*")
    assert curve(folder) == curve(reference)
    assert not (folder / ".saving").exists()
    weights = [
        AutoModelForCausalLM.from_pretrained(f / "checkpoint-12") for f in (folder, reference)
    ]
    for a, b in zip(weights[0].parameters(), weights[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_run_is_returned_as_it_is(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    settings = TrainingSettings(**SMALL, root=str(tmp_path))
    run = train(settings, small_model(), corpus)
    assert run.finished
    assert run.summary["num_tokens"] == corpus["validation"].num_tokens - 1
    assert run.summary["loss"] < np.log(257)
    before = (run.folder / "metrics.jsonl").stat().st_mtime_ns
    assert train(settings, small_model(), corpus).folder == run.folder
    assert (run.folder / "metrics.jsonl").stat().st_mtime_ns == before
    validation = read_metrics(run.folder).query("split == 'validation' and name == 'perplexity'")
    assert list(validation["step"]) == [4, 8, 12]  # each once


def test_other_initial_weights_are_another_run(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    settings = TrainingSettings(**SMALL | {"steps": 1}, root=str(tmp_path))
    other = small_model()
    with torch.no_grad():
        other.t2.h[0].mlp.c_fc.bias[-1] += 1
    runs = [train(settings, model, corpus) for model in (small_model(), other, small_model())]
    assert runs[0].folder == runs[2].folder != runs[1].folder
    assert runs[0].summary["loss"] != runs[1].summary["loss"]


def test_a_run_without_a_model_of_its_own_has_the_id_it_had(
    corpus: TokenizedCorpus, tmp_path: Path
) -> None:
    values = SMALL | {"model": "scanlm_tiny", "config": {"chunk_size": 2}, "steps": 1}
    run = train(TrainingSettings(**values, root=str(tmp_path)), corpus=corpus)
    assert "initial" not in run.info["parameters"]


def test_a_best_step_in_the_middle_is_kept_and_found_again(
    corpus: TokenizedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {4: 2.0, 8: 1.0, 12: 3.0, 16: 2.5}
    monkeypatch.setattr(
        "scanlm.training._Session._score", lambda self: losses[self.trainer.state.global_step]
    )
    values = {"steps": 16, "keep_checkpoints": 1}
    settings = TrainingSettings(**SMALL | values, root=str(tmp_path))
    run = train(settings, small_model(), corpus)
    assert saved_steps(run.folder) == [8, 16]
    assert run.summary["best_step"] == 8
    assert load_checkpoint(run.folder, "best").step == 8
    # as if it had been stopped before it could write the summary
    summary = run.summary
    (run.folder / "summary.json").unlink()
    again = train(settings, small_model(), corpus)
    assert saved_steps(again.folder) == [8, 16]
    assert (again.summary["best_step"], again.summary["loss"]) == (8, summary["loss"])


def test_fsdp_by_accelerate_is_asked_for_in_every_call(
    corpus: TokenizedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    settings = TrainingSettings(**SMALL, root=str(tmp_path))
    for _ in range(2):
        with pytest.raises(ScanLMError, match="fsdp=true shares the model out over several ranks"):
            train(settings, small_model(), corpus)


def test_one_dropout_is_that_of_every_part(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    model = small_model(resid_pdrop=0.0, embd_pdrop=0.1, attn_pdrop=0)  # also over an integer
    train(
        TrainingSettings(**SMALL | {"steps": 1, "dropout": 0.3}, root=str(tmp_path)), model, corpus
    )
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    rates += [m.attn_pdrop for m in model.modules() if hasattr(m, "attn_pdrop")]
    assert len(rates) > 3
    assert set(rates) == {0.3}


def test_accumulated_parts_are_one_batch(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    weights = []
    for parts in (1, 4):
        values = {**SMALL, "steps": 3, "gradient_accumulation": parts, "lr": 1e-3}
        model = small_model(**no_dropout).double()
        run = train(TrainingSettings(**values, root=str(tmp_path)), model, corpus)
        losses = read_metrics(run.folder).query("split == 'train' and name == 'loss'")
        weights.append((torch.cat([p.detach().flatten() for p in model.parameters()]), losses))
    torch.testing.assert_close(weights[0][0], weights[1][0], atol=1e-6, rtol=0)
    np.testing.assert_allclose(weights[0][1]["value"], weights[1][1]["value"], atol=1e-6)


def recorded(run: Run, name: str) -> np.ndarray:
    """A training metric at each step."""
    metrics = read_metrics(run.folder).query(f"split == 'train' and name == '{name}'")
    assert list(metrics["step"]) == list(range(1, len(metrics) + 1))
    return metrics["value"].to_numpy()


@pytest.mark.parametrize(
    ("asked", "warmup"), [(2, 2), (1000, 4), (0, 0)], ids=["asked", "a tenth", "none"]
)
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(
    corpus: TokenizedCorpus, tmp_path: Path, asked: int, warmup: int
) -> None:
    steps, peak, lowest = 40, 1e-2, 2e-3
    values = {"steps": steps, "lr": peak, "min_lr_ratio": lowest / peak, "warmup_steps": asked}
    values |= {"log_every": 1, "eval_every": steps, "save_every": steps}
    settings = TrainingSettings(**{**SMALL, **values}, root=str(tmp_path))
    rates = recorded(train(settings, small_model(), corpus), "learning_rate")
    assert len(rates) == steps
    rising = np.linspace(0, peak, warmup, endpoint=False)
    np.testing.assert_allclose(rates[:warmup], rising, atol=1e-12)
    part = np.arange(steps - warmup) / (steps - warmup)  # 1 would be the step after the last
    cosine = lowest + (peak - lowest) * (1 + np.cos(np.pi * part)) / 2
    np.testing.assert_allclose(rates[warmup:], cosine, atol=1e-12)
    assert rates.max() == peak
    assert lowest < rates[-1] < 1.01 * lowest


@pytest.mark.parametrize("max_norm", [1.0, 0.25, 0.0])
def test_huge_gradients_are_clipped(
    corpus: TokenizedCorpus, tmp_path: Path, max_norm: float
) -> None:
    values = {"steps": 1, "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": max_norm}
    # with so large an eps Adam's step depends on the size of the gradient
    values |= {"eps": 1.0, "dropout": 0.0, "log_every": 1}
    settings = TrainingSettings(**{**SMALL, **values}, root=str(tmp_path))

    model = small_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    before = [p.detach().clone() for p in model.parameters()]
    ordered = OrderedBlocks(Blocks(corpus["train"].tokens, settings.seq_len), settings.seed, 4)
    ids, following = (
        torch.stack([ordered[i][name] for i in range(4)]) for name in ("input_ids", "shift_labels")
    )
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 10
    scale = max_norm / norm if max_norm else 1.0

    run = train(settings, model, corpus)
    assert recorded(run, "grad_norm") == pytest.approx([norm.item()], rel=1e-6)
    for old, new, gradient in zip(before, model.parameters(), gradients, strict=True):
        clipped = gradient * scale
        expected = old - settings.lr * clipped / (clipped.abs() + settings.eps)
        torch.testing.assert_close(new.detach(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("half_residual", [True, False])
def test_bf16_trains_on_the_cpu(
    corpus: TokenizedCorpus, tmp_path: Path, half_residual: bool
) -> None:
    values = {"precision": "bf16", "half_residual": half_residual, "log_every": 1}
    settings = TrainingSettings(**{**SMALL, **values}, root=str(tmp_path))
    model, computed, residual = small_model(), set(), set()
    model.t2.h[0].mlp.c_fc.register_forward_hook(lambda _, x, out: computed.add(out.dtype))
    model.t2.h[0].ln_2.register_forward_hook(lambda _, x, out: residual.add(x[0].dtype))
    run = train(settings, model, corpus)
    assert Run.open(run.folder).info["parameters"]["precision"] == "bf16"
    assert computed == {torch.bfloat16}
    assert residual == {torch.bfloat16 if half_residual else torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    losses = recorded(run, "loss")
    assert losses[-1] < losses[0] - 0.3


def test_order_depends_on_the_seed_only_and_covers_every_epoch() -> None:
    blocks = Blocks(np.arange(81, dtype=np.uint16), 8)
    ordered = OrderedBlocks(blocks, seed=3, count=25)
    order = [ordered.block(i) for i in range(25)]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert [OrderedBlocks(blocks, 3, 25).block(i) for i in reversed(range(25))] == order[::-1]
    assert [OrderedBlocks(blocks, 4, 25).block(i) for i in range(10)] != order[:10]


@pytest.mark.parametrize("tied", [False, True])
def test_decay_spares_embeddings_norms_and_biases(tied: bool) -> None:
    scan = decayed_parameters(small_model(tie_word_embeddings=tied))
    assert ("lm_head.weight" in scan) is not tied
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, tie_word_embeddings=tied)
    gpt2 = decayed_parameters(GPT2LMHeadModel(config))
    assert ("lm_head.weight" in gpt2) is not tied
    blocks = {n.partition("h.0.")[2] for n in gpt2 if "h.0." in n}
    names = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert blocks == {f"{name}.weight" for name in names}
    for part in ("t1", "t2"):
        assert {n for n in scan if n.startswith(part)} == {f"{part}.h.0.{n}.weight" for n in names}
    assert not any("wte" in n or "wpe" in n or "norm" in n for n in scan + gpt2)


def test_divergence_names_the_step_and_keeps_good_checkpoints(
    corpus: TokenizedCorpus, tmp_path: Path
) -> None:
    model = small_model()
    forward, calls = model.forward, []

    def poisoned(*args: object, return_logits: bool = True, **kwargs: object) -> object:
        out = forward(*args, return_logits=return_logits, **kwargs)
        if model.training:
            calls.append(1)
            if len(calls) == 7:
                out.loss = out.loss * float("nan")
        return out

    model.forward = poisoned
    with pytest.raises(ScanLMError, match="not finite at step 7"):
        train(TrainingSettings(**SMALL, root=str(tmp_path)), model, corpus)
    (folder,) = tmp_path.glob("*/*")
    assert Run.open(folder).status == "diverged"
    assert saved_steps(folder) == [4]


def interrupted_at(step: int, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during a step; ``again``: twice."""
    compute = ExactTrainer.compute_loss

    def interrupted(self: ExactTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step + 1 == step:
            for _ in range(1 + again):
                signal.raise_signal(signal.SIGINT)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(ExactTrainer, "compute_loss", interrupted)
    # a shell that started the tests in the background has told them to ignore interrupts
    signal.signal(signal.SIGINT, signal.default_int_handler)


def stopped_at_5(
    corpus: TokenizedCorpus, root: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[TrainingSettings, Path]:
    """A run that Ctrl-C stopped during its fifth step, and its folder."""
    settings = TrainingSettings(**SMALL, root=str(root))
    with monkeypatch.context() as patch:
        interrupted_at(5, again=False, monkeypatch=patch)
        with pytest.raises(KeyboardInterrupt):
            train(settings, small_model(), corpus)
    (folder,) = root.glob("*/*")
    return settings, folder


def test_an_interrupt_saves_the_step_and_loses_nothing(
    corpus: TokenizedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scanlm.training._peak_memory", lambda: 2000)
    settings, folder = stopped_at_5(corpus, tmp_path / "cut", monkeypatch)
    assert Run.open(folder).status == "interrupted"
    assert saved_steps(folder) == [4, 5]
    monkeypatch.setattr("scanlm.training._peak_memory", lambda: 1000)
    again = train(settings, small_model(), corpus)
    assert again.summary["peak_memory_bytes"] == 2000
    whole = train(settings.model_copy(update={"root": str(tmp_path)}), small_model(), corpus)
    models = [
        AutoModelForCausalLM.from_pretrained(run.folder / "checkpoint-12") for run in (again, whole)
    ]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)
    rows, reference = (
        {row for row in curve(run.folder) if row[0] in ("perplexity", "learning_rate")}
        for run in (again, whole)
    )
    assert {row[2] for row in rows - reference} == {5}  # what was logged because it was saved
    assert not reference - rows


def test_losses_by_position_stand_once_if_the_end_was_cut_short(
    corpus: TokenizedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainingSettings(**SMALL, root=str(tmp_path))

    def cut_short(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", cut_short)
        with pytest.raises(KeyboardInterrupt):
            train(settings, small_model(), corpus)
    rows = read_metrics(train(settings, small_model(), corpus).folder).dropna(subset=["position"])
    assert rows["position"].is_unique
    assert len(rows)


def test_a_damaged_checkpoint_is_named_with_what_to_do(
    corpus: TokenizedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folder = stopped_at_5(corpus, tmp_path, monkeypatch)
    latest = folder / "checkpoint-5"
    for name in ("optimizer.pt", "model.safetensors", "trainer_state.json"):
        whole = (latest / name).read_bytes()
        (latest / name).write_bytes(whole[:100])
        message = rf"{name} is truncated or damaged .* goes on from checkpoint-4"
        with pytest.raises(ScanLMError, match=message):
            train(settings, small_model(), corpus)
        (latest / name).write_bytes(whole)
    shutil.rmtree(latest.with_name("checkpoint-4"))
    (latest / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ScanLMError, match=r"remove .*checkpoint-5, and the same command starts"):
        train(settings, small_model(), corpus)
    shutil.rmtree(latest)
    assert train(settings, small_model(), corpus).finished


def test_a_run_that_another_process_trains_is_left_alone(
    corpus: TokenizedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folder = stopped_at_5(corpus, tmp_path, monkeypatch)
    before = [(folder / name).read_bytes() for name in ("metrics.jsonl", "run.json")]
    refused = pytest.raises(ScanLMError, match="is being written by another process")
    with Run.open(folder).only_writer(), refused:
        train(settings, small_model(), corpus)
    assert [(folder / name).read_bytes() for name in ("metrics.jsonl", "run.json")] == before
    assert train(settings, small_model(), corpus).finished


def test_a_second_interrupt_does_not_wait(
    corpus: TokenizedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_at(5, again=True, monkeypatch=monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(TrainingSettings(**SMALL, root=str(tmp_path)), small_model(), corpus)
    (folder,) = tmp_path.glob("*/*")
    assert Run.open(folder).status == "interrupted"
    assert saved_steps(folder) == [4]


@pytest.mark.parametrize(("chunk_size", "count"), [(8, "one chunk"), (4, "two chunks")])
def test_a_sequence_without_a_call_of_t1_warns(
    corpus: TokenizedCorpus, tmp_path: Path, chunk_size: int, count: str
) -> None:
    settings = TrainingSettings(**{**SMALL, "steps": 1}, root=str(tmp_path))
    model, untrained = small_model(chunk_size=chunk_size), small_model()
    with pytest.warns(UserWarning, match=f"seq_len=8 is {count} .*: nothing is scanned"):
        train(settings, model, corpus)
    for before, after in zip(untrained.t1.parameters(), model.t1.parameters(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lrr": 1}, "unknown setting 'lrr'.*'lr'"),
        ({"lr": -1}, "lr=-1.*greater than 0"),
        ({"batch_size": 6, "gradient_accumulation": 4}, "batch_size=6 is not divisible"),
        ({"precision": "fp8"}, "precision='fp8'"),
    ],
)
def test_bad_settings(values: dict, message: str) -> None:
    with pytest.raises(ScanLMError, match=message) as error:
        TrainingSettings(**values)
    assert "\n" not in str(error.value)


def test_vocabulary_mismatch(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    with pytest.raises(ScanLMError, match=r"257 tokens.*vocabulary of 100"):
        train(TrainingSettings(**SMALL, root=str(tmp_path)), small_model(vocab_size=100), corpus)


def test_unwritable_output(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ScanLMError, match="cannot write to"):
        train(TrainingSettings(**SMALL, root=str(tmp_path / "file")), small_model(), corpus)
