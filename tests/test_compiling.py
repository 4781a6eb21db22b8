"""Compiled in pieces, a model computes what it did, and stays compiled."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel

from scanlm.baselines import build_model
from scanlm.causal_gpt2 import CausalGPT2LMHeadModel
from scanlm.compiling import compile_model
from scanlm.loss import loss_only

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(ids, labels=ids, **loss_only(model)).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize(
    "shape", [{}, {"t1_layers": 2, "t2_layers": 3}, {"chunk_size": 1}], ids=str
)
def test_the_step_is_the_same(make_model: Make, make_ids: Make, shape: dict[str, int]) -> None:
    ids = make_ids(2, 22)
    expected = step(make_model(**shape), ids)
    model = make_model(**shape)
    compile_model(model, backend="aot_eager")
    torch.testing.assert_close(step(model, ids), expected, rtol=1e-10, atol=1e-10)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["mamba2_tiny", "gla_tiny", "gated_deltanet_tiny"])
def test_blocks_of_recurrent_models_share_their_code(make_ids: Make, name: str) -> None:
    numbers = []
    for layers in (1, 3):
        torch._dynamo.reset()
        counters.clear()
        model = build_model(name, vocab_size=97, num_hidden_layers=layers).double()
        expected = step(model, make_ids(2, 22))
        compile_model(model, backend="aot_eager")
        torch.testing.assert_close(step(model, make_ids(2, 22)), expected, rtol=1e-9, atol=1e-9)
        numbers.append(int(counters["stats"]["unique_graphs"]))
    assert numbers[0] == numbers[1] > 0


@pytest.mark.parametrize("name", ["mamba2_tiny", "gla_tiny", "gated_deltanet_tiny"])
def test_gradients_outside_of_autocast_stay_there(make_ids: Make, name: str) -> None:
    ids, steps = make_ids(2, 22), []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        model = build_model(name, vocab_size=97)
        if backend:
            compile_model(model, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, **loss_only(model)).loss
        loss.backward()
        steps.append({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-5, atol=1e-7)


def graphs_after(steps: int, model: Any, ids: Tensor) -> int:
    for _ in range(steps):
        step(model, ids)
    return int(counters["stats"]["unique_graphs"])


def test_later_steps_compile_nothing(make_model: Make, make_ids: Make) -> None:
    model = make_model()
    compile_model(model, backend="aot_eager")
    first = graphs_after(1, model, make_ids(2, 22))
    assert graphs_after(3, model, make_ids(2, 22, seed=1)) == first


def test_graphs_do_not_grow_with_blocks_or_levels(make_model: Make, make_ids: Make) -> None:
    numbers = []
    for blocks, tokens in ((3, 40), (6, 120)):
        torch._dynamo.reset()
        counters.clear()
        model = make_model(t2_layers=blocks)
        compile_model(model, backend="aot_eager")
        numbers.append(graphs_after(1, model, make_ids(2, tokens)))
    assert numbers[0] == numbers[1]


def test_a_compiled_model_is_saved_as_any_other(
    make_model: Make, make_ids: Make, tmp_path: Any
) -> None:
    model, ids = make_model(), make_ids(2, 14)
    expected = model(ids).logits
    compile_model(model, backend="aot_eager")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(ids).logits, expected)


def test_other_models_are_compiled_whole(make_ids: Make) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=29, n_embd=8, n_head=2, n_layer=2, bos_token_id=None, eos_token_id=None
        )
    ).eval()
    ids = make_ids(2, 9)
    expected = step(model, ids)
    compile_model(model, backend="aot_eager")
    torch.testing.assert_close(step(model, ids), expected)
    assert counters["stats"]["unique_graphs"] > 0


def test_blocks_of_gpt2_serve_many_shapes() -> None:
    shape = {"vocab_size": 31, "n_embd": 16, "n_head": 2, "n_positions": 64}
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

    def build() -> CausalGPT2LMHeadModel:
        torch.manual_seed(0)
        return CausalGPT2LMHeadModel(GPT2Config(**shape, n_layer=3)).double()

    plain, model = build(), build()
    compile_model(model, backend="aot_eager", many_shapes=True)
    counts = []
    for tokens in (6, 9, 6):
        ids = torch.randint(31, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        torch.testing.assert_close(step(model, ids), step(plain, ids), rtol=1e-10, atol=1e-10)
        counts.append(int(counters["stats"]["unique_graphs"]))
    assert counts == [1, 2, 2]
    assert not counters["graph_break"]
