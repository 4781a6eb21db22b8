"""Length curriculum for state tracking: several runs side by side, recorded and resumable.

A run goes through stages of growing length. Every ``log_every`` steps it is validated on new words;
a stage ends when that passes its threshold or when its steps are used up, and the record says
which. The next stage starts from the same weights and optimiser state, with its own learning rate,
warm-up and dropout. At the end the model is evaluated at many lengths; the others wait for it.

Runs share nothing but the device. On a GPU each has its own stream and its own CUDA graphs
(``scanlm.curriculum_step``), and the host only looks after whichever run has finished its steps.

Data, learning rate and (on a CPU) dropout depend on the seed and the step alone, so a run that was
interrupted goes on exactly where it was. On a GPU runs side by side share one random state for
dropout: there a resumed run sees the same data, but other dropout masks.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from scanlm.baselines import load_entry
from scanlm.compiling import as_compiled
from scanlm.curriculum_settings import (
    PRESETS,
    Stage,
    StateTrackingSettings,
    make_settings,
    preset_settings,
)
from scanlm.curriculum_step import Learner, check_model
from scanlm.devices import usable_device
from scanlm.errors import ScanLMError, check_name
from scanlm.interrupts import held_interrupts
from scanlm.length_evaluation import (
    PRECISIONS,
    LengthEvaluation,
    check_lengths,
    evaluate_lengths,
    position_limit,
    reach,
)
from scanlm.records import Run, model_name, run_id
from scanlm.state_probe import probe_metrics
from scanlm.values import check_duration

__all__ = [
    "PRESETS",
    "LengthEvaluation",
    "Stage",
    "StateTrackingSettings",
    "check_lengths",
    "evaluate_lengths",
    "make_settings",
    "open_run",
    "preset_settings",
    "reach",
    "record_folder",
    "train",
    "train_many",
]

CHECKPOINT, WEIGHTS = "checkpoint.pt", "checkpoint-final"
SAVE_WEIGHTS = ("none", "bf16", "fp32")
# settings that leave what is trained as it is. They belong to a run's id, so that other values are
# another run; but a record that is handed to train_many may be resumed with other values
NOT_TRAINING = ("compile", "eval_")


def open_run(settings: StateTrackingSettings, root: str | Path = "data/runs") -> Run:
    """The record of these settings: the one that exists (to go on with), or a new one."""
    name, parameters = _identity(settings)
    return Run.create(settings.experiment, name, parameters, settings.seed, root=root)


def record_folder(settings: StateTrackingSettings, root: str | Path = "data/runs") -> Path:
    """The folder of that record, whether it is there or not."""
    return Path(root) / settings.experiment / run_id(*_identity(settings), settings.seed)


def _identity(settings: StateTrackingSettings) -> tuple[str, dict[str, Any]]:
    """A run's name and parameters: of a file's model what the file says, not where it lies."""
    name = model_name(settings.model)
    parameters = settings.model_dump(mode="json", exclude={"model", "seed"})
    if name != settings.model:  # a file
        entry = load_entry(settings.model)
        parameters["entry"] = entry.model_dump(mode="json", include={"family", "config"})
    return name, parameters


class _Trainee:
    """One run: its learner, its place in the curriculum and its record."""

    def __init__(
        self,
        settings: StateTrackingSettings,
        record: Run,
        device: torch.device,
        max_steps: int | None,
    ) -> None:
        self.settings, self.record = settings, record
        self.learner = Learner(settings, device)
        self.stage_index, self.stage_step = 0, 0
        self.tokens, self.seconds, self.stage_seconds = 0, 0.0, 0.0
        self.stages: list[dict[str, Any]] = []  # how each stage ended
        self.diverged = False
        self.queued = 0
        self.event: torch.cuda.Event | None = None
        path = record.folder / CHECKPOINT
        if path.exists():
            self._resume(path)
        self.last_step = math.inf if max_steps is None else self.learner.step + max_steps
        # what comes after the checkpoint (without one: everything) is measured again, and so is an
        # evaluation that was written down before its run was finished
        done = self.learner.step
        record.drop(
            lambda metric: (
                (metric.get("step") or 0) > done
                or metric.get("split") not in ("train", "validation")
            )
        )
        if not self.trained:
            self.learner.begin_stage(self.stage, self.stage_step)

    @property
    def stage(self) -> Stage:
        return self.settings.stages[self.stage_index]

    @property
    def trained(self) -> bool:
        return self.stage_index == len(self.settings.stages)

    @property
    def can_go_on(self) -> bool:
        return not (self.trained or self.diverged) and self.learner.step < self.last_step

    def queue(self) -> None:
        """Start the steps up to the next record (on a CPU: do them)."""
        self.started = time.perf_counter()
        self.queued = min(
            self.settings.log_every - self.stage_step % self.settings.log_every,
            self.stage.max_steps - self.stage_step,
        )
        self.learner.advance(self.queued)
        self.learner.validate()
        if self.learner.stream is not None:
            self.event = torch.cuda.Event()
            self.event.record(self.learner.stream)

    def ready(self) -> bool:
        return self.event is None or self.event.query()

    def collect(self) -> None:
        """Read the queued steps' results, write them down, and move to the next stage if due."""
        loss, accuracy, positions, whole = self.learner.read(self.queued)
        elapsed = time.perf_counter() - self.started
        self.seconds += elapsed
        self.stage_seconds += elapsed
        self.stage_step += self.queued
        self.tokens += self.queued * self.stage.batch * self.stage.length
        step = self.learner.step
        axes = {"step": step, "tokens": self.tokens, "length": self.stage.length}
        self.record.log("loss", loss, split="train", **axes)
        self.record.log("accuracy", accuracy, split="train", **axes)
        words = self.settings.validation_sequences
        for name, value in (
            ("accuracy", sum(positions) / len(positions)),
            ("accuracy_last", positions[-1]),
            ("accuracy_sequence", whole),
        ):
            self.record.log(name, value, split="validation", n=words, **axes)
        self.queued = 0
        if not math.isfinite(loss):
            self.diverged = True
            where = f"length {self.stage.length}, step {step}"
            self.record.fail("diverged", f"the loss is not finite at {where}")
            (self.record.folder / CHECKPOINT).unlink(missing_ok=True)
            return
        score = whole if self.stage.criterion == "sequence" else min(positions)
        threshold = self.stage.threshold
        if threshold is not None and score >= threshold:
            self._end_stage("threshold", score)
        elif self.stage_step >= self.stage.max_steps:
            self._end_stage("budget", score)

    def _end_stage(self, why: str, score: float) -> None:
        rate = self.stage_step / self.stage_seconds
        self.stages.append(
            {
                "length": self.stage.length,
                "steps": self.stage_step,
                "ended_by": why,
                self.stage.criterion: score,
                "seconds": self.stage_seconds,
                "steps_per_second": rate,
            }
        )
        axes = {"step": self.learner.step, "tokens": self.tokens, "length": self.stage.length}
        self.record.log("steps_per_second", rate, split="train", **axes)
        self.stage_index, self.stage_step, self.stage_seconds = self.stage_index + 1, 0, 0.0
        if not self.trained:
            self.learner.begin_stage(self.stage)

    def save(self) -> None:
        """Write a checkpoint by atomic rename; only between ``collect`` and ``queue``."""
        state = {
            "settings": self.settings.model_dump(mode="json"),
            "place": [self.stage_index, self.stage_step],
            "counts": [self.tokens, self.seconds, self.stage_seconds],
            "stages": self.stages,
            "learner": self.learner.state(),
        }
        path = self.record.folder / CHECKPOINT
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def _resume(self, path: Path) -> None:
        state = _read_checkpoint(path, self.learner.device)
        check_same_training(self.settings, state["settings"], path)
        self.stage_index, self.stage_step = state["place"]
        self.tokens, self.seconds, self.stage_seconds = state["counts"]
        self.stages = state["stages"]
        self.learner.load(state["learner"])

    def finish(self, save_weights: str, say: Callable[[str], None]) -> None:
        """Evaluate at all lengths, save the weights, close the record."""
        model, settings = self.learner.model, self.settings
        self.learner.end()
        limit = position_limit(model)
        lengths = [n for n in settings.eval_lengths if limit is None or n <= limit]
        beyond = [n for n in settings.eval_lengths if n not in lengths]
        precisions = settings.eval_precisions if lengths else ()
        rows: list[tuple[str, float, dict[str, Any]]] = []
        reaches = {}
        # each length is a new shape: to compile hundreds of chunks takes longer than to run them
        with as_compiled():
            # bfloat16 first: the training's compiled code is for weights as they are until then
            for precision in sorted(precisions):
                if precision == "fp32":
                    self.learner.make_exact()
                result = evaluate_lengths(
                    model,
                    settings.group,
                    lengths,
                    settings.eval_sequences,
                    settings.eval_long_sequences,
                    settings.eval_batch_tokens,
                    precision,
                    progress=lambda line: say(f"{self.record.folder.name}: {line}"),
                )
                rows += result.metrics()
                reaches[precision] = result.reach()
            self.learner.make_exact()
            rows += self._probe(limit)
        if save_weights != "none":
            self._save_weights(save_weights)
        # not before all is done: the rows of an evaluation that is begun again would stand twice
        for name, value, axes in rows:
            self.record.log(name, value, step=self.learner.step, tokens=self.tokens, **axes)
        summary = {
            "stages": self.stages,
            "steps": self.learner.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "steps_per_second": self.learner.step / self.seconds,
            "parameters": sum(p.numel() for p in self.learner.parameters),
            "reach": {PRECISIONS[p]: reaches[p] for p in precisions},
            "not_possible": {str(n): f"beyond the {limit} positions of the model" for n in beyond},
            "cuda_graph": self.learner.used_graph,
        }
        self.record.finish(summary)
        (self.record.folder / CHECKPOINT).unlink(missing_ok=True)

    def _probe(self, limit: int | None) -> list[tuple[str, float, dict[str, Any]]]:
        settings = self.settings
        length = min(settings.eval_probe_length, limit or settings.eval_probe_length)
        trained = settings.stages[-1].length
        if settings.model != "scan":
            return []
        chunk_size: Any = self.learner.model.config.chunk_size  # type: ignore[union-attr]
        if not length or min(length, trained) <= chunk_size:  # words without a prefix
            return []
        return probe_metrics(
            self.learner.model, settings.group, length, trained, settings.eval_probe_words
        )

    def _save_weights(self, precision: str) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model, folder = self.learner.model, self.record.folder / WEIGHTS
        weights = {k: v.to("cpu", dtype) for k, v in model.state_dict().items()}
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        else:
            folder.mkdir(exist_ok=True)
            torch.save(weights, folder / "weights.pt")


