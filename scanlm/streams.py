"""Training on streams: a block goes on from the state in which its stream's last block ended.

The tokens are cut into as many equal streams as a step has rows, and step s reads block s of every
stream. So a document longer than a block is read to its end as one sequence, by truncated
backpropagation: the state at a block's end (the binary counter's roots, at most O(log t) of them)
enters the next block without its history, and gradients stop there. Within a block they pass
through the tree as usual, through nodes that have the carried state as their left input too.

A state begins anew where its stream ends and after every ``reset_every`` blocks, never at the end
of a document: documents stand one behind the other with an end-of-text token between, as they do
within a block without carried states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from scanlm.cache import ScanCache
from scanlm.data import Blocks
from scanlm.errors import ScanLMError

FILE = "carried-{:05d}.safetensors"


class StreamedBlocks(Dataset[dict[str, Tensor]]):
    """The blocks of a run in the order of ``rows`` streams read side by side, over and over.

    Item ``s * rows + r`` is block ``s % len`` of stream r, which has ``len`` blocks, the r-th part
    of all there are. Nothing is drawn, so every model, seed and number of ranks reads the same.

    Args:
        blocks: of the corpus.
        rows: of a step, over all ranks and parts.
        count: items of the whole run.
        reset_every: blocks after which states begin anew; ``None``: at the end of a stream.

    Raises:
        ScanLMError: fewer blocks than streams.
    """

    def __init__(
        self, blocks: Blocks, rows: int, count: int, reset_every: int | None = None
    ) -> None:
        self.blocks, self.rows, self.count = blocks, rows, count
        self.length = len(blocks) // rows
        if not self.length:
            raise ScanLMError(
                f"carry_state cuts the tokens into batch_size={rows} streams, but there are only "
                f"{len(blocks)} blocks of seq_len={blocks.seq_len}: lower one of the two"
            )
        self.span = min(reset_every or self.length, self.length)  # blocks that share a state

    def __len__(self) -> int:
        """Blocks of the whole run."""
        return self.count

    def block(self, index: int) -> int:
        """Which block item ``index`` is."""
        step, row = divmod(index, self.rows)
        return row * self.length + step % self.length

    def begins(self, step: int) -> bool:
        """Whether the states begin anew at step ``step``, counted from 0."""
        return step % self.length % self.span == 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids`` and the next tokens ``(seq_len,)``, these under both their names."""
        item = self.blocks[self.block(index)]
        return {**item, "shift_labels": item["labels"]}


class CarriedState:
    """The states of one rank's rows: one cache for each part that its batch is cut into.

    Args:
        model: a ``ScanLMForCausalLM``, not wrapped.
        streams: the data, which says when to begin anew.
        parts: of a step (gradient accumulation).
        rank, ranks: of this process.
    """

    def __init__(
        self, model: Any, streams: StreamedBlocks, parts: int, rank: int = 0, ranks: int = 1
    ) -> None:
        self.model, self.streams = model, streams
        self.rank, self.ranks = rank, ranks
        self.caches: list[ScanCache] = [model.new_cache() for _ in range(parts)]
        self.part = 0

    def take(self, step: int) -> ScanCache:
        """The state before the next part of step ``step``, counted from 0."""
        if self.streams.begins(step):
            self.caches[self.part].reset()
        return self.caches[self.part]

    def cut(self) -> None:
        """The part was read: forget how its state came about."""
        self.caches[self.part].map(torch.Tensor.detach)
        self.part = (self.part + 1) % len(self.caches)

    def save(self, folder: Path) -> None:
        """Write this rank's states beside a checkpoint, a file for each part."""
        folder.mkdir(parents=True, exist_ok=True)
        for part, cache in enumerate(self.caches):
            cache.save(folder / FILE.format(part * self.ranks + self.rank))

    def load(self, folder: Path) -> None:
        """Take this rank's rows of the states in a checkpoint, written by any number of ranks.

        Raises:
            ScanLMError: there are none, or they are of other weights.
        """
        files = sorted(folder.glob(FILE.replace("{:05d}", "*")))
        if not files:
            raise ScanLMError(f"{folder} has no carried states: train from the start")
        saved = [ScanCache.load(file, self.model) for file in files]
        together = zip(*(cache.tensors for cache in saved), strict=True)
        whole = {id(first): torch.cat([first, *rest]) for first, *rest in together}
        saved[0].map(lambda tensor: whole[id(tensor)])
        rows = self.streams.rows // (len(self.caches) * self.ranks)
        for part in range(len(self.caches)):
            start = (part * self.ranks + self.rank) * rows
            mine = torch.arange(start, start + rows)
            self.caches[part] = saved[0].fork()
            self.caches[part].reorder_cache(mine)
        self.part = 0


__all__ = ["CarriedState", "StreamedBlocks"]
