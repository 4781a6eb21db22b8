"""What each table of the report shows of the exported records."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from scanlm.errors import ScanLMError
from scanlm.records import of_kind, read_metrics, shown_status
from scanlm.values import mapping_or_empty
from scanlm.variations import change_text, changes

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, str]
COMPILED = {"yes": "compiled", "no": "not compiled", "whole": "compiled as a whole"}
LENGTHS = (180, 1024, 4096, 16384)  # of test words


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: above it.
        explanation: what the numbers are and are not.
        rows: makes its rows from all runs, as ``records.read_runs`` has them, with the column
            ``source``: a link to the record, the machine and the commit.
    """

    title: str
    explanation: str
    rows: Callable[[pd.DataFrame], Iterable[Row]]


def number(value: Any, digits: int = 2, unit: str = "") -> str:
    """With commas and unit; empty if there is none."""
    return "" if value is None or value != value else f"{value:,.{digits}f}{unit}"


def percent(share: Any) -> str:
    """A share in per cent, cut off after three digits: only what is exactly 1 is 100 %."""
    if share is None or share != share:
        return ""
    return "100 %" if share == 1 else f"{math.floor(1e5 * share) / 1e3:.3f} %"


def source(run: pd.Series) -> str:
    """Link, device, commit, and whether the run was stopped: the rest is in the record."""
    device = mapping_or_empty(run["device"])
    gpu = re.search(r"[A-Z]\d+00", str(device.get("name")))
    parts = [gpu[0] if gpu else str(device.get("name", "")), str(run["git_commit"] or "")[:8]]
    if run["git_dirty"]:
        parts[-1] += " (modified)"
    if run["status"] != "finished":
        parts.append(shown_status(run["status"]))
    return f"[record]({run['link']}): " + ", ".join(part for part in parts if part)


def _of(runs: pd.DataFrame, experiment: str) -> pd.DataFrame:
    return runs[runs["experiment"] == experiment]


def at_positions(runs: pd.DataFrame) -> pd.DataFrame:
    """The inference runs that timed tokens at positions, as not every one does."""

    def timed(path: str) -> bool:
        metrics = read_metrics(path)
        return "part" in metrics and bool((metrics["part"] == "positions").any())

    return runs[runs["path"].map(timed).astype(bool)]


def _training(runs: pd.DataFrame) -> Iterable[Row]:
    """Of each experiment the longest runs first, and of these the best."""
    runs = of_kind(runs, "training")
    summaries = runs["summary"].map(mapping_or_empty)
    runs = runs.assign(
        trained=summaries.map(lambda s: -s["tokens"]), loss=summaries.map(lambda s: s["loss"])
    )
    for _, run in runs.sort_values(["experiment", "trained", "loss"]).iterrows():
        parameters, summary = run["parameters"], mapping_or_empty(run["summary"])
        config = mapping_or_empty(parameters.get("config"))
        is_scan = config.get("model_type") == "scanlm"
        found = changes(str(run["model"]), parameters)
        changed = [
            change_text(*change)
            for change in found.items()
            if not (is_scan and change[0] == "chunk_size")  # which has a column
        ]
        yield {
            "model": str(run["model"]),
            "chunk": str(config.get("chunk_size", "")) if is_scan else "",
            "with": ", ".join(changed),
            "parameters": number(summary.get("num_parameters", 0) / 1e6, 1) + " M",
            "corpus": f"`{parameters['corpus']}`",
            "steps": f"{summary['steps']:,}",
            "tokens": number(summary["tokens"] / 1e6, 1) + " M",
            "lr": f"{parameters['lr']:g}" if "lr" in parameters else "",
            "seed": str(run["seed"]),
            "loss": number(summary["loss"], 3),
            "unigram": number(summary.get("unigram_entropy"), 3),
            "perplexity": number(summary["perplexity"]),
            "bits/byte": number(summary.get("bits_per_byte"), 3),
            "tokens/s": number(summary.get("tokens_per_second"), 0),
            "minutes": number(summary.get("wall_seconds", math.nan) / 60, 1),
            "GB": number((summary.get("peak_memory_bytes") or math.nan) / 1e9, 1),
            "source": run["source"],
        }


