"""A model and its tokenizer from any kind of checkpoint.

A run folder (``run.json``, ``checkpoint-N/``), one of its checkpoints, a Hugging Face folder, a
name on the Hugging Face hub, or a distributed checkpoint of PyTorch (``scanlm.dcp``). What is
loaded is whole, or nothing is: every tensor of the model was in the file with the right shape, the
file held no other, and none holds NaN.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging

from scanlm.dcp import check_fit, convert, is_dcp, one_line
from scanlm.errors import ScanLMError, nearest

FLA_TYPES = ("gla", "gated_deltanet")
NAMED_STEPS = ("best", "latest")  # of a run, beside the numbers
_STEP = re.compile(r"(?:checkpoint|step)-(\d+)(?:-hf)?")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        model: in evaluation mode.
        tokenizer: the one saved with it, or else the one its run names; ``None`` if neither is.
        step: training step, if it is known.
        path: the Hugging Face folder, or the hub name, that the weights came from.
        run: the record (``run.json``) of the run that made it, or ``None``.
        run_folder: the folder of that run.
        name: what to call the model: its run's model, else the folder's or hub name.
    """

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    step: int | None
    path: Path | str
    run: dict[str, Any] | None = field(repr=False)
    run_folder: Path | None
    name: str


def load_checkpoint(
    path_or_name: str | Path,
    step: int | str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    config: str | Path | None = None,
    cache_dir: str | Path = "data/cache",
) -> Loaded:
    """Load any kind of checkpoint.

    Args:
        path_or_name: see above.
        step: which of a run's checkpoints: its step, "latest" (the default) or "best".
        device: where to put the model; default the CPU.
        dtype: of the weights; default as they are stored.
        config: for a distributed checkpoint: its ``config.json`` or the folder of that.
        cache_dir: where tokenizers are kept that a run names and does not hold.

    Raises:
        ScanLMError: nothing there, no such step (the message lists those there are), weights of
            another model or vocabulary, a truncated file, NaN weights, a DCP without ``config``.
    """
    location = Path(path_or_name).expanduser()
    if location.exists():
        folder: Path | str = hf_folder(resolve(location, step), config)
    elif _HUB_NAME.fullmatch(str(path_or_name)) and not str(path_or_name).startswith("."):
        if step is not None:
            raise ScanLMError(
                f"{str(path_or_name)!r} is no folder: only a run folder has steps to choose from"
            )
        folder = str(path_or_name)
    else:
        raise _no_such_folder(location)
    with _quiet():
        model = _load_model(folder, dtype, device)
    check_finite(model, str(folder))
    run_folder = _run_folder(folder)
    run = _read_run(run_folder) if run_folder else None
    named = Path(folder).parent if _STEP.fullmatch(Path(folder).name) else Path(folder)
    return Loaded(
        model=model.to(device).eval() if device is not None else model.eval(),
        tokenizer=_load_tokenizer(folder, run_folder, run, cache_dir),
        step=_step(Path(folder)),
        path=folder,
        run=run,
        run_folder=run_folder,
        name=str(run["model"]) if run and "model" in run else (named.name or str(folder)),
    )


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """The checkpoints of a run folder, by step in ascending order; DCP folders included."""
    folder = Path(folder)
    found: dict[int, Path] = {}
    for place in (folder, folder / "checkpoint"):
        for child in sorted(place.iterdir()) if place.is_dir() else ():
            number = _step(child)
            usable = is_dcp(child) or (child / "config.json").is_file()
            if number is not None and usable and not child.name.endswith("-hf"):
                found[number] = child
    return dict(sorted(found.items()))


def resolve(folder: Path, step: int | str | None = None) -> Path:
    """The folder of one checkpoint, given that or the folder of a run.

    Raises:
        ScanLMError: no checkpoint there, or not of this step.
    """
    steps = checkpoints(folder) if folder.is_dir() else {}
    single = not steps and (is_dcp(folder) or (folder / "config.json").is_file())
    if single:
        if step in (None, *NAMED_STEPS, _step(folder)):
            return folder
        raise ScanLMError(f"{folder} is a single checkpoint: step={step} cannot be chosen from it")
    if not steps:
        raise _no_checkpoint(folder)
    if step is None or step == "latest":
        return steps[max(steps)]
    if step == "best":
        return steps[_best_step(folder, steps)]
    if step not in steps:
        listed = ", ".join(map(str, steps))
        raise ScanLMError(f"no checkpoint of step {step} in {folder}: it has {listed}")
    return steps[int(step)]


