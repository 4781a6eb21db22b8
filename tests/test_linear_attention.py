"""GLA and Gated DeltaNet in plain torch: the recurrences, the models, their caches and weights."""

import pytest
import torch
from torch import Tensor

from scanlm.recurrence import gated_delta_rule, gated_linear_attention


def naive_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    outputs = []
    for i in range(q.shape[1]):
        state = state * g[:, i].exp().unsqueeze(-1)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, i], v[:, i])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, i], state) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), state


def naive_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    outputs = []
    for i in range(q.shape[1]):
        state = state * g[:, i].exp()[..., None, None]
        read = torch.einsum("bhk,bhkv->bhv", k[:, i], state)
        write = beta[:, i].unsqueeze(-1) * (v[:, i] - read)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, i], write)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, i], state) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), state


def recurrence(name: str, t: int, strength: float, dtype: torch.dtype) -> tuple:
    """A recurrence, its definition, and random inputs with decays of about exp(-strength)."""
    torch.manual_seed(t)
    b, h, k, v = 2, 3, 8, 5
    query, key, value = (torch.randn(b, t, h, d, dtype=dtype) for d in (k, k, v))
    state = torch.randn(b, h, k, v, dtype=dtype)
    if name == "gla":
        g = -strength * torch.rand(b, t, h, k, dtype=dtype)
        return gated_linear_attention, naive_gla, [query, key, value, g, state]
    g = -strength * torch.rand(b, t, h, dtype=dtype)
    beta = 2 * torch.rand(b, t, h, dtype=dtype)  # up to 2: negative eigenvalues
    key = torch.nn.functional.normalize(key, dim=-1)
    return gated_delta_rule, naive_delta, [query, key, value, g, beta, state]


# less than a chunk, exactly one, several, with a rest; decays from none to the strongest
@pytest.mark.parametrize("name", ["gla", "delta"])
@pytest.mark.parametrize(
    ("t", "strength"), [(1, 1.0), (5, 0.1), (64, 300.0), (150, 2.0), (65, 0.0)]
)
def test_the_chunked_form_is_the_recurrence(name: str, t: int, strength: float) -> None:
    chunked, naive, inputs = recurrence(name, t, strength, torch.float64)
    results, gradients = [], []
    for function in (chunked, naive):
        leaves = [x.clone().requires_grad_() for x in inputs]
        o, state = function(*leaves)
        weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
        ((o * weights).sum() + state.square().sum()).backward()
        results.append((o.detach(), state.detach()))
        gradients.append([x.grad for x in leaves])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("name", ["gla", "delta"])
def test_the_chunked_form_in_float32(name: str) -> None:
    chunked, naive, inputs = recurrence(name, 150, 0.5, torch.float32)
    torch.testing.assert_close(chunked(*inputs), naive(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gla", "delta"])
def test_a_continued_sequence_is_the_whole(name: str) -> None:
    chunked, _, inputs = recurrence(name, 90, 1.0, torch.float64)
    whole, end = chunked(*inputs)
    *streams, state = inputs
    pieces = []
    for start, stop in [(0, 1), (1, 70), (70, 71), (71, 90)]:
        o, state = chunked(*(x[:, start:stop] for x in streams), state)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, end, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["gla", "delta"])
def test_bfloat16_inputs_are_computed_in_float32(name: str) -> None:
    chunked, naive, inputs = recurrence(name, 100, 0.1, torch.bfloat16)
    exact, _ = naive(*(x.float() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = chunked(*inputs)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(o, exact.bfloat16())
