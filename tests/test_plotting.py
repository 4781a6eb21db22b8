"""Figures, tested by what they hold: boxes, lines, labels and the data in them."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from scanlm import trees
from scanlm.errors import ScanLMError
from scanlm.plotting import comparison, cost, figures, inference, scan, style, training
from scanlm.plotting.architecture import WORDS, architecture
from scanlm.records import Run, export


def boxes(ax: Axes, gid: str | None = None) -> list[FancyBboxPatch]:
    found = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]
    return [patch for patch in found if patch.get_gid() == gid]


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


# Style


def test_every_family_has_its_own_color() -> None:
    colors = [look.color for look in style.FAMILIES.values()]
    assert len(set(colors)) == len(colors) == 6


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("scanlm_tiny", "scanlm"),
        ("gpt2", "gpt2"),
        ("window_gpt2_tiny", "window_gpt2"),
        ("gpt2-medium", "gpt2"),
        ("gla_170m", "gla"),
        ("glacier", None),
    ],
)
def test_family_of_a_model_id(model: str, family: str | None) -> None:
    assert style.family_of(model) == family


def test_models_of_one_family_share_the_color_and_differ_in_line_style() -> None:
    looks = style.model_styles(["scanlm_tiny", "scanlm_base", "gpt2", "mine", "other"])
    assert looks["scanlm_tiny"].color == looks["scanlm_base"].color
    assert looks["scanlm_tiny"].linestyle != looks["scanlm_base"].linestyle
    many = style.model_styles([f"scanlm_{n}" for n in range(6)]).values()
    assert len({look.linestyle for look in many}) == len({look.marker for look in many}) == 6
    assert [looks[m].label for m in ("gpt2", "scanlm_tiny", "mine")] == [
        "GPT-2",
        "ScanLM tiny",  # its name in the registry
        "mine",
    ]
    assert len({looks[m].color for m in looks}) == 4


@pytest.mark.parametrize("color", [*style.sequence_colors(9), "#FFFFFF", "#000000"])
def test_text_is_readable_on_every_color(color: str) -> None:
    def luminance(name: str) -> float:
        rgb = np.array(to_rgb(name))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    light, dark = sorted([luminance(color), luminance(style.text_on(color))], reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3.0  # WCAG's contrast for large or bold text


def test_style_is_left_behind() -> None:
    import matplotlib as mpl

    before = mpl.rcParams["axes.titleweight"]
    with style.style():
        assert mpl.rcParams["axes.titleweight"] == "bold"
    assert mpl.rcParams["axes.titleweight"] == before


# The tree


def test_tree_draws_every_chunk_and_node_with_its_formula() -> None:
    trace = trees.scan_trace(8)
    (ax,) = scan.tree(trace).axes
    assert len(boxes(ax)) == 7 + len(trace)
    assert len(boxes(ax, "ring")) == 7  # prefix(1) ... prefix(7)
    written = texts(ax)
    assert "$((x_{0}x_{1})(x_{2}x_{3}))$" in written
    assert "prefix(6)" in written
    assert "tree(4, 6)" in written
    assert [t for t in written if t.startswith("call")] == ["call 1", "call 2", "call 3", "call 4"]


@pytest.mark.parametrize(("step", "nodes"), [(0, 0), (1, 3), (2, 5), (4, 8)])
def test_later_steps_are_not_drawn(step: int, nodes: int) -> None:
    (ax,) = scan.tree(trees.scan_trace(8), step=step).axes
    assert len(boxes(ax)) == 7 + nodes


@pytest.mark.parametrize("n", [3, 8, 13, 16, 33])
def test_no_two_nodes_collide(n: int) -> None:
    (ax,) = scan.tree(trees.scan_trace(n)).axes
    areas = [
        (b.get_x(), b.get_x() + b.get_width(), b.get_y(), b.get_y() + b.get_height())
        for b in boxes(ax) + boxes(ax, "ring")
    ]
    for i, (a0, a1, a2, a3) in enumerate(areas):
        for b0, b1, b2, b3 in areas[:i]:
            apart = a1 <= b0 or b1 <= a0 or a3 <= b2 or b3 <= a2
            around = (a0 < b0 and b1 < a1) or (b0 < a0 and a1 < b1)  # a ring and its box
            assert apart or around


def test_formulas_fit_their_boxes() -> None:
    figure = scan.tree(trees.scan_trace(8))
    figure.canvas.draw()
    (ax,) = figure.axes
    for box in boxes(ax):
        area = box.get_window_extent()
        inside = [t for t in ax.texts if area.contains(*ax.transData.transform(t.get_position()))]
        for text in inside:
            extent = text.get_window_extent()
            assert extent.x0 >= area.x0
            assert extent.x1 <= area.x1


def test_long_trees_show_spans() -> None:
    (ax,) = scan.tree(trees.scan_trace(17)).axes
    assert "0–15" in texts(ax)
    assert not any("(" in text for text in texts(ax)[:-1])


def test_tree_steps_has_a_panel_a_call() -> None:
    figure = scan.tree_steps(trees.scan_trace(8))
    shown = [ax for ax in figure.axes if ax.patches]
    assert len(shown) == 4
    assert [len(boxes(ax)) for ax in shown] == [7 + 3, 7 + 5, 7 + 7, 7 + 8]
    assert "Call 3" in texts(shown[2])
    assert any("(((x_{0}x_{1})(x_{2}x_{3}))(x_{4}x_{5}))" in text for text in texts(shown[2]))


@pytest.mark.parametrize("step", [-1, 5])
def test_a_step_that_the_trace_does_not_have(step: int) -> None:
    with pytest.raises(ScanLMError, match="step must be between 0 and 4"):
        scan.tree(trees.scan_trace(8), step=step)


@pytest.mark.parametrize("draw", [scan.tree, scan.tree_steps, scan.counter, scan.push_cost])
def test_an_empty_trace_is_refused(draw) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ScanLMError, match="trace is empty"):
        draw([])


def test_counter_has_a_panel_a_push_and_the_tree() -> None:
    figure = scan.counter(trees.counter_trace(6))
    titled = {ax.get_title(loc="left"): ax for ax in figure.axes}
    assert [t for t in titled if "=" in t] == [f"{k} = ${k:03b}_2$" for k in range(1, 7)]
    six = titled["6 = $110_2$"]
    assert six.get_xlabel() == "$(((x_{0}x_{1})(x_{2}x_{3}))(x_{4}x_{5}))$"
    assert texts(six) == ["+2 combines"]
    (below,) = [ax for title, ax in titled.items() if "same nodes" in title]
    assert len(boxes(below)) == 6 + len(trees.counter_trace(6))


def test_counter_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ScanLMError, match="at most 8 pushes"):
        scan.counter(trees.counter_trace(9))


def test_push_cost_bars_are_combines_and_the_mean_stays_below_two() -> None:
    (ax,) = scan.push_cost(trees.counter_trace(16)).axes
    heights = [patch.get_height() for patch in ax.patches if isinstance(patch, Rectangle)]
    assert heights == [0, 1, 1, 2, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 4]
    mean = next(line for line in ax.lines if line.get_label() == "mean so far")
    assert mean.get_ydata()[-1] == sum(heights) / 16


def test_work_and_depth_draws_the_counts_and_their_bounds() -> None:
    costs = pd.DataFrame(trees.scan_costs(range(1, 20)))
    work, depth = scan.work_and_depth(costs).axes
    lines = {line.get_label(): line for line in work.lines}
    n = lines["parallel scan"].get_xdata()
    assert list(n) == list(range(3, 20))
    expected = costs[(costs["scan"] == "parallel scan") & (costs["n"] > 2)]
    assert list(lines["parallel scan"].get_ydata()) == expected["combines"].tolist()
    assert list(lines["bound $2(n-1)$"].get_ydata()) == [2 * (k - 1) for k in n]
    rounds = {line.get_label(): line.get_ydata() for line in depth.lines}
    assert list(rounds["parallel scan"]) == expected["rounds"].tolist()
    assert len(rounds) == 4


def test_bracketings_name_depth_and_formula() -> None:
    figure = scan.bracketings({"left fold": trees.fold_trace(trees.left_fold, 4)})
    (ax,) = figure.axes
    assert ax.get_title() == "left fold: depth 3"
    assert "$(((x_{0}x_{1})x_{2})x_{3})$" in texts(ax)
    assert len(ax.lines) == 3


def test_equal_results_are_drawn_hollow_on_their_own_line() -> None:
    rows = [
        {"n": n, "operator": "T1", "tree": tree, "gap": gap}
        for n, tree, gap in [(3, "left fold", 0.0), (4, "left fold", 1e-2), (4, "balanced", 0.0)]
    ]
    (ax,) = scan.bracketing_gaps(pd.DataFrame(rows)).axes
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "none"]
    assert sum(len(line.get_xdata()) for line in hollow) == 2
    assert "equal" in [label.get_text() for label in ax.get_yticklabels()]


def test_influence_map_masks_zeros_and_draws_chunk_borders() -> None:
    matrix = np.tril(np.full((6, 6), 1e-3)) + np.eye(6)
    figure = scan.influence_map({"a": matrix, "b": matrix}, chunk_size=2)
    ax = figure.axes[0]
    assert ax.get_title(loc="left") == "a"
    shown = ax.images[0].get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(shown), matrix == 0)
    borders = sorted({line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1})
    assert borders == [1.5, 3.5]


def test_path_tables_write_each_number() -> None:
    calls, _ = trees.path_lengths(trees.scan_trace(4), 4)
    (ax,) = scan.path_tables({"T1 calls in between": calls}).axes
    assert [t for t in texts(ax) if t != "T2"] == ["0", "1", "1", "2", "2", "1"]


def test_architecture_has_a_t1_box_a_node_and_a_prefix_a_chunk() -> None:
    (ax,) = architecture().axes
    written = texts(ax)
    assert sum(text.startswith("T1\n") for text in written) == len(trees.scan_trace(len(WORDS)))
    assert [text for text in written if text.startswith("prefix(")] == [
        f"prefix({i})" for i in range(1, len(WORDS))
    ]
    # each prediction is the next token
    flat = [word for words in WORDS for word in words]
    assert [text for text in written if text in {*flat, "…"}].count("…") == 1


# Curves from records


@pytest.fixture
def metrics() -> pd.DataFrame:
    """Two models, two seeds each: loss 4, 3, 2 (+ 0.5 a seed, + 1 for the second model)."""
    rows = []
    for m, model in enumerate(("scanlm", "gpt2")):
        for seed in (0, 1):
            run = {"run_id": f"{model}-s{seed}", "experiment": "t", "model": model, "seed": seed}
            for step in (1, 2, 3):
                at = run | {"step": step, "tokens": 100 * step, "seconds": (1.0 + seed) * step}
                value = 5 - step + 0.5 * seed + m
                rows.append(at | {"split": "validation", "name": "loss", "value": value})
                rows.append(at | {"split": "train", "name": "loss", "value": value - 0.1})
                speed = 1000.0 * (m + 1) + (9000 if step == 1 else 0)  # the first is an outlier
                rows.append(at | {"name": "tokens_per_second", "value": speed})
            for position in range(6):
                at = run | {"step": 3, "split": "validation", "position": position}
                rows.append(at | {"name": "loss", "value": 1.0 + position + seed})
    return pd.DataFrame(rows)


def test_loss_curve_is_the_mean_over_seeds_in_a_band(metrics: pd.DataFrame) -> None:
    (ax,) = training.loss_curves(metrics).axes
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["scan model", "GPT-2"]
    assert list(lines["scan model"].get_xdata()) == [100, 200, 300]
    assert list(lines["scan model"].get_ydata()) == [4.25, 3.25, 2.25]
    assert lines["scan model"].get_color() == style.FAMILIES["scanlm"].color
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 2.0
    assert band[:, 1].max() == 4.5
    assert ax.get_xlabel() == "tokens trained on"


def test_a_single_run_has_no_band(metrics: pd.DataFrame) -> None:
    (ax,) = training.loss_curves(metrics[metrics["seed"] == 0]).axes
    assert not ax.collections


def test_training_split_is_faint_behind_the_others(metrics: pd.DataFrame) -> None:
    (ax,) = training.loss_curves(metrics, split=None).axes
    drawn = [line for line in ax.lines if len(line.get_xdata())]
    assert sorted(line.get_alpha() for line in drawn) == [0.45, 0.45, 1.0, 1.0]
    assert "while training" in [text.get_text() for text in ax.get_legend().get_texts()]
    (alone,) = training.loss_curves(metrics, split="train").axes
    assert [line.get_alpha() for line in alone.lines] == [1.0, 1.0]


def test_references_are_dashed_lines_with_their_names(metrics: pd.DataFrame) -> None:
    (ax,) = training.loss_curves(metrics, references={"unigram entropy": 3.2}).axes
    assert texts(ax) == ["unigram entropy"]
    flat = [line for line in ax.lines if set(line.get_ydata()) == {3.2}]
    assert len(flat) == 1
    assert [line.get_text() for line in ax.get_legend().get_texts()] == ["scan model", "GPT-2"]


def test_seconds_are_averaged_by_step(metrics: pd.DataFrame) -> None:
    (ax,) = training.loss_curves(metrics, x="seconds").axes
    assert list(ax.lines[0].get_xdata()) == [1.5, 3.0, 4.5]


def test_perplexity_is_made_from_each_runs_loss(metrics: pd.DataFrame) -> None:
    (ax,) = training.loss_curves(metrics, name="perplexity").axes
    expected = (np.exp(2.0) + np.exp(2.5)) / 2
    assert ax.lines[0].get_ydata()[-1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "los"}, "no metric 'los'; they have: loss, tokens_per_second"),
        ({"split": "validatoin"}, "Did you mean 'validation'"),
        ({"x": "token"}, "Did you mean 'tokens'"),
        ({"by": "modle"}, "Did you mean 'model'"),
    ],
)
def test_unknown_names_are_refused(
    metrics: pd.DataFrame, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ScanLMError, match=message):
        training.loss_curves(metrics, **options)  # type: ignore[arg-type]


def test_loss_by_position_draws_the_last_step_and_the_borders(metrics: pd.DataFrame) -> None:
    (ax,) = training.loss_by_position(metrics, chunk_size=2).axes
    curves = [line for line in ax.lines if len(line.get_xdata()) == 6]
    assert [line.get_label() for line in curves] == ["scan model", "GPT-2"]
    assert list(curves[0].get_ydata()) == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]
    borders = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2]
    assert borders == [1.5, 3.5]


def test_smoothing_does_not_cross_chunk_borders(metrics: pd.DataFrame) -> None:
    one = metrics[(metrics["model"] == "scanlm") & (metrics["seed"] == 0)]
    (ax,) = training.loss_by_position(one, chunk_size=3, window=3).axes
    smooth = next(line for line in ax.lines if line.get_label() == "scan model")
    assert list(smooth.get_ydata()) == [1.5, 2.0, 2.5, 4.5, 5.0, 5.5]


def test_records_without_positions_say_so(metrics: pd.DataFrame) -> None:
    with pytest.raises(ScanLMError, match="has the axis position"):
        training.loss_by_position(metrics[metrics["position"].isna()])


def test_loss_within_a_chunk_weighs_positions_by_their_tokens(metrics: pd.DataFrame) -> None:
    one = metrics[(metrics["model"] == "scanlm") & (metrics["seed"] == 0)]
    one = one.assign(n=[4 if p < 4 else 1 for p in one["position"]])
    (ax,) = training.loss_within_chunk(one, chunk_size=2).axes
    first, later = ax.lines
    assert list(first.get_ydata()) == [1.0, 2.0]
    assert list(later.get_ydata()) == pytest.approx([(4 * 3 + 5) / 5, (4 * 4 + 6) / 5])


def test_loss_within_a_chunk_needs_a_second_chunk(metrics: pd.DataFrame) -> None:
    with pytest.raises(ScanLMError, match="within the first chunk of 8"):
        training.loss_within_chunk(metrics, chunk_size=8)


def test_models_named_by_their_chunk_size_are_one_series(metrics: pd.DataFrame) -> None:
    scan_only = metrics[(metrics["model"] == "scanlm") & metrics["position"].isna()]
    sizes = pd.concat(
        scan_only.assign(chunk_size=c, model=f"scanlm_base_c{c}", run_id=f"c{c}") for c in (32, 64)
    )
    quality, speed = training.chunk_size_comparison(sizes).axes
    for ax in (quality, speed):
        (line,) = [line for line in ax.lines if line.get_label() == "scanlm_base"]
        assert list(line.get_xdata()) == [32, 64]


def test_chunk_sizes_show_final_values_and_median_speed(metrics: pd.DataFrame) -> None:
    scan_only = metrics[(metrics["model"] == "scanlm") & metrics["position"].isna()]
    sizes = pd.concat(
        scan_only.assign(
            chunk_size=c, run_id=scan_only["run_id"] + f"-{c}", value=scan_only["value"] * c
        )
        for c in (32, 64)
    )
    quality, speed = training.chunk_size_comparison(sizes).axes
    line = next(line for line in quality.lines if line.get_label() == "scan model")
    assert list(line.get_xdata()) == [32, 64]
    assert list(line.get_ydata()) == [32 * 2.25, 64 * 2.25]
    assert [t.get_text() for t in quality.get_xticklabels()] == ["32", "64"]
    rate = next(line for line in speed.lines if line.get_label() == "scan model")
    assert list(rate.get_ydata()) == [32000.0, 64000.0]
    (curves,) = training.loss_curves(sizes, by="chunk_size").axes
    assert [line.get_label() for line in curves.lines] == ["chunk 32", "chunk 64"]


def test_throughput_bars_are_medians_with_their_numbers(metrics: pd.DataFrame) -> None:
    (ax,) = training.throughput(metrics, source="from a test").axes
    widths = [patch.get_width() for patch in ax.patches]
    assert widths == [1000.0, 2000.0]
    assert texts(ax) == ["1,000", "2,000"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["scan model", "GPT-2"]
    figure = ax.figure
    assert isinstance(figure, Figure)
    assert figure.get_supxlabel() == "from a test"


def test_throughput_over_an_axis(metrics: pd.DataFrame) -> None:
    rows = metrics[metrics["name"] == "tokens_per_second"]
    both = pd.concat([rows.assign(length=512), rows.assign(length=1024, value=rows["value"] / 2)])
    (ax,) = training.throughput(both, x="length").axes
    assert list(ax.lines[0].get_xdata()) == [512, 1024]
    assert list(ax.lines[0].get_ydata()) == [1000.0, 500.0]


# Cost


def test_flops_are_stacked_with_shares_and_totals() -> None:
    table = pd.DataFrame(
        {"t1": [1e6, np.nan], "t2": [7e6, np.nan], "head": [2e6, 5e6], "blocks": [np.nan, 5e6]},
        index=["scan", "GPT-2"],
    )
    (ax,) = cost.flops_by_part(table).axes
    assert texts(ax) == ["10 %", "70 %", "50 %", "20 %", "50 %", "10.00", "10.00"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["scan", "GPT-2"]
    assert max(p.get_x() + p.get_width() for p in ax.patches) == 10.0


def test_flops_of_unknown_parts_are_refused() -> None:
    with pytest.raises(ScanLMError, match="none of the parts t1, t2, blocks, head; it has: tail"):
        cost.flops_by_part(pd.DataFrame({"tail": [1.0]}))


def test_state_bytes_are_lines_by_position() -> None:
    rows = [
        {"model": model, "position": p, "value": v}
        for model, p, v in [("gpt2", 1, 8), ("gpt2", 4, 32), ("gla", 1, 16), ("gla", 4, 16)]
    ]
    rows.append({"model": "scanlm_plain", "position": 4, "value": 1})  # no window to speak of
    (ax,) = cost.state_bytes(pd.DataFrame(rows)).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert lines == {"GPT-2": [8, 32], "GLA": [16, 16]}
    with pytest.raises(ScanLMError, match="no state_bytes"):
        cost.state_bytes(pd.DataFrame(rows).assign(name="loss"))


def test_prompts_are_drawn_once_for_a_model_that_has_several_ways_to_decode() -> None:
    rows = [
        {"model": m, "position": p, "value": p, "name": "prefill_seconds", "part": "positions"}
        for m in ("scanlm", "scanlm_plain", "scanlm_original", "gpt2_graph")
        for p in (1.0, 2.0)
    ]
    (ax,) = inference.prefill(pd.DataFrame(rows)).axes
    assert [line.get_label() for line in ax.lines] == ["scan model", "GPT-2, static KV buffer"]


def inference_rows(name: str, values: dict[str, list[float]], **fields: object) -> pd.DataFrame:
    """Values at positions 100, 200, ... by model."""
    return pd.DataFrame(
        {"model": model, "position": 100.0 * (i + 1), "value": value, "name": name, **fields}
        for model, found in values.items()
        for i, value in enumerate(found)
    )


def test_a_way_to_run_gpt2_looks_the_same_in_every_figure() -> None:
    ways = [name for name in inference.WAYS if name.startswith("gpt2")]
    looks = {}
    for models in (ways, ways[:1:-1], ["gpt2_math"]):
        rows = inference_rows("ms_per_token", {name: [1.0] for name in models}, part="positions")
        for line in inference.time_by_position(rows).axes[0].lines:
            look = (line.get_linestyle(), line.get_marker(), line.get_color())
            assert looks.setdefault(line.get_label(), look) == look
    assert len(set(looks.values())) == len(looks) == len(ways)
    assert looks[inference.LABELS["gpt2_math"]][2] != style.FAMILIES["gpt2"].color


@pytest.mark.parametrize(
    ("name", "draw"), [("prefill_seconds", inference.prefill), ("state_bytes", inference.memory)]
)
def test_of_several_gpt2_that_hardly_differ_the_best_is_drawn(
    name: str, draw: Callable[..., Figure]
) -> None:
    values = {"scanlm": [1.0, 1.0], "gpt2_graph": [3.0, 5.0], "gpt2_static": [4.0, 4.0]}
    values["gpt2_math"] = [0.5, 0.5]  # handicapped, in whatever
    (ax,) = draw(inference_rows(name, values, part="positions")).axes
    lines = {line.get_label(): [*line.get_ydata()] for line in ax.lines}
    assert lines == {
        "scan model": [1.0, 1.0],
        inference.LABELS["gpt2_best"]: [3.0, 4.0],
        inference.LABELS["gpt2_math"]: [0.5, 0.5],
    }
    assert [t.get_text() for t in ax.get_xticklabels()] == ["100", "200"]


def test_memory_shows_the_most_held_beside_what_was_measured() -> None:
    rows = inference_rows("state_bytes", {"scanlm": [3.0, 1.0]}, part="positions")
    most = pd.Series({100.0: 3.0, 150.0: 4.0, 200.0: 5.0})
    measured, stairs = inference.memory(rows, most=most).axes[0].lines
    assert [*measured.get_ydata()] == [3.0, 1.0]
    assert [*stairs.get_ydata()] == [3.0, 4.0, 5.0]
    assert stairs.get_markevery() == [True, False, True]


@pytest.mark.parametrize(
    ("c", "window", "last", "paused"),
    [
        (4, 4, 106, {2}),  # tokens 102 to 105 are the first window
        (8, 4, 106, {2, 6}),
        (4, 8, 110, set()),  # every other chunk only: a median does not see it
        (4, 3, 105, set()),  # another place each time
    ],
)
def test_a_place_that_is_always_timed_after_a_pause_is_marked(
    c: int, window: int, last: int, paused: set[int]
) -> None:
    usual = {"model": "scanlm", "part": "timeline", "chunk_size": c}
    places = [
        {**usual, "name": "ms_at_place", "place": p, "value": 5.0 if p in (0, 2, 6) else 1.0}
        for p in range(c)
    ]
    rows = [
        *places,
        {**usual, "name": "ms_per_token", "position": last + window, "n": window, "value": 1.0},
        {**usual, "name": "ms_per_token", "position": last, "n": window, "value": 1.0},
        {**usual, "name": "border_ms", "combines": 1, "n": 3, "value": 1.0},
    ]
    ax = inference.borders(pd.DataFrame(rows)).axes[0]
    pale = {i for i, bar in enumerate(ax.patches) if bar.get_facecolor()[:3] == to_rgb(style.FAINT)}
    assert pale == paused
    assert len(ax.texts) == len(paused)


def test_throughput_says_at_which_position() -> None:
    rows = inference_rows("tokens_per_second", {"scanlm": [1.0]}, part="batches", batch_size=1)
    title = "Throughput by batch size, at position 100"
    assert inference.throughput(rows).axes[0].get_title(loc="left") == title


def test_memory_bars_are_in_megabytes() -> None:
    (ax,) = cost.memory_bars({"gpt2": 3e6, "gla": 1.5e6}, "Memory", "MB").axes
    assert [patch.get_width() for patch in ax.patches] == [3.0, 1.5]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["GPT-2", "GLA"]
    assert texts(ax) == ["3.0 MB", "1.5 MB"]


# Comparison


def test_reading_the_past_has_a_panel_a_family() -> None:
    figure = comparison.reading_the_past()
    titles = {ax.get_title(loc="left"): ax for ax in figure.axes}
    others = {look.label for name, look in style.FAMILIES.items() if name != "scanlm"}
    assert set(titles) == others | {"TransformerScanModel"}

    def arrows(name: str) -> int:
        return sum(isinstance(patch, FancyArrowPatch) for patch in titles[name].patches)

    assert arrows("GPT-2") == comparison.TOKENS
    assert arrows("GPT-2, window") == comparison.WINDOW
    assert texts(titles["TransformerScanModel"]).count("T1") == 2  # the fold of three chunks


def test_cost_curves_share_their_values_and_differ_in_the_axis(metrics: pd.DataFrame) -> None:
    metrics = metrics.assign(flops=metrics["tokens"] * metrics["model"].map(len))
    tokens, flops = comparison.cost_curves(metrics).axes
    for ax, unit in ((tokens, 1), (flops, len("gpt2"))):
        line = next(line for line in ax.lines if line.get_label() == "GPT-2")
        assert list(line.get_xdata()) == [100 * unit, 200 * unit, 300 * unit]
    assert tokens.get_ylabel() == "perplexity (per token)"
    assert flops.get_legend() is not None


def test_final_values_have_a_point_a_seed_and_the_best_on_top(metrics: pd.DataFrame) -> None:
    (ax,) = comparison.final_values(metrics).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["GPT-2", "scan model"]
    points = [line for line in ax.lines if line.get_marker() == "o"]
    assert sorted(points[1].get_xdata()) == [2.0, 2.5]
    assert texts(ax) == ["3.250", "2.250"]


def test_final_values_are_of_the_whole_split_where_it_was_scored(metrics: pd.DataFrame) -> None:
    by_position = metrics["position"].notna() & (metrics["name"] == "loss")
    assert by_position.any()
    counted = metrics.assign(n=np.where(by_position, 1 + metrics["position"], np.nan))
    (ax,) = comparison.final_values(counted[counted["model"] == "gpt2"]).axes
    rows = training.last_rows(counted[by_position & (counted["model"] == "gpt2")])
    whole = (rows["value"] * rows["n"]).sum() / rows["n"].sum()
    assert texts(ax) == [f"{whole:.3f}"] != ["3.250"]


def test_position_differences_cancel_the_text(metrics: pd.DataFrame) -> None:
    humps = metrics.assign(value=metrics["value"] + 5 * (metrics["position"] % 2).fillna(0))
    slope = humps["position"].fillna(0) * (humps["model"] == "scanlm")
    humps = humps.assign(value=humps["value"] - 0.1 * slope)
    (ax,) = comparison.position_differences(humps, "gpt2", chunk_size=3).axes
    line = next(line for line in ax.lines if line.get_label() == "scan model")
    assert list(line.get_ydata()) == pytest.approx([0, -0.1, -0.2, -0.3, -0.4, -0.5])
    assert [x.get_xdata()[0] for x in ax.lines if x.get_xdata()[0] == 2.5] == [2.5]
    with pytest.raises(ScanLMError, match="Did you mean 'gpt2'"):
        comparison.position_differences(humps, "gpt")


def test_influence_by_distance_is_a_mean_over_predictions() -> None:
    steps = np.subtract.outer(np.arange(8), np.arange(8))
    halving = np.where(steps >= 0, 0.5 ** np.maximum(steps, 0), 0.0)
    (ax,) = comparison.influence_by_distance({"gpt2": halving}, {"window": 4}).axes
    line = next(line for line in ax.lines if line.get_label() == "GPT-2")
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
    assert list(line.get_ydata()) == pytest.approx([0.5, 0.25, 0.125, 0.0625, 0.03125])
    assert texts(ax) == ["window"]
    with pytest.raises(ScanLMError, match="no influence maps"):
        comparison.influence_by_distance({})


def test_many_series_have_their_legend_beside_and_no_raw_values(metrics: pd.DataFrame) -> None:
    four = pd.concat(metrics.assign(model=f"{m}-{k}") for k, m in enumerate("abcd"))
    (ax,) = training.loss_by_position(four, window=3).axes
    assert len(ax.lines) == 4
    assert not ax.collections
    assert ax.get_legend().get_bbox_to_anchor().x0 > ax.bbox.x1 - 1


# Committed pictures


def export_run(
    folder: Path,
    chunk_size: int = 64,
    steps: int = 10,
    model: str | None = None,
    seed: int = 0,
    lr: float = 1e-3,
    loss: float | None = None,
    kind: str = "training",
    device: str = "a device",
    num_parameters: float = 1e6,
    **fields: object,
) -> None:
    """A small exported training run, of a scan model by default."""
    config = {"model_type": "scanlm", "chunk_size": chunk_size, "n_embd": 8, **fields}
    model = model or f"m_c{chunk_size}"
    name = f"{model}-{steps}-{config['model_type']}-{lr}-s{seed}"
    loss = 3.0 + 1 / chunk_size if loss is None else loss
    at = {"step": steps, "tokens": steps * 100}
    record = {
        "run_id": name,
        "experiment": "enwiki2019",
        "model": model,
        "seed": seed,
        "parameters": {
            "kind": kind,
            "batch_size": 2,
            "seq_len": 256,
            "steps": steps,
            "lr": lr,
            "config": config,
        },
        "status": "finished",
        "device": {"name": device},
        "summary": {
            "tokens": steps * 100,
            "steps": steps,
            "loss": loss,
            "num_parameters": num_parameters,
        },
        "metrics": [
            {"name": "loss", "value": loss, "split": "validation", "flops": 7.0 * steps, **at},
            {"name": "tokens_per_second", "value": 1000.0 * chunk_size, "split": "train", **at},
        ],
    }
    path = folder / "enwiki2019" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def test_chunk_sizes_are_compared_between_runs_that_are_alike(tmp_path: Path) -> None:
    for c in (32, 64, 128):
        export_run(tmp_path, c)
    export_run(tmp_path, 256, steps=900)  # trained longer
    export_run(tmp_path, 512, n_embd=16)  # wider
    export_run(tmp_path, 16, model_type="mamba2")  # a chunk size of another kind
    quality, speed = figures.FIGURES["chunk_sizes"](figures.Records(tmp_path)).axes
    for ax in (quality, speed):
        assert [t.get_text() for t in ax.get_xticklabels()] == ["32", "64", "128"]
    note = " ".join(quality.figure.get_supxlabel().split())
    assert note.endswith("m_c128: at most two chunks a sequence, so T1 is never called")


def test_models_are_compared_on_the_same_tokens_at_their_best_lr(tmp_path: Path) -> None:
    for seed in (0, 1):
        export_run(tmp_path, model="scanlm", seed=seed, loss=2.0 + seed)
        export_run(tmp_path, model="gpt2", seed=seed, loss=4.0, model_type="gpt2")
        export_run(tmp_path, model="gpt2", seed=seed, loss=3.0, lr=1e-4, model_type="gpt2")
    export_run(tmp_path, model="gla", steps=900, loss=1.0)  # more tokens
    runs = figures.compared_runs(figures.Records(tmp_path).runs("enwiki2019"))
    assert sorted(zip(runs["model"], runs["lr"], runs["seed"], strict=True)) == [
        ("gpt2", 1e-4, 0),
        ("gpt2", 1e-4, 1),
        ("scanlm", 1e-3, 0),
        ("scanlm", 1e-3, 1),
    ]
    (ax,) = figures.FIGURES["comparison_final"](figures.Records(tmp_path)).axes
    assert texts(ax) == ["3.000", "2.500"]
    assert "and 3 more runs" in ax.figure.get_supxlabel()


def test_a_caption_names_every_device(tmp_path: Path) -> None:
    for model, device in (("a", "an H100"), ("b", "an H200"), ("c", "an H200"), ("d", "an H100")):
        export_run(tmp_path, model=model, device=device)
    figure = figures.FIGURES["comparison_final"](figures.Records(tmp_path))
    note = " ".join(figure.get_supxlabel().split())
    assert "; an H100; " in note
    assert note.endswith("and 3 more runs; b, c on an H200")


def test_resized_models_are_called_by_their_families(tmp_path: Path) -> None:
    for model, parameters, loss in (("scanlm_base_c64", 25e6, 2.0), ("gla_170M", 27e6, 3.0)):
        for seed in (0, 1):
            export_run(
                tmp_path, model=model, seed=seed, loss=loss + seed, num_parameters=parameters
            )
    (tmp_path / "enwiki2019").rename(tmp_path / figures.SMALL)
    (ax,) = figures.FIGURES["comparison_small_final"](figures.Records(tmp_path)).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["GLA", "scan model"]
    assert texts(ax) == ["3.500", "2.500"]
    note = " ".join(ax.figure.get_supxlabel().split())
    assert note.endswith("; and 3 more runs; models of 25.0 to 27.0 million parameters")


def export_speed(folder: Path, seed: int, *variants: tuple[str, str]) -> None:
    """An exported benchmark of training: (model, mode) at two lengths."""
    run = Run.create("training_speed", "scanlm", {"seed": seed}, seed, root=folder / "runs")
    for model, mode in variants:
        for length in (512, 1024):
            axes = {"part": "step", "model": model, "mode": mode, "compiled": "no"}
            axes |= {"length": length, "batch_size": 1024 // length, "dtype": "bfloat16"}
            axes |= {"chunk_size": 64} if model == "scanlm" else {}
            run.log("tokens_per_second", 1e3 + seed, **axes)
    run.finish({})
    export(run.folder, folder / "results")


def test_speed_is_of_the_record_with_most_models(tmp_path: Path) -> None:
    export_speed(tmp_path, 0, ("scanlm", "blelloch"), ("gpt2", "default"))
    records = figures.Records(tmp_path / "results")
    with pytest.raises(figures.NoRecords):
        figures.FIGURES["training_modes_by_length"](records)
    export_speed(tmp_path, 1, ("scanlm", "blelloch"), ("scanlm", "sequential"))
    for name, expected, title in (
        ("training_speed_by_length", {"scan model": 1000.0, "GPT-2": 1000.0}, "Training speed by"),
        (
            "training_modes_by_length",
            {"scan model": 1001.0, "scan model, sequential": 1001.0},
            "One tree",
        ),
    ):
        (ax,) = figures.FIGURES[name](records).axes
        assert ax.get_title(loc="left").startswith(title)
        assert not ax.get_title(loc="center")  # where a second one would lie over it
        drawn = {line.get_label(): line.get_ydata() for line in ax.lines if len(line.get_ydata())}
        assert {label: values[0] for label, values in drawn.items()} == expected


def test_curves_of_training_are_of_runs_that_were_trained(tmp_path: Path) -> None:
    export_run(tmp_path, model="a_scored_model", kind="evaluation")
    (tmp_path / "enwiki2019").rename(tmp_path / "wikitext103")
    draw = figures.FIGURES["loss_wikitext103"]
    with pytest.raises(figures.NoRecords, match="no finished training"):
        draw(figures.Records(tmp_path))
    export_run(tmp_path, model="scanlm")
    (trained,) = (tmp_path / "enwiki2019").iterdir()
    trained.rename(tmp_path / "wikitext103" / trained.name)
    caption = draw(figures.Records(tmp_path)).get_supxlabel()
    assert caption.startswith("scanlm; ")
    assert "more run" not in caption


def export_score(folder: Path, of: str, corpus: str, bits: float, **parameters: object) -> None:
    """An exported evaluation of a run of ``export_run``."""
    known = {"kind": "evaluation", "target": of, "context": "blocks", "split": "test"}
    record = {
        "run_id": f"{of}-{corpus.replace('#', '-')}-{len(list(folder.glob('*/*')))}",
        "experiment": corpus.partition("#")[0],
        "model": of.partition("-")[0],
        "seed": 0,
        "parameters": {**known, "corpus": corpus, **parameters},
        "status": "finished",
        "started": f"2026-01-01T00:00:{len(list(folder.glob('*/*'))):02d}Z",
        "device": {"name": "a device"},
        "summary": {"bits_per_byte": bits},
        "metrics": [],
    }
    path = folder / record["experiment"] / f"{record['run_id']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))


def test_texts_show_the_compared_models_in_a_panel_each(tmp_path: Path) -> None:
    export_run(tmp_path, model="scanlm", lr=1e-3, loss=2.0)
    export_run(tmp_path, model="scanlm", lr=1e-2, loss=3.0)
    export_run(tmp_path, model="gpt2", model_type="gpt2")
    best, other = "scanlm-10-scanlm-0.001-s0", "scanlm-10-scanlm-0.01-s0"
    draw = figures.FIGURES["comparison_texts"]
    export_score(tmp_path, best, "wikitext103", 9.0, context="sliding")
    with pytest.raises(figures.NoRecords, match="no compared model was scored"):
        draw(figures.Records(tmp_path))
    export_score(tmp_path, best, "wikitext103", 9.0)
    export_score(tmp_path, best, "wikitext103", 2.0, precision="bf16")  # scored again
    for different in ({"max_tokens": 100}, {"original_positions": True}, {"chunk_size": 8}):
        export_score(tmp_path, best, "wikitext103", 9.0, **different)
    export_score(tmp_path, best, "wikitext103#detokenized", 1.0)
    export_score(tmp_path, other, "wikitext103", 5.0)
    export_score(tmp_path, best, "enwiki2019", 4.0, split="validation")
    gpt2 = "gpt2-10-gpt2-0.001-s0"
    export_score(tmp_path, gpt2, "wikitext103#detokenized", 1.5)
    easy, hard = draw(figures.Records(tmp_path)).axes
    assert easy.get_title(loc="left") == "wikitext103#detokenized\ntest"
    assert texts(easy) == ["1.500", "1.000"]  # from below
    assert texts(hard) == ["2.000"]  # GPT-2 was not scored there
    assert [label.get_text() for label in easy.get_yticklabels()] == ["GPT-2", "scan model"]
    assert "and 2 more runs" in easy.figure.get_supxlabel()


def test_ablations_on_text_are_named_by_what_they_change(tmp_path: Path) -> None:
    from scanlm.config import ScanLMConfig

    plain = ScanLMConfig.preset("base", chunk_size=64).to_dict()
    for seed, changed, loss in (
        (0, {}, 2.0),
        (1, {}, 3.0),
        (2, {"t1_layers": 2}, 4.0),
        (3, {"leaf_norm": False, "tie_word_embeddings": True}, 5.0),
    ):
        export_run(tmp_path, model="scanlm_base_c64", seed=seed, loss=loss, **{**plain, **changed})
    for steps, lr in ((900, 1e-3), (10, 1e-2)):  # longer, and at another rate: not alike
        export_run(tmp_path, steps=steps, model="scanlm_base_c64", seed=9, loss=9.0, lr=lr, **plain)
    (tmp_path / "enwiki2019").rename(tmp_path / "enwiki2019_ablations")
    (ax,) = figures.FIGURES["text_ablations"](figures.Records(tmp_path)).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "no norm on the leaves; tied embeddings",
        "T1 layers 2",
        "ScanLM base, chunks of 64",
    ]
    assert texts(ax) == ["5.000", "4.000", "2.500"]


def test_a_long_comparison_wins_over_a_short_one_of_more_models(tmp_path: Path) -> None:
    for model in ("scanlm", "gla", "gpt2"):
        export_run(tmp_path, model=model)
    for model in ("scanlm", "gpt2"):
        export_run(tmp_path, model=model, steps=900)
    runs = figures.compared_runs(figures.Records(tmp_path).runs("enwiki2019"))
    assert {(run["model"], run["summary.steps"]) for _, run in runs.iterrows()} == {
        ("scanlm", 900),
        ("gpt2", 900),
    }


def test_a_notebook_shows_a_recorded_figure_or_says_that_there_is_none(tmp_path: Path) -> None:
    assert "Nothing is recorded yet" in str(figures.recorded("comparison", tmp_path))
    for c in (32, 64):
        export_run(tmp_path, c)
    assert isinstance(figures.recorded("chunk_sizes", tmp_path), Figure)
    with pytest.raises(ScanLMError, match="Did you mean 'comparison'"):
        figures.recorded("comparisn", tmp_path)


def test_one_chunk_size_is_no_comparison(tmp_path: Path) -> None:
    export_run(tmp_path, 32)
    export_run(tmp_path, 64, steps=900)
    with pytest.raises(figures.NoRecords, match="differ in chunk size"):
        figures.FIGURES["chunk_sizes"](figures.Records(tmp_path))


@pytest.fixture
def three_figures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all figures there are: two from records, and one that needs none."""
    names = ["loss_embedded", "comparison_final", "scan_tree"]
    monkeypatch.setattr(figures, "FIGURES", {name: figures.FIGURES[name] for name in names})
    return names