def _evaluation(runs: pd.DataFrame) -> Iterable[Row]:
    for _, run in of_kind(runs, "evaluation").iterrows():
        parameters, summary = run["parameters"], mapping_or_empty(run["summary"])
        context = str(parameters["context"])
        if context == "sliding":
            context += f", stride {parameters['stride']}"
        yield {
            "model": str(run["model"]),
            "step": f"{summary['step']:,}" if "step" in summary else "",
            "corpus": f"`{parameters['corpus']}`",
            "split": str(parameters["split"]),
            "context": f"{context}, {parameters['seq_len']} tokens",
            "loss": number(summary["loss"], 3),
            "perplexity": number(summary["perplexity"]),
            "per word": number(summary.get("word_perplexity")),
            "bits/byte": number(summary.get("bits_per_byte"), 3),
            "scored": f"{summary['num_tokens']:,}",
            "source": run["source"],
        }


def _state_tracking(runs: pd.DataFrame) -> Iterable[Row]:
    from scanlm.plotting.state_records import sort_runs
    from scanlm.plotting.state_tracking import evaluated

    runs = _of(runs, "s5")
    if runs.empty:
        return
    runs = sort_runs(runs)
    runs = runs[runs["role"] != "search"]
    if runs.empty:
        return
    try:
        rows = evaluated(read_metrics(*runs["path"]))
    except ScanLMError:  # of runs that were all trained without a test
        return
    accuracy = rows.pivot_table(index="run_id", columns="length", values="value")
    for _, run in runs.sort_values(
        ["role", "series", "seed"], ascending=[False, True, True]
    ).iterrows():
        last = run["parameters"]["stages"][-1]
        found = accuracy.reindex([run["run_id"]]).iloc[0]
        yield {
            "model": str(run["series"]),
            "seed": str(run["seed"]),
            "parameters": number(mapping_or_empty(run["summary"]).get("parameters", 0) / 1e6, 1)
            + " M",
            "steps": number(mapping_or_empty(run["summary"]).get("steps"), 0),
            "trained to": f"{last['length']}, dropout {last['dropout']:g}",
            **{f"right at {n:,}": percent(found[n]) for n in LENGTHS if n in found},
            "reach": f"{run['reach']:,}",
            "source": run["source"],
        }


def _ended_at(stage: Mapping[str, Any]) -> str:
    """The accuracy that a stage's threshold was compared with, and of what if not of positions."""
    if "sequence" in stage:
        return f"{percent(stage['sequence'])} of words"
    return percent(stage["worst_position"])


def _searched(runs: pd.DataFrame, whole: bool) -> pd.DataFrame:
    """Runs of comparison models that another set of their family surpassed.

    Args:
        runs: all.
        whole: those trained to the length of the models that are compared, or shorter ones.
    """
    from scanlm.plotting.state_records import sort_runs

    runs = sort_runs(_of(runs, "s5"))
    if runs.empty:
        return runs
    compared = runs.loc[runs["role"] == "recipe", "trained"].max()
    runs = runs[(runs["role"] == "search") & ((runs["trained"] >= compared) == whole)]
    return runs.sort_values(["series", "started", "seed"])


def _state_tracking_search(runs: pd.DataFrame) -> Iterable[Row]:
    for _, run in _searched(runs, whole=False).iterrows():
        stages = run["summary"]["stages"]
        yield {
            "model": str(run["series"]),
            "learning rate": _rates(run["parameters"]["stages"]),
            **{
                f"length {stage['length']}": f"{stage['steps']:,} steps, {_ended_at(stage)}"
                for stage in stages
            },
            "M tokens": number(run["summary"]["tokens"] / 1e6, 1),
            "source": run["source"],
        }


def _rates(stages: Sequence[Mapping[str, Any]]) -> str:
    """Learning rates of a curriculum: the first, and each other one with where it begins."""
    first, *later = (next(equal) for _, equal in groupby(stages, key=itemgetter("lr")))
    others = (f"{stage['lr']:g} from length {stage['length']} on" for stage in later)
    return ", ".join([f"{first['lr']:g}", *others])


def _state_tracking_rates(runs: pd.DataFrame) -> Iterable[Row]:
    for _, run in _searched(runs, whole=True).iterrows():
        stages = run["parameters"]["stages"]
        yield {
            "model": str(run["series"]),
            "seed": str(run["seed"]),
            "learning rate": _rates(stages),
            "trained to": str(stages[-1]["length"]),
            "M tokens": number(run["summary"]["tokens"] / 1e6, 1),
            "reach": f"{run['reach']:,}",
            "source": run["source"],
        }


