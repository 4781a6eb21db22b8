"""The committed pictures: each has a name, is made from records or from pure computation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from scanlm import trees
from scanlm.errors import ScanLMError, check_name
from scanlm.plotting import (
    comparison,
    cost,
    inference,
    scan,
    speed,
    state_records,
    state_tracking,
    training,
)
from scanlm.plotting.architecture import architecture
from scanlm.plotting.representations import representation_shares
from scanlm.plotting.style import family_of, style
from scanlm.records import of_kind, rows_at
from scanlm.variations import change_text, changes

logger = logging.getLogger(__name__)

SMALL = "enwiki2019_small"  # the study of smaller models with seeds
HOW_TO_RECORD = "make them with their command in data/README.md, then scanlm export"


class NoRecords(Exception):
    """A figure's records are not there (yet)."""


@dataclass(frozen=True)
class Records:
    """Exported records, read when a figure asks for them."""

    folder: Path

    def runs(self, experiment: str) -> pd.DataFrame:
        """One experiment's runs, see ``records.read_runs``.

        Raises:
            NoRecords: there are none.
        """
        from scanlm import records

        files = records.exported(self.folder, experiment)
        if not files:
            raise NoRecords(f"no records in {self.folder / experiment}")
        stats = [file.stat() for file in files]
        stamps = [(str(f), s.st_mtime_ns, s.st_size) for f, s in zip(files, stats, strict=True)]
        return _read_runs(tuple(stamps)).copy()

    def metrics(
        self, experiment: str, runs: pd.DataFrame | None = None
    ) -> tuple[pd.DataFrame, str]:
        """Metrics of one experiment's runs, or of some of them, and the caption naming them.

        Raises:
            NoRecords: there are none.
        """
        from scanlm import records

        runs = self.runs(experiment) if runs is None else runs
        return records.read_metrics(*runs["path"]), source(runs)


@lru_cache(maxsize=4)
def _read_runs(stamps: tuple[tuple[str, int, int], ...]) -> pd.DataFrame:
    """Runs of files as they were at a time: a notebook draws many figures from the same ones."""
    from scanlm import records

    return records.read_runs(*(path for path, _, _ in stamps))


def unscanned(runs: pd.DataFrame) -> pd.Series:
    """Which runs are scan models that never call T1: two chunks need no node of a tree."""
    config = runs["parameters"].map(lambda p: p.get("config") or {})
    chunk = config.map(lambda c: c["chunk_size"] if c.get("model_type") == "scanlm" else 0)
    return runs["parameters"].map(lambda p: p.get("seq_len") or math.inf) <= 2 * chunk


def source(runs: pd.DataFrame) -> str:
    """One caption for all runs of a figure: the line of the first, and how many more there are.

    It says on what other devices these ran, and which must not be taken for a scan.
    """
    from scanlm import records

    more = len(runs) - 1
    line = str(records.source_line(runs.iloc[0]))
    line += f"; and {more} more run{'s' if more > 1 else ''}" if more else ""
    devices = [(device or {}).get("name") for device in runs["device"]]
    for other in sorted({str(name) for name in devices[1:] if name not in (None, devices[0])}):
        there = runs["model"][[name == other for name in devices]]
        models = ", ".join(there) if len(there) < 3 else str(len(there))
        line += f"; {models} on {other}"
    names = sorted(set(runs.loc[unscanned(runs), "model"]))
    note = f"; {', '.join(names)}: at most two chunks a sequence, so T1 is never called"
    return line + (note if names else "")


def _loss(experiment: str) -> Callable[[Records], Figure]:
    def make(records: Records) -> Figure:
        runs = of_kind(records.runs(experiment), "training")
        if runs.empty:
            raise NoRecords(f"no finished training among the records of {experiment}")
        metrics, caption = records.metrics(experiment, runs)
        by = (
            "chunk_size"
            if metrics["model"].nunique() == 1 and _several_chunks(metrics)
            else "model"
        )
        return training.loss_curves(metrics, split=None, by=by, source=caption)

    return make


def _several_chunks(metrics: pd.DataFrame) -> bool:
    return "chunk_size" in metrics and metrics["chunk_size"].nunique() > 1


