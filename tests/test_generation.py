"""``generate()`` computes what re-running the whole forward pass at every step would."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scanlm import ScanLMError

Make = Callable[..., Any]
PAD = 0


def greedy_by_full_forward(model: Any, ids: Tensor, steps: int) -> Tensor:
    """The definition: no state is kept."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("position_embedding", ["absolute", "chunk"])
def test_greedy_equals_the_full_forward_at_each_step(
    make_model: Make, make_ids: Make, prompt: int, position_embedding: str
) -> None:
    model, ids = make_model(position_embedding=position_embedding), make_ids(2, prompt)
    expected = greedy_by_full_forward(model, ids, 14)
    assert expected[:, prompt:].unique().numel() > 3  # not one token forever
    assert torch.equal(model.generate(ids, max_new_tokens=14, do_sample=False), expected)


def test_a_padded_batch_generates_what_each_prompt_does_alone(
    make_model: Make, make_ids: Make
) -> None:
    model = make_model(pad_token_id=PAD)
    prompts = [make_ids(1, n, seed=n) for n in (3, 9, 4)]
    width = max(p.shape[1] for p in prompts)
    batch = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.tensor([[0] * (width - p.shape[1]) + [1] * p.shape[1] for p in prompts])
    together = model.generate(batch, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(prompt, max_new_tokens=10, do_sample=False)
        assert torch.equal(row[width:], alone[0, prompt.shape[1] :])


def test_sampling_follows_the_seed(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(3, 6)

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(ids, max_new_tokens=20, do_sample=True, top_k=0)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_sampling_draws_from_the_models_distribution(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(dtype=torch.float32), make_ids(1, 9)
    torch.manual_seed(0)
    n = 4000
    drawn = model.generate(ids.repeat(n, 1), max_new_tokens=1, do_sample=True, top_k=0)[:, -1]
    expected = model(ids).logits[0, -1].softmax(-1)
    measured = torch.bincount(drawn, minlength=29) / n
    deviation = (expected * (1 - expected) / n).sqrt()
    assert ((measured - expected).abs() < 5 * deviation + 1e-3).all()


def beam_search_by_full_forward(model: Any, ids: Tensor, beams: int, steps: int) -> Tensor:
    """Best of ``beams`` hypotheses by summed log-probability, without any state."""
    hypotheses = [(0.0, ids)]
    for _ in range(steps):
        longer = []
        for score, tokens in hypotheses:
            log_probabilities = model(tokens).logits[0, -1].log_softmax(-1)
            for value, token in zip(*log_probabilities.topk(beams), strict=True):
                extended = torch.cat([tokens, token.view(1, 1)], dim=1)
                longer.append((score + value.item(), extended))
        hypotheses = sorted(longer, key=lambda h: -h[0])[:beams]
    return hypotheses[0][1]


@pytest.mark.parametrize("prompt", [2, 7])
def test_beam_search_reorders_the_state_with_the_beams(
    make_model: Make, make_ids: Make, prompt: int
) -> None:
    model, ids = make_model(), make_ids(1, prompt)
    expected = beam_search_by_full_forward(model, ids, 3, 11)
    assert not torch.equal(expected, greedy_by_full_forward(model, ids, 11))  # beams do matter
    actual = model.generate(ids, max_new_tokens=11, num_beams=3, do_sample=False)
    assert torch.equal(actual, expected)


def test_generation_goes_on_from_a_state(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(1, 10)
    cache = model.new_cache()
    model(ids[:, :6], past_key_values=cache)
    actual = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(actual, model.generate(ids, max_new_tokens=8, do_sample=False))


def test_too_many_new_tokens_are_refused_before_any_is_made(
    make_model: Make, make_ids: Make
) -> None:
    model, calls = make_model(n_positions=32), []
    model.t2.register_forward_pre_hook(lambda *args: calls.append(1))
    with pytest.raises(ScanLMError, match='position_embedding="chunk"'):
        model.generate(make_ids(1, 5), max_new_tokens=28)
    assert not calls
