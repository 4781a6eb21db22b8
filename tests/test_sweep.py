"""Sweeps: what a file expands into, what is refused, and processes that end in every way."""

import fcntl
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import yaml
from typer.testing import CliRunner, Result

from scanlm import training
from scanlm.baselines import list_entries
from scanlm.cli import app
from scanlm.data import load_corpus
from scanlm.data.token_files import content_fingerprint
from scanlm.errors import ScanLMError
from scanlm.records import Run
from scanlm.settings import resolve_settings
from scanlm.sweeps import local
from scanlm.sweeps.files import SweepFile, read_sweep
from scanlm.sweeps.plans import State, SweepRun, choose, plan

TINY = {
    "preset": "smoke",
    "tokenizer": "bytes",
    "corpus": "embedded#validation=validation[:2%]",
    "steps": 2,
    "seq_len": 8,
    "batch_size": 2,
    "eval_tokens": 16,
    "config": {"n_embd": 8, "n_head": 2},
}


def scan(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in arguments], prog_name="scanlm")


def written(folder: Path) -> set[tuple[str, int]]:
    """All files, and when they were last written."""
    return {(str(p), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """``write(content)``: a sweep file of this text or of these values, in the current folder."""
    monkeypatch.chdir(tmp_path)

    def make(content: Any) -> Path:
        path = Path("many.yaml")
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return make


# What a file means


def test_a_grid_is_expanded_in_written_order(write: Callable[[Any], Path]) -> None:
    file = read_sweep(
        write(
            "run: train\ndescription: Some runs.\n"
            "base: {steps: 5, lr: 1}\n"
            "grid: {lr: [3e-3, 1e-3], seed: [0, 1]}\n"
            "runs: [{model: a}, {model: b, seed: 7, steps: 9}]\n"
        )
    )
    found = [(v["model"], v["lr"], v["seed"], v["steps"]) for v in file.runs]
    assert found == [
        ("a", 3e-3, 0, 5),
        ("a", 3e-3, 1, 5),
        ("a", 1e-3, 0, 5),
        ("a", 1e-3, 1, 5),
        ("b", 3e-3, 7, 9),  # its own seed: not varied
        ("b", 1e-3, 7, 9),
    ]
    assert file.varying == ["model", "seed", "steps", "lr"]
    assert (file.kind, file.description) == ("train", "Some runs.")


def test_a_grid_alone_and_runs_alone(write: Callable[[Any], Path]) -> None:
    assert read_sweep(write("run: train\ngrid: {seed: [1, 2]}")).runs == [{"seed": 1}, {"seed": 2}]
    alone = read_sweep(write("run: train\nruns: [{seed: 3}]"))
    assert alone.runs == [{"seed": 3}]
    assert alone.varying == []


def test_anchors_are_shared_by_text_and_not_by_object(write: Callable[[Any], Path]) -> None:
    file = read_sweep(
        write(
            "x-tiny: &tiny {n_embd: 8}\n_more: &more {model: a, config: *tiny}\nrun: train\n"
            "runs: [*more, {<<: *more, model: b}]\n"
        )
    )
    first, second = file.runs
    assert first == {"model": "a", "config": {"n_embd": 8}}
    assert second == {"model": "b", "config": {"n_embd": 8}}
    first["config"]["n_embd"] = 9
    assert second["config"] == {"n_embd": 8}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: train\ngrid: [1\n", r"many\.yaml, line 3, is not YAML: "),
        ("run: train\nbase: {lr: 1, lr: 2}\n", r"many\.yaml, line 2, is not YAML: 'lr' is given"),
        ("- run: train\n", "must hold one mapping"),
        ("run: train\ngird: {seed: [0]}\n", r"unknown key 'gird'\. Did you mean 'grid'\?"),
        ("grid: {seed: [0]}\n", "no 'run': say what runs, one of train, notebook, state_tracking"),
        ("run: trian\ngrid: {seed: [0]}\n", r"unknown run 'trian'\. Did you mean 'train'\?"),
        ("run: [train]\ngrid: {seed: [0]}\n", r"unknown run \['train'\]"),
        ("run: train\nbase: {seed: 0}\n", "neither grid nor runs"),
        ("run: train\nbase: [1]\nruns: [{}]\n", r"base=\[1\]: expected a mapping"),
        ("run: train\nbase: {1: 2}\nruns: [{}]\n", r"base=\{1: 2\}: expected a mapping"),
        ("run: train\ngrid: {seed: 0}\n", "grid: seed=0: expected a list of values"),
        ("run: train\ngrid: {seed: []}\n", r"grid: seed=\[\]: expected a list of values"),
        ("run: train\nruns: {model: a}\n", "runs={'model': 'a'}: expected a list of mappings"),
        ("run: train\nruns: []\n", r"runs=\[\]: expected a list"),
        ("run: train\nruns: [{}, 3]\n", r"runs\[1\]=3: expected a mapping"),
        ("run: train\ndescription: 3\nruns: [{}]\n", "description=3: expected a text"),
    ],
)
def test_a_wrong_file_is_one_line(write: Callable[[Any], Path], content: str, message: str) -> None:
    with pytest.raises(ScanLMError, match=message) as caught:
        read_sweep(write(content))
    assert str(caught.value).startswith("many.yaml")
    assert "\n" not in str(caught.value)


# What its runs are


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"model": "scanlm_tny"}, r"run 2: unknown model 'scanlm_tny'\. Did you mean"),
        ({"model": 3}, "run 2: model=3: expected a text"),
        ({"preset": ["smoke"]}, r"run 2: preset=\['smoke'\]: expected a text"),
        ({"preset": "smok"}, r"run 2: unknown preset 'smok'\. Did you mean 'smoke'\?"),
        ({"lrr": 1}, r"run 2: unknown setting 'lrr'\. Did you mean 'lr'\?"),
        ({"config.n_emdb": 8}, r"unknown setting 'config\.n_emdb'\. Did you mean 'n_embd'\?"),
        ({"config": {"n_emdb": 8}}, r"unknown setting 'config\.n_emdb'"),
        ({"lr": -1}, "run 2: lr=-1: expected a value greater than 0"),
        ({"seed": [0, 1]}, r"run 2: seed=\[0, 1\]: expected an integer, e.g. seed=0"),
        ({"config.n_head": 3}, "run 2: model 'gpt2_tiny' cannot be built"),
        ({"seq_len": 4096}, "run 2: seq_len=4096 is longer than the 1024 positions"),
        ({"corpus": "embeded"}, r"run 2: unknown corpus 'embeded'.*'embedded'"),
        ({"steps": 2}, r"runs 1 and 2 are the same \(.*\): leave one out"),
        ({"config.n_embd": 8}, "runs 1 and 2 are the same"),
    ],
)
def test_a_wrong_training_run_is_named(
    write: Callable[[Any], Path], own: dict[str, Any], message: str
) -> None:
    base = TINY | {"model": "gpt2_tiny"}
    file = read_sweep(write({"run": "train", "base": base, "runs": [{}, own]}))
    with pytest.raises(ScanLMError, match=message) as caught:
        plan(file)
    assert "\n" not in str(caught.value)


