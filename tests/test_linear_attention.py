"""GLA and Gated DeltaNet in plain torch: the recurrences, the models, their caches and weights; and
Mamba-2's recurrence."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from scanlm.checkpoints import load_checkpoint
from scanlm.errors import ScanLMError
from scanlm.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from scanlm.gla import GLAConfig, GLAForCausalLM
from scanlm.recurrence import gated_delta_rule, gated_linear_attention, state_space_dual


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


def naive_state_space(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple:
    """The definition, token by token; the heads share queries and keys."""
    outputs = []
    for i in range(q.shape[1]):
        state = state * g[:, i].exp()[..., None, None]
        state = state + torch.einsum("bmk,bhv->bhkv", k[:, i], v[:, i])
        outputs.append(torch.einsum("bmk,bhkv->bhv", q[:, i], state))
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
    if name == "mamba2":
        return (
            state_space_dual,
            naive_state_space,
            [query[:, :, :1], key[:, :, :1], value, g, state],
        )
    beta = 2 * torch.rand(b, t, h, dtype=dtype)  # up to 2: negative eigenvalues
    key = F.normalize(key, dim=-1)
    return gated_delta_rule, naive_delta, [query, key, value, g, beta, state]


RECURRENCES = ["gla", "delta", "mamba2"]


# less than a chunk, exactly one, several, with a rest; decays from none to the strongest
@pytest.mark.parametrize("name", RECURRENCES)
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


@pytest.mark.parametrize("name", RECURRENCES)
def test_the_chunked_form_in_float32(name: str) -> None:
    chunked, naive, inputs = recurrence(name, 150, 0.5, torch.float32)
    torch.testing.assert_close(chunked(*inputs), naive(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RECURRENCES)
@pytest.mark.parametrize("t", [1, 20, 64, 150])
def test_no_state_is_a_state_of_zeros(name: str, t: int) -> None:
    chunked, _, (*streams, state) = recurrence(name, t, 0.5, torch.float64)
    results = [chunked(*streams), chunked(*streams, torch.zeros_like(state))]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RECURRENCES)
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


@pytest.mark.parametrize("name", RECURRENCES)
def test_bfloat16_inputs_are_computed_in_float32(name: str) -> None:
    chunked, naive, inputs = recurrence(name, 100, 0.1, torch.bfloat16)
    exact, _ = naive(*(x.float() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = chunked(*inputs)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(o, exact.bfloat16())


# The models

CLASSES = {
    "gla": (GLAConfig, GLAForCausalLM),
    "gdn": (GatedDeltaNetConfig, GatedDeltaNetForCausalLM),
}
SHAPE = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SHAPE |= {"num_heads": 2, "bos_token_id": None, "eos_token_id": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "gla": {},
    "gla-wide": {"expand_k": 1.0, "use_short_conv": True, "clamp_min": -0.05},
    "gla-bare": {"use_output_gate": False, "elementwise_affine": False, "fuse_norm": False},
    "gdn": {"head_dim": 6},
    "gdn-matched": {"head_dim": 8, "expand_v": 1.0, "use_short_conv": False},
    "gdn-signed": {"head_dim": 6, "allow_neg_eigval": True, "output_gate_activation": "sigmoid"},
    "gdn-bare": {"head_dim": 4, "use_gate": False, "num_v_heads": 4, "tie_word_embeddings": True},
}


def build(variant: str, **overrides: Any) -> Any:
    """A small model in float64 whose every parameter matters."""
    config, model_class = CLASSES[variant[:3]]
    torch.manual_seed(0)
    model = model_class(config(**{**SHAPE, **VARIANTS[variant], **overrides})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 31, (2, 75), generator=torch.Generator().manual_seed(1))


def reference(model: Any, ids: Tensor) -> Tensor:
    """Logits from the weights by flash-linear-attention's names, token by token."""
    c, w = model.config, model.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        scale = w.get(f"{name}.weight", torch.ones(x.shape[-1], dtype=x.dtype))
        return x * (x.square().mean(-1, keepdim=True) + c.norm_eps).rsqrt() * scale

    def stream(x: Tensor, name: str, heads: int) -> Tensor:
        x = x @ w[f"{name}_proj.weight"].T
        if c.use_short_conv:
            kernel = w[f"{name}_conv1d.weight"][:, 0]  # its last entry is the present's
            shifted = [F.pad(x, (0, 0, i, 0))[:, : x.shape[1]] for i in range(kernel.shape[1])]
            x = F.silu(sum(s * kernel[:, -1 - i] for i, s in enumerate(shifted)))
        return x.unflatten(-1, (heads, -1))

    def gla(x: Tensor, name: str) -> Tensor:
        q, k, v = (stream(x, f"{name}.{n}", c.num_heads) for n in "qkv")
        low = x @ w[f"{name}.gk_proj.0.weight"].T
        g = low @ w[f"{name}.gk_proj.1.weight"].T + w[f"{name}.gk_proj.1.bias"]
        g = (F.logsigmoid(g) / 16).clamp_min(c.clamp_min or -1e9).unflatten(-1, (c.num_heads, -1))
        o, _ = naive_gla(q, k, v, g, x.new_zeros(2, c.num_heads, q.shape[-1], v.shape[-1]))
        if not c.use_output_gate:
            return norm(o, f"{name}.g_norm").flatten(2)
        gate = x @ w[f"{name}.g_proj.weight"].T
        return norm(o, f"{name}.g_norm_swish_gate").flatten(2) * F.silu(gate)

    def gdn(x: Tensor, name: str) -> Tensor:
        heads = c.num_v_heads or c.num_heads
        q, k = (stream(x, f"{name}.{n}", c.num_heads) for n in "qk")
        v = stream(x, f"{name}.v", heads)
        if not c.use_short_conv:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k = (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
        q, k = (y.repeat_interleave(heads // c.num_heads, 2) for y in (q, k))
        step = F.softplus(x @ w[f"{name}.a_proj.weight"].T + w[f"{name}.dt_bias"])
        g = -w[f"{name}.A_log"].exp() * step
        beta = (x @ w[f"{name}.b_proj.weight"].T).sigmoid() * (2 if c.allow_neg_eigval else 1)
        o, _ = naive_delta(q, k, v, g, beta, x.new_zeros(2, heads, q.shape[-1], v.shape[-1]))
        o = norm(o, f"{name}.o_norm").flatten(2)
        if not c.use_gate:
            return o
        gate = x @ w[f"{name}.g_proj.weight"].T
        return o * (gate.sigmoid() if c.output_gate_activation == "sigmoid" else F.silu(gate))

    x = w["model.embeddings.weight"][ids]
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}"
        mixer = gla if c.model_type == "gla" else gdn
        y = mixer(norm(x, f"{layer}.attn_norm"), f"{layer}.attn")
        x = x + y @ w[f"{layer}.attn.o_proj.weight"].T
        y = norm(x, f"{layer}.mlp_norm")
        gate = F.silu(y @ w[f"{layer}.mlp.gate_proj.weight"].T)
        y = gate * (y @ w[f"{layer}.mlp.up_proj.weight"].T)
        x = x + y @ w[f"{layer}.mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ w["lm_head.weight"].T


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_is_what_its_weights_say(variant: str, ids: Tensor) -> None:
    model = build(variant)
    torch.testing.assert_close(model(ids).logits, reference(model, ids), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pieces", [[1] * 75, [2, 1, 70, 2]])
def test_cached_is_uncached(variant: str, pieces: list[int], ids: Tensor) -> None:
    model = build(variant)
    cache, logits, sizes = None, [], []
    with torch.no_grad():
        for piece in ids.split(pieces, dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
            sizes.append(cache.num_bytes)
        whole = model(ids).logits
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-10, atol=1e-10)
    assert len(set(sizes)) == 1  # the state does not grow
    assert cache.get_seq_length() == 75


@pytest.mark.parametrize("variant", ["gla-wide", "gdn"])
def test_padding_changes_nothing(variant: str, ids: Tensor) -> None:
    model = build(variant)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[1, :9] = 0
    right[1, 60:] = 0
    for use_cache in (False, True):
        padded = model(ids, attention_mask=left, use_cache=use_cache).logits[1, 9:]
        torch.testing.assert_close(padded, model(ids[1:, 9:]).logits[0])
    padded = model(ids, attention_mask=right).logits[1, :60]
    torch.testing.assert_close(padded, model(ids[1:, :60]).logits[0])


@pytest.mark.parametrize("variant", ["gla", "gdn"])
@pytest.mark.parametrize("how", [{"num_beams": 3}, {}], ids=["beams", "greedy"])
def test_generation(variant: str, how: dict[str, int], ids: Tensor) -> None:
    model = build(variant)
    how = {**how, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt, mask = ids[:, :12], torch.ones_like(ids[:, :12])
    mask[1, :5] = 0
    padded = model.generate(prompt, attention_mask=mask, **how)
    for row, start in ((0, 0), (1, 5)):
        alone = model.generate(prompt[row : row + 1, start:], use_cache=False, **how)
        assert padded[row, start:].tolist() == alone[0].tolist()


def test_sampling_uses_the_state(ids: Tensor) -> None:
    model = build("gdn")
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        samples.append(
            model.generate(
                ids[:, :5], do_sample=True, max_new_tokens=8, use_cache=use_cache, pad_token_id=0
            ).tolist()
        )
    assert samples[0] == samples[1]


@pytest.mark.parametrize("variant", ["gla-bare", "gdn-bare"])
def test_saved_and_loaded(variant: str, ids: Tensor, tmp_path: Path) -> None:
    model = build(variant).float()
    model.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path).model
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    tied = again.lm_head.weight is again.model.embeddings.weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("variant", ["gla", "gdn"])
def test_loss(variant: str, ids: Tensor) -> None:
    model = build(variant)
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)
    # what the trainer gives: labels that are shifted already, under both names
    shifted = model(ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:], return_logits=False)
    torch.testing.assert_close(shifted.loss, expected)
    assert shifted.logits is None
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("variant", ["gla", "gdn"])
def test_gradient_checkpointing_changes_nothing(variant: str, ids: Tensor) -> None:
    model = build(variant).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()  # the name in all versions
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("variant", ["gla", "gdn"])
def test_gradient_checkpointing_keeps_no_state(variant: str, ids: Tensor) -> None:
    model = build(variant)
    cache = model(ids, use_cache=True).past_key_values
    model.train().gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with pytest.warns(UserWarning, match="use_cache=True does not go with gradient checkpointing"):
        out = model(ids, labels=ids, use_cache=True)
    assert out.past_key_values is None
    out.loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
    with pytest.raises(ScanLMError, match="turn one of them off"):
        model(ids, past_key_values=cache)
    with torch.no_grad():  # nothing is computed again
        assert model(ids, past_key_values=cache).past_key_values is cache


def test_shared_heads_are_repeated_heads(ids: Tensor) -> None:
    shared = build("gla", num_heads=4, num_kv_heads=2)
    full = build("gla", num_heads=4)
    weights = shared.state_dict()
    for name, weight in weights.items():
        if name.split(".")[-2] in ("k_proj", "v_proj") or "gk_proj.1" in name:
            heads = weight.unflatten(0, (2, -1)).repeat_interleave(2, 0)
            weights[name] = heads.flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(shared(ids).logits, full(ids).logits)


def test_initial_weights() -> None:
    """flash-linear-attention's: normal matrices, decays as in Mamba-2, norms of one."""
    torch.manual_seed(0)
    config = GatedDeltaNetConfig(**{**SHAPE, "hidden_size": 64, "num_heads": 32, "head_dim": 8})
    weights = GatedDeltaNetForCausalLM(config).state_dict()
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        if name.endswith("A_log"):
            assert 1 < weight.exp().std() < 8
            assert 8 < weight.exp().max() <= 16
        elif name.endswith("dt_bias"):
            assert 0.00099 < F.softplus(weight).min() < 0.01 < F.softplus(weight).max() < 0.101
        elif "norm" in kind:
            assert (weight == 1).all()
        else:
            assert 0.018 < weight.std() < 0.022, name


@pytest.mark.parametrize("variant", ["gla", "gdn"])
def test_dropout(variant: str, ids: Tensor) -> None:
    model = build(variant, embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2)
    torch.testing.assert_close(model(ids).logits, build(variant)(ids).logits)  # not in evaluation
    model.train()
    torch.manual_seed(0)
    first = model(ids).logits
    assert not torch.allclose(first, model(ids).logits)
    torch.manual_seed(0)
    torch.testing.assert_close(model(ids).logits, first)
    assert sum(isinstance(m, torch.nn.Dropout) for m in model.modules()) == 1 + 2 * 5
    assert build(variant).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("variant", ["gla", "gdn"])
def test_training_in_bfloat16(variant: str, ids: Tensor) -> None:
    model = build(variant).float().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    exact = model.double()(ids, labels=ids).loss
    assert abs(loss.item() - exact.item()) < 0.05 * exact.item()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gla", {"feature_map": "relu"}, r"feature_map='relu'.*pip install 'scanlm\[gpu\]'"),
        ("gla", {"attn": {"layers": [0], "num_heads": 2}}, r"attn=.*needs fused kernels"),
        ("gla", {"num_heads": 3}, r"num_heads=3 .* does not divide"),
        ("gla", {"num_heads": 4, "num_kv_heads": 3}, r"num_kv_heads=3"),
        ("gdn", {"hidden_act": "powlu"}, r"hidden_act='powlu'.*needs fused kernels"),
        ("gdn", {"head_dim": 5, "expand_v": 1.5}, r"head_dim=5 times expand_v=1.5"),
        ("gdn", {"num_v_heads": 3}, r"num_v_heads=3 a multiple of num_heads=2"),
        ("gdn", {"output_gate_activation": "sigmoit"}, r"'sigmoit'. Did you mean 'sigmoid'"),
    ],
)
def test_what_plain_torch_refuses(family: str, fields: dict[str, Any], message: str) -> None:
    config, model_class = CLASSES[family]
    with pytest.raises(ScanLMError, match=message):
        model_class(config(**{**SHAPE, **fields}))


