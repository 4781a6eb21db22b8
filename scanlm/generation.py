"""What models whose past is one state tell transformers' ``generate()``, and the checks that they
share."""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin

from scanlm.errors import ScanLMError

NO_SKIPPING = (
    "attention_mask must have its zeros at the left of a row: a recurrent state cannot skip tokens"
)
OTHER_MODEL = (
    "past_key_values is the cache of another model: start without one, or use the "
    "model that made it"
)


def readable(x: Tensor) -> bool:
    """Whether looking at values costs no wait for a GPU and breaks no compiled graph."""
    return x.is_cpu and not torch.compiler.is_compiling()


def check_tokens(input_ids: Tensor, vocab_size: int) -> None:
    """Refuse token ids that the vocabulary does not have.

    On a GPU the host waits for the tokens here: once for a prompt, never in a step.

    Args:
        input_ids: token ids, ``(b, t)``; empty ones pass.
        vocab_size: entries of the vocabulary, whose ids are 0 to ``vocab_size - 1``.

    Raises:
        ScanLMError: names the first wrong id and where it is.
    """
    wrong = (input_ids < 0) | (input_ids >= vocab_size)
    if not bool(wrong.any()):
        return
    where = wrong.nonzero()[0].tolist()
    raise ScanLMError(
        f"token id {int(input_ids[tuple(where)])} is not in the vocabulary of {vocab_size} (0 to "
        f"{vocab_size - 1}), at input_ids{where}: use the tokenizer that the model was trained with"
    )


def check_input_shape(input_ids: Tensor) -> None:
    """Refuse what is no batch of sequences of tokens.

    Raises:
        ScanLMError: another shape than ``(b, t)``, or no token.
    """
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ScanLMError(
            f"input_ids must be (batch, tokens) with at least one token, got shape "
            f"{tuple(input_ids.shape)}; start from a bos token to generate from nothing"
        )


def check_held(held: Tensor, x: Tensor) -> None:
    """Refuse a state that does not fit the batch that goes on with it.

    Args:
        held: any tensor of the state, ``(b, ...)``.
        x: embedded input, ``(b, t, d)``.

    Raises:
        ScanLMError: another batch size or device.
    """
    if held.shape[0] != x.shape[0]:
        raise ScanLMError(
            f"past_key_values holds {held.shape[0]} sequences, the input has {x.shape[0]}: "
            "continue with the same batch"
        )
    if held.device != x.device:
        raise ScanLMError(
            f"past_key_values is on {held.device}, the model on {x.device}: move the cache "
            "with cache.map(lambda t: t.to(...))"
        )


def recomputes(model: nn.Module) -> bool:
    """Whether a backward pass will run the model's blocks again, and advance a state again."""
    if not (model.training and torch.is_grad_enabled()):
        return False
    # transformers' property of the model has other names in other versions
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def begins_state(model: nn.Module, use_cache: bool | None) -> bool:
    """Whether a forward pass without a state makes one: if asked, but where it ``recomputes``."""
    if use_cache and recomputes(model):
        warnings.warn(
            "use_cache=True does not go with gradient checkpointing: going on without a state",
            stacklevel=3,
        )
        return False
    return bool(use_cache)


def check_mask(mask: Tensor) -> None:
    """Refuse a mask of values other than 0 and 1.

    Args:
        mask: ``(b, t)``; on a GPU the host waits for it here.

    Raises:
        ScanLMError: names the first wrong value and where it is.
    """
    wrong = (mask != 0) & (mask != 1)
    if not bool(wrong.any()):
        return
    where = wrong.nonzero()[0].tolist()
    raise ScanLMError(
        f"attention_mask{where} is {mask[tuple(where)].item()}: expected 0 and 1, 0 at padding"
    )


def check_mask_shape(mask: Tensor, input_ids: Tensor) -> None:
    """Refuse a mask that is not of the input's shape, and on the CPU other values than 0 and 1.

    Raises:
        ScanLMError: the shapes, or the first wrong value.
    """
    if mask.shape != input_ids.shape:
        raise ScanLMError(
            f"attention_mask must be (batch, tokens) = {tuple(input_ids.shape)} like input_ids, "
            f"got {tuple(mask.shape)}"
        )
    if readable(mask):
        check_mask(mask)


def mask_edges(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Whether any row falls from 1 to 0, and whether any rises, as tensors on the mask's device.

    Args:
        mask: ``(b, t)``.
    """
    return (mask[:, 1:] < mask[:, :-1]).any(), (mask[:, 1:] > mask[:, :-1]).any()


def check_continuation(mask: Tensor | None, input_ids: Tensor) -> None:
    """Refuse, on the CPU, padding among the tokens that a state goes on with.

    Args:
        mask: ``(b, past + t)``, of which the last t columns count; ``None``: no padding.
        input_ids: ``(b, t)``.

    Raises:
        ScanLMError: a value other than 1 at a new token.
    """
    if mask is None or mask.dim() != 2 or not readable(mask):
        return
    new = mask[:, -input_ids.shape[1] :]
    if not bool((new == 1).all()):
        check_mask(mask)
        raise ScanLMError(NO_SKIPPING)


def check_new_tokens(max_new_tokens: Any) -> None:
    """Refuse a limit that is no number of tokens.

    Raises:
        ScanLMError: neither an integer >= 1 nor ``None``.
    """
    if max_new_tokens is None:
        return
    count = isinstance(max_new_tokens, Integral) and not isinstance(max_new_tokens, bool)
    if not count or max_new_tokens < 1:
        raise ScanLMError(f"max_new_tokens={max_new_tokens!r}: expected an integer >= 1, or None")


def check_logits_to_keep(logits_to_keep: Any) -> None:
    """Refuse a negative number of positions, which would leave out the first ones.

    Raises:
        ScanLMError: the number is negative.
    """
    if isinstance(logits_to_keep, int) and logits_to_keep < 0:
        raise ScanLMError(
            f"logits_to_keep={logits_to_keep}: expected how many of the last positions to keep "
            "(0: all), or their indices in a tensor"
        )


class StateGenerationMixin(GenerationMixin):
    """``generate()`` for a model that makes its own state and advances it in place."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """The prompt, checked: ``generate()`` asks for it once, before it computes anything.

        Raises:
            ScanLMError: a token outside the vocabulary, or a mask with zeros after ones.
        """
        prompt, name, others = super()._prepare_model_inputs(*args, **kwargs)  # type: ignore[misc]
        check_tokens(prompt, self.config.vocab_size)  # type: ignore[attr-defined]
        mask = others.get("attention_mask")
        if mask is not None and mask.dim() == 2:  # forward refuses others
            check_mask(mask)
            if bool(mask_edges(mask)[0]):
                raise ScanLMError(NO_SKIPPING)
        return prompt, name, others

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 1,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the state has not seen yet."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {
            "input_ids": input_ids[:, seen:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