def _read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    # a file that was cut short is read as whatever its bytes mean, which may raise anything, also
    # an OSError: of a seek to before its beginning
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ScanLMError(
            f"{path} is damaged ({reason:.80}): remove it, and training starts again from the "
            "beginning"
        ) from error
    return state


def check_same_training(
    settings: StateTrackingSettings, saved: dict[str, Any], path: Path | str
) -> None:
    """Refuse to resume a checkpoint that was trained otherwise.

    Raises:
        ScanLMError: names the first setting that differs.
    """
    now = settings.model_dump(mode="json")
    for name, value in now.items():
        if not name.startswith(NOT_TRAINING) and saved.get(name) != value:
            raise ScanLMError(
                f"{path} was trained with another {name} ({saved.get(name)!r:.80}, now "
                f"{value!r:.80}): resume with the same curriculum or choose another folder"
            )


def train_many(
    settings: Sequence[StateTrackingSettings],
    root: str | Path = "data/runs",
    device: torch.device | str | None = None,
    max_seconds: float | None = None,
    max_steps: int | None = None,
    save_weights: str = "none",
    checkpoint_seconds: float = 240.0,
    records: Sequence[Run] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Run]:
    """Train and evaluate several runs side by side; runs that are finished already are skipped.

    Args:
        settings: one entry a run.
        root: where records are kept; a run that has a checkpoint there goes on from it.
        device: default: the GPU if there is one.
        max_seconds: begin nothing after this time, counted from the call. A run looks at it
            between its records, so up to ``log_every`` steps with their validation are done to the
            end, and so is an evaluation that has begun. Unfinished runs save a checkpoint (weights
            and optimiser in float32, 12 bytes a parameter) and go on in a later call.
        max_steps: stop each run at its first record after so many steps of this call.
        save_weights: of finished runs: "fp32", or "bf16" (half the size: enough to evaluate and to
            probe, not to train on).
        checkpoint_seconds: save all runs this often, in case the process is killed.
        records: the runs' records, instead of those under ``root``.
        progress: receives a line of text now and then.

    Returns:
        The records, in order.

    Raises:
        ScanLMError: a setting is out of range, a model that cannot be built, a run is asked for
            twice or written by another process, a device that is not there, or a checkpoint that
            is damaged or of another curriculum. Nothing has been trained then.
        Exception: what the evaluation of a run raised, after all others were trained and evaluated;
            the same call evaluates it again.
        KeyboardInterrupt: once the steps that had begun are done and every run is saved. Records
            say "interrupted" then, as they do after ``max_seconds``; of another error, "failed".
    """
    for entry in settings:
        entry.check()
        check_model(entry)
    check_name("save_weights", save_weights, SAVE_WEIGHTS)
    check_duration("max_seconds", max_seconds)
    start = time.perf_counter()
    chosen = usable_device(device)
    say = progress or (lambda line: None)

    def time_is_up() -> bool:
        return max_seconds is not None and time.perf_counter() - start >= max_seconds

    given = None if records is None else list(records)
    folders = [record_folder(s, root) for s in settings]
    _refuse_twice(folders if given is None else [record.folder for record in given])
    opened: list[Run] = []
    with torch.random.fork_rng(devices=[]), ExitStack() as held:
        for place, entry in enumerate(settings):
            record = open_run(entry, root) if given is None else given[place]
            if record.finished:
                reached = reach_text(record.summary)  # which refuses a damaged one
                kept = _no_weights(record, save_weights)
                say(f"already finished, {reached}: {record.folder}{kept}")
            else:
                held.enter_context(record.failures_recorded())
            opened.append(record)
        with held_interrupts() as interrupted:
            trainees = [
                _Trainee(entry, record, chosen, max_steps)
                for entry, record in zip(settings, opened, strict=True)
                if not record.finished
            ]
            if interrupted():
                raise KeyboardInterrupt
        errors: list[Exception] = []
        while True:
            with held_interrupts() as interrupted:
                _train_until_one_ends(
                    trainees, lambda: time_is_up() or interrupted(), checkpoint_seconds, say
                )
                if interrupted():
                    raise KeyboardInterrupt
            errors += _evaluate_trained(trainees, save_weights, time_is_up, say)
            if time_is_up() or not any(t.can_go_on for t in trainees):
                break
        for t in trainees:
            if not t.diverged:
                t.record.fail("interrupted", f"stopped after step {t.learner.step}")
                say(f"{_place(t)}; saved, the same command goes on\nrun: {t.record.folder}")
    if errors:
        raise errors[0]
    return opened


