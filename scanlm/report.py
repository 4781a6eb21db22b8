"""Documents made from exported records.

Nothing in them is written by hand: ``scanlm report`` makes the text between two markers of the
README, and all tables beside the records; tests compare them with the records.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from scanlm.errors import ScanLMError
from scanlm.headlines import headlines
from scanlm.records import check_results, exported, read_runs
from scanlm.report_tables import TABLES, Row, source

if TYPE_CHECKING:
    import pandas as pd

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NOTHING = "Not yet recorded."
INTRODUCTION = """# Recorded runs

Made by `scanlm report` from the records in this folder. How they were made is in
[data/README.md](../README.md), and in each record: its command, settings, seed, commit, device and
versions. A record that says "interrupted" or "unfinished" holds what was measured until it was
stopped, or copied."""


def results_section(results: str | Path = "data/results", link_from: str | Path = ".") -> str:
    """Markdown: the headlines of all exported records, or a line that says there are none.

    Args:
        results: folder of the exported records.
        link_from: folder of the document that the text goes into; records are linked from there.
    """
    runs = _read(Path(results), Path(link_from))
    rows = [] if runs is None else headlines(runs)
    return _table(rows) if rows else NOTHING


def all_tables(results: str | Path = "data/results") -> str:
    """A Markdown document for the folder of exported records: all of them, in tables."""
    runs = _read(Path(results), Path(results))
    if runs is None:
        return f"{INTRODUCTION}\n\n{NOTHING}\n"
    parts = [INTRODUCTION]
    for table in TABLES:
        rows = list(table.rows(runs))
        if rows:
            parts.append(f"## {table.title}\n\n{table.explanation}\n\n{_table(rows)}")
    return "\n\n".join(parts) + "\n"


def update_documents(path: str | Path, results: str | Path = "data/results") -> list[Path]:
    """Put the headlines between a document's markers, and the tables beside the records.

    Returns:
        The documents that changed.

    Raises:
        ScanLMError: a document that cannot be read, or without the two markers, or with results
            that these records would replace by nothing; no such folder, or a damaged record in it.
            Nothing has been written then.
    """
    document, tables = Path(path), Path(results) / "README.md"
    check_results(results)
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise ScanLMError(f"cannot read {path}: {error.strerror}") from error
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise ScanLMError(f"{path} has no lines {BEGIN} and {END}: add them where results belong")
    section = results_section(results, document.parent)
    if section == NOTHING and old.strip() not in ("", NOTHING):
        raise ScanLMError(
            f"{results} has no headline, and the results of {path} would be lost: name another "
            "document for these records (scanlm report DOCUMENT --results FOLDER)"
        )
    new = f"{before}{BEGIN}\n{section}\n{END}{after}"
    changed = []
    for target, content in ((document, new), (tables, all_tables(results))):
        if not target.is_file() or target.read_text(encoding="utf-8") != content:
            target.write_text(content, encoding="utf-8")
            changed.append(target)
    return changed


def _read(results: Path, link_from: Path) -> pd.DataFrame | None:
    """All records with ``source``, relative to a document's folder."""
    files = exported(results)
    if not files:
        return None
    runs = read_runs(*files)
    base = link_from.resolve()
    links = (os.path.relpath(Path(path).resolve(), base) for path in runs["path"])
    runs["link"] = [Path(link).as_posix() for link in links]
    return runs.assign(source=runs.apply(source, axis=1))


def _table(rows: Iterable[Row]) -> str:
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(row.get(name, '') for name in names)} |" for row in rows]
    return "\n".join(lines)
