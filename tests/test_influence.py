"""Influence maps: exact zeros, the defined number, no traces left in the model."""

import numpy as np
import pytest
import torch

from scanlm.errors import ScanLMError
from scanlm.influence import by_chunk, influence
from scanlm.model import ScanLMConfig, ScanLMForCausalLM


@pytest.fixture
def model() -> ScanLMForCausalLM:
    torch.manual_seed(0)
    config = ScanLMConfig(
        vocab_size=17, n_positions=32, n_embd=16, n_head=2, chunk_size=3, t1_layers=1, t2_layers=1
    )
    return ScanLMForCausalLM(config).double()


def test_every_earlier_token_and_no_later_one_has_influence(model: ScanLMForCausalLM) -> None:
    matrix = influence(model, torch.arange(14))  # the last chunk is partial
    assert matrix.shape == (14, 14)
    assert (matrix[np.triu_indices(14, 1)] == 0).all()
    assert (matrix[np.tril_indices(14)] > 0).all()


def test_entries_are_gradient_norms_of_one_random_direction(model: ScanLMForCausalLM) -> None:
    ids = torch.arange(8)[None]
    direction = torch.randn(17, generator=torch.Generator().manual_seed(5)).double()
    model.eval()
    embedding = model.wte(ids).detach().requires_grad_()
    hook = model.wte.register_forward_hook(lambda *_: embedding)
    logits = model(input_ids=ids).logits
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[0, 6] @ direction, embedding)
    matrix = influence(model, ids, seed=5)
    np.testing.assert_allclose(matrix[6], gradient[0].norm(dim=-1).numpy(), rtol=1e-9)


def test_batching_changes_nothing(model: ScanLMForCausalLM) -> None:
    whole = influence(model, torch.arange(8), batch_size=8)
    np.testing.assert_allclose(influence(model, torch.arange(8), batch_size=3), whole, rtol=1e-9)


def test_model_is_left_as_it_was(model: ScanLMForCausalLM) -> None:
    model.train()
    influence(model, torch.arange(5))
    assert model.training
    assert not model.wte._forward_hooks
    assert all(p.grad is None for p in model.parameters())


def test_frozen_models_have_influence_too(model: ScanLMForCausalLM) -> None:
    free = influence(model, torch.arange(8))
    np.testing.assert_array_equal(influence(model.requires_grad_(False), torch.arange(8)), free)


@pytest.mark.parametrize("shape", [(2, 4), (1, 0), (1, 2, 3)])
def test_anything_but_one_sequence_is_refused(
    model: ScanLMForCausalLM, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ScanLMError, match="one sequence"):
        influence(model, torch.zeros(shape, dtype=torch.long))


def test_block_means_are_geometric_and_below_the_diagonal() -> None:
    matrix = np.tril(np.full((6, 6), 4.0))
    matrix[2:4, 0:2] = [[1.0, 10.0], [100.0, 1000.0]]
    means = by_chunk(matrix, 2)
    assert means[1, 0] == pytest.approx(10**1.5)
    assert means[2].tolist()[:2] == pytest.approx([4.0, 4.0])
    assert np.isnan(means[np.triu_indices(3)]).all()


def test_a_partial_chunk_has_no_block() -> None:
    with pytest.raises(ScanLMError, match="not a multiple of chunk_size=4"):
        by_chunk(np.ones((6, 6)), 4)
