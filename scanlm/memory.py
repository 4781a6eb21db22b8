"""What a model keeps: the state it streams with, and what a training step holds for its backward.

Both are counted from the tensors themselves, so they are the same on every machine. A GPU's peak
(``peak_memory_bytes`` in run records) also has weights, optimiser and workspace in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scanlm.errors import ScanLMError
from scanlm.loss import loss_only
from scanlm.scoring import context_limit, in_mode


def state_bytes(cache: Any) -> int:
    """Bytes of a streaming state (``past_key_values``) of any family.

    Raises:
        ScanLMError: an object that holds no tensors.
    """
    if hasattr(cache, "num_bytes"):
        return int(cache.num_bytes)
    held = {t.data_ptr(): t.nbytes for t in _tensors(getattr(cache, "layers", cache))}
    if not held:
        raise ScanLMError(f"{type(cache).__name__} holds no tensors: it is no streaming state")
    return sum(held.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in a nest of lists, mappings and cache layers."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "is_initialized") or hasattr(value, "conv_states"):
        yield from _tensors(vars(value))


@torch.no_grad()
def state_growth(model: nn.Module, positions: Iterable[int], seed: int = 0) -> list[dict[str, int]]:
    """Bytes of state after so many random tokens, for one sequence.

    Args:
        model: any registry model.
        positions: numbers of tokens read; those beyond the model's positions are left out.
        seed: of the tokens.

    Returns:
        Rows ``position``, ``value``.

    Raises:
        ScanLMError: a position before the first token.
    """
    positions = list(positions)
    if positions and min(positions) < 1:
        raise ScanLMError(f"positions={positions}: expected numbers of tokens >= 1")
    limit = context_limit(model)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    with in_mode(model):
        for position in positions:
            if limit is not None and position > limit:
                continue
            size = (1, position)
            ids = torch.randint(int(model.config.vocab_size), size, generator=generator)  # type: ignore[union-attr, arg-type]
            out = model(input_ids=ids.to(next(model.parameters()).device), use_cache=True)
            cache = getattr(out, "past_key_values", None)
            cache = out.cache_params if cache is None else cache
            rows.append({"position": position, "value": state_bytes(cache)})
    return rows


def saved_bytes(model: nn.Module, input_ids: Tensor) -> int:
    """Bytes that one training step's forward pass keeps for its backward pass.

    Weights are not counted; a tensor that is kept twice counts once.

    Args:
        model: any causal language model; it is run in training mode.
        input_ids: ``(b, t)``.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # a freed tensor's address may be given to another one

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with in_mode(model, training=True), hooks:
        extra = loss_only(model)
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False, **extra).loss
    del loss
    return sum(kept.values())


__all__ = ["saved_bytes", "state_bytes", "state_growth"]
