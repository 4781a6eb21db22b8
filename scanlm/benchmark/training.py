"""Training speed: tokens a second, utilisation and memory of an optimiser step.

Forward, backward and AdamW without dropout, the median of many steps. The most important
measurements come first:

    1. every model at the first sequence length, the best way there is
    2. the first model through the trainer, its input pipeline alone, and where a step's time goes
    3. other ways of running the models (``scanlm.benchmark.training_step``), compiled or not
    4. other chunk sizes of the scan models
    5. the other sequence lengths at the same number of tokens a step

What ran is recorded as it comes in a run of the experiment ``training_speed``: an interrupted run
keeps what was measured and goes on when started again; a measurement that runs out of memory is
recorded as such and the next one begins. Utilisation is given twice, against the rate of a large
matrix product in the same run (axis ``peak``: "measured") and, on a Hopper GPU, against 790 TFLOP/s
("790 TFLOP/s"), the rate such products reach on an H200.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from scanlm.baselines import build_model, load_entry
from scanlm.benchmark.checks import check_filled, check_once, check_positive, check_seed, check_some
from scanlm.benchmark.failures import is_out_of_memory
from scanlm.benchmark.kernel_times import kernel_milliseconds
from scanlm.benchmark.subjects import no_leftovers
from scanlm.benchmark.timing import affordable_steps, time_once, time_steps
from scanlm.benchmark.training_input import batches_of, time_trainer
from scanlm.benchmark.training_step import (
    DTYPES,
    MODES,
    TrainingStep,
    Work,
    flops_per_token,
    modes_of,
)
from scanlm.devices import machine_name, usable_device
from scanlm.errors import ScanLMError, check_name
from scanlm.records import Run, read_metrics
from scanlm.values import check_duration

HOPPER_PEAK = 790e12  # operations a second of large bf16 products, measured on an H200
PARTS = (
    "step",
    "trainer",
    "loader",
    "loading",
    "kernels",
    "modes",
    "compiled",
    "chunks",
    "lengths",
)
# what a part that may be without a measurement needs
NEEDS = {
    "modes": "choose other modes, or models that have several",
    "compiled": "ask for compile, the default on a GPU",
    "chunks": "give chunk_sizes, and a scan model among the models",
    "lengths": "give two or more seq_lens",
}
PROFILED = 3  # steps
LONGEST_UNROLLED = 32  # chunks; a node-by-node tree of more is not compiled
GPU_MODELS = (
    "scanlm_base_c64",
    "gpt2_small_wikitext103_nodrop",
    "gla_170M",
    "gated_deltanet_170M",
)
CPU_MODELS = ("scanlm_tiny", "gpt2_tiny", "gla_tiny", "gated_deltanet_tiny")


@dataclass(frozen=True)
class TrainingSpeedSettings:
    """What is measured. ``None`` stands for what suits the device.

    Args:
        models: registry ids; the first one also goes through the trainer.
        chunk_sizes: of the scan models; the first is the one of the other parts. ``None``: each
            model's own.
        seq_lens: tokens a sequence; the first is the one of the other parts.
        batch_tokens: tokens a step; a longer sequence is a batch of its own.
        parts: which of ``PARTS``.
        modes: of the parts "modes" and "lengths", by name; ``None``: all that a model has.
        steps: timed, at most.
        seconds: about how long the timed steps of one measurement may take.
        dtype: "float32", "bfloat16" or "float16": of autocast; weights are float32.
        compile: whether models are compiled.
        device: "cuda", "cpu", ...
        checkpointing: recompute activations in the backward pass.
        num_workers: processes that load data, in the parts that do.
        max_seconds: begin no measurement that would probably end later. The same call goes on.
        seed: of weights and tokens.
        root: folder of all runs.

    Raises:
        ScanLMError: a value out of range or given twice, an unknown name, float16 without a GPU.
    """

    models: tuple[str, ...] | None = None
    chunk_sizes: tuple[int, ...] | None = None
    seq_lens: tuple[int, ...] | None = None
    batch_tokens: int | None = None
    parts: tuple[str, ...] = PARTS
    modes: tuple[str, ...] | None = None
    steps: int = 50
    seconds: float = 15.0
    dtype: str | None = None
    compile: bool | None = None
    device: str | None = None
    checkpointing: bool = False
    num_workers: int = 0
    max_seconds: float | None = None
    seed: int = 0
    root: str = "data/runs"

    def __post_init__(self) -> None:
        """Check the values."""
        check_duration("seconds", self.seconds)
        check_duration("max_seconds", self.max_seconds)
        check_seed(self.seed)
        check_once(self)
        check_some("parts", self.parts, PARTS)
        check_filled(self, "chunk_sizes", "seq_lens", "modes")
        for part in self.parts:
            check_name("part", part, PARTS)
        if self.dtype is not None:
            check_name("dtype", self.dtype, tuple(DTYPES))
        if self.dtype == "float16" and self.torch_device().type == "cpu":
            raise ScanLMError("dtype='float16' needs a GPU: use float32 or bfloat16 on a CPU")
        known = {mode for model in self.models or CPU_MODELS for mode in modes_of(model)}
        for mode in self.modes or ():
            check_name("mode", mode, sorted(known))
        counts = {name: getattr(self, name) or () for name in ("chunk_sizes", "seq_lens")}
        counts |= {"batch_tokens": () if self.batch_tokens is None else (self.batch_tokens,)}
        check_positive(counts | {"steps": (self.steps,)})
        if self.num_workers < 0:
            raise ScanLMError(f"num_workers={self.num_workers}: expected an integer >= 0")
        if self.models is not None and not self.models:
            raise ScanLMError("no models given: name some, see scanlm models")

    def resolved(self) -> TrainingSpeedSettings:
        """The same without ``None`` where the device decides."""
        device = self.torch_device()
        cuda = device.type == "cuda"
        usual: dict[str, Any] = {
            "models": GPU_MODELS if cuda else CPU_MODELS,
            "seq_lens": (512,) if cuda else (256,),
            "batch_tokens": 32768 if cuda else 2048,
            "dtype": "bfloat16" if cuda else "float32",
            "compile": cuda,
            "device": str(device),
        }
        given = {name: value for name in usual if (value := getattr(self, name)) is not None}
        return replace(self, **{**usual, **given})

    def torch_device(self) -> torch.device:
        """The device asked for, or the best there is."""
        return usable_device(self.device)


def benchmark_training(
    settings: TrainingSpeedSettings, report: Callable[[str], None] = print
) -> Run:
    """Measure, or finish measuring, what the settings name.

    Args:
        settings: see ``TrainingSpeedSettings``.
        report: gets a line for each measurement.

    Returns:
        The run; finished, unless ``max_seconds`` were over (status "interrupted").

    Raises:
        ScanLMError: an unknown model, or nothing to measure.
        KeyboardInterrupt: recorded; what was measured is kept and the same call goes on.
    """
    begun, longest = time.perf_counter(), 0.0
    s = settings.resolved()
    device = s.torch_device()
    parts = _by_part(s)
    work = _each_once(parts)
    nothing = [
        f"nothing to measure in part {part!r}: {NEEDS[part]}"
        for part, items in parts.items()
        if not items
    ]
    if not work:
        raise ScanLMError("; ".join(nothing))
    left = ("seed", "root", "max_seconds")
    parameters = {k: v for k, v in asdict(s).items() if k not in left}
    parameters["machine"] = machine_name(device)
    assert s.models is not None
    run = Run.create("training_speed", s.models[0], parameters, s.seed, s.root)
    if run.finished:
        report(f"already finished: {run.folder}")
        return run
    metrics = read_metrics(run.folder)
    for line in nothing:
        report(line)
    with run.failures_recorded():
        if metrics.empty:
            run.log("matmul_flops_per_second", measure_peak(device, str(s.dtype)), dtype=s.dtype)
        peak = float(read_metrics(run.folder)["value"].iloc[0])
        done = set(metrics["label"].dropna()) if "label" in metrics else set()
        for item in work:
            if item.label in done:
                continue
            start = time.perf_counter()
            if s.max_seconds is not None and start - begun + longest > s.max_seconds:
                message = "the time given was over; the same command goes on"
                run.fail("interrupted", message)
                report(message)
                return run
            with no_leftovers(device):
                _measure(s, item, run, peak, report)
            longest = max(longest, time.perf_counter() - start)
        run.finish(summarize_run(read_metrics(run.folder)))
    return run


def measure_peak(device: torch.device, dtype: str) -> float:
    """Operations a second of a large matrix product: what utilisation is measured against."""
    size = 8192 if device.type == "cuda" else 1024
    kind = DTYPES[dtype] or torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    times = time_steps(lambda: a @ b, 30, device)[5:]
    return 2 * size**3 / (float(np.median(times)) / 1e3)


def plan(s: TrainingSpeedSettings) -> list[Work]:
    """What will be measured, the most important first, each once."""
    return _each_once(_by_part(s.resolved()))


def _each_once(parts: Mapping[str, Sequence[Work]]) -> list[Work]:
    return list(dict.fromkeys(work for items in parts.values() for work in items))


def _by_part(s: TrainingSpeedSettings) -> dict[str, list[Work]]:
    """What belongs to each part that is asked for; some of it to several."""
    assert s.models is not None
    assert s.seq_lens is not None
    firsts = [_first(s, model, s.seq_lens[0]) for model in s.models]
    return {part: list(_of_part(part, s, firsts)) for part in PARTS if part in s.parts}


def _of_part(part: str, s: TrainingSpeedSettings, firsts: Sequence[Work]) -> Iterator[Work]:
    assert s.models is not None
    assert s.seq_lens is not None
    if part == "step":
        yield from firsts
    elif part in ("trainer", "loader", "loading", "kernels"):
        yield replace(firsts[0], part=part)
    elif part == "modes":
        for first in firsts:
            yield from _others(s, first)
    elif part == "compiled" and s.compile:
        for first in firsts:
            yield replace(first, compiled="no")
            if load_entry(first.model).family == "scanlm":
                yield replace(first, compiled="whole")
            if load_entry(first.model).family == "gpt2":
                yield replace(first, mode="transformers", compiled="no")
    elif part == "chunks":
        for first in firsts:
            if first.chunk_size is not None:
                for size in s.chunk_sizes or ():
                    yield replace(first, model=_sized(first.model, size), chunk_size=size)
    elif part == "lengths":
        for length in s.seq_lens[1:]:
            for model in s.models:
                first = _first(s, model, length)
                yield first
                yield from _others(s, first)


def _first(s: TrainingSpeedSettings, model: str, length: int) -> Work:
    """A model in its best mode."""
    assert s.batch_tokens is not None
    family = load_entry(model).family
    chunk = None
    if family == "scanlm":
        own = int(build_model(model, device="meta").config.chunk_size)  # type: ignore[arg-type]
        chunk = s.chunk_sizes[0] if s.chunk_sizes else own
        model = _sized(model, chunk)
    compiled = "yes" if s.compile else "no"
    batch = max(s.batch_tokens // length, 1)
    return Work("step", model, modes_of(model)[0], compiled, chunk, length, batch)


def _others(s: TrainingSpeedSettings, first: Work) -> Iterator[Work]:
    for mode in modes_of(first.model)[1:]:
        if s.modes is None or mode in s.modes:
            unrolled = first.length // (first.chunk_size or first.length)
            short = mode != "sequential" or unrolled <= LONGEST_UNROLLED
            yield replace(first, mode=mode, compiled=first.compiled if short else "no")


def _sized(model: str, chunk_size: int) -> str:
    """The registry id of this chunk size where there is one."""
    other = re.sub(r"_c\d+$", f"_c{chunk_size}", model)
    try:
        load_entry(other)
    except ScanLMError:
        return model
    return other


Logged = tuple[str, float, dict[str, Any]]  # name, value, further axes


def _measure(
    s: TrainingSpeedSettings, work: Work, run: Run, peak: float, report: Callable[[str], None]
) -> None:
    """One measurement; its metrics are written together, when it is complete."""
    axes = {**work.axes, "dtype": s.dtype}
    if s.checkpointing:
        axes["checkpointing"] = True
    try:
        logged = list(_MEASURES[work.part](s, work))
    except Exception as error:
        # a kernel that refuses its input must not cost the measurements after it
        name = "out_of_memory" if is_out_of_memory(error) else "not_available"
        reason = next(iter(str(error).strip().splitlines()), "")
        run.log(name, 1, label=work.label, reason=f"{type(error).__name__}: {reason}", **axes)
        report(f"{work.label}: {name.replace('_', ' ')} ({type(error).__name__}: {reason})")
        return
    speed = next(value for name, value, _ in logged if name == "tokens_per_second")
    operations = flops_per_token(work) if work.part != "loader" else None
    if operations:
        logged.append(("flops_per_token", operations, {}))
        peaks = {"measured": peak}
        if re.search(r"H[12]00", str(run.info["parameters"]["machine"])):
            peaks["790 TFLOP/s"] = HOPPER_PEAK
        for kind, most in peaks.items():
            logged.append(("model_flops_utilisation", operations * speed / most, {"peak": kind}))
    for name, value, more in logged:
        run.log(name, value, **axes, **more)
    run.log("measured", 1, label=work.label, **axes)
    used = f", {100 * operations * speed / peak:.1f} % of the measured peak" if operations else ""
    memory = [f", {v / 1e9:.1f} GB" for name, v, _ in logged if name == "peak_memory_bytes"]
    report(f"{work.label}: {speed:,.0f} tokens/s{used}{''.join(memory)}")


def _step(s: TrainingSpeedSettings, work: Work) -> Iterator[Logged]:
    """A bare loop on one batch."""
    device = s.torch_device()
    step = TrainingStep(work, device, str(s.dtype), s.seed, checkpointing=s.checkpointing)
    yield "compile_seconds", time_once(step, device), {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    count = affordable_steps(step, s.steps, s.seconds, device)
    times = time_steps(step, count, device)
    yield from _speed(work, times)
    yield "num_parameters", sum(p.numel() for p in step.model.parameters()), {}
    if device.type == "cuda":
        yield "peak_memory_bytes", torch.cuda.max_memory_allocated(device), {}


def _loading(s: TrainingSpeedSettings, work: Work) -> Iterator[Logged]:
    """A bare loop that reads its batches through the trainer's pipeline."""
    _check_default(s)
    device, total = s.torch_device(), s.steps + 8
    with batches_of(work, str(s.dtype), total, s.num_workers) as batches:
        step = TrainingStep(
            work, device, str(s.dtype), s.seed, batches, checkpointing=s.checkpointing
        )
        time_once(step, device)
        count = min(affordable_steps(step, s.steps, s.seconds, device), s.steps)
        yield from _speed(work, time_steps(step, count, device))


