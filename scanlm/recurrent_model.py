"""What GLA and Gated DeltaNet share: everything around the recurrence.

Language models of flash-linear-attention's architecture (pre-norm blocks of a token mixer and a
SwiGLU, RMS norms, no positions) with its parameter names, initial weights and configuration fields,
so that a checkpoint folder works for both. Here all is plain torch; the fused kernels need a GPU.

Shapes: ``b`` sequences, ``t`` tokens, ``d`` = hidden_size, ``h`` heads, ``v`` = vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import initialization as init
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from scanlm.errors import ScanLMError
from scanlm.generation import (
    NO_SKIPPING,
    OTHER_MODEL,
    StateGenerationMixin,
    begins_state,
    check_continuation,
    check_held,
    check_input_shape,
    check_logits_to_keep,
    check_mask_shape,
    check_tokens,
    mask_edges,
    readable,
    recomputes,
)
from scanlm.loss import linear_cross_entropy, next_tokens
from scanlm.short_convolution import ShortConvolution

INSTALL = "pip install 'scanlm[gpu]'"


class RecurrentConfig(PretrainedConfig):
    """Fields that both families have; names and defaults are flash-linear-attention's.

    Args:
        hidden_size, num_hidden_layers, num_heads: width, blocks, heads.
        hidden_ratio: MLP width over two thirds of the model's, before rounding up to 256s.
        intermediate_size: MLP width; ``None``: from ``hidden_ratio``.
        use_short_conv, conv_size: short convolutions of queries, keys and values, and their width.
        norm_eps: of all RMS norms.
        attn_mode, fuse_norm, fuse_swiglu, fuse_cross_entropy, fuse_linear_cross_entropy: which
            kernels the fused models take; the function is the same.
        embd_pdrop, attn_pdrop, resid_pdrop: dropout as GPT-2 has it: of the embeddings, of queries,
            keys and values, and of what mixers and MLPs add; flash-linear-attention has none.
        attn, attnres_block_size, use_l2warp: of the fused models only.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    attn_mode: str = "chunk"
    hidden_size: int = 2048
    hidden_ratio: int | None = 4
    intermediate_size: int | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    hidden_act: str = "swish"
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-6
    attn: Any = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True
    fuse_linear_cross_entropy: bool = False
    use_l2warp: bool = False
    vocab_size: int = 32000
    attnres_block_size: int | None = None
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.0

    def require(self, **values: Any) -> None:
        """Refuse what only the fused kernels can do.

        Raises:
            ScanLMError: a field that is not as plain torch has it.
        """
        shared = {"attn": None, "attnres_block_size": None, "use_l2warp": False}
        for name, value in {**shared, "hidden_act": "swish", **values}.items():
            if getattr(self, name) != value:
                raise ScanLMError(
                    f"{name}={getattr(self, name)!r} of a {self.model_type} model needs fused "
                    f"kernels, so a GPU and {INSTALL}; plain torch has {name}={value!r}"
                )


@dataclass
class LayerState:
    """What one mixer keeps of the past.

    Attributes:
        recurrent: ``(b, h, k, v)``.
        convolutions: the last inputs ``(b, conv_size - 1, features)`` of each short convolution.
    """

    recurrent: Tensor | None = None
    convolutions: list[Tensor] = field(default_factory=list)

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerState:
        """The same with every tensor replaced by ``function`` of it."""
        recurrent = None if self.recurrent is None else function(self.recurrent)
        return LayerState(recurrent, [function(x) for x in self.convolutions])