def test_a_model_is_needed(write: Callable[[Any], Path]) -> None:
    with pytest.raises(ScanLMError, match="run 1: no 'model': name a model"):
        plan(read_sweep(write("run: train\ngrid: {seed: [0, 1]}")))


def test_state_tracking_sets_whole_settings_before_parts(write: Callable[[Any], Path]) -> None:
    file = write(
        "run: state_tracking\nbase: {preset: smoke, stages.*.lr: 0.5}\ngrid: {seed: [0, 1]}\n"
        "runs: [{stages.0.lr: 0.25, stages: [{length: 2, max_steps: 3, lr: 1}, "
        "{length: 4, max_steps: 3, lr: 1}]}, {ema: 0.9}]\n"
    )
    runs = plan(read_sweep(file))
    assert [run.settings.seed for run in runs if run.settings] == [0, 1, 0, 1]
    first, last = runs[0].settings, runs[3].settings
    assert first is not None
    assert last is not None
    # a run's own value is set after the base's, as it would be on the command line
    assert [stage.lr for stage in first.stages] == [0.25, 0.5]
    assert (last.ema, {stage.lr for stage in last.stages}) == (0.9, {0.5})
    assert runs[1].words[:5] == ["curriculum", "--preset", "smoke", "--seeds", "1"]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("{preset: smok}", r"run 2: unknown preset 'smok'\. Did you mean 'smoke'\?"),
        ("{emma: 0.5}", r"run 2: unknown setting 'emma'\. Did you mean 'ema'\?"),
        ("{stages.9.lr: 1}", "run 2: 'stages.9.lr=1': no stage '9'"),
        ("{group: S9}", "run 2: .*S<n> needs n from 2 to 5"),
        ("{seed: 0}", "runs 1 and 2 are the same"),
    ],
)
def test_a_wrong_state_tracking_run_is_named(
    write: Callable[[Any], Path], own: str, message: str
) -> None:
    file = read_sweep(write(f"run: state_tracking\nbase: {{preset: smoke}}\nruns: [{{}}, {own}]"))
    with pytest.raises(ScanLMError, match=message):
        plan(file)