def test_figures_without_records_are_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, three_figures: list[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        written = list(figures.make_figures(tmp_path, tmp_path / "out"))
    assert written == [tmp_path / "out" / "scan_tree.png"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    assert "figure loss_embedded skipped" in caplog.text


def test_a_named_figure_without_records_is_an_error_after_the_others(
    tmp_path: Path, three_figures: list[str]
) -> None:
    made = figures.make_figures(tmp_path, tmp_path / "out", three_figures)
    assert next(made).name == "scan_tree.png"
    message = "loss_embedded not drawn: no records in .*embedded; make them with .*data/README.md"
    with pytest.raises(ScanLMError, match=message):
        next(made)


def test_a_damaged_record_stops_no_figure_that_does_without_it(
    tmp_path: Path, three_figures: list[str]
) -> None:
    export_run(tmp_path, model="scanlm")
    export_run(tmp_path, model="gpt2", model_type="gpt2")
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded" / "cut_off.json").write_text("{")
    made = figures.make_figures(tmp_path, tmp_path / "out")
    assert [next(made).stem for _ in range(2)] == ["comparison_final", "scan_tree"]
    with pytest.raises(ScanLMError, match=r"loss_embedded not drawn: .*cut_off.json is not JSON"):
        next(made)


def test_a_figure_is_the_same_file_when_made_again(tmp_path: Path) -> None:
    first, again = (
        next(figures.make_figures(out=tmp_path / folder, names=["architecture"])).read_bytes()
        for folder in "ab"
    )
    assert again == first


def test_unknown_figure_names_the_nearest_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ScanLMError, match="Did you mean 'scan_tree'"):
        next(figures.make_figures(out=tmp_path / "out", names=["architecture", "scantree"]))
    assert not (tmp_path / "out").exists()


def test_results_are_found_from_a_folder_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert figures.find_results() == tmp_path / "data" / "results"
    assert figures.find_results("no/such/folder") == Path("no/such/folder")


def test_plotting_imports_neither_torch_nor_pyplot() -> None:
    code = (
        "import sys, scanlm.plotting.figures; "
        "print([m for m in ('torch', 'transformers', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_record_of_batch_sizes_alone_is_not_drawn_along_positions(tmp_path: Path) -> None:
    for positions in ([], [10]):
        parameters = {"positions": positions, "max_new_tokens": 0}
        run = Run.create("inference", "base", parameters, 0, root=tmp_path / "runs")
        run.log("tokens_per_second", 1.0, part="batches", model="scanlm", batch_size=1)
        run.finish({})
        export(run.folder, tmp_path / "results")
    runs = figures._inference_runs(figures.Records(tmp_path / "results"), "base")
    assert [p["positions"] for p in runs["parameters"]] == [[10]]
