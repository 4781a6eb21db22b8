"""The curriculum trainer, its step and the evaluation by length."""

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scanlm import ScanLMConfig, ScanLMForCausalLM, curriculum, curriculum_step
from scanlm.curriculum import (
    check_same_training,
    open_run,
    preset_settings,
    record_folder,
    train,
    train_many,
)
from scanlm.curriculum_settings import PRESETS, Stage
from scanlm.curriculum_step import (
    Learner,
    check_model,
    folded_logits,
    learning_rate,
    noisy,
    step_seed,
)
from scanlm.dropout import set_dropout
from scanlm.errors import ScanLMError
from scanlm.groups import get_group, running_products, word_batch
from scanlm.length_evaluation import bin_edges, evaluate_lengths, reach, wilson, word_logits
from scanlm.records import Run, read_metrics
from scanlm.sweeps.state_tracking_runs import state_tracking_run

TINY = (
    "config.n_embd=16",
    "log_every=4",
    "stages.*.max_steps=10",
    "stages.*.batch_size=8",
    "stages.*.warmup=3",
    "stages.-1.dropout=0.1",
    "validation_sequences=16",
    "eval_lengths=[4, 8]",
    "eval_sequences=20",
)


class Oracle(nn.Module):
    """Right answers everywhere but at the positions of ``wrong`` (from 0), for even words."""

    def __init__(self, group: str, wrong: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.table = get_group(group).table
        self.wrong = wrong
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        answers = running_products(self.table, input_ids)
        for position in self.wrong:
            if position < answers.shape[1]:
                answers[0::2, position] = (answers[0::2, position] + 1) % len(self.table)
        return SimpleNamespace(logits=nn.functional.one_hot(answers, len(self.table)).float())


# Settings


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    settings = preset_settings(name, seed=3)
    assert settings.seed == 3
    assert settings.stages[-1].length in (4, 8, 16)


def test_batches_follow_the_length() -> None:
    batches = {n: Stage(length=n, max_steps=1, lr=1e-4).batch for n in (2, 4, 8, 12, 16)}
    assert batches == {2: 1024, 4: 1024, 8: 512, 12: 341, 16: 256}


def test_overrides_reach_stages_and_config() -> None:
    changes = ["stages.*.dropout=0", "stages.-1.lr=1e-4", "config.n_embd=96", "ema=0.99"]
    settings = preset_settings("paper", changes)
    assert {stage.dropout for stage in settings.stages} == {0}
    assert settings.stages[-1].lr == 1e-4
    assert settings.config["n_embd"] == 96
    assert preset_settings("paper").stages[-1].dropout == 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("group=S55", "S<n> needs n from 2 to 5"),
        ("group=SV5", "Did you mean"),
        ("stages.0.length=0", "length must be at least 1, got 0"),
        ("stages.1.threshold=0", r"threshold=0.0 at length 3 is outside \(0, 1\]"),
        ("stages.1.threshold=1.5", r"threshold=1.5 at length 3 is outside \(0, 1\]"),
        ("stages.1.length=2", "stages must grow in length"),
        ("wieght_decay=0.1", "Did you mean 'weight_decay'"),
        ("stages.0.droput=0.1", "Did you mean 'dropout'"),
        ("stages.9.lr=1", "no stage '9'"),
        ("stages.0=3", "'stages.0=3': name a field of the stage: stages.0.lr"),
        ("stages.*={}", r"name a field of the stage: stages.\*.lr"),
        ("eval_lengths.0=3", "this list is set as a whole"),
        ("config.attn_pdrop=7", r"config.attn_pdrop=7 is outside \[0, 1\)"),
        ("config.vocab_size=7", "config.vocab_size=7: the vocabulary is always the group's order"),
        ("stages.0.lr=-1", "greater than 0"),
        ("stages.0.lr=.inf", r"stages.0.lr=inf: expected a finite number, e.g. stages.0.lr=0.0001"),
        ("clip=.nan", "clip=nan: expected a finite number, e.g. clip=1.0"),
        ("betas=[0.9, 3]", r"betas.1=3: expected a value less than 1, e.g. betas=\[0.9, 0.999\]"),
        ("stories=10", "fewer than the batch"),
        ("eval_lengths=[]", "eval_lengths is empty: name at least one"),
        ("eval_precisions=[]", r"eval_precisions=\[\]: .* at least 1 entry"),
        ("stages=3", r"stages=3: expected a list, e.g. stages=\[\{\"length\": 4, "),
        ("stages=[3]", r"stages.0=3: expected names and their values"),
        ("stages=[{lr: 1}]", r"stages.0.length is missing: give its value, e.g. stages.0.length=4"),
        ("config=3", r"config=3: expected names and their values$"),
        ("compile=7", "compile=7: expected true or false"),
        ("eval_lengths=[0, -3]", "eval_lengths: a length must be at least 1, got -3"),
        ("seed", "expected key=value"),
    ],
)
def test_wrong_settings_are_one_clear_line(change: str, message: str) -> None:
    with pytest.raises(ScanLMError, match=message) as error:
        preset_settings("smoke", [change])
    assert "\n" not in str(error.value)


def test_a_group_has_one_name() -> None:
    settings = [preset_settings("smoke", [f"group={name}"]) for name in ("S3", "s3")]
    assert settings[0] == settings[1]
    assert settings[1].group == "S3"
    assert record_folder(settings[0]) == record_folder(settings[1])


