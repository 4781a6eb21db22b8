"""The registry: every model that is trained and compared, and the one way to build it.

A model is one YAML file, shipped in ``scanlm/registry`` or anywhere else (give its path):

    id: my_gpt2                 # what commands and run records call it
    name: My GPT-2
    family: gpt2                # which build function
    description: One sentence.
    config: {n_layer: 6}        # fields of the family's configuration that differ
    training: {lr: 3.0e-4}      # fields of TrainingSettings that differ

A family is a build function, ``register_family(name, build)``. Torch and transformers are loaded
when a model is built, not when the registry is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scanlm.errors import ScanLMError, nearest
from scanlm.settings import TrainingSettings, first_mistake, resolve_settings
from scanlm.values import is_number, read_mapping

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

REGISTRY = Path(__file__).parent / "registry"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# of the families' configurations, which themselves check few of them: without layers a model would
# be trained all the same
SIZES = dict.fromkeys(
    (
        *("vocab_size", "n_positions", "n_embd", "n_inner", "n_layer", "n_head", "chunk_size"),
        *("max_position_embeddings", "hidden_size", "intermediate_size", "hidden_ratio"),
        *("num_hidden_layers", "num_attention_heads", "num_heads", "num_kv_heads", "num_v_heads"),
        *("head_dim", "state_size", "n_groups", "expand", "conv_kernel"),
    ),
    "an integer >= 1",
) | dict.fromkeys(("expand_k", "expand_v"), "a number > 0")

# (fields of the configuration, device or None) -> model; torch's default device is set to it
Build = Callable[[dict[str, Any], "torch.device | None"], "PreTrainedModel"]


class ModelEntry(BaseModel):
    """One model of the registry.

    Attributes:
        id: what commands, files and run records call it.
        family: name of the build function.
        name, description: for readers.
        config: fields of the family's configuration that differ from its defaults.
        training: fields of ``TrainingSettings`` that differ from the defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    family: str
    name: str = ""
    description: str = ""
    config: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)


def load_entry(name_or_path: str | Path | ModelEntry) -> ModelEntry:
    """A model of the registry by id, or one from a YAML file.

    Raises:
        ScanLMError: an unknown id (with the nearest); a file that is not there, is not YAML (file
            and line), or has wrong or unknown fields.
    """
    if isinstance(name_or_path, ModelEntry):
        return name_or_path
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith((".yaml", ".yml")) or "/" in text:
        return _read(Path(text).expanduser())
    path = REGISTRY / f"{text}.yaml"
    known = _ids()
    if text not in known:
        raise ScanLMError(
            f"unknown model {text!r}.{nearest(text, known)} A model of your own: give the path of "
            "its YAML file"
        )
    return _read(path)


def list_entries() -> list[ModelEntry]:
    """All shipped models, by id."""
    return [_read(REGISTRY / f"{name}.yaml") for name in _ids()]


