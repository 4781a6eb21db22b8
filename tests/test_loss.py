"""The fused projection and loss against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from scanlm import ScanLMError
from scanlm.loss import linear_cross_entropy, next_tokens


def case(n=37, d=8, v=101, dtype=torch.float64, ignore=True):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(v, d, generator=g, dtype=dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=g)
    if ignore:
        targets[::5] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("rows", [1, 7, 37, 1000])
@pytest.mark.parametrize("ignore", [False, True])
def test_value_and_gradients_equal_the_plain_loss(rows, ignore):
    hidden, weight, targets = case(ignore=ignore)
    plain = F.cross_entropy(hidden @ weight.T, targets)
    expected = torch.autograd.grad(3 * plain, (hidden, weight))
    fused = linear_cross_entropy(hidden, weight, targets, rows=rows)
    got = torch.autograd.grad(3 * fused, (hidden, weight))
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-12)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_num_items_divides_the_sum():
    hidden, weight, targets = case()
    total = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, 10), total / 10)


def test_large_logits_do_not_overflow():
    hidden, weight, targets = case(dtype=torch.float32)
    plain = F.cross_entropy(1e4 * hidden @ weight.T, targets)
    fused = linear_cross_entropy(1e4 * hidden, weight, targets)
    assert torch.isfinite(fused)
    torch.testing.assert_close(fused, plain)


def test_without_gradients_only_the_value_is_computed():
    hidden, weight, targets = case()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets).detach())


def test_under_autocast_products_run_in_bf16_and_the_loss_in_float32():
    hidden, weight, targets = case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
        plain = F.cross_entropy((hidden @ weight.T).float(), targets)
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-2, atol=0)


def test_compiles_into_one_graph():
    hidden, weight, targets = case()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    fused = compiled(hidden, weight, targets, rows=10)
    got = torch.autograd.grad(fused, (hidden, weight))
    plain = F.cross_entropy(hidden @ weight.T, targets)
    for a, b in zip(got, torch.autograd.grad(plain, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_mean_of_nothing_is_nan_as_in_transformers():
    hidden, weight, targets = case()
    nothing = torch.full_like(targets, -100)
    assert F.cross_entropy(hidden @ weight.T, nothing).isnan()
    assert linear_cross_entropy(hidden, weight, nothing).isnan()
    assert linear_cross_entropy(hidden, weight, nothing, 5) == 0


def test_labels_are_shifted_and_checked():
    ids = torch.tensor([[3, 0, 28], [1, -100, 5]])
    expected = torch.tensor([[0, 28, -100], [-100, 5, -100]])
    assert torch.equal(next_tokens(ids, ids, None, 29), expected)
    assert next_tokens(ids, None, ids, 29) is ids
    assert next_tokens(ids, None, None, 29) is None
    for name, given in (("labels", (ids, None)), ("shift_labels", (None, ids))):
        with pytest.raises(ScanLMError, match=rf"label 28 is not .* of 28 .*{name}\[0, 2\]"):
            next_tokens(ids, *given, 28)
        with pytest.raises(ScanLMError, match=rf"{name} must be .* \(2, 2\) .*got \(2, 3\)"):
            next_tokens(ids[:, :2], *given, 29)
    with pytest.raises(ScanLMError, match=r"label -1 .*use -100 where nothing is scored"):
        next_tokens(ids, torch.full_like(ids, -1), None, 29)
