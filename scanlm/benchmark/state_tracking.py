"""Optimiser steps a second of state tracking: small models on short words starve a GPU.

Three ways to do the same step: ``eager`` starts every kernel from the host, ``captured`` replays it
as one CUDA graph, ``compiled`` has the model's parts fused by ``torch.compile`` as well. Each is
measured for words of several lengths and for several runs side by side in one process, whose rates
are summed up. Of one run alone the time of each kernel is measured, too. Recorded in a run of the
experiment ``state_tracking_speed``; an interrupted run goes on when started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scanlm.benchmark.checks import check_filled, check_once, check_positive, check_some
from scanlm.benchmark.kernel_times import kernel_milliseconds, short_name
from scanlm.benchmark.timing import synchronize
from scanlm.curriculum_settings import Stage, StateTrackingSettings, preset_settings
from scanlm.curriculum_step import EAGER_STEPS, Learner
from scanlm.devices import machine_name, usable_device
from scanlm.errors import ScanLMError, check_name
from scanlm.records import Run, read_metrics
from scanlm.values import check_duration

WAYS = ("eager", "captured", "compiled")
TURN = 20  # steps that one run queues before the next one does
PROFILED = 10  # steps


@dataclass(frozen=True)
class StateSpeedSettings:
    """What is measured.

    Args:
        preset: of ``curriculum_settings``; its stages say batch and dropout of each length.
        changes: ``key=value`` texts for it.
        lengths: of the words; each must be one of the preset's stages. ``None``: 3, or the first
            where there is no 3, and the last.
        ways: see above; ``None``: all on a GPU, elsewhere "eager".
        runs: numbers of runs side by side.
        steps: timed at most, of each run.
        seconds: for them, about.
        device: "cuda", "cpu", ...; ``None``: a GPU if there is one.
        root: folder of all runs.

    Raises:
        ScanLMError: an unknown way, preset or setting, a length without a stage, a number below 1,
            an entry given twice, a way that needs a GPU.
    """

    preset: str = "paper"
    changes: tuple[str, ...] = ()
    lengths: tuple[int, ...] | None = None
    ways: tuple[str, ...] | None = None
    runs: tuple[int, ...] = (1, 2, 5)
    steps: int = 400
    seconds: float = 3.0
    device: str | None = None
    root: str = "data/runs"

    def __post_init__(self) -> None:
        """Check the values."""
        check_duration("seconds", self.seconds)
        check_once(self)
        check_some("ways", self.ways, WAYS)
        check_filled(self, "lengths", "runs")
        for way in self.ways or ():
            check_name("way", way, WAYS)
        on_gpu = usable_device(self.device).type == "cuda"
        refused = next((way for way in self.ways or () if way != "eager" and not on_gpu), None)
        if refused is not None:
            raise ScanLMError(f"way {refused!r} needs a GPU: CUDA graphs do not exist elsewhere")
        check_positive({"runs": self.runs, "steps": (self.steps,)})
        for length in self.chosen_lengths():
            self.stage(length)

    def chosen_lengths(self) -> tuple[int, ...]:
        """The lengths asked for, or those that suit the preset."""
        if self.lengths is not None:
            return self.lengths
        stages = [stage.length for stage in self.training().stages]
        # 3 is the one that machines are compared at
        return tuple(dict.fromkeys((3 if 3 in stages else stages[0], stages[-1])))

    def training(self, way: str = "eager", seed: int = 0) -> StateTrackingSettings:
        """The settings of one run."""
        settings = preset_settings(self.preset, self.changes, seed=seed)
        return settings.model_copy(update={"compile": way == "compiled"})

    def stage(self, length: int) -> Stage:
        """The preset's stage of that length."""
        stages = {stage.length: stage for stage in self.training().stages}
        if length not in stages:
            raise ScanLMError(
                f"length {length}: preset {self.preset!r} has no such stage; choose some of "
                f"{', '.join(map(str, stages))} (--lengths)"
            )
        return stages[length]


