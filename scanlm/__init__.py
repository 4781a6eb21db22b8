"""scanlm: TransformerScanModel, a GPT-2 whose long-range memory is a Blelloch prefix scan.

``import scanlm`` is cheap: it loads neither torch nor transformers. It makes ``AutoConfig`` and
``AutoModelForCausalLM`` know ScanLM folders as soon as they are loaded, and loads the names below
on first use.
"""

from importlib import import_module
from typing import Any

from scanlm._auto import register_with_transformers

_LAZY = {
    "ScanLMConfig": "scanlm.config",
    "ScanLMForCausalLM": "scanlm.model",
    "ScanCache": "scanlm.cache",
    "ScanLMError": "scanlm.errors",
    "sequential_scan": "scanlm.scan",
    "blelloch_scan": "scanlm.scan",
    "OnlineScan": "scanlm.scan",
}
__all__ = sorted(_LAZY)
__version__ = "0.1.0"

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'scanlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
