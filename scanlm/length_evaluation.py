"""Accuracy of a state-tracking model at many lengths from few passes.

A causal model's output at position i does not depend on what follows, so its accuracy at length L
is that of the first L positions of longer words: one pass over the longest words gives every
shorter length, *on the same words*. Lengths up to 1,024 share one pass, each longer one has its
own (of fewer words). All families here are causal.

Intervals are 95 % Wilson score intervals. Positions of one word are not independent, so for the
accuracy over all positions the words are the sampling units: the interval is that of the number
of independent positions that would have the same variance (the design effect).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scanlm.errors import ScanLMError, check_name
from scanlm.groups import Group, get_group, word_batch
from scanlm.scoring import in_mode

LENGTHS = (*range(4, 19), 24, 32, 48, 64, 96, 128, 180, 256, 512, 1024, 4096, 16384)
SHARED = 1024  # up to here all lengths are read from one pass
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
EXACT_POSITIONS, BINS_PER_OCTAVE = 32, 8
Z95 = 1.959964


def wilson(successes: float, n: float) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion."""
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # exactly 0 and 1 at the ends, where rounding would leave a trace
    return (centre - half if p > 0 else 0.0), (centre + half if p < 1 else 1.0)


@dataclass(frozen=True)
class Proportion:
    """A measured share: ``n`` trials and the 95 % interval."""

    value: float
    n: int
    low: float
    high: float


def _proportion(value: float, n: int, independent: float | None = None) -> Proportion:
    trials = n if independent is None else independent
    return Proportion(value, n, *wilson(value * trials, trials))


@dataclass
class LengthEvaluation:
    """Accuracies by length, and by position of the longest words of each pass.

    Attributes:
        accuracy, accuracy_last, accuracy_sequence: by length; ``n`` is positions for the first
            and words for the others.
        by_position: by length of the pass, a list of (last position of the bin, from 1; share).
        dtype: "float32" or "bfloat16".
    """

    dtype: str
    accuracy: dict[int, Proportion] = field(default_factory=dict)
    accuracy_last: dict[int, Proportion] = field(default_factory=dict)
    accuracy_sequence: dict[int, Proportion] = field(default_factory=dict)
    by_position: dict[int, list[tuple[int, Proportion]]] = field(default_factory=dict)

    def metrics(self) -> list[tuple[str, float, dict[str, Any]]]:
        """``(name, value, axes)`` of everything measured, as records log it."""
        rows: list[tuple[str, float, dict[str, Any]]] = []
        for name in ("accuracy", "accuracy_last", "accuracy_sequence"):
            rows += [
                (name, p.value, {"length": length, **_interval(p)})
                for length, p in getattr(self, name).items()
            ]
        for length, bins in self.by_position.items():
            rows += [
                ("accuracy", p.value, {"length": length, "position": position, **_interval(p)})
                for position, p in bins
            ]
        return [(n, v, {**axes, "dtype": self.dtype, "split": "test"}) for n, v, axes in rows]

    def reach(self, level: float = 0.99) -> int:
        """See ``reach``."""
        return reach({length: p.value for length, p in self.accuracy.items()}, level)


def _interval(p: Proportion) -> dict[str, Any]:
    return {"n": p.n, "low": p.low, "high": p.high}


def reach(accuracies: Mapping[int, float], level: float = 0.99) -> int:
    """The greatest measured length up to which accuracy over all positions stays at ``level``.

    Lengths before the first that fails count, so a lucky longer one does not; 0 if none holds.
    """
    result = 0
    for length in sorted(accuracies):
        if not accuracies[length] >= level:
            break
        result = length
    return result


def word_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits ``(b, t, order)`` of words ``(b, t)``."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def position_limit(model: nn.Module) -> int | None:
    """The longest word that can be read: ``n_positions`` of absolute positions, else ``None``."""
    config = getattr(model, "config", None)
    if getattr(config, "position_embedding", "absolute") != "absolute":
        return None
    return getattr(config, "n_positions", None)


def check_counts(lengths: Sequence[int], name: str = "lengths") -> None:
    """Refuse lengths that no word has.

    Raises:
        ScanLMError: there are none, or one is below 1.
    """
    if not lengths:
        raise ScanLMError(f"{name} is empty: name at least one length to evaluate")
    if min(lengths) < 1:
        raise ScanLMError(f"{name}: a length must be at least 1, got {min(lengths)}")


def check_lengths(model: nn.Module, lengths: Sequence[int]) -> None:
    """Refuse lengths below 1 and beyond the model's positions.

    Raises:
        ScanLMError: names the length.
    """
    check_counts(lengths)
    limit = position_limit(model)
    if limit is not None and max(lengths) > limit:
        raise ScanLMError(
            f"length {max(lengths)} is beyond n_positions={limit}: a model with absolute "
            "positions has no embedding there; leave the length out or use a larger n_positions"
        )


