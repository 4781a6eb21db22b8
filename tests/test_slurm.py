"""Sweeps on SLURM: what is submitted, what is refused, and jobs that are told to end.

The last tests are on a cluster of one node; without SLURM's programs they are skipped.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from one_node_slurm import cluster, missing
from test_sweep import TINY, scan

from scanlm.errors import ScanLMError
from scanlm.records import Run
from scanlm.sweeps.files import read_sweep
from scanlm.sweeps.plans import plan
from scanlm.sweeps.slurm import jobs_of
from scanlm.sweeps.slurm_profile import SlurmProfile, read_profile
from scanlm.trainer import saved_steps

PROFILE = {"minutes": 10, "cpus": 1, "memory_gb": 1, "warning_seconds": 60}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: with a sweep of four training runs, ``rates.yaml``, and ``node.yaml``."""
    monkeypatch.chdir(tmp_path)
    content = {
        "run": "train",
        "base": TINY | {"model": "scanlm_tiny"},
        "grid": {"seed": [0, 1, 2, 3]},
    }
    (tmp_path / "rates.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "node.yaml").write_text(yaml.safe_dump(PROFILE))
    return tmp_path


def profile(folder: Path, **changes: Any) -> Path:
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(PROFILE | changes))
    return path


# Profiles


def test_the_profiles_of_the_repository_are_read_by_name() -> None:
    gpu = read_profile("gpu")
    assert (gpu.gpus, gpu.runs_per_job) == (1, 1)
    assert read_profile("cpu").gpus == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minuets": 3}, "unknown setting 'minuets'. Did you mean 'minutes'?"),
        ({"minutes": 0}, "minutes=0: expected a value greater than or equal to 1, e.g. minutes="),
        ({"minutes": "8:00:00"}, "minutes='8:00:00': expected an integer, e.g. minutes=480"),
        ({"setup": "module load cuda"}, "setup='module load cuda': expected a list"),
        ({"warning_seconds": 600}, "warning_seconds=600: expected less than the 600 seconds of"),
    ],
)
def test_a_wrong_profile_is_refused(here: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScanLMError, match=re.escape(message)):
        read_profile(profile(here, **changes))
    result = scan("sweep", "rates.yaml", "--slurm", "changed.yaml")
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_profile_without_a_limit_and_one_that_is_not_there_are_refused(here: Path) -> None:
    (here / "empty.yaml").write_text("cpus: 3\n")
    with pytest.raises(
        ScanLMError, match=r"minutes is missing: give its value, e\.g\. minutes=480"
    ):
        read_profile("empty.yaml")
    with pytest.raises(ScanLMError, match=r"no SLURM profile 'gpuu'\. Did you mean 'gpu'\?"):
        read_profile("gpuu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--local",), "--local and --slurm node.yaml: choose one"),
        (("--jobs", 2), "--jobs with --slurm: set runs_per_job and gpus of the profile node.yaml"),
        (("--max-seconds", 9), "--max-seconds with --slurm: set minutes of the profile node.yaml"),
    ],
)
def test_what_the_profile_says_is_not_said_twice(
    here: Path, options: tuple[object, ...], message: str
) -> None:
    result = scan("sweep", "rates.yaml", "--slurm", "node.yaml", *options)
    assert (result.exit_code, result.stderr) == (2, f"scanlm: {message}\n")


def test_without_slurm_nothing_is_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    result = scan("sweep", "rates.yaml", "--slurm", "node.yaml")
    assert result.exit_code == 2
    assert "no command sbatch here: submit on a login node" in result.stderr
    assert not (here / "data").exists()


def test_runs_are_grouped_in_their_order(here: Path) -> None:
    file = read_sweep("rates.yaml")
    runs = plan(file)[1:]
    jobs = jobs_of(file, runs, SlurmProfile(minutes=1, runs_per_job=2))
    assert [[run.number for run in job] for job in jobs] == [[2, 3], [4]]


def test_state_tracking_runs_of_a_job_share_one_gpu(here: Path) -> None:
    content = {"run": "state_tracking", "base": {"preset": "smoke"}, "grid": {"seed": [0, 1]}}
    (here / "states.yaml").write_text(yaml.safe_dump(content))
    result = scan("sweep", "states.yaml", "--slurm", profile(here, gpus=2), "--dry-run")
    assert result.exit_code == 2
    assert "gpus=2: the state-tracking runs of a job go side by side on one GPU" in result.stderr


# What is submitted, to programs that stand in for SLURM's


