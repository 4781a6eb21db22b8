"""The GPT-2 that is trained is transformers' GPT-2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from scanlm import causal_gpt2
from scanlm.causal_gpt2 import CausalGPT2LMHeadModel
from scanlm.errors import ScanLMError

VOCAB = 83


def pair(dtype: torch.dtype = torch.float64) -> tuple[CausalGPT2LMHeadModel, GPT2LMHeadModel]:
    fields: dict[str, Any] = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64}
    fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **fields))
    theirs.loss_type = "ForCausalLM"
    ours = CausalGPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **fields))
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def ids(batch: int = 2, tokens: int = 20) -> Tensor:
    return torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1))


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_loss_and_gradients() -> None:
    ours, theirs = pair()
    logits = theirs(ids()).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids()[:, 1:].flatten())
    out = ours(ids(), labels=ids(), return_logits=False)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradients(ours, out.loss), gradients(theirs, expected))
    shifted = torch.nn.functional.pad(ids()[:, 1:], (0, 1), value=-100)
    for return_logits in (True, False):
        loss = ours(ids(), shift_labels=shifted, return_logits=return_logits).loss
        torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-6, atol=0)


def test_wrong_labels_are_refused_before_the_loss() -> None:
    ours, _ = pair()
    with pytest.raises(ScanLMError, match=r"labels must be \(batch, tokens\)"):
        ours(ids(), labels=ids()[:, 1:], return_logits=False)
    wrong = ids().index_fill(1, torch.tensor([2]), ours.config.vocab_size)
    with pytest.raises(ScanLMError, match="labels"):
        ours(ids(), labels=wrong, return_logits=False)


def test_padding_and_decoding() -> None:
    ours, theirs = pair()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    with torch.no_grad():
        actual = ours(ids(), attention_mask=mask).logits
        expected = theirs(ids(), attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for given in ({}, {"attention_mask": mask}):
        tokens = ours.generate(ids(), **given, **options)
        assert torch.equal(tokens, theirs.generate(ids(), **given, **options))


def test_a_future_token_is_not_seen() -> None:
    ours, _ = pair()
    other = ids().clone()
    other[:, 12] += 1
    with torch.no_grad():
        first, second = ours(ids()).logits, ours(other).logits
    assert torch.equal(first[:, :12], second[:, :12])
    assert not torch.allclose(first[:, 12:], second[:, 12:])


@pytest.mark.parametrize("compiled", [False, True])
def test_no_mask_is_made_in_training(
    compiled: bool, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., list[Any]]
) -> None:
    made = counted(causal_gpt2, "sdpa_mask")
    ours, theirs = pair(torch.float32)
    expected = theirs(ids(), labels=ids()).loss
    if compiled:
        ours.compile(backend="eager", fullgraph=True)
    loss = ours(ids(), labels=ids(), return_logits=False, use_cache=False).loss
    torch.testing.assert_close(loss, expected)
    assert not made
    ours(ids(), attention_mask=torch.ones(2, 20).tril(), use_cache=False)
    assert compiled or made


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Replace a function by one that notes its calls."""

    def count(owner: Any, name: str) -> list[Any]:
        calls: list[Any] = []
        function = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)
        return calls

    return count


@pytest.mark.parametrize("half", [False, True])
def test_the_residual_stream_under_autocast(half: bool) -> None:
    ours, _ = pair(torch.float32)
    ours.half_residual = half
    seen: list[torch.dtype] = []
    ours.transformer.h[1].register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    exact = ours(ids(), labels=ids(), return_logits=False).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours(ids(), labels=ids(), return_logits=False).loss
    assert seen == [torch.float32, torch.bfloat16 if half else torch.float32]
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)


def test_it_is_saved_as_a_gpt2(tmp_path: Path) -> None:
    ours, _ = pair()
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is GPT2LMHeadModel
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids()).logits, ours(ids()).logits)
