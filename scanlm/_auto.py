"""Make transformers' Auto classes know ScanLM without importing transformers.

Registering needs the classes, and importing them takes seconds that ``scanlm --help`` need not
pay. So the registration waits, as an import hook, for transformers' auto modules to be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def _register_config() -> None:
    from transformers import AutoConfig

    from scanlm.config import ScanLMConfig

    AutoConfig.register("scanlm", ScanLMConfig, exist_ok=True)


def _register_model() -> None:
    from transformers import AutoModelForCausalLM

    from scanlm.model import ScanLMConfig, ScanLMForCausalLM

    AutoModelForCausalLM.register(ScanLMConfig, ScanLMForCausalLM, exist_ok=True)


_AFTER_IMPORT: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


class _AfterImport(MetaPathFinder):
    """Calls back once a module of ``_AFTER_IMPORT`` has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        callback = _AFTER_IMPORT.get(fullname)
        if callback is None:
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
            callback()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Register ScanLM now for what is imported already, later for what is not."""
    for module, callback in _AFTER_IMPORT.items():
        if module in sys.modules:
            callback()
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
