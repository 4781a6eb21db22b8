"""Configuration of a TransformerScanModel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig

from scanlm.errors import ScanLMError, check_name, nearest
from scanlm.settings import DROPOUT_FIELDS
from scanlm.values import is_number

TRAIN_MODES = ("blelloch", "sequential", "parallel")
POSITION_EMBEDDINGS = ("absolute", "chunk")
NOT_FIELDS = ("model_type", "transformers_version")  # of ``to_dict``
NOT_SAVED = (  # transformers takes them too
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "name_or_path",
    "num_labels",
    "per_layer_config",
    "quantization_config",
    "torch_dtype",
)

# n_embd, t2_layers, n_head: the original's size table; medium and large are GPT-2's
PRESETS: dict[str, tuple[int, int, int]] = {
    "tiny": (64, 3, 2),
    "small": (128, 6, 4),
    "standard": (256, 12, 8),
    "base": (768, 12, 12),
    "medium": (1024, 24, 16),
    "large": (1280, 36, 20),
}


def check_fields(defaults: PretrainedConfig, names: Iterable[str], others: Iterable[str]) -> None:
    """Refuse names that are no field of a configuration, which transformers would keep unused.

    Args:
        defaults: a configuration of the class in question.
        names: to check.
        others: that are no fields and may be given.

    Raises:
        ScanLMError: the first such name, with the nearest field.
    """
    known = {*defaults.to_dict(), *defaults.attribute_map, *others}.difference(NOT_FIELDS)
    for name in names:
        if name not in known:
            raise ScanLMError(
                f"unknown field {name!r} of {type(defaults).__name__}.{nearest(name, known)}"
            )


class ScanLMConfig(PretrainedConfig):
    """Shape of a ``ScanLMForCausalLM``; names as in GPT-2's configuration.

    Args:
        vocab_size: tokens in the vocabulary.
        n_positions: longest sequence with ``position_embedding="absolute"``; unused with "chunk".
        n_embd, n_head, n_inner: width, attention heads, MLP width (``None``: 4 * n_embd).
        chunk_size: tokens per chunk, c; also the length of a state.
        t1_layers, t2_layers: blocks of the aggregator T1 and of the predictor T2.
        train_mode: how a whole sequence's prefixes are computed: "blelloch" (in parallel) or
            "sequential" (node by node); "parallel" is the original's name for the former.
        position_embedding: "absolute" (over the sequence, as the original) or "chunk" (within
            the chunk, so sequences may be of any length).
        t1_causal: mask T1 causally, which is what the original code ran; the paper has no mask.
        leaf_norm: a LayerNorm on T0's output, so that leaves have the scale of T1's outputs.
        prefix_embedding: add a learned vector to prefix states where T2 reads them. With one token
            a chunk and positions within it T2 could not tell a first token x from a second one,
            whose window is [x ; x].
        tie_word_embeddings: use the token embedding as the output projection too.

    Raises:
        ScanLMError: an unknown field (with the nearest); a value is of another type or out of
            range; the message names it.
    """

    model_type = "scanlm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "t2_layers",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_head: int = 12
    n_inner: int | None = None
    chunk_size: int = 64
    t1_layers: int = 1
    t2_layers: int = 12
    train_mode: str = "blelloch"
    position_embedding: str = "absolute"
    t1_causal: bool = False
    leaf_norm: bool = True
    prefix_embedding: bool = False
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check names and values (called by the generated ``__init__``)."""
        # a saved configuration, which names its type, may hold what other tools put there
        if kwargs and "model_type" not in kwargs:
            self.check_names(name for name in kwargs if not name.startswith("_"))
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "n_positions", "n_embd", "n_head", "chunk_size"):
            self._check_count(name)
        for name in ("t1_layers", "t2_layers"):
            self._check_count(name)
        if self.n_inner is not None:
            self._check_count("n_inner", "an integer >= 1, or None for 4 * n_embd")
        switches = ("t1_causal", "leaf_norm", "prefix_embedding")
        for name in (*switches, "use_cache", "tie_word_embeddings"):
            self._check_switch(name)
        for name in DROPOUT_FIELDS:
            self._check_number(name, "a probability in [0, 1)", lambda p: 0 <= p < 1)
        self._check_number("layer_norm_epsilon", "a number > 0", lambda x: 0 < x < math.inf)
        self._check_number("initializer_range", "a number >= 0", lambda x: 0 <= x < math.inf)
        if self.n_embd % self.n_head:
            raise ScanLMError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: every head needs "
                "n_embd / n_head features; change one of the two"
            )
        # not above: it loads torch's layers
        from transformers.activations import ACT2FN

        for name, known in (
            ("train_mode", TRAIN_MODES),
            ("position_embedding", POSITION_EMBEDDINGS),
            ("activation_function", tuple(ACT2FN)),
        ):
            check_name(name, getattr(self, name), known)

    def _check_count(self, name: str, expected: str = "an integer >= 1") -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ScanLMError(f"{name} must be {expected}, got {value!r}")

    def _check_switch(self, name: str) -> None:
        value = getattr(self, name)
        # a string would count as true; 0 and 1 are what they seem, and may be in saved files
        if not isinstance(value, Real) or value not in (0, 1):
            raise ScanLMError(f"{name} must be true or false, got {value!r}")

    def _check_number(self, name: str, expected: str, fits: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if not is_number(value) or not fits(value):
            raise ScanLMError(f"{name} must be {expected}, got {value!r}")

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """``check_fields`` of this class, for which transformers' own arguments pass too."""
        check_fields(cls(), names, NOT_SAVED)

    @classmethod
    def preset(cls, size: str, **overrides: Any) -> ScanLMConfig:
        """A configuration by size name; ``base`` with the defaults is the paper-scale model.

        Args:
            size: "tiny", "small", "standard", "base", "medium" or "large".
            overrides: any field of the configuration.

        Raises:
            ScanLMError: an unknown size or field (with the nearest), or a value out of range.
        """
        if not isinstance(size, str) or size not in PRESETS:
            raise ScanLMError(f"unknown preset {size!r}.{nearest(size, PRESETS)}")
        cls.check_names(overrides)
        n_embd, t2_layers, n_head = PRESETS[size]
        sizes = {"n_embd": n_embd, "t2_layers": t2_layers, "n_head": n_head}
        return cls(**{**sizes, **overrides})


AutoConfig.register(ScanLMConfig.model_type, ScanLMConfig, exist_ok=True)