def test_masks_that_hide_tokens_between_others(ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, 5] = 0
    with pytest.raises(ScanLMError, match="zeros at the left"):
        build("gla")(ids, attention_mask=mask)
    with pytest.raises(ScanLMError, match=r"must be \(batch, tokens\)"):
        build("gla")(ids, attention_mask=mask[:, :9])


@pytest.mark.parametrize("variant", ["gla", "gdn"])
def test_a_copied_state_goes_on_by_itself(variant: str, ids: Tensor) -> None:
    model = build(variant)
    cache = model(ids[:, :40], use_cache=True).past_key_values
    with torch.no_grad():
        for state in (copy.deepcopy(cache), cache):
            logits = model(ids[:, 40:], past_key_values=state).logits
            torch.testing.assert_close(logits, model(ids).logits[:, 40:])
            assert state.get_seq_length() == 75


@pytest.mark.parametrize("variant", ["gla", "gdn"])
def test_a_cache_that_does_not_fit_is_refused(variant: str, ids: Tensor) -> None:
    model = build(variant)
    cache = model(ids[:1], use_cache=True).past_key_values
    before, state = cache.length, cache.layers[0].recurrent
    for rows in (2, 3):
        with pytest.raises(ScanLMError, match=f"holds 1 sequences, the input has {rows}"):
            model(ids[:1].expand(rows, -1), past_key_values=cache)
    with pytest.raises(ScanLMError, match="cache of another model"):
        build(variant)(ids[:1], past_key_values=cache)
    with pytest.raises(ScanLMError, match="must be a RecurrentCache of this model, got list"):
        model(ids[:1], past_key_values=[])
    assert cache.length == before
    assert cache.layers[0].recurrent is state
    cache.map(lambda x: x.to("meta"))
    with pytest.raises(ScanLMError, match=r"on meta, the model on cpu: .* cache\.map"):
        model(ids[:1], past_key_values=cache)


