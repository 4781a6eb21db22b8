"""The few numbers that the README begins its results with, the scan model beside GPT-2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from scanlm.benchmark.ratios import most_state_bytes
from scanlm.records import read_metrics, rows_at
from scanlm.report_tables import Row, at_positions, number, percent

if TYPE_CHECKING:
    import pandas as pd

LENGTHS = (180, 1024, 16384)  # of test words of S5
PROMPT = 10_000  # tokens of the prompt whose reading is told beside that of the longest
STEP = {"part": "step", "dtype": "bfloat16", "compiled": "yes"}
STEPS = ((64, 512), (1, 131072))  # sequences and tokens in each


def headlines(runs: pd.DataFrame) -> list[Row]:
    """Rows of a table.

    Args:
        runs: of ``records.read_runs``, with the column ``source``.
    """
    perplexities = (*_perplexity(runs), *_perplexity_of_seeds(runs))
    return [*_inference(runs), *_training(runs), *perplexities, *_state_tracking(runs)]


def _row(what: str, texts: list[str], source: str) -> Row:
    scan, gpt2 = texts
    return {"": what, "scan model": scan, "GPT-2": gpt2, "source": source}


def _with_others(source: str, others: int) -> str:
    """One record's source, and that a row is made of more of them."""
    return f"{source}; {others} more in [the tables](data/results/README.md)" if others else source


def _inference(runs: pd.DataFrame) -> Iterator[Row]:
    from scanlm.plotting.inference import best_gpt2

    runs = runs[(runs["experiment"] == "inference") & (runs["model"] == "base")]
    for _, run in at_positions(runs).iterrows():
        metrics = read_metrics(run["path"])
        steady = metrics[metrics["part"] == "positions"]
        positions = sorted(steady["position"].unique())
        last = positions[-1]
        prompts = [position for position in positions if position in (PROMPT, last)]

        def found(name: str, position: float, steady: pd.DataFrame = steady) -> list[float]:
            """Of the scan model and of the best GPT-2."""
            rows = steady[(steady["name"] == name) & (steady["position"] == position)]
            scan = rows.loc[rows["model"] == "scanlm", "value"]
            return [float(values.min()) for values in (scan, best_gpt2(rows))]

        for name, what, unit, chosen in (
            ("ms_per_token", "a token at position", " ms", positions),
            ("prefill_seconds", "reading a prompt of", " s", prompts),
        ):
            for position in chosen:
                values = [number(value, 3, unit) for value in found(name, position)]
                yield _row(f"{what} {position:,.0f}", values, run["source"])
        # the scan model's at the last position may be the least of all, GPT-2's is the most
        scan = most_state_bytes(run["parameters"], int(last))
        _, gpt2 = found("state_bytes", last)
        values = [number(held / 1e6, 1, " MB") for held in (scan, gpt2)]
        yield _row(f"memory of the state, at most, up to {last:,.0f}", values, run["source"])


def _training(runs: pd.DataFrame) -> Iterator[Row]:
    """Of each size of a step the newest record that has both models, nothing computed again."""
    runs = runs[runs["experiment"] == "training_speed"].sort_values("started", ascending=False)
    runs = runs[~runs["parameters"].map(lambda p: bool(p.get("checkpointing"))).astype(bool)]
    metrics = [(read_metrics(run["path"]), run["source"]) for _, run in runs.iterrows()]
    for batch_size, length in STEPS:
        at: dict[str, Any] = {
            "name": "tokens_per_second",
            "batch_size": batch_size,
            "length": length,
            **STEP,
        }
        for rows, source in metrics:
            best = rows_at(rows, **at).groupby("model")["value"].max()
            scan = best.get("scanlm_base_c64")
            gpt2 = best[best.index.str.startswith("gpt2")].max()
            if scan is not None and gpt2 == gpt2:
                values = [number(value, 0, " tokens/s") for value in (scan, gpt2)]
                yield _row(f"training, {batch_size} x {length:,} tokens a step", values, source)
                break


