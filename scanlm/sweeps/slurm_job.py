"""What a job of a SLURM cluster does: runs of a sweep, as a command that is told to end in time.

SLURM signals all processes of a job at once, and a run that is hit by two signals would stop in the
middle of saving. So only the job itself listens, and interrupts its command, once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

TO_REQUEUE = signal.SIGUSR2  # what submitit asks SLURM to send some time before a job's end
POLL = 0.1  # seconds


class SweepJob:
    """Carried out on a node by submitit, which calls ``checkpoint`` when the time is nearly up.

    Args:
        words: the command. What it has done is skipped when it is called again.
        patience: seconds that it may take to end when it is interrupted.
    """

    def __init__(self, words: Sequence[str], patience: float) -> None:
        self.words, self.patience = list(words), patience
        self._child: subprocess.Popen[bytes] | None = None
        self._interrupted = False

    def __call__(self) -> None:
        """Run the command.

        Raises:
            RuntimeError: it failed, or was interrupted (``scancel``, a preempted job).
        """
        signal.signal(signal.SIGTERM, lambda *_: self._interrupt())
        self._child = subprocess.Popen(
            self.words,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            preexec_fn=_ignore_signals,  # there is one thread: the usual danger of it is none
        )
        code = self._child.wait()
        if code:
            raise RuntimeError(f"exit status {code} of: {shlex.join(self.words)}")

    def checkpoint(self) -> DelayedSubmission:
        """Interrupt the command and wait for it; the job that goes on from there."""
        from submitit.helpers import DelayedSubmission

        self._interrupt()
        end = time.monotonic() + self.patience
        while self._child is not None and _is_running(self._child.pid):
            if time.monotonic() > end:
                self._child.kill()
                break
            time.sleep(POLL)
        return DelayedSubmission(SweepJob(self.words, self.patience))

    def _interrupt(self) -> None:
        if self._child is not None and not self._interrupted:
            self._interrupted = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGINT)


def _ignore_signals() -> None:
    """In the command's process, before it begins; what it starts inherits this."""
    for number in (TO_REQUEUE, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _is_running(pid: int) -> bool:
    """Of a child; it is left to who waits for it, since a signal may have come in its wait."""
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    return False
