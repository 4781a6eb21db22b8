"""Progress: a bar for whoever looks, lines for a log, nothing where it is silent."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tqdm.auto import tqdm  # chosen here for a console, whatever a test pretends

from scanlm.progress import Progress

Captured = pytest.CaptureFixture[str]


def look(monkeypatch: pytest.MonkeyPatch, terminal: bool, shell: Any = None) -> None:
    """Pretend that stderr is a terminal or not, and that an IPython shell runs this."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)


def play(progress: Progress) -> None:
    """A run of 2,000 steps that goes on from step 500."""
    progress.line("continuing")
    progress.start(500)
    progress.advance(1000)
    progress.show(1000, loss=1.23456, lr=0.001)
    progress.show(1000, validation=2.5)
    progress.line("a line")
    progress.advance(2000)
    progress.close()


NOTEBOOK, CONSOLE = SimpleNamespace(kernel=object()), SimpleNamespace()


@pytest.mark.parametrize(
    ("terminal", "shell", "bar"),
    [
        (True, None, True),
        (True, CONSOLE, True),
        (False, NOTEBOOK, True),
        (False, CONSOLE, False),
        (False, None, False),
    ],
    ids=["terminal", "IPython", "notebook", "IPython into a file", "file"],
)
def test_a_bar_in_a_terminal_or_a_notebook_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, terminal: bool, shell: Any, bar: bool
) -> None:
    look(monkeypatch, terminal, shell)
    play(Progress(2000))
    out, err = capsys.readouterr()
    assert ("2000/2000" in err) is bar
    assert ("step 1,000/2,000: loss 1.235, lr 0.001" in out) is not bar


def test_without_ipython_a_file_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    look(monkeypatch, terminal=False)
    monkeypatch.delitem(sys.modules, "IPython")
    play(Progress(2000))
    assert capsys.readouterr().err == ""


def test_the_bar_starts_where_the_run_goes_on_and_gathers_figures(capsys: Captured) -> None:
    play(Progress(2000, bar=True))
    out, err = capsys.readouterr()
    states = [state for state in err.split("\r") if "step" in state]
    assert " 500/2000 " in states[0]
    assert any("1000/2000" in s and "loss=1.235, lr=0.001, validation=2.5" in s for s in states)
    assert "2000/2000" in states[-1]
    assert out == "continuing\na line\n"


def test_lines_are_whole_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    look(monkeypatch, terminal=True)
    play(Progress(2000, bar=False))
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "continuing",
        "step 1,000/2,000: loss 1.235, lr 0.001",
        "step 1,000/2,000: validation 2.5",
        "a line",
    ]
    assert err == ""


@pytest.mark.parametrize("bar", [True, False])
def test_silent_shows_nothing(capsys: Captured, bar: bool) -> None:
    play(Progress(2000, bar=bar, silent=True))
    assert capsys.readouterr() == ("", "")


def test_no_bar_is_left_open(capsys: Captured) -> None:
    progress = Progress(3, bar=True)
    progress.start(0)
    bar = progress.bar
    assert bar in tqdm._instances
    progress.close()
    progress.close()
    assert bar not in tqdm._instances
    progress.line("after it")
    assert capsys.readouterr().out == "after it\n"
