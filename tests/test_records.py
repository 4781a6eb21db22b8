"""Run records: crash safety, reading, exporting, captions."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scanlm.errors import ScanLMError
from scanlm.provenance import git_state
from scanlm.records import (
    Run,
    check_results,
    export,
    read_metrics,
    read_runs,
    run_id,
    short_columns,
    source_line,
)

PARAMETERS = {"seq_len": 8, "config": {"chunk_size": 4}}


def make(root: Path, seed: int = 0, **options: object) -> Run:
    return Run.create("embedded", "scanlm_tiny", PARAMETERS, seed, root=root, **options)


def test_run_id_follows_from_the_parameters_alone() -> None:
    one = run_id("m", {"a": 1, "b": 2}, 3)
    assert one == run_id("m", {"b": 2, "a": 1}, 3)
    assert one.startswith("m-s3-")
    assert len(one) == len("m-s3-") + 8
    assert one != run_id("m", {"a": 1, "b": 3}, 3)


def test_round_trip(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.log("loss", 2.5, split="train", step=1, tokens=32)
    run.log("loss", 2.0, split="validation", step=1, tokens=32, chunk_size=64)
    run.finish({"loss": 2.0})
    metrics = read_metrics(tmp_path)
    assert list(metrics["value"]) == [2.5, 2.0]
    assert list(metrics["chunk_size"]) == [4, 64]  # the run's, unless the metric has its own
    parameters = {"config": {"model_type": "mamba2", "chunk_size": 256}}  # another kind of chunk
    other = Run.create("embedded", "mamba2_tiny", parameters, 0, root=tmp_path / "other")
    other.log("loss", 2.0, step=1)
    assert "chunk_size" not in read_metrics(other.folder)
    assert set(metrics["run_id"]) == {run.run_id}
    row = read_runs(tmp_path).iloc[0]
    assert (row["status"], row["seed"], row["summary.loss"]) == ("finished", 0, 2.0)
    assert row["parameters.seq_len"] == 8


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    run = make(tmp_path)
    for value in (math.nan, math.inf, -math.inf):
        run.log("loss", value, step=1)
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        parsed = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert parsed["value"] is None
    values = list(read_metrics(run.folder)["value"])
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf]


def test_a_line_cut_short_is_ignored_and_not_continued(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.log("loss", 1.0, step=1)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"name": "loss", "val')
    assert list(read_metrics(run.folder)["value"]) == [1.0]
    again = make(tmp_path)
    again.log("loss", 0.5, step=2)
    assert list(read_metrics(run.folder)["value"]) == [1.0, 0.5]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    run = make(tmp_path)
    (run.folder / "metrics.jsonl").write_text('{"name"\n{"name": "loss", "value": 1}\n')
    with pytest.raises(ScanLMError, match=r"metrics\.jsonl, line 1"):
        read_metrics(run.folder)


def test_a_record_in_two_files_of_a_folder_is_not_another_seed(tmp_path: Path) -> None:
    run = make(tmp_path / "runs")
    run.finish({"loss": 1.0})
    path = export(run.folder, tmp_path / "results")
    copy = path.with_name("copy.json")
    copy.write_bytes(path.read_bytes())
    for read in (read_runs, read_metrics):
        assert len(read(path, path)) == len(read(path))  # one file twice is one record
        with pytest.raises(ScanLMError, match=f"{path} and {copy} hold the same run: remove one"):
            read(path, copy)


HUGE = "1" + 400 * "0"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "must hold one JSON object, got list"),
        (b"{}", "run_id must be text, there is none"),
        ({"parameters": None}, "parameters must be an object, got None"),
        ({"seed": "1"}, "seed must be an integer, got '1'"),
        ({"run_id": "../up"}, r"run_id='\.\./up': expected letters"),
        ({"metrics": 5}, "metrics must be a list, got 5"),
        ({"metrics": [{"name": "loss"}]}, "metric 1 is no metric, a name and a value: {'name'"),
        ({"metrics": [{"name": "loss", "value": "x"}]}, "metric 1 is no metric"),
        ({"metrics": ["loss"]}, "metric 1 is no metric"),
        ({"summary": {"loss": int(HUGE)}}, "the number 10000000000000000000 is not finite, or too"),
        ({"summary": {"loss": math.nan}}, "the number NaN is not finite"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: Any, message: str) -> None:
    run = make(tmp_path / "runs")
    run.finish({"loss": 1.0})
    path = export(run.folder, tmp_path / "results")
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content).encode()
    path.write_bytes(content)
    for read in (read_runs, read_metrics):
        with pytest.raises(ScanLMError, match=f"{run.run_id}.json.* {message}.*; restore the file"):
            read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "{}", "run_id must be text"),
        ("run.json", '{"run_id": "a", "experiment": "b", "model": "c", "seed": 0}', "parameters"),
        ("run.json", HUGE, "is not finite, or too large"),
        ("summary.json", f'{{"loss": {HUGE}}}', "is not finite, or too large"),
        ("metrics.jsonl", f'{{"name": "loss", "value": {HUGE}}}\n', "line 1 is not JSON"),
        ("metrics.jsonl", "5\n", "line 1 is no metric"),
        ("metrics.jsonl", '{"name": "loss", "va', "line 1, ends within a line"),
    ],
)
def test_a_damaged_run_is_not_exported(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    run = make(tmp_path / "runs")
    run.finish({"loss": 1.0})
    (run.folder / name).write_text(content)
    with pytest.raises(ScanLMError, match=f"{name}.* {message}.*; restore the file, or remove"):
        export(run.folder, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_truncate_drops_later_steps(tmp_path: Path) -> None:
    run = make(tmp_path)
    for step in (1, 2, 3):
        run.log("loss", 1.0, step=step)
    run.truncate(after_step=2)
    assert list(read_metrics(run.folder)["step"]) == [1, 2]


def test_a_finished_run_is_never_overwritten(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.finish({"loss": 1.0})
    again = make(tmp_path)
    assert again.finished
    for write in (lambda: again.log("loss", 0.0), lambda: again.finish({"loss": 0.0})):
        with pytest.raises(ScanLMError, match="has finished"):
            write()
    assert make(tmp_path, resume=False).run_id == f"{run.run_id}-2"
    assert run.summary == {"loss": 1.0}


def test_a_new_run_is_not_that_of_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, taken = Path.mkdir, []

    def overtaken(folder: Path, *arguments: Any, **options: Any) -> None:
        if folder.name.startswith("m-s0-") and not taken:
            taken.append(folder)
            make(folder)  # another process, between a look and the making of the folder
        make(folder, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", overtaken)
    run = Run.create("embedded", "m", {}, 0, root=tmp_path, resume=False)
    assert run.folder.name == run.run_id == f"{taken[0].name}-2"


def test_an_unfinished_run_is_continued(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.log("loss", 1.0, step=1)
    run.fail("interrupted", "Ctrl-C")
    again = make(tmp_path)
    assert again.folder == run.folder
    assert (again.status, again.info["started"]) == ("running", run.info["started"])
    assert len(read_metrics(again.folder)) == 1


def test_only_one_process_writes_a_run(tmp_path: Path) -> None:
    run = Run.create("embedded", "m", {}, 0, root=tmp_path)
    code = "import sys, time; from scanlm.records import Run\nwith Run.open(sys.argv[1])"
    code += ".only_writer():\n    print('in', flush=True)\n    time.sleep(60)"
    arguments = [sys.executable, "-c", code, run.folder]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        before = (run.folder / "run.json").read_bytes()
        refused = pytest.raises(ScanLMError, match="is being written by another process")
        with refused, run.failures_recorded():
            pytest.fail("two write")
        with refused:
            Run.create("embedded", "m", {}, 0, root=tmp_path)
        assert (run.folder / "run.json").read_bytes() == before
        other.kill()
    with run.failures_recorded():  # a killed process holds nothing
        run.log("loss", 1.0)


def test_what_a_stopped_run_measured_can_be_exported(tmp_path: Path) -> None:
    run = make(tmp_path / "runs")
    run.log("loss", 1.5, step=1)
    run.fail("interrupted", "Ctrl-C")
    path = export(run.folder, tmp_path / "results", unfinished=True)
    record = json.loads(path.read_text())
    assert (record["status"], record["summary"]) == ("interrupted", {})
    assert len(read_metrics(path)) == 1
    assert "; interrupted; " in source_line(read_runs(path).iloc[0])


def test_a_diverged_run_is_not_said_to_go_on(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.fail("diverged", "the loss is not finite")
    with pytest.raises(ScanLMError, match=r"'diverged': .*exported; keep what it has") as error:
        export(run.folder, tmp_path / "results")
    assert "continue" not in str(error.value)


def test_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/bin/scanlm", "train", "--root=/home/me/runs"])
    run = make(tmp_path / "runs")
    with pytest.raises(ScanLMError, match="only finished runs"):
        export(run.folder, tmp_path / "results")
    run.log("loss", 1.5, step=1, split="train")
    run.finish({"loss": 1.5, "from": "/home/me/data/x.txt", "url": "https://a.org/b"})
    path = export(run.folder, tmp_path / "results")
    assert path == tmp_path / "results" / "embedded" / f"{run.run_id}.json"
    text = path.read_text()
    assert "/home" not in text
    record = json.loads(text)
    assert record["command"] == "scanlm train --root=runs"
    assert record["summary"] == {"loss": 1.5, "from": "x.txt", "url": "https://a.org/b"}
    assert record["metrics"] == [{"name": "loss", "value": 1.5, "step": 1, "split": "train"}]
    assert export(run.folder, tmp_path / "results").read_text() == text
    # both forms read alike
    ours, theirs = read_metrics(run.folder), read_metrics(tmp_path / "results")
    assert ours.equals(theirs)


def test_a_folder_of_results_must_be_there(tmp_path: Path) -> None:
    check_results(tmp_path)
    with pytest.raises(ScanLMError, match=r"no folder '.*nowhere' of exported records"):
        check_results(tmp_path / "nowhere")


def test_source_line(tmp_path: Path) -> None:
    run = make(tmp_path, seed=7)
    run.info["git_commit"], run.info["git_dirty"] = "0123456789abcdef", True
    run.finish({"steps": 1000, "tokens": 4096000})
    line = source_line(run)
    assert line.startswith("scanlm_tiny; 1,000 steps; 4,096,000 tokens; ")
    assert "seed 7; commit 01234567 (modified)" in line
    assert source_line(read_runs(run.folder).iloc[0]) == line
    for corpus in ("wiki#train=validation[:90%]", "embedded_first_part"):
        run.info["parameters"] = {"corpus": corpus}
        assert f"; on {corpus}; " in source_line(run)
    run.info["experiment"], run.info["parameters"] = "wikitext103", {"corpus": "wikitext-103"}
    assert " on " not in source_line(run)


def test_dirty_is_what_git_follows_and_what_lies_beside_the_code(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, "-C", str(tmp_path), *words], check=True, capture_output=True)

    code = tmp_path / "code"
    code.mkdir()
    for file in (code / "a.py", tmp_path / "notes.txt"):
        file.write_text("a")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    (tmp_path / "my_model.yaml").write_text("a")
    assert git_state(code)["git_dirty"] is False
    (code / "b.py").write_text("a")
    assert git_state(code)["git_dirty"] is True
    (code / "b.py").unlink()
    (tmp_path / "notes.txt").write_text("b")
    assert git_state(code)["git_dirty"] is True


def test_outside_a_repository_the_commit_is_what_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SCANLM_COMMIT", raising=False)
    assert git_state(tmp_path) == {"git_commit": None, "git_dirty": None}
    monkeypatch.setenv("SCANLM_COMMIT", "0123abc")
    assert git_state(tmp_path) == {"git_commit": "0123abc", "git_dirty": False}
    monkeypatch.setenv("SCANLM_COMMIT", "0123abc-dirty")
    assert git_state(tmp_path) == {"git_commit": "0123abc", "git_dirty": True}


def test_columns_by_their_short_names(tmp_path: Path) -> None:
    make(tmp_path).finish({"loss": 2.0, "seq_len": 9})
    runs = read_runs(tmp_path)
    table = short_columns(runs, ["loss", "seed", "config", "seq_len", "never"])
    assert list(table.columns) == ["loss", "seed", "config", "seq_len"]
    # the run's own, parameters, and of a final figure and a parameter the figure
    assert table.iloc[0].to_list() == [2.0, 0, {"chunk_size": 4}, 9]


def test_records_are_read_without_torch() -> None:
    code = "import sys, scanlm.records; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ScanLMError, match="no such file"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(ScanLMError, match=r"no run record at .*run\.json"):
        Run.open(tmp_path)
    with pytest.raises(ScanLMError, match="experiment='a/b'"):
        Run.create("a/b", "m", {}, 0, root=tmp_path)
    with pytest.raises(ScanLMError, match=r"unknown status 'finish'.*'finished'"):
        make(tmp_path).fail("finish", "")
    (tmp_path / "file").write_text("")
    with pytest.raises(ScanLMError, match="cannot write to"):
        make(tmp_path / "file")