def bin_edges(length: int) -> list[int]:
    """Last positions (from 1) of the bins: single positions up to 32, then 8 an octave."""
    edges = list(range(1, min(length, EXACT_POSITIONS) + 1))
    k = 1
    while edges[-1] < length:
        edges.append(min(round(EXACT_POSITIONS * 2 ** (k / BINS_PER_OCTAVE)), length))
        k += 1
    return edges


@torch.inference_mode()
def evaluate_lengths(
    model: nn.Module,
    group: Group | str,
    lengths: Sequence[int] = LENGTHS,
    sequences: int = 10_000,
    long_sequences: int = 500,
    batch_tokens: int = 2**17,
    precision: str = "fp32",
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> LengthEvaluation:
    """Accuracy at many lengths on new words of the test stream.

    Args:
        model: called as ``model(input_ids=x, use_cache=False).logits``, ``(b, t, order)``; causal.
        group: the group or its name.
        lengths: lengths to report.
        sequences: words for all lengths up to 1,024 (the same words for each).
        long_sequences: words for each greater length.
        batch_tokens: tokens a batch.
        precision: "fp32", or "bf16" for autocast.
        seed: of the test words; the same for every model, so that models are compared on equal
            words.
        progress: receives a line of text after each pass.

    Raises:
        ScanLMError: a length below 1 or beyond ``n_positions``, an unknown precision.
    """
    group = get_group(group)
    check_lengths(model, lengths)
    check_name("precision", precision, PRECISIONS)
    if sequences < 1 or long_sequences < 1:
        raise ScanLMError(f"sequences must be at least 1, got {min(sequences, long_sequences)}")
    passes = [sorted(x for x in set(lengths) if x <= SHARED)]
    passes += [[x] for x in sorted(set(lengths)) if x > SHARED]
    result = LengthEvaluation(PRECISIONS[precision])
    with in_mode(model):
        for shared in filter(None, passes):
            n = sequences if shared[-1] <= SHARED else long_sequences
            start = time.perf_counter()
            _one_pass(model, group, shared, n, batch_tokens, precision, seed, result)
            if progress is not None:
                seconds = time.perf_counter() - start
                progress(f"{n:,} words of length {shared[-1]:,} in {precision}: {seconds:.0f} s")
    return result


def _one_pass(
    model: nn.Module,
    group: Group,
    lengths: list[int],
    sequences: int,
    batch_tokens: int,
    precision: str,
    seed: int,
    result: LengthEvaluation,
) -> None:
    device = next(model.parameters()).device
    longest = lengths[-1]
    rows = min(max(batch_tokens // longest, 1), sequences)
    at = torch.tensor(lengths, device=device) - 1
    correct = torch.zeros(longest, dtype=torch.int64, device=device)
    whole = torch.zeros(len(lengths), dtype=torch.int64, device=device)
    squares = torch.zeros(len(lengths), dtype=torch.float64, device=device)
    for first in range(0, sequences, rows):
        count = min(rows, sequences - first)
        x, y = word_batch(group, count, longest, seed, 0, device, "test", first=first)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = word_logits(model, x)
        hits = logits.argmax(-1) == y
        running = hits.cumsum(1)[:, at]
        correct += hits.sum(0)
        whole += (running == at + 1).sum(0)
        squares += (running.double() / (at + 1)).square().sum(0)
    hits_by_position = correct.cumsum(0).tolist()
    for length, complete, square in zip(lengths, whole.tolist(), squares.tolist(), strict=True):
        before = hits_by_position[length - 2] if length > 1 else 0
        share = hits_by_position[length - 1] / (sequences * length)
        variance = max(square / sequences - share**2, 0.0)  # of a word's share
        independent = float(sequences)
        if variance > 0:
            independent = sequences * share * (1 - share) / variance
        last = (hits_by_position[length - 1] - before) / sequences
        result.accuracy[length] = _proportion(share, sequences * length, independent)
        result.accuracy_last[length] = _proportion(last, sequences)
        result.accuracy_sequence[length] = _proportion(complete / sequences, sequences)
    edges = bin_edges(longest)
    result.by_position[longest] = []
    for first, last_position in zip([0, *edges[:-1]], edges, strict=True):
        hits_in_bin = hits_by_position[last_position - 1] - (
            hits_by_position[first - 1] if first else 0
        )
        trials = sequences * (last_position - first)
        share = hits_in_bin / trials
        # words are the sampling units here too: the interval is that of one position a word
        result.by_position[longest].append(
            (last_position, _proportion(share, trials, float(sequences)))
        )
