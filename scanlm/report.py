"""The README's tables, made from exported records.

Nothing in them is written by hand: ``scanlm report`` makes the text between two markers of the
README from ``data/results``, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scanlm.errors import ScanLMError
from scanlm.records import read_runs, source_line

if TYPE_CHECKING:
    import pandas as pd

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NOTHING = "Not yet recorded."

Row = dict[str, str]


def results_section(results: str | Path = "data/results", link_from: str | Path = ".") -> str:
    """Markdown tables of all exported records, or a line that says there are none.

    Args:
        results: folder of the exported records.
        link_from: folder of the document that the text goes into; records are linked from there.
    """
    folder = Path(results)
    if not any(folder.glob("*/*.json")):
        return NOTHING
    runs = read_runs(folder)
    # read_runs names whole paths; a document needs them relative to itself
    base = Path(link_from).resolve()
    runs["link"] = [
        f"[record]({Path(path).resolve().relative_to(base).as_posix()})" for path in runs["path"]
    ]
    parts = []
    for title, explanation, make in _TABLES:
        rows = [row for _, run in runs.iterrows() if (row := make(run)) is not None]
        if rows:
            parts.append(f"### {title}\n\n{explanation}\n\n{_table(rows)}")
    return "\n\n".join(parts) or NOTHING


def update_document(path: str | Path, results: str | Path = "data/results") -> bool:
    """Put the tables between the document's markers; returns whether it changed.

    Raises:
        ScanLMError: a document without the two markers.
    """
    document = Path(path)
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise ScanLMError(f"cannot read {path}: {error.strerror}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ScanLMError(f"{path} has no lines {BEGIN} and {END}: add them where tables belong")
    new = f"{before}{BEGIN}\n{results_section(results, document.parent)}\n{END}{after}"
    if new != text:
        document.write_text(new, encoding="utf-8")
    return new != text


def _table(rows: list[Row]) -> str:
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(row[name] for name in names)} |" for row in rows]
    return "\n".join(lines)


def _number(value: Any, digits: int = 2) -> str:
    return "" if value is None or value != value else f"{value:,.{digits}f}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _training(run: pd.Series) -> Row | None:
    parameters, summary = _mapping(run["parameters"]), _mapping(run["summary"])
    if parameters.get("kind") != "training":
        return None
    config = _mapping(parameters.get("config"))
    return {
        "model": str(run["model"]),
        "chunk": str(config.get("chunk_size", "")) if config.get("model_type") == "scanlm" else "",
        "parameters": _number(summary.get("num_parameters", 0) / 1e6, 1) + " M",
        "corpus": f"`{parameters['corpus']}`",
        "steps": f"{summary['steps']:,}",
        "tokens": _number(summary["tokens"] / 1e6, 1) + " M",
        "loss": _number(summary["loss"], 3),
        "unigram": _number(summary.get("unigram_entropy"), 3),
        "perplexity": _number(summary["perplexity"]),
        "bits/byte": _number(summary.get("bits_per_byte"), 3),
        "tokens/s": _number(summary.get("tokens_per_second"), 0),
        "source": f"{run['link']}: {source_line(run)}",
    }


def _evaluation(run: pd.Series) -> Row | None:
    parameters, summary = _mapping(run["parameters"]), _mapping(run["summary"])
    if parameters.get("kind") != "evaluation":
        return None
    context = str(parameters["context"])
    if context == "sliding":
        context += f", stride {parameters['stride']}"
    return {
        "model": str(run["model"]),
        "step": f"{summary['step']:,}" if "step" in summary else "",
        "corpus": f"`{parameters['corpus']}`",
        "split": str(parameters["split"]),
        "context": f"{context}, {parameters['seq_len']} tokens",
        "loss": _number(summary["loss"], 3),
        "perplexity": _number(summary["perplexity"]),
        "per word": _number(summary.get("word_perplexity")),
        "bits/byte": _number(summary.get("bits_per_byte"), 3),
        "scored": f"{summary['num_tokens']:,}",
        "source": f"{run['link']}: {source_line(run)}",
    }


# title, what the numbers are and are not, and the row of a run (None: another table's)
_TABLES: tuple[tuple[str, str, Callable[[pd.Series], Row | None]], ...] = (
    (
        "Training runs",
        "Loss in nats per token on the validation split, every token scored; beside it the entropy "
        "of a unigram model of the same text. Steps and tokens say how far a run went: none of "
        "these is the paper's training unless it has the paper's steps and corpus.",
        _training,
    ),
    (
        "Evaluations",
        "Perplexity per token depends on the tokenizer; per word and bits per byte do not. What a "
        "model was trained on is in the table above, under its run.",
        _evaluation,
    ),
)