class RecurrentCache:
    """State of a batch of sequences, advanced in place; its size does not depend on their length.

    Args:
        model: the ``RecurrentModel`` whose state it is.

    Attributes:
        layers: one ``LayerState`` a block.
        length: input columns seen, padding included.
    """

    is_compileable = False  # asked by transformers' generate()

    def __init__(self, model: RecurrentModel) -> None:
        self.model = model
        self.layers = [LayerState() for _ in model.layers]
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Input columns seen (the name is transformers')."""
        return self.length

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors held, each ``(batch, ...)``."""
        recurrent = [layer.recurrent for layer in self.layers if layer.recurrent is not None]
        return recurrent + [x for layer in self.layers for x in layer.convolutions]

    @property
    def num_bytes(self) -> int:
        """Memory of the state in bytes."""
        return sum(x.nbytes for x in self.tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor held by ``function`` of it."""
        self.layers = [layer.map(function) for layer in self.layers]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep row ``beam_idx[i]`` as row i (beam search)."""
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def __deepcopy__(self, memo: dict[int, Any]) -> RecurrentCache:
        """A state to continue in another way, of the same model."""
        other = RecurrentCache(self.model)
        other.layers = [layer.map(torch.clone) for layer in self.layers]
        other.length = self.length
        return other

    def check(self, model: RecurrentModel, x: Tensor) -> None:
        """Refuse a continuation ``x (b, t, d)`` that does not fit.

        Raises:
            ScanLMError: another model's cache, or another batch size or device.
        """
        if self.model is not model:
            raise ScanLMError(OTHER_MODEL)
        held = next((layer.recurrent for layer in self.layers), None)
        if held is not None:
            check_held(held, x)


class GatedRMSNorm(nn.Module):
    """RMS norm over a head's features, times ``activation(gate)`` if there is a gate."""

    def __init__(
        self,
        size: int,
        eps: float,
        activation: Callable[[Tensor], Tensor] = F.silu,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.size, self.eps, self.activation = size, eps, activation
        self.weight = nn.Parameter(torch.ones(size)) if affine else None

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """``(..., size)`` and a gate of this shape to ``(..., size)``, computed in float32."""
        exact = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(exact)
        y = F.rms_norm(x.to(exact), (self.size,), weight, self.eps)
        if gate is not None:
            y = y * self.activation(gate.to(exact))
        return y.to(x.dtype)


def add_convolutions(mixer: Any, width: int) -> None:
    """Short convolutions behind a mixer's three projections.

    Raises:
        ScanLMError: a width below 1.
    """
    if width < 1:
        raise ScanLMError(
            f"conv_size={width}: short convolutions need a width >= 1; use_short_conv=false leaves "
            "them out"
        )
    for name in "qkv":
        features = getattr(mixer, f"{name}_proj").out_features
        setattr(mixer, f"{name}_conv1d", ShortConvolution(features, width))


def project(mixer: Any, x: Tensor, state: LayerState) -> list[Tensor]:
    """Queries, keys and values ``(b, t, features)``, convolved where the mixer convolves.

    The convolutions' pasts in ``state`` are advanced.
    """
    streams = [mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)]
    if not mixer.use_short_conv:
        return streams
    pasts: list[Any] = state.convolutions or [None] * 3
    layers = (mixer.q_conv1d, mixer.k_conv1d, mixer.v_conv1d)
    results = [conv.step(s, p) for conv, s, p in zip(layers, streams, pasts, strict=True)]
    state.convolutions = [past for _, past in results]
    return [y for y, _ in results]


class GatedMLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        d = config.hidden_size
        inner = config.intermediate_size
        if inner is None:
            ratio = 4 if config.hidden_ratio is None else config.hidden_ratio
            inner = -(-int(d * ratio * 2 / 3) // 256) * 256
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d)`` to ``(..., d)``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(GradientCheckpointingLayer):
    """Pre-norm mixer and MLP."""

    def __init__(self, config: RecurrentConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = mixer
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, state: LayerState | None) -> Tensor:
        """``(b, t, d)`` to ``(b, t, d)``; ``mask (b, t, 1)`` is 0 at padding."""
        if state is None:  # made here, so that gradient checkpointing begins afresh
            state = LayerState()
        normed = self.attn_norm(x)
        x = x + self.attn(normed if mask is None else normed * mask.to(normed.dtype), state)
        return x + self.mlp(self.mlp_norm(x))


def add_dropout(model: Any) -> None:
    """Put dropout into a model, plain or fused, at the rates its configuration has.

    flash-linear-attention has none; the places are those where GPT-2 has its three.
    """
    rates = {
        name: getattr(model.config, f"{name}_pdrop", 0.0) for name in ("embd", "attn", "resid")
    }
    places = [(model.model.embeddings, rates["embd"])]
    for layer in model.model.layers:
        names = [name for name in ("q_proj", "k_proj", "v_proj") if hasattr(layer.attn, name)]
        places += [(getattr(layer.attn, name), rates["attn"]) for name in names]
        places += [(layer.attn, rates["resid"]), (layer.mlp, rates["resid"])]
    for module, rate in places:
        # a submodule, so that it follows train() and eval() and its rate can be changed
        module.add_module("dropout", nn.Dropout(rate))
        module.register_forward_hook(_drop_output)


def _drop_output(module: Any, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):  # the fused mixers return more than their output
        return (module.dropout(output[0]), *output[1:])
    return module.dropout(output)


class RecurrentPreTrainedModel(PreTrainedModel):
    """Initial weights, and what transformers asks of a class."""

    config: Any
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True  # the state cannot be rolled back, so no assisted decoding

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, GatedRMSNorm | nn.RMSNorm) and module.weight is not None:
            init.ones_(module.weight)
        elif callable(draw := getattr(module, "draw_weights", None)):
            draw()  # of a mixer with parameters of its own