def build_model(
    entry: str | Path | ModelEntry,
    vocab_size: int | None = None,
    device: str | torch.device | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """A model with new weights, drawn from torch's global generator.

    Args:
        entry: what ``load_entry`` takes, or what it returned.
        vocab_size: ``None``: the entry's own.
        device: where to make the weights, "meta" for none; ``None``: torch's default.
        overrides: other fields of the family's configuration.

    Raises:
        ScanLMError: an unknown model, family or field (with the nearest), a field out of range, or
            a package that is missing.
    """
    import torch

    entry = load_entry(entry)
    if entry.family not in _FAMILIES:
        raise ScanLMError(
            f"model {entry.id!r} is of unknown family {entry.family!r}."
            f"{nearest(entry.family, _FAMILIES)}"
        )
    fields = {**entry.config, **overrides}
    if vocab_size is not None:
        fields["vocab_size"] = vocab_size
    place = torch.device(device) if device is not None else None
    with place or nullcontext():
        try:
            return _FAMILIES[entry.family](fields, place)
        except ScanLMError:
            raise
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            raise ScanLMError(
                f"model {entry.id!r} needs the package {package!r}, which is not installed: "
                f"pip install {package}"
            ) from error
        except ImportError as error:  # transformers has a sentence for each package that it wants
            raise ScanLMError(f"model {entry.id!r} cannot be built: {_last_line(error)}") from error
        # layers check their sizes in ways of their own
        except (TypeError, ValueError) as error:
            raise ScanLMError(f"model {entry.id!r} cannot be built: {_last_line(error)}") from error
        except KeyError as error:  # a name that a table of the family lacks, as of activations
            raise ScanLMError(
                f"model {entry.id!r} cannot be built of {fields}: unknown name {error}"
            ) from error
        except torch.OutOfMemoryError:
            raise
        # of sizes beyond what torch can hold; such an error names no field
        except (ArithmeticError, LookupError, RuntimeError) as error:
            raise ScanLMError(
                f"model {entry.id!r} cannot be built of {fields}: {_last_line(error)}"
            ) from error


def count_parameters(entry: str | Path | ModelEntry) -> int:
    """Trainable numbers of a model, a tied embedding counted once; no memory is taken."""
    return sum(p.numel() for p in build_model(entry, device="meta").parameters())


def change_config(model: str | Path, changes: Mapping[str, Any]) -> ModelEntry:
    """The entry of a model with other values in its configuration.

    Args:
        model: registry id, or path of a YAML file.
        changes: ``config.<field>`` and value, as ``resolve_settings`` takes them.

    Raises:
        ScanLMError: an unknown model or field (with the nearest), something else than a field of
            the configuration, or a model that cannot be built with these values.
    """
    entry = load_entry(model)
    if not changes:
        return entry
    for key in changes:
        if not key.startswith("config."):
            raise ScanLMError(
                f"{key!r} is no field of a model: expected config.<field>=value, e.g. "
                "config.tie_word_embeddings=true"
            )
    try:
        fields = resolve_settings(str(model), None, changes).config
    except ScanLMError as error:
        raise ScanLMError(f"model {entry.id!r}: {error}") from error
    changed = entry.model_copy(update={"config": {**entry.config, **fields}})
    build_model(changed, device="meta")
    return changed


def config_differences(entry: ModelEntry) -> dict[str, Any]:
    """The fields of a model's configuration that are not its family's defaults.

    What the vocabulary decides (its size, ids of special tokens) is left out. All other fields are
    there if the family cannot be built from its defaults.
    """
    try:
        defaults = _default_config(_FAMILIES[entry.family])
    # a family of one's own may need fields, a package, or anything
    except Exception:
        defaults = None
    unknown = object()
    return {
        name: value
        for name, value in entry.config.items()
        if name not in ("vocab_size", *TOKEN_IDS) and getattr(defaults, name, unknown) != value
    }


@cache
def _default_config(build: Build) -> PretrainedConfig:
    import torch

    meta = torch.device("meta")
    with meta:
        return build({}, meta).config


def register_family(name: str, build: Build) -> None:
    """Make ``family: name`` known.

    Args:
        name: as YAML files write it.
        build: takes the configuration's fields (a dict) and the device (``None``: the default,
            which is set either way) and returns the model. ``make_config`` refuses unknown fields.
    """
    _FAMILIES[name] = build


def make_config(kind: type[PretrainedConfig], fields: Mapping[str, Any]) -> Any:
    """A configuration of transformers, which itself would take any name.

    The ids of special tokens that a smaller vocabulary does not hold become ``None``.

    Raises:
        ScanLMError: an unknown field (with the nearest), a size that is not positive, or a value
            that the class refuses.
    """
    from scanlm.config import check_fields

    defaults = kind()
    check_fields(defaults, fields, ())
    for name, expected in SIZES.items():
        value: Any = fields.get(name)
        if is_number(value) and value <= 0:
            raise ScanLMError(f"{name} must be {expected}, got {value!r}")
    fields = dict(fields)
    size = fields.get("vocab_size", defaults.vocab_size)
    for name in TOKEN_IDS:
        token = fields.get(name, getattr(defaults, name, None))
        if isinstance(token, int) and isinstance(size, int) and token >= size:
            fields[name] = None
    try:
        return kind(**fields)
    except ScanLMError:
        raise
    # the strict dataclasses of transformers 5 raise errors of their own
    except Exception as error:
        raise ScanLMError(f"{kind.__name__}: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    """What an error of several lines says in the end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().removeprefix("TypeError: ")


def _ids() -> list[str]:
    return sorted(path.stem for path in REGISTRY.glob("*.yaml"))


def _read(path: Path) -> ModelEntry:
    if not path.is_file():
        raise ScanLMError(f"no file {str(path)!r}: expected a registry id or a model's YAML file")
    values = read_mapping(path)
    unknown = next((name for name in values if name not in ModelEntry.model_fields), None)
    if unknown is not None:
        raise ScanLMError(
            f"{path}: unknown field {unknown!r}.{nearest(unknown, ModelEntry.model_fields)}"
        )
    try:
        entry = ModelEntry(**values)
        TrainingSettings(**{**entry.training, "model": entry.id})
    except ValidationError as error:
        raise ScanLMError(f"{path}: {first_mistake(error, ModelEntry)}") from error
    except ScanLMError as error:
        raise ScanLMError(f"{path}: training: {error}") from error
    return entry


def _scanlm(fields: dict[str, Any], device: torch.device | None) -> PreTrainedModel:
    from scanlm.config import ScanLMConfig
    from scanlm.model import ScanLMForCausalLM

    return ScanLMForCausalLM(make_config(ScanLMConfig, fields))


def _gpt2(fields: dict[str, Any], device: torch.device | None) -> PreTrainedModel:
    from transformers import GPT2Config

    from scanlm.causal_gpt2 import CausalGPT2LMHeadModel

    return CausalGPT2LMHeadModel(make_config(GPT2Config, fields))


def _window_gpt2(fields: dict[str, Any], device: torch.device | None) -> PreTrainedModel:
    from scanlm.window import WindowGPT2Config, WindowGPT2LMHeadModel

    return WindowGPT2LMHeadModel(make_config(WindowGPT2Config, fields))


def _mamba2(fields: dict[str, Any], device: torch.device | None) -> PreTrainedModel:
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    from scanlm.fused import no_kernel_advice
    from scanlm.mamba2 import use_matrix_form

    no_kernel_advice()
    config = make_config(Mamba2Config, fields)
    if config.num_heads % config.n_groups:
        raise ScanLMError(
            f"num_heads={config.num_heads} is not divisible by n_groups={config.n_groups}: every "
            "group serves equally many heads; change one of the two"
        )
    # done here and not by transformers, which would rescale loaded weights again
    rescale, config.rescale_prenorm_residual = config.rescale_prenorm_residual, False
    model: Any = Mamba2ForCausalLM(config)
    if rescale:
        with torch.no_grad():
            for block in model.backbone.layers:
                block.mixer.out_proj.weight.div_(config.num_hidden_layers**0.5)
    use_matrix_form(model)
    return model


def _linear(model_type: str) -> Build:
    """A family with fused kernels on a GPU and plain torch elsewhere."""

    def build(fields: dict[str, Any], device: torch.device | None) -> PreTrainedModel:
        from scanlm import fused

        # checked against the plain configuration, so that the answer is the same everywhere
        config = make_config(fused.plain_classes(model_type)[0], fields)
        return fused.build(model_type, config, device)

    return build


_FAMILIES: dict[str, Build] = {
    "scanlm": _scanlm,
    "gpt2": _gpt2,
    "window_gpt2": _window_gpt2,
    "gla": _linear("gla"),
    "gated_deltanet": _linear("gated_deltanet"),
    "mamba2": _mamba2,
}
