"""Distributed checkpoints of PyTorch (DCP), as flame writes them, to Hugging Face folders.

``checkpoint/step-N/`` holds ``.metadata`` (a pickle: convert only checkpoints you trust) and one
``__R_I.distcp`` per process, model and optimiser in one, and no configuration of the model: that
must be given. The converted folder ``step-N-hf`` is written beside it, whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from scanlm.data.files import read_json
from scanlm.errors import ScanLMError

PREFIX = "model."  # what torchtitan calls the model beside the optimiser
SOURCE = "dcp.json"  # in the converted folder: what it was made from


def is_dcp(folder: Path) -> bool:
    """Whether a folder is one distributed checkpoint."""
    return (folder / ".metadata").is_file()


def converted_folder(folder: Path) -> Path:
    """Where the Hugging Face folder of a distributed checkpoint is written."""
    return folder.with_name(folder.name + "-hf")


def convert(folder: Path, build: Any, config_text: str | None) -> Path:
    """The checkpoint as a Hugging Face folder: made now, or the one made earlier.

    Args:
        folder: a DCP folder.
        build: makes the model to fill, ``() -> PreTrainedModel``; called only if needed.
        config_text: what ``build`` is made from, to notice another configuration; ``None`` takes
            whatever was converted earlier.

    Raises:
        ScanLMError: a damaged checkpoint, no configuration, or one of another model.
    """
    out = converted_folder(folder)
    metadata_hash = _sha256((folder / ".metadata").read_bytes())
    source = {"metadata_sha256": metadata_hash}
    if config_text is not None:
        source["config_sha256"] = _sha256(config_text.encode())
    if source.items() <= read_json(out / SOURCE).items():
        return out
    if config_text is None:
        raise ScanLMError(
            f"{folder} is a distributed checkpoint (DCP), which does not hold its model's "
            "configuration: give its config.json with config= (--config)"
        )
    model = build()
    fill(model, read_model_tensors(folder, model.state_dict()), str(folder))
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{out.name}."))
    try:
        model.save_pretrained(temporary)
        (temporary / SOURCE).write_text(json.dumps(source, indent=2) + "\n")
        temporary.chmod(0o755)
        _replace_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def read_model_tensors(folder: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors on the CPU, by the model's names; the optimiser's are not read.

    Args:
        folder: a DCP folder.
        wanted: the state dict to fill; decides whether names carry the prefix "model." or not.

    Raises:
        ScanLMError: a missing, truncated or unreadable file.
    """
    try:
        metadata = FileSystemReader(folder).read_metadata()
        names, tensors = _names(metadata, wanted), {}
        for key, entry in metadata.state_dict_metadata.items():
            if key in names and isinstance(entry, TensorStorageMetadata):
                tensors[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():  # that this is one process
            warnings.simplefilter("ignore", UserWarning)
            load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    # the reader raises whatever pickle and its own assertions do; CheckpointException, around what
    # its threads raise, is no Exception
    except (Exception, CheckpointException) as error:
        raise ScanLMError(
            f"cannot read the distributed checkpoint {folder} ({one_line(error)}): a file is "
            "missing or truncated; copy the whole folder again"
        ) from error
    return {names[key]: tensor for key, tensor in tensors.items()}


def _names(metadata: Metadata, wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """Stored name to the model's name, of every stored tensor that belongs to the model."""
    stored = [
        key
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    ]
    nested = {key: key.removeprefix(PREFIX) for key in stored if key.startswith(PREFIX)}
    if len(wanted.keys() & set(nested.values())) >= len(wanted.keys() & set(stored)):
        return nested
    return {key: key for key in stored if not key.startswith(("optimizer.", "optimizers."))}


def fill(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into the model; every one must fit, and none may be missing.

    Raises:
        ScanLMError: names the tensors that do not.
    """
    expected = model.state_dict()
    common = expected.keys() & tensors.keys()
    filled = {expected[key].data_ptr() for key in common}
    check_fit(
        where,
        getattr(getattr(model, "config", None), "model_type", type(model).__name__),
        missing=[k for k in expected if k not in common and expected[k].data_ptr() not in filled],
        unexpected=tensors.keys() - common,
        mismatched=[
            (key, tuple(tensors[key].shape), tuple(expected[key].shape))
            for key in common
            if tensors[key].shape != expected[key].shape
        ],
    )
    model.load_state_dict(tensors, strict=False)  # tied weights are stored once


def check_fit(
    where: str,
    kind: str,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Any, Any]],
) -> None:
    """Refuse weights that are not those of the model.

    Args:
        where: the checkpoint.
        kind: the model's type.
        missing, unexpected: names of tensors.
        mismatched: name, shape in the checkpoint, shape in the model.

    Raises:
        ScanLMError: if any of the three holds something.
    """
    shapes = [f"{name} is {tuple(a)}, not {tuple(b)}" for name, a, b in sorted(mismatched)]
    faults = [
        f"{len(names)} {what} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        for what, names in (
            ("missing", sorted(missing)),
            ("unexpected", sorted(unexpected)),
            ("of another shape", shapes),
        )
        if names
    ]
    if faults:
        raise ScanLMError(
            f"the weights in {where} are not those of its {kind} configuration: "
            f"{'; '.join(faults)}; use the config.json of the model and vocabulary that was trained"
        )


def one_line(error: BaseException) -> str:
    """An exception as ``Type: first line of its message``."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _replace_folder(new: Path, old: Path) -> None:
    """Put a folder in another's place; readers find one of the two, or for a moment none."""
    if old.exists():
        aside = Path(tempfile.mkdtemp(dir=old.parent, prefix=f".{old.name}.old."))
        os.replace(old, aside / old.name)
        shutil.rmtree(aside, ignore_errors=True)
    os.replace(new, old)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
