"""The word problem of a finite group: the state-tracking task.

Input is a sequence of group elements g_1, g_2, ... g_n; the target at position i is the running
product up to and *including* g_i, so that targets stand under their own inputs and nothing is
shifted:

    target_i = g_1 g_2 ... g_i        g_1 is applied first, then g_2, ...

Products are read from left to right: for permutations ``(a b)(x) = b(a(x))``. With a = (1, 0, 2)
and b = (0, 2, 1), written as the images of 0, 1, 2: a b maps 0 -> 1 -> 2, 1 -> 0 -> 0 and
2 -> 2 -> 1, so a b = (2, 0, 1), while b a = (1, 2, 0).

S5 is not solvable, so no constant-depth circuit with bounded counters tracks it (Barrington 1989);
the solvable groups S3, S4, Z60 and Z2 are easier, A5 is the smallest that is not.

Sequences are a function of (seed, stream, step) alone: a counter-based generator (splitmix64) in
plain integer arithmetic gives the same batch on every device, whatever was drawn before, and runs
inside a captured CUDA graph with the step as a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import torch
from torch import Tensor

from scanlm.errors import ScanLMError, check_name, nearest

NAMED_GROUPS = ("S5", "S4", "S3", "A5", "Z60", "Z2")
SIZES = {"S": (2, 5), "A": (3, 5), "Z": (2, 512)}  # of each family, the least and the greatest
STREAMS = {"train": 1, "validation": 2, "test": 3, "stories": 4, "shuffle": 5}

# splitmix64 (Steele, Lea, Flood 2014): the increment and the two multipliers
_GAMMA, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = 2**64


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group given by its multiplication table.

    Attributes:
        name: "S5", "A5", "Z60", ...
        elements: permutations as tuples of images, or residues; element 0 is the identity.
        table: ``(order, order)`` int64, ``table[a, b]`` is the index of "a, then b".
    """

    name: str
    elements: tuple[tuple[int, ...] | int, ...]
    table: Tensor

    @property
    def order(self) -> int:
        """Number of elements; the vocabulary of the task."""
        return len(self.elements)

    @property
    def inverses(self) -> Tensor:
        """``(order,)``: the index of each element's inverse."""
        return (self.table == 0).int().argmax(dim=1)

    @property
    def generators(self) -> Tensor:
        """The moves nearest to none at all, which generate the group.

        Those that move the fewest items: transpositions of S_n, cycles of three of A_n; 1 and -1 of
        Z_n. With an element its conjugates and its inverse are among them.
        """
        moved = [
            min(e, self.order - e) if isinstance(e, int) else sum(x != i for i, x in enumerate(e))
            for e in self.elements
        ]
        least = min(m for m in moved if m)
        return torch.tensor([i for i, m in enumerate(moved) if m == least])

    @property
    def is_abelian(self) -> bool:
        """Whether every two elements commute."""
        return bool(torch.equal(self.table, self.table.T))

    @property
    def derived_series(self) -> list[int]:
        """Orders of G, [G, G], [[G, G], [G, G]], ... until they stop falling."""
        members = torch.arange(self.order)
        orders = [self.order]
        while True:
            members = self._generated(self._commutators(members))
            if len(members) == orders[-1]:
                return orders
            orders.append(len(members))

    @property
    def is_solvable(self) -> bool:
        """Whether the derived series ends at the trivial group."""
        return self.derived_series[-1] == 1

    def _commutators(self, members: Tensor) -> Tensor:
        a, b = members.unsqueeze(1), members.unsqueeze(0)
        inverses = self.inverses
        product = self.table[self.table[inverses[a], inverses[b]], self.table[a, b]]
        return product.unique()

    def _generated(self, generators: Tensor) -> Tensor:
        """The subgroup that some elements generate (closed under products, hence finite)."""
        members = generators
        while True:
            larger = torch.cat([members, self.table[members][:, generators].flatten()]).unique()
            if len(larger) == len(members):
                return members
            members = larger

    def check(self) -> None:
        """Verify the group axioms on the table.

        Raises:
            ScanLMError: closure, identity, inverses or associativity do not hold.
        """
        n, table = self.order, self.table
        every = torch.arange(n)
        if table.shape != (n, n) or int(table.min()) < 0 or int(table.max()) >= n:
            raise ScanLMError(f"the table of {self.name} is not closed: entries must be 0..{n - 1}")
        if not (torch.equal(table[0], every) and torch.equal(table[:, 0], every)):
            raise ScanLMError(f"element 0 of {self.name} is not the identity")
        right = self.inverses
        if not bool((table[every, right] == 0).all() and (table[right, every] == 0).all()):
            raise ScanLMError(f"an element of {self.name} has no inverse")
        for a in range(n):  # (a b) c = a (b c), one a at a time: n * n products in memory
            if not torch.equal(table[table[a]], table[a][table]):
                raise ScanLMError(f"the table of {self.name} is not associative at element {a}")