def _alike(
    runs: pd.DataFrame, condition: Callable[[pd.Series], object], differ: str
) -> pd.DataFrame:
    """A set of runs that are equal in ``condition`` and many in the column ``differ``.

    Different amounts of training or batches would be compared as if ``differ`` had made the
    difference. Of several sets the one with most training in all is taken.

    Raises:
        NoRecords: no two runs differ in nothing else.
    """
    if runs.empty:
        raise NoRecords("there are no runs to compare")
    runs = runs.assign(condition=runs.apply(lambda run: repr(condition(run)), axis=1))
    sets = runs.groupby("condition").agg(
        members=(differ, "nunique"), tokens=("summary.tokens", "max")
    )
    sets = sets[sets["members"] >= 2]
    if sets.empty:
        raise NoRecords(f"no two runs differ in {differ.replace('_', ' ')} and in nothing else")
    best = (sets["members"] * sets["tokens"]).idxmax()
    return runs[runs["condition"] == best]


def _training_tokens(run: pd.Series) -> dict[str, Any]:
    """What makes the tokens of two runs the same tokens in the same order."""
    names = ("corpus", "corpus_fingerprint", "tokenizer_hash", "seq_len", "batch_size", "steps")
    return {name: run["parameters"].get(name) for name in names}


def _chunk_sizes(records: Records) -> Figure:
    def is_scan(parameters: Any) -> bool:
        return (parameters.get("config") or {}).get("model_type") == "scanlm"

    def condition(run: pd.Series) -> object:
        left = ("chunk_size", "train_mode", "n_positions")
        config = {k: v for k, v in run["parameters"]["config"].items() if k not in left}
        names = ("lr", "precision", "compile")
        same = {name: run["parameters"].get(name) for name in names}
        device = (run.get("device") or {}).get("name")
        return sorted((_training_tokens(run) | same | config).items(), key=str), device

    runs = of_kind(records.runs("enwiki2019"), "training")
    runs = runs[runs["parameters"].map(is_scan)]
    sizes = runs["parameters"].map(lambda p: p["config"]["chunk_size"])
    runs = _alike(runs.assign(chunk_size=sizes), condition, "chunk_size")
    metrics, caption = records.metrics("enwiki2019", runs)
    return training.chunk_size_comparison(metrics, source=caption)


def compared_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs of different models on the same tokens in the same order, each at its best lr.

    Args:
        runs: of one experiment, as ``records.read_runs`` has them.

    Raises:
        NoRecords: there are none.
    """
    runs = _alike(of_kind(runs, "training"), _training_tokens, "model")
    runs = runs.assign(lr=runs["parameters"].map(lambda p: p.get("lr")))
    means = runs.groupby(["model", "lr"], dropna=False)["summary.loss"].mean().reset_index()
    best = means.loc[means.groupby("model")["summary.loss"].idxmin(), ["model", "lr"]]
    return runs.merge(best, on=["model", "lr"])


def _compared(records: Records, experiment: str) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Runs of different models on the same tokens, their metrics and the caption.

    Where the shapes of registry entries were changed, which their ids would not tell, models are
    called by their families, and the caption says how large they are.
    """
    runs = compared_runs(records.runs(experiment))
    metrics, caption = records.metrics(experiment, runs)
    families = runs["model"].map(family_of)
    if experiment == SMALL and families.notna().all():
        if families.nunique() == runs["model"].nunique():
            runs = runs.assign(model=families)
            metrics = metrics.assign(model=metrics["model"].map(family_of))
        sizes = runs["summary.num_parameters"] / 1e6
        caption += f"; models of {sizes.min():.1f} to {sizes.max():.1f} million parameters"
    return runs, metrics, caption


def _comparison(
    draw: Callable[..., Figure], experiment: str = "enwiki2019"
) -> Callable[[Records], Figure]:
    def make(records: Records) -> Figure:
        _, metrics, caption = _compared(records, experiment)
        return draw(metrics, source=caption)

    return make


def _text_ablations(records: Records) -> Figure:
    """Runs of one model that differ in one thing each, and equal ones with another seed."""
    runs = _alike(
        of_kind(records.runs("enwiki2019_ablations"), "training"),
        lambda run: (run["model"], run["parameters"].get("lr"), _training_tokens(run)),
        "run_id",
    )
    metrics, caption = records.metrics("enwiki2019_ablations", runs)
    names = {
        run["run_id"]: "; ".join(
            change_text(*change) for change in changes(run["model"], run["parameters"]).items()
        )
        for _, run in runs.iterrows()
    }
    named = metrics["run_id"].map(names)
    return comparison.final_values(
        metrics.assign(model=named.where(named != "", metrics["model"])), source=caption
    )


