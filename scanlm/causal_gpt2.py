"""transformers' GPT-2, trained as fast as the scan model is.

The weights, the function and the saved files are those of ``GPT2LMHeadModel``. Two things keep it
from its best in training, and a comparison would be with a handicapped GPT-2: under
``torch.compile`` transformers makes a mask of all pairs of tokens, which keeps attention from the
kernels that know what "causal" means, and the loss holds all logits in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from scanlm.loss import linear_cross_entropy, next_tokens

ATTENTION = "sdpa_causal"


def mask_where_needed(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask for ``scaled_dot_product_attention``; ``None`` for whole sequences.

    ``None`` means causal to the attention function. transformers decides likewise, but not while
    it is compiled or captured as a CUDA graph.
    """
    all_seen = local_size is None or kv_length <= local_size
    if attention_mask is None and all_seen and q_length == kv_length:
        return None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )


AttentionInterface.register(ATTENTION, sdpa_attention_forward)
AttentionMaskInterface.register(ATTENTION, mask_where_needed)


class CausalGPT2LMHeadModel(GPT2LMHeadModel):
    """GPT-2; see the module.

    Attributes:
        half_residual: under autocast keep the residual stream in its precision, as scan models do.
    """

    config: GPT2Config
    config_class = GPT2Config

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.config._attn_implementation = ATTENTION
        self.loss_type = "ForCausalLM"  # what it takes anyway, after a warning
        self.half_residual = False
        self.transformer.drop.register_forward_hook(self._halve)

    def _halve(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        device = embedded.device.type
        if self.half_residual and torch.is_autocast_enabled(device):
            return embedded.to(torch.get_autocast_dtype(device))
        return embedded

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,  # generate() gives what it sees in the signature
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As ``GPT2LMHeadModel.forward``.

        Args:
            return_logits: if False, only the loss is computed, without ever holding all logits.
        """
        inputs = {
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        if return_logits:
            if shift_labels is not None:  # transformers looks for them where there are labels
                kwargs["shift_labels"] = labels = shift_labels
            return super().forward(
                input_ids, labels=labels, logits_to_keep=logits_to_keep, **inputs, **kwargs
            )
        inputs["use_cache"] = False  # a loss is of whole sequences
        hidden = self.transformer(input_ids, **inputs).last_hidden_state
        of = hidden[..., 0] if input_ids is None else input_ids  # only the shape counts
        targets = next_tokens(of, labels, shift_labels, self.config.vocab_size)
        assert targets is not None, "return_logits=False computes the loss: give labels"
        loss = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            kwargs.get("num_items_in_batch"),
        )
        return CausalLMOutputWithCrossAttentions(loss=loss)  # type: ignore[arg-type]