def hf_folder(folder: Path, config: str | Path | None = None) -> Path:
    """The Hugging Face folder of one checkpoint: itself, or that of a DCP, converted once."""
    if not is_dcp(folder):
        if config is not None:
            raise ScanLMError(
                f"{folder} is a Hugging Face folder and has its own config.json: leave config out"
            )
        return folder
    if config is None and (folder / "config.json").is_file():
        config = folder
    if config is None:
        return convert(folder, None, None)
    build, text = _builder(config)
    with _quiet():
        return convert(folder, build, text)


def check_finite(model: torch.nn.Module, where: str) -> None:
    """Refuse weights with NaN or infinities.

    Raises:
        ScanLMError: names the first tensor and how many of its values are wrong.
    """
    for name, tensor in model.named_parameters():
        wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
        if wrong:
            raise ScanLMError(
                f"the weights in {where} hold NaN or infinities: {wrong} of {tensor.numel()} "
                f"values of {name}; training diverged: use an earlier checkpoint"
            )


def register_family(model_type: str, device: str | torch.device | None = None) -> None:
    """Make transformers' Auto classes know the comparison models that transformers does not have.

    Args:
        model_type: as ``config.json`` has it.
        device: where the model will run: on a GPU fused kernels are used if they are installed;
            ``None``: on a GPU if there is one.
    """
    if model_type in FLA_TYPES:
        from scanlm.fused import classes

        classes(model_type, None if device is None else torch.device(device))
    elif model_type == "window_gpt2":
        import_module("scanlm.window")
    elif model_type == "mamba2":
        from scanlm.fused import no_kernel_advice

        no_kernel_advice()


def _load_model(
    folder: Path | str, dtype: torch.dtype | None, device: str | torch.device | None
) -> Any:
    where = str(folder)
    if isinstance(folder, Path):
        _check_files(folder)
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    auto: Any = AutoModelForCausalLM  # its annotation leaves out output_loading_info
    try:
        described, _ = PretrainedConfig.get_config_dict(folder)
        register_family(str(described.get("model_type")), device)
        config = AutoConfig.from_pretrained(folder)
        model, info = auto.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except ScanLMError:
        raise
    # loaders raise whatever their file readers and HTTP clients do
    except Exception as error:
        raise _cannot_load(folder, error) from error
    check_fit(
        where,
        config.model_type,
        info["missing_keys"],
        info["unexpected_keys"],
        info["mismatched_keys"],
    )
    if config.model_type == "mamba2":
        from scanlm.mamba2 import use_matrix_form

        use_matrix_form(model)
    return model


