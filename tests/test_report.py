"""The numbers in documents are those of the records."""

import math
from pathlib import Path
from typing import Any

import pytest

from scanlm.benchmark.ratios import most_state_bytes, most_states
from scanlm.decoder import Decoder
from scanlm.errors import ScanLMError
from scanlm.model import ScanLMConfig, ScanLMForCausalLM
from scanlm.records import Run, export, read_metrics, read_runs
from scanlm.report import (
    BEGIN,
    END,
    NOTHING,
    all_tables,
    results_section,
    update_documents,
)
from scanlm.report_tables import _rates, percent

ROOT = Path(__file__).parent.parent
SUMMARIES: dict[str, dict[str, Any]] = {
    "s5": {"parameters": 14_000_000, "steps": 700, "reach": {"float32": 180}},
    "parity": {"agree": False},
}


def record(folder: Path, kind: str, loss: float) -> None:
    parameters = {
        "kind": kind,
        "corpus": "wikitext-2",
        "split": "test",
        "context": "sliding",
        "stride": 64,
        "seq_len": 128,
        "config": {"model_type": "scanlm", "chunk_size": 16, "t1_causal": True},
    }
    run = Run.create("wikitext2", "scanlm_tiny", parameters, 3, root=folder / "runs")
    run.finish(
        {
            "loss": loss,
            "perplexity": 7.5,
            "num_tokens": 12345,
            "steps": 600,
            "tokens": 1_200_000,
            "num_parameters": 2_500_000,
            "unigram_entropy": 6.25,
        }
    )
    export(run.folder, folder / "data" / "results")


def exported(folder: Path, run: Run, *metrics: tuple[str, float, dict[str, Any]]) -> None:
    for name, value, axes in metrics:
        run.log(name, value, **axes)
    run.finish(SUMMARIES.get(run.info["experiment"], {}))
    export(run.folder, folder / "data" / "results")


def cells(text: str, place: int = -1) -> list[str]:
    """Of one row of the last table."""
    rows = [line for line in text.strip().splitlines() if line.startswith("|")]
    return [cell.strip() for cell in rows[place].strip("|").split("|")]


def section(folder: Path, title: str) -> str:
    """One table of the document."""
    return all_tables(folder / "data" / "results").split(f"## {title}\n")[1].split("\n## ")[0]


def inference(folder: Path) -> None:
    shape = {"t2_layers": 12, "n_embd": 768}
    parameters = {"sizes": {"scan": shape}, "chunk_size": 64, "batch_size": 1, "dtype": "bfloat16"}
    run = Run.create("inference", "base", parameters, 42, root=folder / "runs")
    metrics = [
        (name, value, {"part": "positions", "model": model, "position": position})
        for model, position, time, prompt, state in (
            ("scanlm", 1000, 0.2, 0.01, 5e6),
            ("scanlm", 10000, 0.2, 0.02, 5e6),
            ("scanlm", 40000, 0.25, 0.5, 6e6),
            ("gpt2_graph", 1000, 0.5, 0.02, 4e7),
            ("gpt2_graph", 10000, 0.75, 0.01, 4e8),
            ("gpt2_graph", 40000, 1.5, 0.75, 4e9),
            ("gpt2_tuned", 1000, 0.75, 0.02, 4e7),
            ("gpt2_tuned", 40000, 1.25, 0.75, 4e9),
        )
        for name, value in (
            ("ms_per_token", time),
            ("prefill_seconds", prompt),
            ("state_bytes", state),
        )
    ]
    out = {"part": "positions", "model": "mamba2", "position": 40000}
    first = {"part": "positions", "model": "mamba2", "position": 1000}
    exported(folder, run, *metrics, ("ms_per_token", 2.0, first), ("out_of_memory", 1.0, out))


def training_speed(folder: Path, **parameters: Any) -> None:
    run = Run.create("training_speed", "scanlm_base_c64", parameters, 0, root=folder / "runs")
    metrics = []
    for model, mode, chunk, speed in (
        ("scanlm_base_c64", "blelloch", 64, 1000.0),
        ("scanlm_base_c64", "blelloch", 32, 900.0),
        ("gpt2_small", "default", None, 3000.0),
        ("gpt2_small", "flash", None, 2000.0),
    ):
        axes = {"part": "step", "model": model, "mode": mode, "compiled": "yes"}
        axes |= {"length": 512, "batch_size": 64, "dtype": "bfloat16"}
        axes |= {"chunk_size": chunk} if chunk else {}
        metrics += [("tokens_per_second", speed, axes), ("peak_memory_bytes", 2e9, axes)]
        long = {**axes, "length": 131072, "batch_size": 1}
        metrics.append(("tokens_per_second", speed if "scanlm" in model else speed / 10, long))
        for peak, share in (("measured", 0.5), ("790 TFLOP/s", 0.4)):
            metrics.append(("model_flops_utilisation", share, {**axes, "peak": peak}))
    exported(folder, run, *metrics)


