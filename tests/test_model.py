"""ScanLMForCausalLM computes the model of the paper, and GPT-2 where the two coincide."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from scanlm import ScanLMConfig, ScanLMError, ScanLMForCausalLM, sequential_scan
from scanlm.gpt2 import tiny_attention

Make = Callable[..., Any]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


# The definition, written plainly: one window at a time, explicit softmax, nothing skipped


def reference_stack(stack: nn.Module, x: Tensor, n_head: int, causal: bool, eps: float) -> Tensor:
    """GPT-2's blocks and final norm over one group of windows ``(b, s, d)``."""
    p = dict(stack.named_parameters())
    b, s, d = x.shape

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        return centred / (variance + eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    for i in range(len(stack.h)):  # type: ignore[arg-type]
        qkv = linear(f"h.{i}.attn.c_attn", norm(f"h.{i}.ln_1", x))
        q, k, v = (t.view(b, s, n_head, -1).transpose(1, 2) for t in qkv.split(d, dim=-1))
        scores = q @ k.transpose(2, 3) / math.sqrt(d // n_head)
        if causal:
            future = torch.ones(s, s, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, d)
        x = x + linear(f"h.{i}.attn.c_proj", attended)
        inner = linear(f"h.{i}.mlp.c_fc", norm(f"h.{i}.ln_2", x))
        inner = (
            0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        )
        x = x + linear(f"h.{i}.mlp.c_proj", inner)
    return norm("ln_f", x)


def reference_logits(model: ScanLMForCausalLM, input_ids: Tensor) -> Tensor:
    """The whole model, chunk after chunk."""
    config = model.config
    c, eps, t = config.chunk_size, config.layer_norm_epsilon, input_ids.shape[1]
    positions = torch.arange(t)
    if config.position_embedding == "chunk":
        positions = positions % c
    x = model.wte.weight[input_ids] + model.wpe.weight[positions]
    if config.leaf_norm:
        x = F.layer_norm(x, x.shape[-1:], model.leaf_norm.weight, model.leaf_norm.bias, eps)

    def t1(left: Tensor, right: Tensor) -> Tensor:
        window = torch.cat([left, right], dim=1)
        return reference_stack(model.t1, window, config.n_head, config.t1_causal, eps)[:, c:]

    chunks = list(x.split(c, dim=1))
    logits = []
    for prefix, chunk in zip(sequential_scan(t1, chunks), chunks, strict=True):
        marker = 0 if model.wse is None else model.wse.weight
        window = chunk if prefix is None else torch.cat([prefix + marker, chunk], dim=1)
        out = reference_stack(model.t2, window, config.n_head, True, eps)
        logits.append(out[:, -chunk.shape[1] :] @ model.lm_head.weight.T)
    return torch.cat(logits, dim=1)


def loss_and_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return dict(zip(names, gradients, strict=True))


def next_token_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())


@pytest.mark.parametrize("tokens", [3, 4, 5, 12, 14, 27])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"t1_causal": True},
        {"leaf_norm": False},
        {"position_embedding": "chunk"},
        {"prefix_embedding": True},
        {"t1_layers": 2},
        {"t1_layers": 2, "t1_causal": True, "position_embedding": "chunk", "leaf_norm": False},
        {"t2_layers": 1, "n_inner": 7, "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_logits_and_gradients_are_those_of_the_definition(
    make_model: Make, make_ids: Make, shape: dict[str, Any], tokens: int
) -> None:
    model, ids = make_model(**shape), make_ids(2, tokens)
    out = model(ids, labels=ids)
    expected = reference_logits(model, ids)
    torch.testing.assert_close(out.logits, expected, **EXACT)
    reference_loss = next_token_loss(expected, ids)
    torch.testing.assert_close(out.loss, reference_loss, **EXACT)

    unused = ("t1.", "wse.") if tokens <= 4 else ("t1.",) if tokens <= 8 else ()
    used = [(n, p) for n, p in model.named_parameters() if not n.startswith(unused)]
    parameters = [p for _, p in used]
    actual = torch.autograd.grad(out.loss, parameters)
    wanted = torch.autograd.grad(reference_loss, parameters)
    for (name, _), a, w in zip(used, actual, wanted, strict=True):
        torch.testing.assert_close(a, w, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("told_apart", [False, True])
def test_a_prefix_embedding_tells_a_word_from_its_repetition(
    make_model: Make, told_apart: bool
) -> None:
    fields = {"chunk_size": 1, "position_embedding": "chunk"}
    model = make_model(**fields, prefix_embedding=told_apart)
    first, second = model(torch.tensor([[7, 7]])).logits[0]
    assert torch.allclose(first, second) == (not told_apart)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5])