@pytest.fixture
def pretended(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file: what is in the queue, as ``squeue`` says it."""
    folder = here / "bin"
    folder.mkdir()
    queue = here / "queue"
    queue.touch()
    programs = {"sbatch": "echo Submitted batch job 77", "srun": "", "squeue": f"cat {queue}"}
    for name, what in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{what}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return queue


def commands(folder: Path) -> dict[str, list[str]]:
    """The words of each job's command behind ``scanlm``, by the job's id."""
    from submitit.core.utils import DelayedSubmission

    found = {}
    for path in sorted(folder.glob("*_submitted.pkl")):
        words = DelayedSubmission.load(path).function.words
        assert words[:3] == [sys.executable, "-m", "scanlm"]
        found[path.name.removesuffix("_submitted.pkl")] = words[3:]
    return found


def test_a_job_is_the_sweep_of_its_runs_from_a_copy_of_the_file(
    here: Path, pretended: Path
) -> None:
    changes = {
        "gpus": 2,
        "runs_per_job": 2,
        "partition": "long",
        "setup": ["module load cuda"],
        "sbatch": {"mail-type": "END"},
        "jobs_at_once": 1,
    }
    words = ("--slurm", profile(here, **changes), "--out", "kept")
    result = scan("sweep", "rates.yaml", "--only", "1,2,4", *words)
    assert result.exit_code == 0, result.output
    assert "submitted 3 runs in 2 jobs of at most 10:00: 77" in result.output
    assert "scanlm sweep rates.yaml --out kept --dry-run says" in result.output
    (folder,) = (here / "kept" / "sweeps" / "rates" / "slurm").iterdir()
    copy = folder / "rates.yaml"
    assert copy.read_text() == (here / "rates.yaml").read_text()
    common = ["sweep", str(copy), "--out", "kept", "--jobs", "2", "--only"]
    assert commands(folder) == {"77_0": [*common, "1,2"], "77_1": [*common, "4"]}
    script = (folder / "77_submission.sh").read_text()
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(.*)", script))
    wanted = {
        "array": "0-1%1",
        "time": "10",
        "gpus-per-node": "2",
        "cpus-per-task": "1",
        "mem": "1GB",
        "partition": "long",
        "mail-type": "END",
        "signal": "USR2@60",
        "job-name": "scanlm-rates",
    }
    assert {name: shlex.split(options[name])[0] for name in wanted} == wanted
    assert "\nmodule load cuda\n" in script


def test_jobs_do_not_inherit_the_job_that_they_are_submitted_from(
    here: Path, pretended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "bin" / "sbatch").write_text("#!/bin/sh\nenv > seen\necho Submitted batch job 77\n")
    given = {"SLURM_CONF": "/etc/here.conf", "SLURM_JOB_ID": "5", "SLURM_MEM_PER_NODE": "9"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    result = scan("sweep", "rates.yaml", "--slurm", "node.yaml")
    assert result.exit_code == 0, result.output
    seen = [line for line in (here / "seen").read_text().splitlines() if line.startswith("SLURM_")]
    assert seen == ["SLURM_CONF=/etc/here.conf"]
    assert {name: os.environ[name] for name in given} == given


def test_what_is_in_the_queue_or_finished_is_not_submitted_again(
    here: Path, pretended: Path
) -> None:
    scan("sweep", "rates.yaml", "--only", "1-3", "--slurm", "node.yaml")
    pretended.write_text("12\n77_0\n77_2\n")
    assert scan("sweep", "rates.yaml", "--only", "2").exit_code == 0  # here
    # the file may change meanwhile: runs are known by what they are
    content = yaml.safe_load((here / "rates.yaml").read_text())
    content["grid"]["seed"] = [3, 2, 1, 0]
    (here / "rates.yaml").write_text(yaml.safe_dump(content))
    result = scan("sweep", "rates.yaml", "--slurm", "node.yaml", "--dry-run")
    assert "run 4: in the queue already, job 77_0" in result.output
    assert "run 2: in the queue already, job 77_2" in result.output
    assert "1 of 4 runs finished before" in result.output
    assert "would submit 1 run in 1 job of at most 10:00: 1" in result.output
    pretended.write_text("12\n")  # the jobs are over, and have done nothing
    result = scan("sweep", "rates.yaml", "--slurm", "node.yaml", "--dry-run")
    assert "would submit 3 runs in 3 jobs" in result.output


@pytest.mark.parametrize("program", ["sbatch", "squeue"])
def test_what_slurm_says_against_it_is_passed_on(here: Path, pretended: Path, program: str) -> None:
    if program == "squeue":  # asked only about what was submitted
        scan("sweep", "rates.yaml", "--slurm", "node.yaml")
    before = sorted(here.rglob("*"))
    (here / "bin" / program).write_text("#!/bin/sh\necho 'error: invalid account' >&2; exit 1\n")
    result = scan("sweep", "rates.yaml", "--slurm", "node.yaml")
    assert result.exit_code == 2
    assert "SLURM" in result.stderr
    assert "error: invalid account" in result.stderr
    assert [p for p in sorted(here.rglob("*")) if p.suffix] == [p for p in before if p.suffix]


# A job that is told to end

CHILD = """
import signal, sys, time
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)  # it saves; another signal would end it
    print("saved", flush=True)
    sys.exit(130)
