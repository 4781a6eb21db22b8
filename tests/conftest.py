"""A small model whose every parameter matters, shared by the tests of the model and its cache."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # read when Triton is imported, which torch does sooner or later
    os.environ["TRITON_INTERPRET"] = "1"

from scanlm import ScanLMConfig, ScanLMForCausalLM

VOCAB = 29


def _make_model(dtype: torch.dtype = torch.float64, **overrides: Any) -> ScanLMForCausalLM:
    fields = {
        "vocab_size": VOCAB,
        "n_positions": 128,
        "n_embd": 12,
        "n_head": 3,
        "chunk_size": 4,
        "t1_layers": 1,
        "t2_layers": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    torch.manual_seed(0)
    model = ScanLMForCausalLM(ScanLMConfig(**{**fields, **overrides})).to(dtype)
    with torch.no_grad():  # GPT-2's initial biases and norms are 0 and 1: errors there would hide
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., ScanLMForCausalLM]:
    """``make_model(dtype=float64, **config)``: without dropout, random biases and norms."""
    return _make_model


@pytest.fixture(scope="session")
def make_ids() -> Callable[..., torch.Tensor]:
    """``make_ids(batch, tokens, seed=0)``: random token ids."""

    def make(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(VOCAB, (batch, tokens), generator=generator)

    return make