def test_definition_holds_for_other_chunk_sizes(
    make_model: Make, make_ids: Make, chunk_size: int
) -> None:
    model = make_model(chunk_size=chunk_size)
    for tokens in range(1, 9 * chunk_size + 2):
        ids = make_ids(1, tokens)
        torch.testing.assert_close(model(ids).logits, reference_logits(model, ids), **EXACT)


@pytest.mark.parametrize("tokens", [9, 16, 18, 29])
def test_train_modes_are_one_model(make_model: Make, make_ids: Make, tokens: int) -> None:
    ids = make_ids(2, tokens)
    results = []
    for mode in ("blelloch", "sequential", "parallel"):
        model = make_model(train_mode=mode, t1_layers=2)
        out = model(ids, labels=ids)
        results.append((out.logits, loss_and_gradients(model, out.loss)))
    for logits, gradients in results[1:]:
        torch.testing.assert_close(logits, results[0][0], **EXACT)
        torch.testing.assert_close(gradients, results[0][1], **EXACT)


def test_train_mode_decides_how_many_calls_t1_gets(make_model: Make, make_ids: Make) -> None:
    ids = make_ids(1, 8 * 4)
    calls = {}
    for mode in ("blelloch", "sequential"):
        model = make_model(train_mode=mode)
        shapes: list[torch.Size] = []
        model.t1.h[0].register_forward_hook(
            lambda m, args, out, seen=shapes: seen.append(args[0].shape)
        )
        model(ids)
        calls[mode] = [shape[0] // (2 * 4) for shape in shapes]
    assert calls == {"blelloch": [3, 2, 2, 1], "sequential": [1] * 8}


# GPT-2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("n_embd", "n_head", "n_layer", "n_inner", "activation"),
    [
        (16, 1, 1, None, "gelu_new"),
        (24, 4, 2, 40, "gelu_new"),
        (64, 2, 3, None, "relu"),
    ],
)
def test_equals_gpt2_within_one_chunk(
    make_ids: Make,
    n_embd: int,
    n_head: int,
    n_layer: int,
    n_inner: int | None,
    activation: str,
    tied: bool,
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=29,
        n_positions=32,
        n_embd=n_embd,
        n_head=n_head,
        n_layer=n_layer,
        n_inner=n_inner,
        activation_function=activation,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    gpt2 = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for chunk_size in (1, 7, 32):
        model = ScanLMForCausalLM.from_gpt2(gpt2, chunk_size=chunk_size)
        assert model.config.tie_word_embeddings is tied
        assert (model.lm_head.weight is model.wte.weight) is tied
        for tokens in {1, chunk_size // 2 + 1, chunk_size}:
            ids = make_ids(3, tokens)
            torch.testing.assert_close(model(ids).logits, gpt2(ids).logits, rtol=0, atol=1e-5)


def test_gpt2_differs_beyond_two_chunks(make_ids: Make) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=29, n_embd=16, n_head=2, n_layer=1)).eval()
    ids = make_ids(1, 13)
    model = ScanLMForCausalLM.from_gpt2(gpt2, chunk_size=4)
    difference = (model(ids).logits - gpt2(ids).logits).abs().amax((0, 2))
    assert difference[:8].max() < 1e-5  # the second chunk's prefix is the first one's embeddings
    assert difference[8:].min() > 1e-4


