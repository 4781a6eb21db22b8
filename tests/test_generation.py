"""``generate()`` computes what re-running the whole forward pass at every step would."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scanlm import ScanLMError
from scanlm.generation import check_continuation, check_mask_shape, check_tokens
from scanlm.gla import GLAConfig, GLAForCausalLM
from scanlm.loss import next_tokens

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


# A token outside the vocabulary is a device-side assert on a GPU, where forward does not look


@pytest.fixture
def unchecked_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """``forward`` as on a GPU."""
    monkeypatch.setattr("scanlm.model.check_tokens", lambda *_: None)


@pytest.mark.usefixtures("unchecked_forward")
@pytest.mark.parametrize("token", [29, 1000, -1])
def test_a_prompts_tokens_are_checked_whatever_forward_does(
    make_model: Make, make_ids: Make, token: int
) -> None:
    model, ids = make_model(), make_ids(2, 6)
    ids[1, 3] = token
    with pytest.raises(IndexError):  # or forward would have checked after all
        model(ids)
    message = rf"token id {token} is not in the vocabulary of 29 \(0 to 28\), at input_ids\[1, 3\]"
    for how in ({"inputs": ids}, {"input_ids": ids}, {"input_ids": ids, "num_beams": 2}):
        with pytest.raises(ScanLMError, match=message):
            model.generate(**how, max_new_tokens=3)
    with pytest.raises(ScanLMError, match=message):
        model.stream(ids, max_new_tokens=3)
    state = model(make_ids(2, 5), use_cache=True).past_key_values
    with pytest.raises(ScanLMError, match=message):
        model.stream(ids, past_key_values=state)
    assert state.length == 5


@pytest.mark.usefixtures("unchecked_forward")
def test_the_token_that_generate_begins_with_is_checked(make_model: Make) -> None:
    with pytest.raises(ScanLMError, match=r"token id 29 .*at input_ids\[0, 0\]"):
        make_model().generate(bos_token_id=29, max_new_tokens=3)


def test_baselines_of_plain_torch_check_prompts_too() -> None:
    shape = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1, "vocab_size": 29}
    model = GLAForCausalLM(GLAConfig(**shape))
    with pytest.raises(ScanLMError, match=r"at input_ids\[0, 1\]"):
        model.generate(torch.tensor([[1, 29]]), max_new_tokens=3)


def test_prompts_are_checked_once_and_not_token_by_token(
    make_model: Make, make_ids: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    for module in ("generation", "decoder"):
        monkeypatch.setattr(
            f"scanlm.{module}.check_tokens", lambda ids, _: shapes.append(ids.shape)
        )
    model, ids = make_model(), make_ids(2, 6)
    model.generate(ids, max_new_tokens=9)
    list(model.stream(ids, max_new_tokens=9))
    assert shapes == [(2, 6), (2, 6)]


def test_the_first_wrong_token_is_named() -> None:
    check_tokens(torch.tensor([[0, 28], [5, 0]]), 29)
    check_tokens(torch.zeros(1, 0, dtype=torch.long), 29)
    with pytest.raises(ScanLMError, match=r"token id 30 .*input_ids\[0, 1\]"):
        check_tokens(torch.tensor([[0, 30], [-5, 29]]), 29)


def test_a_prompt_padded_at_the_right_is_not_continued(make_model: Make, make_ids: Make) -> None:
    shape = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1, "vocab_size": 29}
    ids = make_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    scan = make_model()
    for model in (scan, GLAForCausalLM(GLAConfig(**shape)).eval()):
        for use_cache in (True, False):
            with pytest.raises(ScanLMError, match="zeros at the left of a row"):
                model.generate(ids, attention_mask=mask, max_new_tokens=1, use_cache=use_cache)
        with pytest.raises(ScanLMError, match=r"attention_mask\[0, 0\] is 2: expected 0 and 1"):
            model.generate(ids, attention_mask=2 * torch.ones_like(ids), max_new_tokens=1)
    state = scan(ids, use_cache=True).past_key_values
    after = torch.cat([torch.ones_like(ids), mask], dim=1)
    for past in ({}, {"past_key_values": scan.new_cache()}):
        with pytest.raises(ScanLMError, match="zeros at the left of a row"):
            scan.stream(ids, attention_mask=mask, **past)
    with pytest.raises(ScanLMError, match="zeros at the left of a row"):
        scan.stream(ids, attention_mask=after, past_key_values=state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: expected an integer >= 1"),
        ({"max_new_tokens": True}, "max_new_tokens=True: expected an integer >= 1"),
        ({"max_new_tokens": "3"}, "max_new_tokens='3': expected an integer >= 1"),
        ({"temperature": "a"}, "temperature='a': expected a number >= 0"),
        ({"temperature": None}, "temperature=None: expected a number >= 0"),
        ({"top_k": True}, "top_k=True: expected an integer >= 1"),
        ({"top_p": "a"}, "top_p='a': expected a probability"),
    ],
)
def test_options_of_another_type_are_refused_before_the_prompt_is_read(
    make_model: Make, make_ids: Make, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ScanLMError, match=message):
        make_model().stream(make_ids(1, 3), **options)


def test_values_off_the_cpu_are_not_read() -> None:
    """It would wait for the GPU; tensors on "meta" have no values to read."""
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    check_mask_shape(ids, ids)
    check_continuation(ids, ids)
    assert next_tokens(ids, ids, None, 29).shape == (2, 5)