def trained(
    folder: Path, model: str, perplexity: float, experiment: str = "enwiki2019", seed: int = 0
) -> None:
    parameters = {"kind": "training", "lr": 1e-3}
    run = Run.create(experiment, model, parameters, seed, root=folder / "runs")
    summary = {"steps": 10, "tokens": 2_000_000, "num_parameters": 26_000_000}
    run.finish({"loss": math.log(perplexity), "perplexity": perplexity, **summary})
    export(run.folder, folder / "data" / "results")


def state_tracking(
    folder: Path, seed: int, right: float, model: str = "scan", longest: int = 1024
) -> None:
    stages = [{"length": 16, "dropout": 0.1}]
    run = Run.create("s5", model, {"stages": stages}, seed, root=folder / "runs")
    axes = {"split": "test", "dtype": "float32"}
    lengths = [n for n in (16, 180, 1024) if n <= longest]
    metrics = [("accuracy", right, {**axes, "length": n}) for n in lengths]
    exported(folder, run, *metrics)


def test_tables_hold_what_the_records_say(tmp_path: Path) -> None:
    assert NOTHING in all_tables(tmp_path / "data" / "results")
    record(tmp_path, "training", 2.0151)
    record(tmp_path, "evaluation", 2.5)
    training = section(tmp_path, "Training runs")
    assert cells(training)[:11] == [
        "scanlm_tiny", "16", "causal T1", "2.5 M", "`wikitext-2`", "600", "1.2 M", "", "3", "2.015",
        "6.250",
    ]  # fmt: skip
    assert "[record](wikitext2/scanlm_tiny-s3-" in training
    evaluation = section(tmp_path, "Evaluations")
    assert "| sliding, stride 64, 128 tokens | 2.500 | 7.50 |" in evaluation
    assert "12,345" in evaluation


def test_a_table_of_times_for_a_token(tmp_path: Path) -> None:
    inference(tmp_path)
    table = section(tmp_path, "Time for a token")
    assert cells(table, 2)[:7] == [
        "base", "scanlm", "0.200 ms", "0.200 ms", "0.250 ms", "0.500 s", "6.0 MB",
    ]  # fmt: skip
    assert cells(table)[:7] == ["base", "mamba2", "2.000 ms", "", "", "", ""]


def test_a_table_of_training_speed(tmp_path: Path) -> None:
    training_speed(tmp_path, checkpointing=True)
    way = "blelloch, compiled, bfloat16, activations computed again"
    assert cells(section(tmp_path, "Training speed"), 2)[:6] == [
        "scanlm_base_c64", "64", way, "64 x 512", "1,000", "50.0 %",
    ]  # fmt: skip
    assert [cells(section(tmp_path, "Training speed"), place)[1:5] for place in (3, 4)] == [
        ["64", way, "1 x 131,072", "1,000"],
        ["32", way, "64 x 512", "900"],
    ]
    text = results_section(tmp_path / "data" / "results", tmp_path)
    assert text == NOTHING  # of runs that compute activations again


def test_a_table_of_state_tracking(tmp_path: Path) -> None:
    state_tracking(tmp_path, 0, 0.99)
    row = cells(section(tmp_path, "State tracking on S5"))
    assert row[:2] == ["scan model", "0"]
    assert row[3:8] == ["700", "16, dropout 0.1", "99.000 %", "99.000 %", "180"]


def test_a_run_that_was_not_tested_at_any_length_has_empty_cells(tmp_path: Path) -> None:
    run = Run.create(
        "s5", "scan", {"stages": [{"length": 16, "dropout": 0.0}]}, 1, tmp_path / "runs"
    )
    exported(tmp_path, run)
    title = "State tracking on S5"
    assert f"## {title}\n" not in all_tables(tmp_path / "data" / "results")
    state_tracking(tmp_path, 0, 0.99)
    table = section(tmp_path, title)
    assert ["", ""] in [cells(table, place)[5:7] for place in (-1, -2)]


