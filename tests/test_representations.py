"""Isotypic components of groups whose characters are known, and shares of known codes."""

import pytest
import torch
import torch.nn.functional as F

from scanlm.errors import ScanLMError
from scanlm.groups import get_group
from scanlm.representations import components, shares

DEGREES = {
    "Z2": [1, 1],
    "S3": [1, 1, 2],
    "S4": [1, 1, 2, 3, 3],
    "A5": [1, 3, 3, 4, 5],
    "S5": [1, 1, 4, 4, 5, 5, 6],
    "Z5": [1, 1, 1],  # the trivial one and two pairs of conjugates
}


@pytest.mark.parametrize(("name", "degrees"), DEGREES.items())
def test_components_add_up_and_never_mix(name: str, degrees: list[int]) -> None:
    group = get_group(name)
    found = components(group)
    assert [c.degree for c in found] == degrees
    assert len({c.name for c in found}) == len(found)
    projections = torch.stack([c.projection for c in found])
    torch.testing.assert_close(projections.sum(0), torch.eye(group.order).double())
    products = torch.einsum("aij,bjk->abik", projections, projections)
    torch.testing.assert_close(
        products, torch.eye(len(found)).double()[..., None, None] * projections
    )
    permuted = projections[:, group.table[3 % group.order]]  # left multiplication by an element
    permuted = permuted[:, :, group.table[3 % group.order]]
    torch.testing.assert_close(permuted, projections)


def test_the_characters_of_s5() -> None:
    group = get_group("S5")
    by_name = {c.name: c.character for c in components(group)}
    assert list(by_name) == ["1", "1'", "4", "4'", "5", "5'", "6"]
    swap, three, five = (
        group.elements.index(p) for p in ((1, 0, 2, 3, 4), (1, 2, 0, 3, 4), (1, 2, 3, 4, 0))
    )
    at = {
        name: [round(float(c[i]), 6) for i in (0, swap, three, five)] for name, c in by_name.items()
    }
    assert at == {
        "1": [1, 1, 1, 1],
        "1'": [1, -1, 1, 1],
        "4": [4, 2, 1, -1],
        "4'": [4, -2, 1, -1],
        "5": [5, 1, -1, 0],
        "5'": [5, -1, -1, 0],
        "6": [6, 0, 0, 1],
    }


def test_places_are_the_standard_representation_and_parity_is_the_sign() -> None:
    group = get_group("S5")
    places = F.one_hot(torch.tensor(group.elements)).flatten(1).float()
    assert shares(group, places)["4"] == pytest.approx(1)
    sign = components(group)[1].character.unsqueeze(1)
    both = shares(group, torch.cat([places, 2 * sign + 7], dim=1))
    # 120 of power in places around their mean 1/5: 5 places, variance 4/5; 4 * 120 in the sign
    assert both["1'"] == pytest.approx(4 / (4 + 5 * 0.8))
    assert sum(both.values()) == pytest.approx(1)
    assert shares(group, torch.eye(120))["6"] == pytest.approx(36 / 119)


def test_what_has_no_shares_is_refused() -> None:
    with pytest.raises(ScanLMError, match="5 codes for the 6 elements of S3"):
        shares("S3", torch.eye(5))
    with pytest.raises(ScanLMError, match="all codes are equal"):
        shares("S3", torch.ones(6, 2))
