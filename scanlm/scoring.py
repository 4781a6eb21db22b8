"""Loss of a language model on a long text: which tokens are scored, from which context.

A text of N tokens has N - 1 tokens that something precedes; every context mode scores each of them
exactly once, so the modes differ only in what a token is predicted from:

    blocks      independent blocks of seq_len (the original's): token i * seq_len + p + 1 from the
                p + 1 tokens of its block before it, p = 0 ... seq_len - 1
    sliding     overlapping windows of seq_len, each ``stride`` further on: a token from at least
                seq_len - stride + 1 tokens (all there are, in the first window); stride = seq_len
                is ``blocks``
    streaming   everything before it: one stream, read in pieces of seq_len, its state carried on

Losses are cross-entropies in nats a token, taken in float32 and summed in float64, block after
block: the sum does not depend on the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlm.errors import ScanLMError, check_name

LOGITS_AT_ONCE = 2**28  # of a batch: a gigabyte of float32, which training makes of them
LOGITS_PER_SLICE = 2**26  # of these in float32: a quarter of a gigabyte
PRECISIONS = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Evaluation:
    """Summed losses by position.

    Attributes:
        sums: float64 ``(p,)``: nats lost at each position.
        counts_by_position: int64 ``(p,)``: tokens scored at each position.
        positions: int64 ``(p,)``: a token at ``positions[k]`` was predicted from that many tokens
            and one. For a stream, entry k holds the piece of the stream that begins there.
    """

    sums: np.ndarray
    counts_by_position: np.ndarray
    positions: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens scored."""
        return int(self.counts_by_position.sum())

    @property
    def nats(self) -> float:
        """Loss summed over all scored tokens."""
        return float(self.sums.sum())

    @property
    def loss(self) -> float:
        """Nats per scored token."""
        return self.nats / self.num_tokens

    @property
    def loss_by_position(self) -> np.ndarray:
        """Nats per token at each position, float64 ``(p,)``; NaN where nothing was scored."""
        counts = self.counts_by_position
        nothing = np.full(len(counts), np.nan)
        return np.divide(self.sums, counts, out=nothing, where=counts > 0)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return _exp(self.loss)

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits spent on the text per byte of it.

        The text's first token is not scored, but its bytes count: one token of many.
        """
        _check_count("num_bytes", num_bytes)
        return self.nats / math.log(2) / num_bytes

    def word_perplexity(self, num_words: int) -> float:
        """Perplexity per word, exp(nats / words): comparable between tokenizers."""
        _check_count("num_words", num_words)
        return _exp(self.nats / num_words)

    def merge(self, other: Evaluation) -> Evaluation:
        """Both results as one, e.g. of two texts or of two halves of one.

        Raises:
            ScanLMError: the two have other positions.
        """
        if not np.array_equal(self.positions, other.positions):
            raise ScanLMError(
                f"cannot merge evaluations over {len(self.positions)} and {len(other.positions)} "
                "positions: evaluate both with one seq_len and context"
            )
        counts = self.counts_by_position + other.counts_by_position
        return Evaluation(self.sums + other.sums, counts, self.positions)


def evaluate_blocks(
    model: nn.Module,
    tokens: Any,
    seq_len: int,
    batch_size: int = 16,
    device: str | torch.device | None = None,
    precision: str | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
    chunk_size: int | None = None,
) -> Evaluation:
    """Score independent blocks of ``seq_len``; the last, partial block counts too.

    Args:
        model: any causal language model of transformers' form; its mode is left as it was.
        tokens: ``(n,)`` integers, e.g. a memory map.
        seq_len: tokens a block reads; position p of block b predicts token b * seq_len + p + 1.
        batch_size: most blocks at a time; fewer where their logits would take more than a
            gigabyte in float32. No result depends on it.
        device: move the model there; by default it stays.
        precision: "fp32", "bf16" or "fp16" autocast; by default as the weights are.
        max_tokens: score only the first so many tokens.
        progress: show a progress bar.
        chunk_size: score as the original does: not the first token of any chunk of this size.

    Raises:
        ScanLMError: fewer than 2 tokens, a token outside the vocabulary, a block longer than the
            model's positions, or a loss that is not finite (the message names the position).
    """
    return evaluate_sliding(
        model,
        tokens,
        seq_len,
        seq_len,
        batch_size,
        device,
        precision,
        max_tokens,
        progress,
        chunk_size,
    )


def evaluate_sliding(
    model: nn.Module,
    tokens: Any,
    seq_len: int,
    stride: int,
    batch_size: int = 16,
    device: str | torch.device | None = None,
    precision: str | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
    chunk_size: int | None = None,
) -> Evaluation:
    """Score each token once, in the first window of ``seq_len`` that reaches it.

    Window w reads tokens w * stride ... w * stride + seq_len - 1 and predicts each one's successor.
    The first window is scored whole, a later one at its last ``stride`` positions.

    Args:
        stride: tokens from one window to the next, at most ``seq_len``.

    Other arguments, result and errors are those of ``evaluate_blocks``.
    """
    _check_count("seq_len", seq_len)
    _check_count("stride", stride)
    _check_count("batch_size", batch_size)
    if stride > seq_len:
        raise ScanLMError(
            f"stride={stride} is larger than seq_len={seq_len}: tokens between windows would be "
            "skipped; use at most seq_len"
        )
    tokens = _checked_tokens(model, tokens, max_tokens)
    targets = len(tokens) - 1
    check_context(model, min(seq_len, targets))
    sums, counts = np.zeros(seq_len), np.zeros(seq_len, dtype=np.int64)
    scored = _scored_positions(0, seq_len, chunk_size)
    batch_size = min(batch_size, _most_windows(model, seq_len))
    with _evaluating(model, device, precision) as place:
        for starts in _progress(_batches(targets, seq_len, stride, batch_size), progress):
            length = min(seq_len, targets - starts[0])
            rows = np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64)
            windows = torch.from_numpy(rows).to(place)
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits
            first = 0 if starts[0] == 0 and len(starts) == 1 else seq_len - stride
            losses = _token_losses(logits[:, first:], windows[:, first + 1 :])
            del logits  # else they would be held beside those of the next batch
            for start, row in zip(starts, losses, strict=True):
                _check_finite(row, start + first, f"position {{}} of the window at token {start}")
                keep = scored[first:length]
                sums[first:length] += np.where(keep, row, 0.0)
                counts[first:length] += keep
    return _result(sums, counts, np.arange(seq_len))


def evaluate_streaming(
    model: nn.Module,
    tokens: Any,
    seq_len: int,
    device: str | torch.device | None = None,
    precision: str | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
    chunk_size: int | None = None,
) -> Evaluation:
    """Score one stream: token i + 1 is predicted from all of tokens 0 ... i.

    The stream is read in pieces of ``seq_len`` and the model's state carried from piece to piece,
    so no loss depends on ``seq_len``; it sets the memory needed, and the result's resolution: entry
    k of ``loss_by_position`` is the mean over tokens k * seq_len + 1 ... (k + 1) * seq_len.

    Raises:
        ScanLMError: as ``evaluate_blocks``; and a text longer than the model's positions, or a
            model that returns no state.
    """
    _check_count("seq_len", seq_len)
    tokens = _checked_tokens(model, tokens, max_tokens)
    targets = len(tokens) - 1
    check_context(model, targets, streaming=True)
    starts = range(0, targets, seq_len)
    sums, counts = np.zeros(len(starts)), np.zeros(len(starts), dtype=np.int64)
    state: dict[str, Any] = {}
    with _evaluating(model, device, precision) as place:
        for k, start in enumerate(_progress(starts, progress)):
            stop = min(start + seq_len, targets)
            piece = torch.from_numpy(tokens[start : stop + 1].astype(np.int64)).to(place)
            out = model(input_ids=piece[None, :-1], use_cache=True, **state)
            state = _carried_state(model, out)
            (row,) = _token_losses(out.logits, piece[None, 1:])
            _check_finite(row, start, "position {} of the piece of the stream")
            keep = _scored_positions(start, stop - start, chunk_size)
            sums[k] = row[keep].sum()
            counts[k] = keep.sum()
    return _result(sums, counts, np.asarray(starts))


def context_limit(model: nn.Module) -> int | None:
    """Longest sequence that the model's position embeddings allow, or ``None``."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind in ("gla", "gated_deltanet", "mamba", "mamba2"):
        return None
    if kind == "scanlm" and getattr(config, "position_embedding", None) == "chunk":
        return None
    return getattr(config, "max_position_embeddings", None)


