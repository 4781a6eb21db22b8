"""Arithmetic of one training step, counted from the shapes.

A multiply-add is two operations, the backward pass costs twice the forward pass, and causal
attention counts half its square. Norms, activations and biases are left out. Only what the
computation needs is counted: recomputed or padded work does not raise the utilisation.

For the scan model, per sequence of ``t`` tokens in ``m + 1`` chunks of ``c``, width ``d``:

    T1   P(m) combines of [left ; right]: 2c rows, in the last block c queries and MLP rows
    T2   t + m c rows (windows [prefix ; chunk]), in the last block only the chunks' rows
    head t rows

``P(m)`` is the number of nodes the prefixes of m leaves need (``scanlm.scan``). At base size,
c = 64 and t = 512 T1 is 4 % of the operations, T2 77 % and the head 19 %.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from scanlm.config import ScanLMConfig
from scanlm.errors import ScanLMError
from scanlm.scan import num_combines

Parts = dict[str, float]  # forward operations of one sequence, by part of the model


def _block(d: int, inner: int, rows: int, kept: int, attention: float) -> float:
    """One GPT-2 block over ``rows`` tokens of which ``kept`` are wanted."""
    products = rows * 4 * d * d + kept * 4 * d * d + kept * 4 * d * inner
    return products + 4 * d * attention


def _pairs(window: int, queries: int, causal: bool) -> float:
    """Query-key pairs of the last ``queries`` tokens of a window (half of a causal square)."""
    if not causal:
        return queries * window
    return queries * (window - queries) + queries * queries / 2


def _stack(
    config: ScanLMConfig, layers: int, count: float, window: int, kept: int, causal: bool
) -> float:
    """``count`` windows through ``layers`` blocks."""
    d, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    full = _block(d, inner, window, window, _pairs(window, window, causal))
    last = _block(d, inner, window, kept, _pairs(window, kept, causal))
    return count * ((layers - 1) * full + last)


def scanlm_parts(config: ScanLMConfig, seq_len: int) -> Parts:
    """T1, T2 and head of one sequence of a scan model.

    Raises:
        ScanLMError: a sequence of no tokens.
    """
    _check_length(seq_len)
    c = config.chunk_size
    full, rest = divmod(seq_len, c)
    leaves = (seq_len - 1) // c
    t1 = _stack(config, config.t1_layers, num_combines(leaves), 2 * c, c, config.t1_causal)
    first = min(c, seq_len)
    t2 = _stack(config, config.t2_layers, 1, first, first, True)
    t2 += _stack(config, config.t2_layers, max(full - 1, 0), 2 * c, c, True)
    if full and rest:
        t2 += _stack(config, config.t2_layers, 1, c + rest, rest, True)
    return {"t1": t1, "t2": t2, "head": 2 * seq_len * config.n_embd * config.vocab_size}


def _check_length(seq_len: int) -> None:
    if seq_len < 1:
        raise ScanLMError(f"seq_len={seq_len}: expected at least one token")


def _products(model: nn.Module) -> float:
    """Parameters that multiply every token: all matrices but the embeddings and the head."""
    skipped = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()  # type: ignore[operator]
    skipped.add(id(head.weight))
    return sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in skipped)


def _head(model: Any, seq_len: int) -> float:
    return 2 * seq_len * model.get_output_embeddings().weight.numel()


def _gpt2(model: Any, seq_len: int) -> Parts:
    config = model.config
    window = min(getattr(config, "sliding_window", None) or seq_len, seq_len)
    pairs = window * window / 2 + (seq_len - window) * window
    mixing = config.n_layer * 4 * config.n_embd * pairs
    return {"blocks": 2 * seq_len * _products(model) + mixing, "head": _head(model, seq_len)}


def _recurrent(state_size: Callable[[Any], float]) -> Callable[[Any, int], Parts]:
    """A linear recurrence: a token updates the state and reads it, two products each."""

    def parts(model: Any, seq_len: int) -> Parts:
        mixing = 4 * state_size(model.config) * model.config.num_hidden_layers
        per_token = 2 * _products(model) + mixing
        return {"blocks": seq_len * per_token, "head": _head(model, seq_len)}

    return parts


def _gla_state(config: Any) -> float:
    key, value = config.hidden_size * config.expand_k, config.hidden_size * config.expand_v
    return key * value / config.num_heads


def _gated_deltanet_state(config: Any) -> float:
    return config.num_heads * config.head_dim * config.head_dim * config.expand_v


def _mamba2_state(config: Any) -> float:
    return config.num_heads * config.head_dim * config.state_size


_FAMILIES: dict[str, Callable[[Any, int], Parts]] = {
    "scanlm": lambda model, seq_len: scanlm_parts(model.config, seq_len),
    "gpt2": _gpt2,
    "window_gpt2": _gpt2,
    "gla": _recurrent(_gla_state),
    "gated_deltanet": _recurrent(_gated_deltanet_state),
    "mamba2": _recurrent(_mamba2_state),
}


def training_flops(model: Any, seq_len: int) -> Parts | None:
    """Operations per token of forward and backward, by part of the model.

    Args:
        model: any registry model (weights may be on the meta device).
        seq_len: tokens a sequence.

    Returns:
        ``{"t1": ..., "t2": ..., "head": ...}`` or ``{"blocks": ..., "head": ...}``; their sum is
        the cost of a token. ``None`` for a family whose arithmetic is not known here.

    Raises:
        ScanLMError: a sequence of no tokens.
    """
    _check_length(seq_len)
    count = _FAMILIES.get(model.config.model_type)
    if count is None:
        return None
    return {part: 3 * value / seq_len for part, value in count(model, seq_len).items()}
