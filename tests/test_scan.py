"""The three scans evaluate one tree, with the work and depth that the design promises."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from scanlm.scan import OnlineScan, blelloch_scan, scan_tree, sequential_scan

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LENGTHS = range(1, 71)
BATCHES = st.integers(1, 4)
SEEDS = st.integers(0, 2**31)
# far enough from 0 that a function made of them is not associative
COEFFICIENTS = st.lists(st.floats(0.3, 1.3) | st.floats(-1.3, -0.3), min_size=4, max_size=4).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
few_examples = settings(deadline=None, max_examples=3)  # at each of 70 lengths


def subtree(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    mid = len(names) // 2
    return f"({subtree(names[:mid])}{subtree(names[mid:])})"


def bracketing(i: int, first: int = 0) -> str | None:
    """The definition, written a third time: binary digits of i, largest first, folded left.

    ``first`` is the number in the name of chunk 0.
    """
    if i == 0:
        return None
    result, start = "", first
    for bit in reversed(range(i.bit_length())):
        if i >> bit & 1:
            tree = subtree([f"x{k}" for k in range(start, start + (1 << bit))])
            result = tree if not result else f"({result}{tree})"
            start += 1 << bit
    return result


class Spelling:
    """Runs a tensor scan on node numbers whose strings spell out how each was combined."""

    def __init__(self, n: int) -> None:
        self.strings = [f"x{i}" for i in range(n)]
        self.calls: list[int] = []

    def combine(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(left))
        made = range(len(self.strings), len(self.strings) + len(left))
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            self.strings.append(f"({self.strings[a]}{self.strings[b]})")
        return torch.tensor(list(made))


def odd_combine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Neither associative nor commutative, and smooth."""
    return torch.tanh(1.3 * left - 0.7 * right.flip(-1)) + 0.2 * left * right


def drawn_combine(coefficients: torch.Tensor) -> Combine:
    a, b, c, d = coefficients

    def combine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.tanh(a * left + b * right.flip(-1) + c * left * right + d)

    return combine


def random_chunks(batch: int, n: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, *shape, dtype=torch.float64, generator=generator)


def assert_all_scans_agree(combine: Combine, x: torch.Tensor) -> None:
    chunks = list(x.unbind(1))
    expected = torch.stack([x[:, 0] * 0, *sequential_scan(combine, chunks)[1:]], 1)
    torch.testing.assert_close(blelloch_scan(combine, x), expected)
    online, seen = OnlineScan(combine), []
    for chunk in chunks:
        seen.append(torch.zeros_like(chunk) if online.prefix is None else online.prefix)
        online.push(chunk)
    torch.testing.assert_close(torch.stack(seen, 1), expected)


@pytest.mark.parametrize("n", LENGTHS)
def test_every_scan_spells_the_defined_tree(n: int) -> None:
    expected = [bracketing(i) for i in range(n)]
    assert sequential_scan(lambda a, b: f"({a}{b})", [f"x{i}" for i in range(n)]) == expected

    online = OnlineScan(lambda a, b: f"({a}{b})")
    seen = []
    for i in range(n):
        seen.append(online.prefix)
        online.push(f"x{i}")
    assert seen == expected


@pytest.mark.parametrize("n", LENGTHS)
@few_examples
@given(batch=BATCHES)
def test_the_parallel_scan_spells_the_defined_tree_in_every_row(n: int, batch: int) -> None:
    spelling = Spelling(batch * n)
    rows = blelloch_scan(spelling.combine, torch.arange(batch * n).view(batch, n)).tolist()
    for row, nodes in enumerate(rows):
        spelled = [spelling.strings[k] for k in nodes[1:]]
        assert spelled == [bracketing(i, first=row * n) for i in range(1, n)]


