"""The files around the library: README, environment, constraints and Makefile say the same."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from scanlm.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def named_files() -> dict[str, str]:
    """Blocks that begin with a comment naming a file."""
    found = (re.match(r"# (\S+\.(?:py|yaml))\n", block) for block in blocks("(?:python|yaml)"))
    return {match[1]: match.string for match in found if match}


def lines() -> list[list[str]]:
    """The README's command lines, as words."""
    return [
        shlex.split(line, comments=True) for block in blocks("bash") for line in block.split("\n")
    ]


# README


def test_the_readme_names_every_notebook_and_every_link_exists() -> None:
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"](notebooks/{notebook.name})" in README
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_the_map_names_files_that_exist() -> None:
    table = README.partition("## The repository")[2].partition("## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [word for cell in cells for word in re.findall("`(.+?)`", cell)]
    for name in named:
        assert any(list(folder.glob(name.rstrip("/"))) for folder in (ROOT, ROOT / "scanlm")), name
    assert len(named) > 20


def test_commands_of_the_readme_are_understood() -> None:
    """Every `scanlm` line parses, every `make` target exists."""
    command: Any = typer.main.get_command(app)
    seen = 0
    for words in lines():
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE)
        if words[:1] != ["scanlm"]:
            continue
        chosen = command.commands[words[1]]
        chosen.make_context(words[1], words[2:])  # raises on an unknown option
        seen += 1
    assert seen > 10


def test_settings_in_the_readme_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training line is planned, its presets, settings and files resolved."""
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    for name, text in named_files().items():
        (tmp_path / name).write_text(text)
    for words in lines():
        if words[:2] == ["scanlm", "train"]:
            result = CliRunner().invoke(app, [*words[1:], *({"--dry-run"} - set(words))])
            assert result.exit_code == 0, (words, result.output)


def test_parameters_in_the_readme_are_the_notebooks() -> None:
    from scanlm.batch import find_notebook, resolve_parameters

    runs = [words for words in lines() if words[:2] == ["scanlm", "run"]]
    command: Any = typer.main.get_command(app)
    for words in runs:
        given = command.commands["run"].make_context("run", words[2:]).params
        parameters = dict(pair.split("=") for pair in given["parameters"] or ())
        numbers = {name: int(value) for name, value in parameters.items()}
        resolve_parameters(find_notebook(given["notebook"]), given["preset"], numbers)
    assert runs


@pytest.mark.parametrize("number", range(len(blocks("python")) - 1))
def test_python_of_the_readme_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = [block for block in blocks("python") if not block.startswith("# ")][number]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_a_family_is_added_as_the_readme_says(tmp_path: Path) -> None:
    for name, text in named_files().items():
        (tmp_path / name).write_text(text)
    (words,) = [words for words in lines() if words[:2] == ["python", "my_scanlm.py"]]
    done = subprocess.run(
        [sys.executable, *words[1:], "--dry-run"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    facts = yaml.safe_load(done.stdout)
    assert facts["config"]["model_type"] == "llama"
    assert facts["config"]["hidden_size"] == 64


def test_the_readme_cites_the_paper() -> None:
    (entry,) = blocks("bibtex")
    assert "2506.10918" in entry
    assert re.match(r"@misc\{\w+,", entry)


# Environment


def test_one_list_of_dependencies() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    torch = re.search(r"^TORCH \?= (torch==\S+)$", MAKEFILE, re.MULTILINE)
    assert torch
    assert pip == [torch[1], "--constraint .ci/constraints.txt", "--editable .[dev]"]
    assert "python=3.11" in environment["dependencies"]


def test_every_dependency_but_torch_is_pinned() -> None:
    text = (ROOT / ".ci" / "constraints.txt").read_text()
    pinned = [line.split("==")[0] for line in text.splitlines() if not line.startswith("#")]
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["tracking"]]
    names = {re.match(r"[\w.-]+", entry)[0].lower().replace("_", "-") for entry in wanted}
    assert names - set(pinned) == {"torch"}
    assert len(pinned) == len(set(pinned))
    assert not [name for name in pinned if name.startswith(("torch", "scanlm", "nvidia"))]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+", line) for line in text.splitlines()[3:])


def test_every_data_file_is_shipped() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["scanlm"]
    package = ROOT / "scanlm"
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} == shipped


def test_the_command_is_installed() -> None:
    assert PROJECT["project"]["scripts"] == {"scanlm": "scanlm.cli:app"}
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="scanlm")
    assert script.load() is app
