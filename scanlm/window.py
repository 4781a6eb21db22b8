"""GPT-2 that sees a sliding window only: the scan model without its scan.

A token attends to itself and the ``sliding_window - 1`` tokens before it. With a window of
``2 * chunk_size`` that is the largest neighbourhood T2 ever has, so what the scan model does better
comes from its prefix states. Deeper layers still reach further back, by one window a layer, as in
any stack of local attention. Weights are GPT-2's; decoding keeps one window of keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config
from transformers.masking_utils import create_sliding_window_causal_mask

from scanlm.causal_gpt2 import CausalGPT2LMHeadModel
from scanlm.errors import ScanLMError


class WindowGPT2Config(GPT2Config):
    """GPT-2's configuration with a window.

    Args:
        sliding_window: tokens a token attends to, itself included (the name by which transformers'
            masks and caches know it).

    Raises:
        ScanLMError: a window of less than one token.
    """

    model_type = "window_gpt2"

    sliding_window: int = 128

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the window (called by the generated ``__init__``)."""
        super().__post_init__(**kwargs)
        if self.sliding_window < 1:
            raise ScanLMError(
                f"sliding_window={self.sliding_window}: a token attends to itself at least, so 1 "
                "or more"
            )


class WindowGPT2LMHeadModel(CausalGPT2LMHeadModel):
    """GPT-2 with the mask of ``WindowGPT2Config.sliding_window``; otherwise as transformers has it.

    Example:
        >>> model = WindowGPT2LMHeadModel(WindowGPT2Config(sliding_window=128))
        >>> model.load_state_dict(gpt2.state_dict())   # GPT-2's weights fit
    """

    config: WindowGPT2Config
    config_class = WindowGPT2Config
    # GPT-2's attention does not tell these kernels of a window
    _supports_flash_attn = False
    _supports_flex_attn = False

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,  # generate() gives what it sees in the signature
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,  # the trainer looks for it in the signature
        **kwargs: Any,
    ) -> Any:
        """As ``CausalGPT2LMHeadModel.forward``; a mask of 4 dimensions is used as it is."""
        if attention_mask is None or attention_mask.dim() < 4:
            inputs = inputs_embeds if input_ids is None else input_ids
            assert inputs is not None, "give input_ids or inputs_embeds"
            # only shape, type and device of the embeddings are looked at
            embeds = torch.empty((*inputs.shape[:2], 0), dtype=self.dtype, device=inputs.device)
            attention_mask = create_sliding_window_causal_mask(
                config=self.config,
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        return super().forward(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            logits_to_keep=logits_to_keep,
            return_logits=return_logits,
            **kwargs,
        )


AutoConfig.register(WindowGPT2Config.model_type, WindowGPT2Config, exist_ok=True)
AutoModelForCausalLM.register(WindowGPT2Config, WindowGPT2LMHeadModel, exist_ok=True)
