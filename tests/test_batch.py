"""Notebook runs: parameters refused before anything runs, a failure keeps what there was."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest

from scanlm.batch import (
    NotebookFailed,
    find_notebook,
    notebook_parameters,
    resolve_parameters,
    run_notebook,
)
from scanlm.errors import ScanLMError

PARAMETERS = (
    "steps = 3  # a comment, at least 1\nlr = 0.5\nname = 'a'\nfast = True\n"
    "sizes = [1, 2]  # one or more, at least 1\nseed = None\nlimit = 4  # None: no limit\n"
    "width = 8  # a multiple of 4, at least 2 times as wide\n"
    "length = 27  # a multiple of steps, at least 3 times steps\n"
    "scan = 'scanlm_tiny'  # registry id of a scan model\n"
    "kinds = ['a', 'b']  # a among them\nothers = {'c': {'d': 1}}\nfields = {'d': 1}"
)
BODY = """
from pathlib import Path
from scanlm.errors import ScanLMError
if name == "mistake":
    raise ScanLMError("steps=0: expected more")
if name == "bug":
    1 / 0
if name == "endless":
    Path("began").touch()
    while True:
        pass
Path("result.txt").write_text(f"{steps} {lr} {name} {sizes}")
"""


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``notebooks/07_small.ipynb`` with parameters, a preset and the working directory above."""
    new = nbformat.v4
    cells = [new.new_code_cell(PARAMETERS), new.new_code_cell(BODY)]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"name": "not-installed", "display_name": "x", "language": "python"}
    content = new.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    folder = tmp_path / "notebooks"
    presets = folder / "presets" / "07_small"
    presets.mkdir(parents=True)
    (presets / "smoke.yaml").write_text("steps: 1\nlr: 1e-3\n")
    (presets / "broken.yaml").write_text("stepz: 1\n")
    nbformat.write(content, folder / "07_small.ipynb")
    monkeypatch.chdir(tmp_path)
    return folder / "07_small.ipynb"


def test_a_notebook_is_found_by_number_stem_and_path(notebook: Path) -> None:
    for name in ("07", "07_small", notebook, "notebooks/07_small.ipynb"):
        assert find_notebook(name) == notebook.resolve()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("07_smal", r"no notebook '07_smal' in .*Did you mean '07_small'\?"),
        ("08", r"no notebook '08' in"),
        ("x/07_small.ipynb", "no notebook 'x/07_small.ipynb': no such file"),
    ],
)
def test_an_unknown_notebook_is_refused(notebook: Path, name: str, message: str) -> None:
    with pytest.raises(ScanLMError, match=message):
        find_notebook(name)


def test_a_number_of_two_notebooks_is_refused(notebook: Path) -> None:
    notebook.with_name("07_other.ipynb").write_text(notebook.read_text())
    with pytest.raises(ScanLMError, match="'07' is one of 07_other, 07_small: name it in full"):
        find_notebook("07")


def test_parameters_and_their_defaults(notebook: Path) -> None:
    expected = {"steps": 3, "lr": 0.5, "name": "a", "fast": True, "sizes": [1, 2], "seed": None}
    expected |= {"limit": 4, "width": 8, "length": 27, "scan": "scanlm_tiny", "kinds": ["a", "b"]}
    assert notebook_parameters(notebook) == {
        **expected,
        "others": {"c": {"d": 1}},
        "fields": {"d": 1},
    }


def test_explicit_parameters_win_over_the_preset(notebook: Path) -> None:
    values = resolve_parameters(notebook, "smoke", {"steps": 9, "seed": 4})
    assert values == {"steps": 9, "lr": 1e-3, "seed": 4}
    assert resolve_parameters(notebook, None, {"lr": 2}) == {"lr": 2}  # a whole number is a float
    assert resolve_parameters(notebook, None, {"limit": None}) == {"limit": None}
    assert resolve_parameters(notebook, None, {"steps": 1, "sizes": [1]})["sizes"] == [1]
    for fine in ({"others": {}}, {"others": {"e": {}}}, {"fields": {"d": "x", "e": False}}):
        assert resolve_parameters(notebook, None, fine) == fine
    own = notebook.with_name("own.yaml")  # named from the notebook's folder, which it will run in
    own.write_text("id: own\nfamily: scanlm\n")
    assert resolve_parameters(notebook, None, {"scan": "own.yaml"}) == {"scan": "own.yaml"}


