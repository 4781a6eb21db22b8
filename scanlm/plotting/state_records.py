"""Which recorded state-tracking runs belong together, and what was probed in them.

Runs that differ in the seed only are a *set*. The recipe is the scan model's set with most seeds
and then the greatest reach; every other set of the scan model is an ablation, named by what differs
from the recipe. A baseline is, of each model and configuration, the set with most seeds and then
the greatest reach among those trained on words as long as the recipe's; the others are a search.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scanlm.errors import ScanLMError
from scanlm.plotting.state_tracking import run_label

if TYPE_CHECKING:
    import pandas as pd

# state_noise was of the whole run before it was of a stage; no record has it there
IGNORED = ("eval_", "compile_from_length", "log_every", "validation_sequences", "state_noise")
STAGE_FIELDS = ("length", "lr", "dropout", "state_noise", "batch_size", "threshold")


def _training(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the trained weights, flat: ``config.x``, and the stages' columns."""
    flat: dict[str, Any] = {}
    for name, value in parameters.items():
        if name == "config":
            flat |= {f"config.{k}": v for k, v in (value or {}).items()}
        elif name == "stages":
            for field in STAGE_FIELDS:
                flat[f"stages.{field}"] = [stage.get(field) or 0 for stage in value]
            # where a threshold ends a stage, its budget is only a limit
            flat["stages.max_steps"] = [
                0 if stage.get("threshold") else stage.get("max_steps") for stage in value
            ]
        elif not name.startswith(IGNORED):
            flat[name] = value
    return flat


def _text(name: str, value: Any) -> str:
    field = name.rpartition(".")[2]
    if name == "stages.length":
        return f"lengths {value[0]} to {value[-1]}"
    if name in ("stages.dropout", "stages.state_noise"):
        what = field.replace("_", " ")
        used = sorted({v for v in value if v})
        where = "all stages" if len(used) == 1 and all(value) else "late"
        return f"{what} {used[-1]:g}, {where}" if used else f"no {what}"
    if name == "stages.lr":
        return f"last lr {value[-1]:g}"
    if name == "stages.max_steps":
        return f"last stage {value[-1]:,} steps"
    if isinstance(value, bool):
        return f"{field}" if value else f"no {field}"
    return f"{field} {value}"


def difference(recipe: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What a run does unlike the recipe, in a few words."""
    a, b = _training(recipe), _training(other)
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    if "stages.length" in names:  # other stages have other columns throughout
        names = [n for n in names if not n.startswith("stages.") or n == "stages.length"]
    if "stories" in names and b.get("stories"):
        return "the original's setting"
    return "; ".join(_text(name, b.get(name)) for name in names[:3])


def sort_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs with the columns ``role`` and ``series``.

    Roles are "recipe", "baseline", "ablation" and "search".
    """
    runs = runs[runs["status"] == "finished"]
    if runs.empty:
        return runs.assign(role="", series="")
    keys = [
        repr((run["model"], sorted(_training(run["parameters"]).items(), key=str)))
        for _, run in runs.iterrows()
    ]
    # for baselines: the model with its configuration, whatever the rates
    kinds = [run_label(run["model"], run["parameters"]) for _, run in runs.iterrows()]
    reach = [max((r or {"": 0}).values(), default=0) for r in runs["summary.reach"]]
    trained = [p["stages"][-1]["length"] for p in runs["parameters"]]
    runs = runs.assign(key=keys, series=kinds, reach=reach, trained=trained, role="")
    sets = runs.groupby("key").agg(
        model=("model", "first"),
        series=("series", "first"),
        trained=("trained", "first"),
        seeds=("seed", "nunique"),
        reach=("reach", "median"),
    )
    sets = sets.sort_values(["seeds", "reach"], ascending=False)
    scan = sets["model"] == "scan"
    recipe = next(iter(sets.index[scan]), None)
    roles = scan.map({True: "ablation", False: "search"})
    least = 0 if recipe is None else sets.loc[recipe, "trained"]
    for _, group in sets[~scan & (sets["trained"] >= least)].groupby("series"):
        roles[group.index[0]] = "baseline"
    if recipe is not None:
        roles[recipe] = "recipe"
    runs = runs.assign(role=runs["key"].map(roles))
    if recipe is not None:
        base = runs.loc[runs["key"] == recipe, "parameters"].iloc[0]
        other = runs["role"] == "ablation"
        named = [difference(base, p) for p in runs.loc[other, "parameters"]]
        runs.loc[other, "series"] = named
    return runs


def recorded_states(metrics: pd.DataFrame) -> pd.DataFrame:
    """What ``state_probe.probe_metrics`` recorded by depth, as ``state_probe.by_depth`` has it.

    Returns:
        A row a run and depth: ``run_id``, ``depth`` and the columns of ``by_depth``.

    Raises:
        ScanLMError: runs that were not probed.
    """
    rows = _probed(metrics, "depth")
    table = rows.pivot_table(index=["run_id", "depth"], columns="name", values="value")
    return table.rename(columns=lambda name: name.removeprefix("state_")).reset_index()


def recorded_gains(metrics: pd.DataFrame) -> pd.DataFrame:
    """What it recorded by size of the noise: a row a run and size, ``size`` and ``gain``.

    Raises:
        ScanLMError: runs that were not probed.
    """
    return _probed(metrics, "size").rename(columns={"value": "gain"})[["run_id", "size", "gain"]]


def _probed(metrics: pd.DataFrame, axis: str) -> pd.DataFrame:
    if axis not in metrics:
        raise ScanLMError("the prefix states of these runs were not probed: eval_probe_length")
    return metrics[metrics["name"].str.startswith("state_") & metrics[axis].notna()]
