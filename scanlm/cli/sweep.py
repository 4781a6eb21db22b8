"""``scanlm sweep``: the runs of a file, here or on a cluster, skipping what is done."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scanlm.cli.curriculum import side_by_side
from scanlm.cli.usage import FAILED, WRONG_USAGE, fail
from scanlm.errors import ScanLMError, check_name

if TYPE_CHECKING:
    from scanlm.sweeps.files import SweepFile
    from scanlm.sweeps.local import LocalSweep
    from scanlm.sweeps.plans import SweepRun
    from scanlm.sweeps.slurm_profile import SlurmProfile


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML, see notebooks/sweeps/.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list all runs, and stop.")
    ] = False,
    only: Annotated[str | None, typer.Option(help="Numbers of runs: 1,3-5.")] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes at a time, each with a GPU of its own.")
    ] = 1,
    max_seconds: Annotated[
        float | None, typer.Option(help="Stop after this time; the same command goes on.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the records. Default: the file's, or data/runs.")
    ] = None,
    save_weights: Annotated[
        str | None, typer.Option(help="Of finished state-tracking runs: none, bf16 or fp32.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Of state-tracking runs. Default: the GPU if there is one."),
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="On this machine, as without --slurm.")
    ] = False,
    slurm: Annotated[
        str | None,
        typer.Option(
            metavar="profile",
            help="As jobs of a SLURM cluster: one of notebooks/slurm/, or a YAML file.",
        ),
    ] = None,
) -> None:
    """Do many runs that one file describes: training, notebooks or state tracking.

    What has finished is skipped, what was interrupted goes on. Paths in the file are relative to
    the current folder. Training and notebook runs are processes of their own, each with a log in
    data/runs/sweeps/; state-tracking runs go side by side in this one. With --slurm the runs that
    are left are submitted as an array of jobs, but for those that are in a queue already.

    \b
    Example:
      scanlm sweep notebooks/sweeps/comparison.yaml --dry-run
      scanlm sweep notebooks/sweeps/comparison.yaml --only 1,3-5 --max-seconds 3600
      scanlm sweep notebooks/sweeps/comparison.yaml --slurm gpu
    """
    from scanlm.sweeps.files import read_sweep
    from scanlm.sweeps.plans import choose, plan
    from scanlm.values import check_duration

    begun = time.monotonic()
    try:
        content = read_sweep(file)
        check_duration("max_seconds", max_seconds)
        _check_options(content.kind, jobs, save_weights, None if slurm else device)
        profile = None if slurm is None else _profile(slurm, local, jobs, max_seconds)
        runs = plan(content, out)
        chosen = choose(runs, only)
        if profile is not None:
            given = {"out": out, "save-weights": save_weights, "device": device}
            _on_slurm(content, chosen, profile, given, dry_run)
            return
    except ScanLMError as error:
        fail(str(error), WRONG_USAGE)
    if dry_run:
        _list(content, chosen)
        for run in chosen:
            typer.echo(f"{run.number}: {run.command}")
    elif content.kind == "state_tracking":
        options = {"root": out or "data/runs", "max_seconds": max_seconds, "device": device}
        _side_by_side(chosen, save_weights=save_weights or "none", **options)
    else:
        from scanlm.sweeps.local import LocalSweep, time_to_stop

        stop_at = None if max_seconds is None else time_to_stop(begun, max_seconds)
        _locally(LocalSweep(chosen, file.stem, len(runs), jobs, stop_at, typer.echo))


def _check_options(kind: str, jobs: int, save_weights: str | None, device: str | None) -> None:
    """Refuse options that runs of another kind have, and values that the runs would refuse."""
    if kind == "state_tracking":
        from scanlm.curriculum import SAVE_WEIGHTS
        from scanlm.devices import usable_device

        if jobs > 1:
            raise ScanLMError(
                f"jobs={jobs}: state-tracking runs go side by side in one process: leave it out"
            )
        if save_weights is not None:
            check_name("save_weights", save_weights, SAVE_WEIGHTS)
        usable_device(device)
        return
    for name, value in (("save-weights", save_weights), ("device", device)):
        if value is not None:
            raise ScanLMError(
                f"{name}={value!r} is for state-tracking runs, and this file has run: {kind}: "
                "leave it out"
            )


def _list(file: SweepFile, runs: Sequence[SweepRun]) -> None:
    from scanlm.cli import tables

    typer.echo(tables.sweep_heading(file, runs))
    tables.show(tables.sweep_table(runs))


def _profile(name: str, local: bool, jobs: int, max_seconds: float | None) -> SlurmProfile:
    """The profile; what it says cannot be said a second time."""
    from scanlm.sweeps.slurm_profile import read_profile

    if local:
        raise ScanLMError(f"--local and --slurm {name}: choose one")
    for option, given, instead in (
        ("jobs", jobs > 1, "runs_per_job and gpus"),
        ("max-seconds", max_seconds is not None, "minutes"),
    ):
        if given:
            raise ScanLMError(f"--{option} with --slurm: set {instead} of the profile {name}")
    return read_profile(name)


def _on_slurm(
    file: SweepFile,
    chosen: Sequence[SweepRun],
    profile: SlurmProfile,
    options: Mapping[str, Any],
    dry_run: bool,
) -> None:
    """Submit what is neither finished nor queued, and say how to look after it."""
    from scanlm.sweeps.local import duration
    from scanlm.sweeps.slurm import jobs_of, queued, submit

    busy = queued(chosen, file.path.stem)
    done = {run.number for run in chosen if run.state().name == "finished"}
    left = [run for run in chosen if run.number not in done and run.number not in busy]
    if dry_run:
        _list(file, chosen)
    for number, job in busy.items():
        typer.echo(f"run {number}: in the queue already, job {job}")
    if done:
        typer.echo(f"{len(done)} of {len(chosen)} runs finished before")
    if not left:
        typer.echo("nothing is left to submit")
        return
    jobs = jobs_of(file, left, profile)
    size = f"{len(left)} {'run' if len(left) == 1 else 'runs'}"
    size += f" in {len(jobs)} {'job' if len(jobs) == 1 else 'jobs'}"
    size += f" of at most {duration(60 * profile.minutes)}"
    if dry_run:
        numbers = (", ".join(str(run.number) for run in job) for job in jobs)
        typer.echo(f"would submit {size}: {'; '.join(numbers)}")
        return
    sent = submit(file, jobs, profile, options)
    out = f" --out {shlex.quote(str(options['out']))}" if options["out"] else ""
    typer.echo(
        f"submitted {size}: {sent.number}\n"
        f"  squeue --job {sent.number}; scancel {sent.number} saves and stops\n"
        f"  scanlm sweep {file.path}{out} --dry-run says how far each run is\n"
        f"  script and logs: {sent.folder}\n"
        "the same command goes on with what is left by then"
    )


def _locally(runner: LocalSweep) -> None:
    from scanlm.cli import tables
    from scanlm.sweeps.local import Interrupted

    try:
        outcomes = runner.carry_out()
    except Interrupted as error:
        tables.show(tables.outcome_table(error.outcomes))
        raise
    tables.show(tables.outcome_table(outcomes))
    _end({outcome.run.number: outcome.name for outcome in outcomes})


def _side_by_side(runs: Sequence[SweepRun], **options: Any) -> None:
    from scanlm.cli import tables

    # of finished ones train_many says whether the weights that are asked for were kept
    every = options["save_weights"] != "none"
    settings = [r.settings for r in runs if r.settings and (every or r.state().name != "finished")]
    try:
        side_by_side(settings, **options)
    finally:
        tables.show(tables.sweep_table(runs))
    _end({run.number: run.state().name for run in runs})


def _end(names: Mapping[int, str]) -> None:
    """Say what is left; the exit status says whether something failed."""
    left = sum(name not in ("finished", "failed") for name in names.values())
    if left:
        typer.echo(f"{left} of {len(names)} runs are left; the same command goes on")
    failed = [str(number) for number, name in names.items() if name == "failed"]
    if failed:
        fail(f"{len(failed)} of {len(names)} runs failed: {', '.join(failed)}", FAILED)
