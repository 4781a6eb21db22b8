"""The inference benchmark: what it times is right, all is recorded, nothing stops a sweep."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from scanlm.benchmark import inference, timing
from scanlm.benchmark.inference import InferenceSettings, benchmark_inference
from scanlm.benchmark.ratios import AIMS, inference_ratios
from scanlm.benchmark.subjects import SUBJECTS, Setting, Subject
from scanlm.cli import app
from scanlm.errors import ScanLMError
from scanlm.plotting import inference as draw
from scanlm.records import read_metrics, read_runs
from scanlm.report_tables import at_positions
from scanlm.scan import OnlineScan

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_bandwidth_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "measure_bandwidth", lambda device: 1e10)


def tiny(root: Path, **changes: Any) -> InferenceSettings:
    fields: dict[str, Any] = {
        "size": "tiny",
        "device": "cpu",
        "models": ("scanlm", "gpt2_graph"),
        "chunk_size": 8,
        "prompt_len": 5,
        "max_new_tokens": 40,
        "positions": (6, 30),
        "steps": 8,
        "batch_sizes": (1, 3),
        "batch_position": 10,
        "chunk_sizes": (4,),
        "root": str(root),
    }
    return InferenceSettings(**{**fields, **changes})


def subject(name: str, batch: int = 2) -> Subject:
    return SUBJECTS[name](Setting("tiny", 8, batch, torch.float32, CPU, 128, seed=1))


def prompt(batch: int = 2, tokens: int = 13) -> Tensor:
    return torch.randint(257, (batch, tokens), generator=torch.Generator().manual_seed(0))


# What is timed


def chosen(subject: Subject) -> Tensor:
    """The token a subject feeds next."""
    holder: Any = getattr(subject, "decoder", None) or getattr(subject, "static", None) or subject
    buffers = getattr(holder, "buffers", holder)
    return buffers.token.clone().flatten()


@pytest.mark.parametrize("name", [n for n in SUBJECTS if n != "scanlm_original"])
@torch.no_grad()
def test_subjects_decode_what_their_model_says(name: str) -> None:
    ids, found = prompt(), subject(name)
    found.room = 20
    found.prefill(ids)
    for _ in range(12):
        # the logits of the two best tokens may be equal up to rounding
        logits = found.model(ids).logits[:, -1]
        token = chosen(found)
        best = logits.max(-1).values
        torch.testing.assert_close(logits.gather(1, token[:, None])[:, 0], best, rtol=0, atol=1e-4)
        ids = torch.cat([ids, token[:, None]], dim=1)
        found.step()


@torch.no_grad()
def test_the_originals_loop_runs_t2_over_the_prefix_for_every_token() -> None:
    found = subject("scanlm_original", batch=1)
    found.prefill(prompt(1, 19))
    lengths: list[int] = []
    found.model.t2.register_forward_hook(lambda m, x, y: lengths.append(x[0][0].shape[1]))
    for _ in range(20):
        found.step()
    assert lengths == [8] * 20


@torch.no_grad()
@pytest.mark.parametrize("name", ["scanlm", "gpt2_dynamic", "gla"])
def test_bytes_read_for_a_token(name: str) -> None:
    found = subject(name, batch=1)
    found.prefill(prompt(1, 16))
    model = found.model
    blocks = {"scanlm": "t2", "gpt2_dynamic": "transformer.h", "gla": "model.layers"}[name]
    norm = {"gpt2_dynamic": "transformer.ln_f", "gla": "model.norm"}.get(name)
    parts = [model.get_submodule(p) for p in (blocks, norm, "lm_head") if p]
    if name == "scanlm":
        parts.append(model.leaf_norm)
    assert found.weight_bytes == sum(p.nbytes for part in parts for p in part.parameters())
    state = {"scanlm": 2 * 2 * 16 * 64 * 4, "gpt2_dynamic": 2 * 3 * 16 * 64 * 4}
    assert found.read_bytes() == state.get(name, found.state_bytes())


@torch.no_grad()
def test_mamba2_reads_a_prompt_in_pieces() -> None:
    found = subject("mamba2")
    lengths: list[int] = []
    found.model.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    found.piece = 6
    found.prefill(prompt())
    assert lengths == [6, 6, 1]
    assert torch.equal(found.token[:, 0], found.model(prompt()).logits[:, -1].argmax(-1))


def test_a_prompt_is_timed_as_often_as_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time_once", lambda function, device: 0.5)
    counts = [len(timing.time_prefill(lambda: None, s, CPU)) for s in (0.1, 1.1, 60.0)]
    assert counts == [1, 2, 5]


def test_ratios_are_of_the_fastest_gpt2_and_the_slowest_of_its_own() -> None:
    rows: list[dict[str, Any]] = [{"name": "bandwidth", "value": 1e9}]

    def add(model: str, position: float, **values: float) -> None:
        at = {"part": "positions", "model": model, "position": position}
        rows.extend({"name": name, "value": value, **at} for name, value in values.items())

    for position, scan, prompt_seconds in ((1000, 2.0, 0.1), (40_000, 2.5, 0.5), (131_072, 2.0, 1)):
        read = {"prefill_seconds": prompt_seconds, "read_bytes": 1e6, "state_bytes": 8.0}
        add("scanlm", position, ms_per_token=scan, **read)
    for position, fast, slow in ((1000, 4.0, 5.0), (40_000, 20.0, 10.0), (131_072, 40.0, 41.0)):
        add("gpt2_graph", position, ms_per_token=fast, prefill_seconds=9.0)
        add("gpt2_tuned", position, ms_per_token=slow, prefill_seconds=7.0)
    add("gpt2_math", 1000, ms_per_token=0.1)  # handicapped: not the best, whatever it takes
    add("scanlm_original", 1000, ms_per_token=30.0)
    add("gla", 1000, ms_per_token=8.0)
    add("gla", 40_000, ms_per_token=5.0)
    for batch, rate in ((1, 10.0), (64, 300.0)):
        row = {"name": "tokens_per_second", "value": rate, "part": "batches", "model": "scanlm"}
        rows.append({**row, "batch_size": batch})
    shape = {"t2_layers": 2, "n_embd": 8}
    parameters = {"sizes": {"scan": shape}, "chunk_size": 64, "batch_size": 1, "dtype": "float32"}
    found = inference_ratios(pd.DataFrame(rows), parameters)
    assert list(found) == list(AIMS)
    # states: 15 chunks are four digits 1, of 2,048 the most is eleven; the window counts as eight
    state = (8 + 1 + 2 * 11 - 1) / (8 + 1 + 2 * 4 - 1)
    assert list(found.values()) == [1.0, 0.5, 0.25, 0.05, 2.5, 15.0, 2.0, 7.0, state, 30.0]


def test_combines_of_a_push_are_those_of_the_counter() -> None:
    counter: OnlineScan[str] = OnlineScan(lambda a, b: a + b)
    for n in range(1, 200):
        before = counter.num_combines
        counter.push("x")
        assert inference.combines_of_push(n) == counter.num_combines - before


def test_steps_are_counted_by_time_and_period() -> None:
    calls: list[int] = []
    step = lambda: calls.append(1)  # noqa: E731
    assert timing.affordable_steps(step, 100, 60.0, CPU, multiple=8) == 104
    assert timing.affordable_steps(step, 100, 0.0, CPU, multiple=1) == 8
    assert len(calls) == 8  # the warm-up
    assert len(timing.time_steps(step, 5, CPU)) == 5
    summary = timing.summarize([1.0, 1.0, 4.0])
    assert (summary["ms_per_token"], summary["ms_per_token_mean"]) == (1.0, 2.0)


# Records


def test_a_run_records_every_part(tmp_path: Path) -> None:
    lines: list[str] = []
    run = benchmark_inference(tiny(tmp_path), report=lines.append)
    metrics = read_metrics(run.folder)
    assert run.finished
    assert run.info["experiment"] == "inference"
    assert len(lines) == 2 + 4 + 4 + 1
    for part, positions in (("positions", {6, 30}), ("timeline", {45}), ("batches", {10})):
        rows = metrics[(metrics["part"] == part) & (metrics["name"] == "ms_per_token")]
        assert set(rows["position"]) == positions
        assert set(rows["model"]) == {"scanlm", "gpt2_graph"}
    names = set(metrics["name"])
    assert names >= {"ms_per_token_mean", "ms_per_token_p99", "tokens_per_second"}
    assert names >= {"prefill_seconds", "state_bytes", "read_bytes", "border_ms", "ms_at_place"}
    assert (metrics["dtype"].dropna() == "float32").all()
    assert set(metrics[metrics["part"] == "chunks"]["chunk_size"]) == {4}
    borders = metrics[metrics["name"] == "border_ms"].set_index("combines")["n"]
    assert borders.to_dict() == {0: 1, 1: 3, 2: 1}  # chunks 1 to 5
    at = run.summary["positions"]["scanlm@30"]
    read = metrics[(metrics["name"] == "read_bytes") & (metrics["model"] == "scanlm")]
    assert at["floor_ms"] == pytest.approx(1e3 * read["value"].iloc[0] / 1e10)
    assert run.summary["tokens_per_second"].keys() >= {"scanlm@1", "scanlm@3"}
    spent = metrics[metrics["name"] == "kernel_milliseconds"]
    assert set(zip(spent["part"], spent["model"], strict=True)) == {("batches", "scanlm")}
    shown = draw.kernel_table(metrics)
    assert list(shown.columns) == [1, 3]
    total = spent[spent["batch_size"] == 3]["value"].sum()
    assert shown.loc["all kernels", 3] == shown.loc["others", 3] == pytest.approx(total)
    assert "products and norms, at least" not in shown.index  # a CPU has none of the kernels


def test_parts_may_be_of_fewer_models(tmp_path: Path) -> None:
    settings = tiny(tmp_path, timeline_models=("scanlm",), batch_models=("gpt2_graph",))
    models: dict[str, set[str]] = {}
    for work in inference._plan(settings):
        models.setdefault(work.part, set()).add(work.model)
    assert models == {
        "timeline": {"scanlm"},
        "positions": {"scanlm", "gpt2_graph"},
        "batches": {"gpt2_graph"},
        "chunks": {"scanlm"},
    }


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    settings = tiny(tmp_path, positions=(), batch_sizes=(), chunk_sizes=())
    first = benchmark_inference(settings, report=lambda line: None)
    lines: list[str] = []
    assert benchmark_inference(settings, report=lines.append).folder == first.folder
    assert lines[0].startswith("already finished")


def test_another_machine_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny(tmp_path, positions=(), batch_sizes=(), chunk_sizes=())
    first = benchmark_inference(settings, report=lambda line: None)
    monkeypatch.setattr("scanlm.provenance._cpu_model", lambda: "another CPU")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *device: "another GPU")
    other = benchmark_inference(settings, report=lambda line: None)
    assert other.folder != first.folder
    assert other.info["parameters"]["machine"].endswith(("another CPU", "another GPU"))


def test_an_interrupted_run_keeps_what_it_measured_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(tmp_path)
    real, measured = inference._steady, []

    def stops(settings: Any, work: Any, subject: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(work)
        return real(settings, work, subject)

    monkeypatch.setattr(inference, "_steady", stops)
    with pytest.raises(KeyboardInterrupt):
        benchmark_inference(settings, report=lambda line: None)
    runs = read_runs(tmp_path)
    assert list(runs["status"]) == ["interrupted"]
    kept = read_metrics(tmp_path)
    assert (kept["name"] == "measured").sum() == 4  # two timelines, two positions
    monkeypatch.setattr(inference, "_steady", real)
    lines: list[str] = []
    run = benchmark_inference(settings, report=lines.append)
    assert len(lines) == 11 - 4
    done = read_metrics(run.folder)
    keys = ["part", "model", "position", "batch_size", "chunk_size", "name", "kernel"]
    assert not done[done["part"] != "timeline"].duplicated(keys).any()
    assert len(read_runs(tmp_path)) == 1


class Greedy(Subject):
    """Stands for a model too large."""

    def __init__(self, setting: Setting, error: Exception) -> None:
        super().__init__(setting)
        self.error = error

    def prefill(self, prompt: Tensor) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (ScanLMError("needs a GPU"), "not_available"),
        (ValueError("a kernel refuses"), "not_available"),
    ],
    ids=str,
)
def test_a_model_that_does_not_fit_does_not_stop_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, name: str
) -> None:
    monkeypatch.setitem(SUBJECTS, "gpt2_graph", lambda setting: Greedy(setting, error))
    settings = tiny(tmp_path, models=("gpt2_graph", "scanlm"), batch_sizes=(), chunk_sizes=())
    run = benchmark_inference(settings, report=lambda line: None)
    metrics = read_metrics(run.folder)
    failed = metrics[metrics["name"] == name]
    assert set(failed["model"]) == {"gpt2_graph"}
    assert len(failed) == 3
    assert all(reason == f"{type(error).__name__}: {error}" for reason in failed["reason"])
    assert (metrics[metrics["name"] == "measured"]["model"] == "scanlm").sum() == 3


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "orginal"}, "unknown size 'orginal'. Did you mean 'original'"),
        ({"models": ("scanml",)}, "unknown model 'scanml'. Did you mean 'scanlm'"),
        ({"timeline_models": ("gpt3",)}, "unknown model 'gpt3'"),
        ({"batch_models": ("gpt3",)}, "unknown model 'gpt3'"),
        ({"timeline_models": ("gla",)}, "timeline_models: 'gla' is none of the models, scanlm"),
        ({"models": ()}, "no models given"),
        ({"dtype": "float23"}, "unknown dtype 'float23'. Did you mean 'float32'"),
        ({"device": "cudo"}, "device 'cudo' cannot be used"),
        ({"prompt_len": 0}, "an empty prompt cannot be read"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"positions": (10, 0)}, "positions: 0 is not possible"),
        ({"batch_sizes": (-2,)}, "batch_sizes: -2 is not possible"),
        ({"chunk_size": 0}, "chunk_size: 0 is not possible"),
        ({"seed": -1}, "seed=-1: expected an integer >= 0"),
        ({"models": ("gla", "scanlm", "gla")}, "models: 'gla' is given twice: leave one out"),
        ({"batch_sizes": (1, 1)}, "batch_sizes: 1 is given twice"),
        ({"picture": "speed.doc"}, "figure 'speed.doc' must end in .png, .pdf, .svg"),
        ({"picture": "/dev/null/a.png"}, "cannot write figure '/dev/null/a.png': Not a dir"),
        ({"picture": "a.png", "max_new_tokens": 0, "positions": (9,)}, "give max_new_tokens"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScanLMError) as caught:
        tiny(tmp_path, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ScanLMError, match="nothing to measure"):
        InferenceSettings(max_new_tokens=0)


def command(words: str) -> Any:
    return CliRunner().invoke(app, ["benchmark", "inference", *words.split()])


def test_the_command_measures_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "inference_speed.png"
    words = (
        f"--size tiny --device cpu --models scanlm,gpt2_dynamic --chunk-size 8 --prompt-len 3 "
        f"--max-new-tokens 20 --positions 5,9 --steps 4 --root {tmp_path} --picture "
    )
    done = command(f"{words} {picture}")
    assert done.exit_code == 0, done.output
    assert "run: " in done.output
    assert picture.read_bytes()[:4] == b"\x89PNG"
    (record,) = tmp_path.rglob("run.json")
    parameters = json.loads(record.read_text())["parameters"]
    assert parameters["max_new_tokens"] == 20
    assert parameters["positions"] == [5, 9]
    later = tmp_path / "later" / "again.svg"  # of the finished run, measured once
    assert "already finished" in command(f"{words} {later}").output
    assert later.is_file()


def test_the_commands_mistakes_are_one_line() -> None:
    done = command("--size huge")
    assert done.exit_code == 1
    assert done.stderr.startswith("scanlm: unknown size 'huge'.")
    assert done.stderr.count("\n") == 1


# Figures


def rows(name: str, part: str, values: dict[tuple[str, int], float]) -> list[dict[str, Any]]:
    shared = {"name": name, "part": part, "run_id": "r", "batch_size": 1, "chunk_size": 8}
    return [
        {**shared, "model": model, "position": position, "value": value}
        for (model, position), value in values.items()
    ]


@pytest.fixture
def metrics() -> pd.DataFrame:
    times = {("scanlm", 100): 2.0, ("scanlm", 10_000): 2.0}
    times |= {("gpt2_graph", 100): 1.0, ("gpt2_graph", 10_000): 4.0}
    times |= {("gpt2_math", 100): 0.1, ("gpt2_math", 10_000): 0.1}
    reads = dict.fromkeys(times, 1e7)
    found = rows("ms_per_token", "positions", times) + rows("read_bytes", "positions", reads)
    found += rows("ms_per_token_mean", "positions", times)
    return pd.DataFrame([*found, {"name": "bandwidth", "value": 1e10}])


def test_the_crossover_is_interpolated_and_the_handicapped_gpt2_ignored(
    metrics: pd.DataFrame,
) -> None:
    assert draw.crossover(metrics) == pytest.approx(1000)  # halfway, in logarithms
    figure = draw.time_by_position(metrics)
    assert "crossover at 1,000" in [t.get_text() for t in figure.axes[0].texts]
    slower = metrics.assign(value=metrics["value"].where(metrics["model"] != "scanlm", 9.0))
    assert draw.crossover(slower) is None


def test_the_table_compares_with_the_floor_and_with_gpt2(metrics: pd.DataFrame) -> None:
    table = draw.floor_table(metrics)
    assert table.loc[("scanlm", 100), "floor_ms"] == pytest.approx(1.0)
    assert table.loc[("scanlm", 100), "times_floor"] == pytest.approx(2.0)
    assert table.loc[("scanlm", 10_000), "to_best_gpt2"] == pytest.approx(0.5)
    rows = metrics[metrics["part"] == "positions"]
    batches = rows.assign(part="batches", batch_size=rows["position"] / 100)
    by_batch = draw.floor_table(pd.concat([metrics, batches]), by="batch_size")
    assert by_batch.index.names == ["model", "batch_size"]
    assert by_batch["times_floor"].tolist() == table["times_floor"].tolist()


def test_what_more_rows_bring_is_taken_apart() -> None:
    rows: list[dict[str, Any]] = [{"name": "bandwidth", "value": 1e9}]
    for batch, read, median, mean in ((1, 2e6, 4.0, 5.0), (8, 8e6, 8.0, 20.0)):
        found = {"read_bytes": read, "ms_per_token": median, "ms_per_token_mean": mean}
        at = {"part": "batches", "model": "scanlm", "batch_size": batch}
        rows += [{"name": name, "value": value, **at} for name, value in found.items()]
    gains = draw.batch_gains(pd.DataFrame(rows))
    assert gains.loc[1].tolist() == [2.0, 2.0, 1.0, 1.0, 1.0]
    assert gains.loc[8].tolist() == [8.0, 1.0, 2.0, 4.0, 2.0]


def test_kernels_that_overlap_leave_the_least_of_the_rest() -> None:
    rows: list[dict[str, Any]] = []
    for batch, window in ((1, 2.0), (64, 9.0)):
        at = {"part": "batches", "model": "scanlm", "batch_size": batch}
        steps = {"ms_per_token": 8.0, "ms_per_token_mean": 10.0}
        kernels = {"matrix_kernel": 7.0, "window_kernel": window, "embed_kernel": 1.0, "nvjet": 3.0}
        rows += [{"name": name, "value": value, **at} for name, value in steps.items()]
        rows += [
            {"name": "kernel_milliseconds", "value": value, "kernel": kernel, **at}
            for kernel, value in {**kernels, "Memset": 0.5}.items()
        ]
    assert draw.kernel_table(pd.DataFrame(rows)).to_dict() == {
        batch: {
            "the step, mean": 10.0,
            "the step, median": 8.0,
            "all kernels": 11.5 + window,
            "matrix_kernel": 7.0,
            "window_kernel": window,
            "embed_kernel": 1.0,
            "others": 3.5,
            "products and norms, at least": rest,
        }
        for batch, window, rest in ((1, 2.0, 5.0), (64, 9.0, 0.0))
    }
    assert draw.kernel_table(pd.DataFrame(rows[:2])).empty


def test_half_of_a_recorded_step_of_64_rows_is_products_and_norms() -> None:
    """As README and notebook 5 say; from records that no other table or figure takes."""
    results = Path(__file__).parents[1] / "data" / "results" / "inference"
    runs = read_runs(*results.glob("*.json"))
    with_kernels = []
    for run in runs.to_dict("records"):
        table = draw.kernel_table(read_metrics(run["path"]))
        if len(table):
            with_kernels.append((run["model"], run["run_id"]))
            step = table[64]
            assert step["products and norms, at least"] >= 0.5 * step["the step, median"]
    assert sorted(size for size, _ in with_kernels) == ["base", "original"]
    along = at_positions(runs)
    assert sorted(along["model"]) == ["base", "original"]
    assert not {name for _, name in with_kernels} & set(along["run_id"])


def test_figures_hold_the_measurements(tmp_path: Path) -> None:
    metrics = read_metrics(benchmark_inference(tiny(tmp_path), report=lambda line: None).folder)
    figures: dict[str, Callable[..., Any]] = {
        name: getattr(draw, name)
        for name in ("timeline", "time_by_position", "prefill", "memory", "borders")
    }
    for name, function in figures.items():
        figure = function(metrics, source="where from")
        figure.savefig(tmp_path / f"{name}.png")
        assert figure.get_supxlabel() == "where from"
    lines = draw.memory(metrics).axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [2, 2]
    assert len(draw.borders(metrics).axes[0].patches) == 8
    assert len(draw.throughput(metrics).axes[0].lines) == 2
    assert list(draw.chunk_sizes(metrics).axes[0].lines[0].get_xdata()) == [4, 8]
    with pytest.raises(ScanLMError, match=r"no 'ms_per_tokn'.* Did you mean 'ms_per_token'"):
        draw.select(metrics, "ms_per_tokn", "positions")
