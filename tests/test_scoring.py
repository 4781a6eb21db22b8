"""Which tokens are scored, from which context, and how the losses are summed."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Mamba2Config, Mamba2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from scanlm import ScanLMConfig, ScanLMError, ScanLMForCausalLM
from scanlm.scoring import Evaluation, evaluate_blocks, evaluate_sliding, evaluate_streaming

VOCAB = 31


def gpt2(**overrides):
    torch.manual_seed(0)
    config = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    special = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.5}
    return GPT2LMHeadModel(GPT2Config(**{**config, **special, **overrides}))


def scanlm(**overrides):
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "n_embd": 16,
        "n_head": 2,
        "t1_layers": 1,
        "t2_layers": 1,
        "chunk_size": 4,
    }
    fields = {**shape, "n_positions": 64, "initializer_range": 0.5, **overrides}
    return ScanLMForCausalLM(ScanLMConfig(**fields))


def mamba2():
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "state_size": 8,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 8,
    }
    return Mamba2ForCausalLM(
        Mamba2Config(vocab_size=VOCAB, n_groups=1, expand=2, chunk_size=8, **shape)
    )


def text(n, seed=0):
    return np.random.default_rng(seed).integers(VOCAB, size=n).astype(np.uint16)


def losses_given(model, context, targets):
    """Nats of each target after the last tokens of the context, one forward pass: the oracle."""
    model.eval()
    ids = torch.as_tensor(np.asarray(context, dtype=np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, -len(targets) :]
    wanted = torch.as_tensor(np.asarray(targets, dtype=np.int64))
    return F.cross_entropy(logits.double(), wanted, reduction="none").numpy()


class Bigram(nn.Module):
    """Predicts from the last token alone; float64, so losses are exact; records its inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCAB, VOCAB, dtype=torch.float64)
        self.seen = []

    def forward(self, input_ids, use_cache=False, past_key_values=None):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.seen.append(tuple(input_ids.shape))
        return CausalLMOutputWithPast(
            logits=self.table(input_ids), past_key_values=(1,) if use_cache else None
        )

    def losses(self, tokens):
        """Nats of tokens 1 ... n - 1."""
        ids = torch.as_tensor(tokens.astype(np.int64))
        with torch.no_grad():
            return F.cross_entropy(self.table(ids[:-1]), ids[1:], reduction="none").numpy()


@pytest.mark.parametrize("n", [2, 3, 8, 9, 10, 16, 17, 18, 45])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_every_token_after_the_first_is_scored_once(n, stride):
    model, tokens = Bigram(), text(n)
    expected = model.losses(tokens)
    for batch_size in (1, 2, 5):
        result = evaluate_sliding(model, tokens, 8, stride, batch_size=batch_size)
        assert result.num_tokens == n - 1
        assert result.nats == pytest.approx(expected.sum(), abs=1e-12)
    result = evaluate_streaming(model, tokens, 8)
    assert result.num_tokens == n - 1
    assert result.nats == pytest.approx(expected.sum(), abs=1e-12)


def test_blocks_run_in_batches_and_the_partial_block_alone():
    model = Bigram()
    evaluate_blocks(model, text(1 + 5 * 8 + 3), 8, batch_size=2)
    assert model.seen == [(2, 8), (2, 8), (1, 8), (1, 3)]


def test_loss_by_position_in_the_block():
    model, tokens = Bigram(), text(1 + 3 * 8 + 5)
    expected = model.losses(tokens)
    result = evaluate_blocks(model, tokens, 8, batch_size=2)
    by_position = [expected[p::8].mean() for p in range(8)]
    np.testing.assert_allclose(result.loss_by_position, by_position, rtol=0, atol=1e-12)
    assert result.counts_by_position.tolist() == [4, 4, 4, 4, 4, 3, 3, 3]
    assert result.positions.tolist() == list(range(8))


def test_positions_that_no_token_has_are_nan():
    result = evaluate_blocks(Bigram(), text(4), 8)
    assert result.counts_by_position.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert np.isnan(result.loss_by_position[3:]).all()
    assert math.isfinite(result.loss)


