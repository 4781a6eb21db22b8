"""Streaming state of a TransformerScanModel: what ``past_key_values`` is.

After t tokens with chunk size c it holds

* the binary counter over the ``t // c`` complete chunks (an ``OnlineScan`` of T1): O(log t) states
  of ``c`` vectors each, and
* T2's window: keys and values of [prefix state ; the chunk so far], at most 2 c tokens.

So memory grows with log t and a token costs the same at any position (Prefix-Scannable Models,
arXiv 2506.10918, section 3.2).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scanlm.errors import ScanLMError
from scanlm.generation import OTHER_MODEL, check_held
from scanlm.scan import OnlineScan

Aggregate = Callable[[Tensor, Tensor], Tensor]
FILE_FORMAT, RAGGED_FORMAT = "scanlm-cache-1", "scanlm-ragged-cache-1"


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
        aggregate: the model's T1, ``(batch, c, n_embd)`` twice to the same shape: its bound
            method ``model.aggregate``, by which the cache knows its model.
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

    @property
    def batch_size(self) -> int | None:
        """Sequences held; ``None`` before the first token."""
        held = self.tensors
        return held[0].shape[0] if held else None

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor held by ``function`` of it."""
        made: dict[int, Tensor] = {}

        def once(state: Tensor) -> Tensor:  # the largest root is its own fold: keep it one tensor
            if id(state) not in made:
                made[id(state)] = function(state)
            return made[id(state)]

        self.counter.map(once)
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
            raise ScanLMError(OTHER_MODEL)
        states = [*self.counter.states[:1], *([] if self.chunk is None else [self.chunk])]
        for held in states[:1]:  # under autocast keys and values have a dtype of their own
            check_held(held, x)
            if held.dtype != x.dtype:
                raise ScanLMError(
                    f"past_key_values is {held.dtype}, the model computes in {x.dtype}: convert "
                    "the cache with cache.map(lambda t: t.to(...)), or start without one"
                )

    def save(self, path: str | Path) -> Path:
        """Write the state to one safetensors file, replacing it as a whole.

        Returns:
            The path.

        Raises:
            ScanLMError: nothing was seen yet, or the file cannot be written.
        """
        batch = _saved_batch(self.batch_size)
        about = {
            "batch_size": str(batch),
            "length": str(self.length),
            "num_chunks": str(self.counter.num_chunks),
        }
        return _write(path, FILE_FORMAT, self.counter.combine, self._named(), about)

    @classmethod
    def load(cls, path: str | Path, model: Any, batch_size: int | None = None) -> ScanCache:
        """Read what ``save`` wrote.

        Args:
            path: the file.
            model: the ``ScanLMForCausalLM`` that made the state; the same weights loaded again do.
            batch_size: the number of sequences that will be continued, to refuse others here.

        Raises:
            ScanLMError: no such file, not a saved cache, something else than a scan model, or the
                state of another model, dtype or batch size.
        """
        tensors, about = _read(path, FILE_FORMAT, model, batch_size)
        return cls._of(model, tensors, int(about["length"]), int(about["num_chunks"]))

    def _named(self) -> dict[str, Tensor]:
        """The state's tensors by their names in a file."""
        tensors = {f"root.{i}": t for i, t in enumerate(self.counter.states)}
        # the first fold is the first root
        tensors |= {f"fold.{i}": t for i, t in enumerate(self.counter.folds) if i > 0}
        for i, kv in enumerate(self.window):
            if kv.key is not None and kv.value is not None:
                tensors |= {f"key.{i}": kv.key, f"value.{i}": kv.value}
        return tensors if self.chunk is None else tensors | {"chunk": self.chunk}

    @classmethod
    def _of(cls, model: Any, tensors: dict[str, Tensor], length: int, num_chunks: int) -> ScanCache:
        """The state that consists of what ``_named`` gives."""
        cache = cls(model.aggregate, model.config.t2_layers)
        cache.length = length
        roots = [tensors[f"root.{i}"] for i in range(sum(n.startswith("root.") for n in tensors))]
        folds = [*roots[:1], *(tensors[f"fold.{i}"] for i in range(1, len(roots)))]
        cache.counter.restore(num_chunks, roots, folds)
        cache.chunk = tensors.get("chunk")
        if "key.0" in tensors:
            layers = range(cache.num_blocks)
            cache.window = [KeyValues(tensors[f"key.{i}"], tensors[f"value.{i}"]) for i in layers]
        return cache