def _train_until_one_ends(
    trainees: Sequence[_Trainee],
    stopped: Callable[[], bool],
    checkpoint_seconds: float,
    say: Callable[[str], None],
) -> None:
    """Train side by side until a run is through its stages or all have to stop; save them all."""
    saved_at = time.perf_counter()
    while not (stopped() or any(t.trained for t in trainees)):
        if not (active := [t for t in trainees if t.can_go_on]):
            break
        for t in active:
            if not (t.queued or stopped()):
                t.queue()
            if t.queued and t.ready():
                stage = t.stage_index
                t.collect()
                if t.diverged or t.stage_index > stage:
                    say(_state(t))
        if time.perf_counter() - saved_at > checkpoint_seconds:
            _save_all(trainees)  # which may end a run's training
            saved_at = time.perf_counter()
    _save_all(trainees)


def _evaluate_trained(
    trainees: list[_Trainee],
    save_weights: str,
    time_is_up: Callable[[], bool],
    say: Callable[[str], None],
) -> list[Exception]:
    """Finish the runs that are through their stages, while the others wait, saved.

    They leave the list, and with it the memory of their graphs. What one raises is recorded as its
    own failure and returned; its checkpoint stays.
    """
    errors: list[Exception] = []
    for t in [t for t in trainees if t.trained]:
        if time_is_up():
            break
        trainees.remove(t)
        try:
            t.finish(save_weights, say)
        except Exception as error:
            t.record.fail("failed", str(error) or type(error).__name__)
            errors.append(error.with_traceback(None))  # which would keep the learner alive
            say(f"{_state(t)}; not evaluated: {error}\nrun: {t.record.folder}")
        else:
            say(f"{_state(t)}; evaluated, {reach_text(t.record.summary)}\nrun: {t.record.folder}")
    return errors