@pytest.mark.parametrize("make", [gpt2, scanlm, mamba2])
def test_blocks_see_their_own_tokens_only(make):
    model, tokens = make(), text(1 + 2 * 8 + 5)
    expected = np.concatenate(
        [losses_given(model, tokens[s:e], tokens[s + 1 : e + 1]) for s, e in [(0, 8), (8, 16)]]
        + [losses_given(model, tokens[16:21], tokens[17:22])]
    )
    result = evaluate_blocks(model, tokens, 8)
    assert result.loss == pytest.approx(expected.mean(), abs=1e-6)


@pytest.mark.parametrize("make", [gpt2, scanlm, mamba2])
def test_sliding_tokens_see_the_window_that_first_reaches_them(make):
    model, tokens = make(), text(40)
    seq_len, stride = 8, 3
    expected = [losses_given(model, tokens[:8], tokens[1:9])]
    for first in range(9, 40, stride):  # scores tokens first ... first + stride - 1
        last = min(first + stride, 40)
        start = first + stride - 1 - seq_len
        expected.append(losses_given(model, tokens[start : last - 1], tokens[first:last]))
    result = evaluate_sliding(model, tokens, seq_len, stride, batch_size=3)
    assert result.nats == pytest.approx(np.concatenate(expected).sum(), abs=1e-4)
    assert result.counts_by_position.tolist() == [1] * 5 + [12, 11, 11]


def test_sliding_is_the_recipe_of_transformers():
    # https://huggingface.co/docs/transformers/perplexity; its max_length counts the last target
    model, tokens = gpt2().eval(), text(50)
    max_length, stride, n = 9, 4, 50
    nats, scored, previous = 0.0, 0, 0
    for begin in range(0, n, stride):
        end = min(begin + max_length, n)
        ids = torch.as_tensor(tokens[begin:end].astype(np.int64))[None]
        labels = ids.clone()
        labels[:, : -(end - previous)] = -100
        with torch.no_grad():
            loss = model(ids, labels=labels).loss.item()
        valid = int((labels[:, 1:] != -100).sum())
        nats, scored, previous = nats + loss * valid, scored + valid, end
        if end == n:
            break
    result = evaluate_sliding(model, tokens, max_length - 1, stride)
    assert result.num_tokens == scored
    assert result.loss == pytest.approx(nats / scored, abs=1e-6)


@pytest.mark.parametrize(
    "make", [gpt2, scanlm, lambda: scanlm(position_embedding="chunk", n_positions=4), mamba2]
)
@pytest.mark.parametrize("piece", [1, 7, 16, 100])
def test_streaming_tokens_see_everything_before_them(make, piece):
    model, tokens = make(), text(50)
    expected = losses_given(model, tokens[:-1], tokens[1:])
    result = evaluate_streaming(model, tokens, piece)
    assert result.loss == pytest.approx(expected.mean(), abs=1e-5)
    pieces = [expected[i : i + piece].mean() for i in range(0, 49, piece)]
    np.testing.assert_allclose(result.loss_by_position, pieces, rtol=0, atol=1e-4)
    assert result.positions.tolist() == list(range(0, 49, piece))
    if piece < 49:  # the state matters: without it the losses are others
        assert abs(evaluate_blocks(model, tokens, piece).loss - result.loss) > 1e-4


def test_streaming_refuses_positions_that_end():
    with pytest.raises(ScanLMError, match="absolute positions end at 64"):
        evaluate_streaming(gpt2(), text(66), 16)
    assert evaluate_streaming(gpt2(), text(65), 16).num_tokens == 64
    with pytest.raises(ScanLMError, match="absolute positions end at 64"):
        evaluate_streaming(scanlm(), text(66), 16)


def test_streaming_refuses_a_model_without_state():
    class Stateless(Bigram):
        def forward(self, input_ids, use_cache=False):
            return super().forward(input_ids)

    with pytest.raises(ScanLMError, match="Stateless returns no state"):
        evaluate_streaming(Stateless(), text(9), 4)


@pytest.mark.parametrize("make", [gpt2, scanlm, mamba2])
def test_the_loss_does_not_depend_on_the_batch_size(make):
    model, tokens = make(), text(1 + 13 * 8 + 3)
    losses = [evaluate_blocks(model, tokens, 8, batch_size=b).loss for b in (1, 2, 5, 13, 64)]
    assert max(losses) - min(losses) < 1e-6