def _loader(s: TrainingSpeedSettings, work: Work) -> Iterator[Logged]:
    """The input pipeline alone."""
    _check_default(s)
    device, total = s.torch_device(), s.steps + 2
    with batches_of(work, str(s.dtype), total, s.num_workers) as batches:
        times = time_steps(lambda: next(batches), total, device)[2:]
        yield from _speed(work, times)


def _trainer(s: TrainingSpeedSettings, work: Work) -> Iterator[Logged]:
    """The loop of ``scanlm train``, its clipping of gradients included; nothing is logged."""
    _check_default(s)
    device = s.torch_device()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = time_trainer(work, device, str(s.dtype), s.steps, 6, s.num_workers)
    yield from _speed(work, times)
    if device.type == "cuda":
        yield "peak_memory_bytes", torch.cuda.max_memory_allocated(device), {}


def _kernels(s: TrainingSpeedSettings, work: Work) -> Iterator[Logged]:
    """A bare loop, slowed down by the profiler: times of kinds of kernels, not of the step."""
    device = s.torch_device()
    step = TrainingStep(work, device, str(s.dtype), s.seed, checkpointing=s.checkpointing)
    time_once(step, device)
    times = time_steps(step, affordable_steps(step, s.steps, s.seconds, device), device)
    yield from _speed(work, times)
    for kind, spent in kernel_milliseconds(step, PROFILED, device).items():
        yield "kernel_milliseconds", spent, {"kind": kind, "n": PROFILED}


