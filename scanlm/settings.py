"""Settings of a training run, and how presets, registry and command line make them up.

The defaults are the original's table (20 epochs of WikiText-103 at 64 x 512 tokens a step). A later
source wins: defaults, the registry entry's ``training``, the preset, explicit values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from scanlm.errors import ScanLMError, check_name, nearest
from scanlm.records import check_folder_name
from scanlm.values import format_value

# settings that cannot change a result: a run is found again whatever they are
OPERATIONAL = ("root", "cache_dir", "num_workers", "keep_checkpoints", "tensorboard", "wandb")
# rates of a model of transformers that a run's one dropout sets
DROPOUT_FIELDS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


class TrainingSettings(BaseModel):
    """Everything that decides a training run; unknown names and wrong values are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = "scanlm_base_c64"  # registry id, or path of a YAML file
    config: dict[str, Any] = Field(default_factory=dict)  # overrides of the model's configuration
    corpus: str = "wikitext-103"  # name or path, see scanlm.data.load_corpus
    tokenizer: str | None = None  # None: the corpus' default
    seq_len: int = Field(default=512, ge=1)  # tokens a block; blocks are independent
    # a block goes on from the state of the one before it in its stream (scanlm.streams)
    carry_state: bool = False
    reset_every: int | None = Field(default=None, ge=1)  # blocks; None: where the stream ends
    batch_size: int = Field(default=64, ge=1)  # blocks an optimiser step, over all ranks and parts
    gradient_accumulation: int = Field(default=1, ge=1)  # parts that a step's batch is cut into
    steps: int = Field(default=62900, ge=1)  # optimiser steps
    lr: float = Field(default=1e-3, gt=0)  # peak learning rate
    warmup_steps: int = Field(default=1000, ge=0)  # linear; capped at a tenth of steps
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)  # end of the cosine, as a part of lr
    weight_decay: float = Field(default=0.01, ge=0)  # of matrices; not embeddings, norms, biases
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0)  # 0: no clipping
    dropout: float | None = Field(default=None, ge=0, lt=1)  # None: the model's own
    seed: int = Field(default=0, ge=0, lt=2**32)  # of initial weights, dropout and data order
    # auto: bf16 where a GPU computes in it, else fp32
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # the residual stream of scan models and GPT-2 in bf16 where products are, not in fp32
    half_residual: bool = True
    tf32: bool = False  # fp32 products in TF32 on a GPU
    compile: bool = False  # torch.compile
    fsdp: bool = False  # several ranks share weights, gradients and moments out; else DDP
    eval_every: int = Field(default=1000, ge=1)  # steps
    eval_tokens: int | None = Field(default=None, ge=2)  # on the way; the end scores all tokens
    log_every: int = Field(default=50, ge=1)  # steps
    save_every: int = Field(default=1000, ge=1)  # steps
    keep_checkpoints: int = Field(default=2, ge=1)  # the latest ones, and the best besides
    num_workers: int = Field(default=0, ge=0)  # processes that load data
    tensorboard: bool = False
    wandb: bool = False  # offline unless WANDB_API_KEY is set; never asks
    experiment: str | None = Field(default=None, examples=["my_runs"])  # None: the corpus' name
    root: str = "data/runs"
    cache_dir: str = "data/cache"

    @model_validator(mode="after")
    def _divisible(self) -> TrainingSettings:
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by gradient_accumulation="
                f"{self.gradient_accumulation}: batch_size counts all parts of a step"
            )
        if self.fsdp:
            for name in ("compile", "carry_state"):
                if getattr(self, name):
                    raise ValueError(f"fsdp=true and {name}=true do not go together: choose one")
        if self.reset_every is not None and not self.carry_state:
            raise ValueError(
                f"reset_every={self.reset_every} needs carry_state=true: blocks are independent"
            )
        rate = next((name for name in self.config if str(name).endswith("_pdrop")), None)
        if self.dropout is not None and rate is not None:
            raise ValueError(
                f"dropout={self.dropout} sets all rates of the model, and config.{rate}="
                f"{self.config[rate]!r} is one of them: leave one of the two out"
            )
        return self

    def __init__(self, **values: Any) -> None:
        unknown = next((name for name in values if name not in type(self).model_fields), None)
        if unknown is not None:
            raise ScanLMError(
                f"unknown setting {unknown!r}.{nearest(unknown, type(self).model_fields)}"
            )
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise first_mistake(error, type(self)) from error
        if self.experiment is not None:
            check_folder_name("experiment", self.experiment)

    @property
    def warmup(self) -> int:
        """Warm-up steps; a short run warms up over a tenth of its steps."""
        return min(self.warmup_steps, max(self.steps // 10, 1))

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.steps * self.batch_size * self.seq_len

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result; ``seed`` and ``model`` are named beside them."""
        left_out = {*OPERATIONAL, "seed", "model", "experiment"}
        return {k: v for k, v in self.model_dump().items() if k not in left_out}


PRESETS: dict[str, dict[str, Any]] = {
    # the defaults are the original's values; a registry entry may have its own, e.g. lr
    "paper": {"corpus": "wikitext-103", "tokenizer": "gpt2"},
    "laptop": {
        "corpus": "wikitext-2",
        "tokenizer": "bpe:4096",
        "seq_len": 256,
        "batch_size": 16,
        "steps": 3000,
        "warmup_steps": 100,
        "eval_every": 250,
        "save_every": 250,
        "eval_tokens": 65536,
    },
    "smoke": {
        "corpus": "embedded",
        "seq_len": 128,
        "batch_size": 8,
        "steps": 20,
        "warmup_steps": 2,
        "lr": 3e-3,
        "eval_every": 10,
        "log_every": 5,
        "save_every": 10,
        "eval_tokens": 4096,
    },
    # chosen where the corpus is "embedded" and no preset is named: minutes on two CPU cores
    "embedded": {
        "corpus": "embedded",
        "seq_len": 256,
        "batch_size": 16,
        "steps": 800,
        "warmup_steps": 50,
        "lr": 3e-3,
        "eval_every": 200,
        "log_every": 20,
        "save_every": 200,
        "eval_tokens": 16384,
    },
}


def resolve_settings(
    model: str, preset: str | None = None, overrides: Mapping[str, Any] | None = None
) -> TrainingSettings:
    """The settings of a run.

    Args:
        model: registry id, or path of a YAML file.
        preset: one of ``PRESETS``.
        overrides: ``lr`` or ``training.lr`` for a setting, ``config.chunk_size`` for a field of
            the model's configuration (``scanlm.values`` reads them from a command line); ``config``
            holds several fields, and ``config.<field>`` wins over it.

    Raises:
        ScanLMError: an unknown model, preset or key (with the nearest), or a value out of range.
    """
    from scanlm.baselines import load_entry

    entry = load_entry(model)
    if preset is not None:
        check_name("preset", preset, PRESETS)
    explicit: dict[str, Any] = {}
    config: dict[str, Any] = {}
    fields: Any = {}
    for key, value in (overrides or {}).items():
        place, dot, name = key.partition(".")
        if key == "config":
            fields = value
        elif not dot:
            explicit[key] = value
        elif place == "training":
            explicit[name] = value
        elif place == "config":
            config[name] = value
        else:
            raise ScanLMError(f"unknown setting {key!r}.{nearest(place, ('training', 'config'))}")
    if "model" in explicit:
        raise ScanLMError(f"model={explicit['model']!r} is no setting: name the model itself")
    if preset is None and explicit.get("corpus", entry.training.get("corpus")) == "embedded":
        preset = "embedded"
    chosen = PRESETS[preset] if preset is not None else {}
    merged = {**entry.training, **chosen, **explicit, "model": str(model)}
    if not isinstance(fields, Mapping):
        raise ScanLMError(f"config={fields!r}: expected fields of the model and their values")
    config = {**fields, **config}
    _check_config_keys(entry, config)
    return TrainingSettings(**merged, **({"config": config} if config else {}))


def _check_config_keys(entry: Any, config: Mapping[str, Any]) -> None:
    """Refuse fields that the model's configuration does not have."""
    if not config:
        return
    from transformers import PretrainedConfig

    from scanlm.baselines import build_model

    known = set(build_model(entry, device="meta").config.to_dict()) | set(entry.config)
    # those that every model of transformers has say nothing of this one
    shown = known - set(PretrainedConfig().to_dict())
    for name in config:
        if name not in known:
            raise ScanLMError(f"unknown setting 'config.{name}'.{nearest(str(name), shown)}")


# by pydantic's names of its errors, where its own words are those of Python
_EXPECTED = (
    dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "an integer")
    | dict.fromkeys(("float_type", "float_parsing"), "a number")
    | dict.fromkeys(("bool_type", "bool_parsing"), "true or false")
    | dict.fromkeys(("tuple_type", "list_type"), "a list")
    | dict.fromkeys(("dict_type", "model_type"), "names and their values")
    | {"string_type": "text", "string_too_short": "some text"}
    | {"string_pattern_mismatch": "letters, digits, '.', '_' or '-'"}
)


def first_mistake(error: ValidationError, kind: type[BaseModel]) -> ScanLMError:
    """The first wrong value as an error of one line: its name, the value, what is expected.

    Args:
        error: what pydantic raised.
        kind: whose field it is; the field's first example, else its default, is shown.
    """
    first = error.errors()[0]
    context, loc = first.get("ctx", {}), first["loc"]
    if isinstance(own := context.get("error"), ValueError):  # of a check of ours
        return ScanLMError(str(own))
    where = ".".join(map(str, loc))
    if first["type"] == "extra_forbidden":
        return ScanLMError(f"unknown setting {where!r}.{nearest(str(loc[-1]), kind.model_fields)}")
    name = next((part for part in reversed(loc) if isinstance(part, str)), "")
    field = kind.model_fields.get(name)
    examples = (field.examples or [field.default]) if field is not None else [None]
    example = ""
    if examples[0] not in (None, PydanticUndefined, {}):
        below = where.rpartition(name)[0]  # an entry of a list is shown with all of it
        example = f", e.g. {below}{name}={format_value(examples[0])}"
    if first["type"] == "missing":
        return ScanLMError(f"{where} is missing: give its value{example}")
    value = f"{where}={first['input']!r:.60}"
    if first["type"] == "too_short":
        return ScanLMError(f"{value}: expected at least {context['min_length']} entry{example}")
    if first["type"] == "string_type":  # what reads like a number has to be quoted
        quoted = format_value(str(first["input"]))
        example = f", e.g. {where}={quoted} (with --set in further quotes)"
    said = first["msg"].removeprefix("Input should be ")
    if said.startswith(("greater", "less")):
        said = f"a value {said}"
    return ScanLMError(f"{value}: expected {_EXPECTED.get(first['type'], said)}{example}")
