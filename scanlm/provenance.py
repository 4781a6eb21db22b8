"""Where a result comes from: the code's commit, package versions, device and command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "scanlm", "accelerate", "flash-linear-attention", "triton")
# how many configurations of each of fla's kernels are tried: it decides their speed, and trying all
# of them takes minutes, once on every machine
FLA_CONFIGS = "SCANLM_FLA_CONFIGS"


def command() -> str:
    """The command line of this process, with the program's name instead of its path."""
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    if program == "ipykernel_launcher.py":
        return "notebook"
    if program == "__main__.py":
        program = f"python -m {Path(sys.argv[0]).parent.name}"
        return " ".join([program, *map(shlex.quote, sys.argv[1:])])
    return shlex.join([program, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Python and the packages that can change a number, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        found["fla" if package == "flash-linear-attention" else package] = version
    if "fla" in found and FLA_CONFIGS in os.environ:
        found["fla_configs"] = os.environ[FLA_CONFIGS]
    return found


def git_state(folder: str | Path | None = None) -> dict[str, Any]:
    """``git_commit`` and ``git_dirty`` of the checkout that holds the code; else both ``None``.

    Dirty are changes of files that git follows, and new files beside the code: not what a user
    keeps elsewhere in the checkout.

    Code that was copied to a cluster without its repository can be told its commit by the
    environment variable ``SCANLM_COMMIT``: the hash, with ``-dirty`` behind it if files were
    changed.

    Args:
        folder: default this package's. An installed copy inside somebody else's repository is not
            tracked there, and counts as no checkout.
    """
    place = Path(folder) if folder is not None else Path(__file__).parent
    if _git(place, "ls-files", "--error-unmatch", ".") is not None:
        commit = _git(place, "rev-parse", "HEAD")
        changed = _git(place, "status", "--porcelain", "--untracked-files=no")
        new = _git(place, "ls-files", "--others", "--exclude-standard", ".")
        if commit is not None and changed is not None and new is not None:
            return {"git_commit": commit.strip(), "git_dirty": bool((changed + new).strip())}
    told, dash, _ = os.environ.get("SCANLM_COMMIT", "").partition("-")
    return {"git_commit": told or None, "git_dirty": bool(dash) if told else None}


def device_info() -> dict[str, Any]:
    """``type``, ``name`` and ``count`` of the accelerator (else the CPU), ``cpu`` and ``cores``."""
    cpu, cores = _cpu_model(), _cores()
    host = {"cpu": cpu, "cores": cores}
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return {"type": "cuda", "name": torch.cuda.get_device_name(), "count": count, **host}
    if torch.backends.mps.is_available():
        return {"type": "mps", "name": cpu, "count": 1, **host}
    return {"type": "cpu", "name": cpu, "count": 1, **host}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
