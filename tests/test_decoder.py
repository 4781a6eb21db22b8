"""The fast decoder computes what forward computes, whatever the split; streams of tokens."""

import copy
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cache import EXACT, MAX_TOKENS, SHAPES, survive
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from scanlm import ScanCache, ScanLMError
from scanlm import decoder as decoder_module
from scanlm.decode_step import TorchStep
from scanlm.decoder import Decoder
from scanlm.sampling import Sampling

Make = Callable[..., Any]
property_test = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# a sequence is read piece by piece: by forward at once or by the decoder token by token
pieces = st.lists(
    st.tuples(st.integers(1, 20), st.booleans(), st.sampled_from(["", "fork", "disk"])),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@property_test
@given(pieces=pieces)
def test_any_split_between_both_paths_gives_the_logits_of_one_forward(
    make_model: Make,
    make_ids: Make,
    tmp_path: Path,
    shape: dict[str, Any],
    pieces: list[tuple[int, bool, str]],
) -> None:
    model = make_model(**shape)
    ids = make_ids(2, min(sum(size for size, _, _ in pieces), MAX_TOKENS))
    decoder, cache, logits = Decoder(model, 2), model.new_cache(), []
    start = 0
    with torch.no_grad():
        for size, fast, event in pieces:
            piece, start = ids[:, start : start + size], start + size
            if fast:
                decoder.load(cache)
                logits += [decoder.feed(tokens).unsqueeze(1) for tokens in piece.unbind(1)]
                decoder.store(cache)
            elif piece.shape[1]:
                logits.append(model(piece, past_key_values=cache).logits)
            if piece.shape[1]:
                cache = survive(event, cache, model, tmp_path)
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, **EXACT)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_every_activation_is_the_models(make_model: Make, make_ids: Make, activation: str) -> None:
    model, ids = make_model(activation_function=activation), make_ids(1, 11)
    decoder = Decoder(model, 1)
    fed = torch.stack([decoder.feed(t) for t in ids.unbind(1)], dim=1)
    torch.testing.assert_close(fed, model(ids).logits, **EXACT)


def test_a_border_costs_two_combines_on_average(make_model: Make, make_ids: Make) -> None:
    model = make_model(chunk_size=1, position_embedding="chunk")
    decoder, costs, before = Decoder(model, 1), [], 0
    for tokens in make_ids(1, 256).unbind(1):
        decoder.feed(tokens)
        made = decoder.groups[0].counter.num_combines
        costs.append(made - before)
        before = made
    assert sum(costs) <= 2 * len(costs)
    assert costs[:8] == [0, 1, 1, 2, 1, 2, 1, 3]
    assert max(costs) == math.log2(256)


def test_buffers_stay_where_they_are(make_model: Make, make_ids: Make) -> None:
    """What a captured graph needs: no tensor of the state moves or grows."""
    decoder = Decoder(make_model(), 2)

    def places() -> list[tuple[int, tuple[int, ...]]]:
        held = vars(decoder.buffers).values()
        return [(t.data_ptr(), tuple(t.shape)) for t in held]

    before = places()
    for tokens in make_ids(2, 50).unbind(1):
        decoder.feed(tokens)
    assert places() == before