def test_from_gpt2_keeps_positions_within_the_chunk_and_the_dtype(make_ids: Make) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=29, n_embd=16, n_head=2, n_layer=1)).bfloat16()
    model = ScanLMForCausalLM.from_gpt2(gpt2, chunk_size=4, position_embedding="chunk", t1_layers=2)
    assert model.dtype == torch.bfloat16
    assert len(model.t1.h) == 2
    assert torch.equal(model.wpe.weight, gpt2.transformer.wpe.weight[:4])


def test_block_parameters_have_gpt2s_names_and_shapes() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=29, n_embd=12, n_head=3, n_layer=2, n_inner=7))
    model = ScanLMForCausalLM.from_gpt2(gpt2, chunk_size=4, t1_layers=2)
    expected = {
        name: value.shape
        for name, value in gpt2.transformer.named_parameters()
        if name.startswith(("h.", "ln_f."))
    }
    for stack in (model.t1, model.t2):
        assert {name: value.shape for name, value in stack.named_parameters()} == expected
    outside = {n for n, _ in model.named_parameters() if not n.startswith(("t1.", "t2."))}
    assert outside == {"wte.weight", "wpe.weight"}


def test_a_gpt2_with_other_attention_scaling_is_refused() -> None:
    config = GPT2Config(
        vocab_size=29, n_embd=16, n_head=2, n_layer=2, scale_attn_by_inverse_layer_idx=True
    )
    with pytest.raises(ScanLMError, match="scale_attn_by_inverse_layer_idx=True"):
        ScanLMForCausalLM.from_gpt2(GPT2LMHeadModel(config))


# T1 and T2


@pytest.mark.parametrize("t1_layers", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_t1_sees_the_future_of_its_window_unless_causal(
    make_model: Make, causal: bool, t1_layers: int
) -> None:
    model = make_model(t1_causal=causal, t1_layers=t1_layers)
    left, right = torch.randn(2, 2, 4, 12, dtype=torch.float64)
    changed = right.clone()
    changed[:, -1] += torch.randn(12, dtype=torch.float64)  # a constant would fall to the norms
    difference = (model.aggregate(left, changed) - model.aggregate(left, right)).abs()
    assert (difference[:, -1] > 1e-6).all()
    if causal:
        assert difference[:, :-1].max() < 1e-14
    else:
        assert difference[:, 0].amax(-1).min() > 1e-6


def test_t1_is_given_left_and_right_in_order(make_model: Make) -> None:
    model = make_model()
    left, right = torch.randn(2, 1, 4, 12, dtype=torch.float64)
    swapped = model.aggregate(right, left)
    assert (model.aggregate(left, right) - swapped).abs().max() > 1e-3


def rows_of(module: nn.Module, run: Callable[[], object]) -> list[int]:
    """First dimensions of the token matrices that reach ``module`` during ``run()``."""
    rows: list[int] = []
    handle = module.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[0]))
    run()
    handle.remove()
    return rows


def test_last_blocks_compute_kept_positions_only(make_model: Make, make_ids: Make) -> None:
    model = make_model(t1_layers=2, t2_layers=2)
    pair = torch.randn(2, 5, 4, 12, dtype=torch.float64)

    def aggregate() -> None:
        model.aggregate(pair[0], pair[1])

    assert rows_of(model.t1.h[0].mlp, aggregate) == [5 * 8]
    for part in (model.t1.h[1].mlp, model.t1.h[1].attn.c_proj, model.t1.h[1].ln_2, model.t1.ln_f):
        assert rows_of(part, aggregate) == [5 * 4]

    ids = make_ids(3, 11)
    for part in (model.t2.h[1].mlp, model.t2.h[1].attn.c_proj, model.t2.h[1].ln_2, model.t2.ln_f):
        assert rows_of(part, lambda: model(ids)) == [3 * 11]


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 9, 11, 12])
def test_a_partial_chunk_is_not_padded(make_model: Make, make_ids: Make, tokens: int) -> None:
    model, ids = make_model(), make_ids(2, tokens)
    chunks_with_past = (tokens - 1) // 4
    expected = 2 * (tokens + 4 * chunks_with_past)
    assert rows_of(model.t2.h[0].mlp, lambda: model(ids)) == [expected]


