"""Make transformers' Auto classes know ScanLM without importing transformers.

``scanlm.config`` and ``scanlm.model`` register their classes themselves, but importing them takes
seconds that ``scanlm --help`` need not pay. So an import hook imports them right after
transformers' auto modules.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_AFTER_IMPORT = {
    "transformers.models.auto.configuration_auto": "scanlm.config",
    "transformers.models.auto.modeling_auto": "scanlm.model",
    # what scanlm.model needs and what itself loads modeling_auto: the last one done brings it
    "transformers.generation.utils": "scanlm.model",
    "transformers.modeling_layers": "scanlm.model",
    "transformers.modeling_utils": "scanlm.model",
    "scanlm.gpt2": "scanlm.model",
}


class _AfterImport(MetaPathFinder):
    """Imports our module once transformers' module has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = _AFTER_IMPORT.get(fullname)
        if ours is None:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            if ours != "scanlm.model" or _ready(fullname):
                import_module(ours)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _ready(finished: str) -> bool:
    """Whether scanlm.model can be imported: modeling_auto is there, and nothing is half imported.

    Args:
        finished: the module that was just executed.
    """
    if "transformers.models.auto.modeling_auto" not in sys.modules:
        return False
    return not any(_initializing(name) for name in _AFTER_IMPORT if name != finished)


def _initializing(name: str) -> bool:
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


def register_with_transformers() -> None:
    """Register ScanLM now for what is imported already, later for what is not."""
    for theirs, ours in _AFTER_IMPORT.items():
        if theirs in sys.modules and (ours != "scanlm.model" or _ready(theirs)):
            import_module(ours)
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