def test_a_comparison_model_does_not_get_the_scan_models_config() -> None:
    assert preset_settings("smoke", ["model=gpt2_tiny"]).config == {}
    assert preset_settings("smoke", model="gpt2_tiny").config == {}
    changes = ["model=gpt2_tiny", "config.n_embd=16"]
    assert preset_settings("smoke", changes).config == {"n_embd": 16}
    given = {"n_positions": 8}
    assert preset_settings("smoke", {"model": "gpt2_tiny", "config": given}).config == given
    assert preset_settings("smoke", model="gpt2_tiny", config=given).config == given
    assert preset_settings("smoke", ["model=scan"]).config == PRESETS["smoke"]["config"]


def test_t1_settings_need_a_scan_model() -> None:
    with pytest.raises(ScanLMError, match="left_fold acts on T1"):
        preset_settings("smoke", ["model=gpt2", "left_fold=0.5"])
    with pytest.raises(ScanLMError, match="state_noise acts on T1"):
        preset_settings("smoke", ["model=gpt2", "stages.1.state_noise=0.5"])
    with pytest.raises(ScanLMError, match="t1_from_t2 acts on T1"):
        preset_settings("smoke", ["model=gpt2", "stages.1.t1_from_t2=true"])


def test_t1_of_other_depth_cannot_begin_as_t2() -> None:
    settings = preset_settings("paper", ["config.t1_layers=2"])
    with pytest.raises(ScanLMError, match=r"T1 has 2 layers and T2 1: set config\.t1_layers"):
        check_model(settings)


def test_dropout_of_a_model_without_is_refused() -> None:
    settings = preset_settings("smoke", ["model=mamba2_130M", "stages.*.dropout=0.1"])
    message = r"dropout=0\.1: a model of type 'mamba2' has no dropout; set stages\.\*\.dropout to 0"
    with pytest.raises(ScanLMError, match=message):
        check_model(settings)
    check_model(preset_settings("smoke", ["model=mamba2_130M", "stages.*.dropout=0"]))


def test_records_without_copy_and_generators_are_what_they_were() -> None:
    stages = preset_settings("paper").model_dump(mode="json")["stages"]
    assert [stage.get("t1_from_t2") for stage in stages] == [None, True, *[None] * 5]
    assert [stage.get("generators") for stage in stages] == [0.5, *[None] * 6]


def test_generators_are_for_new_words_and_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ScanLMError, match="stories=64 are words of all elements"):
        preset_settings("smoke", [*TINY, "stories=64", "stages.0.generators=0.5"])
    seen: list[tuple[str, float]] = []

    def batch(*args: Any, generators: float = 0.0, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen.append((args[6] if len(args) > 6 else "train", generators))
        return word_batch(*args, generators=generators, **kwargs)

    monkeypatch.setattr(curriculum_step, "word_batch", batch)
    settings = preset_settings("smoke", [*TINY, "stages.0.generators=0.5"])
    learner = Learner(settings, torch.device("cpu"))
    for stage in settings.stages[:2]:
        learner.begin_stage(stage)
        learner.advance(1)
        learner.validate()
    assert seen == [("train", 0.5), ("validation", 0.0), ("train", 0.0), ("validation", 0.0)]


@pytest.mark.parametrize("extra", [("ema=0.5",), ("precision=bf16",)])
def test_a_stage_begins_with_t2_in_t1(extra: tuple[str, ...]) -> None:
    settings = preset_settings("smoke", [*TINY, *extra, "stages.1.t1_from_t2=true"])
    learner = Learner(settings, torch.device("cpu"))
    learner.begin_stage(settings.stages[0])
    learner.advance(2)
    learner.begin_stage(settings.stages[1], stage_step=1)  # resumed: T1 is already its own
    assert not all(_same_in_t1_and_t2(learner).values())
    learner.begin_stage(settings.stages[1])
    assert all(_same_in_t1_and_t2(learner).values())
    learner.advance(1)
    learner.end()
    learner.make_exact()
    assert not any(_same_in_t1_and_t2(learner).values())  # but not tied


def _same_in_t1_and_t2(learner: Learner) -> dict[str, bool]:
    """Of T1's weights, those that a step computes with, exact ones and averages: equal to T2's?"""
    names = [name for name, _ in learner.model.named_parameters()]
    computing = dict(zip(names, learner.computing, strict=True))
    tables = {"": dict(learner.model.named_parameters()), "exact": learner.state()["model"]}
    tables["average"] = dict(zip(names, learner.ema, strict=True)) if learner.ema else {}
    assert computing.keys() == tables[""].keys()
    return {
        f"{table} {name}": torch.equal(weights[name], weights[name.replace("t1.", "t2.", 1)])
        for table, weights in tables.items()
        for name in weights
        if name.startswith("t1.")
    }


# The step


def test_learning_rates_by_hand() -> None:
    stage = Stage(length=4, max_steps=14, lr=0.5, warmup=4, schedule="linear")
    rates = [float(learning_rate(stage, torch.tensor(s, dtype=torch.float64))) for s in range(15)]
    assert rates[:4] == [0.125, 0.25, 0.375, 0.5]
    assert rates[4] == 0.5
    assert rates[9] == pytest.approx(0.25)
    assert rates[14] == 0
    constant = stage.model_copy(update={"schedule": "constant"})
    assert float(learning_rate(constant, torch.tensor(12.0))) == 0.5


def test_dropout_reaches_the_named_part_only() -> None:
    model = ScanLMForCausalLM(ScanLMConfig(vocab_size=6, n_embd=8, n_head=2, t2_layers=1))
    set_dropout(model, 0.25, "t1")
    assert model.t1.h[0].attn.attn_pdrop == model.t1.h[0].mlp.dropout.p == 0.25
    assert model.t2.h[0].attn.attn_pdrop == model.t2.h[0].mlp.dropout.p == model.drop.p == 0
    set_dropout(model, 0.5)
    assert model.t2.h[0].attn.attn_pdrop == model.drop.p == 0.5
    model.t2.h[0].attn.attn_pdrop = 0  # as "config.attn_pdrop=0" has it
    set_dropout(model, 0.5)
    assert model.t2.h[0].attn.attn_pdrop == 0.5


def test_bf16_casts_matrices_once_a_step_and_optimises_exact_ones() -> None:
    settings = preset_settings("smoke", [*TINY, "precision=bf16"])
    learner, plain = (Learner(settings, torch.device("cpu")) for _ in range(2))
    plain.make_exact()  # what is left is autocast
    for one in (learner, plain):
        one.begin_stage(one.settings.stages[1])
        one.advance(1)
    assert learner.read(1) == plain.read(1)
    halved = {n for n, p in learner.model.named_parameters() if p.dtype == torch.bfloat16}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert halved == {f"{t}.h.0.{part}.weight" for t in ("t1", "t2") for part in parts}
    # with gradients in bfloat16 either way, summed up over T1's calls in it by both
    for one, other in zip(learner.computing, plain.computing, strict=True):
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=2e-2, atol=1e-5)
    assert all(p.dtype == torch.float32 for p in (*learner.parameters, *plain.parameters))
    learner.advance(2)
    computing = dict(learner.model.named_parameters())
    exact = {n: p for n, p in learner.state()["model"].items() if n in halved}
    assert all(torch.equal(computing[name], exact[name].bfloat16()) for name in halved)
    assert any(not torch.equal(p, p.bfloat16().float()) for p in exact.values())
    learner.end()
    learner.make_exact()
    for parameter, weight in zip(learner.model.parameters(), learner.parameters, strict=True):
        assert parameter is weight