_MEASURES = {
    "step": _step,
    "kernels": _kernels,
    "loading": _loading,
    "loader": _loader,
    "trainer": _trainer,
}


def _check_default(s: TrainingSpeedSettings) -> None:
    """The trainer takes a GPU where there is one."""
    if torch.cuda.is_available() and s.torch_device().type != "cuda":
        raise ScanLMError("the trainer uses the GPU: hide it with CUDA_VISIBLE_DEVICES=''")


def _speed(work: Work, times: Sequence[float]) -> Iterator[Logged]:
    median, count = float(np.median(times)), {"n": len(times)}
    yield "tokens_per_second", work.batch_size * work.length / (median / 1e3), count
    yield "step_milliseconds", median, count
    yield "step_milliseconds_p90", float(np.percentile(times, 90)), count


def summarize_run(metrics: Any) -> dict[str, Any]:
    """Rates by label, and the ratios that the targets are about, from a run's metrics."""
    speeds = metrics[metrics["name"] == "tokens_per_second"]
    rates = {_work(row).label: float(row.value) for row in speeds.itertuples()}
    summary: dict[str, Any] = {"tokens_per_second": rates}
    for name in ("out_of_memory", "not_available"):
        found = metrics[metrics["name"] == name]
        if len(found):
            summary[name] = list(found["label"])
    summary["ratios"] = _ratios(speeds)
    return summary