def benchmark_state_tracking(
    settings: StateSpeedSettings, report: Callable[[str], None] = print
) -> Run:
    """Measure, or finish measuring, what the settings name.

    Args:
        settings: see ``StateSpeedSettings``.
        report: gets a line for each measurement.

    Returns:
        The finished run.

    Raises:
        KeyboardInterrupt: recorded; what was measured is kept and the same call goes on.
    """
    device = usable_device(settings.device)
    ways = settings.ways or (WAYS if device.type == "cuda" else ("eager",))
    example = settings.training()
    parameters: dict[str, Any] = {k: v for k, v in asdict(settings).items() if k != "root"}
    lengths = settings.chosen_lengths()
    parameters |= {"lengths": lengths, "ways": ways, "precision": example.precision}
    parameters["device"] = machine_name(device)
    run = Run.create("state_tracking_speed", example.model, parameters, 0, settings.root)
    if run.finished:
        report(f"already finished: {run.folder}")
        return run
    metrics = read_metrics(run.folder)
    done = set()
    if not metrics.empty:
        rates = metrics[metrics["name"] == "steps_per_second"]  # written last
        done = set(zip(rates["way"], rates["length"], rates["runs"], strict=True))
    with run.failures_recorded():
        for way in ways:
            learners: list[Learner] = []
            for length in lengths:
                for count in settings.runs:
                    if (way, length, count) in done:
                        continue
                    axes = {"way": way, "length": length, "runs": count}
                    measured = _measure(settings, way, length, count, learners, device)
                    for name, value, more in measured:
                        run.log(name, value, precision=example.precision, **axes, **more)
                        if name == "steps_per_second":
                            label = f"{count} run{'s' if count > 1 else ''} at length {length}"
                            report(f"{way}, {label}: {value:,.1f} steps/s")
        run.finish(summarize_run(read_metrics(run.folder)))
    return run


def _measure(
    settings: StateSpeedSettings,
    way: str,
    length: int,
    count: int,
    learners: list[Learner],
    device: Any,
) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Time ``count`` runs side by side; runs that are missing are added to ``learners``."""
    import torch

    del learners[count:]  # which would count as memory
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    while len(learners) < count:
        training = settings.training(way, seed=len(learners))
        learners.append(Learner(training, device, capture=way != "eager"))
    chosen = learners[:count]
    for learner in chosen:
        learner.begin_stage(settings.stage(length))
        learner.advance(EAGER_STEPS + 2)  # the last two are captured and replayed
    synchronize(device)
    setup = time.perf_counter() - begun
    each = _seconds(chosen, 2, device) / 2
    turns = max(min(settings.steps, int(settings.seconds / each)) // TURN, 1)
    seconds = _seconds(chosen, turns * TURN, device)
    yield "setup_seconds", setup, {}
    if device.type == "cuda":
        yield "peak_memory_bytes", torch.cuda.max_memory_allocated(device), {}
    if count == 1:
        times = kernel_milliseconds(lambda: chosen[0].advance(1), PROFILED, device, short_name)
        for kernel, spent in times.items():
            yield "kernel_milliseconds", spent, {"kernel": kernel, "n": PROFILED}
    yield "steps_per_second", count * turns * TURN / seconds, {}


def _seconds(learners: Sequence[Learner], steps: int, device: Any) -> float:
    """Of ``steps`` of each, taken in turns."""
    begun = time.perf_counter()
    for first in range(0, steps, TURN):
        for learner in learners:
            learner.advance(min(TURN, steps - first))
    synchronize(device)
    return time.perf_counter() - begun


def summarize_run(metrics: Any) -> dict[str, Any]:
    """The best sum of each way and length."""
    rates = metrics[metrics["name"] == "steps_per_second"]
    best = rates.groupby(["way", "length"], sort=False)["value"].max()
    return {
        "steps_per_second": {f"{way}, length {n}": float(v) for (way, n), v in best.items()},
    }
