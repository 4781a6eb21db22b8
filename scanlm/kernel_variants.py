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


@contextmanager
def tuned_kernels() -> Iterator[dict[Any, list[Any]]]:
    """Collect the kernels that are tuned in the ``with`` block, and what each may choose from.

    Yields:
        Filled as kernels are called: Triton's ``Autotuner`` -> its configurations, without those
        that it rules out for the arguments it was called with. Kernels that were tuned before are
        tuned again.
    """
    from triton.runtime.autotuner import Autotuner

    found: dict[Any, list[Any]] = {}
    prune, run = Autotuner.prune_configs, Autotuner.run

    def remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        allowed = prune(self, *args, **kwargs)
        # a kernel may be tuned for several kinds of arguments: what is allowed for all of them
        found[self] = [c for c in found.get(self, allowed) if c in allowed]
        return allowed

    def again(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self not in found:
            self.cache.clear()
        return run(self, *args, **kwargs)

    Autotuner.prune_configs, Autotuner.run = remember, again
    try:
        yield found
    finally:
        Autotuner.prune_configs, Autotuner.run = prune, run


def each_variant(found: dict[Any, list[Any]]) -> Iterator[tuple[str, str]]:
    """Let one kernel after the other run as each of its variants, the others as they were tuned.

    Args:
        found: of ``tuned_kernels``.

    Yields:
        The kernel's name and the configuration that it runs with until the next one is asked for.
    """
    for kernel, configs in found.items():
        chosen = dict(kernel.cache)
        try:
            for config in configs:
                if _ran(kernel, config):
                    kernel.cache.update(dict.fromkeys(chosen, config))
                    yield kernel.base_fn.__name__, str(config)
        finally:
            kernel.cache.update(chosen)


def _ran(kernel: Any, config: Any) -> bool:
    """Whether tuning could time it; some need more shared memory than there is."""
    time = kernel.configs_timings.get(config, 0.0)
    return math.isfinite(min(time) if isinstance(time, list | tuple) else time)