@pytest.mark.parametrize(
    ("preset", "parameters", "message"),
    [
        (None, {"step": 1}, r"07_small has no parameter 'step'\. Did you mean 'steps'\?"),
        ("broken", {}, r"no parameter 'stepz' \(preset broken\)\. Did you mean 'steps'\?"),
        ("smok", {}, r"no preset 'smok' for notebook 07_small\. Did you mean 'smoke'\?"),
        ("absent.yaml", {}, r"cannot read absent\.yaml"),
        (None, {"steps": 1.5}, r"steps=1\.5: expected int, like the default 3"),
        (None, {"steps": True}, "steps=True: expected int"),
        (None, {"fast": 1}, "fast=1: expected bool"),
        (None, {"sizes": 3}, "sizes=3: expected list of int"),
        (None, {"sizes": ["a"]}, r"sizes=\['a'\]: expected list of int, like the default \[1, 2\]"),
        (None, {"sizes": []}, r"sizes=\[\]: notebook 07_small expects 'one or more, at least 1'"),
        (None, {"sizes": [3, 0]}, r"sizes=\[3, 0\]: notebook 07_small expects 'one or more, at"),
        (
            None,
            {"steps": 0},
            "steps=0: notebook 07_small expects 'a comment, at least 1', like the",
        ),
        (None, {"steps": None}, "steps=None: expected int"),
        (None, {"lr": "fast"}, "lr='fast': expected float"),
        (None, {"width": 6}, "width=6: notebook 07_small expects 'a multiple of 4, .*', like the"),
        (None, {"length": 10}, "length=10: notebook .* 'a multiple of steps, .*', here steps=3"),
        (None, {"length": 6}, "length=6: notebook 07_small expects '.*, at least 3 times steps'"),
        (None, {"steps": 5}, "length=27: notebook 07_small expects .*, here steps=5"),
        (None, {"scan": "gpt2_tiny"}, "scan='gpt2_tiny': notebook 07_small expects 'registry id"),
        (None, {"scan": "scanlm_tny"}, r"unknown model 'scanlm_tny'\. Did you mean 'scanlm_tiny'"),
        (None, {"kinds": ["b"]}, r"kinds=\['b'\]: notebook 07_small expects 'a among them'"),
        (None, {"others": {"c": 3}}, r"others=\{'c': 3\}: expected dict of dict, like the default"),
        (None, {"others": []}, r"others=\[\]: expected dict of dict"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(
    notebook: Path, preset: str | None, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ScanLMError, match=message):
        run_notebook("07", preset, parameters)
    assert not list(notebook.parents[1].glob("data/**/*.ipynb"))
    assert not (notebook.parent / "result.txt").exists()


def test_a_run_writes_the_executed_notebook(notebook: Path) -> None:
    done = run_notebook("07", "smoke", {"name": "x", "sizes": [7]}, progress=False)
    # the notebook's folder is its working directory, whatever kernel it asks for
    assert (notebook.parent / "result.txt").read_text() == "1 0.001 x [7]"
    assert done.parent == notebook.parents[1] / "data" / "runs" / "notebooks"
    assert done.name.startswith("07_small-smoke-")
    assert not done.with_name(f"{done.stem}.partial.ipynb").exists()
    assert nbformat.read(done, 4).cells[-1].execution_count


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("bug", NotebookFailed, r"notebook 07_small, cell \[\d\]: ZeroDivisionError: division"),
        ("mistake", ScanLMError, r"cell \[\d\]: ScanLMError: steps=0: expected more"),
    ],
)
def test_a_failing_cell_leaves_the_partial_notebook(
    notebook: Path, name: str, kind: type[Exception], message: str
) -> None:
    output = notebook.parents[1] / "out" / "failed.ipynb"
    with pytest.raises(kind, match=message) as caught:
        run_notebook(notebook, None, {"name": name}, output, progress=False)
    partial = output.with_name("failed.partial.ipynb")
    assert str(partial) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not output.exists()
    cell = nbformat.read(partial, 4).cells[-1]
    assert [item.output_type for item in cell.outputs] == ["error"]


CUT_OFF = """
import typer
from scanlm.cli.usage import one_line_errors
async def waiting(): pass
held = [waiting()]
held.append(held)  # a cycle, which is there until Python ends
try:
    with one_line_errors():
        raise KeyboardInterrupt
except typer.Exit:
    pass
"""


def test_an_interrupt_at_any_moment_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", CUT_OFF], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "scanlm: interrupted\n")


def test_an_interrupt_is_one_line(notebook: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "scanlm", "run", "07", "-p", "name=endless"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that started the tests in the background has told them to ignore interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (notebook.parent / "began").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "scanlm: interrupted\n")
    assert process.returncode == 130


def test_outputs_that_cannot_be_are_refused(notebook: Path) -> None:
    for output, message in (
        (notebook, "is the notebook itself"),
        ("result.txt", r"must end in \.ipynb"),
        ("/dev/null/x.ipynb", r"cannot write /dev/null/x\.ipynb: "),
    ):
        with pytest.raises(ScanLMError, match=message):
            run_notebook("07", output=output)


def test_a_file_that_is_no_notebook_is_one_line(notebook: Path) -> None:
    notebook.write_text("{}")
    with pytest.raises(ScanLMError, match="is not a notebook") as caught:
        notebook_parameters(notebook)
    assert "\n" not in str(caught.value)
