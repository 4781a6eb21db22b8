"""Where settings come from: defaults, registry entry, preset, explicit values."""

import shlex
import sys
import types
from typing import Any

import pytest

from scanlm.config import ScanLMConfig
from scanlm.errors import ScanLMError
from scanlm.settings import PRESETS, TrainingSettings, resolve_settings
from scanlm.training import describe, equivalent_command
from scanlm.values import parse_assignments


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of one model, so that these tests depend on no shipped entry."""
    import torch

    from scanlm.model import ScanLMForCausalLM

    entry = types.SimpleNamespace(id="small", training={"lr": 5e-4, "beta2": 0.95}, config={})

    def build(
        which: Any, vocab_size: int | None = None, device: str | None = None, **overrides: Any
    ) -> ScanLMForCausalLM:
        if vocab_size is not None:
            overrides["vocab_size"] = vocab_size
        with torch.device(device or "cpu"):
            return ScanLMForCausalLM(ScanLMConfig.preset("tiny", **overrides))

    stub = types.SimpleNamespace(load_entry=lambda name: entry, build_model=build)
    monkeypatch.setitem(sys.modules, "scanlm.baselines", stub)


def test_the_defaults_are_the_originals_table() -> None:
    settings = TrainingSettings()
    original = {"corpus": "wikitext-103", "seq_len": 512, "batch_size": 64, "steps": 62900}
    original |= {"lr": 1e-3, "warmup_steps": 1000, "weight_decay": 0.01, "max_grad_norm": 1.0}
    assert {name: getattr(settings, name) for name in original} == original


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_settings(preset: str) -> None:
    assert TrainingSettings(**PRESETS[preset])


def test_a_later_source_wins() -> None:
    settings = resolve_settings("small", "smoke", {"training.steps": 7, "config.chunk_size": 16})
    assert settings.beta2 == 0.95  # entry
    assert settings.lr == PRESETS["smoke"]["lr"]  # preset over entry
    assert (settings.steps, settings.config) == (7, {"chunk_size": 16})  # explicit over preset
    assert resolve_settings("small", "smoke", {"lr": 1e-4}).lr == 1e-4
    # a corpus may be a folder whose name is a number
    assert resolve_settings("small", "smoke", {"corpus": "2026"}).corpus == "2026"


def test_the_embedded_corpus_brings_its_preset() -> None:
    settings = resolve_settings("small", None, {"corpus": "embedded"})
    assert settings.steps == PRESETS["embedded"]["steps"]


@pytest.mark.parametrize(
    ("preset", "key", "message"),
    [
        ("papper", "lr", r"unknown preset 'papper'.*'paper'"),
        (None, "batchsize", r"unknown setting 'batchsize'.*'batch_size'"),
        (None, "training.warmup_step", r"unknown setting 'warmup_step'.*'warmup_steps'"),
        (None, "config.chunksize", r"unknown setting 'config.chunksize'.*'chunk_size'"),
        (None, "trainer.lr", r"unknown setting 'trainer.lr'.*'training'"),
    ],
)
def test_unknown_names_offer_the_nearest(preset: str | None, key: str, message: str) -> None:
    with pytest.raises(ScanLMError, match=message):
        resolve_settings("small", preset, {key: 1})


def test_an_experiment_names_a_folder() -> None:
    with pytest.raises(ScanLMError, match="experiment='a b/c': expected letters"):
        resolve_settings("small", None, {"experiment": "a b/c"})


def test_fields_of_the_model_come_one_by_one_or_together() -> None:
    given = {"config.n_embd": 16, "config": {"n_embd": 8, "chunk_size": 4}}
    settings = resolve_settings("small", "smoke", given)
    assert settings.config == {"n_embd": 16, "chunk_size": 4}
    with pytest.raises(ScanLMError, match=r"'config\.chunksize'.*'chunk_size'"):
        resolve_settings("small", "smoke", {"config": {"chunksize": 4}})
    with pytest.raises(ScanLMError, match="config=3: expected fields of the model"):
        resolve_settings("small", "smoke", {"config": 3})


@pytest.mark.parametrize("key", ["model", "training.model"])
def test_another_model_is_no_setting(key: str) -> None:
    with pytest.raises(ScanLMError, match="model='gpt2_tiny' is no setting: name the model itself"):
        resolve_settings("small", "smoke", {key: "gpt2_tiny"})


def test_a_seed_that_numpy_does_not_take_is_refused() -> None:
    assert resolve_settings("small", "smoke", {"seed": 2**32 - 1}).seed == 2**32 - 1
    with pytest.raises(ScanLMError, match="seed=4294967296: expected a value less than 4294967296"):
        resolve_settings("small", "smoke", {"seed": 2**32})


def test_dry_run() -> None:
    settings = resolve_settings("small", "smoke", {"config.vocab_size": 257})
    plan = describe(settings)
    assert plan["tokens"] == 20 * 8 * 128
    assert plan["settings"]["tokenizer"] == "bytes"
    assert plan["experiment"] == "embedded"
    assert plan["config"]["vocab_size"] == 257
    assert plan["memory_bytes"] > 16 * plan["num_parameters"]
    assert "--set config.vocab_size=257" in plan["command"]


def test_the_equivalent_command_gives_the_same_settings() -> None:
    # lr and eval_tokens are back at the defaults, which the entry and the corpus' preset change
    given = {"tokenizer": "bytes", "lr": 1e-3, "eval_tokens": None, "experiment": "7"}
    settings = resolve_settings("small", "smoke", given)
    words = shlex.split(equivalent_command(settings))
    pairs = parse_assignments(word for word in words if "=" in word)
    assert resolve_settings("small", None, pairs | {"corpus": "embedded"}) == settings