def _work(row: Any) -> Work:
    """What a metric's axes name."""
    chunk = getattr(row, "chunk_size", None)
    return Work(
        row.part,
        row.model,
        row.mode,
        row.compiled,
        None if chunk is None or np.isnan(chunk) else int(chunk),
        int(row.length),
        int(row.batch_size),
    )


def _ratios(speeds: Any) -> dict[str, float]:
    """The first scan model against the best GPT-2 and the sequential mode at each length.

    And the first measurement with the trainer or its input pipeline around it.
    """
    ratios: dict[str, float] = {}
    bare = speeds[speeds["part"] == "step"]
    family = bare["model"].map(lambda model: load_entry(model).family)
    for length, rows in bare.groupby("length"):
        kinds = family[rows.index]
        scans = rows[kinds == "scanlm"]
        parallel, sequential = (scans[scans["mode"] == mode] for mode in MODES["scanlm"])
        if len(parallel):
            first = parallel.iloc[0]
            # a long tree node by node is not compiled, which is another comparison
            alike = sequential[sequential["compiled"] == first["compiled"]]
            others = {
                "GPT-2": rows[kinds == "gpt2"]["value"].max(),
                "sequential": alike["value"].max(),
            }
            for name, other in others.items():
                if other == other:
                    ratios[f"scan / {name} at {int(length)}"] = float(first["value"] / other)
    for part in ("trainer", "loading"):
        rows = speeds[speeds["part"] == part]
        if len(rows) and len(bare):
            ratios[f"{part} / step"] = float(rows["value"].iloc[0] / bare["value"].iloc[0])
    return ratios