def fingerprint(model: nn.Module) -> str:
    """Tells models and weights apart: a digest of the shape and some values of each parameter."""
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        names = ("chunk_size", "n_head", "t1_causal", "leaf_norm", "position_embedding")
        digest.update(json.dumps([getattr(config, name) for name in names]).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        step = max(values.numel() // 16, 1)
        sample = values[::step].double().cpu().tolist()
        digest.update(json.dumps([name, list(parameter.shape), sample]).encode())
    return digest.hexdigest()


def _model_of(aggregate: Aggregate) -> Any:
    return aggregate.__self__  # type: ignore[attr-defined]


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _saved_batch(batch_size: int | None) -> int:
    if batch_size is None:
        raise ScanLMError("an empty cache has nothing to save: run the model on a prompt first")
    return batch_size


def _write(
    path: str | Path,
    file_format: str,
    aggregate: Aggregate,
    tensors: dict[str, Tensor],
    about: dict[str, str],
) -> Path:
    """Write a state as ``ScanCache.save`` says, with the facts that ``_read`` checks."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    model = _model_of(aggregate)
    about |= {
        "format": file_format,
        "model": fingerprint(model),
        "dtype": str(_dtype(model)),
    }
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # contiguous copies: views of one buffer cannot be stored
        save_file(
            {
                n: t.detach().clone(memory_format=torch.contiguous_format)
                for n, t in tensors.items()
            },
            temporary,
            metadata=about,
        )
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ScanLMError(
            f"cannot write the cache to {path}: {error}; choose a folder that exists and can "
            "be written to"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _read(
    path: str | Path, file_format: str, model: Any, batch_size: int | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the model's device, and facts of a state that this model made."""
    from safetensors import SafetensorError, safe_open

    if not isinstance(model, nn.Module) or not hasattr(model, "aggregate"):
        raise ScanLMError(
            f"cannot load a cache for {model!r:.80}: expected the ScanLMForCausalLM that made it"
        )
    if not Path(path).is_file():
        raise ScanLMError(f"no saved cache at {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            _check_format(path, about.get("format"), file_format)
            device = next(model.parameters()).device
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ScanLMError(f"{path} is no safetensors file, or is damaged: {error}") from error
    if about["dtype"] != str(_dtype(model)):
        raise ScanLMError(
            f"the cache in {path} is of a model in {about['dtype']}, this one is in "
            f"{_dtype(model)}: convert the model with model.to(...)"
        )
    if about["model"] != fingerprint(model):
        raise ScanLMError(
            f"the cache in {path} is of another model or of other weights: load the model "
            "that made it, or run the prompt again"
        )
    if batch_size is not None and int(about["batch_size"]) != batch_size:
        raise ScanLMError(
            f"the cache in {path} holds {about['batch_size']} sequences, expected "
            f"{batch_size}: continue with the same batch"
        )
    return tensors, about


def _check_format(path: str | Path, found: str | None, expected: str) -> None:
    classes = {FILE_FORMAT: "ScanCache", RAGGED_FORMAT: "RaggedScanCache"}
    if found == expected:
        return
    advice = "write one with cache.save"
    if found in classes:
        advice = f"load it with {classes[found]}.load"
    raise ScanLMError(
        f"{path} is no saved {classes[expected]} (format {found!r}, expected {expected!r}): "
        f"{advice}"
    )


class RaggedScanCache:
    """State of a batch of sequences of different lengths (left padding): one cache a length.

    Chunk borders count from each sequence's own start, so rows of different lengths cross them at
    different steps. Rows of one length share a ``ScanCache``.

    Args:
        parts: ``(rows, cache)`` pairs; ``rows`` are the row numbers ``(k,)`` in the batch, or the
            slice of all rows.
        columns: input columns seen, padding included.
    """

    is_compileable = False

    def __init__(self, parts: Sequence[tuple[Tensor | slice, ScanCache]], columns: int) -> None:
        self.parts = list(parts)
        self.columns = columns

    def reset(self) -> None:
        """Forget everything seen, also which rows were padded; any number of rows may follow.

        They all begin in the next input's first column, whatever its mask says: begin a batch with
        padding without a cache.
        """
        cache = self.parts[0][1]
        cache.reset()
        # a slice, since how many rows there will be is not known
        self.parts, self.columns = [(slice(None), cache)], 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Input columns seen, padding included."""
        return self.columns

    @property
    def num_bytes(self) -> int:
        """Memory of the state in bytes."""
        return sum(cache.num_bytes for _, cache in self.parts)

    @property
    def batch_size(self) -> int | None:
        """Sequences held; ``None`` before the first token."""
        held = [cache.batch_size for _, cache in self.parts]
        return None if None in held else sum(n for n in held if n is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor held by ``function`` of it."""
        for i, (rows, cache) in enumerate(self.parts):
            cache.map(function)
            if isinstance(rows, Tensor):  # row numbers follow the states to another device
                self.parts[i] = rows.to(cache.tensors[0].device), cache

    def fork(self) -> RaggedScanCache:
        """An independent copy, e.g. of the prompts' state, to continue in several ways."""
        return RaggedScanCache([(r, cache.fork()) for r, cache in self.parts], self.columns)

    def check_batch(self, batch: int) -> None:
        """Refuse a continuation of another number of rows.

        Raises:
            ScanLMError: the batch is not the one that the cache holds.
        """
        held = self.batch_size
        if held is not None and held != batch:
            raise ScanLMError(
                f"past_key_values holds {held} sequences, the input has {batch}: continue with "
                "the same batch"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep row ``beam_idx[i]`` as row i; beams must come from a row of the same length.

        Raises:
            ScanLMError: a row would be replaced by one of another length.
        """
        for rows, cache in self.parts:
            if isinstance(rows, slice):
                cache.reorder_cache(beam_idx)
                continue
            place = torch.full((len(beam_idx),), -1, device=rows.device)
            place[rows] = torch.arange(len(rows), device=rows.device)
            local = place[beam_idx.to(rows.device)[rows]]
            if bool((local < 0).any()):
                raise ScanLMError(
                    "beam search moved a beam between prompts of different lengths; pass prompts "
                    "one at a time"
                )
            cache.reorder_cache(local)

    def save(self, path: str | Path) -> Path:
        """Write the state to one safetensors file, replacing it as a whole.

        Returns:
            The path.

        Raises:
            ScanLMError: nothing was seen yet, or the file cannot be written.
        """
        batch = _saved_batch(self.batch_size)
        tensors: dict[str, Tensor] = {}
        for i, (rows, cache) in enumerate(self.parts):
            tensors |= {f"{i}.{name}": t for name, t in cache._named().items()}
            tensors[f"{i}.rows"] = torch.arange(batch) if isinstance(rows, slice) else rows
        caches = [cache for _, cache in self.parts]
        about = {
            "batch_size": str(batch),
            "columns": str(self.columns),
            "lengths": json.dumps([cache.length for cache in caches]),
            "num_chunks": json.dumps([cache.counter.num_chunks for cache in caches]),
        }
        return _write(path, RAGGED_FORMAT, caches[0].counter.combine, tensors, about)

    @classmethod
    def load(cls, path: str | Path, model: Any, batch_size: int | None = None) -> RaggedScanCache:
        """Read what ``save`` wrote.

        Args:
            path: the file.
            model: the ``ScanLMForCausalLM`` that made the state; the same weights loaded again do.
            batch_size: the number of sequences that will be continued, to refuse others here.

        Raises:
            ScanLMError: as ``ScanCache.load``, whose files are refused too.
        """
        tensors, about = _read(path, RAGGED_FORMAT, model, batch_size)
        parts = []
        facts = zip(json.loads(about["lengths"]), json.loads(about["num_chunks"]), strict=True)
        for i, (length, num_chunks) in enumerate(facts):
            own = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{i}.")}
            parts.append((own.pop("rows"), ScanCache._of(model, own, length, num_chunks)))
        return cls(parts, int(about["columns"]))