def compose(first: Sequence[int], then: Sequence[int]) -> tuple[int, ...]:
    """The permutation that applies ``first`` and then ``then``."""
    return tuple(then[x] for x in first)


def _is_even(permutation: Sequence[int]) -> bool:
    n = len(permutation)
    pairs = ((i, j) for i in range(n) for j in range(i + 1, n))
    return sum(permutation[i] > permutation[j] for i, j in pairs) % 2 == 0


@lru_cache(maxsize=32)
def _build(family: str, n: int) -> Group:
    if family == "Z":
        residues = torch.arange(n)
        table = (residues.unsqueeze(1) + residues) % n
        group = Group(f"Z{n}", tuple(range(n)), table)
    else:
        chosen = [p for p in permutations(range(n)) if family == "S" or _is_even(p)]
        index = {p: i for i, p in enumerate(chosen)}
        rows = [[index[compose(a, b)] for b in chosen] for a in chosen]
        group = Group(f"{family}{n}", tuple(chosen), torch.tensor(rows))
    group.check()
    return group


def get_group(name: str | Group) -> Group:
    """A group by name: S2..S5, A3..A5 or Z2..Z512 (upper or lower case).

    Raises:
        ScanLMError: an unknown or trivial group, with the nearest name.
    """
    if isinstance(name, Group):
        return name
    match = re.fullmatch(r"([SAZ])([1-9]\d*)", name.strip().upper())
    if match:
        family, n = match[1], int(match[2])
        low, high = SIZES[family]
        if low <= n <= high:
            return _build(family, n)
        raise ScanLMError(
            f"group {name!r} is not available: {family}<n> needs n from {low} to {high}"
        )
    every = ", ".join(f"{family}{low} to {family}{high}" for family, (low, high) in SIZES.items())
    raise ScanLMError(f"unknown group {name!r}.{nearest(name, NAMED_GROUPS)} (all: {every})")


def running_products(table: Tensor, tokens: Tensor) -> Tensor:
    """Products ``g_1 ... g_i`` at every position, in log2(length) rounds of look-ups.

    Group multiplication is associative, so any bracketing will do: each round doubles the span
    that an entry covers (Hillis and Steele 1986).

    Args:
        table: ``(order, order)`` int64 on the tokens' device.
        tokens: ``(batch, length)`` int64.

    Returns:
        ``(batch, length)`` int64.
    """
    order, flat = table.shape[0], table.flatten()
    products, span = tokens, 1
    while span < tokens.shape[1]:
        joined = flat[products[:, :-span] * order + products[:, span:]]
        products = torch.cat([products[:, :span], joined], dim=1)
        span *= 2
    return products


def _signed(value: int) -> int:
    """A 64-bit word as the int64 that has the same bits."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


def _mix(z: Tensor) -> Tensor:
    """The output function of splitmix64; products wrap around as in C."""
    for shift, factor in ((30, _MIX1), (27, _MIX2)):
        logical = (z >> shift) & ((1 << (64 - shift)) - 1)  # >> of int64 keeps the sign
        z = (z ^ logical) * _signed(factor)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@lru_cache(maxsize=1024)
def _key(seed: int, stream: str) -> int:
    """Where a stream of a seed starts in the generator's cycle of 2**64."""
    check_name("stream", stream, STREAMS)
    z = _signed(seed * 8 + STREAMS[stream])
    for _ in range(2):  # twice: neighbouring seeds must not be neighbours in the cycle
        z = int(_mix(torch.tensor(_signed(z + _GAMMA))))
    return z


