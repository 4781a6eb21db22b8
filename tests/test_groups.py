"""Groups, their word problem and the counter-based batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scanlm.errors import ScanLMError
from scanlm.groups import Group, compose, get_group, running_products, word_batch

ORDERS = {"S5": 120, "S4": 24, "S3": 6, "A5": 60, "A4": 12, "Z60": 60, "Z2": 2}


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_orders_and_axioms(name: str, order: int) -> None:
    group = get_group(name)
    group.check()
    assert group.order == len(set(group.elements)) == order
    assert group is get_group(name.lower())


def test_composition_applies_the_left_element_first() -> None:
    a, b = (1, 0, 2), (0, 2, 1)
    assert compose(a, b) == (2, 0, 1)
    assert compose(b, a) == (1, 2, 0)
    s3 = get_group("S3")
    i, j = s3.elements.index(a), s3.elements.index(b)
    assert s3.elements[int(s3.table[i, j])] == (2, 0, 1)
    products = running_products(s3.table, torch.tensor([[i, j, j]]))
    assert [s3.elements[p] for p in products[0].tolist()] == [(1, 0, 2), (2, 0, 1), (1, 0, 2)]


def test_only_s5_and_a5_are_not_solvable() -> None:
    assert {n for n in ORDERS if not get_group(n).is_solvable} == {"S5", "A5"}
    assert {n for n in ORDERS if get_group(n).is_abelian} == {"Z60", "Z2"}
    assert get_group("S4").derived_series == [24, 12, 4, 1]
    assert get_group("S5").derived_series == [120, 60]


def test_a_table_that_is_no_group_is_refused() -> None:
    wrong = get_group("S3").table.clone()
    wrong[4, [3, 5]] = wrong[4, [5, 3]]
    with pytest.raises(ScanLMError, match=r"inverse|associative"):
        Group("broken", get_group("S3").elements, wrong).check()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["S5", "S3", "Z60"]), st.integers(1, 40), st.integers(0, 2**20))
def test_targets_are_the_running_products(name: str, length: int, step: int) -> None:
    group = get_group(name)
    tokens, targets = word_batch(group, 3, length, seed=4, step=step)
    assert tokens.shape == targets.shape == (3, length)
    assert tokens.dtype == targets.dtype == torch.int64
    state = tokens[:, 0]
    for i in range(length):
        if i:
            state = group.table[state, tokens[:, i]]
        assert torch.equal(targets[:, i], state)


def test_a_batch_depends_on_seed_stream_and_step_alone() -> None:
    first = word_batch("S5", 64, 16, seed=3, step=7)[0]
    torch.manual_seed(99)
    word_batch("S5", 8, 4, seed=3, step=6)
    assert torch.equal(first, word_batch("S5", 64, 16, seed=3, step=7)[0])
    assert torch.equal(first, word_batch("S5", 64, 16, seed=3, step=torch.tensor(7))[0])
    parts = [word_batch("S5", 16, 16, seed=3, step=7, first=n)[0] for n in (0, 16, 32, 48)]
    assert torch.equal(first, torch.cat(parts))
    others = [
        word_batch("S5", 64, 16, seed=3, step=8)[0],
        word_batch("S5", 64, 16, seed=4, step=7)[0],
        word_batch("S5", 64, 16, seed=3, step=7, stream="test")[0],
    ]
    for other in others:  # independent draws agree in 1 of 120 entries
        assert (first == other).double().mean() < 0.05


def test_tokens_are_uniform() -> None:
    tokens = torch.cat([word_batch("S5", 1024, 16, 0, s)[0].flatten() for s in range(20)])
    expected = len(tokens) / 120
    chi2 = ((tokens.bincount(minlength=120) - expected) ** 2 / expected).sum()
    assert 60 < chi2 < 200  # 119 degrees of freedom, 5 standard deviations are 77


def test_splitmix64_gives_its_published_numbers() -> None:
    from scanlm.groups import _GAMMA, _mix, _signed

    state = torch.tensor([_signed(1234567 + k * _GAMMA) for k in (1, 2)])
    words = [w % 2**64 for w in _mix(state).tolist()]
    assert words == [6457827717110365317, 3203168211198807973]


def test_stories_repeat_in_epochs_of_a_new_order() -> None:
    def epoch(first_step: int) -> list[tuple[int, ...]]:
        steps = range(first_step, first_step + 4)
        batches = [word_batch("S5", 5, 6, seed=1, step=s, stories=20)[0] for s in steps]
        return [tuple(row) for row in torch.cat(batches).tolist()]

    one, two = epoch(0), epoch(4)
    assert len(set(one)) == 20
    assert set(one) == set(two)
    assert one != two


def test_stories_cross_epochs_in_the_middle_of_a_batch() -> None:
    rows = torch.cat([word_batch("S5", 4, 6, 1, s, stories=6)[0] for s in range(3)]).tolist()
    first, second = {tuple(r) for r in rows[:6]}, {tuple(r) for r in rows[6:]}
    assert len(first) == 6
    assert first == second


@pytest.mark.parametrize(
    ("name", "number"), {"S5": 10, "S3": 3, "A5": 20, "A4": 8, "Z60": 2, "Z2": 1}.items()
)
def test_generators_generate_and_come_with_their_inverses(name: str, number: int) -> None:
    group = get_group(name)
    found = group.generators
    assert len(found) == number
    assert len(group._generated(found)) == group.order
    assert set(group.inverses[found].tolist()) == set(found.tolist())


def test_a_share_of_the_words_goes_on_in_generators() -> None:
    group = get_group("S5")
    plain, _ = word_batch(group, 400, 3, seed=1)
    tokens, targets = word_batch(group, 400, 3, seed=1, generators=0.25)
    assert torch.equal(tokens[100:], plain[100:])
    assert torch.equal(tokens[:, 0], plain[:, 0])
    assert torch.equal(targets, running_products(group.table, tokens))
    letters = tokens[:100, 1:].flatten()
    assert set(letters.tolist()) == set(group.generators.tolist())
    assert letters.bincount(minlength=120).max() < 40  # 20 of each in the mean
    for share in (-0.1, 1.1):
        with pytest.raises(ScanLMError, match=f"generators={share} is outside"):
            word_batch(group, 4, 2, generators=share)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("S55", "S<n> needs n from 2 to 5"), ("SS5", "Did you mean 'S5'"), ("Z1", "2 to 512")],
)
def test_unknown_groups_are_refused(name: str, hint: str) -> None:
    with pytest.raises(ScanLMError, match=hint):
        get_group(name)


def test_bad_batches_are_refused() -> None:
    with pytest.raises(ScanLMError, match="length must be at least 1, got 0"):
        word_batch("S5", 4, 0)
    with pytest.raises(ScanLMError, match="stories=3 are fewer than a batch of 4"):
        word_batch("S5", 4, 2, stories=3)
    with pytest.raises(ScanLMError, match="Did you mean 'train'"):
        word_batch("S5", 4, 2, stream="trian")