def _differences(experiment: str) -> Callable[[Records], Figure]:
    """Loss by position against the smallest GPT-2, so that what the text does to all cancels."""

    def make(records: Records) -> Figure:
        runs, metrics, caption = _compared(records, experiment)
        gpt2 = runs[runs["model"].map(family_of) == "gpt2"].sort_values("summary.num_parameters")
        reference = (gpt2 if len(gpt2) else runs)["model"].iloc[0]
        sizes = runs["parameters"].map(lambda p: (p.get("config") or {}).get("chunk_size"))
        size = int(sizes.max()) if sizes.nunique() == 1 else None
        return comparison.position_differences(metrics, reference, size, window=16, source=caption)

    return make


def _scored_texts(records: Records) -> Figure:
    """The compared models on every test text that they were scored on in blocks."""
    compared = set(compared_runs(records.runs("enwiki2019"))["run_id"])

    def fits(parameters: dict[str, Any]) -> bool:
        how = (parameters["split"], parameters["context"])
        # parts of a text, other positions or another chunk size than the trained one
        other = ("max_tokens", "original_positions", "chunk_size")
        whole = not any(parameters.get(name) for name in other)
        return parameters["target"] in compared and how == ("test", "blocks") and whole

    runs = pd.concat([records.runs(name) for name in ("enwiki2019", "wikitext103")])
    runs = of_kind(runs, "evaluation")
    runs = runs[runs["parameters"].map(fits).astype(bool)]
    if runs.empty:
        raise NoRecords("no compared model was scored on a test text")
    # of a run scored twice on a text (at another step or precision) the last
    runs = runs.sort_values("started", kind="stable")
    texts = runs["parameters"].map(lambda p: (p["target"], p["corpus"]))
    runs = runs[~texts.duplicated(keep="last")]
    return comparison.scored_texts(runs, source=source(runs))


def _speed(draw: Callable[..., Figure], **axes: Any) -> Callable[[Records], Figure]:
    """Of the run with most models, and of several the newest, that has what the figure needs.

    Args:
        draw: makes the figure of a run's metrics, or raises a ``ScanLMError``.
        axes: only what was measured at these.
    """

    def make(records: Records) -> Figure:
        runs = records.runs("training_speed").sort_values("started", ascending=False)
        found = []
        for place in range(len(runs)):
            metrics, caption = records.metrics("training_speed", runs.iloc[place : place + 1])
            found.append((rows_at(metrics, **axes), caption))
        for metrics, caption in sorted(found, key=lambda it: -it[0]["model"].nunique()):
            try:
                return draw(metrics, source=caption)
            except ScanLMError:
                continue
        raise NoRecords("no run of training_speed has these measurements")

    return make


def _modes_by_length(metrics: pd.DataFrame, source: str) -> Figure:
    """The scan level by level and node by node.

    Raises:
        ScanLMError: one of the two was not measured at several lengths.
    """
    if "mode" not in metrics or "sequential" not in set(metrics["mode"]):
        raise ScanLMError("the records have no train_mode sequential")
    title = "One tree, level by level and node by node (sequential)"
    return speed.by_length(metrics, source=source, title=title)