def _state_tracking_others(runs: pd.DataFrame) -> Iterable[Row]:
    from scanlm.plotting.state_tracking import run_label

    for _, run in runs.sort_values(["experiment", "started"]).iterrows():
        parameters = mapping_or_empty(run["parameters"])
        if run["experiment"] == "s5" or not {"group", "stages"} <= set(parameters):
            continue
        summary = mapping_or_empty(run["summary"])
        reach = mapping_or_empty(summary.get("reach"))
        yield {
            "group": str(parameters["group"]),
            "model": run_label(str(run["model"]), parameters),
            "seed": str(run["seed"]),
            "parameters": number(summary.get("parameters"), 0),
            "steps": number(summary.get("steps"), 0),
            "trained to": str(parameters["stages"][-1]["length"]),
            "reach": ", ".join(f"{length:,} ({dtype})" for dtype, length in reach.items()),
            "source": run["source"],
        }


def _training_speed(runs: pd.DataFrame) -> Iterable[Row]:
    keys = ["part", "model", "mode", "compiled", "chunk", "length", "batch_size", "dtype"]
    for _, run in _of(runs, "training_speed").sort_values("started").iterrows():
        metrics = read_metrics(run["path"])
        if "tokens_per_second" not in set(metrics["name"]):
            continue
        metrics = metrics[metrics["part"].isin(("step", "trainer"))]
        if "peak" in metrics:  # utilisation is also told against a data sheet's peak
            metrics = metrics[metrics["peak"].isna() | (metrics["peak"] == "measured")]
        chunks = metrics.reindex(columns=["chunk_size"])["chunk_size"]
        metrics = metrics.assign(chunk=[number(size, 0) for size in chunks])
        table = metrics.pivot_table(index=keys, columns="name", values="value", sort=False)
        again = mapping_or_empty(run["parameters"]).get("checkpointing")
        for _, row in table.reset_index().iterrows():
            how = [row["mode"], COMPILED[row["compiled"]], row["dtype"]]
            if again:
                how.append("activations computed again")
            if row["part"] == "trainer":
                how.append("in the trainer")
            if row.get("tokens_per_second", 0) > 0:
                yield {
                    "model": row["model"],
                    "chunk": row["chunk"],
                    "run as": ", ".join(map(str, how)),
                    "batch": f"{row['batch_size']:,.0f} x {row['length']:,.0f}",
                    "tokens/s": number(row["tokens_per_second"], 0),
                    "utilisation": number(
                        100 * row.get("model_flops_utilisation", math.nan), 1, " %"
                    ),
                    "memory": number(row.get("peak_memory_bytes", math.nan) / 1e9, 1, " GB"),
                    "source": run["source"],
                }


def _inference(runs: pd.DataFrame) -> Iterable[Row]:
    for _, run in at_positions(_of(runs, "inference")).sort_values("model").iterrows():
        metrics = read_metrics(run["path"])
        steady = metrics[metrics["part"] == "positions"]
        table = steady.pivot_table(
            index="model", columns=["name", "position"], values="value", sort=False
        )
        positions = sorted(steady["position"].unique())
        for model, row in table.iterrows():
            last = {
                name: row.get((name, positions[-1])) for name in ("prefill_seconds", "state_bytes")
            }
            yield {
                "size": str(run["model"]),
                "model": str(model),
                **{
                    f"at {p:,.0f}": number(row.get(("ms_per_token", p)), 3, " ms")
                    for p in positions
                },
                "prompt": number(last["prefill_seconds"], 3, " s"),
                "state": number((last["state_bytes"] or math.nan) / 1e6, 1, " MB"),
                "source": run["source"],
            }


def _inference_ratios(runs: pd.DataFrame) -> Iterable[Row]:
    from scanlm.benchmark.ratios import AIMS, inference_ratios

    runs = at_positions(_of(runs, "inference")).sort_values("model")
    found = {
        str(run["model"]): inference_ratios(read_metrics(run["path"]), run["parameters"])
        for _, run in runs.iterrows()
    }
    for name, aim in AIMS.items() if found else ():
        yield {
            "the scan model": name,
            "aimed at": aim,
            **{f"{size} size": number(ratios[name]) for size, ratios in found.items()},
        }


def _state_tracking_speed(runs: pd.DataFrame) -> Iterable[Row]:
    for _, run in _of(runs, "state_tracking_speed").iterrows():
        rates = read_metrics(run["path"])
        rates = rates[rates["name"] == "steps_per_second"]
        table = rates.pivot_table(
            index=["precision", "length", "way"], columns="runs", values="value", sort=False
        )
        for _, row in table.reset_index().iterrows():
            yield {
                "length": f"{row['length']:,.0f}",
                "way": str(row["way"]),
                "precision": str(row["precision"]),
                **{f"{n:.0f} side by side": number(row[n], 0) for n in sorted(table.columns)},
                "source": run["source"],
            }


def _by_name(metrics: pd.DataFrame) -> dict[str, float]:
    return dict(zip(metrics["name"], metrics["value"], strict=True))


