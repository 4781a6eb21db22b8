"""Every notebook's structure: its parameters, its presets, its links; nbval runs the cells."""

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from scanlm.batch import notebook_parameters, resolve_parameters
from scanlm.errors import ScanLMError
from scanlm.values import read_mapping

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PRESETS = sorted(FOLDER.glob("presets/*/*.yaml"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def text(notebook: nbformat.NotebookNode, kind: str) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == kind)


def anchors(notebook: nbformat.NotebookNode) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text(notebook, "markdown"), re.MULTILINE)
    return {heading.strip().replace(" ", "-") for heading in headings}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_are_notebooks_and_each_has_its_presets() -> None:
    assert len(NOTEBOOKS) >= 3
    for notebook in NOTEBOOKS:
        presets = {preset.stem for preset in PRESETS if preset.parent.name == notebook.stem}
        assert {"smoke", "laptop", "paper"} <= presets, notebook.stem


def test_no_preset_is_of_a_notebook_that_is_not_there() -> None:
    assert {preset.parent.name for preset in PRESETS} == {notebook.stem for notebook in NOTEBOOKS}


def test_the_committed_notebook_is_valid_and_has_no_outputs(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata  # without state the web viewer refuses it
    for cell in notebook.cells:
        assert "papermill" not in cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_parameters_are_one_tagged_cell_of_plain_commented_literals(path: Path) -> None:
    notebook = read(path)
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert tagged[0] is next(c for c in notebook.cells if c.cell_type == "code")
    names = []
    for line in tagged[0].source.splitlines():
        statement = ast.parse(line).body[0]
        assert isinstance(statement, ast.Assign), line
        ast.literal_eval(statement.value)
        assert re.search(r"  # \S", line), f"no comment: {line}"
        names.append(ast.unparse(statement.targets[0]))
    # and papermill's own, simpler parser agrees on them
    assert notebook_parameters(path) == {
        name: ast.literal_eval(ast.parse(line).body[0].value)  # type: ignore[attr-defined]
        for name, line in zip(names, tagged[0].source.splitlines(), strict=True)
    }


def test_every_parameter_is_used(path: Path) -> None:
    code = "\n".join(
        cell.source
        for cell in read(path).cells
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", [])
    )
    code = re.sub(r"^%.*$", "", code, flags=re.MULTILINE)
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    assert set(notebook_parameters(path)) <= used


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_preset_sets_parameters_of_its_notebook(preset: Path) -> None:
    notebook = FOLDER / f"{preset.parent.name}.ipynb"
    values = read_mapping(preset)
    assert values
    assert resolve_parameters(notebook, preset.stem) == values  # raises on an unknown name or type


@pytest.mark.parametrize(
    ("number", "given", "message"),
    [
        ("02", {"model": "gpt2_tiny"}, "model='gpt2_tiny': .* YAML file of a scan model"),
        ("02", {"chunk_size": 64}, "seq_len=128: .* at least 3 times chunk_size .*chunk_size=64"),
        ("02", {"seq_len": 56}, "seq_len=56: .* multiple of chunk_size', here chunk_size=16"),
        ("03", {"scan_model": "gpt2_tiny"}, "scan_model='gpt2_tiny': .* 'registry id of the scan"),
        (
            "04",
            {"baselines": {"gpt2_tiny": 3}},
            "baselines={'gpt2_tiny': 3}: expected dict of dict",
        ),
        ("05", {"models": ["gpt2_dynamic"]}, "models=.*: .*, scanlm among them'"),
    ],
)
def test_parameters_that_a_later_cell_would_fail_on_are_refused(
    number: str, given: dict[str, Any], message: str
) -> None:
    (notebook,) = FOLDER.glob(f"{number}_*.ipynb")
    with pytest.raises(ScanLMError, match=message):
        resolve_parameters(notebook, None, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eval_lengths": [300]}, "length 300 is beyond n_positions=128"),
        ({"lengths": [2, 200]}, "length 200 is beyond n_positions=128"),
        ({"baselines": {"gpt2_tny": {}}}, "unknown model 'gpt2_tny'"),
    ],
)
def test_baselines_that_cannot_be_tested_are_refused_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    for setting in ("torch.set_num_threads", "scanlm.plotting.style.use_style"):
        monkeypatch.setattr(setting, lambda *_: None)  # of the whole process
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    (notebook,) = FOLDER.glob("04_*.ipynb")
    parameters, setup = [c.source for c in read(notebook).cells if c.cell_type == "code"][:2]
    names: dict[str, Any] = {}
    exec(parameters, names)
    with pytest.raises(ScanLMError, match=message):
        exec(re.sub(r"^%.*$", "", setup, flags=re.MULTILINE), names | given)


def test_it_teaches(path: Path) -> None:
    cells = read(path).cells
    prose = text(read(path), "markdown")
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert "**You will learn**" in cells[0].source
    headings = re.findall(r"^## (.*)$", prose, re.MULTILINE)
    assert any("Exercises" in heading for heading in headings)
    assert "What the paper-scale run showed" in headings
    exercises = prose[prose.index("Exercises") :]
    numbered = re.findall(r"^\*\*\d+\. ", exercises, re.MULTILINE)
    assert len(numbered) >= 4
    assert exercises.count("<details><summary>Hint and solution</summary>") == len(numbered)
    assert prose.count("<details>") == prose.count("</details>")


def test_links_and_pictures_resolve(path: Path) -> None:
    prose = text(read(path), "markdown")
    for target in LINK.findall(prose):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{path.name} links to {target}, which is not there"
        if anchor and found.suffix == ".ipynb":
            assert anchor in anchors(read(found))


def test_code_cells_are_short_and_leave_drawing_to_the_library(path: Path) -> None:
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    longest = max(len(cell.source.splitlines()) for cell in code[2:])
    assert longest <= 30
    assert "pyplot" not in text(read(path), "code")