def _scan_and_gpt2(runs: pd.DataFrame, experiment: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of the compared runs those of models that scan, and of GPT-2; empty if there are none."""
    from scanlm.plotting.figures import NoRecords, compared_runs, unscanned

    runs = runs[runs["experiment"] == experiment]
    try:
        runs = compared_runs(runs)
    except NoRecords:
        return runs[:0], runs[:0]
    runs = runs[~unscanned(runs)]
    models = runs["model"].str
    return runs[models.startswith("scanlm")], runs[models.startswith("gpt2")]


def _perplexity(runs: pd.DataFrame) -> Iterator[Row]:
    scan, gpt2 = _scan_and_gpt2(runs, "enwiki2019")
    if scan.empty or gpt2.empty:
        return
    values = scan.set_index("model")["summary.perplexity"]
    text = number(values.min())
    if len(scan) > 1:
        text += f" to {number(values.max())} (chunks of {_chunks(values)})"
    tokens = number(scan["summary.tokens"].iloc[0] / 1e6, 1)
    what = f"perplexity on enwiki2019's validation text, trained on {tokens} M tokens"
    first = scan.loc[scan["model"] == values.idxmin(), "source"].iloc[0]
    yield _row(
        what, [text, number(gpt2["summary.perplexity"].min())], _with_others(first, len(scan))
    )


def _perplexity_of_seeds(runs: pd.DataFrame) -> Iterator[Row]:
    """Of the smaller models with several seeds each."""
    from scanlm.plotting.figures import SMALL

    scan, gpt2 = _scan_and_gpt2(runs, SMALL)
    if scan.empty or gpt2.empty:
        return
    texts = []
    for values in (scan["summary.perplexity"], gpt2["summary.perplexity"]):
        spread = f"{number(values.min())} to {number(values.max())}, {len(values)} seeds"
        texts.append(f"{number(values.mean())} ({spread})")
    size = number(scan["summary.num_parameters"].iloc[0] / 1e6, 0)
    tokens = number(scan["summary.tokens"].iloc[0] / 1e6, 1)
    what = f"the same with {size} M parameters, trained on {tokens} M tokens, mean (range)"
    yield _row(what, texts, _with_others(scan["source"].iloc[0], len(scan) + len(gpt2) - 1))


def _chunks(perplexities: pd.Series) -> str:
    """``256 to 32``: in the order of the perplexities."""
    sizes = [str(name).rpartition("_c")[2] for name in perplexities.sort_values().index]
    return f"{sizes[0]} to {sizes[-1]}"


def _state_tracking(runs: pd.DataFrame) -> Iterator[Row]:
    from scanlm.plotting.state_records import sort_runs
    from scanlm.plotting.state_tracking import evaluated

    runs = runs[runs["experiment"] == "s5"]
    if runs.empty:
        return
    runs = sort_runs(runs)
    recipe = runs[runs["role"] == "recipe"]
    gpt2 = runs[(runs["role"] == "baseline") & runs["model"].str.startswith("gpt2")]
    if recipe.empty:
        return
    trained = int(recipe["trained"].iloc[0])
    scan_rows = evaluated(read_metrics(*recipe["path"]))
    gpt2_rows = None if gpt2.empty else evaluated(read_metrics(*gpt2["path"]))
    for length in sorted(set(scan_rows["length"]) & set(LENGTHS)):
        texts = []
        for rows in (scan_rows, gpt2_rows):
            if rows is None:
                texts.append("not yet recorded")
                continue
            values = rows[rows["length"] == length]["value"]
            if values.empty:
                texts.append("beyond what it was tested on")
                continue
            texts.append(
                f"{percent(values.median())} ({percent(values.min())} to {percent(values.max())}, "
                f"{len(values)} {'seed' if len(values) == 1 else 'seeds'})"
            )
        what = f"S5, trained to length {trained}: right at length {length:,}, median (range)"
        yield _row(what, texts, _with_others(recipe["source"].iloc[0], len(recipe) - 1))
