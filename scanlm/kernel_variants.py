"""The variants of a Triton kernel that autotuning chooses among, run one at a time.

A tuned kernel is compiled in several configurations (block sizes, warps, pipeline stages), and the
fastest one of the first call is kept. Which that is depends on the machine and on chance, and a
compiler's fault may concern one of them only: a model then trains well on one day and badly on the
next. So a check of a kernel has to look at every variant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Found = dict[Any, dict[Any, list[Any]]]


@contextmanager
def tuned_kernels() -> Iterator[Found]:
    """Collect the kernels that are tuned in the ``with`` block, and what each may choose from.

    Yields:
        Filled as kernels are called: Triton's ``Autotuner`` -> kind of arguments (the tuner's key)
        -> configurations that it could time: not those that it rules out, nor those that need more
        shared memory than there is. Kernels that were tuned before are tuned again.
    """
    from triton.runtime.autotuner import Autotuner

    found: Found = {}
    run = Autotuner.run

    def remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        kinds = found.setdefault(self, {})
        for key in set(self.cache) - set(kinds):  # tuned before
            del self.cache[key]
        result = run(self, *args, **kwargs)
        for key in set(self.cache) - set(kinds):
            kinds[key] = [c for c, time in self.configs_timings.items() if _finite(time)]
        return result

    Autotuner.run = remember
    try:
        yield found
    finally:
        Autotuner.run = run


def each_variant(found: Found) -> Iterator[tuple[str, str]]:
    """Let one kernel after the other run as each of its variants, the others as they were tuned.

    Args:
        found: of ``tuned_kernels``.

    Yields:
        The kernel's name and the configuration that it runs with, wherever it can, until the next
        one is asked for.
    """
    for kernel, kinds in found.items():
        chosen = dict(kernel.cache)
        try:
            for config in dict.fromkeys(c for configs in kinds.values() for c in configs):
                possible = [key for key, configs in kinds.items() if config in configs]
                kernel.cache.update(chosen | dict.fromkeys(possible, config))
                yield kernel.base_fn.__name__, str(config)
        finally:
            kernel.cache.update(chosen)


def _finite(time: Any) -> bool:
    return math.isfinite(min(time) if isinstance(time, list | tuple) else time)
