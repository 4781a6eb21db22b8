"""Which irreducible representations of the group a model's codes use.

A code gives each of the n elements of a group G a vector, ``E[g]`` of size d. The n-dimensional
space of functions on G falls apart into one *isotypic component* for each irreducible
representation rho, of ``degree**2`` dimensions, which multiplication by a group element never
leaves (Serre, Linear Representations of Finite Groups, section 2). With its character chi,

    P_rho[g, h] = degree / n * chi(g^-1 h)

projects on it, and ``|P_rho E|^2 / |E|^2`` is its share of the code, as a share of power in a
Fourier transform. Small networks that learn to multiply in a group compute with few of these
components (Chughtai, Chan and Nanda 2023, arXiv 2302.03025): a product of two elements is a
product of matrices in each of them. Which ones differs from seed to seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from scanlm.errors import ScanLMError
from scanlm.groups import Group, get_group


@dataclass(frozen=True, eq=False)
class Component:
    """One isotypic component of the functions on a group.

    Attributes:
        name: the degree; of two components of one degree the second has a prime, of more each a
            number. The first has the greater character at the group's generators: "4" of S5 is
            the standard representation (the five items, less their mean), "4'" its product with
            the sign "1'".
        degree: of the representation. Two complex conjugates, which real codes always use
            together, are one component here.
        character: ``(order,)``: the trace at each element, of conjugates the sum of both.
        projection: ``(order, order)``, float64.
    """

    name: str
    degree: int
    character: Tensor
    projection: Tensor


@lru_cache(maxsize=16)
def _components(group: Group) -> tuple[Component, ...]:
    n, table, inverses = group.order, group.table, group.inverses
    quotients = table[inverses]  # [g, h]: g^-1 h
    # sums over a conjugacy class and its inverses commute with each other and are symmetric; a
    # combination with generic weights has one eigenvalue for each component
    conjugates = table[table[inverses], torch.arange(n).unsqueeze(1)]  # [h, g]: h^-1 g h
    classes = conjugates.amin(0)
    classes = torch.minimum(classes, classes[inverses])
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(n, dtype=torch.float64, generator=generator)[classes]
    sizes = torch.bincount(classes, minlength=n)[classes]
    values, vectors = torch.linalg.eigh((weights / sizes)[quotients])
    gaps = (values[1:] - values[:-1]) > 1e-9
    bounds = [0, *(gaps.nonzero().flatten() + 1).tolist(), n]
    found = []
    for start, stop in pairwise(bounds):
        projection = vectors[:, start:stop] @ vectors[:, start:stop].T
        # the rank is degree^2, or of two conjugates 2 degree^2, which is never a square
        rank = stop - start
        degree = math.isqrt(rank) if math.isqrt(rank) ** 2 == rank else math.isqrt(rank // 2)
        found.append((degree, projection[0] * n / degree, projection))
    order = torch.cat([group.generators, torch.arange(n)])
    found.sort(key=lambda c: (c[0], *(-c[1][order]).round(decimals=6).tolist()))
    degrees = [degree for degree, _, _ in found]
    components = []
    for i, (degree, character, projection) in enumerate(found):
        same, before = degrees.count(degree), degrees[:i].count(degree)
        mark = f" ({before + 1})" if same > 2 else "'" * before
        components.append(Component(f"{degree}{mark}", degree, character, projection))
    return tuple(components)


def components(group: Group | str) -> tuple[Component, ...]:
    """The isotypic components of a group, by degree; the first is the trivial one."""
    return _components(get_group(group))


def shares(group: Group | str, codes: Tensor) -> dict[str, float]:
    """The share of each component in a code, without the trivial one.

    Args:
        group: a group or its name.
        codes: ``(order, d)``, a vector for each element.

    Returns:
        By name; they add up to 1. The trivial component is what all elements have in common and
        is taken away first.

    Raises:
        ScanLMError: another number of codes, or codes that are all equal.
    """
    group = get_group(group)
    if codes.shape[0] != group.order:
        raise ScanLMError(f"{codes.shape[0]} codes for the {group.order} elements of {group.name}")
    varied = codes.double().cpu()
    varied = varied - varied.mean(0)
    power = varied.square().sum()
    if not power > 0:
        raise ScanLMError("all codes are equal: there is nothing that could have a share")
    return {
        c.name: float((c.projection @ varied).square().sum() / power) for c in components(group)[1:]
    }