@pytest.mark.parametrize("n", LENGTHS)
def test_blelloch_combine_and_call_counts(n: int) -> None:
    spelling = Spelling(n)
    blelloch_scan(spelling.combine, torch.arange(n)[None])
    assert sum(spelling.calls) <= 2 * (n - 1)
    assert len(spelling.calls) <= 2 * math.ceil(math.log2(n))
    # no node twice, and none that no prefix needs
    made = spelling.strings[n:]
    assert len(set(made)) == len(made)
    prefixes = [bracketing(i) or "" for i in range(n)]
    assert all(any(node in prefix for prefix in prefixes) for node in made)


@pytest.mark.parametrize(("n", "combines"), [(8, 8), (9, 11), (64, 114), (100, 187), (1024, 2026)])
def test_blelloch_makes_only_the_nodes_of_the_exclusive_scan(n: int, combines: int) -> None:
    spelling = Spelling(n)
    blelloch_scan(spelling.combine, torch.arange(n)[None])
    assert sum(spelling.calls) == combines


def test_eight_chunks_take_eight_combines_in_four_calls() -> None:
    spelling = Spelling(8)
    blelloch_scan(spelling.combine, torch.arange(8)[None])
    assert spelling.calls == [3, 2, 2, 1]


@pytest.mark.parametrize("n", LENGTHS)
def test_blelloch_is_as_early_as_possible(n: int) -> None:
    def depth(text: str) -> int:
        level = deepest = 0
        for char in text:
            level += {"(": 1, ")": -1}.get(char, 0)
            deepest = max(deepest, level)
        return deepest

    spelling = Spelling(n)
    blelloch_scan(spelling.combine, torch.arange(n)[None])
    assert len(spelling.calls) == max(depth(bracketing(i) or "") for i in range(n))


@pytest.mark.parametrize("n", LENGTHS)
@few_examples
@given(batch=BATCHES, seed=SEEDS)
def test_products_of_matrices_agree(n: int, batch: int, seed: int) -> None:
    assert_all_scans_agree(torch.matmul, random_chunks(batch, n, (2, 2), seed))


@pytest.mark.parametrize("n", LENGTHS)
@few_examples
@given(batch=BATCHES, seed=SEEDS, coefficients=COEFFICIENTS)
def test_a_random_function_that_is_not_associative_agrees(
    n: int, batch: int, seed: int, coefficients: torch.Tensor
) -> None:
    combine, x = drawn_combine(coefficients), random_chunks(batch, n, (3,), seed)
    if n >= 3:
        a, b, c = x[:, :3].unbind(1)
        one, other = combine(combine(a, b), c), combine(a, combine(b, c))
        assert not torch.allclose(one, other, rtol=1e-9, atol=0)
    assert_all_scans_agree(combine, x)