@pytest.mark.parametrize(
    ("score", "text"),
    [({"worst_position": 0.5}, "50.000 %"), ({"sequence": 0.25}, "25.000 % of words")],
)
def test_a_table_of_the_search(tmp_path: Path, score: dict[str, float], text: str) -> None:
    stages = [{"length": 4, "lr": 1e-3}]
    run = Run.create("s5", "gla_170M", {"stages": stages}, 0, root=tmp_path / "runs")
    found = [{"length": 4, "steps": 2500, "ended_by": "budget", **score}]
    run.finish({"stages": found, "tokens": 10_240_000, "reach": {"bfloat16": 0}})
    export(run.folder, tmp_path / "data" / "results")
    state_tracking(tmp_path, 0, 0.99)  # trained to 16, so that the other is a search
    title = "State tracking on S5: the search for the comparison models"
    row = cells(section(tmp_path, title))
    assert row[:4] == ["GLA", "0.001", f"2,500 steps, {text}", "10.2"]


def test_whole_curricula_that_were_surpassed_have_a_table_of_their_own(tmp_path: Path) -> None:
    state_tracking(tmp_path, 0, 0.99)  # trained to 16
    for late, reach in ((1e-3, 8), (2.5e-4, 16)):
        rates = ((2, 1e-3), (8, late), (16, late))
        stages = [{"length": n, "lr": lr, "dropout": 0.0} for n, lr in rates]
        run = Run.create("s5", "gla_170M", {"stages": stages}, 0, root=tmp_path / "runs")
        run.finish({"stages": [], "tokens": 82_000_000, "reach": {"bfloat16": reach}})
        export(run.folder, tmp_path / "data" / "results")
    title = "State tracking on S5: other whole curricula of comparison models"
    table = section(tmp_path, title)
    assert cells(table)[:6] == ["GLA", "0", "0.001", "16", "82.0", "8"]
    assert len([line for line in table.splitlines() if line.startswith("| GLA")]) == 1
    search = "the search for the comparison models"
    assert search not in all_tables(tmp_path / "data" / "results")


def test_a_table_tells_rates_that_change_within_a_curriculum() -> None:
    stages = [{"length": n, "lr": lr} for n, lr in ((2, 2e-3), (4, 2e-3), (8, 5e-4), (16, 5e-4))]
    assert _rates(stages) == "0.002, 0.0005 from length 8 on"


@pytest.mark.parametrize(
    ("share", "text"),
    [(1, "100 %"), (0.9999999, "99.999 %"), (0.5, "50.000 %"), (0, "0.000 %"), (None, "")],
)
def test_nothing_but_all_is_a_hundred_per_cent(share: float | None, text: str) -> None:
    assert percent(share) == text


def test_a_table_of_steps_a_second(tmp_path: Path) -> None:
    run = Run.create("state_tracking_speed", "scan", {}, 0, root=tmp_path / "runs")
    axes = {"way": "captured", "length": 3, "precision": "bf16"}
    metrics = [("steps_per_second", 100.0 * n, {**axes, "runs": n}) for n in (1, 5)]
    exported(tmp_path, run, *metrics, ("setup_seconds", 9.0, {**axes, "runs": 1}))
    table = section(tmp_path, "Training speed of state tracking")
    assert cells(table, 0)[:5] == [
        "length", "way", "precision", "1 side by side", "5 side by side",
    ]  # fmt: skip
    assert cells(table)[:5] == ["3", "captured", "bf16", "100", "500"]


def test_a_table_of_kernels_against_plain_torch(tmp_path: Path) -> None:
    run = Run.create("parity", "linear_attention", {}, 0, root=tmp_path / "runs")
    metrics = [
        (f"{what}_relative_error", value, {"model": "gla", "dtype": "tf32", "implementation": who})
        for what in ("logits", "streamed", "gradient")
        for who, value in (("fused", 0.01), ("torch", 0.02))
    ]
    exported(tmp_path, run, *metrics)  # agrees
    # variants: one right, one with a NaN, one that could not run; and a model that could not
    run = Run.create("parity", "linear_attention", {"variants": True}, 0, root=tmp_path / "runs")
    axes = {"model": "gla", "dtype": "tf32", "implementation": "fused", "kernel": "k"}
    for variant, error in (("right", 0.01), ("wrong", math.nan)):
        for what in ("logits", "streamed", "gradient"):
            here = axes | {"variant": variant}
            metrics.append((f"{what}_relative_error", error, here))
    metrics.append(("failed", 1, axes | {"variant": "refused"}))
    refused = {"model": "gdn", "dtype": "tf32"}
    metrics.append(("logits_relative_error", 0.02, refused | {"implementation": "torch"}))
    metrics.append(("failed", 1, refused | {"implementation": "fused"}))
    exported(tmp_path, run, *metrics)
    table = section(tmp_path, "Fused kernels against plain torch")
    rows = [cells(table, place)[:10] for place in (-1, -2, -3)]
    assert ["gla", "tf32", *["0.0100", "0.0200"] * 3, "3, 2 wrong", "no"] in rows
    assert ["gla", "tf32", *["0.0100", "0.0200"] * 3, "", "yes"] in rows
    assert ["gdn", "tf32", "", "0.0200", "", "", "", "", "", "no"] in rows


