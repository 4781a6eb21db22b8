"""A sweep's runs on this machine: each in a process of its own, one or a few at a time.

A process writes to a log, ``<records>/sweeps/<file>/<number>-<label>.log``, which grows over
several sessions. While it is alive it holds a lock on it, so that two sweeps never write one
record. Processes are in sessions of their own: Ctrl-C reaches this process alone, which then
interrupts them, each once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scanlm.batch import last_line
from scanlm.sweeps.plans import SweepRun

ENDING = 10.0  # seconds that are left to interrupted runs before the time is up
PATIENCE = 60.0  # seconds that an interrupted process may take to end
POLL = 0.1  # seconds
TAIL = 8192  # bytes of a log that are read for its last line


@dataclass
class Outcome:
    """How a run fared in this session.

    Attributes:
        run: which.
        name: "finished", "failed", "interrupted" or "waiting" (it was not begun).
        seconds: of this session.
        note: the result, or what went wrong.
    """

    run: SweepRun
    name: str
    seconds: float = 0.0
    note: str = ""


@dataclass
class _Child:
    run: SweepRun
    process: subprocess.Popen[bytes]
    log: Path
    worker: int
    begun: float
    interrupted: float | None = None

    def interrupt(self) -> None:
        """Ask it to end, once; later make it."""
        if self.interrupted is None:
            self.interrupted = time.monotonic()
            self.process.send_signal(signal.SIGINT)
        elif time.monotonic() - self.interrupted > PATIENCE:
            self.kill()

    def kill(self) -> None:
        """End it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after all processes have ended; ``outcomes`` says how far each run is."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes
        done = sum(outcome.name == "finished" for outcome in outcomes)
        left = len(outcomes) - done
        super().__init__(
            f"{done} of {len(outcomes)} runs done, {left} left; the same command goes on"
        )


class LocalSweep:
    """Carries runs out.

    Args:
        runs: in the order in which they are begun.
        name: of the sweep, the logs' folder.
        total: runs of the whole file, for the lines that are said.
        jobs: processes at a time. Where there are several GPUs each gets one of them.
        stop_at: on ``time.monotonic()``: from then on no run is begun, and what runs is
            interrupted; ``None``: never.
        say: receives a line at the start and at the end of each run.
    """

    def __init__(
        self,
        runs: Sequence[SweepRun],
        name: str,
        total: int,
        jobs: int = 1,
        stop_at: float | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.runs, self.name, self.total, self.jobs, self.say = runs, name, total, jobs, say
        self.stop_at = stop_at
        self.outcomes = {run.number: Outcome(run, "waiting") for run in runs}
        self.children: list[_Child] = []
        self.gpus = visible_gpus() if jobs > 1 else []

    def carry_out(self) -> list[Outcome]:
        """Run all that have not finished.

        Returns:
            An outcome for each run, in order.

        Raises:
            Interrupted: by Ctrl-C, or a request to terminate.
        """
        with _stoppable():
            try:
                self._all()
            except KeyboardInterrupt:
                self._leave()
                raise Interrupted(list(self.outcomes.values())) from None
            except BaseException:  # such as a full disk: nothing goes on unseen
                self._leave()
                raise
        return list(self.outcomes.values())

    def _all(self) -> None:
        waiting = deque(run for run in self.runs if not self._finished_before(run))
        while self.children or (waiting and not self._over()):
            while waiting and len(self.children) < self.jobs and not self._over():
                self._begin(waiting.popleft())
            if self._over():
                for child in self.children:
                    child.interrupt()
            self._collect()

    def _over(self) -> bool:
        return self.stop_at is not None and time.monotonic() >= self.stop_at

    def _finished_before(self, run: SweepRun) -> bool:
        state = run.state()
        if state.name == "finished":
            self.outcomes[run.number] = Outcome(run, "finished", note=state.note)
            self._line(run, f"finished before: {state.place}")
        return state.name == "finished"

    def _begin(self, run: SweepRun) -> None:
        folder = run.root / "sweeps" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{run.number:02d}-{run.label}.log"
        with path.open("ab") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._end(run, "failed", 0.0, "another process is at it", path)
                return
            log.write(f"$ {run.command}\n".encode())
            log.flush()
            worker = min(set(range(self.jobs)) - {child.worker for child in self.children})
            # the child's output keeps the lock until it ends
            process = subprocess.Popen(
                [*program(), *run.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(worker),
                start_new_session=True,
            )
        self.children.append(_Child(run, process, path, worker, time.monotonic()))
        self._line(run, f"started, log: {path}")

    def _environment(self, worker: int) -> dict[str, str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if len(self.gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[worker % len(self.gpus)]
        return environment

    def _collect(self) -> None:
        """Wait a little, and take note of what has ended."""
        time.sleep(POLL)
        for child in [c for c in self.children if c.process.poll() is not None]:
            self.children.remove(child)
            code, seconds = child.process.returncode, time.monotonic() - child.begun
            state = child.run.state()
            # an interrupt may come when all is done but the process has not ended
            if code == 0 or state.name == "finished":
                self._end(child.run, "finished", seconds, state.note)
            elif child.interrupted is not None:
                self._end(child.run, "interrupted", seconds)
            else:
                self._end(child.run, "failed", seconds, _what_happened(code, child.log), child.log)

    def _end(
        self, run: SweepRun, name: str, seconds: float, note: str = "", log: Path | None = None
    ) -> None:
        self.outcomes[run.number] = Outcome(run, name, seconds, note)
        line = f"{name} after {duration(seconds)}{f': {note}' if note else ''}"
        self._line(run, line if log is None else f"{line} (log: {log})")

    def _line(self, run: SweepRun, what: str) -> None:
        about = f" {run.varies}" if run.varies else ""
        self.say(f"[{run.number}/{self.total}]{about}: {what}")

    def _leave(self) -> None:
        """Interrupt what runs and wait for it; another Ctrl-C kills it."""
        try:
            while self.children:
                for child in self.children:
                    child.interrupt()
                self._collect()
        except KeyboardInterrupt:
            while self.children:
                for child in self.children:
                    child.kill()
                self._collect()


def program() -> list[str]:
    """How to call this command again: a user's script that registers families, else scanlm."""
    script = sys.argv[0]
    is_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
    if script.endswith(".py") and not is_module:
        return [sys.executable, script]
    return [sys.executable, "-m", "scanlm"]


def visible_gpus() -> list[str]:
    """The GPUs that may be used, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part.strip() for part in named.split(",") if part.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def duration(seconds: float) -> str:
    """``12 s``, ``3:05`` or ``1:03:05``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """A request to terminate, or a closed terminal, is an interrupt; an ignored one stays ignored.

    Interrupts themselves are set back to what Python does: a shell that started this in the
    background had them ignored, and the processes started here would inherit that.
    """
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        handler = signal.getsignal(number)
        if number == signal.SIGINT or handler is not signal.SIG_IGN:
            before[number] = handler
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _what_happened(code: int, log: Path) -> str:
    if code < 0:
        hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    with log.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
        return last_line(file.read().decode("utf-8", errors="replace")).removeprefix("scanlm: ")


def time_to_stop(begun: float, max_seconds: float) -> float:
    """When to interrupt, for all to be over ``max_seconds`` after ``begun``."""
    return begun + max_seconds - min(ENDING, max_seconds / 10)


__all__ = ["Interrupted", "LocalSweep", "Outcome", "duration", "time_to_stop"]
