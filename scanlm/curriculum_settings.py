"""What a state-tracking run does: its model, its stages and how each is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from itertools import pairwise
from operator import not_
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from scanlm.errors import ScanLMError, check_name
from scanlm.groups import get_group
from scanlm.length_evaluation import LENGTHS, check_counts
from scanlm.settings import first_mistake
from scanlm.values import parse_assignments

TOKENS_PER_BATCH, LARGEST_BATCH = 4096, 1024
Beta = Annotated[float, Field(ge=0, lt=1)]


class Stage(BaseModel):
    """One length of the curriculum.

    The stage ends when validation passes ``threshold`` or after ``max_steps``; with
    ``threshold=None`` it always runs its steps, which a learning-rate decay needs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    length: int = Field(examples=[4])
    max_steps: int = Field(ge=1, examples=[6000])
    lr: float = Field(gt=0, examples=[1e-4])
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up, to 0
    warmup: int = Field(default=200, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    # of the scan model's T1: greatest size of the noise in its outputs, as a share of their norm,
    # which stays as it is. Each output gets a size of its own, so that T1 learns to read weakened
    # states and to write whole ones
    state_noise: float = Field(default=0.0, ge=0)
    # of the scan model: the stage begins with T2's weights in T1. After words of 2, T2 multiplies
    # a prefix, which is a leaf, by a leaf; that is what T1 has to learn, in the codes of leaves.
    # Where it is not used it is no part of a record, whose id so stays what it was
    t1_from_t2: bool = Field(default=False, exclude_if=not_)
    # share of the training words whose letters but the first are the group's generators, which
    # change a product least; validation has words of all elements
    generators: float = Field(default=0.0, ge=0, le=1, exclude_if=not_)
    batch_size: int | None = Field(default=None, ge=1)  # default: min(1024, 4096 / length)
    threshold: float | None = 0.98
    # what the threshold is compared with: the worst position's accuracy, or that of whole words
    criterion: Literal["worst_position", "sequence"] = "worst_position"

    @property
    def batch(self) -> int:
        """Words a step."""
        return self.batch_size or max(min(LARGEST_BATCH, TOKENS_PER_BATCH // self.length), 1)


class StateTrackingSettings(BaseModel):
    """All that decides a run's result; two runs of equal settings give the same model.

    ``model`` is "scan" (then ``config`` overrides fields of ``ScanLMConfig``) or the id of a
    registered comparison model (then ``config`` overrides fields of its configuration). The
    vocabulary is always the group's order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = "scan"
    config: dict[str, Any] = {}
    group: str = "S5"
    stages: tuple[Stage, ...] = Field(
        min_length=1, examples=[[{"length": 4, "max_steps": 6000, "lr": 1e-4}]]
    )
    seed: int = Field(default=0, ge=0, lt=2**32)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"  # "bf16": autocast, and float32 weights
    stories: int | None = Field(default=None, ge=1)  # fixed words repeated for epochs
    ema: float = Field(default=0.0, ge=0, lt=1)  # decay of the averaged weights; 0: none

    # for the scan model alone: what makes T1 repair its inputs
    dropout_in: Literal["all", "t1", "t2"] = "all"
    # share of the batch whose prefixes are folded leaf by leaf (a tree as deep as it is long)
    left_fold: float = Field(default=0.0, ge=0, lt=1)
    fold_from_length: int = Field(default=1, ge=1)

    compile: bool = False  # the model's parts, by torch.compile: see scanlm.compiling
    validation_sequences: int = Field(default=1024, ge=1)
    log_every: int = Field(default=100, ge=1)  # steps between records, and validations
    eval_lengths: tuple[int, ...] = LENGTHS
    eval_sequences: int = Field(default=10_000, ge=1)
    eval_long_sequences: int = Field(default=500, ge=1)
    eval_precisions: tuple[Literal["fp32", "bf16"], ...] = Field(("fp32", "bf16"), min_length=1)
    eval_batch_tokens: int = Field(default=2**17, ge=1)
    # length and number of the words whose prefix states are probed (scan model; 0: not)
    eval_probe_length: int = Field(default=512, ge=0)
    eval_probe_words: int = Field(default=128, ge=1)

    @field_validator("group")
    @classmethod
    def _canonical(cls, name: str) -> str:
        """A group has one name in records, however it was written."""
        return get_group(name).name

    @property
    def experiment(self) -> str:
        """The name that records are filed under: the group's, in lower case."""
        return self.group.lower()

    def check(self) -> None:
        """Refuse what no run could do.

        Raises:
            ScanLMError: length below 1, a threshold outside (0, 1], stages that do not grow, fewer
                stories than a batch, no length to evaluate, a vocabulary or rate of dropout that
                the model cannot have.
        """
        self._check_config()
        check_counts(self.eval_lengths, "eval_lengths")
        lengths = [stage.length for stage in self.stages]
        if min(lengths) < 1:
            raise ScanLMError(f"stage length must be at least 1, got {min(lengths)}")
        if any(later <= earlier for earlier, later in pairwise(lengths)):
            raise ScanLMError(
                f"stages must grow in length, got {lengths}: order them and merge equal lengths"
            )
        for stage in self.stages:
            if stage.threshold is not None and not 0 < stage.threshold <= 1:
                raise ScanLMError(
                    f"threshold={stage.threshold} at length {stage.length} is outside (0, 1]: it "
                    "is a share of right answers; null runs the whole step budget"
                )
            if self.stories is not None and self.stories < stage.batch:
                raise ScanLMError(
                    f"stories={self.stories} are fewer than the batch of {stage.batch} at length "
                    f"{stage.length}: use more stories or a smaller batch_size"
                )
        if self.stories is not None and any(stage.generators for stage in self.stages):
            raise ScanLMError(
                f"stories={self.stories} are words of all elements, fixed before training: leave "
                "out the stages' generators"
            )
        if self.model != "scan":
            used = [
                name
                for name in ("left_fold", "dropout_in")
                if getattr(self, name) != type(self).model_fields[name].default
            ]
            used += [
                name
                for name in ("state_noise", "t1_from_t2")
                if any(getattr(stage, name) for stage in self.stages)
            ]
            if used:
                raise ScanLMError(
                    f"{used[0]} acts on T1, which model {self.model!r} has not: leave it out or "
                    'use model="scan"'
                )

    def _check_config(self) -> None:
        if "vocab_size" in self.config:
            raise ScanLMError(
                f"config.vocab_size={self.config['vocab_size']!r}: the vocabulary is always the "
                "group's order: leave it out"
            )
        for name, rate in self.config.items():
            if name.endswith("_pdrop") and not (isinstance(rate, int | float) and 0 <= rate < 1):
                raise ScanLMError(
                    f"config.{name}={rate!r} is outside [0, 1): leave it out, since training takes "
                    "the dropout of its stage"
                )


SCAN_S5 = {
    "chunk_size": 1,
    "t1_layers": 1,
    "t2_layers": 1,
    "n_embd": 768,
    "n_head": 12,
    "leaf_norm": True,
    "position_embedding": "chunk",
    # without it the second of two equal elements looks to T2 like the first
    "prefix_embedding": True,
    # GPT-2's own activation, by its fused kernel
    "activation_function": "gelu_pytorch_tanh",
}


def _grow(lengths: Iterable[int], max_steps: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"length": length, "max_steps": max_steps, **fields} for length in lengths]


def _begin(max_steps: int, lr: float) -> list[dict[str, Any]]:
    """Lengths 2 to 4: T2 learns products that generators make easy, and T1 begins with them."""
    two, three, four = _grow((2, 3, 4), max_steps, lr=lr)
    return [two | {"generators": 0.5}, three | {"t1_from_t2": True}, four]


PRESETS: dict[str, dict[str, Any]] = {
    # slow at first; then noise on T1's outputs and late dropout, by which T1 learns to repair what
    # it is given; then a decay to 0
    "paper": {
        "config": SCAN_S5,
        "compile": True,
        "stages": [
            *_begin(15_000, lr=1e-4),
            *_grow((6, 8), 6_000, lr=1e-4, state_noise=1.0),
            *_grow((12,), 6_000, lr=3e-4, dropout=0.2, state_noise=1.0),
            *_grow(
                (16,),
                15_000,
                lr=3e-4,
                dropout=0.2,
                state_noise=1.0,
                schedule="linear",
                threshold=None,
            ),
        ],
    },
    # the original's words and batches: 100,000 words of each length, ten epochs of batches of 32;
    # positions over the sequence, no norm on the leaves, a T1 that its code masked causally. Its
    # stages ended on a loss below 0.001; the learning rate is ours
    "original": {
        "config": {
            **SCAN_S5,
            "leaf_norm": False,
            "prefix_embedding": False,
            "position_embedding": "absolute",
            "n_positions": 1024,
            "t1_causal": True,
        },
        "stages": _grow((4, 8, 12, 16), 31_250, lr=1e-4, dropout=0.1, batch_size=32),
        "stories": 100_000,
    },
    # the same for S4 and a CPU
    "laptop": {
        "config": {**SCAN_S5, "n_embd": 128, "n_head": 4},
        "group": "S4",
        "precision": "fp32",
        "eval_lengths": [n for n in LENGTHS if n <= 512],
        "eval_sequences": 1000,
        "eval_precisions": ["fp32"],
        "eval_batch_tokens": 2**14,
        "eval_probe_length": 256,
        "stages": [
            *_begin(6_000, lr=5e-4),
            *_grow((6,), 6_000, lr=5e-4, state_noise=1.0),
            *_grow(
                (8,),
                2_000,
                lr=5e-4,
                dropout=0.2,
                state_noise=1.0,
                schedule="linear",
                threshold=None,
            ),
        ],
    },
    "smoke": {
        # so narrow, the usual scale of the weights leaves the plateau too late
        "config": {**SCAN_S5, "n_embd": 64, "n_head": 4, "initializer_range": 0.2},
        "group": "Z2",
        "precision": "fp32",
        "log_every": 25,
        "validation_sequences": 256,
        "eval_lengths": [4, 8, 16, 32, 64],
        "eval_sequences": 200,
        "eval_precisions": ["fp32"],
        "eval_batch_tokens": 2**13,
        "eval_probe_length": 0,
        "stages": [
            *_grow((2, 3), 1500, lr=1e-3, warmup=50, batch_size=256),
            *_grow(
                (4,), 600, lr=1e-3, warmup=50, batch_size=256, schedule="linear", threshold=None
            ),
        ],
    },
}


def make_settings(values: dict[str, Any]) -> StateTrackingSettings:
    """Checked settings from plain values.

    Raises:
        ScanLMError: one line that names the first wrong value; unknown names get the nearest.
    """
    try:
        settings = StateTrackingSettings(**values)
    except ValidationError as error:
        loc = error.errors()[0]["loc"]
        of_stage = loc[0] == "stages" and len(loc) > 1
        raise first_mistake(error, Stage if of_stage else StateTrackingSettings) from None
    settings.check()
    return settings


def preset_settings(
    preset: str, overrides: Mapping[str, Any] | Iterable[str] = (), **values: Any
) -> StateTrackingSettings:
    """A preset with changes.

    Args:
        preset: "paper", "original", "laptop" or "smoke".
        overrides: values by dotted keys, or ``key=value`` texts: ``ema=0.999``,
            ``config.n_embd=128``, ``stages.-1.max_steps=30000`` (a stage by index),
            ``stages.*.dropout=0`` (all). Whole settings (no dot) are set before parts of them.
            Another ``model`` than "scan" starts from its own configuration, not the preset's.
        values: whole settings by name, e.g. ``seed=1``.

    Raises:
        ScanLMError: unknown preset or setting, a value out of range.
    """
    check_name("preset", preset, PRESETS)
    changes = overrides if isinstance(overrides, Mapping) else parse_assignments(overrides)
    plain = deepcopy(PRESETS[preset]) | values
    if changes.get("model", plain.get("model", "scan")) != "scan" and "config" not in values:
        plain["config"] = {}  # the preset's is the scan model's
    for key, value in sorted(changes.items(), key=lambda change: "." in change[0]):
        _assign(plain, key.split("."), deepcopy(value), f"{key}={value!r:.60}")
    return make_settings(plain)


def _how_to_set(entries: list[Any], place: str) -> str:
    if all(isinstance(entry, dict) for entry in entries):
        return f"name a field of the stage: stages.{place}.lr"
    return "this list is set as a whole"


def _assign(target: Any, path: list[str], value: Any, override: str) -> None:
    head, rest = path[0], path[1:]
    if isinstance(target, list):
        try:
            entries = target if head == "*" else [target[int(head)]]
        except (ValueError, IndexError):
            raise ScanLMError(
                f"{override!r}: no stage {head!r}; use 0 to {len(target) - 1}, -1 or *"
            ) from None
        if not rest:
            raise ScanLMError(f"{override!r}: {_how_to_set(target, head)}")
        for entry in entries:
            _assign(entry, rest, value, override)
    elif not isinstance(target, dict) or not head:
        raise ScanLMError(f"{override!r}: {head!r} is not inside a group of settings")
    elif rest:
        _assign(target.setdefault(head, {}), rest, value, override)
    else:
        target[head] = value
