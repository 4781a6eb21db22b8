"""The sliding-window GPT-2 against GPT-2 with a band mask, and its cache."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import create_sliding_window_causal_mask

from scanlm.errors import ScanLMError
from scanlm.loss import loss_only
from scanlm.window import WindowGPT2Config, WindowGPT2LMHeadModel

WINDOW = 6
SHAPE = {"vocab_size": 31, "n_positions": 64, "n_embd": 16, "n_head": 2, "n_layer": 2}
SHAPE |= {"bos_token_id": None, "eos_token_id": None}


@pytest.fixture(scope="module")
def model() -> WindowGPT2LMHeadModel:
    torch.manual_seed(0)
    model = WindowGPT2LMHeadModel(WindowGPT2Config(**SHAPE, sliding_window=WINDOW))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


@pytest.fixture
def ids() -> torch.Tensor:  # without 0, which pads
    return torch.randint(1, 31, (2, 23), generator=torch.Generator().manual_seed(1))


def test_it_is_gpt2_under_a_band_mask(model: WindowGPT2LMHeadModel, ids: torch.Tensor) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(**SHAPE)).double().eval()
    gpt2.load_state_dict(model.state_dict())
    i = torch.arange(ids.shape[1])
    seen = (i <= i[:, None]) & (i > i[:, None] - WINDOW)
    band = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    expected = gpt2(ids, attention_mask=band.expand(2, 1, -1, -1), labels=ids)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss)
    assert loss_only(model) == {"return_logits": False}  # so the trainer never holds all logits
    alone = model(ids, labels=ids, **loss_only(model)).loss
    torch.testing.assert_close(alone, expected.loss, check_dtype=False, rtol=1e-6, atol=0)
    assert not torch.allclose(out.logits, gpt2(ids).logits)  # the window does matter


def test_within_the_window_no_mask_is_made(
    model: WindowGPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as under torch.compile, or while a CUDA graph is captured
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *tensors: True)

    def mask(tokens: int) -> torch.Tensor | None:
        embeds = torch.empty(2, tokens, 0)
        return create_sliding_window_causal_mask(model.config, embeds, None, None)

    assert mask(WINDOW) is None
    longer = mask(WINDOW + 1)
    assert longer is not None
    assert not longer[0, 0, -1, 0]


@pytest.mark.parametrize("pieces", [[1] * 23, [9, 1, 7, 6], [20, 3]])
def test_cached_is_uncached(
    model: WindowGPT2LMHeadModel, ids: torch.Tensor, pieces: list[int]
) -> None:
    cache, logits = None, []
    for piece in ids.split(pieces, dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits)
    assert cache.layers[0].keys.shape[-2] < WINDOW  # what is out of sight is dropped


@pytest.mark.parametrize("how", [{"num_beams": 3}, {}], ids=["beams", "greedy"])
def test_generation_with_padding(
    model: WindowGPT2LMHeadModel, ids: torch.Tensor, how: dict[str, int]
) -> None:
    how = {**how, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    padded = model.generate(ids, attention_mask=mask, **how)
    for row, start in ((0, 0), (1, 8)):
        alone = model.generate(ids[row : row + 1, start:], use_cache=False, **how)
        assert padded[row, start:].tolist() == alone[0].tolist()


def test_saved_and_loaded(model: WindowGPT2LMHeadModel, ids: torch.Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is WindowGPT2LMHeadModel
    assert loaded.config.sliding_window == WINDOW
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_window_of_nothing() -> None:
    with pytest.raises(ScanLMError, match="sliding_window=0"):
        WindowGPT2Config(sliding_window=0)
