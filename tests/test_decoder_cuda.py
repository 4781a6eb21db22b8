"""The captured step and its Triton kernels on a GPU; machines without one collect nothing here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from scanlm import ScanLMConfig, ScanLMForCausalLM
from scanlm.decoder import Decoder
from scanlm.sampling import Sampling

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

# a decoder that goes on without its kernels is no success here
pytestmark = pytest.mark.filterwarnings("error:the Triton kernels")
VOCAB = 1000
SHAPES: list[dict[str, Any]] = [
    {},
    {"position_embedding": "absolute", "n_positions": 512, "leaf_norm": False},
    {"n_embd": 96, "n_head": 4, "n_inner": 200, "chunk_size": 12, "t1_layers": 2},
    {"chunk_size": 96},
    {"chunk_size": 1, "prefix_embedding": True},
    {"activation_function": "relu"},  # not in the kernels: torch operations in a graph
]


def build(dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    fields = {
        "vocab_size": VOCAB,
        "n_embd": 128,
        "n_head": 2,
        "chunk_size": 16,
        "t1_layers": 1,
        "t2_layers": 3,
        "position_embedding": "chunk",
    }
    torch.manual_seed(0)
    model = ScanLMForCausalLM(ScanLMConfig(**{**fields, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.cuda().to(dtype).eval().requires_grad_(False)


def random_ids(batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (batch, tokens), generator=generator).cuda()


def decode(model: Any, ids: Tensor, prompt: int, **options: Any) -> Tensor:
    """Logits of the tokens after the prompt, fed one by one."""
    decoder = Decoder(model, ids.shape[0], **options)
    decoder.load(model(ids[:, :prompt], use_cache=True).past_key_values)
    return torch.stack([decoder.feed(t) for t in ids[:, prompt:].unbind(1)], dim=1)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@contextmanager
def full_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("batch", [1, 2, 17, 70])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_captured_steps_give_the_logits_of_forward(shape: dict[str, Any], batch: int) -> None:
    model = build(**shape)
    c = model.config.chunk_size
    ids = random_ids(batch, 4 * c + 5)
    with full_precision():
        for prompt in (max(c // 2, 1), 2 * c):
            logits = decode(model, ids, prompt)
            expected = model.double()(ids).logits[:, prompt:]
            model.float()
            assert relative(logits, expected) < 1e-5, prompt


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 9])
def test_half_precision_is_as_near_as_the_plain_path(dtype: torch.dtype, batch: int) -> None:
    model, ids = build(dtype), random_ids(batch, 70)
    expected = build(dtype).double()(ids).logits[:, 20:]
    plain = relative(model(ids).logits[:, 20:], expected)
    assert relative(decode(model, ids, 20), expected) < 1.2 * plain + 1e-4


def test_without_kernels_or_graphs_it_is_the_same_function() -> None:
    model, ids = build(), random_ids(3, 60)
    with full_precision():
        expected = model(ids).logits[:, 10:]
        for graphs in (True, False):
            for fused in (True, False):
                logits = decode(model, ids, 10, graphs=graphs, fused=fused)
                assert relative(logits, expected) < 1e-5, (graphs, fused)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.9), Sampling(0.9, 50), Sampling(0.9, 50, 0.9)], ids=str
)
@pytest.mark.parametrize("batch", [1, 4])
def test_no_step_waits_for_the_device(sampling: Sampling, batch: int) -> None:
    model = build()
    decoder = Decoder(model, batch, sampling)
    decoder.load(model(random_ids(batch, 20), use_cache=True).past_key_values)
    decoder.sample()
    for _ in range(40):  # the counter's copies fill the allocator's cache
        decoder.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            decoder.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool((decoder.buffers.token < VOCAB).all())


def test_memory_does_not_grow_with_the_position() -> None:
    model = build()
    decoder = Decoder(model, 1)
    c = model.config.chunk_size
    used = []
    for chunks in (64, 64):  # at 64 and at 128 chunks the counter holds one state
        for _ in range(chunks * c):
            decoder.step()
        used.append(torch.cuda.memory_allocated())
    assert used[0] == used[1]


def test_stream_gives_the_tokens_of_generate() -> None:
    model, ids = build(), random_ids(3, 30)
    expected = model.generate(ids, max_new_tokens=50, do_sample=False)[:, 30:]
    for _ in range(2):  # the second time with the decoder of the first
        tokens = torch.stack(list(model.stream(ids, max_new_tokens=50)), dim=1)
        assert torch.equal(tokens, expected)


def test_rows_of_different_lengths() -> None:
    model, ids = build(), random_ids(3, 40)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    mask[2, :29] = 0
    tokens = torch.stack(list(model.stream(ids, attention_mask=mask, max_new_tokens=40)), dim=1)
    for row, start in enumerate((13, 0, 29)):
        alone = torch.cat(list(model.stream(ids[row : row + 1, start:], max_new_tokens=40)))
        assert torch.equal(tokens[row], alone)


def test_new_weights_are_used_by_the_captured_step() -> None:
    model, ids = build(), random_ids(1, 30)
    list(model.stream(ids, max_new_tokens=3))
    with torch.no_grad():
        model.t2.h[0].mlp.c_fc.weight.mul_(-1)
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)[0, 30:]
    assert torch.equal(torch.cat(list(model.stream(ids, max_new_tokens=30))), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kernels", [True, False])
def test_graphs_are_of_the_models_device(kernels: bool) -> None:
    model, ids = build(), random_ids(2, 40)
    expected = decode(model, ids, prompt=20, fused=kernels)
    assert torch.cuda.current_device() == 0
    actual = decode(model.to("cuda:1"), ids.to("cuda:1"), prompt=20, fused=kernels)
    torch.testing.assert_close(actual.to("cuda:0"), expected)
    assert torch.cuda.current_device() == 0


def test_draws_differ_from_step_to_step_and_repeat_with_the_seed() -> None:
    model, ids = build(), random_ids(1, 10)
    make: Callable[[], list[int]] = lambda: [  # noqa: E731
        int(t) for t in model.stream(ids, max_new_tokens=60, temperature=1.5)
    ]
    torch.manual_seed(3)
    first = make()
    torch.manual_seed(3)
    assert make() == first
    assert make() != first
    assert len(set(first)) > 20