def test_a_decoder_starts_over_without_remains(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(1, 7)
    decoder = Decoder(model, 1)
    for tokens in make_ids(1, 31, seed=1).unbind(1):
        decoder.feed(tokens)
    decoder.load(model.new_cache())
    fed = torch.stack([decoder.feed(t) for t in ids.unbind(1)], dim=1)
    torch.testing.assert_close(fed, model(ids).logits, **EXACT)


class WrongStep(TorchStep):
    """Stands for kernels that a compiler got wrong."""

    def fill(self, prefix: Tensor, rows: Any) -> None:
        super().fill(-prefix, rows)


class BrokenStep(TorchStep):
    """Stands for kernels that a compiler refuses."""

    def fill(self, prefix: Tensor, rows: Any) -> None:
        raise RuntimeError("no such instruction\non this device")


RightStep = type("RightStep", (TorchStep,), {})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (RightStep, None),
        (WrongStep, "they do not agree with torch"),
        (BrokenStep, r"\(RuntimeError: no such instruction\)"),
    ],
)
def test_kernels_that_do_not_work_are_not_used(
    make_model: Make,
    make_ids: Make,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[TorchStep],
    message: str | None,
) -> None:
    model, ids = make_model(), make_ids(2, 11)
    monkeypatch.setattr(decoder_module, "_kernels_fit", lambda model: True)
    monkeypatch.setattr(Decoder, "_make_step", lambda self, fused: kind(model, self.buffers))
    random_state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=message) if message else nullcontext():
        decoder = Decoder(model, 2)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(decoder.step_module) is (TorchStep if message else kind)
    fed = torch.stack([decoder.feed(t) for t in ids.unbind(1)], dim=1)
    torch.testing.assert_close(fed, model(ids).logits, **EXACT)


# stream() and generate()


@pytest.mark.parametrize("prompt", [1, 3, 4, 8, 30])
@pytest.mark.parametrize("batch", [1, 5, 256])
def test_stream_gives_the_tokens_of_generate(
    make_model: Make, make_ids: Make, batch: int, prompt: int
) -> None:
    model, ids = make_model(), make_ids(batch, prompt)
    expected = model.generate(ids, max_new_tokens=25, do_sample=False)[:, prompt:]
    tokens = list(model.stream(ids, max_new_tokens=25))
    assert torch.equal(torch.stack(tokens, dim=1), expected)


def test_a_prompt_is_read_in_few_calls(make_model: Make, make_ids: Make) -> None:
    """T1 in batches, level by level; T2 over nothing but the last chunk."""
    model, calls = make_model(position_embedding="chunk"), {"t1": [], "t2": []}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda m, inputs, out, seen=seen: seen.append([tuple(w.shape[:2]) for w in inputs[0]])
        )
        for name, seen in calls.items()
    ]
    next(model.stream(make_ids(1, 4 * 256 + 3)))
    for hook in hooks:
        hook.remove()
    assert calls["t2"] == [[(1, 4 + 3)]]
    assert len(calls["t1"]) <= 2 * 8
    assert sum(n for call in calls["t1"] for n, _ in call) <= 2 * 256


def test_stream_of_rows_of_different_lengths(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(4, 13)
    lengths = [13, 1, 8, 13]
    mask = torch.stack([(torch.arange(13) >= 13 - n).long() for n in lengths])
    tokens = torch.stack(list(model.stream(ids, attention_mask=mask, max_new_tokens=20)), dim=1)
    for row, length in enumerate(lengths):
        alone = list(model.stream(ids[row : row + 1, 13 - length :], max_new_tokens=20))
        assert torch.equal(tokens[row], torch.cat(alone))


@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_is_advanced_and_goes_on(make_model: Make, make_ids: Make, padded: bool) -> None:
    model, ids = make_model(), make_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, : 3 * padded] = 0
    expected = list(model.stream(ids, attention_mask=mask, max_new_tokens=30))
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    first, tokens = expected[0], []
    for count in (6, 1, 9):
        tokens += [first]
        part = list(model.stream(first[:, None], past_key_values=cache, max_new_tokens=count))
        tokens += part[:-1]
        first = part[-1]
    assert cache.get_seq_length() == 9 + len(tokens)
    assert all(torch.equal(a, b) for a, b in zip(tokens, expected, strict=False))


