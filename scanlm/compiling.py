"""``torch.compile`` in pieces that are compiled in seconds.

One graph of a whole scan model unrolls T2's twelve blocks and every level of the tree, and is
optimised as if all of that were different code: more than a minute before the first step. The
blocks differ in their weights only, and the levels in the number of pairs, so each is compiled
once here and called many times. What lies between (look-ups, concatenations) is a few memory-bound
operations a step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import GPT2LMHeadModel

from scanlm import kernels
from scanlm.model import ScanLMForCausalLM
from scanlm.recurrent_model import RecurrentForCausalLM

SHAPES = 64  # a curriculum has a shape a stage; beyond torch's own limit it would run uncompiled


def compile_model(model: nn.Module, backend: str = "inductor", many_shapes: bool = False) -> None:
    """Compile a model in place; its parameters keep their names.

    A scan model: the leaves, T1 for any number of pairs, T2's windows, blocks and final norm, and
    the loss. Mamba-2, GLA and Gated DeltaNet in plain torch: their blocks. Another model: as a
    whole.
    Call it before the model is wrapped for several ranks, and evaluate under ``as_compiled``.

    Args:
        model: any causal language model.
        backend: of ``torch.compile``.
        many_shapes: compile GPT-2's blocks too, one for all, instead of the whole: the whole is a
            little faster, but takes its half minute again for every shape of a batch.
    """
    kernels.trusted(next(model.parameters()).device)
    # else what a model computes outside of autocast (the recurrences) has its backward pass in it
    torch._functorch.config.backward_pass_autocast = "off"
    # fused kernels would make a whole draw of four numbers for each number of dropout
    torch._inductor.config.fallback_random = True
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    blocks = _equal_blocks(model, many_shapes)
    if blocks is None:
        model.compile(backend=backend)
        return
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    if not isinstance(model, ScanLMForCausalLM):
        return
    model.t1.compile(backend=backend)  # its second shape is compiled for every number of pairs
    for owner, name in (
        (model, "leaves"),
        (model, "windows"),
        (model.t2, "finish"),
        (model, "linear_cross_entropy"),
    ):
        compiled = torch.compile(getattr(owner, name), backend=backend, dynamic=False)
        setattr(owner, name, compiled)


def as_compiled() -> AbstractContextManager[Any]:
    """In this context nothing is compiled: shapes that were run compiled still are, others plainly.

    For evaluations, whose batches come in shapes that are not worth the time of compiling them.
    """
    return torch.compiler.set_stance("eager_on_recompile")


def _equal_blocks(model: Any, many_shapes: bool) -> nn.ModuleList | None:
    """Blocks that differ in their weights only; ``None`` if the whole is to be compiled."""
    if isinstance(model, ScanLMForCausalLM):
        return model.t2.h
    if isinstance(model, RecurrentForCausalLM):
        return model.model.layers
    if isinstance(model, GPT2LMHeadModel):
        return model.transformer.h if many_shapes else None
    # not by its class, which would import Mamba-2 for everyone
    config = getattr(model, "config", None)
    return model.backbone.layers if getattr(config, "model_type", None) == "mamba2" else None
