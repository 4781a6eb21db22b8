"""Which recorded state-tracking runs belong together, and what was probed in them.

Runs that differ in the seed only are a *set*; how a run was evaluated, compiled and validated does
not count. The recipe is the scan model's set with most seeds, then the greatest median and least
reach, then the fewest tokens; every other set of the scan model is an ablation, named by what
differs from the recipe. A baseline is, of each family (of Gated DeltaNet, by the sign of its
eigenvalues), the first such set among those trained on words as long as the recipe's, of equal ones
the one with the fewest aids (generators, dropout), which its label names; the others are a search.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scanlm.errors import ScanLMError
from scanlm.plotting.state_tracking import run_label
from scanlm.variations import WORDS, change_text

if TYPE_CHECKING:
    import pandas as pd

# state_noise was of the whole run before it was of a stage; no record has it there
IGNORED = ("eval_", "compile", "log_every", "validation_sequences", "state_noise")


def _training(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the trained weights, flat: ``config.x``; ``stages.x`` with one value a stage.

    What a record does not say has its default: it was made before the setting was.
    """
    from scanlm.curriculum_settings import Stage, StateTrackingSettings

    flat: dict[str, Any] = {}
    for name, field in StateTrackingSettings.model_fields.items():
        if name not in ("model", "config", "stages", "seed") and not name.startswith(IGNORED):
            value = parameters.get(name, field.default)
            flat[name] = list(value) if isinstance(value, tuple) else value  # as records have it
    flat |= {f"config.{k}": v for k, v in (parameters.get("config") or {}).items()}
    for name, field in Stage.model_fields.items():
        flat[f"stages.{name}"] = [stage.get(name, field.default) for stage in parameters["stages"]]
    return flat


def _stage_text(field: str, values: list[Any], was: list[Any], lengths: list[int]) -> str:
    """What a stage's field is where it is another, and where that is."""
    what = WORDS.get(field, field.replace("_", " "))
    if field == "t1_from_t2":
        return change_text(field, any(values))
    if field in ("dropout", "state_noise", "generators"):
        used = sorted({v for v in values if v})
        if not used:
            return f"no {what}"
        if field == "generators":  # of the first stage
            return f"{what} {used[-1]:g}"
        where = "all stages" if len(used) == 1 and all(values) else "late"
        return f"{what} {used[-1]:g}, {where}"
    changed = {n: v for n, v, w in zip(lengths, values, was, strict=True) if v != w}
    texts = []
    for value in dict.fromkeys(changed.values()):
        of = [n for n, v in changed.items() if v == value]
        number = f"{value:,}" if isinstance(value, int) else str(value)
        text = f"{number} steps" if field == "max_steps" else f"{what} {value}"
        places = "" if len(of) == len(lengths) else f" at {', '.join(map(str, of))}"
        texts.append(text + places)
    return "; ".join(texts)


def difference(recipe: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What a run does unlike the recipe, in a few words.

    Where a threshold ends a stage its steps are only a limit: that another limit was set is not
    told, unless it is all there is to tell.

    Args:
        recipe, other: parameters of runs of the scan model.
    """
    a, b = _training(recipe), _training(other)
    told = [dict(flat) for flat in (a, b)]
    for flat in told:
        limits = zip(flat["stages.max_steps"], flat["stages.threshold"], strict=True)
        flat["stages.max_steps"] = [0 if threshold else steps for steps, threshold in limits]
    return _difference(*told) or _difference(a, b)


def _difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    from scanlm.config import ScanLMConfig

    usual = ScanLMConfig()
    names = []
    for name in {**a, **b}:
        default = getattr(usual, name.removeprefix("config."), None) if "config." in name else None
        a.setdefault(name, default)
        b.setdefault(name, default)
        if a[name] != b[name]:
            names.append(name)
    if "stories" in names and b["stories"]:
        return "the original's setting"
    lengths = b["stages.length"]
    if "stages.length" in names:  # other stages have other columns throughout
        rest = [change_text(n, b[n]) for n in names if not n.startswith("stages.")]
        for field in ("generators", "t1_from_t2"):  # of any stage
            name = f"stages.{field}"
            if any(a[name]) != any(b[name]):
                rest.append(_stage_text(field, b[name], a[name], lengths))
        return "; ".join([f"lengths {lengths[0]} to {lengths[-1]}", *rest])
    return "; ".join(
        _stage_text(name.removeprefix("stages."), b[name], a[name], lengths)
        if name.startswith("stages.")
        else change_text(name, b[name])
        for name in names
    )


def _aided(kind: str, parameters: Mapping[str, Any]) -> str:
    """A baseline's label with what its curriculum has to help it, beside lengths and rates."""
    stages = parameters["stages"]
    lengths = [stage["length"] for stage in stages]
    given = {f: [stage.get(f) for stage in stages] for f in ("generators", "dropout")}
    aids = [_stage_text(f, values, values, lengths) for f, values in given.items() if any(values)]
    return ", ".join([kind, *aids])


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
    aided = [*map(_aided, kinds, runs["parameters"])]
    runs = runs.assign(key=keys, series=kinds, aided=aided, reach=reach, trained=trained, role="")
    runs["tokens"] = runs.get("summary.tokens", 0)
    sets = runs.groupby("key").agg(
        model=("model", "first"),
        series=("series", "first"),
        aided=("aided", "first"),
        trained=("trained", "first"),
        seeds=("seed", "nunique"),
        reach=("reach", "median"),
        least=("reach", "min"),
        tokens=("tokens", "mean"),
    )
    by = ["seeds", "reach", "least", "tokens", "aided"]
    sets = sets.sort_values(by, ascending=[False, False, False, True, True])
    scan = sets["model"] == "scan"
    recipe = next(iter(sets.index[scan]), None)
    roles = scan.map({True: "ablation", False: "search"})
    least = 0 if recipe is None else sets.loc[recipe, "trained"]
    for _, group in sets[~scan & (sets["trained"] >= least)].groupby("series"):
        roles[group.index[0]] = "baseline"
    if recipe is not None:
        roles[recipe] = "recipe"
    runs = runs.assign(role=runs["key"].map(roles))
    of_others = runs["model"] != "scan"
    runs.loc[of_others, "series"] = runs.loc[of_others, "aided"]
    if recipe is not None:
        base = runs.loc[runs["key"] == recipe, "parameters"].iloc[0]
        other = runs["role"] == "ablation"
        named = [difference(base, p) for p in runs.loc[other, "parameters"]]
        runs.loc[other, "series"] = named
        # a few words do not tell everything: sets that share them are told apart by their ids
        shared = runs[other].groupby("series")["key"].transform("nunique") > 1
        for index in shared.index[shared]:
            runs.loc[index, "series"] += f" ({runs.loc[index, 'run_id'].rpartition('-')[2]})"
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


def recorded_shares(metrics: pd.DataFrame) -> pd.DataFrame:
    """What it recorded of the leaves' codes: a row a run and component, ``irrep`` and ``value``.

    Returns:
        With the columns ``run_id`` and, if there is one, ``series``.

    Raises:
        ScanLMError: runs that were not probed.
    """
    rows = _probed(metrics, "irrep", "leaf_irrep")
    return rows[[c for c in ("run_id", "series", "irrep", "value") if c in rows]]


def _probed(metrics: pd.DataFrame, axis: str, name: str = "state_") -> pd.DataFrame:
    if axis not in metrics:
        raise ScanLMError("the prefix states of these runs were not probed: eval_probe_length")
    return metrics[metrics["name"].str.startswith(name) & metrics[axis].notna()]
