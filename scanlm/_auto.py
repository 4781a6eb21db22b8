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
            # when scanlm.gpt2 is what loads transformers, scanlm.model has to wait for it
            gpt2 = sys.modules.get("scanlm.gpt2")
            if not getattr(getattr(gpt2, "__spec__", None), "_initializing", False):
                import_module(ours)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Register ScanLM now for what is imported already, later for what is not."""
    for theirs, ours in _AFTER_IMPORT.items():
        if theirs in sys.modules:
            import_module(ours)
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