def _small_models() -> tuple[Any, Any, Any]:
    """A small TransformerScanModel, a GPT-2 of its width, both untrained, and random tokens."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from scanlm.model import ScanLMConfig, ScanLMForCausalLM

    shape: dict[str, Any] = {"vocab_size": 256, "n_positions": 4096, "n_embd": 64, "n_head": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ScanLMForCausalLM(ScanLMConfig(**shape, chunk_size=8, t1_layers=1, t2_layers=2))
        gpt2 = GPT2LMHeadModel(GPT2Config(**shape, n_layer=2, bos_token_id=None, eos_token_id=None))
        return model.eval().requires_grad_(False), gpt2, torch.randint(256, (1, 256))


def _bracketing_gaps(_: Records) -> Figure:
    import torch

    model, _gpt2, tokens = _small_models()
    leaves = model.embed(tokens)[0].unflatten(0, (-1, model.config.chunk_size))
    matrices = torch.randn(len(leaves), 8, 8, generator=torch.Generator().manual_seed(0)) / 8**0.5
    lengths = range(3, len(leaves) + 1)
    rows = trees.bracketing_gaps(torch.add, leaves, lengths, "addition")
    rows += trees.bracketing_gaps(torch.matmul, matrices, lengths, "matrix product")
    rows += trees.bracketing_gaps(model.aggregate, leaves, lengths, "T1")
    return scan.bracketing_gaps(pd.DataFrame(rows))


def _influence(_: Records) -> Figure:
    from scanlm.influence import influence

    model, gpt2, tokens = _small_models()
    maps = {
        "TransformerScanModel": influence(model, tokens[:, :64]),
        "GPT-2": influence(gpt2, tokens[:, :64]),
    }
    return scan.influence_map(maps, model.config.chunk_size)


def _cost_by_chunk_size(_: Records) -> Figure:
    """The arithmetic of the paper-scale model: from the shapes, so without records."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from scanlm.flops import training_flops
    from scanlm.model import ScanLMConfig, ScanLMForCausalLM

    rows = {}
    with torch.device("meta"):
        for c in (32, 64, 128, 256, 512):
            model = ScanLMForCausalLM(ScanLMConfig.preset("base", chunk_size=c))
            rows[f"chunk size {c}"] = training_flops(model, 512)
        rows["GPT-2"] = training_flops(GPT2LMHeadModel(GPT2Config()), 512)
    return cost.flops_by_part(pd.DataFrame(rows).T)


def _inference_runs(records: Records, size: str) -> pd.DataFrame:
    """The newest that went along the positions; others look into a batch or chunk size only."""
    runs = records.runs("inference")
    along = runs["parameters"].map(lambda p: bool(p["positions"] or p["max_new_tokens"]))
    runs = runs[(runs["model"] == size) & along]
    if runs.empty:
        raise NoRecords(f"no inference records of size {size}")
    return runs.sort_values("started").iloc[-1:]


def _most_states(runs: pd.DataFrame, positions: Iterable[float]) -> pd.Series:
    """By position, the most that the scan model of the inference benchmark held up to there.

    What it holds at one depends on the binary digits of the number of chunks.
    """
    from scanlm.benchmark.ratios import most_state_bytes

    parameters = runs["parameters"].iloc[0]
    return pd.Series({p: most_state_bytes(parameters, int(p)) for p in positions})


def _state_bytes(records: Records) -> Figure:
    """Of the scan model the most it held up to each position."""
    runs = _inference_runs(records, "base")
    metrics, caption = records.metrics("inference", runs)
    others = ("gpt2_dynamic", "gpt2_tuned")  # keep as much as gpt2_graph
    rows = metrics[(metrics["part"] == "positions") & ~metrics["model"].isin(others)].copy()
    scan = (rows["model"] == "scanlm") & (rows["name"] == "state_bytes")
    held = rows.loc[scan, "position"]
    rows.loc[scan, "value"] = held.map(_most_states(runs, held))
    return cost.state_bytes(rows, source=f"{caption}; scanlm: the most up to each position")


def _inference(draw: Callable[..., Figure], size: str = "base") -> Callable[[Records], Figure]:
    def make(records: Records) -> Figure:
        metrics, caption = records.metrics("inference", _inference_runs(records, size))
        try:
            return draw(metrics, source=f"size {caption}")
        except ScanLMError as reason:  # of a part of the benchmark that was not run
            raise NoRecords(str(reason)) from reason

    return make


def _inference_memory(size: str) -> Callable[[Records], Figure]:
    """With the most that the scan model held at any position, beside what it held at a few."""

    def make(records: Records) -> Figure:
        runs = _inference_runs(records, size)

        def draw(metrics: pd.DataFrame, source: str) -> Figure:
            held = inference.select(metrics, "state_bytes", "positions")["position"]
            between = np.geomspace(held.min(), held.max(), 400).round()
            most = _most_states(runs, np.union1d(between, held))
            return inference.memory(metrics, source=source, most=most)

        return _inference(draw, size)(records)

    return make


# the metrics of some runs, each with its series
Read = Callable[["pd.DataFrame"], "pd.DataFrame"]


