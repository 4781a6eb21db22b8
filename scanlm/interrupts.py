"""Ctrl-C at a moment that suits: what must not be cut in the middle looks between its parts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Remember the first Ctrl-C instead of raising it; a second one raises at once.

    Outside the main thread, or where interrupts are ignored or handled already, nothing is held.

    Yields:
        A function: whether there was one.
    """
    caught = False

    def remember(number: int, frame: Any) -> None:
        nonlocal caught
        if caught:
            raise KeyboardInterrupt
        caught = True

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: caught
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