def _uniform(key: int, counters: Tensor, n: int) -> Tensor:
    """One draw from 0 .. n - 1 for every counter (int64); n far below 2**32."""
    words = _mix(counters * _signed(_GAMMA) + key)
    return (((words >> 32) & 0xFFFFFFFF) * n) >> 32


@lru_cache(maxsize=64)
def _tables_on(group: Group, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return group.table.to(device), group.generators.to(device)


def table_on(group: Group, device: torch.device | str = "cpu") -> Tensor:
    """The multiplication table on a device, copied there once."""
    return _tables_on(group, torch.device(device))[0]


def _story_numbers(stories: int, batch: int, step: int | Tensor, seed: int, at: Tensor) -> Tensor:
    """Which stories ``(batch,)`` a step sees: every epoch is one shuffled pass over all."""
    rows = step * batch + at
    epochs = rows // stories
    first = step * batch // stories
    # a batch no larger than an epoch touches at most two of them: shuffle both
    pair = torch.arange(2, device=at.device).unsqueeze(1) + first
    cards = (pair << 32) + torch.arange(stories, device=at.device)
    order = _mix(cards * _signed(_GAMMA) + _key(seed, "shuffle")).argsort(dim=1)
    return order[epochs - first, rows % stories]


def word_batch(
    group: Group | str,
    batch: int,
    length: int,
    seed: int = 0,
    step: int | Tensor = 0,
    device: torch.device | str = "cpu",
    stream: str = "train",
    stories: int | None = None,
    first: int = 0,
    generators: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Random words and their running products, made on the device.

    Args:
        group: a group or its name.
        batch, length: shape of the batch, both at least 1.
        seed: of the run. Equal (seed, stream, step) give equal batches on every device.
        step: number of the batch; an int64 scalar tensor on the device inside a CUDA graph.
        device: where to make the batch.
        stream: "train", "validation" or "test": independent sequences of one seed.
        stories: if given, a fixed set of so many words, repeated for epochs in a new order each
            (the original's setting), instead of new words at every step.
        first: number of the first word of a larger batch, to make that in parts.
        generators: share of the batch, its first words, whose letters but the first are drawn from
            ``Group.generators`` instead of all elements.

    Returns:
        ``tokens`` and ``targets``, int64 ``(batch, length)``; ``targets[:, i]`` is the product of
        ``tokens[:, : i + 1]``: it belongs to input i, not to the next.

    Raises:
        ScanLMError: unknown group or stream, a size below 1, fewer stories than a batch, or a
            share outside [0, 1].
    """
    group = get_group(group)
    if not 0 <= generators <= 1:
        raise ScanLMError(f"generators={generators} is outside [0, 1]: it is a share of the words")
    for name, value in (("batch", batch), ("length", length)):
        if value < 1:
            raise ScanLMError(f"{name} must be at least 1, got {value}")
    rows = torch.arange(first, first + batch, device=device)
    columns = torch.arange(length, device=device)
    if stories is None:
        counters = (rows * length).unsqueeze(1) + columns + step * (1 << 32)
        key = _key(seed, stream)
    else:
        if stories < batch:
            raise ScanLMError(
                f"stories={stories} are fewer than a batch of {batch}: use more stories or a "
                "smaller batch"
            )
        numbers = _story_numbers(stories, batch, step, seed, rows)
        counters = (numbers * length).unsqueeze(1) + columns
        key = _key(seed, "stories")
    tokens = _uniform(key, counters, group.order)
    some = round(generators * batch)
    if some:
        allowed = _tables_on(group, torch.device(device))[1]
        tokens[:some, 1:] = allowed[_uniform(key, counters[:some, 1:], len(allowed))]
    return tokens, running_products(table_on(group, device), tokens)