"""

JOB = """
import os, signal, sys
from scanlm.sweeps.slurm_job import SweepJob
job = SweepJob([sys.executable, "-c", sys.argv[1]], patience=20)
def checkpoint(*_):
    again = job.checkpoint().function
    print("again", again.words == job.words and again._child is None, flush=True)
    os._exit(3)
signal.signal(signal.SIGUSR2, checkpoint)
job()
"""


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ([signal.SIGUSR2], 3),
        ([signal.SIGTERM], 1),
        ([signal.SIGTERM, signal.SIGUSR2], 3),
        ([signal.SIGTERM, signal.SIGTERM], 1),
    ],
)
def test_signals_of_a_whole_job_interrupt_its_command_once(
    sent: list[signal.Signals], code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", JOB, CHILD],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    for number in sent:
        os.killpg(process.pid, number)  # to the command, too, as SLURM does
        time.sleep(0.1)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert output == "saved\n" + ("again True\n" if code == 3 else "")
    assert ("exit status 130 of" in errors) == (code == 1)


# A cluster


@pytest.fixture(scope="module")
def on_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as environment:
        yield environment


def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


def test_an_array_of_jobs_runs_to_the_end(here: Path, on_slurm: dict[str, str]) -> None:
    def run(*words: str) -> str:
        done = subprocess.run(words, env=on_slurm, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    sweep = (sys.executable, "-m", "scanlm", "sweep", "rates.yaml")
    sweep = (*sweep, "--only", "1-3", "--slurm", "node.yaml")
    (here / "node.yaml").write_text(yaml.safe_dump(PROFILE | {"runs_per_job": 2}))
    assert "submitted 3 runs in 2 jobs" in run(*sweep)
    assert "nothing is left to submit" in run(*sweep)  # they are in the queue
    until(lambda: not run("squeue", "-h"))
    records = [Run.open(p.parent) for p in (here / "data" / "runs").glob("embedded/*/run.json")]
    assert sorted(r.info["seed"] for r in records if r.finished) == [0, 1, 2]
    assert "3 of 3 runs finished before\nnothing is left to submit" in run(*sweep)


def test_a_job_whose_time_is_up_goes_on_and_a_cancelled_one_is_saved(
    here: Path, on_slurm: dict[str, str]
) -> None:
    # nothing is saved in time: what is there was saved because of an interrupt
    steps = {"steps": 9000, "save_every": 9000, "eval_every": 9000, "log_every": 10}
    content = {"run": "train", "base": TINY | steps, "runs": [{"model": "scanlm_tiny"}]}
    (here / "long.yaml").write_text(yaml.safe_dump(content))
    words = (sys.executable, "-m", "scanlm", "sweep", "long.yaml")
    subprocess.run([*words, "--slurm", "node.yaml"], env=on_slurm, check=True)
    (submitted,) = (here / "data" / "runs" / "sweeps" / "long" / "slurm").glob("*/submitted.json")
    (job,) = json.loads(submitted.read_text())
    log = submitted.with_name(f"{job}_0_log.out")

    def saved() -> list[int]:
        (folder,) = here.glob("data/runs/embedded/*")
        return saved_steps(folder)

    def trained() -> int:
        lines = [p.read_text() for p in here.glob("data/runs/embedded/*/metrics.jsonl")]
        return max(map(int, re.findall(r'"step": (\d+)', "".join(lines))), default=0)

    until(lambda: trained() >= 20)
    # what SLURM sends before the time is up
    subprocess.run(["scancel", "--signal=USR2", job], env=on_slurm, check=True)
    until(lambda: "Requeued job" in log.read_text())
    (first,) = saved()
    until(lambda: trained() > first + 10)
    assert log.read_text().count("started, log:") == 2
    subprocess.run(["scancel", job], env=on_slurm, check=True)
    until(lambda: not subprocess.check_output(["squeue", "-h"], env=on_slurm))
    assert log.read_text().count("interrupted after") == 2
    assert saved()[-1] >= trained() > first >= 20
    state = plan(read_sweep("long.yaml"))[0].state()
    assert (state.name, state.step) == ("unfinished", saved()[-1])