def _parity(runs: pd.DataFrame) -> Iterable[Row]:
    from scanlm.parity import agrees

    for _, run in _of(runs[runs["status"] == "finished"], "parity").iterrows():
        errors = read_metrics(run["path"]).reindex(
            columns=["name", "value", "model", "dtype", "implementation", "kernel", "variant"]
        )
        for (model, dtype), rows in errors.groupby(["model", "dtype"], sort=False):
            plain, fused = (
                rows[(rows["implementation"] == who) & rows["variant"].isna()]
                for who in ("torch", "fused")
            )
            own, found = _by_name(plain), _by_name(fused)
            variants = [_by_name(part) for _, part in rows.groupby(["kernel", "variant"])]
            wrong = [found for found in variants if not agrees(found, own, str(dtype))]
            yield {
                "model": str(model),
                "precision": str(dtype),
                **{
                    f"{what}, {who}": number(values.get(f"{what}_relative_error"), 4)
                    for what in ("logits", "streamed", "gradient")
                    for who, values in (("fused", found), ("plain", own))
                },
                "variants": f"{len(variants)}, {len(wrong)} wrong" if variants else "",
                "agree": "yes" if agrees(found, own, str(dtype)) and not wrong else "no",
                "source": run["source"],
            }


TABLES = (
    Table(
        "Training runs",
        "Loss in nats per token on the validation split, every token scored; beside it the entropy "
        "of a unigram model of the same text. Steps and tokens say how far a run went: none of "
        "these is the paper's training unless it has the paper's steps and corpus. Minutes are all "
        "of a run: compilation and validation too; GB is the most memory it held: with the "
        "smaller models that was validation, which now holds the logits of fewer blocks at a time. "
        "What a step takes is under Training speed.",
        _training,
    ),
    Table(
        "Evaluations",
        "Perplexity per token depends on the tokenizer; per word and bits per byte do not. What a "
        "model was trained on is in the table above, under its run.",
        _evaluation,
    ),
    Table(
        "State tracking on S5",
        "Share of all positions answered right in new words of some lengths, in float32 (of a run "
        "measured in bfloat16 alone, in that); the "
        "reach is the greatest length tested at which 99 % are. 10,000 words of each length up to "
        "1,024, and 500 longer ones.",
        _state_tracking,
    ),
    Table(
        "State tracking on S5: the search for the comparison models",
        "One seed each, stages up to length 4. A stage ends when its worst position is right on "
        "98 % of new words, or after 1,500, 1,500 and 500 steps (2,500 where 4 comes first): the "
        "steps it took and what the worst position then had. The rate and the first length that "
        "got through on the fewest tokens, or got furthest, are those of the table above.",
        _state_tracking_search,
    ),
    Table(
        "State tracking on S5: other whole curricula of comparison models",
        "At other rates or with other aids (generators, dropout). As many tokens as the models "
        "that are compared, which are the set of their family with the most seeds and then the "
        "greatest reach.",
        _state_tracking_rates,
    ),
    Table(
        "State tracking on other groups",
        "The reach is the greatest length tested at which 99 % of all positions are right; 0 if "
        "there is none.",
        _state_tracking_others,
    ),
    Table(
        "Time for a token",
        "Batch 1, bfloat16 where the model's name does not say otherwise: median time of one "
        "generated token after prompts of four lengths; then the time to read the longest of these "
        "prompts, and the memory of the state behind it. `scanlm.benchmark.subjects` says what "
        "each model is.",
        _inference,
    ),
    Table(
        "Time for a token: what was aimed at",
        "Ratios within one record of the table above. Of several ways to run GPT-2 the fastest is "
        "taken each time. What the state holds depends on the binary digits of the number of "
        "chunks; compared is the most it holds up to a position.",
        _inference_ratios,
    ),
    Table(
        "Training speed",
        "Median step: forward, backward and AdamW. Utilisation is against the speed of a large "
        "product on the same machine.",
        _training_speed,
    ),
    Table(
        "Training speed of state tracking",
        "Optimiser steps a second, summed up over runs side by side on one GPU, of the scan model "
        "of the S5 runs. Eager: every kernel started from the host; captured: a step is one CUDA "
        "graph; compiled: and its parts are fused.",
        _state_tracking_speed,
    ),
    Table(
        "Fused kernels against plain torch",
        "Relative errors against plain torch in float64 of the fused kernels and, to compare, of "
        "plain torch in the same precision. The kernels' products are at most TF32: there is "
        "nothing to compare in strict float32. Variants: how many configurations of the tuned "
        "kernels were looked at one at a time, and how many of them do not agree.",
        _parity,
    ),
)
