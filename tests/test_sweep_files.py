"""The committed sweep files: each can be planned, and what issue and README promise is in it."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scanlm.baselines import build_model, load_entry
from scanlm.curriculum_settings import StateTrackingSettings, preset_settings
from scanlm.curriculum_step import build_model as build
from scanlm.settings import TrainingSettings, resolve_settings
from scanlm.sweeps.files import read_sweep
from scanlm.sweeps.plans import SweepRun, plan
from scanlm.values import parse_assignments

FOLDER = Path(__file__).parent.parent / "notebooks" / "sweeps"
FILES = sorted(FOLDER.glob("*.yaml"))


def runs(name: str) -> list[SweepRun]:
    return plan(read_sweep(FOLDER / f"{name}.yaml"))


def jobs(name: str) -> list[StateTrackingSettings]:
    return [run.settings for run in runs(f"s5_{name}") if run.settings is not None]


def training(run: SweepRun) -> TrainingSettings:
    """The settings that the run's command gives."""
    word, model, option, corpus, *sets = run.words
    assert (word, option) == ("train", "--corpus")
    assert set(sets[::2]) == {"--set"}
    return resolve_settings(model, None, {"corpus": corpus} | parse_assignments(sets[1::2]))


def tokens(settings: StateTrackingSettings) -> int:
    return sum(stage.max_steps * stage.batch * stage.length for stage in settings.stages)


def without_seed(settings: StateTrackingSettings) -> str:
    return settings.model_copy(update={"seed": 0}).model_dump_json()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_what_it_is_and_how_it_is_run(path: Path) -> None:
    comment = path.read_text().partition("run: ")[0]
    assert comment.startswith("# ")
    assert f"#   scanlm sweep notebooks/sweeps/{path.name}" in comment
    content = read_sweep(path)
    assert content.description
    assert len(plan(content)) > 1  # which refuses a run that is listed twice


def test_the_scan_model_runs_with_ten_seeds() -> None:
    listed = jobs("scan")
    assert [settings.seed for settings in listed] == list(range(10))
    assert {without_seed(s) for s in listed} == {without_seed(preset_settings("paper"))}


def test_other_beginnings_run_with_the_same_seeds() -> None:
    listed = jobs("beginnings")
    assert [settings.seed for settings in listed] == 3 * list(range(10))
    found = [(s.stages[0].generators, s.stages[1].t1_from_t2) for s in listed[::10]]
    assert sorted(found) == [(0, False), (0, True), (0.5, False)]
    recipe = preset_settings("paper", {"eval_precisions": ["bf16"]})
    assert len({without_seed(s) for s in listed}) == 3
    for settings in listed:
        stages = [
            stage.model_copy(update={"generators": own.generators, "t1_from_t2": own.t1_from_t2})
            for stage, own in zip(settings.stages, recipe.stages, strict=True)
        ]
        assert without_seed(settings.model_copy(update={"stages": tuple(stages)})) == without_seed(
            recipe
        )


def test_all_baselines_run_with_three_seeds_on_the_same_tokens() -> None:
    listed = jobs("baselines")
    kinds = Counter(
        (
            s.model,
            s.config.get("allow_neg_eigval"),
            s.stages[-1].lr / s.stages[0].lr,
            s.stages[0].generators,
            s.stages[-1].dropout,
        )
        for s in listed
    )
    assert set(kinds.values()) == {3}
    delta, gla = "gated_deltanet_170M_baseline", "gla_170M_baseline"
    better = {
        ("gpt2_small_wikitext103_nodrop", None, 1),
        (gla, None, 1),
        (delta, True, 0.25),
        (delta, False, 1),
        ("mamba2_130M", None, 1),
        ("window_gpt2_small", None, 1),
    }
    other = {(gla, None, 0.25), (delta, True, 1), (delta, False, 0.25)}
    assert {kind[:3] for kind in kinds if kind[3:] == (0, 0)} == better | other
    assert {kind[:3] for kind in kinds if kind[3:] == (0.5, 0)} == better
    assert {kind for kind in kinds if kind[4]} == {(delta, True, 0.25, 0.5, 0.2)}
    assert all(s.stages[-1].lr == s.stages[-2].lr for s in listed)  # both long stages
    assert len({s.stages[-3].length for s in listed}) == 1
    assert len({tokens(s) for s in listed}) == 1
    assert all(stage.threshold is None for s in listed for stage in s.stages)


def test_the_search_covers_every_baseline() -> None:
    rates: dict[Any, dict[int, list[float]]] = {}
    for s in jobs("baselines_search"):
        kind = (s.model, s.config.get("allow_neg_eigval"))
        found = rates.setdefault(kind, {2: [], 4: []})
        found[s.stages[0].length].append(s.stages[0].lr)
    assert set(rates) == {(s.model, s.config.get("allow_neg_eigval")) for s in jobs("baselines")}
    for found in rates.values():
        assert len(set(found[2])) == len(found[2]) >= 3
        assert found[4] == [sorted(found[2])[1]]  # the other curriculum