def _check_files(folder: Path) -> None:
    """Refuse damaged files before a loader meets them."""
    _model_type(folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not list(folder.glob("*.bin")):
        raise ScanLMError(
            f"{folder} has a config.json and no weights: model.safetensors is missing; copy the "
            "whole folder again"
        )
    for file in weights:
        if reason := damage(file):
            raise ScanLMError(
                f"{file} is truncated or damaged ({reason}): copy it again or use another "
                "checkpoint"
            )


def damage(file: Path) -> str:
    """What is wrong with a file of a checkpoint; empty if nothing is to be seen from outside."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        # what torch.save writes is a ZIP archive, whose directory stands at its end
        elif file.suffix in (".pt", ".pth") and not is_zipfile(file):
            return f"{file.stat().st_size} bytes"
    except (ValueError, SafetensorError) as error:
        return f"{file.stat().st_size} bytes; {error}"
    return ""


def _model_type(path: Path) -> str:
    """The type of model that a ``config.json`` describes."""
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ScanLMError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ScanLMError(f"{path} names no model_type: it is not a model's configuration")
    return str(config["model_type"])


def _builder(config: str | Path) -> tuple[Any, str]:
    """How to make an empty model, and the text that decides what it is like."""
    path = Path(config).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        text, kind = path.read_text(), _model_type(path)

        def from_config() -> Any:
            register_family(kind, "cpu")  # the weights are only copied
            try:
                parsed = AutoConfig.from_pretrained(path)
                return AutoModelForCausalLM.from_config(parsed)
            except (OSError, ValueError, KeyError) as error:
                raise ScanLMError(f"cannot build a model from {path}: {one_line(error)}") from error

        return from_config, text
    raise ScanLMError(
        f"config={str(config)!r} is no file: give the config.json of the model that was "
        "trained, or its folder"
    )


def _load_tokenizer(
    folder: Path | str,
    run_folder: Path | None,
    run: dict[str, Any] | None,
    cache_dir: str | Path,
) -> Any:
    from scanlm.data import load_tokenizer

    if isinstance(folder, str):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError):  # a model without a tokenizer
            return None
    places = [folder] if run_folder is None else [folder, run_folder, run_folder / "tokenizer"]
    for place in places:
        if any((place / name).is_file() for name in _TOKENIZER_FILES):
            return load_tokenizer(place, cache_dir=cache_dir)
    spec = (run or {}).get("parameters", {}).get("tokenizer")
    if not isinstance(spec, str) or spec.startswith("bpe:"):  # a bpe needs the corpus it is from
        return None
    return load_tokenizer(spec, cache_dir=cache_dir)


def _run_folder(folder: Path | str) -> Path | None:
    if isinstance(folder, str):
        return None
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / "run.json").is_file():
            return place
    return None


def _read_run(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ScanLMError(f"{path} is not the record of a run: {error}") from error


def _best_step(folder: Path, steps: dict[int, Path]) -> int:
    """The step whose evaluation loss was lowest, as transformers' Trainer remembers it.

    That step need not have been saved: then the best of those that were, by the run's record.
    """
    state = steps[max(steps)] / "trainer_state.json"
    best = json.loads(state.read_text()).get("best_global_step") if state.is_file() else None
    if best not in steps and (folder / "metrics.jsonl").is_file():
        import pandas as pd

        from scanlm.records import read_metrics

        losses = {
            int(row["step"]): float(row["value"])
            for row in read_metrics(folder).to_dict("records")
            if (row["name"], row.get("split")) == ("loss", "validation")
            and pd.isna(row.get("position"))
        }
        best = min(steps.keys() & losses.keys(), key=losses.__getitem__, default=None)
    if best not in steps:
        raise ScanLMError(
            f"{folder} does not know its best checkpoint: choose one of the steps "
            f"{', '.join(map(str, steps))}"
        )
    return int(best)


def _step(folder: Path) -> int | None:
    match = _STEP.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def _no_checkpoint(folder: Path) -> ScanLMError:
    if (folder / "run.json").is_file():
        from scanlm.records import Run

        kind = (Run.open(folder).info.get("parameters") or {}).get("kind", "training")
        if kind != "training":
            return ScanLMError(
                f"{folder} is the record of a run of kind {kind!r}, which has no model: give the "
                "training run's folder (or, of many, their checkpoints: runs/*/checkpoint-N)"
            )
        return ScanLMError(
            f"run {folder} has no checkpoint yet (checkpoint-N): train it further, or save more "
            "often with save_every"
        )
    if folder.is_dir() and any(folder.glob("*.distcp")):
        return ScanLMError(
            f"{folder} is a distributed checkpoint without its .metadata file: it was not written "
            "to the end; use an earlier step"
        )
    return ScanLMError(
        f"{folder} holds no model: expected a run folder (run.json, checkpoint-N), a Hugging Face "
        "folder (config.json, model.safetensors) or a distributed checkpoint (.metadata)"
    )


def _no_such_folder(folder: Path) -> ScanLMError:
    siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    hint = nearest(folder.name, siblings) if siblings else ""
    return ScanLMError(
        f"no folder {str(folder)!r}: expected a run, a checkpoint, or a name on the Hugging Face "
        f"hub.{hint if 'mean' in hint else ''}"
    )


def _cannot_load(folder: Path | str, error: Exception) -> ScanLMError:
    if isinstance(folder, Path):
        return ScanLMError(f"cannot load the model in {folder}: {one_line(error)}")
    return ScanLMError(
        f"{folder!r} is neither a folder nor a model that the Hugging Face hub gives: "
        f"{one_line(error)}; check the name, the network, or train it first with `scanlm train`"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No loading bars and reports: what they warn of is an error here."""
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


__all__ = ["Loaded", "checkpoints", "load_checkpoint", "resolve"]