def test_averaged_weights_are_evaluated_in_both_precisions() -> None:
    settings = preset_settings("smoke", [*TINY, "precision=bf16", "ema=0.5"])
    learner = Learner(settings, torch.device("cpu"))
    learner.begin_stage(settings.stages[0])
    learner.advance(3)
    averages = [average.clone() for average in learner.ema]
    assert not torch.equal(averages[0], learner.parameters[0])
    learner.end()
    exact = dict(zip((n for n, _ in learner.model.named_parameters()), averages, strict=True))
    for name, weight in learner.model.named_parameters():
        assert torch.equal(weight, exact[name].to(weight.dtype)), name
    learner.make_exact()
    for name, weight in learner.model.named_parameters():
        assert torch.equal(weight, exact[name]), name


def test_a_step_does_no_work_on_the_host() -> None:
    """What a CUDA graph forbids: reading values back and copying data from the host."""

    class Forbid(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            name = function.name()
            assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh")
            return function(*args, **(kwargs or {}))

    # without fused AdamW and the model's check of token ids, which read values on a CPU alone
    settings = preset_settings("smoke", [*TINY, "stages.-1.generators=0.5"])
    learner = Learner(settings, torch.device("cpu"))
    learner.begin_stage(settings.stages[-1])
    learner.advance(2)
    learner.validate()
    learner.model._check_input = lambda *args: None  # type: ignore[operator, assignment]
    learner._optimise = lambda *args: None  # type: ignore[method-assign, assignment]
    with Forbid():
        learner.train_step()
        learner.validate_step()


def test_folding_is_another_bracketing_of_the_same_words() -> None:
    torch.manual_seed(0)
    config = {**PRESETS["smoke"]["config"], "initializer_range": 0.5}
    model = ScanLMForCausalLM(ScanLMConfig(vocab_size=6, **config)).double().eval()
    x, _ = word_batch("S3", 4, 7)
    plain, folded = word_logits(model, x), folded_logits(model, x, 2)
    torch.testing.assert_close(folded[2:], plain[2:])
    torch.testing.assert_close(folded[:, :3], plain[:, :3])  # up to 3 leaves there is one tree
    assert (folded[:2, 3:] - plain[:2, 3:]).abs().max() > 0.01

    class Sum(nn.Module):
        def forward(self, windows: list[Tensor], keep: list[int]) -> list[Tensor]:
            return [w.sum(1, keepdim=True) for w in windows]

    model.t1 = Sum()  # associative: then the bracketing makes no difference
    torch.testing.assert_close(folded_logits(model, x, 4), word_logits(model, x))


def test_folding_words_whose_last_chunk_is_partial() -> None:
    torch.manual_seed(0)
    config = {**PRESETS["smoke"]["config"], "initializer_range": 0.5, "chunk_size": 2}
    model = ScanLMForCausalLM(ScanLMConfig(vocab_size=6, **config)).double().eval()
    for length in range(1, 8):  # up to 3 whole chunks there is one tree
        x, _ = word_batch("S3", 2, length)
        torch.testing.assert_close(folded_logits(model, x, 2), word_logits(model, x))
    settings = preset_settings("smoke", [*TINY, "left_fold=0.5", "config.chunk_size=2"])
    learner = Learner(settings, torch.device("cpu"))
    learner.begin_stage(settings.stages[1])  # words of 3 letters
    learner.advance(1)
    assert math.isfinite(learner.read(1)[0])


def test_every_seed_of_a_run_is_one_of_torch() -> None:
    seeds = [0, 1, 2**23, 2**24 - 1, 2**24, 2**24 + 1, 2**32 - 1]
    states = {step_seed(seed, step) for seed in seeds for step in (0, 1, 2**32 - 1)}
    assert len(states) == 3 * len(seeds)
    assert max(states) < 2**64
    masks = set()  # of dropout in one step on a CPU
    for seed in seeds:
        torch.manual_seed(step_seed(seed, 5))
        masks.add(tuple((torch.rand(64) < 0.5).tolist()))
    assert len(masks) == len(seeds)
    settings = preset_settings("smoke", TINY, seed=2**32 - 1)
    learner = Learner(settings, torch.device("cpu"))
    learner.begin_stage(settings.stages[0])
    learner.advance(1)
    assert math.isfinite(learner.read(1)[0])


@pytest.mark.parametrize("preset", ["paper", "laptop", "smoke"])
def test_t2_can_tell_x_from_x_x(preset: str) -> None:
    """[x] and [x; x] are one window to attention, but their products differ."""
    torch.manual_seed(0)
    config = {**PRESETS[preset]["config"], "n_embd": 32, "n_head": 4, "initializer_range": 0.5}
    model = ScanLMForCausalLM(ScanLMConfig(vocab_size=6, **config)).eval()
    first, second = word_logits(model, torch.tensor([[4, 4]]))[0]
    assert not torch.allclose(first, second, atol=0.01)


# Whole runs


def _metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["name"] != "steps_per_second"]


