"""``scanlm curriculum``: state tracking, the runs of one setting with several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scanlm.errors import ScanLMError

if TYPE_CHECKING:
    from scanlm.curriculum_settings import StateTrackingSettings


def curriculum(
    preset: Annotated[str, typer.Option(help="paper, original, laptop or smoke.")] = "paper",
    seeds: Annotated[str, typer.Option(help="0,1,2: one run each, side by side.")] = "0",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value: stages.-1.max_steps=30000; repeatable."),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(help="Stop and save after this time; log_every steps begun are done first."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("data/runs"),
    save_weights: Annotated[
        str, typer.Option(help="Of finished runs: none, bf16 or fp32.")
    ] = "none",
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
) -> None:
    """Train state tracking (S5 and other groups) on sequences of growing length.

    Several different runs: scanlm sweep, with the files in notebooks/sweeps.

    \b
    Example:
      scanlm curriculum --preset smoke --seeds 0,1 --set ema=0.99
    """
    from scanlm.curriculum_settings import preset_settings
    from scanlm.values import parse_assignments

    words = seeds.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ScanLMError(f"seeds={seeds!r}: expected numbers, e.g. 0,1,2")
    changes = parse_assignments(set_ or ())
    if "seed" in changes:
        raise ScanLMError(
            f"seed={changes['seed']} by --set: give seeds by --seeds {changes['seed']}"
        )
    settings = [preset_settings(preset, changes, seed=int(word)) for word in words]
    records = side_by_side(
        settings, root=out, device=device, max_seconds=max_seconds, save_weights=save_weights
    )
    lost = [record.folder.name for record in records if record.status == "diverged"]
    if lost:
        raise ScanLMError(
            f"{len(lost)} of {len(records)} runs diverged: {', '.join(lost)}: lower stages.*.lr"
        )


def side_by_side(settings: Sequence[StateTrackingSettings], **options: Any) -> list[Any]:
    """``curriculum.train_many`` that reports its progress, and what an interrupt leaves."""
    from scanlm.curriculum import train_many

    try:
        return train_many(settings, progress=typer.echo, **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from what each run has saved") from None
