"""What the commands print: tables for people, plain values for ``--json``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from scanlm.baselines import ModelEntry
    from scanlm.data import TokenizedCorpus
    from scanlm.sweeps.files import SweepFile
    from scanlm.sweeps.local import Outcome
    from scanlm.sweeps.plans import SweepRun

WIDE = 200  # columns where no terminal says how many there are


def show(table: Table) -> None:
    """Print a table, whole where the output is a file or a pipe."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def show_json(value: Any) -> None:
    """Print JSON; numpy's arrays are lists, and numbers that JSON does not have are null."""
    print(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # numpy's arrays and scalars
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(*columns: str, left: int = 1) -> Table:
    """A table whose first ``left`` columns are text and whose others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", no_wrap=place == 0)
    return table


def model_rows(entries: Iterable[ModelEntry]) -> list[dict[str, Any]]:
    """Models as rows.

    Returns:
        ``id, name, family, parameters`` (``None`` if the family's package is missing, then ``note``
        says which), ``training``, ``differs`` (from the family's default configuration and from
        the default settings; the vocabulary is left out), ``config`` and ``description``.

    Raises:
        ScanLMError: a model that cannot be built for another reason.
    """
    from scanlm.baselines import config_differences, count_parameters
    from scanlm.errors import ScanLMError
    from scanlm.settings import TrainingSettings

    defaults = TrainingSettings().model_dump()
    rows = []
    for entry in entries:
        row: dict[str, Any] = entry.model_dump()
        own = entry.training.items()
        row["differs"] = _one_dropout(config_differences(entry))
        row["differs"] |= {name: value for name, value in own if value != defaults[name]}
        try:
            row["parameters"] = count_parameters(entry)
        except ScanLMError as error:
            if not isinstance(error.__cause__, ImportError):
                raise
            row |= {"parameters": None, "note": str(error)}
        rows.append(row)
    return rows


def _one_dropout(fields: dict[str, Any]) -> dict[str, Any]:
    """The rates of GPT-2's three dropouts as one, which sets all, where they are equal."""
    from scanlm.settings import DROPOUT_FIELDS

    rates = [fields.get(name) for name in DROPOUT_FIELDS]
    if rates[0] is None or any(rate != rates[0] for rate in rates):
        return fields
    others = {name: value for name, value in fields.items() if name not in DROPOUT_FIELDS}
    return others | {"dropout": rates[0]}


def models_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Models, one line each."""
    from rich.markup import escape

    from scanlm.values import format_value

    table = _table("id", "family", "parameters", "differs from the defaults", "description")
    for column in (1, 3, 4):
        table.columns[column].justify = "left"
    for column in (1, 2):
        table.columns[column].no_wrap = True
    table.columns[3].overflow = "fold"  # what is cut off of name=value may be the value
    for row in rows:
        own = row["differs"].items()
        settings = " ".join(f"{name}={format_value(value)}" for name, value in own)
        number = f"{row['parameters']:,}" if row["parameters"] is not None else "?"
        words = (row["id"], row["family"], number, settings, row["description"])
        table.add_row(*map(escape, words))
    return table


def corpus_table(tokens: TokenizedCorpus) -> Table:
    """The splits of a prepared corpus."""
    from rich.markup import escape

    table = _table("split", "file", "tokens", "words", "bytes", left=2)
    table.title = escape(
        f"{tokens.name}, tokenizer {tokens.tokenizer_spec} ({tokens.vocab_size:,} entries)"
    )
    for name, part in tokens.splits.items():
        numbers = (part.num_tokens, tokens.counted_words(name), part.num_bytes)
        table.add_row(name, escape(str(part.path)), *(f"{number:,}" for number in numbers))
    return table


def describe_run(facts: Mapping[str, Any]) -> str:
    """What ``training.describe`` returns, as YAML with the figures people ask for first."""
    import yaml

    settings, config = facts["settings"], facts["config"]
    size = "{steps:,} steps x {batch_size} sequences x {seq_len} tokens".format(**settings)
    bound = ""
    if facts["upper_bound"]:
        bound = f"  # at most: all {config['vocab_size']:,} entries of {settings['tokenizer']} used"
    lines = [
        f"parameters: {facts['num_parameters']:,}{bound}",
        f"tokens: {facts['tokens']:,}  # {size}",
        f"memory: {facts['memory_bytes'] / 2**30:.2f} GiB  # estimate: {facts['memory_formula']}",
        f"experiment: {facts['experiment']}",
    ]
    if facts["flops"]:
        lines.insert(2, f"flops: {facts['flops']:.3g}")
    parts = {"settings": settings, "config": config}
    text = yaml.safe_dump(_plain(parts), sort_keys=False, default_flow_style=None, width=100)
    return "\n".join([*lines, text.rstrip(), f"command: {facts['command']}"])


def evaluation_table(rows: Sequence[Mapping[str, Any]], compare: bool = False) -> Table:
    """Rows of ``evaluation.evaluate``; to compare, each with its distance from the first."""
    from rich.markup import escape

    columns = ["model", "step", "corpus", "context", "tokens scored", "loss", "perplexity"]
    columns += ["per word", "bits/byte", *(["loss - best"] if compare else [])]
    table = _table(*columns, left=4)
    for row in rows:
        context = f"{row['context']} of {row['seq_len']}"
        context += f", stride {row['stride']}" if row["stride"] else ""
        context += ", original positions" if row["original_positions"] else ""
        step = "" if row["step"] is None else f"{row['step']:,}"
        words = (str(row["model"]), step, f"{row['corpus']} {row['split']}", context)
        numbers = [f"{row['num_tokens']:,}", f"{row['loss']:.4f}", f"{row['perplexity']:.2f}"]
        numbers.append(_number(row["word_perplexity"], ".2f"))
        numbers.append(_number(row["bits_per_byte"], ".4f"))
        if compare:
            numbers.append(f"{row['loss'] - rows[0]['loss']:+.4f}")
        table.add_row(*map(escape, words), *numbers)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def sweep_heading(file: SweepFile, runs: Sequence[SweepRun]) -> str:
    """What a sweep is, and what its training runs take together."""
    lines = [file.description] if file.description else []
    size = f"{len(runs)} runs ({file.kind})"
    if all(run.sizes for run in runs):
        size += f", {sum(run.sizes['tokens'] for run in runs):,} tokens"
    if all(run.sizes.get("flops") for run in runs):
        size += f", {sum(run.sizes['flops'] for run in runs):.3g} FLOPs"
    return "\n".join([*lines, size])


def sweep_table(runs: Sequence[SweepRun]) -> Table:
    """One line a run: what is its own, how far it is, where its record is and what it takes."""
    from rich.markup import escape

    sized = any(run.sizes for run in runs)
    sizes = ["parameters", "tokens", "FLOPs"] if sized else []
    table = _table("run", "varies", "state", "record", "note", *sizes, left=5)
    table.columns[3].overflow = "fold"  # a path is of no use without its end
    for run in runs:
        state = run.state()
        words = (str(run.number), run.varies, str(state), str(state.place), state.note)
        numbers = [f"{run.sizes[name]:,}" for name in ("num_parameters", "tokens") if sized]
        numbers += [_number(run.sizes["flops"], ".3g")] if sized else []
        table.add_row(*map(escape, words), *numbers)
    return table


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """How the runs of a session fared."""
    from rich.markup import escape

    from scanlm.sweeps.local import duration

    table = _table("run", "varies", "outcome", "time", "note", left=5)
    for outcome in outcomes:
        time = duration(outcome.seconds) if outcome.seconds else ""
        run = outcome.run
        words = (str(run.number), run.varies, outcome.name, time, outcome.note)
        table.add_row(*map(escape, words))
    return table