@pytest.mark.parametrize("experiment", ["wikitext2", "enwiki2019", "s5", "inference", "parity"])
def test_a_run_that_was_stopped_has_no_row_without_figures(tmp_path: Path, experiment: str) -> None:
    parameters = {"kind": "training", "stages": [], "config": {}}
    run = Run.create(experiment, "base", parameters, 0, root=tmp_path / "runs")
    run.log("loss", 4.0, split="train", step=5)
    run.fail("interrupted", "KeyboardInterrupt")
    results = tmp_path / "data" / "results"
    export(run.folder, results, unfinished=True)
    assert results_section(results, tmp_path) == NOTHING
    assert "|" not in all_tables(results)
    # and it hides no other's
    trained(tmp_path, "scanlm_base_c64", 40.0)
    trained(tmp_path, "gpt2_small", 50.0)
    state_tracking(tmp_path, 0, 0.5)
    inference(tmp_path)
    found = results_section(results, tmp_path)
    for text in ("| 40.00 | 50.00 |", "50.000 %", "| 0.200 ms | 0.500 ms |"):
        assert text in found


def test_an_inference_run_without_positions_has_no_row(tmp_path: Path) -> None:
    run = Run.create("inference", "base", {}, 42, root=tmp_path / "runs")
    exported(tmp_path, run, ("ms_per_token", 0.2, {"part": "timeline", "model": "scanlm"}))
    results = tmp_path / "data" / "results"
    assert results_section(results, tmp_path) == NOTHING
    assert "|" not in all_tables(results)


def test_headlines_compare_with_the_best_gpt2_and_all_seeds(tmp_path: Path) -> None:
    inference(tmp_path)
    training_speed(tmp_path)
    for seed, right in enumerate((0.5, 0.75, 1.0)):
        state_tracking(tmp_path, seed, right)
    for perplexity, model in ((9.0, "scanlm_c64"), (8.0, "scanlm_c128"), (7.5, "gpt2"), (7, "gla")):
        trained(tmp_path, model, perplexity)
    for seed in (0, 1):
        for perplexity, model in ((8.0, "scanlm_c64"), (7.5, "gpt2")):
            trained(tmp_path, model, perplexity + seed, "enwiki2019_small", seed)
    text = results_section(tmp_path / "data" / "results", tmp_path)
    rows = {cells(line)[0]: cells(line)[1:3] for line in text.splitlines()}
    assert rows["a token at position 1,000"] == ["0.200 ms", "0.500 ms"]
    assert rows["a token at position 40,000"] == ["0.250 ms", "1.250 ms"]
    assert "reading a prompt of 1,000" not in rows
    assert rows["reading a prompt of 10,000"] == ["0.020 s", "0.010 s"]
    assert rows["reading a prompt of 40,000"] == ["0.500 s", "0.750 s"]
    # 625 chunks: at most nine digits that are all 1, as at 511
    assert rows["memory of the state, at most, up to 40,000"] == ["6.5 MB", "4,000.0 MB"]
    assert rows["training, 64 x 512 tokens a step"] == ["1,000 tokens/s", "3,000 tokens/s"]
    assert rows["training, 1 x 131,072 tokens a step"] == ["1,000 tokens/s", "300 tokens/s"]
    what = "perplexity on enwiki2019's validation text, trained on 2.0 M tokens"
    assert rows[what] == ["8.00 to 9.00 (chunks of 128 to 64)", "7.50"]
    what = "the same with 26 M parameters, trained on 2.0 M tokens, mean (range)"
    assert rows[what] == ["8.50 (8.00 to 9.00, 2 seeds)", "8.00 (7.50 to 8.50, 2 seeds)"]
    assert rows["S5, trained to length 16: right at length 180, median (range)"] == [
        "75.000 % (50.000 % to 100 %, 3 seeds)",
        "not yet recorded",
    ]
    assert "(data/results/inference/base-s42-" in text
    state_tracking(tmp_path, 0, 0.1, model="gpt2_tiny", longest=180)
    text = results_section(tmp_path / "data" / "results", tmp_path)
    found = {cells(line)[0].split(": ")[-1]: cells(line)[2] for line in text.splitlines()}
    assert found["right at length 180, median (range)"] == "10.000 % (10.000 % to 10.000 %, 1 seed)"
    assert found["right at length 1,024, median (range)"] == "beyond what it was tested on"


