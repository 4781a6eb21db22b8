"""Inference scaling: time a token and memory against position, batch and chunk size.

Four parts, each optional:

    timeline    prompt, then every new token timed (the original's benchmark): positions one by one
    positions   a prompt of each length is read in parallel, then some tokens are timed
    batches     throughput of each batch size; of the scan model also the time in each kernel
    chunks      the scan model with other chunk sizes

What ran is recorded as it comes in a run of the experiment ``inference``: an interrupted run keeps
what was measured and goes on when started again, a measurement that runs out of memory is recorded
as such and the next one begins. Metrics carry ``model`` (see ``scanlm.benchmark.subjects``) and
``part``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scanlm.benchmark.checks import check_once, check_positive, check_seed, check_some
from scanlm.benchmark.failures import is_out_of_memory
from scanlm.benchmark.kernel_times import kernel_milliseconds, short_name
from scanlm.benchmark.subjects import SIZES, SUBJECTS, Setting, Subject, no_leftovers
from scanlm.benchmark.timing import (
    affordable_steps,
    measure_bandwidth,
    summarize,
    time_prefill,
    time_steps,
)
from scanlm.devices import machine_name, usable_device
from scanlm.errors import ScanLMError, check_name
from scanlm.records import Run, read_metrics
from scanlm.scan import lowest_bit
from scanlm.values import check_duration, check_picture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_MODELS = ("scanlm", "gpt2_graph", "gpt2_dynamic")
WINDOW = 64  # tokens of the timeline that share one record


@dataclass(frozen=True)
class InferenceSettings:
    """What is measured; the defaults are the original's benchmark, and GPT-2 in a static buffer.

    Args:
        size: "tiny", "original" (256 wide, T1 2 + T2 2 blocks) or "base" (768 wide, 1 + 12).
        models: see ``scanlm.benchmark.subjects``.
        device: "cuda", "cpu", ...; ``None``: a GPU if there is one.
        dtype: "float32", "bfloat16" or "float16"; ``None``: bfloat16 on a GPU, else float32.
        chunk_size: of the scan model.
        batch_size: rows in the parts timeline and positions.
        prompt_len: tokens read before the timeline begins.
        max_new_tokens: tokens of the timeline; 0 leaves the part out.
        timeline_models: which of the models; ``None``: all.
        positions: prompt lengths of the part positions.
        steps: tokens timed at each position.
        seconds: at most so long, roughly, for the tokens of one measurement.
        batch_sizes: of the part batches, at ``batch_position``.
        batch_models: which of the models; ``None``: all.
        chunk_sizes: of the part chunks, at ``batch_position``.
        seed: of weights and prompts.
        root: folder of all runs.
        picture: also draw the timeline here, e.g. "inference_speed.png".

    Raises:
        ScanLMError: a value out of range or given twice, or an unknown name.
    """

    size: str = "original"
    models: tuple[str, ...] = DEFAULT_MODELS
    device: str | None = None
    dtype: str | None = None
    chunk_size: int = 64
    batch_size: int = 1
    prompt_len: int = 100
    max_new_tokens: int = 10_000
    timeline_models: tuple[str, ...] | None = None
    positions: tuple[int, ...] = ()
    steps: int = 256
    seconds: float = 20.0
    batch_sizes: tuple[int, ...] = ()
    batch_models: tuple[str, ...] | None = None
    chunk_sizes: tuple[int, ...] = ()
    batch_position: int = 1000
    seed: int = 42
    root: str = "data/runs"
    picture: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_duration("seconds", self.seconds)
        check_seed(self.seed)
        check_once(self)
        check_some("models", self.models, SUBJECTS)
        for name in self.models:
            check_name("model", name, SUBJECTS)
        for option in ("timeline_models", "batch_models"):
            for name in getattr(self, option) or ():
                check_name("model", name, SUBJECTS)
                if name not in self.models:
                    raise ScanLMError(
                        f"{option}: {name!r} is none of the models, {', '.join(self.models)}: add "
                        "it to them"
                    )
        check_name("size", self.size, SIZES)
        if self.dtype is not None:
            check_name("dtype", self.dtype, DTYPES)
        if self.prompt_len < 1:
            raise ScanLMError(
                f"prompt_len={self.prompt_len}: an empty prompt cannot be read; expected >= 1"
            )
        if self.max_new_tokens < 0:
            raise ScanLMError(f"max_new_tokens={self.max_new_tokens}: expected an integer >= 0")
        counts = {"chunk_size": [self.chunk_size], "batch_size": [self.batch_size]}
        counts |= {"steps": [self.steps], "batch_position": [self.batch_position]}
        lists = ("positions", "batch_sizes", "chunk_sizes")
        check_positive({**counts, **{name: getattr(self, name) for name in lists}})
        if not (self.max_new_tokens or self.positions or self.batch_sizes or self.chunk_sizes):
            raise ScanLMError(
                "nothing to measure: give max_new_tokens, positions, batch_sizes or chunk_sizes"
            )
        if self.picture:
            check_picture(self.picture)
            if not self.max_new_tokens:
                raise ScanLMError(
                    f"picture={self.picture!r} draws tokens that are timed one by one: give "
                    "max_new_tokens"
                )
        self.torch_device()

    def torch_device(self) -> torch.device:
        """The device asked for, or the best there is."""
        return usable_device(self.device)

    def torch_dtype(self) -> torch.dtype:
        """The dtype asked for, or the usual one of the device."""
        usual = "bfloat16" if self.torch_device().type == "cuda" else "float32"
        return DTYPES[self.dtype or usual]


@dataclass(frozen=True)
class Measurement:
    """One thing to measure; its fields are the axes of its metrics."""

    part: str
    model: str
    position: int
    batch_size: int
    chunk_size: int


@torch.no_grad()
def benchmark_inference(settings: InferenceSettings, report: Callable[[str], None] = print) -> Run:
    """Measure, or finish measuring, what the settings name.

    Args:
        settings: see ``InferenceSettings``.
        report: gets a line for each measurement.

    Returns:
        The finished run, with ratios in its summary.

    Raises:
        KeyboardInterrupt: recorded; what was measured is kept and the same call goes on.
    """
    device, dtype = settings.torch_device(), settings.torch_dtype()
    hidden = ("seed", "root", "picture")
    parameters = {k: v for k, v in asdict(settings).items() if k not in hidden}
    parameters |= {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    parameters["machine"] = machine_name(device)
    parameters["sizes"] = asdict(SIZES[settings.size])
    run = Run.create("inference", settings.size, parameters, settings.seed, settings.root)
    if run.finished:
        report(f"already finished: {run.folder}")
        _draw(settings, run)
        return run
    metrics = read_metrics(run.folder)
    done = _done(metrics)
    with run.failures_recorded():
        if metrics.empty or not (metrics["name"] == "bandwidth").any():
            run.log("bandwidth", measure_bandwidth(device))
        for work in _plan(settings):
            if work in done:
                continue
            with no_leftovers(device):
                _measure(settings, work, run, report)
        run.finish(summarize_run(read_metrics(run.folder)))
    _draw(settings, run)
    return run


def _draw(settings: InferenceSettings, run: Run) -> None:
    """The picture that the settings ask for, if any."""
    if not settings.picture:
        return
    from scanlm.plotting import inference as draw
    from scanlm.records import source_line

    picture = draw.timeline(read_metrics(run.folder), source=source_line(run))
    Path(settings.picture).parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(settings.picture)


def _plan(s: InferenceSettings) -> Iterator[Measurement]:
    timed = s.models if s.timeline_models is None else s.timeline_models
    batched = s.models if s.batch_models is None else s.batch_models
    for model in timed if s.max_new_tokens else ():
        yield Measurement("timeline", model, s.prompt_len, s.batch_size, s.chunk_size)
    for model in s.models:
        for position in s.positions:
            yield Measurement("positions", model, position, s.batch_size, s.chunk_size)
    for model in batched:
        for batch in s.batch_sizes:
            yield Measurement("batches", model, s.batch_position, batch, s.chunk_size)
    for chunk in s.chunk_sizes:
        yield Measurement("chunks", "scanlm", s.batch_position, s.batch_size, chunk)


def _done(metrics: Any) -> set[Measurement]:
    """What a run has measured, or found impossible, before."""
    if metrics.empty or "part" not in metrics:
        return set()
    rows = metrics[metrics["name"].isin(("measured", "out_of_memory", "not_available"))]
    fields = list(Measurement.__dataclass_fields__)
    numbers = dict.fromkeys(("position", "batch_size", "chunk_size"), int)
    return {Measurement(**row) for row in rows[fields].astype(numbers).to_dict("records")}


def _measure(
    settings: InferenceSettings, work: Measurement, run: Run, report: Callable[[str], None]
) -> None:
    """One measurement; its metrics are written together, when it is complete."""
    label = f"{work.part}: {work.model}, position {work.position:,}, batch {work.batch_size}"
    if work.part == "chunks":
        label += f", chunk size {work.chunk_size}"
    device = settings.torch_device()
    new = settings.max_new_tokens if work.part == "timeline" else settings.steps + 16
    # the period of a scan model may add most of a chunk to the steps, and the profile is a period
    new += 2 * work.chunk_size
    longest = work.position + new
    setting = Setting(
        settings.size,
        work.chunk_size,
        work.batch_size,
        settings.torch_dtype(),
        device,
        longest,
        settings.seed,
    )
    try:
        subject = SUBJECTS[work.model](setting)
        subject.room = new
        logged = list((_timeline if work.part == "timeline" else _steady)(settings, work, subject))
    except Exception as error:
        # a kernel that refuses its input must not cost the measurements after it
        name = "out_of_memory" if is_out_of_memory(error) else "not_available"
        reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        run.log(name, 1, reason=reason, **asdict(work))
        report(f"{label}: {name.replace('_', ' ')} ({reason})")
        return
    axes = {**asdict(work), "dtype": str(subject.dtype).removeprefix("torch.")}
    for name, value, more in logged:
        run.log(name, value, **{**axes, **more})
    if subject.note:
        run.update(notes={**run.info.get("notes", {}), work.model: subject.note})
    run.log("measured", 1, **axes)
    median = next(value for name, value, _ in logged if name == "ms_per_token")
    report(f"{label}: {median:.4f} ms a token")


Logged = tuple[str, float, dict[str, Any]]  # name, value, further axes


def _prompt(settings: InferenceSettings, work: Measurement) -> Tensor:
    generator = torch.Generator().manual_seed(settings.seed)
    vocabulary = SIZES[settings.size].scan["vocab_size"]
    ids = torch.randint(vocabulary, (work.batch_size, work.position), generator=generator)
    return ids.to(settings.torch_device())


def _steady(settings: InferenceSettings, work: Measurement, subject: Subject) -> Iterator[Logged]:
    """Prefill, then tokens at one position."""
    device, prompt = settings.torch_device(), _prompt(settings, work)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    subject.prefill(prompt)  # compiles and tunes
    prefills = time_prefill(lambda: subject.prefill(prompt), settings.seconds, device)
    state = subject.state_bytes()
    count = affordable_steps(subject.step, settings.steps, settings.seconds, device, subject.period)
    times = time_steps(subject.step, count, device)
    for name, value in summarize(times).items():
        yield name, value, {"n": count}
    yield "tokens_per_second", 1e3 * work.batch_size / float(np.mean(times)), {"n": count}
    yield "prefill_seconds", float(np.median(prefills)), {"n": len(prefills)}
    yield "prefill_seconds_max", max(prefills), {"n": len(prefills)}
    yield "state_bytes", state, {}
    yield "weight_bytes", subject.weight_bytes, {}
    yield "read_bytes", subject.weight_bytes + subject.read_bytes(), {}
    if device.type == "cuda":
        yield "peak_memory_bytes", torch.cuda.max_memory_allocated(device), {}
    if work.part == "batches" and work.model == "scanlm":
        count = subject.period  # with one border
        for kernel, ms in kernel_milliseconds(subject.step, count, device, short_name).items():
            yield "kernel_milliseconds", ms, {"kernel": kernel, "n": count}


def _timeline(settings: InferenceSettings, work: Measurement, subject: Subject) -> Iterator[Logged]:
    """Every token from the prompt on, recorded in windows, and what chunk borders cost."""
    device = settings.torch_device()
    for _ in range(2):  # the first time compiles and tunes
        subject.prefill(_prompt(settings, work))
        time_steps(subject.step, min(8, settings.max_new_tokens), device)
    subject.prefill(_prompt(settings, work))
    times: list[float] = []
    states: list[int] = []
    while len(times) < settings.max_new_tokens:
        count = min(WINDOW, settings.max_new_tokens - len(times))
        times += time_steps(subject.step, count, device)
        states.append(subject.state_bytes())
    for i, state in enumerate(states):
        window = times[i * WINDOW : (i + 1) * WINDOW]
        axes = {"position": work.position + min((i + 1) * WINDOW, len(times)), "n": len(window)}
        for name, value in summarize(window).items():
            yield name, value, axes
        yield "state_bytes", state, axes
    if subject.period > 1:
        yield from _borders(times, work.position, subject.period)


def _borders(times: Sequence[float], start: int, c: int) -> Iterator[Logged]:
    """What a chunk border adds to its two tokens, by how many combines it takes.

    The token that ends chunk n pays for the counter's combines, the next one for the filling of
    T2's window with the new prefix.
    """
    usual = float(np.median(times))
    places: dict[int, list[float]] = {}
    added: dict[int, list[float]] = {}
    for i, ms in enumerate(times):
        position = start + i  # of the token fed
        places.setdefault(position % c, []).append(ms)
        if position % c == c - 1 and i + 1 < len(times):
            cost = ms + times[i + 1] - 2 * usual
            added.setdefault(combines_of_push((position + 1) // c), []).append(cost)
    for place, found in sorted(places.items()):
        yield "ms_at_place", float(np.median(found)), {"place": place, "n": len(found)}
    for combines, found in sorted(added.items()):
        yield "border_ms", float(np.median(found)), {"combines": combines, "n": len(found)}


def combines_of_push(n: int) -> int:
    """Combines that the n-th chunk costs: one a carry, one to renew the fold if any is left."""
    low = lowest_bit(n)
    return low.bit_length() - 1 + (n != low)


def summarize_run(metrics: Any) -> dict[str, Any]:
    """The figures that the targets are about, from a run's metrics.

    ``floor_ms`` is the time to read weights and state once at the bandwidth measured.
    """
    bandwidth = float(metrics[metrics["name"] == "bandwidth"]["value"].iloc[0])
    summary: dict[str, Any] = {"bandwidth": bandwidth}
    if "part" not in metrics:
        return summary
    steady = metrics[metrics["part"] == "positions"]
    table = steady.pivot_table(index=["model", "position"], columns="name", values="value")
    if "ms_per_token" in table:
        table["floor_ms"] = 1e3 * table["read_bytes"] / bandwidth
        kept = ("ms_per_token", "ms_per_token_mean", "prefill_seconds", "state_bytes", "floor_ms")
        summary["positions"] = {
            f"{model}@{int(position)}": {name: float(row[name]) for name in kept}
            for (model, position), row in table.iterrows()
        }
    batches = metrics[(metrics["part"] == "batches") & (metrics["name"] == "tokens_per_second")]
    summary["tokens_per_second"] = {
        f"{row.model}@{int(row.batch_size)}": float(row.value) for row in batches.itertuples()
    }
    return summary
