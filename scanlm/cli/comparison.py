"""Evaluations of several models together: one list of rows, one figure."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scanlm.errors import ScanLMError

if TYPE_CHECKING:
    import pandas as pd

Rows = Sequence[Mapping[str, Any]]


def evaluate_all(
    targets: Sequence[str],
    corpora: Sequence[str] | None,
    splits: Sequence[str],
    ranked: bool,
    report: Callable[[dict[str, Any]], None],
    **options: Any,
) -> None:
    """``evaluation.evaluate`` of several targets; all are checked before one is scored.

    Args:
        targets: as for ``evaluate``.
        corpora: ``None``: the one that the first target's run was trained on.
        splits: of each corpus.
        ranked: the losses will be compared, so that they have to be comparable.
        report: gets each row as soon as it is scored.
        options: of ``evaluate``.

    Raises:
        ScanLMError: no corpus is given or known, ``ranked`` targets are read in different ways or
            one of them is given twice, and whatever ``evaluate`` raises.
    """
    from scanlm.checkpoints import load_checkpoint
    from scanlm.evaluation import evaluate

    given = [str(Path(target)) for target in targets]  # without a slash at the end
    twice = next((target for target in given if given.count(target) > 1), None)
    if ranked and twice is not None:
        raise ScanLMError(f"--compare: {twice} is given twice: leave one out")
    options["load"] = _keeping_the_last(load_checkpoint)
    asked = [
        (target, corpus, split)
        for corpus in corpora or [trained_on(targets[0])]
        for split in splits
        for target in targets
    ]
    if len(asked) > 1:
        checked = [row for each in asked for row in evaluate(*each, **options, dry_run=True)]
        if ranked:
            _check_comparable(checked)
    for each in asked:
        evaluate(*each, **options, report=report, progress=sys.stderr.isatty())


def _keeping_the_last(load: Callable[..., Any]) -> Callable[..., Any]:
    """``load``, but what it returned last is returned again where it is asked for again."""
    last: dict[Any, Any] = {}

    def loading(*arguments: Any, **options: Any) -> Any:
        asked = (*arguments, *options.items())
        if asked not in last:
            last.clear()  # first, so that there is memory for the next one
            last[asked] = load(*arguments, **options)
        return last[asked]

    return loading


def _check_comparable(rows: Rows) -> None:
    """Refuse to rank losses of different tokens, or after different contexts."""
    first = rows[0]
    for row in rows[1:]:
        if row["tokenizer_hash"] != first["tokenizer_hash"]:
            raise ScanLMError(
                f"--compare ranks losses per token, and {first['target']} and {row['target']} have "
                "different tokenizers: leave it out, and compare bits/byte"
            )
        for name in ("seq_len", "chunk_size"):
            if row[name] != first[name]:
                option = f"--{name.replace('_', '-')} {min(row[name], first[name])}"
                raise ScanLMError(
                    f"--compare ranks models that are read alike, and {name} is {first[name]} for "
                    f"{first['target']}, {row[name]} for {row['target']}: give one for all, e.g. "
                    f"{option}"
                )


def trained_on(target: str) -> str:
    """The corpus that a run's record names, if its name is enough to find it.

    Raises:
        ScanLMError: there is no record, it is damaged or not of text, or the corpus was a folder.
    """
    from scanlm.data import NAMES
    from scanlm.records import RUN_FILE, Run

    folder = Path(target).expanduser()
    run = next((place for place in (folder, folder.parent) if (place / RUN_FILE).exists()), None)
    if run is None:
        what = "is no run" if folder.exists() else "does not exist, or is a name of a hub's model"
        raise ScanLMError(f"{target} {what}, so nothing says which corpus to score: give --corpus")
    name = Run.open(run).info.get("parameters", {}).get("corpus")
    if name is None:
        raise ScanLMError(
            f"{target} was not trained on text, which evaluate scores: choose another run"
        )
    if str(name).partition("#")[0] in NAMES:
        return str(name)
    raise ScanLMError(f"{target}: its corpus {name!r} is no name that is known: give --corpus")


def default_figure(rows: Rows, root: str | Path) -> Path:
    """Where the figure of a comparison goes: named by what is compared."""
    named = "-".join(dict.fromkeys(str(row["model"]).replace("/", "-") for row in rows))
    records = json.dumps([[row["path"], row["corpus"], row["context"]] for row in rows])
    digest = hashlib.sha256(records.encode()).hexdigest()[:8]
    return Path(root) / "comparisons" / f"{named[:80]}-{digest}.png"


def draw(rows: Rows, path: str | Path) -> Path:
    """Save the figure of some evaluations: loss by step if one has several, else by position."""
    from scanlm.plotting import training
    from scanlm.plotting.figures import source
    from scanlm.plotting.style import style
    from scanlm.records import read_runs

    path = Path(path)
    split = str(rows[0]["split"])
    records = [row["record"] for row in rows if row["record"]]
    caption = source(read_runs(*records)) if records else None
    models = {row["target"]: row["model"] for row in rows}
    # colours go by family where that tells the models apart
    by = "model" if len(set(models.values())) == len(models) else "series"
    with style():
        if len({row["target"] for row in rows}) < len(rows):
            frame = _frame(rows, by_position=False)
            picture = training.loss_curves(frame, "step", split=split, by=by, source=caption)
        else:
            frame = _frame(rows, by_position=True)
            window = max(1, max(int(row["seq_len"]) for row in rows) // 64)
            picture = training.loss_by_position(
                frame, split=split, by=by, window=window, source=caption
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path)
    return path


def _frame(rows: Rows, by_position: bool) -> pd.DataFrame:
    """The rows as ``records.read_metrics`` gives metrics, with a name for each curve."""
    import pandas as pd

    models = {str(row["target"]): str(row["model"]) for row in rows}
    lines = []
    for row in rows:
        target = str(row["target"])
        # the same model twice, e.g. of two seeds: told apart by where they are
        several = list(models.values()).count(models[target]) > 1
        series = Path(target).name if several else models[target]
        line = {
            "run_id": target,
            "model": row["model"],
            "series": series,
            "split": row["split"],
            "step": row["step"],
            "name": "loss",
        }
        if by_position:
            lines += [
                line | {"position": int(position), "value": float(loss)}
                for position, loss, count in zip(
                    row["positions"],
                    row["loss_by_position"],
                    row["counts_by_position"],
                    strict=True,
                )
                if count
            ]
        else:
            lines.append(line | {"value": row["loss"]})
    return pd.DataFrame(lines)