# What depends on what


@pytest.mark.parametrize("position_embedding", ["absolute", "chunk"])
def test_no_logit_depends_on_a_future_token(
    make_model: Make, make_ids: Make, position_embedding: str
) -> None:
    model, ids = make_model(position_embedding=position_embedding), make_ids(1, 22)
    variants = ids.repeat(22, 1)
    variants.fill_diagonal_(0)
    variants[ids[0] == 0, ids[0] == 0] = 1
    change = (model(variants).logits - model(ids).logits).abs().amax(-1)  # changed token, position
    past = torch.ones(22, 22, dtype=torch.bool).tril(-1)
    assert change[past].max() < 1e-12
    assert change[~past].min() > 1e-9  # and every later one does depend on it


def test_a_token_thousands_of_positions_back_matters(make_model: Make, make_ids: Make) -> None:
    model = make_model(position_embedding="chunk", chunk_size=64, n_embd=8, n_head=1, t2_layers=1)
    with torch.no_grad():  # a random T1 forgets; one that hands much of its left half on does not
        model.t1.h[0].attn.c_proj.weight.mul_(10)
    ids = make_ids(1, 4096)
    both = torch.cat([ids, ids])
    both[1, 5] = (ids[0, 5] + 1) % 29
    with torch.no_grad():
        logits = model(both, logits_to_keep=64).logits
    rounding = 1e-14
    assert (logits[0] - logits[1]).abs().amax(-1).min() > 1000 * rounding


@pytest.mark.parametrize("shape", [{}, {"t1_layers": 2}, {"leaf_norm": False}], ids=str)
def test_gradients_reach_every_parameter(
    make_model: Make, make_ids: Make, shape: dict[str, Any]
) -> None:
    model, ids = make_model(**shape), make_ids(2, 12)
    gradients = loss_and_gradients(model, model(ids, shift_labels=ids).loss)
    for name, gradient in gradients.items():
        if name.endswith("c_attn.weight"):
            for part in gradient.split(12, dim=1):
                assert part.abs().amax(0).min() > 0, name
        elif not name.startswith(("wte", "wpe")):
            assert gradient.abs().max() > 0, name
    assert gradients["wpe.weight"][:12].abs().amax(1).min() > 0
    assert gradients["wte.weight"][ids.unique()].abs().amax(1).min() > 0


def test_one_chunk_trains_no_t1(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(1, 4)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in model.t1.parameters())
    assert all(p.grad is not None for p in model.t2.parameters())


# Initialisation


def test_initial_weights_are_gpt2s() -> None:
    torch.manual_seed(0)
    config = ScanLMConfig(
        vocab_size=500, n_embd=96, n_head=2, t1_layers=3, t2_layers=8, n_positions=300
    )
    model = ScanLMForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln_" in name or "leaf_norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            layers = {"t1": 3, "t2": 8}.get(name.split(".")[0], 0)
            std = 0.02 / math.sqrt(2 * layers) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name


# Loss and logits


def test_labels_are_shifted_inside_and_shift_labels_are_not(
    make_model: Make, make_ids: Make
) -> None:
    model, ids = make_model(), make_ids(2, 11)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, labels=ids).loss, next_token_loss(logits, ids), **EXACT)
    targets = make_ids(2, 11, seed=1)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(ids, shift_labels=targets).loss, expected, **EXACT)
    both = model(ids, labels=ids, shift_labels=targets).loss
    torch.testing.assert_close(both, expected, **EXACT)


