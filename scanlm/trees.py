"""What a scan's trace says about its tree: formulas, cost, distances; and other trees to compare.

A trace is the list of ``scanlm.scan.Combine`` that every scan fills when given ``trace=[]``. A node
is named by the half-open span of chunks it covers, and within one tree a span names one node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from scanlm.errors import ScanLMError

if TYPE_CHECKING:  # scanlm.scan imports torch, which figures and the command line do not need
    from scanlm.scan import Combine, Span

T = TypeVar("T")


def is_perfect(span: Span) -> bool:
    """Whether a span is a perfect binary subtree: 2**h chunks, starting at a multiple of 2**h."""
    start, size = span[0], span[1] - span[0]
    return size & (size - 1) == 0 and start % size == 0


def formula(trace: Iterable[Combine], span: Span) -> str:
    """How a node was bracketed: ``((x0x1)(x2x3))``, one pair of parentheses a combine.

    Raises:
        ScanLMError: the trace makes no such node.
    """
    made = {node.out: node for node in trace}
    parts: list[str] = []
    waiting: list[Span | str] = [span]  # a stack of its own: trees may be deeper than Python's
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, str):
            parts.append(inner)
        elif inner[1] - inner[0] == 1:
            parts.append(f"x{inner[0]}")
        elif inner in made:
            parts.append("(")
            waiting += [")", made[inner].right, made[inner].left]
        else:
            spans = ", ".join(map(str, sorted(made))) or "none"
            raise ScanLMError(f"the trace makes no node {inner}; it makes {spans}")
    return "".join(parts)


def levels(trace: Iterable[Combine]) -> dict[Span, int]:
    """Earliest round in which each node can be made if rounds are unlimited in width.

    A chunk has level 0, a node one more than the higher of its operands. Nodes may be listed in
    any order in which operands come before results.
    """
    level: dict[Span, int] = {}
    for node in trace:
        level[node.out] = 1 + max(level.get(node.left, 0), level.get(node.right, 0))
    return level


def path_lengths(trace: Iterable[Combine], num_chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """How far each chunk lies from the prefix that another chunk reads.

    Args:
        trace: of any scan over ``num_chunks`` chunks, operands before results.
        num_chunks: n.

    Returns:
        Two ``(n, n)`` float arrays, NaN where j >= i (the prefix is exclusive). Entry ``[i, j]``
        of the first is the number of combines between chunk j and prefix(i), that of the second
        in how many of those chunk j is on the left.
    """
    paths: dict[Span, np.ndarray] = {}  # of a node's chunks: combines and lefts, (2, size)

    def below(span: Span) -> np.ndarray:
        return paths[span] if span[1] - span[0] > 1 else np.zeros((2, 1))

    to_left, to_right = np.array([[1], [1]]), np.array([[1], [0]])
    for node in trace:
        left, right = below(node.left) + to_left, below(node.right) + to_right
        paths[node.out] = np.concatenate([left, right], axis=1)
    lengths = np.full((2, num_chunks, num_chunks), np.nan)
    for i in range(1, num_chunks):
        lengths[:, i, :i] = below((0, i))
    return lengths[0], lengths[1]


def left_fold(combine: Callable[[T, T], T], xs: Sequence[T]) -> T:
    """``(((x0 x1) x2) x3) ...``: what a recurrent network does."""
    return reduce(combine, xs)


def right_fold(combine: Callable[[T, T], T], xs: Sequence[T]) -> T:
    """``... (x0 (x1 (x2 x3)))``."""
    return reduce(lambda right, left: combine(left, right), reversed(xs))


def balanced_fold(combine: Callable[[T, T], T], xs: Sequence[T]) -> T:
    """Halve the sequence (left half not smaller), fold each half so, and combine the two."""
    if len(xs) == 1:
        return xs[0]
    mid = (len(xs) + 1) // 2
    return combine(balanced_fold(combine, xs[:mid]), balanced_fold(combine, xs[mid:]))


FOLDS: dict[str, Callable[..., Any]] = {
    "left fold": left_fold,
    "balanced": balanced_fold,
    "right fold": right_fold,
}


def scan_fold(combine: Callable[[T, T], T], xs: Sequence[T]) -> T:
    """The fold of all of ``xs`` that the scans compute: ``prefix(len(xs))``."""
    from scanlm.scan import sequential_scan

    folded = sequential_scan(combine, [*xs, xs[0]])[-1]
    assert folded is not None  # len(xs) >= 1, so the last prefix exists
    return folded


def fold_trace(fold: Callable[..., Any], n: int) -> list[Combine]:
    """The nodes of the tree by which a fold joins n leaves, root last."""
    from scanlm.scan import Combine

    trace: list[Combine] = []

    def record(left: Span, right: Span) -> Span:
        trace.append(Combine(len(trace), left, right))
        return trace[-1].out

    wanted = {fold(record, [(i, i + 1) for i in range(n)])}
    for node in reversed(
        trace
    ):  # a scan makes other prefixes on its way, which are not in the tree
        if node.out in wanted:
            wanted |= {node.left, node.right}
    return [node for node in trace if node.out in wanted]


def scan_trace(n: int) -> list[Combine]:
    """Trace of the parallel scan over n chunks (exclusive: the last chunk enters no prefix)."""
    import torch

    from scanlm.scan import blelloch_scan

    trace: list[Combine] = []
    blelloch_scan(torch.add, torch.zeros(1, n, 1), trace=trace)
    return trace


def counter_trace(n: int) -> list[Combine]:
    """Trace of the binary counter after n pushes."""
    from scanlm.scan import OnlineScan

    trace: list[Combine] = []
    online = OnlineScan[int](lambda left, right: left + right, trace=trace)
    for i in range(n):
        online.push(i)
    return trace


def scan_costs(lengths: Iterable[int]) -> list[dict[str, Any]]:
    """Work and depth of computing all exclusive prefixes of n chunks, counted from traces.

    Returns:
        One row a length and way: ``n``, ``scan`` ("parallel scan", "same tree, node by node" or
        "left fold"), ``combines`` (work) and ``rounds`` (combines that must follow each other:
        batched calls of the parallel scan, every combine of the others).
    """
    rows = []
    for n in lengths:
        parallel, chain = scan_trace(n), fold_trace(left_fold, max(n - 1, 1))
        calls = len({node.step for node in parallel})
        for name, work, rounds in (
            ("left fold", len(chain), len(chain)),
            ("same tree, node by node", len(parallel), len(parallel)),
            ("parallel scan", len(parallel), calls),
        ):
            rows.append({"n": n, "scan": name, "combines": work, "rounds": rounds})
    return rows


def bracketing_gaps(
    combine: Callable[[Any, Any], Any], leaves: Any, lengths: Iterable[int], operator: str
) -> list[dict[str, Any]]:
    """How far other trees over the same leaves end from the scan's result.

    Args:
        combine: two states ``(1, ...)`` to one.
        leaves: tensor ``(n, ...)``, the states of n chunks.
        lengths: numbers of leading leaves to fold.
        operator: a name for the rows.

    Returns:
        One row a length and tree: ``n``, ``operator``, ``tree`` and ``gap``, the norm of the
        difference over the norm of the scan's result.
    """
    from scanlm.scan import sequential_scan

    rows = []
    chunks = list(leaves.split(1))
    prefixes: list[Any] = sequential_scan(combine, [*chunks, chunks[0]])
    for n in lengths:
        reference = prefixes[n]
        for name, fold in FOLDS.items():
            gap = (fold(combine, chunks[:n]) - reference).norm() / reference.norm()
            rows.append({"n": n, "operator": operator, "tree": name, "gap": float(gap)})
    return rows
