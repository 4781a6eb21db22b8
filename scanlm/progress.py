"""A progress bar where somebody looks, plain lines where a log is written."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """Shows steps and figures.

    Args:
        steps: of the whole run.
        bar: a bar (True) or lines (False); default a bar in a terminal or a notebook.
        silent: show nothing (ranks other than the first).
    """

    def __init__(self, steps: int, bar: bool | None = None, silent: bool = False) -> None:
        self.steps, self.silent = steps, silent
        self.wants_bar = _somebody_looks() if bar is None else bar
        self.figures: dict[str, str] = {}
        self.bar: Any = None

    def start(self, done: int) -> None:
        """Begin at a step."""
        if self.wants_bar and not self.silent:
            from tqdm.auto import tqdm  # type: ignore[import-untyped]

            self.bar = tqdm(total=self.steps, initial=done, unit="step", dynamic_ncols=True)

    def advance(self, step: int) -> None:
        """Another step is done."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def show(self, step: int, **figures: float) -> None:
        """Figures measured at a step."""
        texts = {name: f"{value:.4g}" for name, value in figures.items()}
        if self.bar is not None:
            self.figures |= texts
            self.bar.set_postfix(self.figures)
        else:
            listed = ", ".join(f"{name} {text}" for name, text in texts.items())
            self.line(f"step {step:,}/{self.steps:,}: {listed}")

    def line(self, text: str) -> None:
        """A line of its own."""
        if self.silent:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _somebody_looks() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or hasattr(shell, "kernel")