def test_with_exact_losses_the_sum_does_not_depend_on_the_batch_size_at_all():
    model, tokens = Bigram(), text(1 + 50 * 8 + 3)
    first, *others = (evaluate_blocks(model, tokens, 8, batch_size=b) for b in (1, 3, 16, 64))
    for other in others:
        assert np.array_equal(first.sums, other.sums)


def test_agrees_with_the_loss_of_transformers():
    # blocks of a transformers loss: a block's labels include the token after it
    model, tokens = gpt2().eval(), text(1 + 3 * 16)
    rows = torch.as_tensor(tokens.astype(np.int64))
    losses = []
    for start in range(0, 48, 16):
        ids = rows[start : start + 17][None]
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    result = evaluate_blocks(model, tokens, 16)
    assert result.loss == pytest.approx(np.mean(losses), abs=1e-5)


def test_dropout_is_off_and_modes_are_restored():
    model = gpt2(resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()  # a part the user froze
    before = {name: module.training for name, module in model.named_modules()}
    first = evaluate_blocks(model, text(40), 8).loss
    assert evaluate_blocks(model, text(40), 8).loss == first
    assert {name: module.training for name, module in model.named_modules()} == before


def test_modes_are_restored_after_an_error():
    model = gpt2().train()
    nn.init.constant_(model.transformer.ln_f.weight, float("nan"))
    with pytest.raises(ScanLMError, match="NaN"):
        evaluate_blocks(model, text(40), 8)
    assert model.training


def test_a_training_step_works_after_an_evaluation():
    model = scanlm()
    evaluate_blocks(model, text(40), 8)
    ids = torch.as_tensor(text(8).astype(np.int64))[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.wte.weight.grad is not None


def test_original_positions_skip_tokens_that_begin_a_chunk():
    model, tokens = Bigram(), text(1 + 2 * 8 + 6)
    losses = model.losses(tokens)  # losses[i] is token i + 1's
    kept = [i for i in range(len(losses)) if (i + 1) % 4]
    for result in (
        evaluate_blocks(model, tokens, 8, chunk_size=4),
        evaluate_streaming(model, tokens, 8, chunk_size=4),
    ):
        assert result.num_tokens == len(kept)
        assert result.loss == pytest.approx(losses[kept].mean(), abs=1e-12)
    result = evaluate_blocks(model, tokens, 8, chunk_size=4)
    assert np.flatnonzero(result.counts_by_position == 0).tolist() == [3, 7]


def test_max_tokens_scores_the_first_tokens():
    model, tokens = Bigram(), text(60)
    result = evaluate_blocks(model, tokens, 8, max_tokens=21)
    assert result.num_tokens == 21
    assert result.nats == pytest.approx(model.losses(tokens)[:21].sum(), abs=1e-12)


def test_logits_are_converted_a_slice_at_a_time(monkeypatch):
    model, tokens = gpt2(), text(1 + 5 * 8)
    whole = evaluate_blocks(model, tokens, 8)
    largest = 0

    def spy(logits, *args, plain=F.cross_entropy, **kwargs):
        nonlocal largest
        largest = max(largest, logits.numel())
        return plain(logits, *args, **kwargs)

    monkeypatch.setattr("scanlm.scoring.LOGITS_PER_SLICE", 3 * VOCAB)
    monkeypatch.setattr("scanlm.scoring.F.cross_entropy", spy)
    sliced = evaluate_blocks(model, tokens, 8)
    assert largest == 3 * VOCAB
    np.testing.assert_allclose(sliced.sums, whole.sums, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("at_once", "windows"), [(2 * 8 * VOCAB, [2, 2, 1]), (1, [1] * 5)])
def test_as_many_windows_at_a_time_as_their_logits_allow(monkeypatch, at_once, windows):
    model, tokens = gpt2(), text(1 + 5 * 8)
    whole = evaluate_blocks(model, tokens, 8)
    seen = []
    model.register_forward_hook(lambda _, __, out: seen.append(len(out.logits)))
    monkeypatch.setattr("scanlm.scoring.LOGITS_AT_ONCE", at_once)
    split = evaluate_blocks(model, tokens, 8)
    assert seen == windows
    np.testing.assert_allclose(split.sums, whole.sums, rtol=0, atol=1e-5)


def test_bf16_weights_are_scored_in_float32():
    # logits of 0 and 1/128: in bf16 the log-sum-exp would round to the nearest 1/64
    model = Bigram().to(torch.bfloat16)
    with torch.no_grad():
        model.table.weight.zero_()
        model.table.weight[:, 0] = 1 / 128
    result = evaluate_blocks(model, np.ones(9, dtype=np.uint16), 8)
    expected = math.log(VOCAB - 1 + math.exp(1 / 128))
    assert result.loss == pytest.approx(expected, abs=1e-6)


def test_precision_is_autocast():
    model, tokens = gpt2(), text(1 + 4 * 16)
    plain = evaluate_blocks(model, tokens, 16).loss
    assert evaluate_blocks(model, tokens, 16, precision="fp32").loss == plain
    rounded = evaluate_blocks(model, tokens, 16, precision="bf16").loss
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=0.02)


def evaluation(sums, counts):
    return Evaluation(np.asarray(sums, float), np.asarray(counts), np.arange(len(sums)))


def test_normalisers():
    result = evaluation([math.log(2) * 6, math.log(2) * 2], [3, 1])
    assert result.loss == pytest.approx(2 * math.log(2))
    assert result.perplexity == pytest.approx(4)
    assert result.bits_per_byte(16) == pytest.approx(0.5)
    assert result.word_perplexity(2) == pytest.approx(16)
    assert evaluation([1e6], [1]).perplexity == math.inf
    with pytest.raises(ScanLMError, match="num_bytes must be an integer >= 1, got 0"):
        result.bits_per_byte(0)


def test_parts_merge_to_the_whole():
    model, tokens = Bigram(), text(1 + 6 * 8 + 3)
    whole = evaluate_blocks(model, tokens, 8)
    merged = evaluate_blocks(model, tokens[: 1 + 16], 8).merge(
        evaluate_blocks(model, tokens[16:], 8)
    )
    np.testing.assert_allclose(merged.sums, whole.sums, rtol=0, atol=1e-12)
    assert np.array_equal(merged.counts_by_position, whole.counts_by_position)
    with pytest.raises(ScanLMError, match="cannot merge evaluations over 8 and 4 positions"):
        whole.merge(evaluate_blocks(model, tokens, 4))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tokens": text(0)}, "nothing to evaluate: 0 tokens"),
        ({"tokens": text(1)}, "nothing to evaluate: 1 tokens"),
        ({"tokens": np.zeros((2, 3), int)}, r"one sequence of shape \(n,\), got \(2, 3\)"),
        ({"tokens": np.asarray([1, VOCAB, 2])}, "token id 31 is not in the model's vocabulary of"),
        ({"tokens": np.asarray([1, -1, 2])}, "token id -1 is not in the model's vocabulary of 31"),
        ({"seq_len": 0}, "seq_len must be an integer >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1, got 0"),
        ({"seq_len": 65}, "seq_len=65 is longer than the 64 positions of this gpt2 model"),
        ({"precision": "bf17"}, "unknown precision 'bf17'. Did you mean 'bf16'"),
        ({"chunk_size": 1}, "every token begins a chunk"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    with pytest.raises(ScanLMError, match=message) as caught:
        evaluate_blocks(gpt2(), **{"tokens": text(80), "seq_len": 8, **kwargs})
    assert "\n" not in str(caught.value)


def test_a_stride_that_would_skip_tokens_is_refused():
    with pytest.raises(ScanLMError, match="stride=9 is larger than seq_len=8"):
        evaluate_sliding(gpt2(), text(80), 8, 9)


def test_nan_names_the_first_token_it_hits():
    model = Bigram()
    tokens = np.asarray([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
    with torch.no_grad():
        model.table.weight[10] = float("nan")  # read at index 9: position 1 of the third block
    for batch_size in (1, 8):
        with pytest.raises(ScanLMError, match=r"nan at token 10 \(position 1 of the window at tok"):
            evaluate_blocks(model, tokens, 4, batch_size=batch_size)
    with pytest.raises(ScanLMError, match="nan at token 10"):
        evaluate_streaming(model, tokens, 4)
    with pytest.raises(ScanLMError, match="nan at token 10"):
        evaluate_sliding(model, tokens, 4, 2)
