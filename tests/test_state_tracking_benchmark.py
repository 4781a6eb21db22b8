"""Steps a second of state tracking: what is measured, recorded and refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from scanlm.benchmark import state_tracking
from scanlm.benchmark.state_tracking import StateSpeedSettings, benchmark_state_tracking
from scanlm.cli import app
from scanlm.errors import ScanLMError
from scanlm.records import read_metrics, read_runs

CHANGES = ("config.n_embd=16", "stages.*.batch_size=4", "stages.*.dropout=0.1")


def tiny(root: Path, **changes: Any) -> StateSpeedSettings:
    fields: dict[str, Any] = {"preset": "smoke", "changes": CHANGES, "lengths": (2, 4)}
    fields |= {"runs": (1, 3), "steps": 20, "seconds": 0.0, "device": "cpu", "root": str(root)}
    return StateSpeedSettings(**{**fields, **changes})


def test_rates_are_sums_over_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advanced: dict[int, int] = {}

    def seconds(learners: Any, steps: int, device: Any) -> float:
        for learner in learners:
            advanced[learner.settings.seed] = advanced.get(learner.settings.seed, 0) + steps
        return 2.0

    monkeypatch.setattr(state_tracking, "_seconds", seconds)
    lines: list[str] = []
    run = benchmark_state_tracking(tiny(tmp_path), lines.append)
    rates = read_metrics(run.folder).query("name == 'steps_per_second'")
    assert list(zip(rates["length"], rates["runs"], rates["value"], strict=True)) == [
        (2, 1, 10.0), (2, 3, 30.0), (4, 1, 10.0), (4, 3, 30.0),
    ]  # fmt: skip
    assert set(rates["way"]) == {"eager"}
    assert advanced[0] == 2 * advanced[1] == 2 * advanced[2]  # the first is in every measurement
    kernels = read_metrics(run.folder).query("name == 'kernel_milliseconds'")
    assert set(zip(kernels["length"], kernels["runs"], strict=True)) == {(2, 1), (4, 1)}
    assert {"aten::addmm", "aten::_fused_adamw_"} <= set(kernels["kernel"])
    assert run.summary["steps_per_second"] == {"eager, length 2": 30.0, "eager, length 4": 30.0}
    assert len(lines) == 4


def test_steps_are_taken_in_turns() -> None:
    class Learner:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def advance(self, steps: int) -> None:
            self.steps.append(steps)

    both = [Learner(), Learner()]
    assert state_tracking._seconds(both, 50, torch.device("cpu")) >= 0  # type: ignore[arg-type]
    assert [learner.steps for learner in both] == [[20, 20, 10]] * 2


@pytest.fixture
def no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles take seconds."""
    monkeypatch.setattr(state_tracking, "kernel_milliseconds", lambda *_: {})


@pytest.mark.usefixtures("no_profile")
def test_an_interrupted_benchmark_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = state_tracking._measure, []

    def stops(*arguments: Any) -> Any:
        calls.append(arguments[1:4])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(state_tracking, "_measure", stops)
    settings = tiny(tmp_path, lengths=(2,))
    with pytest.raises(KeyboardInterrupt):
        benchmark_state_tracking(settings, lambda line: None)
    assert list(read_runs(tmp_path)["status"]) == ["interrupted"]
    run = benchmark_state_tracking(settings, lambda line: None)
    assert run.finished
    assert calls == [("eager", 2, 1), ("eager", 2, 3), ("eager", 2, 3)]
    lines: list[str] = []
    benchmark_state_tracking(settings, lines.append)
    assert lines == [f"already finished: {run.folder}"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": ("captred",)}, "unknown way 'captred'. Did you mean 'captured'"),
        ({"ways": ("captured",)}, "way 'captured' needs a GPU"),
        ({"runs": (0,)}, "runs: 0 is not possible"),
        ({"steps": 0}, "steps: 0 is not possible"),
        (
            {"lengths": (5,)},
            "length 5: preset 'smoke' has no such stage; choose some of 2, 3, 4 (--lengths)",
        ),
        ({"lengths": (2, 2)}, "lengths: 2 is given twice"),
        ({"runs": (1, 2, 1)}, "runs: 1 is given twice"),
        ({"runs": ()}, "runs is empty: name at least one"),
        ({"lengths": ()}, "lengths is empty: name at least one"),
        ({"ways": ()}, "no ways given: name some of eager, captured, compiled"),
        ({"preset": "smok"}, "unknown preset 'smok'"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScanLMError) as caught:
        tiny(tmp_path, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "lengths"),
    [("paper", (3, 16)), ("original", (4, 16)), ("laptop", (3, 8)), ("smoke", (3, 4))],
)
def test_lengths_are_the_presets(preset: str, lengths: tuple[int, ...]) -> None:
    assert StateSpeedSettings(preset=preset).chosen_lengths() == lengths


@pytest.mark.usefixtures("no_profile")
def test_lengths_that_are_named_or_not_are_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_tracking, "_seconds", lambda learners, steps, device: 2.0)
    settings = tiny(tmp_path, lengths=None, runs=(1,))
    run = benchmark_state_tracking(settings, lambda line: None)
    assert run.summary["steps_per_second"].keys() == {"eager, length 3", "eager, length 4"}
    named = tiny(tmp_path, lengths=(3, 4), runs=(1,))
    assert benchmark_state_tracking(named, lambda line: None).folder == run.folder


@pytest.mark.usefixtures("no_profile")
def test_the_command(tmp_path: Path) -> None:
    words = ["benchmark", "state-tracking", "--preset", "smoke", "--lengths", "2", "--runs", "1"]
    words += ["--steps", "20", "--seconds", "0", "--device", "cpu", "--root", str(tmp_path)]
    words += ["--set", "config.n_embd=16", "--set", "stages.*.batch_size=4"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "eager, 1 run at length 2:" in result.output
    assert "run: " in result.output