def test_every_token_is_scored_once(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(1, 11)
    for position in range(11):  # chunk borders included
        targets = torch.full_like(ids, -100)
        targets[0, position] = 7
        expected = -model(ids).logits[0, position].log_softmax(-1)[7]
        torch.testing.assert_close(model(ids, shift_labels=targets).loss, expected, **EXACT)


def test_num_items_in_batch_is_the_divisor(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(2, 6)
    mean = model(ids, labels=ids).loss
    accumulated = model(ids, labels=ids, num_items_in_batch=torch.tensor(40)).loss
    torch.testing.assert_close(accumulated, mean * 10 / 40, **EXACT)


def test_logits_to_keep_selects_positions(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(2, 14)
    logits = model(ids).logits
    for keep in (1, 3, 6, 14, 20):
        for cache in (None, True):
            kept = model(ids, logits_to_keep=keep, use_cache=cache).logits
            torch.testing.assert_close(kept, logits[:, -keep:], **EXACT)
    chosen = torch.tensor([0, 5, 13])
    for cache in (None, True):
        kept = model(ids, logits_to_keep=chosen, use_cache=cache).logits
        torch.testing.assert_close(kept, logits[:, chosen], **EXACT)


def test_logits_need_not_be_made_for_a_loss(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(2, 9)
    out = model(ids, labels=ids, return_logits=False)
    assert out.logits is None
    torch.testing.assert_close(out.loss, model(ids, labels=ids).loss, **EXACT)


def test_padding_at_the_left_starts_a_row_later(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(3, 11)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[2, :10] = 0
    logits = model(ids, attention_mask=mask).logits
    for row, start in enumerate([5, 0, 10]):
        alone = model(ids[row : row + 1, start:]).logits
        torch.testing.assert_close(logits[row : row + 1, start:], alone, **EXACT)


def test_padding_at_the_right_changes_nothing_before_it(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(ids).logits, **EXACT)


# Precision, checkpointing, compilation


@pytest.mark.parametrize("half_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs(
    make_model: Make, make_ids: Make, dtype: torch.dtype, half_residual: bool
) -> None:
    model, ids = make_model(dtype=torch.float32), make_ids(2, 14)
    model.half_residual = half_residual
    exact = model(ids, labels=ids)
    with torch.autocast("cpu", dtype=dtype):
        out = model(ids, labels=ids)
        leaves = model.embed(ids[:, :8]).unflatten(1, (2, 4))
        states = model.prefix_states(leaves)
    kept = dtype if half_residual else torch.float32
    assert leaves.dtype == states.dtype == kept
    assert out.logits.dtype == dtype  # so autocast was in effect
    step = torch.finfo(dtype).eps
    assert abs(out.loss.item() - exact.loss.item()) < 4 * step * exact.logits.abs().max().item()
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == torch.float32, name


def test_gradient_checkpointing_changes_no_gradient(make_model: Make, make_ids: Make) -> None:
    ids = make_ids(2, 14)
    plain = make_model(t1_layers=2).train()
    expected = loss_and_gradients(plain, plain(ids, labels=ids).loss)
    model = make_model(t1_layers=2).train()
    model.gradient_checkpointing_enable()
    results = {}

    def run() -> None:
        model(ids, labels=ids).loss.backward()
        results.update({n: p.grad for n, p in model.named_parameters()})

    assert len(rows_of(model.t2.h[0].mlp, run)) == 2  # forward, and again for the backward
    torch.testing.assert_close(results, expected, **EXACT)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing_goes_on_without_a_state(
    make_model: Make, make_ids: Make, padded: bool
) -> None:
    ids = make_ids(2, 14)
    mask = torch.ones_like(ids)
    mask[0, : 3 * padded] = 0
    labels = ids.masked_fill(mask == 0, -100)
    plain = make_model(t1_layers=2).train()
    expected = loss_and_gradients(plain, plain(ids, attention_mask=mask, labels=labels).loss)
    model = make_model(t1_layers=2).train()
    model.gradient_checkpointing_enable()
    out = model(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(loss_and_gradients(model, out.loss), expected, **EXACT)
    model.zero_grad()
    with pytest.warns(UserWarning, match="use_cache=True does not go with gradient checkpointing"):
        out = model(ids, attention_mask=mask, labels=labels, use_cache=True)
    assert out.past_key_values is None
    torch.testing.assert_close(loss_and_gradients(model, out.loss), expected, **EXACT)
    with torch.no_grad():  # nothing is computed again
        assert model(ids, attention_mask=mask, use_cache=True).past_key_values is not None


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_gradient_checkpointing_carries_a_state_over_whole_chunks_only(
    make_model: Make, make_ids: Make
) -> None:
    ids, results = make_ids(2, 16), []
    for checkpointing in (False, True):
        model = make_model(t1_layers=2).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        cache = model.new_cache()
        losses = [model(x, labels=x, past_key_values=cache).loss for x in ids.split(8, dim=1)]
        results.append(loss_and_gradients(model, sum(losses)))
    torch.testing.assert_close(results[0], results[1], **EXACT)
    with pytest.raises(ScanLMError, match=r"0 tokens of a chunk and the input is 6 .* chunks of 4"):
        model(ids[:, :6], past_key_values=cache)
    assert cache.length == 16


def test_compiles_as_one_graph(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(2, 14)
    compiled = torch.compile(
        lambda ids: model(ids, labels=ids), fullgraph=True, backend="aot_eager"
    )
    actual, expected = compiled(ids), model(ids, labels=ids)
    torch.testing.assert_close(actual.logits, expected.logits, **EXACT)
    torch.testing.assert_close(
        loss_and_gradients(model, actual.loss), loss_and_gradients(model, expected.loss), **EXACT
    )


# Files


LOAD = """
import json, sys
import {first}
import {second}
import torch
from transformers import AutoConfig, AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
config = AutoConfig.from_pretrained(folder)
fresh = AutoModelForCausalLM.from_config(config)
ids = torch.arange(14)[None] % 29
print(json.dumps({{
    "classes": [type(config).__name__, type(model).__name__, type(fresh).__name__],
    "tied": model.lm_head.weight is model.wte.weight,
    "logits": model(ids).logits.double().tolist(),
}}))
"""


@pytest.mark.parametrize(
    ("first", "second", "tied"),
    [("scanlm", "transformers", True), ("transformers", "scanlm", False)],
)
def test_saved_models_load_by_auto_class_in_a_fresh_process(
    make_model: Make, tmp_path: Path, first: str, second: str, tied: bool
) -> None:
    model = make_model(dtype=torch.float32, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    script = LOAD.format(first=first, second=second)
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    loaded = json.loads(result.stdout.splitlines()[-1])
    assert loaded["classes"] == ["ScanLMConfig", "ScanLMForCausalLM", "ScanLMForCausalLM"]
    assert loaded["tied"] is tied
    expected = model(torch.arange(14)[None] % 29).logits.double()
    torch.testing.assert_close(
        torch.tensor(loaded["logits"], dtype=torch.float64), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_keep_every_weight(make_model: Make, tmp_path: Path, tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied, t1_layers=2, position_embedding="chunk")
    model.save_pretrained(tmp_path)
    again, info = ScanLMForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# Bad input


@pytest.mark.parametrize("token", [29, 1000, -1])
def test_a_token_outside_the_vocabulary_is_named(make_model: Make, token: int) -> None:
    ids = torch.tensor([[3, token, 4]])
    with pytest.raises(ScanLMError, match=rf"token id {token} is not in the vocabulary of 29"):
        make_model()(ids)


@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (5,)])
def test_empty_input_is_refused(make_model: Make, shape: tuple[int, ...]) -> None:
    with pytest.raises(ScanLMError, match="at least one token"):
        make_model()(torch.zeros(shape, dtype=torch.long))


def test_a_sequence_beyond_the_positions_is_refused(make_model: Make, make_ids: Make) -> None:
    model = make_model(n_positions=12)
    assert model(make_ids(1, 12)).logits.shape[1] == 12
    with pytest.raises(
        ScanLMError, match=r'13 tokens .* n_positions=12.*position_embedding="chunk"'
    ):
        model(make_ids(1, 13))
    cache = model(make_ids(1, 12), use_cache=True).past_key_values
    with pytest.raises(ScanLMError, match=r"13 tokens .* n_positions=12"):
        model(make_ids(1, 1), past_key_values=cache)
    assert make_model(n_positions=12, position_embedding="chunk")(make_ids(1, 13)) is not None


@pytest.mark.parametrize(
    "mask", [[[1, 0, 1]], [[0, 1, 0, 1]], [[1, 1, 1], [0, 1, 0]], [[1, 0, 0, 1], [0, 0, 1, 1]]]
)
def test_a_mask_with_holes_is_refused(
    make_model: Make, make_ids: Make, mask: list[list[int]]
) -> None:
    ids = make_ids(len(mask), len(mask[0]))
    with pytest.raises(ScanLMError, match="no holes"):
        make_model()(ids, attention_mask=torch.tensor(mask))


def test_a_state_is_not_continued_from_padding(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    message = "zeros at the left of a row: a recurrent state cannot skip tokens"
    for how in ({"use_cache": True}, {"past_key_values": model.new_cache()}):
        with pytest.raises(ScanLMError, match=message):
            model(ids, attention_mask=mask, **how)
    cache = model(ids, use_cache=True).past_key_values
    whole = torch.cat([torch.ones_like(ids), mask], dim=1)
    with pytest.raises(ScanLMError, match=message):
        model(ids, attention_mask=whole, past_key_values=cache)
    assert cache.length == 6
    model(ids, attention_mask=mask)  # no state, and no token sees the padding


@pytest.mark.parametrize(("values", "wrong"), [((0, 2), "2"), ((-1e9, 0.0), "-1000000000.0")])
def test_a_mask_of_other_values_than_0_and_1_is_refused(
    make_model: Make, make_ids: Make, values: tuple[float, float], wrong: str
) -> None:
    model, ids = make_model(), make_ids(2, 5)
    padding, token = values
    mask = torch.tensor([[padding] * 2 + [token] * 3, [token] * 5])
    with pytest.raises(ScanLMError, match=rf"attention_mask\[0, \d\] is {wrong}: expected 0 and 1"):
        model(ids, attention_mask=mask)
    kept = torch.tensor([[False] * 2 + [True] * 3, [True] * 5])
    logits = model(ids, attention_mask=kept).logits
    torch.testing.assert_close(logits, model(ids, attention_mask=kept.long()).logits)


def test_labels_that_do_not_fit_are_refused(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(2, 5)
    labels = ids.clone()
    labels[1, 2] = 29
    for name in ("labels", "shift_labels"):
        with pytest.raises(ScanLMError, match=rf"label 29 is not .* of 29 .*{name}\[1, 2\]"):
            model(ids, **{name: labels})
        with pytest.raises(ScanLMError, match=rf"{name} must be .*\(2, 5\) .*got \(2, 4\)"):
            model(ids, **{name: ids[:, :4]})


def test_a_negative_number_of_logits_is_refused(make_model: Make, make_ids: Make) -> None:
    with pytest.raises(ScanLMError, match=r"logits_to_keep=-2: expected how many of the last"):
        make_model()(make_ids(1, 5), logits_to_keep=-2)


@pytest.mark.parametrize("given", [{"position_ids": torch.arange(5)}, {"bogus": 1}], ids=str)
def test_unknown_inputs_are_refused(make_model: Make, make_ids: Make, given: Any) -> None:
    (name,) = given
    with pytest.raises(ScanLMError, match=f"does not know '{name}' .* Known: attention_mask, "):
        make_model()(make_ids(1, 5), **given)


def test_hidden_states_are_not_promised(make_model: Make, make_ids: Make) -> None:
    model, ids = make_model(), make_ids(1, 5)
    with pytest.raises(ScanLMError, match="does not know 'output_hidden_states'"):
        model(ids, output_hidden_states=True)
    # as wrappers pass all that they know
    asked = {"output_hidden_states": False, "output_attentions": None, "inputs_embeds": None}
    assert torch.equal(model(ids, **asked).logits, model(ids).logits)
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)


def test_padded_rows_do_not_fit_an_empty_cache_of_one_length(
    make_model: Make, make_ids: Make
) -> None:
    model, ids = make_model(), make_ids(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache = model.new_cache()
    for read in (model, model.stream):
        with pytest.raises(ScanLMError, match="leave past_key_values out"):
            read(ids, attention_mask=mask, past_key_values=cache)
    model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
    assert cache.get_seq_length() == 5


GPT2_SHAPE = {"vocab_size": 29, "n_positions": 32, "n_embd": 16, "n_head": 2, "n_layer": 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 40}, "vocab_size=40 .* vocab_size=29"),
        ({"n_embd": 32}, "n_embd=32 .* n_embd=16"),
        ({"hidden_size": 32}, "n_embd=32 .* n_embd=16"),
        ({"n_head": 4}, "n_head=4 .* n_head=2"),
        ({"n_inner": 8}, "n_inner=8 .* n_inner=64"),
        ({"t2_layers": 1}, "t2_layers=1 .* t2_layers=2"),
        ({"n_positions": 64}, "n_positions=64 .* 32"),
        ({"position_embedding": "chunk", "chunk_size": 33}, "chunk_size=33 .* 32"),
    ],
    ids=str,
)
def test_from_gpt2_refuses_sizes_that_the_gpt2_does_not_have(
    fields: dict[str, Any], message: str
) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE))
    with pytest.raises(ScanLMError, match=message):
        ScanLMForCausalLM.from_gpt2(gpt2, **{"chunk_size": 4, **fields})


def test_from_gpt2_takes_the_gpt2s_own_sizes_and_fewer_positions() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE))
    own = {"vocab_size": 29, "n_embd": 16, "n_inner": 64, "t2_layers": 2}
    model = ScanLMForCausalLM.from_gpt2(gpt2, chunk_size=4, n_positions=20, **own)
    assert torch.equal(model.wpe.weight, gpt2.transformer.wpe.weight[:20])


def test_from_gpt2_refuses_fields_that_are_none() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=29, n_embd=16, n_head=2, n_layer=1))
    with pytest.raises(ScanLMError, match=r"unknown field 't1_layer' .*'t1_layers'"):
        ScanLMForCausalLM.from_gpt2(gpt2, t1_layer=2)


