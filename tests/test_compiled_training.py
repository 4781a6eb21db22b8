"""Compiled training: no graph is broken and none is made again after the first steps."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from scanlm import compiling
from scanlm.config import ScanLMConfig
from scanlm.curriculum import preset_settings
from scanlm.curriculum import train as train_curriculum
from scanlm.data import TokenizedCorpus, prepare
from scanlm.length_evaluation import LengthEvaluation, evaluate_lengths
from scanlm.model import ScanLMForCausalLM
from scanlm.records import read_metrics
from scanlm.settings import TrainingSettings
from scanlm.trainer import ExactTrainer
from scanlm.training import train

SMALL: dict[str, Any] = {
    "model": "test",
    "corpus": "test",
    "seq_len": 12,
    "batch_size": 4,
    "steps": 8,
    "lr": 1e-2,
    "eval_every": 4,
    "log_every": 2,
    "save_every": 8,
    "eval_tokens": 64,
}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    compile_model = partial(compiling.compile_model, backend="aot_eager")
    monkeypatch.setattr("scanlm.training.compile_model", compile_model)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenizedCorpus:
    folder = tmp_path_factory.mktemp("text")
    words = ["the", "scan", "folds", "chunks", "of", "the", "text", "into", "states"]
    generator = np.random.default_rng(0)
    for split, number in (("train", 200), ("validation", 40)):
        (folder / f"{split}.txt").write_text(" ".join(generator.choice(words, number)))
    return prepare(folder, "bytes", folder / "cache")


def small_model() -> ScanLMForCausalLM:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"vocab_size": 257, "n_embd": 8, "n_head": 2, "chunk_size": 4}
    fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return ScanLMForCausalLM(ScanLMConfig(**fields, t2_layers=2, position_embedding="chunk"))


def graphs_by_step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graphs made before each step's forward pass, and in the end."""
    numbers: list[int] = []
    loss = ExactTrainer.compute_loss

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        numbers.append(counters["stats"]["unique_graphs"])
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(ExactTrainer, "compute_loss", counted)
    return numbers


@pytest.mark.parametrize(
    ("changes", "warm"),
    [
        ({}, 1),
        ({"gradient_accumulation": 2}, 1),
        # the first block of a stream has a chunk without a prefix, later ones have not
        ({"carry_state": True, "seq_len": 16}, 2),
    ],
    ids=["plain", "accumulated", "carried"],
)
def test_after_the_first_steps_nothing_is_compiled(
    corpus: TokenizedCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    warm: int,
) -> None:
    numbers = graphs_by_step(monkeypatch)
    values = {**SMALL, **changes, "compile": True, "root": str(tmp_path / "compiled")}
    run = train(TrainingSettings(**values), small_model(), corpus)
    numbers.append(counters["stats"]["unique_graphs"])
    assert numbers[0] == 0 < numbers[warm]
    assert numbers[warm:] == [numbers[warm]] * (len(numbers) - warm)  # evaluations included
    assert not counters["graph_break"]
    plain = train(
        TrainingSettings(**{**values, "compile": False, "root": str(tmp_path / "plain")}),
        small_model(),
        corpus,
    )
    losses = [read_metrics(r.folder).query("name == 'loss'")["value"] for r in (run, plain)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_lengths_are_evaluated_without_compiling(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compile_model = partial(compiling.compile_model, backend="aot_eager")
    monkeypatch.setattr("scanlm.curriculum_step.compile_model", compile_model)
    graphs = []

    def counted(*arguments: Any, **options: Any) -> LengthEvaluation:
        graphs.append(counters["stats"]["unique_graphs"])
        result = evaluate_lengths(*arguments, **options)
        graphs.append(counters["stats"]["unique_graphs"])
        return result

    monkeypatch.setattr("scanlm.curriculum.evaluate_lengths", counted)
    changes = [
        "config={}",
        "compile=true",
        "stages.*.max_steps=2",
        "stages.*.batch_size=4",
        "validation_sequences=4",
        "eval_lengths=[8, 200]",  # 200: several chunks, which a compiled block unrolls
        "eval_sequences=6",
    ]
    settings = preset_settings("smoke", changes, model="gated_deltanet_tiny")
    assert train_curriculum(settings, root=tmp_path).finished
    assert graphs[0] > 0
    assert len(set(graphs)) == 1
