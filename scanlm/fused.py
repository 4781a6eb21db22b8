"""Which implementation of GLA and Gated DeltaNet to use: fused kernels on a GPU, else plain torch.

The kernels are flash-linear-attention's (``fla``), which is imported only here, only where there is
a GPU, and only when one of its families is asked for.
"""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch

from scanlm.config import NOT_FIELDS
from scanlm.errors import ScanLMError
from scanlm.provenance import FLA_CONFIGS
from scanlm.recurrent_model import INSTALL, LossAndLogits, add_dropout, register

# model type: our module with plain torch; both name their classes alike
PLAIN = {"gla": "scanlm.gla", "gated_deltanet": "scanlm.gated_deltanet"}
PREFIX = {"gla": "GLA", "gated_deltanet": "GatedDeltaNet"}


def build(model_type: str, config: Any, device: torch.device | None = None) -> Any:
    """A model from its plain configuration, which both implementations understand.

    Args:
        model_type: a key of ``PLAIN``.
        config: of ``plain_classes``.
        device: see ``classes``.
    """
    config_class, model_class = classes(model_type, device)
    if not isinstance(config, config_class):
        fields = config.to_dict()
        config = config_class(**{k: v for k, v in fields.items() if k not in NOT_FIELDS})
    return model_class(config)


def classes(model_type: str, device: torch.device | None = None) -> tuple[Any, Any]:
    """The configuration's and the model's class of a family, made known to transformers.

    Args:
        model_type: a key of ``PLAIN``.
        device: where the model will run; ``None``: on a GPU if there is one.
    """
    wants_gpu = device.type == "cuda" if device is not None else torch.cuda.is_available()
    if wants_gpu:
        try:
            return fused_classes(model_type)
        except ScanLMError as error:
            _warn_once(f"{model_type} runs in plain torch, which is slow on a GPU: {error}")
    return plain_classes(model_type)


def plain_classes(model_type: str) -> tuple[Any, Any]:
    """Those of plain torch, made known to transformers."""
    module = import_module(PLAIN[model_type])
    prefix = PREFIX[model_type]
    config, model = getattr(module, f"{prefix}Config"), getattr(module, f"{prefix}ForCausalLM")
    register(config, model)
    return config, model


def fused_classes(model_type: str) -> tuple[Any, Any]:
    """Those with fused kernels, made known to transformers.

    Raises:
        ScanLMError: there is no GPU, or flash-linear-attention cannot be imported.
    """
    if not torch.cuda.is_available():
        raise ScanLMError(
            f"the fused kernels of {model_type} need a GPU, and torch sees none; on a machine that "
            f"has one: {INSTALL}"
        )
    config = getattr(_import_fla(model_type), f"{PREFIX[model_type]}Config")
    model = _model_class(model_type)
    register(config, model)
    return config, model


def no_kernel_advice() -> None:
    """Without a GPU, keep transformers from advising to install kernels for one (Mamba-2)."""
    if not torch.cuda.is_available():
        logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)


@cache
def limit_search(most: str) -> None:
    """Let kernels that are defined from now on try at most so many of their configurations.

    Raises:
        ScanLMError: not a number >= 1.
    """
    if not most.isdecimal() or int(most) < 1:
        raise ScanLMError(f"{FLA_CONFIGS}={most!r}: expected a number >= 1, or leave it unset")
    from triton.runtime.autotuner import Autotuner

    given, count = Autotuner.__init__, int(most)

    def init(self: Any, fn: Any, arg_names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        if configs and (n := len(configs)) > count:
            configs = [configs[(2 * i + 1) * n // (2 * count)] for i in range(count)]
        given(self, fn, arg_names, configs, *args, **kwargs)

    Autotuner.__init__ = init


@cache
def _import_fla(model_type: str) -> Any:
    try:
        if FLA_CONFIGS in os.environ:
            limit_search(os.environ[FLA_CONFIGS])
        return import_module(f"fla.models.{model_type}")
    except ScanLMError:
        raise
    # with a mismatched triton it raises whatever triton does
    except Exception as error:
        raise ScanLMError(
            f"the fused kernels of {model_type} need flash-linear-attention "
            f"({type(error).__name__}: {error}): {INSTALL}"
        ) from error


@cache
def _model_class(model_type: str) -> Any:
    """fla's model with dropout, and our ``forward``: its own would shift shifted labels again."""
    theirs = getattr(_import_fla(model_type), f"{PREFIX[model_type]}ForCausalLM")

    def init(self: Any, config: Any) -> None:
        theirs.__init__(self, config)
        add_dropout(self)

    fields = {"__init__": init, "__module__": __name__}
    return type(theirs.__name__, (LossAndLogits, theirs), fields)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