@pytest.mark.parametrize("mask", [[[0, 0, 0]], [[1, 1, 1], [0, 0, 0]]])
def test_a_fully_masked_row_is_refused(
    make_model: Make, make_ids: Make, mask: list[list[int]]
) -> None:
    ids = make_ids(len(mask), 3)
    with pytest.raises(ScanLMError, match="hides a whole row"):
        make_model()(ids, attention_mask=torch.tensor(mask))


def test_a_mask_of_another_shape_is_refused(make_model: Make, make_ids: Make) -> None:
    with pytest.raises(ScanLMError, match=r"attention_mask must be \(batch, tokens\)"):
        make_model()(make_ids(2, 5), attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("asked", "total", "causal"), [(1, 2, False), (2, 2, True), (2, 4, True)])
def test_attention_in_tiny_windows_is_attention(
    asked: int, total: int, causal: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    query = torch.randn(5, 3, asked, 8, dtype=dtype)
    key, value = torch.randn(2, 5, 3, total, 8, dtype=dtype).unbind()
    mask = torch.ones(asked, total, dtype=torch.bool).tril(total - asked) if causal else None
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), mask)
    actual = tiny_attention(query, key, value, mask, 0.0)
    assert actual.dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=rounding)
    dropped = tiny_attention(query, key, torch.ones_like(value), mask, 0.5)
    assert dropped.unique().numel() > 1  # weights no longer add up to one


def test_growing_windows_never_go_to_cudnn(
    make_model: Make, make_ids: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[bool] = []
    real = F.scaled_dot_product_attention

    def attention(*args: Any, **options: Any) -> Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    model, ids = make_model(chunk_size=8), make_ids(1, 20)
    cache = model(ids[:, :18], use_cache=True).past_key_values
    first, allowed[:] = list(allowed), []
    model(ids[:, 18:19], past_key_values=cache)
    assert first
    assert first[0]  # T1 in the tree: equal shapes, any kernel
    assert allowed
    assert not any(allowed)
