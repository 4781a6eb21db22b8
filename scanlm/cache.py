"""Streaming state of a TransformerScanModel: what ``past_key_values`` is.

After t tokens with chunk size c it holds

* the binary counter over the ``t // c`` complete chunks (an ``OnlineScan`` of T1): O(log t) states
  of ``c`` vectors each, and
* T2's window: keys and values of [prefix state ; the chunk so far], at most 2 c tokens.

So memory grows with log t and a token costs the same at any position (Prefix-Scannable Models,
arXiv 2506.10918, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scanlm.errors import ScanLMError
from scanlm.scan import OnlineScan

Aggregate = Callable[[Tensor, Tensor], Tensor]


@dataclass
class KeyValues:
    """Keys and values ``(n, h, s, d / h)`` of the tokens one block's windows already hold."""

    key: Tensor | None = None
    value: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new tokens; returns all keys and values."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        self.key, self.value = key, value
        return key, value


class ScanCache:
    """State of sequences of one length, advanced in place by the model's ``forward``.

    Args:
        aggregate: the model's T1, ``(batch, c, n_embd)`` twice to the same shape.
        num_blocks: T2's number of blocks.

    Attributes:
        counter: the binary counter over complete chunks.
        chunk: embeddings ``(batch, fill, n_embd)`` of the chunk so far; ``None`` if it is empty.
        window: one ``KeyValues`` for each of T2's blocks; they hold nothing while ``fill`` is 0.
        length: tokens seen.
    """

    is_compileable = False  # asked by transformers' generate()

    def __init__(self, aggregate: Aggregate, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.counter: OnlineScan[Tensor] = OnlineScan(aggregate)
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self.counter = OnlineScan(self.counter.combine)
        self.chunk: Tensor | None = None
        self.length = 0
        self.start_chunk()

    def start_chunk(self) -> None:
        """Empty the chunk and T2's window."""
        self.chunk = None
        self.window = [KeyValues() for _ in range(self.num_blocks)]

    @property
    def fill(self) -> int:
        """Tokens of the current, incomplete chunk."""
        return 0 if self.chunk is None else self.chunk.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors held, each ``(batch, ...)``."""
        held = [*self.counter.states, *self.counter.folds]
        held += [t for kv in self.window for t in (kv.key, kv.value) if t is not None]
        return held if self.chunk is None else [*held, self.chunk]

    @property
    def num_bytes(self) -> int:
        """Memory of the state in bytes; a tensor that plays two parts counts once."""
        return sum(t.nbytes for t in {t.data_ptr(): t for t in self.tensors}.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen (the name is transformers')."""
        return self.length

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor held by ``function`` of it."""
        self.counter.map(function)
        for kv in self.window:
            if kv.key is not None and kv.value is not None:
                kv.key, kv.value = function(kv.key), function(kv.value)
        if self.chunk is not None:
            self.chunk = function(self.chunk)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep row ``beam_idx[i]`` as row i (beam search)."""
        self.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def fork(self) -> ScanCache:
        """An independent copy, e.g. of a prompt's state, to continue in several ways."""
        other = ScanCache(self.counter.combine, self.num_blocks)
        other.counter = self.counter.copy()
        other.window = [KeyValues(kv.key, kv.value) for kv in self.window]
        other.chunk, other.length = self.chunk, self.length
        other.map(torch.clone)
        return other

    def check(self, aggregate: Aggregate, x: Tensor) -> None:
        """Refuse a continuation ``x (batch, s, n_embd)`` that does not fit.

        Raises:
            ScanLMError: another model's cache, or another batch size, dtype or device.
        """
        if self.counter.combine != aggregate:
            raise ScanLMError(
                "past_key_values is the cache of another model: start without one, or use the "
                "model that made it"
            )
        for held in self.tensors[:1]:
            if held.shape[0] != x.shape[0]:
                raise ScanLMError(
                    f"past_key_values holds {held.shape[0]} sequences, the input has {x.shape[0]}: "
                    "continue with the same batch"
                )


class RaggedScanCache:
    """State of a batch of sequences of different lengths (left padding): one cache a length.

    Chunk borders count from each sequence's own start, so rows of different lengths cross them at
    different steps. Rows of one length share a ``ScanCache``.

    Args:
        parts: ``(rows, cache)`` pairs; ``rows`` are the row numbers ``(k,)`` in the batch.
        columns: input columns seen, padding included.
    """

    is_compileable = False

    def __init__(self, parts: list[tuple[Tensor, ScanCache]], columns: int) -> None:
        self.parts = parts
        self.columns = columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Input columns seen, padding included."""
        return self.columns

    @property
    def num_bytes(self) -> int:
        """Memory of the state in bytes."""
        return sum(cache.num_bytes for _, cache in self.parts)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep row ``beam_idx[i]`` as row i; beams must come from a row of the same length.

        Raises:
            ScanLMError: a row would be replaced by one of another length.
        """
        for rows, cache in self.parts:
            place = torch.full((len(beam_idx),), -1, device=rows.device)
            place[rows] = torch.arange(len(rows), device=rows.device)
            local = place[beam_idx.to(rows.device)[rows]]
            if bool((local < 0).any()):
                raise ScanLMError(
                    "beam search moved a beam between prompts of different lengths; pass prompts "
                    "one at a time"
                )
            cache.reorder_cache(local)