def stand_in(number: int) -> SweepRun:
    return SweepRun(number, "", [], "", Path(), str(number), partial(State, "new", Path()))


@pytest.mark.parametrize(
    ("only", "numbers"),
    [(None, [1, 2, 3, 4, 5]), ("2", [2]), ("1,3-4", [1, 3, 4]), ("5, 1-2,2", [1, 2, 5])],
)
def test_runs_are_chosen_by_number(only: str | None, numbers: list[int]) -> None:
    runs = [stand_in(number) for number in range(1, 6)]
    assert [run.number for run in choose(runs, only)] == numbers


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("a", "only='a': expected numbers of runs, e.g. 1,3-5"),
        ("", "expected numbers"),
        ("1,,2", "expected numbers"),
        ("0", "the file has the runs 1 to 5"),
        ("4-6", "the file has the runs 1 to 5"),
        ("3-2", "the file has the runs 1 to 5"),
    ],
)
def test_numbers_that_no_run_has_are_refused(only: str, message: str) -> None:
    with pytest.raises(ScanLMError, match=message):
        choose([stand_in(number) for number in range(1, 6)], only)


STATES = "run: state_tracking\nbase: {preset: smoke}\nruns: [{}]\n"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("run: train\nruns: [{}]\n", [], "many.yaml, run 1: no 'model'"),
        ("run: trian\nruns: [{}]\n", [], "Did you mean 'train'?"),
        (STATES, ["--jobs", 2], "jobs=2: "),
        (STATES, ["--only", 2], "runs 1 to 1"),
        (STATES, ["--dry-run", "--save-weights", "bf17"], "'bf17'. Did you mean 'bf16'?"),
        (STATES, ["--dry-run", "--device", "gpu"], "device 'gpu' cannot be used"),
        ("run: train\nruns: [{}]\n", ["--device", "cpu"], "device='cpu' is for state-tracking"),
        ("run: notebook\nruns: [{}]\n", ["--save-weights", "bf16"], "save-weights='bf16' is for"),
        ("run: train\nruns: [{}]\n", ["--jobs", 0], "Invalid value for '--jobs'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    write: Callable[[Any], Path], content: str, options: list[object], message: str
) -> None:
    result = scan("sweep", write(content), *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


# Processes, with a stand-in for the command


PROGRAM = """
import os, sys, time
from pathlib import Path
what, done = sys.argv[1], Path(sys.argv[2])
waits = what == "waits" and not done.with_name("go").exists()
try:
    print("began")  # from here on an interrupt may come
    if waits:
        time.sleep(60)
except KeyboardInterrupt:
    print("saved")
    sys.exit(130)
if what == "broken":
    print("Traceback (most recent call last):\\n  ...")
    print("\\x1b[31mKeyError: 'a'\\x1b[0m\\n")
    sys.exit(1)
if what == "killed":
    os.kill(os.getpid(), 9)
done.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
"""


@pytest.fixture
def make_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[SweepRun]]:
    """``make_runs("fine", "broken", ...)``: a run of ``PROGRAM`` each; finished if it wrote."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    monkeypatch.setattr(local, "program", lambda: [sys.executable, str(script)])

    def look(done: Path) -> State:
        return State("finished" if done.exists() else "new", done, note="well done")

    def make(*words: str) -> list[SweepRun]:
        paths = [tmp_path / f"{number}.done" for number in range(1, len(words) + 1)]
        return [
            SweepRun(
                number=number,
                varies=f"what={word}",
                words=[word, str(path)],
                label=word,
                root=tmp_path,
                identity=str(path),
                find=partial(look, path),
            )
            for number, (word, path) in enumerate(zip(words, paths, strict=True), 1)
        ]

    return make


def carry_out(runs: list[SweepRun], said: list[str], **options: Any) -> dict[int, tuple[str, str]]:
    """Number -> how it ended, and the note."""
    sweep = local.LocalSweep(runs, "name", len(runs), say=said.append, **options)
    return {outcome.run.number: (outcome.name, outcome.note) for outcome in sweep.carry_out()}


def test_failures_stop_nothing_and_the_log_says_why(
    make_runs: Callable[..., list[SweepRun]], tmp_path: Path
) -> None:
    said: list[str] = []
    runs = make_runs("broken", "fine", "killed", "fine")
    assert carry_out(runs, said) == {
        1: ("failed", "KeyError: 'a'"),
        2: ("finished", "well done"),
        3: ("failed", "killed by SIGKILL, perhaps for want of memory"),
        4: ("finished", "well done"),
    }
    assert len(said) == 8
    assert said[0].startswith("[1/4] what=broken: started, log: ")
    log = tmp_path / "sweeps" / "name" / "01-broken.log"
    assert said[1].startswith("[1/4] what=broken: failed after ")
    assert said[1].endswith(f" s: KeyError: 'a' (log: {log})")
    assert said[3].endswith(" s: well done")
    assert log.read_text().startswith(f"$ {runs[0].command}\nbegan\nTraceback")
    # again: what has finished is not begun, and the log grows
    said.clear()
    assert carry_out(runs, said)[2] == ("finished", "well done")
    assert said[:2] == [f"[{n}/4] what=fine: finished before: {tmp_path}/{n}.done" for n in (2, 4)]
    assert len(said) == 6
    assert log.read_text().count("began") == 2


def test_every_worker_has_a_gpu_of_its_own(
    make_runs: Callable[..., list[SweepRun]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    runs = make_runs("fine", "fine", "fine")
    assert {name for name, _ in carry_out(runs, [], jobs=3).values()} == {"finished"}
    seen = [(tmp_path / f"{number}.done").read_text() for number in (1, 2, 3)]
    assert seen == ["5", "GPU-7", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert local.visible_gpus() == ["0", "1"]


def wait_for(log: Path, text: str) -> None:
    while text not in log.read_text():
        time.sleep(0.01)


def test_time_that_is_up_interrupts_and_the_same_sweep_goes_on(
    make_runs: Callable[..., list[SweepRun]], tmp_path: Path
) -> None:
    said: list[str] = []
    runs = make_runs("fine", "waits", "fine")
    log = tmp_path / "sweeps/name/02-waits.log"

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("[2/3] what=waits: started"):
            wait_for(log, "began")
            sweep.stop_at = time.monotonic()

    sweep = local.LocalSweep(runs, "name", 3, say=say)
    ended = [outcome.name for outcome in sweep.carry_out()]
    assert ended == ["finished", "interrupted", "waiting"]
    assert said[-1].startswith("[2/3] what=waits: interrupted after ")
    assert log.read_text().endswith("began\nsaved\n")
    (tmp_path / "go").touch()
    assert {name for name, _ in carry_out(runs, []).values()} == {"finished"}


def test_no_run_is_begun_when_the_time_is_up(make_runs: Callable[..., list[SweepRun]]) -> None:
    said: list[str] = []
    ended = carry_out(make_runs("fine", "fine"), said, stop_at=time.monotonic())
    assert {name for name, _ in ended.values()} == {"waiting"}
    assert said == []
    assert local.time_to_stop(100, 1000) == 1090
    assert local.time_to_stop(100, 10) == 109


@contextmanager
def hangups(handler: signal.Handlers) -> Iterator[None]:
    """What a closed terminal does, whatever it does outside."""
    outside = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, outside)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_what_runs_in_order(
    make_runs: Callable[..., list[SweepRun]], tmp_path: Path, number: signal.Signals
) -> None:
    runs = make_runs("fine", "waits", "fine")
    log = tmp_path / "sweeps/name/02-waits.log"

    def say(line: str) -> None:
        if line.startswith("[2/3] what=waits: started"):
            wait_for(log, "began")
            signal.raise_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with hangups(signal.SIG_DFL):  # under nohup they are ignored
        handlers = [signal.getsignal(n) for n in numbers]
        with pytest.raises(local.Interrupted, match="1 of 3 runs done, 2 left; the same") as caught:
            local.LocalSweep(runs, "name", 3, say=say).carry_out()
        assert [signal.getsignal(n) for n in numbers] == handlers
    assert [o.name for o in caught.value.outcomes] == ["finished", "interrupted", "waiting"]
    assert log.read_text().endswith("began\nsaved\n")


def test_what_runs_under_nohup_outlives_the_terminal(
    make_runs: Callable[..., list[SweepRun]],
) -> None:
    def say(_: str) -> None:
        signal.raise_signal(signal.SIGHUP)

    with hangups(signal.SIG_IGN):
        done = local.LocalSweep(make_runs("fine", "fine"), "name", 1, say=say).carry_out()
    assert [o.name for o in done] == ["finished", "finished"]


def test_two_sweeps_never_write_one_record(
    make_runs: Callable[..., list[SweepRun]], tmp_path: Path
) -> None:
    runs = make_runs("fine", "fine")
    folder = tmp_path / "sweeps" / "name"
    folder.mkdir(parents=True)
    with (folder / "01-fine.log").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        ended = carry_out(runs, [])
    assert ended == {1: ("failed", "another process is at it"), 2: ("finished", "well done")}
    assert carry_out(runs, [])[1] == ("finished", "well done")


def test_a_script_that_registers_families_is_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["my_scanlm.py", "sweep"])
    assert local.program() == [sys.executable, "my_scanlm.py"]
    monkeypatch.setattr(sys, "argv", ["/bin/scanlm", "sweep"])
    assert local.program() == [sys.executable, "-m", "scanlm"]
    assert [local.duration(s) for s in (0.6, 185, 3785)] == ["1 s", "3:05", "1:03:05"]


# The command


def test_training_runs_fail_skip_and_go_on(write: Callable[[Any], Path], tmp_path: Path) -> None:
    file = write(
        {
            "run": "train",
            "description": "Two tiny models.",
            "base": TINY,
            "runs": [
                {"model": "scanlm_tiny", "config.t2_layers": 1, "corpus": "./text"},
                {"model": "gpt2_tiny", "config.n_layer": 1},
            ],
        }
    )
    before = written(tmp_path)
    result = scan("sweep", file, "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Two tiny models.\n2 runs (train), 64 tokens, ")
    assert "no corpus ./text here" in result.stdout
    assert "data/runs/text/scanlm_tiny-s0-…" in result.stdout
    assert "2: scanlm train gpt2_tiny --corpus 'embedded#" in result.stdout
    assert result.stdout.count(" new ") == 2
    result = scan("sweep", file, "--max-seconds", 0)
    assert result.exit_code == 0, result.output
    assert "2 of 2 runs are left; the same command goes on" in result.stdout
    assert written(tmp_path) == before

    result = scan("sweep", file)
    assert result.exit_code == 1, result.output
    assert result.stderr == "scanlm: 1 of 2 runs failed: 1\n"
    assert "failed after" in result.stdout
    assert "unknown corpus './text'" in result.stdout
    assert (tmp_path / "data/runs/sweeps/many/01-scanlm_tiny-s0.log").is_file()
    (record,) = tmp_path.glob("data/runs/*/*/run.json")
    loss = json.loads((record.parent / "summary.json").read_text())["loss"]
    assert result.stdout.count(f"loss {loss:.4f}") == 2  # when it ended, and in the table

    (tmp_path / "text").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "text" / f"{split}.txt").write_text("the scan folds chunks\n" * 9)
    before = written(tmp_path)
    result = scan("sweep", file, "--dry-run")
    assert written(tmp_path) == before
    assert "finished" in result.stdout
    assert str(record.parent.relative_to(tmp_path)) in result.stdout
    result = scan("sweep", file, "--only", 1)
    assert result.exit_code == 0, result.output
    assert "gpt2_tiny" not in result.stdout

    before = written(tmp_path)
    result = scan("sweep", file)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("finished before: data/runs/") == 2
    assert written(tmp_path) == before
    check_states(file)


def check_states(file: Path) -> None:
    """Which records belong to which settings, and how far they are."""
    content = read_sweep(file)

    def states(**changes: Any) -> list[str]:
        runs = [values | changes for values in content.runs]
        changed = SweepFile(content.path, "train", "", content.names, runs)
        return [str(run.state()) for run in plan(changed)]

    assert states() == ["finished", "finished"]
    assert states(precision="fp32", num_workers=1) == ["finished", "finished"]
    for other in ({"lr": 0.5}, {"seed": 1}, {"precision": "bf16"}, {"config.n_embd": 16}):
        assert states(**other) == ["new", "new"], other
    folder = plan(content)[1].state().place
    (folder / "summary.json").unlink()
    record = json.loads((folder / "run.json").read_text())
    for status, expected in (("interrupted", "unfinished (step 2)"), ("failed", "failed (step 2)")):
        text = json.dumps(record | {"status": status, "message": "why"})
        (folder / "run.json").write_text(text)
        assert states() == ["finished", expected]
    assert plan(content)[1].state().note == "why"
    (folder / "run.json").write_text("{")
    assert states() == ["finished", "failed"]
    assert "is not JSON" in plan(content)[1].state().note
    shutil.rmtree(folder)
    Path("text/train.txt").write_text("another text, so another run\n" * 9)
    assert states() == ["new", "new"]


@pytest.mark.parametrize("model", [e.id for e in list_entries() if e.id.endswith("_tiny")])
def test_the_record_of_every_family_is_found(write: Callable[[Any], Path], model: str) -> None:
    base = {"corpus": "embedded", "dropout": None if model == "mamba2_tiny" else 0.25}
    file = read_sweep(write({"run": "train", "base": base, "runs": [{"model": model}]}))
    (run,) = plan(file)
    assert run.state().name == "new"
    settings = resolve_settings(model, None, base)
    built = training._build(settings, 257)
    training._set_dropout(built, settings.dropout)
    tokens = SimpleNamespace(
        name="embedded",
        tokenizer_spec="bytes",
        tokenizer_hash="x",
        fingerprint=content_fingerprint(load_corpus("embedded"), "cache"),
    )
    parameters = training._parameters(settings, built, tokens, "bf16")
    record = Run.create("embedded", model, parameters, settings.seed)
    assert str(run.state()) == "unfinished (step 0)"
    record.finish({"loss": 1.5})
    assert (run.state().name, run.state().note) == ("finished", "loss 1.5000")


def test_an_interrupted_sweep_is_status_130(
    write: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(sweep: local.LocalSweep) -> None:
        outcomes = [local.Outcome(sweep.runs[0], "interrupted", 3.0)]
        raise local.Interrupted(outcomes)

    monkeypatch.setattr(local.LocalSweep, "carry_out", stopped)
    file = write({"run": "train", "base": TINY, "runs": [{"model": "gpt2_tiny"}]})
    result = scan("sweep", file)
    assert result.exit_code == 130
    assert "interrupted   3 s" in result.stdout
    assert result.stderr == (
        "scanlm: interrupted: 0 of 1 runs done, 1 left; the same command goes on\n"
    )


def test_records_go_where_they_are_told(write: Callable[[Any], Path], tmp_path: Path) -> None:
    file = write({"run": "train", "base": TINY | {"root": "a"}, "runs": [{"model": "gpt2_tiny"}]})
    content = read_sweep(file)
    assert plan(content)[0].state().place.parts[0] == "a"
    (run,) = plan(content, tmp_path / "b")
    assert run.root == tmp_path / "b"
    assert f"root={tmp_path / 'b'}" in run.words


def test_notebooks_run_and_fail(write: Callable[[Any], Path], tmp_path: Path) -> None:
    new = nbformat.v4
    cells = [
        new.new_code_cell("name = 'a'  # a comment\nsteps = 1"),
        new.new_code_cell("if name == 'bug':\n    raise KeyError(name)\nprint(steps)"),
    ]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"name": "not-installed", "display_name": "x", "language": "python"}
    folder = tmp_path / "notebooks"
    (folder / "presets" / "07_small").mkdir(parents=True)
    (folder / "presets" / "07_small" / "smoke.yaml").write_text("steps: 2\n")
    content = new.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(content, folder / "07_small.ipynb")
    base = {"notebook": "07", "preset": "smoke"}
    file = write({"run": "notebook", "base": base, "grid": {"name": ["bug", "7"]}})
    runs = plan(read_sweep(file))
    assert runs[1].command == "scanlm run 07 --preset smoke -p 'name=\"7\"'"
    result = scan("sweep", file)
    assert result.exit_code == 1, result.output
    assert "KeyError: 'bug' (see" in result.stdout
    failed, finished = (run.state() for run in runs)
    assert (failed.name, failed.note) == ("failed", "KeyError: 'bug'")
    assert finished.name == "finished"
    assert finished.place.parent == tmp_path / "data" / "runs" / "notebooks"
    assert (tmp_path / f"data/runs/sweeps/many/02-{finished.place.stem}.log").is_file()
    failed.place.write_text("")  # as a killed one leaves it
    assert runs[0].state().name == "unfinished"
    (folder / "presets" / "07_small" / "smoke.yaml").write_text("steps: 3\n")
    changed = plan(read_sweep(file))[1].state()
    assert (changed.name, changed.place != finished.place) == ("new", True)
    with pytest.raises(ScanLMError, match=r"run 1: .* no parameter 'stepz'\. Did you mean 'steps'"):
        plan(read_sweep(write({"run": "notebook", "base": base, "runs": [{"stepz": 1}]})))
    with pytest.raises(ScanLMError, match="run 1: no 'notebook': name a notebook"):
        plan(read_sweep(write("run: notebook\nruns: [{}]")))
    elsewhere = plan(read_sweep(file := write({"run": "notebook", "runs": [base]})), Path("out"))
    option, output = elsewhere[0].words[-2:]
    assert option == "--output"
    assert re.fullmatch(r"out/notebooks/07_small-smoke-[0-9a-f]{8}\.ipynb", output)
    assert elsewhere[0].root == Path("out")


def test_state_tracking_goes_side_by_side(
    write: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"stages.*.max_steps": 10, "stages.*.batch_size": 8, "config.n_embd": 16}
    small |= {"log_every": 5, "validation_sequences": 16, "eval_lengths": [4]}
    file = write(
        {"run": "state_tracking", "base": small | {"preset": "smoke"}, "grid": {"seed": [0, 1]}}
    )
    words = ["sweep", file, "--device", "cpu", "--out", tmp_path / "out"]
    result = scan(*words, "--max-seconds", 0)
    assert result.exit_code == 0, result.output
    assert "2 of 2 runs are left; the same command goes on" in result.stdout
    assert result.stdout.count("unfinished (step 0)") == 2
    result = scan(*words, "--only", 2, "--save-weights", "bf16")
    assert result.exit_code == 0, result.output
    assert "evaluated" in result.stdout
    assert [p.parent.name[:7] for p in tmp_path.glob("out/z2/*/summary.json")] == ["scan-s1"]
    assert len(list(tmp_path.glob("out/z2/*/checkpoint-final"))) == 1
    result = scan(*words)
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("out/z2/*/summary.json"))) == 2
    before = written(tmp_path)
    result = scan(*words)
    assert result.exit_code == 0, result.output
    assert "below 99 %" in result.stdout
    assert written(tmp_path) == before

    def diverged(settings: Any, **options: Any) -> None:
        for path in tmp_path.glob("out/z2/scan-s0*/*.json"):
            path.write_text(path.read_text().replace('"finished"', '"diverged"'))
        raise ScanLMError("it broke")

    monkeypatch.setattr("scanlm.curriculum.train_many", diverged)
    result = scan(*words)
    assert result.exit_code == 1
    assert result.stderr == "scanlm: it broke\n"
    assert "failed" in result.stdout
    assert os.listdir(tmp_path / "out") == ["z2"]
