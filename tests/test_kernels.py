"""The Triton kernels against plain torch: on a GPU, or on a CPU in Triton's interpreter."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scanlm import ScanLMConfig, ScanLMForCausalLM, gpt2, kernels, loss
from scanlm.decoder import Decoder
from scanlm.kernels import cross_entropy, decode, gelu, tiny_windows, trial, windows
from scanlm.loss import IGNORE, rows_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Groups = list[tuple[int, int, int]]


@pytest.fixture
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels whatever the device and the precision."""
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    monkeypatch.setattr(gpt2, "windows", windows, raising=False)
    monkeypatch.setattr(gpt2, "tiny_windows", tiny_windows, raising=False)
    monkeypatch.setattr(gpt2, "gelu", gelu, raising=False)
    monkeypatch.setattr(loss, "cross_entropy", cross_entropy, raising=False)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def plain_attention(
    packed: Tensor,
    q: Tensor | None,
    bias: Tensor,
    groups: Groups,
    heads: int,
    causal: bool,
    drop: Tensor | None = None,
) -> Tensor:
    """The definition, window by window."""
    d = len(bias) // 3
    if q is None:
        q_all, k_all, v_all = (packed + bias).split(d, dim=1)
    else:
        q_all = q + bias[:d]
        k_all, v_all = (packed + bias[d:]).split(d, dim=1)
    outputs, at_q, at, at_drop = [], 0, 0, 0
    for n, s, a in groups:
        asking = s if q is None else a
        for _ in range(n):
            qs, ks, vs = q_all[at_q : at_q + asking], k_all[at : at + s], v_all[at : at + s]
            at_q, at = at_q + asking, at + s
            for head in range(heads):
                part = slice(head * d // heads, (head + 1) * d // heads)
                score = qs[:, part] @ ks[:, part].T / math.sqrt(d // heads)
                if causal:
                    seen = torch.ones(asking, s, dtype=torch.bool, device=DEVICE).tril(s - asking)
                    score = score.masked_fill(~seen, -math.inf)
                weights = score.softmax(1)
                if drop is not None:
                    factors = drop[at_drop : at_drop + asking * heads * s].view(asking, heads, s)
                    weights = weights * factors[:, head]
                outputs.append(weights @ vs[:, part])
            at_drop += asking * heads * s
    rows = [torch.cat(outputs[i : i + heads], 1) for i in range(0, len(outputs), heads)]
    return torch.cat(rows)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    difference = (actual.double() - expected.double()).norm()
    assert difference <= tolerance * expected.double().norm()


def same(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Values, and gradients of all inputs."""
    grad = torch.randn_like(actual)
    close(actual, expected)
    for mine, theirs in zip(
        torch.autograd.grad(actual, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        close(mine, theirs)


SHAPES: list[tuple[Groups, int, int]] = [
    ([(2, 8, 8), (3, 16, 8)], 2, 16),  # (windows, tokens, asking), heads, features of a head
    ([(1, 12, 12), (2, 24, 12), (1, 20, 8)], 3, 24),
    ([(1, 128, 64)], 1, 64),
    ([(2, 6, 6)], 1, 8),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_in_windows(shape: tuple[Groups, int, int], apart: bool, causal: bool) -> None:
    groups, heads, features = shape
    d = heads * features
    torch.manual_seed(0)
    packed = randn(sum(n * s for n, s, _ in groups), (2 if apart else 3) * d).requires_grad_()
    q = randn(sum(n * a for n, _, a in groups), d).requires_grad_() if apart else None
    bias = randn(3 * d).requires_grad_()
    counts, lengths, keeps = (list(column) for column in zip(*groups, strict=True))
    out, _ = windows.window_attention(packed, q, bias, counts, lengths, keeps, heads, causal)
    inputs = [x for x in (packed, q, bias) if x is not None]
    same(out, plain_attention(packed, q, bias, groups, heads, causal), inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    ("groups", "heads", "features"),
    [([(3, 1, 1), (35, 2, 1)], 2, 16), ([(17, 4, 2), (2, 3, 3)], 3, 24), ([(1, 4, 4)], 1, 64)],
)
def test_attention_in_tiny_windows(
    groups: Groups, heads: int, features: int, dropout: float, causal: bool
) -> None:
    d = heads * features
    torch.manual_seed(0)
    packed = randn(sum(n * s for n, s, _ in groups), 3 * d).requires_grad_()
    bias = randn(3 * d).requires_grad_()
    counts, lengths, keeps = (list(column) for column in zip(*groups, strict=True))
    weights = tiny_windows.num_weights(counts, lengths, keeps, heads)
    drop = F.dropout(torch.ones(weights, device=DEVICE), dropout) if dropout else None
    out, _ = tiny_windows.tiny_window_attention(
        packed, drop, bias, counts, lengths, keeps, heads, causal
    )
    asked = gpt2.take_kept(packed[:, :d], [gpt2.Windows(*group) for group in groups])
    expected = plain_attention(packed[:, d:], asked, bias, groups, heads, causal, drop)
    same(out, expected, [packed, bias])


@pytest.mark.parametrize(("rows", "n"), [(1, 8), (37, 300), (130, 512)])
def test_bias_and_gelu(rows: int, n: int) -> None:
    torch.manual_seed(0)
    x, bias = (3 * randn(rows, n)).requires_grad_(), randn(n).requires_grad_()
    out = gelu.bias_gelu(x, bias)
    same(out, F.gelu(x + bias, approximate="tanh"), [x, bias])


@pytest.mark.parametrize("vocab_size", [5, 300, 5000])
def test_loss_of_rows(vocab_size: int, kernels_everywhere: None) -> None:
    torch.manual_seed(0)
    columns = -(-vocab_size // 64) * 64
    logits = 5 * randn(6, columns)
    logits[:, vocab_size:] = 50.0  # what is beyond the vocabulary must not matter
    targets = torch.randint(vocab_size, (6,), device=DEVICE)
    targets[2] = IGNORE
    exact = logits[:, :vocab_size].double().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=IGNORE, reduction="none")
    (expected_grad,) = torch.autograd.grad(expected.sum(), exact)
    losses, grad = rows_loss(logits, targets, vocab_size, True)
    close(losses, expected)
    close(grad[:, :vocab_size], expected_grad)
    assert not grad[:, vocab_size:].any()
    assert not grad[2].any()
    alone, nothing = rows_loss(logits, targets, vocab_size, False)
    assert torch.equal(alone, losses)
    assert nothing.numel() == 0


def build(**overrides: Any) -> ScanLMForCausalLM:
    fields: dict[str, Any] = {
        "vocab_size": 101,
        "n_embd": 32,
        "n_head": 2,
        "chunk_size": 8,
        "t2_layers": 2,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    torch.manual_seed(0)
    model = ScanLMForCausalLM(ScanLMConfig(**{**fields, **overrides}))
    with torch.no_grad():  # biases are zero at first, and would hide a mistake
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(DEVICE)


def loss_and_gradients(model: ScanLMForCausalLM, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    value = model(ids, labels=ids, return_logits=False).loss
    return value, list(torch.autograd.grad(value, list(model.parameters())))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"t1_layers": 2, "t1_causal": True, "leaf_norm": False},
        {"chunk_size": 1},
        {"chunk_size": 2, "t1_layers": 2},
    ],
)
@pytest.mark.parametrize("tokens", [30, 40])
def test_a_model_with_kernels_is_the_plain_model(
    tokens: int, overrides: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    model = build(**overrides).train()
    ids = torch.randint(101, (2, tokens), device=DEVICE)
    expected, expected_grads = loss_and_gradients(model, ids)
    request.getfixturevalue("kernels_everywhere")
    actual, grads = loss_and_gradients(model, ids)
    close(actual, expected)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        close(mine, theirs, 2e-5)


def test_dropout_of_attention_weights_is_not_skipped(
    kernels_everywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Tensor:
        raise AssertionError("the kernel has no dropout")

    monkeypatch.setattr(windows, "window_attention", refuse)
    model = build(attn_pdrop=0.5).train()
    ids = torch.randint(101, (1, 20), device=DEVICE)
    assert torch.isfinite(model(ids, labels=ids).loss)
    with pytest.raises(AssertionError, match="no dropout"):
        model.eval()(ids)


def test_dropout_of_the_weights_of_tiny_windows_is_the_kernels_own(
    kernels_everywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor | None] = []
    right = tiny_windows.tiny_window_attention

    def seen(packed: Tensor, drop: Tensor | None, *rest: Any) -> Any:
        given.append(drop)
        return right(packed, drop, *rest)

    monkeypatch.setattr(tiny_windows, "tiny_window_attention", seen)
    model = build(chunk_size=1, attn_pdrop=0.5).train()
    ids = torch.randint(101, (4, 20), device=DEVICE)
    model(ids)
    assert all(drop is not None for drop in given)
    values = torch.cat([drop for drop in given if drop is not None])
    assert values.unique().tolist() == [0, 2]
    assert values.mean().item() == pytest.approx(1, abs=0.1)
    given.clear()
    model.eval()(ids)
    assert given
    assert all(drop is None for drop in given)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from scanlm.kernels import tiny_windows

constants = {"S": 3, "A": 2, "H": 12, "D": 64, "A_TILE": 2, "D_TILE": 64, "BLOCK": 32}
constants |= {"SCALE": 0.125, "CAUSAL": True, "DROP": True}
for kernel in (tiny_windows.tiny_forward_kernel, tiny_windows.tiny_backward_kernel):
    types = {name: "*bf16" for name in ("packed_ptr", "out_ptr", "grad_ptr", "d_packed_ptr")}
    types |= {"N": "i32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
"""


def test_kernels_of_tiny_windows_compile_for_a_gpu() -> None:
    """Triton's interpreter runs what its compiler refuses."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)


def test_the_kernels_pass_their_trial(recwarn: pytest.WarningsRecorder) -> None:
    assert trial.passes(torch.device(DEVICE))
    assert not [w for w in recwarn if "Triton kernel" in str(w.message)]


@pytest.mark.parametrize(
    ("module", "name", "what"),
    [
        (windows, "window_attention_backward", "attention within windows .*gradients are off by"),
        (
            tiny_windows,
            "tiny_window_attention_backward",
            "attention within tiny windows .*gradients are off by",
        ),
        (gelu, "bias_gelu_backward", "bias and GELU .*gradients are off by"),
        (cross_entropy, "cross_entropy_rows", "the loss .*values are off by"),
    ],
)
def test_a_wrong_kernel_does_not(
    module: Any, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(module, name)

    def wrong(*args: Any) -> Any:
        return type(made := right(*args))(2 * x for x in made)

    monkeypatch.setattr(module, name, wrong)
    with pytest.warns(UserWarning, match=f"the Triton kernel for {what}"):
        assert not trial.passes(torch.device(DEVICE))


def test_a_kernel_that_cannot_be_compiled_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(gelu, "bias_gelu", refuse)
    with pytest.warns(UserWarning, match=r"\(RuntimeError: out of resource: shared memory\)"):
        assert not trial.passes(torch.device(DEVICE))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "overrides",
    [
        {"prefix_embedding": True},
        {"position_embedding": "chunk", "n_embd": 48, "n_head": 3, "chunk_size": 6},
    ],
)
def test_decoding_kernels_give_the_logits_of_the_model(
    batch: int, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PROGRAMS", 4)  # the interpreter runs them one by one
    model = build(**overrides).eval()
    ids = torch.randint(101, (batch, 22), device=DEVICE)
    decoder = Decoder(model, batch, graphs=False, fused=True)
    assert isinstance(decoder.step_module, decode.FusedStep)
    with torch.no_grad():
        expected = model(ids).logits
        decoder.load(model(ids[:, :9], use_cache=True).past_key_values)
    for i in range(9, 22):
        close(decoder.feed(ids[:, i]), expected[:, i])
    decoder.buffers.token.copy_(ids[:, -1])
    decoder.step()
    assert torch.equal(decoder.buffers.token, decoder.buffers.logits.argmax(-1))