def test_leaving_the_loop_keeps_the_state(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(1, 10)
    cache = model.new_cache()
    stream = model.stream(ids, past_key_values=cache)
    taken = [next(stream) for _ in range(7)]
    stream.close()
    assert cache.length == 10 + 6
    fed = torch.cat([ids[0], *taken])[None]
    logits = model(fed[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(fed).logits[:, -1:], **EXACT)


def test_a_prompts_state_is_read_once_and_used_often(make_model: Make, make_ids: Make) -> None:
    model, prompt = make_model(), make_ids(1, 18)
    state = model(prompt, use_cache=True).past_key_values
    for seed in (1, 2):
        question = make_ids(1, 3, seed=seed)
        answer = list(model.stream(question, past_key_values=state.fork(), max_new_tokens=9))
        whole = list(model.stream(torch.cat([prompt, question], 1), max_new_tokens=9))
        assert torch.equal(torch.cat(answer), torch.cat(whole))


def test_streams_at_the_same_time_do_not_disturb_each_other(
    make_model: Make, make_ids: Make
) -> None:
    model = make_model()
    prompts = [make_ids(1, 6, seed=seed) for seed in (1, 2)]
    apart = [torch.cat(list(model.stream(p, max_new_tokens=20))) for p in prompts]
    both = zip(*(model.stream(p, max_new_tokens=20) for p in prompts), strict=True)
    for i, together in enumerate(zip(*both, strict=True)):
        assert torch.equal(torch.cat(together), apart[i])


def test_a_stream_sees_new_weights(make_model: Make, make_ids: Make) -> None:
    model, ids = copy.deepcopy(make_model()), make_ids(1, 5)
    before = torch.cat(list(model.stream(ids, max_new_tokens=20)))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    after = torch.cat(list(model.stream(ids, max_new_tokens=20)))
    assert not torch.equal(before, after)
    assert torch.equal(after, model.generate(ids, max_new_tokens=20, do_sample=False)[0, 5:])


def test_a_model_that_streamed_can_be_copied_and_saved(
    make_model: Make, make_ids: Make, tmp_path: Path
) -> None:
    model, ids = make_model(), make_ids(1, 5)
    expected = torch.cat(list(model.stream(ids, max_new_tokens=5)))
    model.save_pretrained(tmp_path)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(torch.cat(list(other.stream(ids, max_new_tokens=5))), expected)


def test_streams_need_no_gradient_and_leave_the_mode_alone(
    make_model: Make, make_ids: Make
) -> None:
    for token in make_model().stream(make_ids(1, 5), max_new_tokens=3):
        assert torch.is_grad_enabled()
        assert not token.requires_grad


def test_streams_alternate_between_inference_mode_and_others(
    make_model: Make, make_ids: Make
) -> None:
    model, ids = make_model(), make_ids(2, 5)
    expected = list(model.stream(ids, max_new_tokens=9))
    del model._idle_decoder  # the next one is made in inference mode
    for modes in (True, False), (True, True), (False, True), (False, False):
        with torch.inference_mode(modes[0]):
            tokens = model.stream(ids, max_new_tokens=9)
            begun = [next(tokens) for _ in range(5)]
        with torch.inference_mode(modes[1]):
            assert torch.equal(torch.stack([*begun, *tokens]), torch.stack(expected))
    assert not any(t.is_inference() for t in vars(model._idle_decoder.decoder.buffers).values())


def test_chunk_positions_never_end(make_model: Make, make_ids: Make) -> None:
    model = make_model(position_embedding="chunk", n_positions=4)
    stream = model.stream(make_ids(1, 3))
    assert len(list(islice(stream, 150))) == 150


def test_absolute_positions_end_with_the_last(make_model: Make, make_ids: Make) -> None:
    tokens = list(make_model(n_positions=20).stream(make_ids(1, 3)))
    assert len(tokens) == 17


def test_bfloat16_is_near_float32(make_model: Make, make_ids: Make) -> None:
    exact, ids = make_model(torch.float32), make_ids(2, 30)
    decoder = Decoder(copy.deepcopy(exact).bfloat16(), 2)
    fed = torch.stack([decoder.feed(t) for t in ids.unbind(1)], dim=1)
    assert fed.dtype == torch.float32
    expected = exact(ids).logits
    assert (fed - expected).norm() < 0.1 * expected.norm()


# Sampling


def kept(sampling: Sampling, logits: Tensor) -> Tensor:
    """The scaled logits by token id, -inf where a token may not be drawn."""
    values, tokens = sampling.candidates(logits)
    if tokens is None:
        return values
    return torch.full_like(logits, -torch.inf).scatter(-1, tokens, values)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, None), (5, None), (None, 0.7), (9, 0.6), (500, 0.01), (1, 1.0)]
)
def test_candidates_are_those_of_transformers(top_k: int | None, top_p: float | None) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(20, 60, dtype=torch.float64)
    expected = TemperatureLogitsWarper(0.8)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(kept(Sampling(0.8, top_k, top_p), logits), expected)


