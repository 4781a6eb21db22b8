"""What models whose past is one state tell transformers' ``generate()``, and a prompt's check."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.generation.utils import GenerationMixin

from scanlm.errors import ScanLMError


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


class StateGenerationMixin(GenerationMixin):
    """``generate()`` for a model that makes its own state and advances it in place."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """The prompt, checked: ``generate()`` asks for it once, before it computes anything."""
        prompt, name, others = super()._prepare_model_inputs(*args, **kwargs)  # type: ignore[misc]
        check_tokens(prompt, self.config.vocab_size)  # type: ignore[attr-defined]
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
