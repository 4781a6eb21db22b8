"""The end of a step as functions of tensors is torch's clipping and AdamW."""

import pytest
import torch
from torch import Tensor, nn

from scanlm.clipped_adamw import adamw_step, clipping_factor, total_norm

SHAPES = [(30, 40), (40,), (7, 9), (9,)]
BETAS, DECAY, EPS, CLIP = (0.9, 0.95), 0.1, 1e-8, 1.0


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]


def gradients(step: int, dtypes: list[torch.dtype]) -> list[Tensor]:
    """Of a norm far above the limit at every second step, and below it at the others."""
    generator = torch.Generator().manual_seed(step)
    size = 3.0 if step % 2 else 0.01
    pairs = zip(SHAPES, dtypes, strict=True)
    return [(size * torch.randn(s, generator=generator)).to(dtype) for s, dtype in pairs]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_clipped_steps_are_those_of_torch(first: torch.dtype, compiled: bool) -> None:
    torch._dynamo.reset()
    step = torch.compile(adamw_step, backend="aot_eager") if compiled else adamw_step
    dtypes = [first, torch.float32, first, torch.float32]
    lr = torch.tensor(0.0)
    expected, found = weights(), weights()
    optimizer = torch.optim.AdamW(expected, lr=lr, betas=BETAS, weight_decay=DECAY, eps=EPS)
    copies = [
        w.detach().to(d) if d != w.dtype else None for w, d in zip(found, dtypes, strict=True)
    ]
    means, squares = ([torch.zeros_like(w) for w in found] for _ in range(2))
    counts = [torch.zeros(()) for _ in found]
    for i in range(4):
        lr.fill_(0.01 / (i + 1))
        given = gradients(i, dtypes)
        before = [g.clone() for g in given]
        factor = clipping_factor(given, CLIP)
        assert bool(factor < 1) == (i % 2 == 1)
        step(found, given, copies, means, squares, counts, factor, lr, BETAS, DECAY, EPS)
        assert all(torch.equal(g, b) for g, b in zip(given, before, strict=True))
        for weight, gradient in zip(expected, given, strict=True):
            weight.grad = gradient.float()
        nn.utils.clip_grad_norm_(expected, CLIP)
        optimizer.step()
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        for weight, copy, dtype in zip(found, copies, dtypes, strict=True):
            assert copy is None or (copy.dtype == dtype and torch.equal(copy, weight.to(dtype)))
    assert all(float(count) == 4 for count in counts)


def test_the_norm_of_halves_is_exact() -> None:
    parts = [torch.full((3,), 1.0), torch.full((1000,), 0.1, dtype=torch.bfloat16)]
    exact = sum(float((part.double() ** 2).sum()) for part in parts) ** 0.5
    assert float(total_norm(parts)) == pytest.approx(exact, rel=1e-6)