def check_context(model: nn.Module, length: int, streaming: bool = False) -> None:
    """Refuse sequences of more tokens than the model has positions for.

    Raises:
        ScanLMError: says what to do instead.
    """
    limit = context_limit(model)
    if limit is None or length <= limit:
        return
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if streaming:
        raise ScanLMError(
            f"cannot stream {length} tokens through this {kind} model: its absolute positions end "
            f"at {limit}; use context='sliding', or a model without a limit (scanlm with "
            'position_embedding="chunk", GLA, Gated DeltaNet, Mamba-2)'
        )
    endless = ', or one trained with position_embedding="chunk"' if kind == "scanlm" else ""
    raise ScanLMError(
        f"seq_len={length} is longer than the {limit} positions of this {kind} model: use "
        f"seq_len={limit} or less{endless}"
    )


def _most_windows(model: nn.Module, seq_len: int) -> int:
    """How many windows' logits may be held at once; at least one window's are."""
    return max(LOGITS_AT_ONCE // (seq_len * (_vocab_size(model) or 1)), 1)


def _batches(targets: int, seq_len: int, stride: int, batch_size: int) -> list[range]:
    """Starts of windows, in batches whose windows have one length and one part to score."""
    windows = 1 + max(0, -(-(targets - seq_len) // stride))
    whole = windows if (windows - 1) * stride + seq_len == targets else windows - 1
    starts = range(0, windows * stride, stride)
    overlapping = stride < seq_len and whole > 0  # then the first window is scored differently
    batches = [starts[:1]] if overlapping else []
    batches += [
        starts[i : min(i + batch_size, whole)] for i in range(int(overlapping), whole, batch_size)
    ]
    return [*batches, starts[whole:]] if whole < windows else batches


def _scored_positions(start: int, length: int, chunk_size: int | None) -> np.ndarray:
    """Which of positions start ... start + length - 1 count, bool ``(length,)``.

    Position p predicts token p + 1; the original never scores a token that begins a chunk.
    """
    if chunk_size is None:
        return np.ones(length, dtype=bool)
    _check_count("chunk_size", chunk_size)
    return (np.arange(start, start + length) + 1) % chunk_size != 0


def _token_losses(logits: Tensor, targets: Tensor) -> np.ndarray:
    """Cross-entropy of each token, float64 ``(b, t)`` in nats.

    Args:
        logits: ``(b, t, v)`` of any dtype; converted to float32 a slice at a time.
        targets: ``(b, t)``.
    """
    flat, wanted = logits.flatten(0, 1), targets.flatten()
    if int(wanted.max()) >= logits.shape[-1]:
        raise ScanLMError(
            f"token id {int(wanted.max())} has no logit: the model predicts {logits.shape[-1]} "
            "tokens; use the tokenizer that it was trained with"
        )
    exact = torch.promote_types(logits.dtype, torch.float32)
    rows = max(LOGITS_PER_SLICE // logits.shape[-1], 1)
    losses = [
        F.cross_entropy(part.to(exact), target, reduction="none")
        for part, target in zip(flat.split(rows), wanted.split(rows), strict=True)
    ]
    return torch.cat(losses).double().view(targets.shape).cpu().numpy()


def _carried_state(model: nn.Module, out: Any) -> dict[str, Any]:
    """The state to pass on, by the name under which this model takes it."""
    for name in ("past_key_values", "cache_params"):
        state = getattr(out, name, None)
        if state is not None:
            return {name: state}
    raise ScanLMError(
        f"cannot stream: {type(model).__name__} returns no state (past_key_values); use "
        "context='blocks' or 'sliding'"
    )


def _vocab_size(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "vocab_size", None)


def _checked_tokens(model: nn.Module, tokens: Any, max_tokens: int | None) -> np.ndarray:
    """The tokens to read, of which all but the first are scored, ``(n,)``."""
    tokens = tokens.numpy() if isinstance(tokens, Tensor) else np.asanyarray(tokens)
    if tokens.ndim != 1:
        raise ScanLMError(f"tokens must be one sequence of shape (n,), got {tokens.shape}")
    if max_tokens is not None:
        _check_count("max_tokens", max_tokens)
        tokens = tokens[: max_tokens + 1]
    if len(tokens) < 2:
        raise ScanLMError(
            f"nothing to evaluate: {len(tokens)} tokens, and the first is predicted from nothing; "
            "at least 2 are needed"
        )
    vocab_size = _vocab_size(model)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise ScanLMError(
            f"token id {low if low < 0 else high} is not in the model's vocabulary of "
            f"{vocab_size}: use the tokenizer that it was trained with"
        )
    return tokens


class NotFinite(ScanLMError):
    """The model's loss is NaN or infinite."""


def _check_finite(row: np.ndarray, first: int, where: str) -> None:
    wrong = np.flatnonzero(~np.isfinite(row))
    if len(wrong):
        at = int(wrong[0])
        raise NotFinite(
            f"the loss is {row[at]} at token {first + at + 1} ({where.format(at)}): the weights "
            "hold NaN or overflow in this precision; check the checkpoint, or try precision='fp32'"
        )


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ScanLMError(f"{name} must be an integer >= 1, got {value!r}")


def _result(sums: np.ndarray, counts: np.ndarray, positions: np.ndarray) -> Evaluation:
    if not counts.any():
        raise ScanLMError("nothing was scored: every token begins a chunk; use a larger chunk_size")
    return Evaluation(sums, counts, positions)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _progress(items: Any, show: bool) -> Any:
    if not show:
        return items
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    return tqdm(items, desc="evaluate", leave=False)


@contextmanager
def in_mode(model: nn.Module, training: bool = False) -> Iterator[None]:
    """The model in evaluation (or training) mode; every module's mode is restored, also by errors.

    Args:
        model: any module.
        training: the mode within.
    """
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes.items():
            module.training = before


@contextmanager
def _evaluating(
    model: nn.Module, device: str | torch.device | None, precision: str | None
) -> Iterator[torch.device]:
    """The model in evaluation mode, without gradients."""
    if device is not None:
        model.to(device)
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    # not inference_mode: tensors that a module keeps must stay usable in training
    with in_mode(model), torch.no_grad(), _autocast(place, precision):
        yield place


def _autocast(device: torch.device, precision: str | None) -> AbstractContextManager[Any]:
    if precision is None:
        return nullcontext()
    check_name("precision", precision, PRECISIONS)
    dtype = PRECISIONS[precision]
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)