def test_noise_weakens_states_and_keeps_their_norms() -> None:
    torch.manual_seed(0)
    states = 3 * torch.randn(2000, 64) + 1
    found = noisy(states, 2.0)
    torch.testing.assert_close(found.norm(dim=-1), states.norm(dim=-1))
    left = F.cosine_similarity(found, states, dim=-1)  # 1 / sqrt(1 + size^2), up to chance
    assert left.max() > 0.98
    assert left.min() < 0.55
    # of sizes uniform up to 2 the mean is asinh(2) / 2
    assert left.mean() == pytest.approx(math.asinh(2) / 2, abs=0.02)
    torch.testing.assert_close(noisy(states, 0.0), states)


def test_noise_is_of_its_stage_and_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[float] = []

    def seen(states: Tensor, largest: float) -> Tensor:
        sizes.append(largest)
        return states

    monkeypatch.setattr(curriculum_step, "noisy", seen)
    settings = preset_settings("smoke", [*TINY, "stages.1.state_noise=0.5"])
    learner = Learner(settings, torch.device("cpu"))
    for stage, expected in zip(settings.stages, ([], [0.5], []), strict=True):
        learner.begin_stage(stage)
        learner.advance(1)
        learner.validate()
        assert sorted(set(sizes)) == expected, stage.length
        sizes.clear()


def _status(folder: Path, root: Path | None = None) -> str:
    """What the record says; with a root, that of the run of the same settings there."""
    return Run.open(root / folder.parent.name / folder.name if root else folder).status


def _weights(folder: Path) -> dict[str, Tensor]:
    return ScanLMForCausalLM.from_pretrained(folder / "checkpoint-final").state_dict()


