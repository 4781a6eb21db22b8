"""The committed pictures: each has a name, is made from records or from pure computation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from scanlm import trees
from scanlm.errors import ScanLMError, nearest
from scanlm.plotting import scan, training
from scanlm.plotting.architecture import architecture
from scanlm.plotting.style import style

logger = logging.getLogger(__name__)


class NoRecords(Exception):
    """A figure's records are not there (yet)."""


@dataclass(frozen=True)
class Records:
    """Exported records, read when a figure asks for them."""

    folder: Path

    def metrics(self, experiment: str) -> tuple[pd.DataFrame, str]:
        """Metrics of one experiment's runs and the caption naming their source.

        Raises:
            NoRecords: there are none.
        """
        files = sorted((self.folder / experiment).glob("*.json"))
        if not files:
            raise NoRecords(f"no records in {self.folder / experiment}")
        from scanlm import records

        return records.read_metrics(*files), source(records.read_runs(*files))


def source(runs: pd.DataFrame) -> str:
    """One caption for all runs of a figure: the line of the first, and how many more there are."""
    from scanlm import records

    more = len(runs) - 1
    line = str(records.source_line(runs.iloc[0]))
    return line + (f"; and {more} more run{'s' if more > 1 else ''}" if more else "")


def _loss(experiment: str) -> Callable[[Records], Figure]:
    def make(records: Records) -> Figure:
        metrics, caption = records.metrics(experiment)
        by = (
            "chunk_size"
            if metrics["model"].nunique() == 1 and _several_chunks(metrics)
            else "model"
        )
        return training.loss_curves(metrics, split=None, by=by, source=caption)

    return make


def _several_chunks(metrics: pd.DataFrame) -> bool:
    return "chunk_size" in metrics and metrics["chunk_size"].nunique() > 1


def _chunk_sizes(records: Records) -> Figure:
    metrics, caption = records.metrics("enwiki2019")
    if not _several_chunks(metrics):
        raise NoRecords("the records of enwiki2019 have only one chunk size")
    return training.chunk_size_comparison(metrics, source=caption)


def _speed(records: Records) -> Figure:
    metrics, caption = records.metrics("training_speed")
    return training.throughput(metrics, source=caption)


FIGURES: dict[str, Callable[[Records], Figure]] = {
    "scan_tree": lambda _: scan.tree(trees.scan_trace(8)),
    "binary_counter": lambda _: scan.counter(trees.counter_trace(8)),
    "work_and_depth": lambda _: scan.work_and_depth(
        pd.DataFrame(trees.scan_costs([*range(1, 64), *range(64, 1025, 16)]))
    ),
    "architecture": lambda _: architecture(),
    "loss_embedded": _loss("embedded"),
    "loss_wikitext103": _loss("wikitext103"),
    "loss_enwiki2019": _loss("enwiki2019"),
    "chunk_sizes": _chunk_sizes,
    "training_speed": _speed,
}


def make_figures(
    results: str | Path = "data/results",
    out: str | Path = "figures",
    names: Iterable[str] | None = None,
) -> list[Path]:
    """Make the committed pictures.

    Args:
        results: folder of exported records, ``<experiment>/<run_id>.json``.
        out: folder for the PNG files, made if it is missing.
        names: which figures; ``None`` makes all. A figure without records is skipped, and a
            warning names it.

    Returns:
        The files written.

    Raises:
        ScanLMError: an unknown name.
    """
    wanted = list(FIGURES) if names is None else list(names)
    for name in wanted:
        if name not in FIGURES:
            raise ScanLMError(f"unknown figure {name!r}.{nearest(name, FIGURES)}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in wanted:
        try:
            figure = FIGURES[name](Records(Path(results)))
        except NoRecords as reason:
            logger.warning("figure %s skipped: %s", name, reason)
            continue
        path = folder / f"{name}.png"
        with style():
            # without matplotlib's version in it, an unchanged figure stays the same file
            figure.savefig(path, metadata={"Software": None})
        written.append(path)
    return written
