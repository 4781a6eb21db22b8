"""Figures of state tracking, tested by what they hold."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex

from scanlm.errors import ScanLMError
from scanlm.groups import get_group
from scanlm.plotting import state_records
from scanlm.plotting import state_tracking as draw
from scanlm.plotting.representations import representation_shares
from scanlm.plotting.style import FAMILIES

LENGTHS = [4, 8, 16, 32, 64]


def evaluations(**models: list[float]) -> pd.DataFrame:
    """Test accuracies of some models by length, two seeds each, in two precisions."""
    rows = []
    for model, values in models.items():
        for seed in (0, 1):
            for dtype, less in (("float32", 0.0), ("bfloat16", 0.05)):
                run = {"run_id": f"{model}{seed}", "series": LABELS[model], "seed": seed}
                run |= {"split": "test", "dtype": dtype, "step": 100}
                for length, value in zip(LENGTHS, values, strict=True):
                    shown = max(value - 0.01 * seed * (value < 1) - less, 0)
                    rows.append({**run, "name": "accuracy", "length": length, "value": shown})
                for position in (1, 2, 3, 8, 64):
                    more = {"length": 64, "position": position, "value": values[0]}
                    rows.append({**run, "name": "accuracy", **more})
    return pd.DataFrame(rows)


LABELS = {"gpt2": "GPT-2", "scan": "scan model"}
METRICS = evaluations(gpt2=[1.0, 0.9, 0.5, 0.3, 0.2], scan=[1.0, 1.0, 1.0, 0.99, 0.9])


def line(ax: Any, label: str) -> Any:
    return next(found for found in ax.lines if str(found.get_label()).startswith(label))


# Labels


@pytest.mark.parametrize(
    ("model", "config", "label"),
    [
        ("scan", {"chunk_size": 1}, "scan model"),
        ("gpt2_tiny", {}, "GPT-2"),
        ("window_gpt2_small", {}, "GPT-2, window"),
        ("gla_170M_baseline", {}, "GLA"),
        ("gated_deltanet_tiny", {}, "Gated DeltaNet"),
        (
            "gated_deltanet_tiny",
            {"allow_neg_eigval": True},
            "Gated DeltaNet, negative eigenvalues",
        ),
        ("mamba2_130M", {}, "Mamba-2"),
        ("mine", {}, "mine"),
    ],
)
def test_labels(model: str, config: dict[str, Any], label: str) -> None:
    assert draw.run_label(model, {"config": config}) == label


def test_series_take_their_familys_color_in_one_order() -> None:
    labels = [*(f.label for f in list(FAMILIES.values())[1:]), "scan model", "chunks of 2"]
    labels += [f"Gated DeltaNet, {sign} eigenvalues" for sign in ("negative", "positive")]
    looks = draw._looks(labels)
    assert looks["scan model"].color == FAMILIES["scanlm"].color
    assert looks["GPT-2, window"] == FAMILIES["window_gpt2"]
    negative, positive = (looks[x] for x in labels[-2:])
    assert negative.color == positive.color == FAMILIES["gated_deltanet"].color
    assert negative.linestyle != positive.linestyle
    assert looks["chunks of 2"].color not in {f.color for f in FAMILIES.values()}


def test_variants_of_a_family_share_its_color_and_differ_in_line_style() -> None:
    series = ["scan model", "scan model, dropout 0", "scan model, dropout 0.02", "GPT-2"]
    looks = draw._looks(series)
    variants = [looks[name] for name in series[:3]]
    assert {look.color for look in variants} == {FAMILIES["scanlm"].color}
    assert len({look.linestyle for look in variants}) == 3
    assert looks["scan model"].linestyle == "-"
    signs = [f"Gated DeltaNet, {sign} eigenvalues" for sign in ("positive", "negative")]
    looks = draw._looks(signs)  # whichever is named first, and without the family's own name
    assert [looks[name].linestyle for name in signs] == ["--", "-"]
    assert len({looks[name].marker for name in signs}) == 2
    assert draw._looks(signs[:1])[signs[0]] == looks[signs[0]]


# Words by hand


def test_a_braid_moves_every_item_as_its_permutation_says() -> None:
    group = get_group("S3")
    swap, cycle = group.elements.index((1, 0, 2)), group.elements.index((1, 2, 0))
    (ax,) = draw.braid(group, [swap, cycle]).axes
    letters = {(x.get_text(), *x.xy) for x in ax.texts if x.get_text() in "abc"}
    # a: place 0 -> 1 -> 2, b: 1 -> 0 -> 1, c: 2 -> 2 -> 0
    after = {("a", 2, 2), ("b", 2, 1), ("c", 2, 0)}
    assert after <= letters
    assert {("a", 1, 1), ("b", 1, 0), ("c", 1, 2)} <= letters
    # places and moves count from 0, as the group's elements do
    assert [x.get_text() for x in ax.texts if len(x.get_text()) == 3] == ["102", "120"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "2"]


def test_a_braid_hides_what_is_not_played_yet() -> None:
    (ax,) = draw.braid(get_group("S3"), [1, 2, 3], shown=1).axes
    assert [t.get_text() for t in ax.texts].count("?") == 2
    assert sum(t.get_text() == "a" for t in ax.texts) == 2


@pytest.mark.parametrize(
    ("group", "word", "shown", "message"),
    [
        ("Z60", [1], None, "Z60 has no items to move"),
        ("S3", [], None, "a word of 0"),
        ("S3", [1, 2], 3, "shown=3 of a word of 2"),
    ],
)
def test_a_braid_refuses(group: str, word: list[int], shown: int | None, message: str) -> None:
    with pytest.raises(ScanLMError, match=message):
        draw.braid(get_group(group), word, shown)


def test_depth_of_a_tree_crosses_a_fixed_network() -> None:
    (ax,) = draw.circuit_depth(length=4096, layers=4).axes
    tree = line(ax, "a tree")
    depth = dict(zip(tree.get_xdata(), tree.get_ydata(), strict=True))
    assert depth[4096] == 12
    assert line(ax, "one after another").get_ydata()[-1] == 4095
    assert set(line(ax, "4 layers").get_ydata()) == {4}


# Length


def test_error_by_length_draws_one_precision_and_the_median_of_seeds() -> None:
    figure = draw.error_by_length(METRICS, trained_length=8, chance=5 / 6)
    ax = figure.axes[0]
    gpt2 = line(ax, "GPT-2 (2 seeds)")
    assert list(gpt2.get_xdata()) == LENGTHS
    assert gpt2.get_ydata()[1] == pytest.approx(0.105)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    words = [t.get_text() for t in ax.texts]
    assert words == ["trained on", "guessing", "none found"]
    assert ax.get_legend_handles_labels()[1][0].startswith("scan model")
    assert ax.get_legend().get_title().get_text() == "strong: median, thin: each seed"
    bf16 = draw.error_by_length(METRICS, dtype="bfloat16").axes[0]
    assert line(bf16, "GPT-2").get_ydata()[1] == pytest.approx(0.155)


def test_a_run_measured_in_another_precision_only_is_drawn_with_that() -> None:
    scan, gpt2 = (METRICS["series"] == name for name in ("scan model", "GPT-2"))
    rows = draw.evaluated(METRICS[scan | (gpt2 & (METRICS["dtype"] == "bfloat16"))])
    assert set(rows[rows["series"] == "scan model"]["dtype"]) == {"float32"}
    assert set(rows[rows["series"] == "GPT-2"]["dtype"]) == {"bfloat16"}


def test_the_legend_says_what_the_band_of_one_seed_is() -> None:
    one = METRICS[(METRICS["run_id"] == "scan0") & (METRICS["value"] < 1)]
    assert draw.error_by_length(one).axes[0].get_legend() is None
    bounds = one.assign(low=one["value"] - 0.01, high=one["value"])
    legend = draw.error_by_length(bounds).axes[0].get_legend()
    assert legend.get_title().get_text() == "band: 95 % interval"
    assert [t.get_text() for t in legend.get_texts()] == ["scan model"]


def test_one_bad_seed_does_not_hide_the_others() -> None:
    seeds = [METRICS[METRICS["run_id"] == "scan0"].assign(run_id=f"s{i}") for i in range(5)]
    seeds[3] = seeds[3].assign(value=0.5)
    ax = draw.error_by_length(pd.concat(seeds)).axes[0]
    strong = line(ax, "scan model (5 seeds)")
    thin = [x for x in ax.lines if x.get_linewidth() == 0.9 and len(x.get_xdata()) == len(LENGTHS)]
    assert strong.get_ydata()[-1] < 0.5
    assert [bool(min(x.get_ydata()) == 0.5) for x in thin].count(True) == 1
    assert len(thin) == 5


def test_no_errors_are_drawn_in_a_strip_as_hollow_points() -> None:
    ax = draw.error_by_length(METRICS).axes[0]
    hollow = [
        x for x in ax.lines if to_hex(x.get_markerfacecolor()) == "#ffffff" and len(x.get_xdata())
    ]
    rows = {tuple(h.get_xdata()): set(h.get_ydata()) for h in hollow}
    (scan,), (gpt2,) = rows[4, 8, 16], rows[4,]
    assert gpt2 == pytest.approx(scan * draw.APART)  # a row of its own, the first series lowest
    assert ax.get_ylim()[0] < scan
    shown = [t.get_text() for t in ax.get_yticklabels() if t.get_position()[1] <= gpt2]
    assert not any(shown)
    label = next(t for t in ax.texts if t.get_text() == "none found")
    assert scan < label.xy[1] < gpt2


def test_without_a_length_free_of_errors_there_is_no_strip() -> None:
    wrong = METRICS.assign(value=METRICS["value"].clip(upper=0.8))
    ax = draw.error_by_length(wrong).axes[0]
    assert not ax.texts
    assert not ax.patches


def test_the_upper_axis_counts_levels_of_the_tree() -> None:
    figure = draw.error_by_length(METRICS)
    figure.draw_without_rendering()
    (upper,) = figure.axes[0].child_axes
    depths = dict(
        zip(upper.get_xticks(), [t.get_text() for t in upper.get_xticklabels()], strict=True)
    )
    assert depths[4] == "2"  # prefix of three leaves: ((x0 x1) x2)
    assert depths[64] == "10"  # 63 = 32 + 16 + 8 + 4 + 2 + 1: five levels, five folds


def test_what_is_not_in_the_records_is_named() -> None:
    with pytest.raises(ScanLMError, match=r"no 'accuracy_last' by length.*metrics are: accuracy"):
        draw.error_by_length(METRICS, name="accuracy_last")
    with pytest.raises(ScanLMError, match="no losses by stage"):
        draw.curriculum_curves(METRICS)
    with pytest.raises(ScanLMError, match="no accuracy by position"):
        draw.position_heatmap(METRICS.drop(columns="position"))


def test_the_heat_map_has_a_row_for_each_run() -> None:
    ax = draw.position_heatmap(METRICS, trained_length=8).axes[0]
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == ["scan model, seed 0", "scan model, seed 1", "GPT-2, seed 0", "GPT-2, seed 1"]
    meshes = [c for c in ax.collections if isinstance(c, QuadMesh)]
    assert len(meshes) == 4
    assert meshes[0].get_array().size == 5


def test_reach_is_ordered_by_the_median() -> None:
    rows = [("GPT-2", 24), ("GPT-2", 16), ("GLA", 0)]
    rows += [("scan model", reach) for reach in (180, 512, 1024)]
    reaches = pd.DataFrame(rows, columns=["series", "reach"]).assign(trained=16)
    ax = draw.reach_points(reaches).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["GLA", "GPT-2", "scan model"]
    # one run's value stands beside its point, a median above its own place, not beside a point
    assert [t.get_text() for t in ax.texts] == ["0", "16 and 24", "median 512", "trained on"]
    assert [t.xy[0] for t in ax.texts[:3]] == [1, 20, 512]


def test_changed_recipes_stand_below_the_family_they_change() -> None:
    rows = [("scan model", reach) for reach in (1024, 4096, 4096)]
    rows += [("no noise", reach) for reach in (512, 4096, 4096)]
    rows += [("causal T1", 4096)] * 3 + [("no dropout", 128)] * 3
    ax = draw.reach_points(pd.DataFrame(rows, columns=["series", "reach"])).axes[0]
    assert [t.get_text() for t in reversed(ax.get_yticklabels())] == [
        "scan model",
        "causal T1",
        "no noise",
        "no dropout",
    ]


def test_each_row_has_the_length_it_was_trained_on() -> None:
    rows = [("scan model", 1024, 16), ("lengths 2 to 8", 64, 8), ("lengths 2 to 8", 18, 8)]
    ax = draw.reach_points(pd.DataFrame(rows, columns=["series", "reach", "trained"])).axes[0]
    marks = [path.vertices for path in ax.collections[0].get_paths()]
    assert [(mark[0][0], mark[:, 1].mean()) for mark in marks] == [(8, 0), (16, 1)]


def test_runs_of_almost_equal_reach_are_all_seen() -> None:
    reaches = pd.DataFrame({"series": "scan model", "reach": [14, 512, 13, 14]})
    ax = draw.reach_points(reaches).axes[0]
    points = next(x for x in ax.lines if len(x.get_xdata()) == 4)
    assert list(points.get_xdata()) == [13, 14, 14, 512]
    assert len(set(points.get_ydata()[:3])) == 3
    assert points.get_ydata()[3] == 0
    ten = pd.DataFrame({"series": "scan model", "reach": [512] * 10})
    (points,) = (x for x in draw.reach_points(ten).axes[0].lines if len(x.get_xdata()) == 10)
    assert len(set(points.get_ydata())) == 10
    assert abs(points.get_ydata()).max() < 0.24  # where the label begins


def test_only_families_have_colors_of_their_own_where_rows_are_named() -> None:
    series = ["scan model", "no dropout", "5,000 steps at 16", "GPT-2, window"]
    ax = draw.reach_points(pd.DataFrame({"series": series, "reach": [4, 3, 2, 1]})).axes[0]
    points = [x for x in ax.lines if x.get_marker() != "None"]
    rows = [t.get_text() for t in ax.get_yticklabels()]
    colors = dict(zip(rows, (x.get_color() for x in points), strict=True))
    assert colors["scan model"] == FAMILIES["scanlm"].color
    assert colors["GPT-2, window"] == FAMILIES["window_gpt2"].color
    assert colors["no dropout"] == colors["5,000 steps at 16"]
    assert colors["no dropout"] not in {f.color for f in FAMILIES.values()}


# Training


def curriculum(ends: dict[int, int], run: str = "a", **more: Any) -> pd.DataFrame:
    """A run whose stages end at these steps."""
    rows, start = [], 0
    for length, end in ends.items():
        for step in range(start + 1, end + 1):
            row = {"run_id": run, "series": "scan model", "step": step, "length": length, **more}
            rows.append({**row, "name": "loss", "split": "train", "value": 1.0})
            rows.append({**row, "name": "accuracy_last", "split": "validation", "value": 0.5})
        start = end
    return pd.DataFrame(rows)


def test_curricula_show_stages_and_what_a_guess_beyond_the_last_stage_loses() -> None:
    top, bottom = draw.curriculum_curves(curriculum({2: 8, 3: 20}, order=6)).axes
    assert [t.get_text() for t in top.texts] == ["2", "3", "length of words: "]
    assert [t.xy[0] for t in top.texts[:2]] == [4, 14]
    levels = [x.get_ydata()[0] for x in top.lines if len(x.get_xdata()) == 2]
    assert np.log(6) / 2 in levels  # one of two positions unknown
    assert pytest.approx(np.log(6) / 3) in levels  # one of three
    assert [t.get_text() for t in top.get_legend().get_texts()] == [draw.LEVELS]
    assert top.get_ylabel().startswith("training loss")
    assert len(line(bottom, "scan model").get_xdata()) == 20


def test_short_stages_side_by_side_share_a_label() -> None:
    stages = curriculum({2: 100, 3: 101, 4: 103, 8: 200, 16: 202})
    top = draw.curriculum_curves(stages).axes[0]
    places = {t.get_text(): t.xy[0] for t in top.texts}
    assert places == {"2": 50, "3, 4": 101.5, "8": 151.5, "16": 201, "length of words: ": 0}


def test_of_a_long_last_stage_only_the_beginning_is_shown_and_its_end_is_told() -> None:
    top, bottom = draw.curriculum_curves(curriculum({2: 40, 3: 50, 16: 200})).axes
    assert top.get_xlim()[1] == bottom.get_xlim()[1] == 100
    assert [t.get_text() for t in top.texts[:3]] == ["2", "3", "16 (until step 200)"]
    assert top.texts[2].xy[0] == 75
    top = draw.curriculum_curves(curriculum({2: 40, 3: 50, 16: 150})).axes[0]
    assert top.get_xlim()[1] > 150


def test_a_note_says_whose_stages_are_drawn() -> None:
    first = curriculum({2: 8, 3: 20}, seed=3)
    second = curriculum({2: 10, 3: 22}, run="b", seed=4)
    other = curriculum({2: 5, 3: 17}, run="c", seed=3).assign(series="GPT-2")

    def note(*runs: pd.DataFrame) -> str:
        top = draw.curriculum_curves(pd.concat(runs)).axes[0]
        return str(top.texts[-1].get_text())

    assert note(first) == "length of words: "
    assert note(first, second) == "strong line, lengths, borders, dashes: seed 3"
    assert note(first, other) == "lengths, borders, dashes: scan model"


# Depth

DEPTHS = pd.DataFrame(
    {
        "position": [2, 3, 4, 5],
        "chunks": [1, 2, 3, 4],
        "depth": [0, 1, 2, 2],
        "error": [0.0, 0.0, 0.2, 0.4],
        "probe_error": [0.0, 0.1, 0.1, 0.1],
        "nearest_error": [0.0, 0.0, 0.0, 0.5],
        "distance": [0.0, 0.1, 0.2, 0.3],
        "distance_right": [0.0, 0.1, 0.2, 0.6],
    }
)


def test_errors_by_depth_are_means_over_the_prefixes_of_a_depth() -> None:
    ax = draw.error_by_depth({"scan model": DEPTHS}, trained_depth=1).axes[0]
    assert list(line(ax, "the model's answer").get_ydata()) == pytest.approx([0, 0, 0.3])
    assert line(ax, "nearest leaf").get_ydata()[2] == pytest.approx(0.25)


def test_several_models_have_a_panel_each_on_one_scale() -> None:
    deeper = DEPTHS.assign(depth=DEPTHS["depth"] + 3, distance_right=2.0)
    for figure in (
        draw.error_by_depth({"a": DEPTHS, "b": deeper}, trained_depth=1),
        draw.state_distance({"a": DEPTHS, "b": deeper}),
    ):
        assert [ax.get_title(loc="left") for ax in figure.axes] == ["a", "b"]
        left, right = figure.axes
        assert left.get_xlim() == right.get_xlim()
        assert left.get_ylim() == right.get_ylim()
        assert len(left.get_legend().get_texts()) >= 2


def test_distances_need_leaves() -> None:
    ax = draw.state_distance(DEPTHS).axes[0]
    assert line(ax, "to the leaf").get_ydata()[2] == pytest.approx(0.4)
    with pytest.raises(ScanLMError, match="chunk_size=1"):
        draw.state_distance(DEPTHS.drop(columns=["distance", "distance_right"]))


def test_gain_is_the_mean_over_prefixes() -> None:
    table = pd.DataFrame({"size": [0.1, 0.1, 1.0], "chunks": [1, 2, 1], "gain": [0.2, 0.4, 1.5]})
    ax = draw.gain(table).axes[0]
    assert list(line(ax, "scan model").get_ydata()) == pytest.approx([0.3, 1.5])


# Records


def record(model: str, seed: int, reach: int, **changes: Any) -> dict[str, Any]:
    stages = [
        {"length": n, "lr": 1e-4, "dropout": 0.1 * (n == 16), "max_steps": 10} for n in (2, 16)
    ]
    parameters = {"group": "S5", "stages": stages, "config": {}} | changes
    row = {"run_id": f"{model}{seed}{reach}", "model": model, "seed": seed, "status": "finished"}
    return {**row, "parameters": parameters, "summary.reach": {"float32": reach}}


def test_records_are_told_apart_as_recipe_baselines_and_ablations() -> None:
    without = [{"length": n, "lr": 1e-4, "dropout": 0.0, "max_steps": 10} for n in (2, 16)]
    rows = [record("scan", seed, 512) for seed in range(3)]
    rows += [record("scan", seed, 9999, stages=without) for seed in range(2)]
    rows += [record("scan", 0, 7, config={"t1_causal": True})]
    noisy = [{**stage, "state_noise": 0.5 * (stage["length"] == 16)} for stage in without]
    noisy[1]["dropout"] = 0.1
    rows += [record("scan", 0, 8, stages=noisy)]
    rows += [record("gpt2_tiny", 0, 4), record("gpt2_tiny", 0, 8, clip=2.0)]
    short = [{"length": 2, "lr": 1e-4, "max_steps": 10}]
    rows += [record("gla_170M", seed, 99, stages=short) for seed in range(3)]
    runs = state_records.sort_runs(pd.DataFrame(rows))
    found = {(r["role"], r["series"], r["reach"]) for _, r in runs.iterrows()}
    assert found == {
        ("recipe", "scan model", 512),
        ("ablation", "no dropout", 9999),
        ("ablation", "causal T1", 7),
        ("ablation", "state noise 0.5, late", 8),
        ("baseline", "GPT-2, dropout 0.1, late", 8),  # the better one
        ("search", "GPT-2, dropout 0.1, late", 4),
        ("search", "GLA", 99),  # trained on shorter words than the recipe
    }


def stages(limit: int, last: int, **fields: Any) -> list[dict[str, Any]]:
    ends = [{"max_steps": limit, "threshold": 0.98}, {"max_steps": last, "threshold": None}]
    return [{"length": n, "lr": 1e-4, **e, **fields} for n, e in zip((2, 16), ends, strict=True)]


def test_a_limit_on_steps_is_told_only_if_nothing_else_is_to_tell() -> None:
    base = {"stages": stages(10, 50)}
    assert state_records.difference(base, base) == ""
    assert state_records.difference(base, {"stages": stages(20, 50)}) == "20 steps at 2"
    assert state_records.difference(base, {"stages": stages(20, 90)}) == "90 steps at 16"


@pytest.mark.parametrize(
    ("changed", "label"),
    [
        ({"stages": stages(10, 50, schedule="cosine")}, "schedule cosine"),
        ({"stages": stages(10, 50, batch_size=32)}, "batch size 32"),
        (
            {"stages": [stages(10, 50)[0], {**stages(10, 50)[1], "lr": 3e-4}]},
            "learning rate 0.0003 at 16",
        ),
        (
            {"stages": [{**stages(10, 50)[0], "generators": 0.5}, stages(10, 50)[1]]},
            "generators 0.5",
        ),
        (
            {"stages": [stages(10, 50)[0], {**stages(10, 50)[1], "t1_from_t2": True}]},
            "T1 begun as T2",
        ),
        ({"betas": [0.9, 0.95], "clip": 2.0}, "betas [0.9, 0.95]; clip 2.0"),
        ({"config": {"prefix_embedding": True}}, "prefix embedding"),
        ({"config": {"t1_layers": 2}, "weight_decay": 0.1}, "weight_decay 0.1; T1 layers 2"),
        ({"compile": True, "eval_sequences": 3}, ""),
        ({"betas": [0.9, 0.999], "ema": 0.0}, ""),  # the defaults, said
    ],
)
def test_a_difference_is_told_whole_and_where_it_is(changed: dict[str, Any], label: str) -> None:
    base = {"stages": stages(10, 50)}
    assert state_records.difference(base, base | changed) == label


def test_what_the_recipe_has_is_missed_elsewhere() -> None:
    base = {"stages": [{**stages(10, 50)[0], "generators": 0.5}, stages(10, 50)[1]]}
    base["stages"][1]["t1_from_t2"] = True
    found = state_records.difference(base, {"stages": stages(10, 50)})
    assert found == "no T1 begun as T2; no generators"
    longer = [{**stages(10, 50)[0], "length": 3}, {**stages(10, 50)[1], "length": 32}]
    found = state_records.difference(base, {"stages": longer})
    assert found == "lengths 3 to 32; no generators; no T1 begun as T2"
    longer[0]["generators"], longer[1]["t1_from_t2"] = 0.5, True
    assert state_records.difference(base, {"stages": longer}) == "lengths 3 to 32"


def test_of_sets_with_as_many_seeds_the_recipe_is_the_surer_and_then_the_cheaper_one() -> None:
    rows = [
        record("scan", seed, reach, weight_decay=decay) | {"summary.tokens": tokens}
        for decay, tokens, reaches in (
            (0.1, 10, (8, 64, 64)),
            (0.2, 30, (16, 64, 64)),
            (0.3, 20, (16, 64, 64)),
        )
        for seed, reach in enumerate(reaches)
    ]
    runs = state_records.sort_runs(pd.DataFrame(rows))
    decays = [p["weight_decay"] for p in runs.loc[runs["role"] == "recipe", "parameters"]]
    assert decays == [0.3] * 3


def test_of_baselines_that_reach_as_far_the_one_without_aids_is_compared() -> None:
    plain = [{"length": n, "lr": 1e-4, "max_steps": 10} for n in (2, 16)]
    helped = [{**plain[0], "generators": 0.5}, {**plain[1], "dropout": 0.2}]
    rows = [record("scan", 0, 512, stages=plain)]
    for reach, stages_ in ((16, helped), (16, plain), (17, helped)):
        rows += [record("gpt2_tiny", 0, reach, stages=stages_, clip=reach)]
    runs = state_records.sort_runs(pd.DataFrame(rows[:3]))
    found = {r["series"]: r["role"] for _, r in runs.iterrows() if r["model"] != "scan"}
    assert found == {"GPT-2": "baseline", "GPT-2, generators 0.5, dropout 0.2, late": "search"}
    runs = state_records.sort_runs(pd.DataFrame(rows))
    assert list(runs.loc[runs["role"] == "baseline", "reach"]) == [17]


def test_runs_of_another_schedule_are_no_seeds_of_the_recipe() -> None:
    rows = [record("scan", seed, 512) for seed in range(2)]
    changed = [{**s, "schedule": "cosine"} for s in rows[0]["parameters"]["stages"]]
    rows += [record("scan", 2, 9999, stages=changed)]
    runs = state_records.sort_runs(pd.DataFrame(rows))
    assert list(runs["role"]) == ["recipe", "recipe", "ablation"]


def test_shares_of_representations_are_bars_by_series_and_reach() -> None:
    rows = [
        {"run_id": f"{series}{seed}", "name": f"{of}_irrep", "irrep": irrep, "value": value}
        | {"series": series}
        for series, main in (("with", "4"), ("without", "5'"))
        for seed in (0, 1)
        for of in ("leaf", "state")
        for irrep, value in {"1'": 0.1, "4": 0.2, "5'": 0.2, main: 0.7}.items()
    ]
    table = state_records.recorded_shares(pd.DataFrame(rows))
    assert len(table) == 12  # of leaves alone
    table["seed"] = table["run_id"].str[-1].astype(int)
    table["reach"] = table["seed"].map({0: 64, 1: 1024})
    ax = representation_shares(table).axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["seed 1", "seed 0"] * 2
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["with", "1,024", "64", "without", "1,024", "64", "reach"]
    widths = [bar.get_width() for bar in ax.patches[:3]]
    assert widths == pytest.approx([0.1, 0.7, 0.2])
    with pytest.raises(ScanLMError, match="were not probed"):
        state_records.recorded_shares(pd.DataFrame(rows).drop(columns="irrep"))


def test_what_was_probed_is_read_back_from_records() -> None:
    rows = [
        {"run_id": run, "name": f"state_{name}", "value": value, "depth": depth}
        for run in ("a", "b")
        for depth in (0, 1)
        for name, value in (("error", 0.1 * depth), ("distance", 0.5))
    ]
    rows += [{"run_id": "a", "name": "state_gain", "value": 0.25, "size": 0.1}]
    rows += [{"run_id": "a", "name": "loss", "value": 1.0}]
    metrics = pd.DataFrame(rows)
    states = state_records.recorded_states(metrics)
    assert list(states["depth"]) == [0, 1, 0, 1]
    assert list(states["error"]) == [0.0, 0.1, 0.0, 0.1]
    assert set(states["distance"]) == {0.5}
    gains = state_records.recorded_gains(metrics)
    assert gains.to_dict("records") == [{"run_id": "a", "size": 0.1, "gain": 0.25}]
    with pytest.raises(ScanLMError, match="not probed"):
        state_records.recorded_states(metrics[["run_id", "name", "value"]])