def test_baselines_build_at_sizes_near_gpt2s() -> None:
    sizes = {}
    for settings in jobs("baselines"):
        model = build_model(settings.model, vocab_size=120, device="meta", **settings.config)
        sizes[settings.model] = sum(p.numel() for p in model.parameters())
    gpt2 = sizes["gpt2_small_wikitext103_nodrop"]
    assert all(0.9 < size / gpt2 < 1.15 for size in sizes.values()), sizes


def test_every_ablation_differs_from_the_recipe_and_has_three_seeds() -> None:
    listed = jobs("ablations")
    kinds = Counter(without_seed(s) for s in listed)
    assert set(kinds.values()) == {3}
    evaluated = {"eval_precisions": ["bf16"]}
    assert without_seed(preset_settings("paper", evaluated)) not in kinds
    assert without_seed(preset_settings("original", evaluated | {"compile": True})) in kinds
    scan = [s for s in listed if s.seed == 0]
    assert {s.stages[-1].length for s in scan} == {8, 16, 32}
    assert {s.stages[0].length for s in scan} == {2, 3, 4}
    assert {s.config["chunk_size"] for s in scan} == {1, 2, 4}
    assert {s.config["t1_layers"] for s in scan} == {1, 2}
    assert {stage.dropout for s in scan for stage in s.stages[:1]} == {0.0, 0.1}


def test_every_ablation_builds() -> None:
    narrow = {"n_embd": 12, "n_head": 2}
    for settings in jobs("ablations"):
        if settings.seed == 0:
            config = settings.config | narrow
            build(settings.model_copy(update={"config": config}))


def test_the_comparison_trains_ten_models_on_the_same_tokens() -> None:
    listed = runs("comparison")
    settings = [training(run) for run in listed]
    assert sorted(s.model for s in settings) == sorted(
        [
            *(f"scanlm_base_c{size}" for size in (32, 64, 128, 256, 512)),
            "gpt2_small_wikitext103_nodrop",
            "gpt2_small_untied",
            "window_gpt2_small",
            "gla_170M",
            "gated_deltanet_170M",
        ]
    )
    assert {run.sizes["tokens"] for run in listed} == {63_897_600}
    own = {"model", "lr", "compile"}
    assert len({s.model_dump_json(exclude=own) for s in settings}) == 1
    assert (settings[0].corpus, settings[0].tokenizer) == ("./enwiki2019", "./gpt2")
    assert (settings[0].experiment, settings[0].dropout) == ("enwiki2019", 0)
    eager = {s.model for s in settings if not s.compile}
    assert eager == {"gla_170M", "gated_deltanet_170M"}
    assert all(124e6 < run.sizes["num_parameters"] < 191e6 for run in listed)


def test_the_search_covers_every_family_of_the_comparison() -> None:
    def compiled(name: str) -> dict[str, bool]:
        return {s.model: s.compile for s in map(training, runs(name))}

    listed = [training(run) for run in runs("comparison_lr")]
    rates = Counter((s.model, s.lr) for s in listed)
    assert set(rates.values()) == {1}
    searched = {load_entry(model).family for model, _ in rates}
    compared = {load_entry(model).family for model in compiled("comparison")}
    assert searched == compared - {"window_gpt2"}  # takes GPT-2's
    assert min(Counter(model for model, _ in rates).values()) == 3
    assert compiled("comparison_lr").items() <= compiled("comparison").items()
    assert {s.experiment for s in listed} == {"enwiki2019_lr"}  # never mixed with the comparison


def small_search() -> list[tuple[SweepRun, TrainingSettings]]:
    return [(run, training(run)) for run in runs("small_lr")]


def test_the_small_study_searches_three_rates_for_each_family_but_the_window() -> None:
    rates = Counter(s.model for _, s in small_search())
    models = {training(run).model for run in runs("small_seeds")}
    assert rates == dict.fromkeys(models - {"window_gpt2_small"}, 3)


def test_the_small_study_has_models_of_one_size_and_three_seeds() -> None:
    listed = runs("small_seeds")
    sizes = {training(run).model: run.sizes["num_parameters"] for run in listed}
    assert len(sizes) == 5
    assert max(sizes.values()) < 1.05 * min(sizes.values())
    assert all(20e6 < size < 30e6 for size in sizes.values())
    assert Counter(training(run).model for run in listed) == dict.fromkeys(sizes, 3)
    assert {training(run).seed for run in listed} == {0, 1, 2}
    searched = {(run.sizes["num_parameters"], s.model, s.lr) for run, s in small_search()}
    for run in listed:  # with a rate that was searched for this very model; the window has GPT-2's
        s = training(run)
        model = s.model.replace("window_gpt2_small", "gpt2_small_wikitext103_nodrop")
        assert (run.sizes["num_parameters"], model, s.lr) in searched
    text = (FOLDER / "small_seeds.yaml").read_text()
    assert all(f"{model}  # {size:,}" in text for model, size in sizes.items())
