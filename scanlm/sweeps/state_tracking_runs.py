"""State-tracking runs of a sweep: settings as ``scanlm curriculum`` takes them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from scanlm.curriculum import reach_text, record_folder
from scanlm.curriculum_settings import preset_settings
from scanlm.curriculum_step import check_model
from scanlm.records import METRICS_FILE, RUN_FILE, Run, read_metrics
from scanlm.sweeps.plans import State, optional_text
from scanlm.values import format_value


def state_tracking_run(values: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """The fields of a ``SweepRun``.

    Args:
        values: perhaps ``preset`` (default "paper"), ``seed``, and settings by dotted keys.
        out: folder of the records; default ``data/runs``.

    Raises:
        ScanLMError: settings that ``scanlm curriculum`` would refuse.
    """
    preset = optional_text(values, "preset") or "paper"
    settings = preset_settings(preset, values)
    check_model(settings)
    root = out if out is not None else Path("data/runs")
    folder = record_folder(settings, root)
    words = ["curriculum", "--preset", preset, "--seeds", str(settings.seed)]
    for name, value in values.items():
        if name != "seed":
            words += ["--set", f"{name}={format_value(value)}"]
    words += ["--out", str(root)] if out is not None else []
    return {
        "words": words,
        "label": folder.name,
        "root": root,
        "identity": str(folder),
        "find": partial(_state, folder),
        "settings": settings,
    }


def _state(folder: Path) -> State:
    if not (folder / RUN_FILE).is_file():
        return State("new", folder)
    run = Run.open(folder)
    if run.finished:
        return State("finished", folder, note=reach_text(run.summary))
    if run.status in ("failed", "diverged"):
        return State("failed", folder, note=str(run.info.get("message", run.status)))
    metrics = read_metrics(folder) if (folder / METRICS_FILE).is_file() else None
    step = int(metrics["step"].max()) if metrics is not None and len(metrics) else 0
    return State("unfinished", folder, step)