@pytest.mark.parametrize("variant", ["gla", "gdn"])
def test_tokens_that_are_none_are_refused(variant: str, ids: Tensor) -> None:
    model = build(variant)
    for empty in (ids[:, :0], ids[:0], ids[0]):
        with pytest.raises(ScanLMError, match="at least one token, got shape"):
            model(empty)
    vocab = model.config.vocab_size
    for token in (-1, vocab):
        wrong = ids.clone()
        wrong[1, 3] = token
        with pytest.raises(ScanLMError, match=rf"token id {token} .* of {vocab} .*\[1, 3\]"):
            model(wrong)


def test_what_forward_refuses(ids: Tensor) -> None:
    model, mask = build("gla"), torch.ones_like(ids)
    vocab = model.config.vocab_size
    with pytest.raises(ScanLMError, match=r"attention_mask\[0, 0\] is 2: expected 0 and 1"):
        model(ids, attention_mask=2 * mask)
    with pytest.raises(ScanLMError, match=rf"label {vocab} is not in the vocabulary of {vocab}"):
        model(ids, labels=torch.full_like(ids, vocab))
    with pytest.raises(ScanLMError, match=r"labels must be \(batch, tokens\)"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ScanLMError, match="logits_to_keep=-1"):
        model(ids, logits_to_keep=-1)
    cache = model(ids, use_cache=True).past_key_values
    length, mask = cache.length, torch.cat([mask, mask], dim=1)
    mask[0, -1] = 0
    with pytest.raises(ScanLMError, match="zeros at the left"):
        model(ids, attention_mask=mask, past_key_values=cache)
    assert cache.length == length