def test_draws_follow_the_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(40_000, 4)
    drawn = Sampling(temperature=2.0, top_k=3).choose(logits)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    expected = torch.tensor([0.0, 0.5, 1.0, -torch.inf]).softmax(0)
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)


def test_sampled_streams_are_repeated_by_the_seed(make_model: Make, make_ids: Make) -> None:
    model, ids, runs = make_model(), make_ids(2, 5), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        options = {"temperature": 1.5, "top_k": 20, "top_p": 0.9}
        runs.append(torch.stack(list(model.stream(ids, max_new_tokens=20, **options))))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# Mistakes: all noticed before anything is generated, when stream() is called


def test_more_tokens_than_positions_are_refused_at_once(make_model: Make, make_ids: Make) -> None:
    model = make_model(n_positions=20)
    with pytest.raises(ScanLMError, match="sequence of 21 tokens is longer than n_positions=20"):
        model.stream(make_ids(1, 10), max_new_tokens=11)
    with pytest.raises(ScanLMError, match="sequence of 21 tokens"):
        model.generate(make_ids(1, 10), max_new_tokens=11)
    cache = model(make_ids(1, 8), use_cache=True).past_key_values
    with pytest.raises(ScanLMError, match="sequence of 21 tokens"):
        model.stream(make_ids(1, 2), past_key_values=cache, max_new_tokens=11)
    decoder = Decoder(model, 1)
    for tokens in make_ids(1, 20).unbind(1):
        decoder.feed(tokens)
    with pytest.raises(ScanLMError, match="sequence of 21 tokens"):
        decoder.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected an integer >= 1"),
        ({"temperature": -1.0}, "temperature=-1.0: expected a number >= 0"),
        ({"top_k": 0}, "top_k=0: expected an integer >= 1"),
        ({"top_p": 1.5}, "top_p=1.5: expected a probability"),
    ],
)
def test_options_out_of_range_are_refused(
    make_model: Make, make_ids: Make, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ScanLMError, match=message):
        make_model().stream(make_ids(1, 3), **options)


def test_a_stream_goes_on_under_a_mask_of_all_columns(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    begun = model(ids, attention_mask=mask, use_cache=True)
    whole = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
    more, cache = make_ids(2, 1), begun.past_key_values
    (token,) = model.stream(
        more, attention_mask=whole, past_key_values=cache.fork(), max_new_tokens=1
    )
    expected = model(more, attention_mask=whole, past_key_values=cache).logits[:, -1].argmax(-1)
    assert torch.equal(token, expected)


def test_an_empty_prompt_is_refused(make_model: Make) -> None:
    with pytest.raises(ScanLMError, match="at least one token"):
        make_model().stream(torch.zeros(1, 0, dtype=torch.long))


def test_a_model_in_training_mode_is_refused(make_model: Make, make_ids: Make) -> None:
    model = make_model().train()
    with pytest.raises(ScanLMError, match="training mode"):
        model.stream(make_ids(1, 3))
    with pytest.raises(ScanLMError, match="training mode"):
        Decoder(model, 1)


def test_a_decoder_refuses_a_cache_that_does_not_fit(make_model: Make, make_ids: Make) -> None:
    model = make_model()
    cache: ScanCache = model(make_ids(2, 9), use_cache=True).past_key_values
    with pytest.raises(ScanLMError, match="holds 2 sequences, the input has 3"):
        Decoder(model, 3).load(cache)
    with pytest.raises(ScanLMError, match="cache of another model"):
        Decoder(make_model(), 2).load(cache)