def _s5(
    draw: Callable[..., Figure], *needed: str, beside: str | None = None
) -> Callable[[Records], Figure]:
    """A figure of the S5 runs of the roles that it needs, and of another role if there are any;
    see ``state_records``. The lengths shaded are the recipe's."""

    def make(records: Records) -> Figure:
        from scanlm.records import read_metrics

        runs = state_records.sort_runs(records.runs("s5"))
        recipe = runs[runs["role"] == "recipe"]
        chosen = runs[runs["role"].isin((*needed, beside))]
        # the caption is of the first run
        chosen = chosen.sort_values("role", key=lambda role: role != "recipe", kind="stable")
        if recipe.empty or not set(needed) <= set(chosen["role"]):
            raise NoRecords(f"no runs of every role of {', '.join(needed)} in the records of s5")
        trained = int(recipe["trained"].iloc[0])

        def read(runs: pd.DataFrame) -> pd.DataFrame:
            metrics = read_metrics(*runs["path"])
            series = runs.set_index("run_id")["series"]
            return metrics.assign(series=metrics["run_id"].map(series))

        try:
            return draw(read, trained, chosen)
        except ScanLMError as reason:  # of runs recorded without what the figure shows
            raise NoRecords(str(reason)) from reason

    return make


def _s5_reach(_read: Read, _trained: float, runs: pd.DataFrame) -> Figure:
    return state_tracking.reach_points(runs, source=source(runs))


def _s5_error(read: Read, trained: float, runs: pd.DataFrame) -> Figure:
    chance = 1 - 1 / 120
    return state_tracking.error_by_length(read(runs), trained, chance=chance, source=source(runs))


def _s5_positions(read: Read, trained: float, runs: pd.DataFrame) -> Figure:
    return state_tracking.position_heatmap(read(runs), trained, source=source(runs))


def _s5_curriculum(read: Read, _trained: float, runs: pd.DataFrame) -> Figure:
    return state_tracking.curriculum_curves(read(runs).assign(order=120), source=source(runs))


def _s5_depth(read: Read, trained: float, runs: pd.DataFrame) -> Figure:
    tables = {"scan model": state_records.recorded_states(read(runs))}
    return state_tracking.error_by_depth(tables, _deepest(trained), source=source(runs))


def _s5_distance(read: Read, trained: float, runs: pd.DataFrame) -> Figure:
    states = state_records.recorded_states(read(runs))
    return state_tracking.state_distance(states, _deepest(trained), source=source(runs))


def _s5_gain(read: Read, _trained: float, runs: pd.DataFrame) -> Figure:
    return state_tracking.gain(state_records.recorded_gains(read(runs)), source=source(runs))


def _s5_representations(read: Read, _trained: float, runs: pd.DataFrame) -> Figure:
    """Of the recipe and of what has as many seeds: which representation is learned is chance."""
    seeds = runs.groupby("series")["seed"].transform("nunique")
    many = runs[seeds == seeds.max()]
    table = state_records.recorded_shares(read(many))
    table = table.join(many.set_index("run_id")[["seed", "reach"]], on="run_id")
    return representation_shares(table, source=source(many))


def _deepest(length: float) -> int:
    """The deepest tree behind any position of a word, at one token a chunk."""
    from scanlm.state_probe import depth_at

    return max(depth_at(i) for i in range(1, int(length) + 1))


