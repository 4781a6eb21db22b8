"""Exclusive prefix scans of an operator that need not be associative.

A prefix scan of an associative operator may bracket its operands as it likes. T1 of a
TransformerScanModel is *not* associative, so the bracketing (the tree) is part of the model's
definition and every algorithm here evaluates the same one:

    prefix(i) = left fold, largest first, of the perfect binary subtrees of the binary digits of i
    prefix(6) = combine(tree(0, 4), tree(4, 6))          because 6 = 4 + 2
    tree(0, 4) = combine(combine(x0, x1), combine(x2, x3))

with the recursion ``prefix(i) = combine(prefix(i - low), tree(i - low, i))``, where ``low`` is the
lowest set bit of ``i``. The identity is never handed to ``combine``: chunk 0 has no prefix.

Three evaluations of that one tree (Prefix-Scannable Models, arXiv 2506.10918, section 3):

``sequential_scan``  one node at a time, straight from the definition: the oracle of the tests
``blelloch_scan``    all independent nodes at once: O(n) work, O(log n) batched calls (training)
``OnlineScan``       one chunk after another with a binary counter: O(log n) memory (generation)

A node is named by the half-open span of chunks it covers: ``(4, 6)`` is ``tree(4, 6)`` and
``(0, 6)`` is ``prefix(6)``. Within one tree a span names one node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from scanlm.errors import ScanLMError

T = TypeVar("T")
Span = tuple[int, int]


@dataclass(frozen=True)
class Combine:
    """One evaluation of ``combine`` as a trace records it."""

    step: int  # the batched call (blelloch), the push (online) or the node count (sequential)
    left: Span
    right: Span

    @property
    def out(self) -> Span:
        """Span of the node that was made."""
        return self.left[0], self.right[1]


Trace = list[Combine]


def lowest_bit(i: int) -> int:
    """Value of the lowest set bit of ``i`` (6 -> 2)."""
    return i & -i


def sequential_scan(
    combine: Callable[[T, T], T], xs: Sequence[T], trace: Trace | None = None
) -> list[T | None]:
    """Exclusive prefixes of ``xs``, one node at a time from the definition.

    Args:
        combine: any function of two states, called as ``combine(left, right)``.
        xs: the chunks' states.
        trace: a list that receives one ``Combine`` a node, in order of evaluation.

    Returns:
        A list as long as ``xs``: entry ``i`` is ``prefix(i)``, entry 0 is ``None``.
    """
    steps = 0

    def node(left: T, right: T, left_span: Span, right_span: Span) -> T:
        nonlocal steps
        if trace is not None:
            trace.append(Combine(steps, left_span, right_span))
        steps += 1
        return combine(left, right)

    trees: dict[Span, T] = {}

    def tree(start: int, stop: int) -> T:
        if stop - start == 1:
            return xs[start]
        if (start, stop) not in trees:
            mid = (start + stop) // 2
            trees[start, stop] = node(tree(start, mid), tree(mid, stop), (start, mid), (mid, stop))
        return trees[start, stop]

    prefixes: list[T | None] = [None] * len(xs)
    for i in range(1, len(xs)):
        start = i - lowest_bit(i)
        left, right = prefixes[start], tree(start, i)
        prefixes[i] = right if left is None else node(left, right, (0, start), (start, i))
    return prefixes


@dataclass(frozen=True)
class _Call:
    """The nodes of one batched call of ``combine``."""

    trees: tuple[Combine, ...]
    folds: tuple[Combine, ...]  # of a shorter prefix and a tree; first those that others hang on
    whole: int  # how many trees are prefixes, too: the first one or none
    lefts: int  # how many folds others hang on


@lru_cache(maxsize=32)  # of 2,047 leaves a plan takes a megabyte, and 4 ms to make
def _schedule(n: int, seeded: bool) -> tuple[_Call, ...]:
    """Plan prefix(1) ... prefix(n) so that each node is made as early as its operands allow.

    A perfect tree of height h is made by call h. ``prefix(i)`` hangs on ``prefix(i - low)`` and on
    a tree of height log2(low), and is made by the call after both are there.

    Args:
        n: number of leaves.
        seeded: whether all prefixes start from an earlier fold, of span (0, 0); else those of
            1, 2, 4, ... leaves are trees.
    """
    trees: list[list[Combine]] = [[] for _ in range(2 * n.bit_length() + 1)]
    folds: list[list[Combine]] = [[] for _ in trees]
    for height in range(1, n.bit_length()):
        half = 1 << (height - 1)
        for start in range(0, n - 2 * half + 1, 2 * half):
            mid, stop = start + half, start + 2 * half
            trees[height].append(Combine(height, (start, mid), (mid, stop)))
    ready = [0] * (n + 1)  # by which call
    for i in range(1, n + 1):
        low = lowest_bit(i)
        height, start = low.bit_length() - 1, i - low
        ready[i] = height
        if start or seeded:
            ready[i] = max(ready[start], height) + 1
            folds[ready[i]].append(Combine(ready[i], (0, start), (start, i)))
    calls = []
    for made, joined in zip(trees, folds, strict=True):
        # an odd prefix ends in a leaf; of an even one the next is made, if there is a next
        lefts = [fold for fold in joined if fold.out[1] % 2 == 0 and fold.out[1] < n]
        others = [fold for fold in joined if fold.out[1] % 2 or fold.out[1] == n]
        if made or joined:
            whole = 1 if made and not seeded else 0
            calls.append(_Call(tuple(made), tuple(lefts + others), whole, len(lefts)))
    return tuple(calls)


def num_combines(n: int) -> int:
    """How many combines the prefixes 1 ... n of n leaves need.

    Raises:
        ScanLMError: n < 0.
    """
    if n < 0:
        raise ScanLMError(f"n={n}: expected a number of leaves >= 0")
    return sum(len(call.trees) + len(call.folds) for call in _schedule(n, False))


@dataclass(frozen=True)
class _Move:
    """Where the operands of a call lie among the nodes at hand, and which of these stay there.

    Attributes:
        pairs: left and right operand of each node of the call, in turn.
        rest: what later calls read.
        first: of each node at hand, its first place in ``pairs`` and ``rest``, side by side.
        again: which nodes have a second place, and where; a third; and so on.
    """

    pairs: Tensor
    rest: Tensor
    first: Tensor
    again: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, pairs: Sequence[int], rest: Sequence[int], device: torch.device) -> _Move:
        """From the rows that are read and that stay; every row at hand is one of these."""

        def copied(rows: Sequence[int]) -> Tensor:
            return torch.tensor(rows, dtype=torch.int64, device=device)

        places: dict[int, list[int]] = {}
        for place, row in enumerate([*pairs, *rest]):
            places.setdefault(row, []).append(place)
        again = []
        for nth in range(1, max(map(len, places.values()))):
            rows = [row for row, found in places.items() if len(found) > nth]
            again.append((copied(rows), copied([places[row][nth] for row in rows])))
        first = [places[row][0] for row in sorted(places)]
        return cls(copied(pairs), copied(rest), copied(first), tuple(again))


class _Taken(torch.autograd.Function):
    """``pairs`` and ``rest`` of the nodes at hand ``(batch, m, ...)``.

    The gradient of a node is the sum over its places, in a fixed order. Indexing would add them
    up as they come, and one operation a node costs more time on the host than all else of a
    scan of a thousand.
    """

    @staticmethod
    def forward(ctx: Any, nodes: Tensor, move: _Move) -> tuple[Tensor, Tensor]:
        ctx.move = move
        return nodes.index_select(1, move.pairs), nodes.index_select(1, move.rest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        placed = torch.cat(gradients, 1)
        total = placed.index_select(1, ctx.move.first)
        for nodes, places in ctx.move.again:
            total.index_add_(1, nodes, placed.index_select(1, places))
        return total, None


@cache
def _moves(n: int, seeded: bool, device: torch.device) -> tuple[tuple[_Move, ...], Tensor]:
    """A move for each call of ``_schedule``, and where prefix(1) ... prefix(n) lie in the end.

    They are copied to the device once, a copy from the host would stall every scan, and kept for
    good, 300 bytes a leaf: a captured CUDA graph goes on reading them where they lie.
    """
    calls = _schedule(n, seeded)
    # a span is a tree, and from 0 on, with an earlier fold, a prefix too
    prefix, tree = ("prefix", "tree") if seeded else ("node", "node")
    reads = [
        [
            *((tree, side) for node in call.trees for side in (node.left, node.right)),
            *(x for node in call.folds for x in ((prefix, node.left), (tree, node.right))),
        ]
        for call in calls
    ]
    last = {name: step for step, names in enumerate(reads) for name in names}
    hand = [(tree, (i, i + 1)) for i in range(n)]
    hand = [(prefix, (0, 0)), *hand] if seeded else hand

    with torch.inference_mode(False):  # else a later backward pass could not use them
        moves = []
        for step, (call, names) in enumerate(zip(calls, reads, strict=True)):
            at = {name: row for row, name in enumerate(hand)}
            kept = [name for name in hand if last[name] > step]
            rows = ([at[name] for name in names], [at[name] for name in kept])
            moves.append(_Move.of(*rows, device))
            made = [(tree, node.out) for node in call.trees]
            made += [(prefix, node.out) for node in call.folds[: call.lefts]]
            hand = kept + [name for name in made if name in last]
        ends = [] if seeded else [1]
        for call in calls:
            ends += [node.out[1] for node in call.trees[: call.whole] + call.folds]
        order = {end: row for row, end in enumerate(ends)}
        rows_in_order = [order[i] for i in range(1, n + 1)]
        return tuple(moves), torch.tensor(rows_in_order, device=device)


@dataclass(frozen=True)
class ScanTree:
    """All nodes of a parallel scan over ``n`` leaves.

    Attributes:
        prefixes: ``(batch, n, ...)``, entry ``i`` is ``prefix(i + 1)``: the fold of leaves 0..i.
        trees: per height h the perfect trees ``(batch, n >> h, ...)``; height 0 are the leaves.
    """

    prefixes: Tensor
    trees: list[Tensor]


def scan_tree(
    combine: Callable[[Tensor], Tensor],
    leaves: Tensor,
    initial: Tensor | None = None,
    trace: Trace | None = None,
) -> ScanTree:
    """Evaluate every prefix of ``leaves`` with as few, as large and as early calls as possible.

    Args:
        combine: maps pairs of states ``(batch * pairs, 2, ...)`` to states ``(batch * pairs,
            ...)``.
        leaves: ``(batch, n, ...)`` with n >= 1.
        initial: ``(batch, ...)``, the fold of all earlier chunks, from which every prefix starts.
            The result equals the scan over the whole past if the number of earlier chunks is a
            multiple of a power of two > n.
        trace: a list that receives one ``Combine`` a node, ``step`` being the number of the call.

    Returns:
        The prefixes 1 ... n and the perfect trees.
    """
    (batch, n), seeded = leaves.shape[:2], initial is not None
    moves, order = _moves(n, seeded, leaves.device)
    hand = [leaves] if initial is None else [initial.unsqueeze(1), leaves]
    trees, prefixes = [leaves], [] if seeded else [leaves[:, :1]]
    for call, move in zip(_schedule(n, seeded), moves, strict=True):
        pairs, rest = _Taken.apply(torch.cat(hand, 1), move)
        made = combine(pairs.unflatten(1, (-1, 2)).flatten(0, 1)).unflatten(0, (batch, -1))
        if call.trees:
            trees.append(made[:, : len(call.trees)])
        sizes = [call.whole, len(call.trees) - call.whole]
        sizes += [call.lefts, len(call.folds) - call.lefts]
        whole, *read, unread = made.split(sizes, 1)
        prefixes += [whole, read[1], unread]
        # no call reads the tree of all leaves
        hand = [rest, *read] if n == 1 << (len(trees) - 1) else [rest, whole, *read]
        if trace is not None:
            trace.extend(call.trees + call.folds)
    return ScanTree(torch.cat(prefixes, 1).index_select(1, order), trees)


def blelloch_scan(
    combine: Callable[[Tensor, Tensor], Tensor], x: Tensor, trace: Trace | None = None
) -> Tensor:
    """Exclusive prefixes of all chunks in O(log n) batched calls (Blelloch 1990).

    Args:
        combine: maps two states ``(batch * pairs, ...)`` to one of the same shape; it is called
            at most ``2 * ceil(log2(chunks))`` times, on at most ``2 * (chunks - 1)`` pairs in all.
        x: ``(batch, chunks, ...)``, any number of chunks >= 1.
        trace: a list that receives one ``Combine`` a node, ``step`` being the number of the call.

    Returns:
        A tensor of ``x``'s shape: entry ``i`` is ``prefix(i)``; entry 0 is zeros and stands for
        "no prefix".

    Raises:
        ValueError: ``x`` has fewer than two dimensions or no chunks.
    """
    if x.dim() < 2 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, chunks >= 1, ...), got shape {tuple(x.shape)}")
    zeros = torch.zeros_like(x[:, :1])
    if x.shape[1] == 1:
        return zeros
    tree = scan_tree(lambda pairs: combine(*pairs.unbind(1)), x[:, :-1], trace=trace)
    return torch.cat([zeros, tree.prefixes], 1)


class OnlineScan(Generic[T]):
    """The same tree, one chunk after another, with a binary counter.

    The live roots are the trees of the binary digits of the number of chunks seen, and beside
    each root stands the fold of it and all larger ones. A push carries like adding one to a
    binary number: one combine a carried digit and one to renew the last fold, fewer than two on
    average, while at most ``2 * (floor(log2(n)) + 1)`` states are held.
    """

    def __init__(self, combine: Callable[[T, T], T], trace: Trace | None = None) -> None:
        self.combine = combine
        self.trace = trace
        self.num_chunks = 0
        self.num_combines = 0
        self._heights: list[int] = []
        self._roots: list[T] = []
        self._folds: list[T] = []
        self._pushes = 0

    @property
    def prefix(self) -> T | None:
        """Exclusive prefix for the next chunk; ``None`` before the first push."""
        return self._folds[-1] if self._folds else None

    @property
    def states(self) -> list[T]:
        """The live roots, largest tree first."""
        return list(self._roots)

    @property
    def folds(self) -> list[T]:
        """Beside each live root the fold of it and all larger ones; the last is ``prefix``."""
        return list(self._folds)

    def map(self, function: Callable[[T], T]) -> None:
        """Replace every state held by ``function`` of it (beam reordering, copies, devices)."""
        self._roots = [function(x) for x in self._roots]
        self._folds = [function(x) for x in self._folds]

    def copy(self) -> OnlineScan[T]:
        """A counter that goes on independently; the states themselves are shared."""
        other = OnlineScan(self.combine)
        other._heights, other._roots = list(self._heights), list(self._roots)
        other._folds = list(self._folds)
        other.num_chunks, other.num_combines = self.num_chunks, self.num_combines
        other._pushes = self._pushes
        return other

    def restore(self, num_chunks: int, roots: Sequence[T], folds: Sequence[T]) -> None:
        """Take over the ``states`` and ``folds`` of a counter after ``num_chunks`` chunks.

        Raises:
            ValueError: their number is not that of the binary digits of ``num_chunks``.
        """
        heights = [h for h in reversed(range(num_chunks.bit_length())) if num_chunks >> h & 1]
        if not len(heights) == len(roots) == len(folds):
            raise ValueError(
                f"{num_chunks} chunks have {len(heights)} roots and folds, got {len(roots)} and "
                f"{len(folds)}"
            )
        self._heights, self._roots, self._folds = heights, list(roots), list(folds)
        self.num_chunks = num_chunks

    def push(self, x: T, height: int = 0) -> None:
        """Fold in one more chunk, or a perfect tree of ``2 ** height`` chunks.

        Raises:
            ValueError: the chunks seen so far are not a multiple of ``2 ** height``.
        """
        if self.num_chunks % (1 << height):
            raise ValueError(
                f"a tree of {1 << height} chunks cannot follow {self.num_chunks} chunks"
            )
        start, mid, stop = self.num_chunks, self.num_chunks, self.num_chunks + (1 << height)
        while self._heights and self._heights[-1] == height:
            self._folds.pop()
            mid, start = start, start - (1 << height)
            x = self._node(self._roots.pop(), x, (start, mid), (mid, stop))
            height = self._heights.pop() + 1
        prefix = self.prefix
        fold = x if prefix is None else self._node(prefix, x, (0, start), (start, stop))
        self._heights.append(height)
        self._roots.append(x)
        self._folds.append(fold)
        self.num_chunks = stop
        self._pushes += 1

    def extend(self, tree: ScanTree) -> None:
        """Fold in the chunks of a parallel scan by reading its nodes, without new combines.

        Args:
            tree: the scan over the next n chunks, made with ``initial=self.prefix``. The states
                must be tensors ``(batch, ...)``; copies are kept, so the tree can be freed.

        Raises:
            ValueError: chunks were seen before and their number is not a multiple of a power of
                two greater than n, so that the scan's nodes are not those of this counter.
        """
        n = tree.prefixes.shape[1]
        if self.num_chunks and lowest_bit(self.num_chunks) <= n:
            raise ValueError(f"a scan of {n} chunks cannot follow {self.num_chunks} chunks")
        start = 0
        for height in reversed(range(n.bit_length())):
            if n >> height & 1:
                root: Any = tree.trees[height][:, start >> height].clone()
                start += 1 << height
                fold: Any = tree.prefixes[:, start - 1].clone() if self._folds else root
                self._heights.append(height)
                self._roots.append(root)
                self._folds.append(fold)
        self.num_chunks += n
        self._pushes += 1

    def _node(self, left: T, right: T, left_span: Span, right_span: Span) -> T:
        if self.trace is not None:
            self.trace.append(Combine(self._pushes, left_span, right_span))
        self.num_combines += 1
        return self.combine(left, right)
