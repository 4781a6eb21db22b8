"""The training benchmark: what is planned, timed and recorded; nothing stops the rest."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import GPT2LMHeadModel
from typer.testing import CliRunner

from scanlm.benchmark import training as bench
from scanlm.benchmark.failures import is_out_of_memory
from scanlm.benchmark.kernel_times import kind_of, short_name
from scanlm.benchmark.training import TrainingSpeedSettings, benchmark_training, plan
from scanlm.benchmark.training_step import TrainingStep, Work, build, flops_per_token
from scanlm.cli import app
from scanlm.errors import ScanLMError
from scanlm.plotting import speed
from scanlm.records import Run, export, read_metrics

CPU = torch.device("cpu")
MODELS = ("scanlm_tiny", "gpt2_tiny")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_peak", lambda device, dtype: 1e11)


def tiny(root: Path, **changes: Any) -> TrainingSpeedSettings:
    fields: dict[str, Any] = {
        "models": MODELS,
        "chunk_sizes": (16, 8),
        "seq_lens": (32, 64),
        "batch_tokens": 64,
        "steps": 3,
        "device": "cpu",
        "root": str(root),
    }
    return TrainingSpeedSettings(**{**fields, **changes})


def work(model: str, mode: str, **changes: Any) -> Work:
    fields = {"part": "step", "compiled": "no", "chunk_size": None, "length": 32, "batch_size": 2}
    return Work(model=model, mode=mode, **{**fields, **changes})


# What is planned


def test_the_most_important_comes_first_and_nothing_twice(tmp_path: Path) -> None:
    items = list(plan(tiny(tmp_path, compile=True, seq_lens=(32, 64, 512))))
    assert items[0] == work("scanlm_tiny", "blelloch", compiled="yes", chunk_size=16)
    assert items[1] == work("gpt2_tiny", "default", compiled="yes")
    assert [item.part for item in items[2:5]] == ["trainer", "loader", "loading"]
    assert len(items) == len(set(items)) == len({item.label for item in items})
    assert all(item.batch_size * item.length == 64 for item in items if item.length <= 64)
    longest = [item for item in items if item.length == 512]
    assert {item.batch_size for item in longest} == {1}
    # a tree of 32 chunks node by node is compiled, one of 64 is not
    unrolled = {i.length: i.compiled for i in items if i.mode == "sequential"}
    assert unrolled[512] == "yes"
    (other,) = [
        i
        for i in plan(tiny(tmp_path, compile=True, seq_lens=(32, 1024)))
        if i.length == 1024 and i.mode == "sequential"
    ]
    assert other.compiled == "no"
    assert [i for i in items if i.mode == "transformers" and i.compiled == "no"]  # as shipped


def test_chunk_sizes_take_the_registry_id_of_their_size(tmp_path: Path) -> None:
    items = plan(tiny(tmp_path, models=("scanlm_base_c64",), chunk_sizes=(64, 128, 48)))
    assert {item.model: item.chunk_size for item in items if item.length == 32} == {
        "scanlm_base_c64": 48,  # no id of its own; 64 was named before
        "scanlm_base_c128": 128,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": ("scanlm_tyny",)}, "unknown model 'scanlm_tyny'.*scanlm_tiny"),
        ({"parts": ("steps",)}, "unknown part 'steps'.*'step'"),
        ({"modes": ("sequentiel",)}, "unknown mode 'sequentiel'.*'sequential'"),
        ({"dtype": "bf16"}, "unknown dtype 'bf16'"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"seq_lens": (0,)}, "seq_lens: 0"),
        ({"models": ()}, "no models"),
        ({"num_workers": -1}, "num_workers=-1: expected"),
        ({"batch_tokens": 0}, "batch_tokens: 0 is not possible"),
        ({"seed": -1}, "seed=-1: expected"),
        ({"dtype": "float16"}, "dtype='float16' needs a GPU: use float32 or bfloat16"),
        ({"models": ("gpt2_tiny", "gpt2_tiny")}, "models: 'gpt2_tiny' is given twice"),
        ({"seq_lens": (32, 64, 32)}, "seq_lens: 32 is given twice"),
        ({"seq_lens": ()}, "seq_lens is empty: name at least one"),
        ({"parts": ()}, "no parts given: name some of step, trainer"),
        ({"parts": ("chunks",), "chunk_sizes": None}, "in part 'chunks': give chunk_sizes"),
        ({"parts": ("chunks",), "models": ("gpt2_tiny",)}, "in part 'chunks': .* a scan model"),
        ({"parts": ("lengths",), "seq_lens": (32,)}, "in part 'lengths': give two or more seq_l"),
        ({"parts": ("compiled",)}, "nothing to measure in part 'compiled': ask for compile"),
        ({"parts": ("modes",), "modes": ("default",)}, "in part 'modes': choose other modes"),
    ],
)
def test_mistakes(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ScanLMError, match=message) as error:
        benchmark_training(tiny(tmp_path, **values))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_modes_are_those_of_the_usual_models_where_none_are_named() -> None:
    assert TrainingSpeedSettings(modes=("sequential", "flash")).modes


# What is timed


@pytest.mark.parametrize("mode", ["default", "flash", "transformers"])
def test_all_modes_of_gpt2_compute_its_loss(mode: str) -> None:
    step = TrainingStep(work("gpt2_tiny", mode), CPU, "float32")
    plain = build(work("gpt2_tiny", "transformers"), CPU, seed=0)
    plain.load_state_dict(step.model.state_dict())
    assert (type(step.model) is GPT2LMHeadModel) == (mode == "transformers")
    batch = next(step.batches)
    with torch.no_grad():
        logits = plain(batch["input_ids"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["shift_labels"].flatten()
    )
    torch.testing.assert_close(step(), expected)


@pytest.mark.parametrize("mode", ["blelloch", "sequential"])
def test_a_step_trains(mode: str) -> None:
    step = TrainingStep(work("scanlm_tiny", mode, chunk_size=8), CPU, "bfloat16")
    assert step.model.config.train_mode == mode
    losses = [float(step()) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.01
    assert all(p.grad is None for p in step.model.parameters())


def test_positions_suffice_and_padding_is_not_counted() -> None:
    long = {"length": 4096, "batch_size": 1}
    gpt2 = build(work("gpt2_tiny", "flash", **long), torch.device("meta"), 0)
    assert gpt2.config.n_positions == 4096
    scan = build(work("scanlm_tiny", "blelloch", chunk_size=32, **long), torch.device("meta"), 0)
    assert scan.config.position_embedding == "chunk"
    short = build(work("scanlm_tiny", "blelloch", chunk_size=32), torch.device("meta"), 0)
    assert short.config.position_embedding == "absolute"
    operations = {flops_per_token(work("gpt2_tiny", m)) for m in ("flash", "transformers")}
    assert len(operations) == 1


# What is recorded


def test_everything_is_recorded_and_exported(tmp_path: Path) -> None:
    lines: list[str] = []
    run = benchmark_training(tiny(tmp_path), lines.append)
    assert run.finished
    metrics = read_metrics(run.folder)
    planned = {item.label for item in plan(tiny(tmp_path))}
    measured = metrics[metrics["name"] == "measured"]
    assert set(measured["label"]) == planned
    assert lines[0].startswith("nothing to measure in part 'compiled'")
    assert len(lines) == 1 + len(planned)
    speeds = metrics[metrics["name"] == "tokens_per_second"]
    assert (speeds["value"] > 0).all()
    axes = ["part", "model", "mode", "compiled", "length", "batch_size", "dtype", "n"]
    assert speeds[axes].notna().all(axis=None)
    used = metrics[metrics["name"] == "model_flops_utilisation"]
    assert set(used["peak"]) == {"measured"}
    row, cost = used.iloc[0], metrics[metrics["name"] == "flops_per_token"].iloc[0]
    assert row["value"] == pytest.approx(speeds.iloc[0]["value"] * cost["value"] / 1e11)
    assert "compile_seconds" in set(metrics["name"])
    assert {"trainer / step", "loading / step", "scan / GPT-2 at 32"} <= set(run.summary["ratios"])
    exported = export(run.folder, tmp_path / "results")
    assert len(read_metrics(exported)) == len(metrics)
    assert benchmark_training(tiny(tmp_path), lines.append).folder == run.folder
    assert lines[-1].startswith("already finished")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_bias_NNN", "products"),
        ("window_backward_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("triton_per_fused__to_copy_add_native_layer_norm_native_layer_norm_backward_3", "norms"),
        ("gelu_backward_kernel", "GELU"),
        ("cross_entropy_kernel", "loss"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", "optimiser"),
        ("aten::mm", "products"),
        ("aten::addmm", "products"),
        ("aten::mm_like", "other"),
        ("triton_red_fused_sum_0", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void at::native::(anonymous namespace)::add<float, 4>(int, float)", "at::native::add"),
        ("void cub::DeviceReduce<1>(int)", "cub::DeviceReduce"),
        ("rows_kernel", "rows_kernel"),
    ],
)
def test_kernels_have_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


def test_where_the_time_goes(tmp_path: Path) -> None:
    run = benchmark_training(tiny(tmp_path, parts=("kernels",), seq_lens=(64,)))
    metrics = read_metrics(run.folder)
    times = metrics[metrics["name"] == "kernel_milliseconds"].set_index("kind")["value"]
    assert {"products", "attention", "norms", "optimiser", "loss"} <= set(times.index)
    assert (times > 0).all()
    step = metrics.loc[metrics["name"] == "step_milliseconds", "value"].item()
    (ax,) = speed.by_kernel(metrics, source="from a test").axes
    drawn = {
        label.get_text(): bar.get_width()
        for label, bar in zip(ax.get_yticklabels(), ax.patches, strict=True)
    }
    gaps = pytest.approx(max(step - times.sum(), 0))
    assert drawn == {**times.to_dict(), "gaps": gaps}
    assert ax.get_title(loc="left").endswith(f", {step:,.1f} ms")


def test_no_memory_and_refusals_cost_only_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench._MEASURES["step"]

    def measure(s: Any, item: Work) -> Iterator[Any]:
        if item.model == "gpt2_tiny":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB\nmore")
        if item.mode == "sequential":
            raise RuntimeError("this kernel wants another GPU\nand more lines")
        yield from real(s, item)

    monkeypatch.setitem(bench._MEASURES, "step", measure)
    run = benchmark_training(tiny(tmp_path, parts=("step", "modes"), seq_lens=(32,)))
    assert run.finished
    assert len(run.summary["out_of_memory"]) == 3
    (refused,) = run.summary["not_available"]
    assert "sequential" in refused
    metrics = read_metrics(run.folder).set_index("name")
    assert metrics.loc["not_available", "reason"] == "RuntimeError: this kernel wants another GPU"
    assert len(run.summary["tokens_per_second"]) == 1


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = bench._MEASURES["step"], []

    def measure(s: Any, item: Work) -> Iterator[Any]:
        calls.append(item)
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield from real(s, item)

    monkeypatch.setitem(bench._MEASURES, "step", measure)
    settings = tiny(tmp_path, parts=("step",))
    with pytest.raises(KeyboardInterrupt):
        benchmark_training(settings)
    (folder,) = tmp_path.glob("*/*")
    assert Run.open(folder).status == "interrupted"
    assert benchmark_training(settings).finished
    assert [item.model for item in calls] == ["scanlm_tiny", "gpt2_tiny", "gpt2_tiny"]


def test_a_budget_ends_a_run_that_the_next_call_finishes(tmp_path: Path) -> None:
    lines: list[str] = []
    run = benchmark_training(tiny(tmp_path, parts=("step",), max_seconds=0.0), lines.append)
    assert run.status == "interrupted"
    assert "the same command goes on" in lines[-1]
    run = benchmark_training(tiny(tmp_path, parts=("step",), max_seconds=600.0), lines.append)
    assert run.finished


def test_failures_that_are_no_memory() -> None:
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_command(tmp_path: Path) -> None:
    words = "benchmark training --models scanlm_tiny --seq-lens 32 --batch-tokens 32 --steps 2"
    words += f" --parts step --device cpu --chunk-sizes 8 --root {tmp_path}"
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
    assert "step: scanlm_tiny, blelloch, not compiled, chunk 8, 1 x 32" in result.output
    assert list(tmp_path.glob("training_speed/*/summary.json"))
    for option, value in (("--seq-lens", "1k"), ("--parts", "")):
        result = CliRunner().invoke(app, ["benchmark", "training", option, value])
        assert result.exit_code == 1
        assert result.stderr.startswith("scanlm: ")


# What is drawn


def speeds() -> pd.DataFrame:
    rows = []
    for model, mode, compiled, chunk, factor in (
        ("scanlm_base_c64", "blelloch", "yes", 64, 3),
        ("gpt2_small", "default", "yes", None, 4),
        ("gpt2_small", "transformers", "no", None, 1),
        ("gpt2_small", "default", "no", None, 2),
        ("scanlm_base_c64", "blelloch", "whole", 64, 6),
        ("scanlm_base_c128", "blelloch", "yes", 128, 5),
    ):
        for length in (512, 1024) if chunk != 128 else (512,):
            axes = {"model": model, "mode": mode, "compiled": compiled, "chunk_size": chunk}
            axes |= {"part": "step", "length": length, "batch_size": 1024 // length, "run_id": "r"}
            rows.append({**axes, "name": "tokens_per_second", "value": 1e5 * factor * 512 / length})
            rows.append({**axes, "name": "peak_memory_bytes", "value": 1e9 * factor})
    rows.append({**rows[0], "part": "trainer", "value": 1.0})
    return pd.DataFrame(rows)


def test_bars_are_of_bare_steps_at_the_first_length() -> None:
    (ax,) = speed.by_model(speeds(), source="from a test").axes
    assert [patch.get_width() for patch in ax.patches] == [1e5, 2e5, 3e5, 4e5, 5e5, 6e5]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "gpt2_small, as in transformers, not compiled",
        "gpt2_small, not compiled",
        "ScanLM base, chunks of 64",
        "gpt2_small",
        "ScanLM base, chunks of 128",
        "ScanLM base, chunks of 64, compiled whole",
    ]


def test_chunk_sizes_of_one_model_are_told_apart() -> None:
    rows = speeds()
    rows["model"] = rows["model"].replace("scanlm_base_c128", "scanlm_base_c64")
    (ax,) = speed.by_model(rows).axes
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert {"scanlm_base, chunk 64", "scanlm_base, chunk 128"} <= set(labels)


def test_a_sequence_longer_than_the_step_is_no_part_of_the_line() -> None:
    long = speeds().query("model == 'scanlm_base_c64' and compiled == 'yes' and length == 512")
    rows = pd.concat([speeds(), long.assign(length=4096, batch_size=1, value=7e5)])
    (ax,) = speed.by_length(rows).axes
    (line,) = [line for line in ax.lines if line.get_label() == "ScanLM base, chunks of 64"]
    assert list(line.get_xdata()) == [512, 1024]
    (hollow,) = [other for other in ax.lines if list(other.get_xdata()) == [4096]]
    assert list(hollow.get_ydata()) == [7e5]
    assert hollow.get_markerfacecolor() == "none"
    assert "1,024 tokens a step (hollow: 4,096)" in ax.get_xlabel()


def test_what_all_measurements_have_in_common_is_no_variant() -> None:
    rows = speeds()
    (ax,) = speed.by_model(rows[rows["compiled"] == "no"]).axes
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["gpt2_small, as in transformers", "gpt2_small"]


def test_lines_over_length_and_chunk_size() -> None:
    (ax,) = speed.by_length(speeds()).axes
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in ax.lines}
    assert drawn["ScanLM base, chunks of 64"] == [3e5, 1.5e5]
    assert "ScanLM base, chunks of 128" not in drawn
    (memory,) = speed.by_length(speeds(), "peak_memory_bytes").axes
    found = {max(line.get_ydata(), default=None) for line in memory.lines}
    assert found - {None} == {2e9, 3e9, 4e9, 6e9}  # not of another way to call attention
    (chunks,) = speed.by_chunk_size(speeds()).axes
    assert list(chunks.lines[0].get_xdata()) == [64, 128]
    assert list(chunks.lines[0].get_ydata()) == [3e5, 5e5]


def test_records_of_another_kind_are_refused() -> None:
    with pytest.raises(ScanLMError, match="no part"):
        speed.by_model(speeds().drop(columns="part"))
    short = speeds()
    with pytest.raises(ScanLMError, match="one sequence length only"):
        speed.by_length(short[short["length"] == 512])