@pytest.mark.parametrize(
    "extra",
    [
        ("ema=0.9", "stages.*.state_noise=0.5", "left_fold=0.5"),
        ("precision=bf16", "stages.1.t1_from_t2=true"),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, extra: tuple[str, ...]
) -> None:
    changes = [*TINY, *extra]
    settings = preset_settings("smoke", changes)
    whole = train(settings, root=tmp_path / "whole", device="cpu", save_weights="fp32")
    for _ in range(4):
        torch.manual_seed(torch.seed())  # what others draw in between must not matter
        part = train(
            settings, root=tmp_path / "parts", device="cpu", max_steps=8, save_weights="fp32"
        )
    assert not (part.folder / "checkpoint.pt").exists()
    assert _metrics(part.folder) == _metrics(whole.folder)
    expected, resumed = _weights(whole.folder), _weights(part.folder)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_runs_side_by_side_equal_runs_alone(tmp_path: Path) -> None:
    both = [preset_settings("smoke", TINY, seed=seed) for seed in (0, 1)]
    together = train_many(both, root=tmp_path / "together", device="cpu")
    alone = train(both[1], root=tmp_path / "alone", device="cpu")
    assert _metrics(together[1].folder) == _metrics(alone.folder)
    assert _metrics(together[0].folder) != _metrics(alone.folder)


def test_the_record_says_what_ended_a_stage(tmp_path: Path) -> None:
    changes = [*TINY, "stages.0.threshold=0.01"]
    record = train(preset_settings("smoke", changes), root=tmp_path, device="cpu")
    summary = json.loads((record.folder / "summary.json").read_text())
    stages = [(s["length"], s["steps"], s["ended_by"]) for s in summary["stages"]]
    assert stages == [(2, 4, "threshold"), (3, 10, "budget"), (4, 10, "budget")]
    assert summary["steps"] == 24
    assert summary["tokens"] == 8 * (4 * 2 + 10 * 3 + 10 * 4)
    tested = [row for row in _metrics(record.folder) if row.get("split") == "test"]
    assert {row["length"] for row in tested} == {4, 8}


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ScanLMError, match="device 'cudo' cannot be used"):
        train_many([preset_settings("smoke")], tmp_path, "cudo")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["config.t1_layer=3"], "unknown field 't1_layer' of ScanLMConfig. Did you mean 't1_layer"),
        (["config.device=cpu"], "unknown field 'device' of ScanLMConfig"),
        (["config.n_embd=7"], "n_embd=7 is not divisible by n_head=4"),
        (["config.n_inner=-3"], "n_inner"),
        (["model=gpt2_tiny", "config.n_embed=16"], "unknown field 'n_embed' of GPT2Config. Did"),
        (["model=gpt2_tiny", "config.entry=16"], "unknown field 'entry' of GPT2Config"),
        (["model=gpt2_tinny"], "unknown model 'gpt2_tinny'. Did you mean 'gpt2_tiny'"),
        (["model=gpt2_tiny", "config.n_positions=3"], "length 4 is beyond n_positions=3"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, changes: list[str], message: str
) -> None:
    fine = preset_settings("smoke", TINY)
    wrong = preset_settings("smoke", changes)
    with pytest.raises(ScanLMError, match=message) as error:
        train_many([fine, wrong], root=tmp_path, device="cpu")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_sweep_refuses_a_model_that_cannot_be() -> None:
    with pytest.raises(ScanLMError, match="Did you mean 't1_layers'"):
        state_tracking_run({"preset": "smoke", "config.t1_layer": 3}, None)


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_a_time_that_is_none_is_refused(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(ScanLMError, match=r"max_seconds=.*: expected seconds"):
        train(preset_settings("smoke", TINY), root=tmp_path, device="cpu", max_seconds=seconds)
    assert not list(tmp_path.iterdir())


def test_no_time_left_saves_and_trains_nothing(tmp_path: Path) -> None:
    record = train(preset_settings("smoke", TINY), root=tmp_path, device="cpu", max_seconds=0)
    assert (record.folder / "checkpoint.pt").exists()
    assert not (record.folder / "summary.json").exists()
    assert _status(record.folder) == "interrupted"


def test_an_error_is_recorded_in_the_runs_that_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [preset_settings("smoke", TINY, seed=seed) for seed in (0, 1, 2)]
    done = train(runs[0], root=tmp_path, device="cpu")
    read = Learner.read

    def fails(learner: Learner, steps: int) -> Any:
        if learner.settings.seed == 2:
            raise RuntimeError("the device is gone")
        return (math.nan, *read(learner, steps)[1:])

    monkeypatch.setattr(Learner, "read", fails)
    with pytest.raises(RuntimeError, match="the device is gone"):
        train_many(runs, root=tmp_path, device="cpu")
    folders = [curriculum.record_folder(entry, tmp_path) for entry in runs]
    assert [_status(folder) for folder in folders] == ["finished", "diverged", "failed"]
    assert Run.open(folders[2]).info["message"] == "the device is gone"
    assert done.folder == folders[0]
    monkeypatch.setattr(Learner, "read", read)
    seen: list[str] = []
    train_many(runs, tmp_path, "cpu", progress=lambda line: seen.extend(map(_status, folders[1:])))
    assert "running" in seen
    assert [_status(folder) for folder in folders] == ["finished"] * 3


def test_what_becomes_of_each_run_is_said(tmp_path: Path) -> None:
    settings = preset_settings("smoke", TINY)
    said: list[str] = []
    run = train(settings, root=tmp_path, device="cpu", max_seconds=0, progress=said.append)
    first = settings.stages[0]
    place = f"{run.folder.name}: at length {first.length}, step 0 of {first.max_steps}"
    assert said.pop() == f"{place}; saved, the same command goes on\nrun: {run.folder}"
    train(settings, root=tmp_path, device="cpu", progress=said.append)
    reached = curriculum.reach_text(run.summary)
    assert said[-1].endswith(f"; evaluated, {reached}\nrun: {run.folder}")
    last = run.summary["stages"][-1]
    assert f"steps, {last['worst_position']:.1%} at the worst position (" in said[-1]
    train(settings, root=tmp_path, device="cpu", progress=said.append)
    assert said[-1] == f"already finished, {reached}: {run.folder}"
    options: dict[str, Any] = {"root": tmp_path, "device": "cpu", "save_weights": "bf16"}
    train(settings, progress=said.append, **options)
    start = f"already finished, {reached}: {run.folder}; its weights were not kept: "
    assert said[-1].startswith(start)
    (run.folder / "checkpoint-final").mkdir()
    train(settings, progress=said.append, **options)
    assert said[-1] == f"already finished, {reached}: {run.folder}"


def test_a_run_asked_for_twice_is_refused(tmp_path: Path) -> None:
    settings = preset_settings("smoke", TINY)
    with pytest.raises(ScanLMError, match="asked for twice: leave one out"):
        train_many([settings, settings], root=tmp_path, device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_run_that_another_process_trains_is_left_alone(tmp_path: Path) -> None:
    settings = preset_settings("smoke", TINY)
    record = train(settings, root=tmp_path, device="cpu", max_seconds=0)
    refused = pytest.raises(ScanLMError, match="is being written by another process")
    beside = preset_settings("smoke", TINY, seed=1)
    with Run.open(record.folder).only_writer(), refused:
        train_many([beside, settings], root=tmp_path, device="cpu")
    assert not (record.folder / "metrics.jsonl").exists()
    assert _status(record.folder) != "failed"
    assert _status(curriculum.record_folder(beside, tmp_path)) == "failed"


def test_an_interrupt_waits_for_the_steps_that_have_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [preset_settings("smoke", TINY, seed=seed) for seed in (0, 1)]
    whole = train_many(both, root=tmp_path / "whole", device="cpu")
    step, steps = Learner.train_step, 0

    def interrupted(learner: Learner) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:  # the second step of the second run
            signal.raise_signal(signal.SIGINT)
        step(learner)

    monkeypatch.setattr(Learner, "train_step", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        train_many(both, root=tmp_path / "cut", device="cpu")
    signal.signal(signal.SIGINT, before)
    assert steps == 8  # both runs up to their first record
    assert [_status(one.folder, tmp_path / "cut") for one in whole] == ["interrupted"] * 2
    again = train_many(both, root=tmp_path / "cut", device="cpu")
    assert [_status(one.folder, tmp_path / "cut") for one in whole] == ["finished"] * 2
    for one, other in zip(whole, again, strict=True):
        assert _metrics(one.folder) == _metrics(other.folder)


def test_a_run_that_ends_first_is_recorded_whatever_becomes_of_the_others(tmp_path: Path) -> None:
    short = preset_settings("smoke", TINY, seed=0)
    long = preset_settings("smoke", [*TINY, "stages.-1.max_steps=30"], seed=1)
    whole = train_many([short, long], root=tmp_path / "whole", device="cpu")

    def killed(line: str) -> None:
        if "; evaluated" in line:
            raise RuntimeError("the machine is taken away")

    with pytest.raises(RuntimeError, match="taken away"):
        train_many([short, long], root=tmp_path / "cut", device="cpu", progress=killed)
    states = [_status(one.folder, tmp_path / "cut") for one in whole]
    assert states == ["finished", "failed"]
    last = max(row["step"] for row in _metrics(curriculum.record_folder(long, tmp_path / "cut")))
    assert last < whole[1].summary["steps"]  # it was not through
    again = train_many([short, long], root=tmp_path / "cut", device="cpu")
    for one, other in zip(whole, again, strict=True):
        assert _metrics(one.folder) == _metrics(other.folder)


def test_an_evaluation_that_fails_keeps_no_other_run_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = preset_settings("smoke", TINY, seed=0)
    long = preset_settings("smoke", [*TINY, "stages.-1.max_steps=30"], seed=1)
    finish = curriculum._Trainee.finish

    def out_of_memory(trainee: Any, *args: Any) -> None:
        if trainee.settings.seed == 0:
            raise RuntimeError("out of memory")
        finish(trainee, *args)

    with monkeypatch.context() as patched:
        patched.setattr(curriculum._Trainee, "finish", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            train_many([short, long], root=tmp_path, device="cpu")
    folders = [curriculum.record_folder(one, tmp_path) for one in (short, long)]
    assert [_status(folder) for folder in folders] == ["failed", "finished"]
    assert Run.open(folders[0]).info["message"] == "out of memory"
    again = train_many([short, long], root=tmp_path, device="cpu")  # trained already
    assert [record.status for record in again] == ["finished"] * 2


def test_no_evaluation_begins_when_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [preset_settings("smoke", TINY, seed=seed) for seed in (0, 1)]
    finish, waited = curriculum._Trainee.finish, 0.0

    def slow(trainee: Any, *args: Any) -> None:
        nonlocal waited
        waited += 3600.0
        finish(trainee, *args)

    clock = time.perf_counter
    monkeypatch.setattr(curriculum._Trainee, "finish", slow)
    monkeypatch.setattr(curriculum.time, "perf_counter", lambda: clock() + waited)
    # both are read, and so through, when it is time to save
    monkeypatch.setattr(curriculum._Trainee, "ready", lambda self: False)
    records = train_many(
        both, root=tmp_path, device="cpu", max_seconds=1800, checkpoint_seconds=0.0
    )
    assert [record.status for record in records] == ["finished", "interrupted"]


@pytest.mark.parametrize("ended", ["killed", "diverged"])
def test_a_run_begun_again_without_a_checkpoint_has_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: str
) -> None:
    settings = preset_settings("smoke", TINY)
    whole = train(settings, root=tmp_path / "whole", device="cpu")
    read = Learner.read

    def diverged(learner: Learner, steps: int) -> Any:
        loss, *others = read(learner, steps)
        return (math.nan if learner.step == 8 else loss, *others)

    if ended == "diverged":
        monkeypatch.setattr(Learner, "read", diverged)
    part = train(settings, root=tmp_path / "part", device="cpu", max_steps=8)
    monkeypatch.setattr(Learner, "read", read)
    (part.folder / "checkpoint.pt").unlink(missing_ok=True)
    assert len(_metrics(part.folder)) == 10
    again = train(settings, root=tmp_path / "part", device="cpu")
    assert again.folder == part.folder
    assert _metrics(again.folder) == _metrics(whole.folder)


@pytest.mark.parametrize("moment", ["evaluated in part", "written down"])
def test_an_evaluation_begun_again_has_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    probed = ["eval_precisions=[fp32, bf16]", "eval_probe_length=16", "eval_probe_words=8"]
    settings = preset_settings("smoke", [*TINY, *probed])
    whole = train(settings, root=tmp_path / "whole", device="cpu")

    def interrupted(*args: Any, **options: Any) -> Any:
        if moment == "written down" or "bf16" in args:
            raise KeyboardInterrupt
        return evaluate_lengths(*args, **options)

    place = (Run, "finish") if moment == "written down" else (curriculum, "evaluate_lengths")
    with monkeypatch.context() as patched:
        patched.setattr(*place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(settings, root=tmp_path / "part", device="cpu")
    part = curriculum.record_folder(settings, tmp_path / "part")
    assert (len(_metrics(part)) == len(_metrics(whole.folder))) == (moment == "written down")
    again = train(settings, root=tmp_path / "part", device="cpu")
    assert _metrics(again.folder) == _metrics(whole.folder)


def test_a_run_whose_last_steps_are_read_by_a_checkpoint_ends_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as on a GPU, where queued steps are not done yet when it is time to save
    monkeypatch.setattr(curriculum._Trainee, "ready", lambda self: False)
    settings = preset_settings("smoke", TINY)
    record = train_many([settings], root=tmp_path, device="cpu", checkpoint_seconds=0.0)[0]
    assert record.finished


def test_a_diverged_run_is_marked_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = preset_settings("smoke", TINY, seed=0)
    bad = preset_settings("smoke", TINY, seed=1)
    original: Callable[..., None] = Learner.begin_stage

    def break_weights(learner: Learner, *args: Any) -> None:
        original(learner, *args)
        if learner.settings.seed == 1:
            nn.init.constant_(learner.parameters[0], torch.nan)

    monkeypatch.setattr(Learner, "begin_stage", break_weights)
    fine, broken = train_many([good, bad], root=tmp_path, device="cpu")
    assert json.loads((broken.folder / "run.json").read_text())["status"] == "diverged"
    assert json.loads((fine.folder / "run.json").read_text())["status"] == "finished"


def test_resuming_with_another_curriculum_is_refused() -> None:
    settings = preset_settings("smoke", TINY)
    saved = settings.model_dump(mode="json")
    check_same_training(settings, {**saved, "eval_sequences": 5}, "checkpoint.pt")
    other = preset_settings("smoke", [*TINY, "stages.0.lr=0.5"])
    with pytest.raises(ScanLMError, match="trained with another stages"):
        check_same_training(other, saved, "checkpoint.pt")


def test_a_checkpoint_of_another_curriculum_in_the_folder_is_refused(tmp_path: Path) -> None:
    first = preset_settings("smoke", TINY)
    record = train(first, root=tmp_path, device="cpu", max_steps=4)
    other = preset_settings("smoke", [*TINY, "clip=0.5"])
    with pytest.raises(ScanLMError, match="trained with another clip"):
        train_many([other], records=[record], device="cpu")


@pytest.mark.parametrize("left", [0, 1, 500, 5000, 50_000, -1], ids=lambda left: f"bytes={left}")
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path: Path, left: int) -> None:
    settings = preset_settings("smoke", TINY)
    path = train(settings, root=tmp_path, device="cpu", max_steps=4).folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ScanLMError, match=r"is damaged \(.+\): remove it, and training") as error:
        train(settings, root=tmp_path, device="cpu")
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    path.unlink()
    path.mkdir()  # what cannot be read is not called damaged
    with pytest.raises(IsADirectoryError) as refused:
        train(settings, root=tmp_path, device="cpu")
    assert refused.value.filename == str(path)
    path.rmdir()
    assert train(settings, root=tmp_path, device="cpu", max_steps=4).folder == path.parent


def test_z2_is_learned_and_goes_beyond_its_training_length(tmp_path: Path) -> None:
    changes = ["stages.0.max_steps=400", "log_every=25"]
    settings = preset_settings("smoke", changes)
    settings = settings.model_copy(update={"stages": settings.stages[:1]})
    record = train(settings, root=tmp_path, device="cpu")
    stage = json.loads((record.folder / "summary.json").read_text())["stages"][0]
    assert stage["ended_by"] == "threshold"


def test_open_run_finds_the_run_of_equal_settings(tmp_path: Path) -> None:
    first = open_run(preset_settings("smoke", TINY), tmp_path)
    assert open_run(preset_settings("smoke", TINY), tmp_path).folder == first.folder
    assert open_run(preset_settings("smoke", TINY, seed=1), tmp_path).folder != first.folder
    assert first.folder.parent == tmp_path / "z2"


# Evaluation


def test_wilson_interval_by_hand() -> None:
    low, high = wilson(8, 10)  # the standard example: 0.490 to 0.943
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson(10, 10)[1] == 1
    assert wilson(0, 10)[0] == 0


def test_accuracies_at_all_lengths_from_one_pass() -> None:
    model, said = Oracle("S5", wrong=(5,)), list[str]()
    result = evaluate_lengths(model, "S5", [4, 6, 12], 100, batch_tokens=240, progress=said.append)
    assert [line.rsplit(":")[0] for line in said] == ["100 words of length 12 in fp32"]
    assert result.accuracy[4].value == result.accuracy_sequence[4].value == 1
    assert result.accuracy_last[6].value == result.accuracy_sequence[6].value == 0.5
    assert result.accuracy[6].value == pytest.approx(1 - 0.5 / 6)
    assert result.accuracy_last[12].value == 1
    assert result.accuracy_sequence[12].value == 0.5
    shares = [p.value for _, p in result.by_position[12]]
    assert shares == [1, 1, 1, 1, 1, 0.5, 1, 1, 1, 1, 1, 1]
    assert result.accuracy[4].n == 400
    assert result.accuracy_last[4].n == 100
    assert result.accuracy[6].low < result.accuracy[6].value < result.accuracy[6].high


def test_the_words_do_not_depend_on_how_they_are_cut_into_batches() -> None:
    torch.manual_seed(0)
    model = ScanLMForCausalLM(ScanLMConfig(vocab_size=6, **PRESETS["smoke"]["config"]))
    results = [evaluate_lengths(model, "S3", [20], 50, batch_tokens=n) for n in (20 * 50, 20 * 7)]
    assert results[0].by_position == results[1].by_position
    assert results[0].accuracy == results[1].accuracy


def test_shorter_lengths_equal_their_own_pass_for_a_causal_model() -> None:
    torch.manual_seed(0)
    model = ScanLMForCausalLM(ScanLMConfig(vocab_size=6, **PRESETS["smoke"]["config"]))
    x, y = word_batch("S3", 64, 20, stream="test")
    long = evaluate_lengths(model, "S3", [7, 20], 64, batch_tokens=64 * 20)
    model.eval()
    right = model(input_ids=x[:, :7]).logits.argmax(-1) == y[:, :7]
    assert long.accuracy[7].value == pytest.approx(right.double().mean().item())
    assert long.accuracy_sequence[7].value == right.all(1).double().mean().item()


def test_reach_stops_at_the_first_length_that_fails() -> None:
    assert reach({4: 1.0, 8: 0.995, 16: 0.98, 32: 0.999}) == 8
    assert reach({4: 0.5}) == 0
    assert reach({4: float("nan"), 8: 1.0}) == 0


def test_bins_are_single_positions_then_eight_an_octave() -> None:
    assert bin_edges(10) == list(range(1, 11))
    edges = bin_edges(1024)
    assert edges[31] == 32
    assert edges[-1] == 1024
    assert len(edges) == 32 + 5 * 8


def test_beyond_the_positions_is_refused_and_recorded(tmp_path: Path) -> None:
    config = ScanLMConfig(vocab_size=6, n_embd=8, n_head=2, n_positions=16, chunk_size=1)
    model = ScanLMForCausalLM(config)
    with pytest.raises(ScanLMError, match="length 17 is beyond n_positions=16"):
        evaluate_lengths(model, "S3", [4, 17], 4)
    with pytest.raises(ScanLMError, match="length must be at least 1, got 0"):
        evaluate_lengths(model, "S3", [0, 4], 4)
    changes = [*TINY, "config.position_embedding=absolute", "config.n_positions=6"]
    record = train(preset_settings("smoke", changes), root=tmp_path, device="cpu")
    summary = json.loads((record.folder / "summary.json").read_text())
    assert summary["not_possible"] == {"8": "beyond the 6 positions of the model"}
    assert curriculum.reach_text({"reach": {}}).startswith("at no length")
    assert curriculum.reach_text({"reach": {"float32": 0, "bfloat16": 4}}) == (
        "below 99 % at any length (float32), 99 % up to length 4 (bfloat16)"
    )
    assert curriculum.reach_text(summary).endswith("; not tested: 8")


def test_a_run_of_a_file_is_found_by_what_the_file_says(tmp_path: Path) -> None:
    text = "family: gpt2\nconfig: {n_layer: 1, n_embd: 16, n_head: 2, n_positions: 64}\n"
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(f"id: mine\n{text}")
    ids = [
        curriculum.record_folder(
            preset_settings("smoke", model=str(tmp_path / folder / "mine.yaml")), "x"
        ).name
        for folder in ("here", "there")
    ]
    assert ids[0] == ids[1]
    assert ids[0].startswith("mine-s0-")
    path = tmp_path / "here" / "mine.yaml"
    path.write_text(path.read_text().replace("n_layer: 1", "n_layer: 2"))
    changed = curriculum.record_folder(preset_settings("smoke", model=str(path)), "x").name
    assert changed != ids[0]


def test_a_damaged_summary_does_not_count_as_finished(tmp_path: Path) -> None:
    settings = preset_settings("smoke", TINY)
    run = train(settings, root=tmp_path, device="cpu")
    (run.folder / "summary.json").write_text("{")
    with pytest.raises(ScanLMError, match=r"summary\.json"):
        train(settings, root=tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("changes", "deepest"),
    [
        (["eval_probe_length=20"], 6),
        (["eval_probe_length=20", "config.chunk_size=2"], 4),
        (["eval_probe_length=0"], None),
        (["eval_probe_length=20", "config.chunk_size=4"], None),  # trained on single chunks
    ],
    ids=str,
)
def test_the_states_of_a_scan_model_are_probed(
    tmp_path: Path, changes: list[str], deepest: int | None
) -> None:
    settings = preset_settings("smoke", [*TINY, "eval_probe_words=5", *changes])
    record = train(settings, root=tmp_path, device="cpu")
    metrics = read_metrics(record.folder)
    states = metrics[metrics["name"] == "state_probe_error"]
    if deepest is None:
        assert states.empty
        return
    # of up to 19 chunks those of 15 and of 19 are deepest; of up to 9, those of 7
    assert states["depth"].max() == deepest
    assert (metrics["name"] == "state_gain").sum() == 5
