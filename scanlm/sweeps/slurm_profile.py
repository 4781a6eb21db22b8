"""What a job asks of a SLURM cluster: ``notebooks/slurm/<name>.yaml``, or any YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scanlm.batch import notebooks_folder
from scanlm.errors import ScanLMError
from scanlm.settings import first_mistake
from scanlm.values import named_file, read_mapping


class SlurmProfile(BaseModel):
    """Resources of one job, and how many there may be.

    Attributes:
        minutes: time limit. A job whose runs need more goes on, see ``requeues``.
        runs_per_job: training and notebook runs one after another, on several GPUs side by side;
            state-tracking runs side by side on one GPU.
        gpus, cpus, memory_gb: of a job, on one node; a value that is not given is the cluster's.
        partition, account, qos, constraint: as ``sbatch`` takes them.
        sbatch: further options of it by their long names, ``{gres: "gpu:h100:1"}``.
        setup: shell commands before a job begins, such as ``module load cuda``.
        jobs_at_once: of one sweep.
        requeues: how often a job is put back into the queue when its time is up.
        warning_seconds: how long before its time is up a job is told to save and end.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    minutes: int = Field(ge=1, examples=[480])
    runs_per_job: int = Field(default=1, ge=1)
    gpus: int = Field(default=0, ge=0)
    cpus: int | None = Field(default=None, ge=1, examples=[8])
    memory_gb: int | None = Field(default=None, ge=1, examples=[64])
    partition: str | None = Field(default=None, examples=["gpu"])
    account: str | None = Field(default=None, examples=["vision"])
    qos: str | None = Field(default=None, examples=["normal"])
    constraint: str | None = Field(default=None, examples=["h100"])
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    setup: list[str] = Field(default_factory=list)
    jobs_at_once: int = Field(default=256, ge=1)
    requeues: int = Field(default=10, ge=0)
    warning_seconds: int = Field(default=120, ge=30, le=3600)


def read_profile(name: str | Path) -> SlurmProfile:
    """A profile by name, or a YAML file.

    Raises:
        ScanLMError: no such profile or file, an unknown name, a value of another kind.
    """
    what = f"SLURM profile {str(name)!r}"
    path = named_file(name, lambda: notebooks_folder() / "slurm", what)
    values: dict[str, Any] = read_mapping(path)
    try:
        profile = SlurmProfile(**values)
    except ValidationError as error:
        raise ScanLMError(f"{path}: {first_mistake(error, SlurmProfile)}") from None
    if profile.warning_seconds >= 60 * profile.minutes:
        raise ScanLMError(
            f"{path}: warning_seconds={profile.warning_seconds}: expected less than the "
            f"{60 * profile.minutes} seconds of minutes={profile.minutes}"
        )
    return profile