def reach_text(summary: Mapping[str, Any]) -> str:
    """What a finished run reached, in words: of each precision the ``reach`` of its record."""
    if not summary["reach"]:
        return "at no length: the model can read none that was asked for"
    reached = (
        f"99 % up to length {length} ({dtype})" if length else f"below 99 % at any length ({dtype})"
        for dtype, length in summary["reach"].items()
    )
    left_out = summary.get("not_possible")
    return ", ".join(reached) + (f"; not tested: {', '.join(left_out)}" if left_out else "")


def _no_weights(record: Run, save_weights: str) -> str:
    """What a finished run's line adds if weights are asked for that were not kept."""
    if save_weights == "none" or (record.folder / WEIGHTS).exists():
        return ""
    return (
        "; its weights were not kept: to train it anew and keep them, remove that folder and run "
        "the same command again"
    )


def _refuse_twice(folders: Sequence[Path]) -> None:
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise ScanLMError(f"{folder.name} is asked for twice: leave one out")


def _save_all(trainees: Sequence[_Trainee]) -> None:
    for t in trainees:
        if t.queued:
            t.collect()
        if not t.diverged:
            t.save()


def _state(t: _Trainee) -> str:
    """How the run diverged, or how the last of its stages ended."""
    name = t.record.folder.name
    if t.diverged:
        return f"{name}: diverged at step {t.learner.step}"
    last = t.stages[-1]
    score = last["sequence"] if "sequence" in last else last["worst_position"]
    which = "of words" if "sequence" in last else "at the worst position"
    return (
        f"{name}: length {last['length']} ended by {last['ended_by']} after {last['steps']} steps, "
        f"{score:.1%} {which} ({last['steps_per_second']:.0f}/s)"
    )


def _place(t: _Trainee) -> str:
    """Where in its stages a run was stopped."""
    if t.trained:
        return _state(t)
    name = t.record.folder.name
    return f"{name}: at length {t.stage.length}, step {t.stage_step} of {t.stage.max_steps}"


def train(settings: StateTrackingSettings, **options: Any) -> Run:
    """One run; ``options`` as of ``train_many``."""
    return train_many([settings], **options)[0]
