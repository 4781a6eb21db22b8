"""A sweep's runs on a SLURM cluster: an array of jobs, which go on when their time is up.

A submission has a folder, ``<records>/sweeps/<file>/slurm/<time>/``: a copy of the file, so that
what is queued stays what it was; which runs each job does; the script that was submitted; and what
each job says. A job is ``scanlm sweep`` of some runs of that copy, on a node: it skips what has
finished, and goes on with what was interrupted.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scanlm.batch import last_line
from scanlm.errors import ScanLMError
from scanlm.sweeps.files import SweepFile
from scanlm.sweeps.local import program
from scanlm.sweeps.plans import SweepRun
from scanlm.sweeps.slurm_job import SweepJob
from scanlm.sweeps.slurm_profile import SlurmProfile

SUBMITTED = "submitted.json"  # job -> identities of its runs
SAVING = 15  # seconds of the warning that are left to submitit, to put a job back into the queue


@dataclass(frozen=True)
class Submission:
    """What was handed to SLURM.

    Attributes:
        folder: of the copy, the script and the logs.
        number: that all jobs share, for ``squeue`` and ``scancel``.
    """

    folder: Path
    number: str


def jobs_of(
    file: SweepFile, runs: Sequence[SweepRun], profile: SlurmProfile
) -> list[list[SweepRun]]:
    """The runs of each job.

    Raises:
        ScanLMError: several GPUs for a job of state-tracking runs, which share one.
    """
    if file.kind == "state_tracking" and profile.gpus > 1:
        raise ScanLMError(
            f"gpus={profile.gpus}: the state-tracking runs of a job go side by side on one GPU: "
            "use a profile with gpus: 1"
        )
    size = profile.runs_per_job
    return [list(runs[first : first + size]) for first in range(0, len(runs), size)]


def queued(runs: Sequence[SweepRun], name: str) -> dict[int, str]:
    """Of the runs that are in a job of an earlier submission, running or waiting, that job's id.

    Args:
        runs: of a sweep.
        name: of the sweep, the stem of its file.

    Raises:
        ScanLMError: SLURM does not answer.
    """
    jobs: dict[str, str] = {}
    for root in {run.root for run in runs}:
        for path in sorted((root / "sweeps" / name / "slurm").glob(f"*/{SUBMITTED}")):
            submitted = json.loads(path.read_text(encoding="utf-8"))
            jobs |= {of: job for job, identities in submitted.items() for of in identities}
    alive = _alive() if jobs else set()
    return {run.number: jobs[run.identity] for run in runs if jobs.get(run.identity) in alive}


def _alive() -> set[str]:
    """The ids of the user's jobs that are running or waiting."""
    if shutil.which("squeue") is None:
        return set()
    # -r: each job of an array on a line of its own
    words = ["squeue", "-h", "-r", "-o", "%i", "-u", getpass.getuser()]
    asked = subprocess.run(words, capture_output=True, text=True)
    if asked.returncode:
        raise ScanLMError(f"SLURM does not answer: {last_line(asked.stderr)}")
    return set(asked.stdout.split())


def submit(
    file: SweepFile,
    jobs: Sequence[Sequence[SweepRun]],
    profile: SlurmProfile,
    options: Mapping[str, Any],
) -> Submission:
    """Hand runs to SLURM, and return at once.

    Args:
        file: of the sweep.
        jobs: of ``jobs_of``; one at least.
        profile: what a job asks for.
        options: of ``scanlm sweep`` that its jobs take, too: ``out``, ``save-weights``, ``device``.

    Raises:
        ScanLMError: there is no SLURM here, or it refuses the jobs.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    if shutil.which("sbatch") is None:
        raise ScanLMError(
            "no command sbatch here: submit on a login node of a SLURM cluster, or leave --slurm "
            "out to run on this machine"
        )
    folder = jobs[0][0].root / "sweeps" / file.path.stem / "slurm" / time.strftime("%Y%m%d-%H%M%S")
    folder = folder.resolve()
    folder.mkdir(parents=True)
    copy = folder / file.path.name
    shutil.copyfile(file.path, copy)
    words = [*program(), "sweep", str(copy)]
    for name, value in options.items():
        words += [f"--{name}", str(value)] if value is not None else []
    at_once = min(profile.gpus, profile.runs_per_job)
    if file.kind != "state_tracking" and at_once > 1:
        words += ["--jobs", str(at_once)]
    executor = SlurmExecutor(folder=folder, max_num_timeout=profile.requeues)
    executor.update_parameters(**_parameters(profile, file.path.stem))
    patience = profile.warning_seconds - SAVING
    submitted = []
    try:
        with _not_within_a_job(), executor.batch():
            for runs in jobs:
                only = ",".join(str(run.number) for run in runs)
                submitted.append(executor.submit(SweepJob([*words, "--only", only], patience)))
    except (FailedJobError, FailedSubmissionError) as error:
        shutil.rmtree(folder)
        raise ScanLMError(f"SLURM refuses the jobs: {last_line(error)}") from error
    identities = {
        job.job_id: [run.identity for run in runs]
        for job, runs in zip(submitted, jobs, strict=True)
    }
    (folder / SUBMITTED).write_text(json.dumps(identities, indent=1) + "\n", encoding="utf-8")
    return Submission(folder, submitted[0].job_id.partition("_")[0])


@contextlib.contextmanager
def _not_within_a_job() -> Iterator[None]:
    """Jobs submitted within a job, such as a notebook's, would inherit what was given to that."""
    from submitit.helpers import clean_env

    configuration = os.environ.get("SLURM_CONF")
    with clean_env():
        if configuration is not None:  # where the cluster is; clean_env puts all back afterwards
            os.environ["SLURM_CONF"] = configuration
        yield


def _parameters(profile: SlurmProfile, name: str) -> dict[str, Any]:
    """A profile as submitit takes it; ``None`` is the cluster's default."""
    memory = profile.memory_gb
    return {
        "job_name": f"scanlm-{name}",
        "time": profile.minutes,
        "gpus_per_node": profile.gpus or None,
        "cpus_per_task": profile.cpus,
        "mem": None if memory is None else f"{memory}GB",
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "additional_parameters": profile.sbatch,
        "setup": profile.setup or None,
        "array_parallelism": profile.jobs_at_once,
        "signal_delay_s": profile.warning_seconds,
        "stderr_to_stdout": True,  # one log a job
    }
