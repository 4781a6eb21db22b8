"""Traces: formulas, levels, paths, costs; other trees over the same leaves."""

import sys

import numpy as np
import pytest
import torch

from scanlm import trees
from scanlm.errors import ScanLMError


def spell(left: str, right: str) -> str:
    return f"({left}{right})"


def test_formula_has_one_pair_of_parentheses_a_combine() -> None:
    trace = trees.scan_trace(8)
    assert trees.formula(trace, (0, 4)) == "((x0x1)(x2x3))"
    assert trees.formula(trace, (0, 7)) == "((((x0x1)(x2x3))(x4x5))x6)"
    assert trees.formula(trace, (5, 6)) == "x5"


def test_formula_of_a_node_that_was_not_made() -> None:
    with pytest.raises(ScanLMError, match=r"no node \(1, 3\)"):
        trees.formula(trees.scan_trace(8), (1, 3))


@pytest.mark.parametrize("n", range(2, 41))
def test_counter_and_parallel_scan_make_the_same_nodes(n: int) -> None:
    parallel, online = trees.scan_trace(n), trees.counter_trace(n - 1)
    assert {(c.left, c.right) for c in parallel} == {(c.left, c.right) for c in online}


@pytest.mark.parametrize("n", [3, 8, 9, 33])
def test_each_call_makes_the_nodes_of_one_level(n: int) -> None:
    trace = trees.scan_trace(n)
    level = trees.levels(trace)
    assert all(level[node.out] == node.step for node in trace)


def test_perfect_spans() -> None:
    perfect = [(a, b) for a in range(5) for b in range(a + 1, 5) if trees.is_perfect((a, b))]
    assert perfect == [(0, 1), (0, 2), (0, 4), (1, 2), (2, 3), (2, 4), (3, 4)]


def test_path_lengths_of_prefix_six() -> None:
    combines, lefts = trees.path_lengths(trees.scan_trace(8), 8)
    # prefix(6) = (((x0x1)(x2x3))(x4x5))
    assert combines[6, :6].tolist() == [3, 3, 3, 3, 2, 2]
    assert lefts[6, :6].tolist() == [3, 2, 2, 1, 1, 0]
    assert np.isnan(combines[np.triu_indices(8)]).all()
    assert np.isnan(lefts[np.triu_indices(8)]).all()


@pytest.mark.parametrize("fold", [trees.left_fold, trees.right_fold])
def test_a_tree_may_be_deeper_than_pythons_stack(fold) -> None:  # type: ignore[no-untyped-def]
    n = sys.getrecursionlimit() + 500
    trace = trees.fold_trace(fold, n)
    assert trees.formula(trace, (0, n)) == fold(spell, [f"x{i}" for i in range(n)])


def test_path_lengths_of_a_recurrence_count_the_chunks_since() -> None:
    n = sys.getrecursionlimit() + 500
    combines, lefts = trees.path_lengths(trees.fold_trace(trees.left_fold, n - 1), n)
    i, j = np.tril_indices(n, -1)
    assert np.array_equal(combines[i, j], i - np.maximum(j, 1))
    assert np.array_equal(lefts[i, j], i - 1 - j)


@pytest.mark.parametrize(
    ("fold", "expected"),
    [
        (trees.left_fold, "((((x0x1)x2)x3)x4)"),
        (trees.right_fold, "(x0(x1(x2(x3x4))))"),
        (trees.balanced_fold, "(((x0x1)x2)(x3x4))"),
        (trees.scan_fold, "(((x0x1)(x2x3))x4)"),
    ],
)
def test_folds_and_their_traces(fold, expected) -> None:  # type: ignore[no-untyped-def]
    assert fold(spell, [f"x{i}" for i in range(5)]) == expected
    trace = trees.fold_trace(fold, 5)
    assert len(trace) == 4  # the nodes of the root's tree only
    assert trees.formula(trace, (0, 5)) == expected


def test_costs_are_those_of_the_facts() -> None:
    rows = {(r["n"], r["scan"]): r for r in trees.scan_costs([8, 64, 1024])}
    assert [rows[n, "parallel scan"]["combines"] for n in (8, 64, 1024)] == [8, 114, 2026]
    assert rows[8, "parallel scan"]["rounds"] == 4
    assert rows[64, "same tree, node by node"]["rounds"] == 114
    assert rows[1024, "left fold"] == {
        "n": 1024,
        "scan": "left fold",
        "combines": 1022,
        "rounds": 1022,
    }


def test_gaps_vanish_for_associative_operators_and_for_equal_trees_only() -> None:
    torch.manual_seed(0)
    matrices = torch.linalg.qr(torch.randn(9, 4, 4, dtype=torch.float64))[0]

    def skew(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.tanh(a) - 0.5 * b.flip(-1)

    product = trees.bracketing_gaps(torch.matmul, matrices, range(3, 10), "product")
    assert max(row["gap"] for row in product) < 1e-14
    gaps = {
        (row["n"], row["tree"]): row["gap"]
        for row in trees.bracketing_gaps(skew, matrices, range(3, 10), "skew")
    }
    assert gaps[3, "left fold"] == gaps[4, "balanced"] == gaps[8, "balanced"] == 0
    different = [gap for (n, tree), gap in gaps.items() if (n, tree) == (7, tree)]
    assert len(different) == 3
    assert min(different) > 1e-2
