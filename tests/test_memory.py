"""State sizes against the arithmetic of each family; what a training step keeps."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from scanlm.baselines import build_model
from scanlm.errors import ScanLMError
from scanlm.memory import saved_bytes, state_bytes, state_growth


def sizes(model: nn.Module, positions: list[int]) -> list[int]:
    return [row["value"] for row in state_growth(model, positions)]


def test_gpt2_keeps_a_key_and_a_value_a_token_layer_and_feature() -> None:
    model = build_model("gpt2_tiny")
    assert sizes(model, [1, 10, 100]) == [4 * 2 * 4 * 64 * t for t in (1, 10, 100)]


def test_positions_beyond_the_model_are_left_out() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    assert [row["position"] for row in state_growth(model, [4, 8, 9])] == [4, 8]


@pytest.mark.parametrize("position", [0, -1])
def test_the_state_after_no_tokens_is_refused(position: int) -> None:
    with pytest.raises(ScanLMError, match=r"positions=\[4, .*\]: expected numbers of tokens >= 1"):
        sizes(build_model("gpt2_tiny"), [4, position])


def test_a_window_stops_growing() -> None:
    model = build_model("window_gpt2_tiny", sliding_window=8)
    assert len(set(sizes(model, [8, 20, 100]))) == 1


@pytest.mark.parametrize("model", ["gla_tiny", "gated_deltanet_tiny", "mamba2_tiny"])
def test_a_recurrence_keeps_the_same_at_any_position(model: str) -> None:
    (size,) = set(sizes(build_model(model), [3, 20, 100]))
    assert size > 0


def test_the_scan_model_keeps_roots_folds_and_a_window(make_model) -> None:  # type: ignore[no-untyped-def]
    model = make_model(dtype=torch.float32)  # chunks of 4, width 12, T2 of 2 blocks
    state = 4 * 12 * 4
    vector = 12 * 4
    # 7 chunks: trees of 4, 2 and 1; their folds beside the first two are states of their own
    assert sizes(model, [28]) == [(3 + 2) * state]
    # and then a window of the prefix and one token, in two blocks, with the token's embedding
    assert sizes(model, [29]) == [(3 + 2) * state + 2 * 2 * (4 + 1) * vector + vector]


def test_an_object_without_tensors_is_no_state() -> None:
    with pytest.raises(ScanLMError, match="holds no tensors"):
        state_bytes([])


def test_saved_bytes_are_what_the_backward_pass_needs() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))

        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            x = input_ids.float() * self.weight  # keeps the input, and not the weight
            return type("Out", (), {"loss": (x * x).sum()})  # keeps x, once

    ids = torch.ones(3, 5, dtype=torch.long)
    assert saved_bytes(Square(), ids) == 2 * 3 * 5 * 4


@pytest.mark.parametrize("training", [True, False])
def test_an_error_leaves_the_mode(training: bool) -> None:
    class Broken(nn.Module):
        config = SimpleNamespace(vocab_size=5)

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, **_: object) -> object:
            raise RuntimeError("out of memory")

    model = Broken().train(training)
    with pytest.raises(RuntimeError, match="out of memory"):
        state_growth(model, [1])
    assert model.training is training
    with pytest.raises(RuntimeError, match="out of memory"):
        saved_bytes(model, torch.ones(1, 2, dtype=torch.long))
    assert model.training is training


def test_saved_bytes_grow_with_the_batch_and_leave_the_mode() -> None:
    model = build_model("scanlm_tiny").eval()
    ids = torch.randint(256, (4, 64))
    one, four = saved_bytes(model, ids[:1]), saved_bytes(model, ids)
    assert 3.5 * one < four < 4.5 * one
    assert not model.training