class RecurrentModel(RecurrentPreTrainedModel):
    """Embedding, blocks, final norm.

    Args:
        config: of the family.
        mixers: one token mixer a block, ``(x, state) -> y`` on ``(b, t, d)``.
    """

    def __init__(self, config: RecurrentConfig, mixers: list[nn.Module]) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([Block(config, mixer) for mixer in mixers])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``(b, t, d)``; see ``LossAndLogits.forward``.

        Raises:
            ScanLMError: empty input; a token outside the vocabulary (on the CPU); a cache that does
                not fit, or any under gradient checkpointing in training, where ``use_cache`` alone
                is ignored with a warning; a mask that hides tokens between others.
        """
        cache = past_key_values
        self._check_input(input_ids, cache)
        if cache is None and begins_state(self, use_cache):
            cache = RecurrentCache(self)
        x = self.embeddings(input_ids)
        if past_key_values is not None:
            past_key_values.check(self, x)
        mask = self._padding(input_ids, attention_mask, cache)
        states = cache.layers if cache is not None else [None] * len(self.layers)
        for layer, state in zip(self.layers, states, strict=True):
            x = layer(x, mask, state)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x),
            past_key_values=cache,  # type: ignore[arg-type]
        )

    def _check_input(self, input_ids: Tensor, cache: RecurrentCache | None) -> None:
        check_input_shape(input_ids)
        if cache is not None and not isinstance(cache, RecurrentCache):
            raise ScanLMError(
                f"past_key_values must be a RecurrentCache of this model, got "
                f"{type(cache).__name__}"
            )
        if cache is not None and recomputes(self):
            raise ScanLMError(
                "past_key_values does not go with gradient checkpointing, whose backward pass "
                "would advance the state again: turn one of them off"
            )
        if readable(input_ids):  # generate() checks prompts on a GPU, once
            check_tokens(input_ids, self.config.vocab_size)

    @staticmethod
    def _padding(ids: Tensor, mask: Tensor | None, cache: RecurrentCache | None) -> Tensor | None:
        """``(b, t, 1)``, 0 at padding; ``None`` if a sequence has none."""
        if cache is not None and cache.length:
            check_continuation(mask, ids)
            return None
        if mask is None:
            return None
        check_mask_shape(mask, ids)
        falls, rises = map(bool, mask_edges(mask))
        if falls and (rises or cache is not None):
            raise ScanLMError(NO_SKIPPING)
        return mask.unsqueeze(-1) if rises else None


def register(config_class: Any, model_class: Any) -> None:
    """Make transformers' Auto classes take these for folders of this type."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


class LossAndLogits:
    """``forward`` over ``self.model`` and ``self.lm_head``, the same for plain and fused models."""

    config: Any
    model: Any
    lm_head: Any

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every position, and the loss.

        Args:
            input_ids: ``(b, t)``; the tokens after those in ``past_key_values``.
            attention_mask: ``(b, t)``, zeros for padding at the left; the right needs no mask.
            past_key_values: state to continue from.
            labels: ``(b, t)``; position i is scored against ``labels[:, i + 1]``, -100 is not
                scored. If nothing is scored the loss is NaN, as in transformers.
            shift_labels: ``(b, t)``, already shifted; takes precedence over ``labels``.
            use_cache: return a state; by default only if one was passed.
            logits_to_keep: only the last so many positions' logits (0: all), or their indices.
            return_logits: if False, only the loss is computed, without ever holding all logits.
            kwargs: ``num_items_in_batch`` divides the summed loss (gradient accumulation).

        Raises:
            ScanLMError: empty input; a mask that hides tokens between others; labels of another
                shape; on the CPU tokens or labels outside the vocabulary or a mask with values
                other than 0 and 1; a cache that does not fit; a negative ``logits_to_keep``.
        """
        check_logits_to_keep(logits_to_keep)
        targets = next_tokens(input_ids, labels, shift_labels, self.config.vocab_size)
        keep = bool(use_cache) or past_key_values is not None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=keep,
        )
        hidden = outputs.last_hidden_state
        loss, logits = None, None
        if targets is not None:
            loss = linear_cross_entropy(
                hidden.flatten(0, 1),
                self.lm_head.weight,
                targets.flatten(),
                kwargs.get("num_items_in_batch"),
            )
        if return_logits:
            last = isinstance(logits_to_keep, int)
            logits = self.lm_head(
                hidden[:, slice(-logits_to_keep, None) if last else logits_to_keep]
            )
        return CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,
            past_key_values=outputs.past_key_values if keep else None,
        )


class RecurrentForCausalLM(LossAndLogits, RecurrentPreTrainedModel, StateGenerationMixin):
    """A causal language model of plain torch, trained and generated from as any other.

    Args:
        config: of the family.
        mixers: one token mixer a block.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: RecurrentConfig, mixers: list[nn.Module]) -> None:
        super().__init__(config)
        self.model = RecurrentModel(config, mixers)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        add_dropout(self)
