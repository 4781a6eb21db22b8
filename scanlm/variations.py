"""What a recorded training run changes of its registered model, in a few words."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from scanlm.errors import ScanLMError

# fields that say nothing of what is computed, or that a run has as one setting (its dropout)
UNTOLD = ("vocab_size", "train_mode", "use_cache", "dropout")

# what readers call a field, where that says more than its name
WORDS = {
    "chunk_size": "chunk size",
    "half_residual": "half-precision residual stream",
    "initializer_range": "initial weights' scale",
    "leaf_norm": "norm on the leaves",
    "lr": "learning rate",
    "position_embedding": "position embedding",
    "prefix_embedding": "prefix embedding",
    "t1_causal": "causal T1",
    "t1_from_t2": "T1 begun as T2",
    "t1_layers": "T1 layers",
    "tie_word_embeddings": "tied embeddings",
}


def change_text(name: str, value: Any) -> str:
    """One changed field: ``causal T1`` or ``no causal T1`` of a switch, else field and value."""
    field = name.rpartition(".")[2]
    field = WORDS.get(field, field)
    if isinstance(value, bool):
        return field if value else f"no {field}"
    return f"{field} {value}"


def changes(model: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run that are not those of its model in the registry.

    Args:
        model: registry id. Of a model that is not there, nothing is known to be changed.
        parameters: of a training record.

    Returns:
        Changed fields of the configuration, ``half_residual`` if it is off, and a ``dropout`` in
        training (the registry's models are compared without), with their values.
    """
    config = parameters.get("config") or {}
    found = {
        name: config[name]
        for name, value in _registered(model).items()
        if name in config and config[name] != value
    }
    if parameters.get("half_residual") is False:
        found["half_residual"] = False
    if parameters.get("dropout"):
        found["dropout"] = parameters["dropout"]
    return found


@cache
def _registered(model: str) -> dict[str, Any]:
    """The configuration of a registered model as records write it, without what all models have."""
    from transformers import PretrainedConfig

    from scanlm.baselines import build_model
    from scanlm.records import plain

    try:
        config = plain(build_model(model, device="meta").config.to_dict())
    except ScanLMError:
        return {}
    common = set(PretrainedConfig().to_dict()) - {"tie_word_embeddings"}
    return {
        name: value
        for name, value in config.items()
        if not (name in common or name in UNTOLD or name.endswith(("_pdrop", "_token_id")))
    }