FIGURES: dict[str, Callable[[Records], Figure]] = {
    "architecture": lambda _: architecture(),
    "scan_tree": lambda _: scan.tree(trees.scan_trace(8)),
    "scan_steps": lambda _: scan.tree_steps(trees.scan_trace(8)),
    "binary_counter": lambda _: scan.counter(trees.counter_trace(8)),
    "work_and_depth": lambda _: scan.work_and_depth(
        pd.DataFrame(trees.scan_costs([*range(1, 64), *range(64, 1025, 16)]))
    ),
    "bracketing_gaps": _bracketing_gaps,
    "influence": _influence,
    "loss_embedded": _loss("embedded"),
    "loss_wikitext103": _loss("wikitext103"),
    "chunk_sizes": _chunk_sizes,
    "cost_by_chunk_size": _cost_by_chunk_size,
    "training_speed": _speed(speed.by_model, batch_size=64, length=512),
    "training_speed_by_length": _speed(speed.by_length),
    "training_modes_by_length": _speed(_modes_by_length, dtype="bfloat16"),
    "training_memory_by_length": _speed(partial(speed.by_length, name="peak_memory_bytes")),
    "training_time_by_kernel": _speed(speed.by_kernel),
    "training_speed_by_chunk_size": _speed(speed.by_chunk_size),
    "reading_the_past": lambda _: comparison.reading_the_past(),
    "comparison": _comparison(partial(comparison.cost_curves, xs=("tokens", "flops", "seconds"))),
    "comparison_final": _comparison(comparison.final_values),
    "comparison_small": _comparison(partial(comparison.cost_curves, xs=("tokens", "flops")), SMALL),
    "comparison_small_final": _comparison(comparison.final_values, SMALL),
    "comparison_positions": _differences("enwiki2019"),
    "comparison_small_positions": _differences(SMALL),
    "text_ablations": _text_ablations,
    "comparison_texts": _scored_texts,
    "state_bytes": _state_bytes,
    "inference_speed": _inference(inference.timeline, "original"),
    "inference_positions_original": _inference(inference.time_by_position, "original"),
    "inference_positions": _inference(inference.time_by_position),
    "inference_memory": _inference_memory("base"),
    "inference_memory_original": _inference_memory("original"),
    "inference_prefill": _inference(inference.prefill),
    "inference_borders": _inference(inference.borders),
    "inference_chunk_sizes": _inference(inference.chunk_sizes),
    "inference_throughput": _inference(inference.throughput),
    "s5_error_by_length": _s5(_s5_error, "recipe", beside="baseline"),
    "s5_reach": _s5(_s5_reach, "recipe", beside="baseline"),
    "s5_positions": _s5(_s5_positions, "recipe", beside="baseline"),
    "s5_curriculum": _s5(_s5_curriculum, "recipe"),
    "s5_depth": _s5(_s5_depth, "recipe"),
    "s5_distance": _s5(_s5_distance, "recipe"),
    "s5_gain": _s5(_s5_gain, "recipe"),
    "s5_representations": _s5(_s5_representations, "recipe", beside="ablation"),
    "s5_ablations": _s5(_s5_reach, "recipe", "ablation"),
    "circuit_depth": lambda _: state_tracking.circuit_depth(),
}


def find_results(results: str | Path = "data/results") -> Path:
    """A relative folder of records, looked for here and in the folders above.

    So a notebook finds the repository's records from its own folder. If there is none, the path
    is returned as it is.
    """
    here = Path.cwd()
    found = (folder / results for folder in (here, *here.parents))
    return next((folder for folder in found if folder.is_dir()), Path(results))


def recorded(name: str, results: str | Path = "data/results") -> Figure | str:
    """A committed picture made from the exported records, for a notebook's cell to show.

    Returns:
        The figure, or a line that says that nothing is recorded yet.

    Raises:
        ScanLMError: an unknown name.
    """
    check_name("figure", name, FIGURES)
    try:
        return FIGURES[name](Records(find_results(results)))
    except NoRecords as reason:
        return f"Nothing is recorded yet for the figure {name!r}: {reason}."


def make_figures(
    results: str | Path = "data/results",
    out: str | Path = "figures",
    names: Iterable[str] | None = None,
) -> Iterator[Path]:
    """Make the committed pictures, one after another.

    Args:
        results: folder of exported records, ``<experiment>/<run_id>.json``.
        out: folder for the PNG files, made if it is missing.
        names: which figures; ``None`` makes all that have records, and a warning names each other.

    Yields:
        Each file once it is written.

    Raises:
        ScanLMError: an unknown name; no folder of records. After all others were made: a figure
            whose records are damaged, or that was named and has none.
    """
    wanted = list(FIGURES) if names is None else list(names)
    for name in wanted:
        check_name("figure", name, FIGURES)
    from scanlm.records import check_results

    check_results(results)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, list[str]] = {}
    for name in wanted:
        try:
            figure = FIGURES[name](Records(Path(results)))
        except NoRecords as reason:
            if names is None:
                logger.warning("figure %s skipped: %s", name, reason)
            else:
                failed.setdefault(f"{reason}; {HOW_TO_RECORD}", []).append(name)
            continue
        except ScanLMError as error:
            failed.setdefault(str(error), []).append(name)
            continue
        path = folder / f"{name}.png"
        with style():
            # without matplotlib's version in it, an unchanged figure stays the same file
            figure.savefig(path, metadata={"Software": None})
        yield path
    if failed:
        reasons = (f"{', '.join(of)} not drawn: {reason}" for reason, of in failed.items())
        raise ScanLMError("; ".join(reasons))