@pytest.mark.parametrize("tokens", [1, 2, 13, 14, 32, 40])
def test_the_most_that_a_state_held_is_what_a_decoder_held(tokens: int) -> None:
    shape = {"vocab_size": 16, "n_embd": 8, "n_head": 2, "t1_layers": 1, "t2_layers": 2}
    config = ScanLMConfig(**shape, position_embedding="chunk", chunk_size=2)
    decoder = Decoder(ScanLMForCausalLM(config).eval(), 3)
    held = []
    for _ in range(tokens):
        decoder.step()
        held.append(decoder.num_bytes)
    parameters = {"sizes": {"scan": shape}, "chunk_size": 2, "batch_size": 3, "dtype": "float32"}
    assert most_state_bytes(parameters, tokens) == max(held)
    parts = most_states(parameters, tokens)
    state = decoder.buffers.chunk.nbytes
    assert parts["window"] * state == decoder.buffers.keys.nbytes + decoder.buffers.values.nbytes
    assert parts["chunk"] == 1


def test_no_recorded_state_is_larger_than_the_most() -> None:
    runs = read_runs(*(ROOT / "data" / "results" / "inference").glob("*.json"))
    for run in runs.to_dict("records"):
        metrics = read_metrics(run["path"])
        held = metrics[(metrics["name"] == "state_bytes") & (metrics["model"] == "scanlm")]
        held = held[held["part"].isin(("timeline", "positions"))]
        most = [most_state_bytes(run["parameters"], int(n)) for n in held["position"]]
        assert (held["value"] <= most).all()


def test_documents_are_updated(tmp_path: Path) -> None:
    document, results = tmp_path / "README.md", tmp_path / "data" / "results"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    training_speed(tmp_path)
    assert update_documents(document, results) == [document, results / "README.md"]
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n|")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert not update_documents(document, results)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"run_id": "a", "metrics": []}'])
def test_a_damaged_record_is_named_and_no_document_written(tmp_path: Path, content: str) -> None:
    document, results = tmp_path / "README.md", tmp_path / "data" / "results"
    document.write_text(f"{BEGIN}\nold\n{END}\n")
    trained(tmp_path, "scanlm_base_c64", 40.0)
    (results / "enwiki2019" / "cut_off.json").write_text(content)
    with pytest.raises(ScanLMError, match=r"enwiki2019/cut_off\.json .*; restore the file"):
        update_documents(document, results)
    assert "old" in document.read_text()
    assert not (results / "README.md").exists()


def test_records_outside_the_documents_folder_are_linked(tmp_path: Path) -> None:
    document = tmp_path / "here" / "README.md"
    document.parent.mkdir()
    document.write_text(f"{BEGIN}\n{END}\n")
    training_speed(tmp_path / "elsewhere")
    update_documents(document, tmp_path / "elsewhere" / "data" / "results")
    assert "](../elsewhere/data/results/training_speed/scanlm" in document.read_text()


def test_state_tracking_on_any_group_is_in_a_table(tmp_path: Path) -> None:
    parameters = {"group": "S4", "stages": [{"length": 8}]}
    run = Run.create("s4", "scan", parameters, 3, root=tmp_path / "runs")
    run.log("accuracy", 0.5, length=4)
    run.finish({"parameters": 14000, "steps": 700, "reach": {"float32": 1024, "bfloat16": 0}})
    export(run.folder, tmp_path / "data" / "results")
    text = all_tables(tmp_path / "data" / "results")
    row = "| S4 | scan model | 3 | 14,000 | 700 | 8 | 1,024 (float32), 0 (bfloat16) |"
    assert "## State tracking on other groups" in text
    assert row in text


def test_results_are_not_replaced_by_nothing(tmp_path: Path) -> None:
    document, results = tmp_path / "README.md", tmp_path / "mine"
    results.mkdir()
    document.write_text(f"{BEGIN}\nold\n{END}\n")
    with pytest.raises(ScanLMError, match=r"has no headline, and .*README\.md would"):
        update_documents(document, results)
    assert "old" in document.read_text()
    assert not (results / "README.md").exists()


def test_a_document_without_markers_is_left_alone(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("text")
    with pytest.raises(ScanLMError, match=r"README\.md has no lines"):
        update_documents(document, tmp_path)
    assert document.read_text() == "text"


def test_the_documents_are_up_to_date() -> None:
    text = (ROOT / "README.md").read_text()
    written = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert written == results_section(ROOT / "data" / "results", ROOT)
    tables = (ROOT / "data" / "results" / "README.md").read_text()
    assert tables == all_tables(ROOT / "data" / "results")