@pytest.mark.parametrize("n", LENGTHS)
@few_examples
@given(batch=BATCHES, seed=SEEDS, coefficients=COEFFICIENTS)
def test_gradients_agree_with_the_sequential_scan(
    n: int, batch: int, seed: int, coefficients: torch.Tensor
) -> None:
    x, weight = random_chunks(2 * batch, n, (3,), seed).split(batch)
    inputs = [x.clone().requires_grad_(), coefficients.clone().requires_grad_()]

    def gradients(prefixes: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        loss = sum((prefix * weight[:, i]).sum() for i, prefix in enumerate(prefixes, start=1))
        reached = 0 * sum(tensor.sum() for tensor in inputs)  # by nothing else if n is 1
        return torch.autograd.grad(loss + reached, inputs)

    combine = drawn_combine(inputs[1])
    expected = gradients(sequential_scan(combine, list(inputs[0].unbind(1)))[1:])
    actual = gradients(list(blelloch_scan(combine, inputs[0]).unbind(1))[1:])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class Counted(TorchDispatchMode):
    """Counts the operations that a GPU's host would have to start."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_moving_nodes_takes_operations_by_calls_not_by_nodes() -> None:
    """An operation a node would keep a GPU waiting for its host: a scan of 1,023 has 2,026."""
    x = torch.randn(1, 1023, 1, requires_grad=True)
    calls = []

    def combine(pairs: torch.Tensor) -> torch.Tensor:
        calls.append(len(pairs))
        return pairs.sum(1)

    scan_tree(combine, x)  # its plan is copied to the device once
    calls.clear()
    with Counted() as counted:
        scan_tree(combine, x).prefixes.sum().backward()
    assert len(calls) == 18
    assert counted.operations < 60 * len(calls)


@settings(deadline=None, max_examples=60)
@given(start=st.integers(1, 40), data=st.data())
def test_a_scan_goes_on_from_an_earlier_fold(start: int, data: st.DataObject) -> None:
    past = start * data.draw(st.sampled_from([2, 4, 8, 16]))
    n = data.draw(st.integers(1, (past & -past) - 1))
    names = [f"x{i}" for i in range(past + n)]
    spelling = Spelling(past + n)
    online = OnlineScan(lambda a, b: f"({a}{b})")
    for name in names[:past]:
        online.push(name)
    spelling.strings.append(online.prefix or "")
    initial = torch.tensor([past + n])
    leaves = torch.arange(past, past + n)[None]
    tree = scan_tree(lambda pairs: spelling.combine(*pairs.unbind(1)), leaves, initial)
    made = [spelling.strings[k] for k in tree.prefixes[0].tolist()]
    assert made == [bracketing(past + i + 1) for i in range(n)]


@settings(deadline=None)
@given(heights=st.lists(st.integers(0, 4), max_size=12))
def test_pushing_whole_trees_equals_pushing_their_chunks(heights: list[int]) -> None:
    def join(a: str, b: str) -> str:
        return f"({a}{b})"

    whole, single = OnlineScan(join), OnlineScan(join)
    for height in heights:
        if whole.num_chunks % (1 << height):
            with pytest.raises(ValueError, match=f"a tree of {1 << height} chunks"):
                whole.push("tree", height)
            continue
        names = [f"x{whole.num_chunks + k}" for k in range(1 << height)]
        whole.push(subtree(names), height)
        for name in names:
            single.push(name)
    assert (whole.prefix, whole.states) == (single.prefix, single.states)


def test_online_scan_costs_fewer_than_two_combines_a_push() -> None:
    online = OnlineScan(lambda a, b: a + b)
    before = worst = 0
    for i in range(4096):
        online.push(1)
        worst = max(worst, online.num_combines - before)
        before = online.num_combines
        assert online.prefix == i + 1
        held = len(online.states) + len(online._folds)
        assert held <= 2 * (math.floor(math.log2(i + 1)) + 1)
    assert online.num_combines / 4096 < 2
    assert worst == 12


@pytest.mark.parametrize("n", [1, 2, 7, 8, 13])
def test_traces_name_the_nodes_that_were_made(n: int) -> None:
    xs = torch.randn(1, n, 2)
    names = [f"x{i}" for i in range(n)]
    traces: list[list] = [[], [], []]
    blelloch_scan(odd_combine, xs, trace=traces[0])
    sequential_scan(lambda a, b: a + b, names, trace=traces[1])
    online = OnlineScan(lambda a, b: a + b, trace=traces[2])
    for name in names[:-1]:
        online.push(name)
    spans = [{(c.left, c.right) for c in trace} for trace in traces]
    assert spans[0] == spans[1] == spans[2]
    for trace in traces:
        ready = {(i, i + 1): -1 for i in range(n)}
        for c in trace:  # every operand was made before it is used
            assert c.left in ready
            assert c.right in ready
            ready[c.out] = c.step
        assert [c.step for c in trace] == sorted(c.step for c in trace)


@pytest.mark.parametrize("n", [1, 2, 8, 11])
def test_compiles_as_one_graph(n: int) -> None:
    x = torch.randn(2, n, 3)
    compiled = torch.compile(
        lambda x: blelloch_scan(odd_combine, x), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), blelloch_scan(odd_combine, x))


def test_no_chunks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"chunks >= 1.*\(2, 0, 3\)"):
        blelloch_scan(odd_combine, torch.zeros(2, 0, 3))
