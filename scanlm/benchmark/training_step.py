"""What the training benchmark times: one optimiser step of a model, in one of several ways.

Modes of a scan model are its ``train_mode``: "blelloch" (levels of the tree at once) and
"sequential" (node by node, the original's algorithm). Those of GPT-2:

default       ``scanlm.causal_gpt2``, which the trainer trains: causal kernels, our loss and
              precision of the residual stream; the best GPT-2 there is
flash         the same, with attention by the flash kernel and no other
transformers  transformers' own; not compiled this is GPT-2 "as shipped"
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2LMHeadModel

from scanlm.baselines import build_model, load_entry
from scanlm.compiling import compile_model
from scanlm.errors import ScanLMError, nearest
from scanlm.flops import training_flops
from scanlm.loss import loss_only
from scanlm.scoring import context_limit
from scanlm.settings import DROPOUT_FIELDS

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = {
    "scanlm": ("blelloch", "sequential"),
    "gpt2": ("default", "flash", "transformers"),
}
COMPILED = ("no", "yes", "whole")  # "yes": in the pieces of scanlm.compiling


@dataclass(frozen=True)
class Work:
    """One thing to measure; its fields are the axes of its metrics.

    Attributes:
        part: "step" (a bare loop on one batch), "kernels" (the same, profiled), "loading" (a bare
            loop that reads its batches), "loader" (reading alone) or "trainer".
        model: registry id, or path of a YAML file.
        mode: see the module; "default" for other families.
        compiled: one of ``COMPILED``.
        chunk_size: of a scan model, else ``None``.
        length: tokens a sequence.
        batch_size: sequences a step.
    """

    part: str
    model: str
    mode: str
    compiled: str
    chunk_size: int | None
    length: int
    batch_size: int

    @property
    def label(self) -> str:
        """Names it in a line."""
        chunk = [] if self.chunk_size is None else [f"chunk {self.chunk_size}"]
        how = {"no": "not compiled", "yes": "compiled", "whole": "compiled as a whole"}
        words = [self.model, self.mode, how[self.compiled], *chunk]
        return f"{self.part}: {', '.join(words)}, {self.batch_size} x {self.length:,}"

    @property
    def axes(self) -> dict[str, Any]:
        """The fields that apply."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def modes_of(model: str) -> tuple[str, ...]:
    """Ways in which a registry model can be trained, the best first."""
    return MODES.get(load_entry(model).family, ("default",))


def fields_of(work: Work) -> dict[str, Any]:
    """Overrides of the model's configuration: no dropout, and positions for the length."""
    entry = load_entry(work.model)
    fields: dict[str, Any] = {}
    if entry.family == "scanlm":
        fields |= {"chunk_size": work.chunk_size, "train_mode": work.mode}
    plain = build_model(entry, device="meta", **fields)
    fields |= {name: 0.0 for name in DROPOUT_FIELDS if hasattr(plain.config, name)}
    limit = context_limit(plain)
    if limit is not None and work.length > limit:
        endless = entry.family == "scanlm"
        fields |= {"position_embedding": "chunk"} if endless else {"n_positions": work.length}
    return fields


def flops_per_token(work: Work) -> float | None:
    """Operations of forward and backward pass, padding not counted (``scanlm.flops``)."""
    parts = training_flops(build_model(work.model, device="meta", **fields_of(work)), work.length)
    return sum(parts.values()) if parts else None


def build(work: Work, device: torch.device, seed: int, checkpointing: bool = False) -> Any:
    """The model of one measurement, in training mode.

    Raises:
        ScanLMError: as ``build_model``; an unknown mode.
    """
    known = modes_of(work.model)
    if work.mode not in known:
        raise ScanLMError(f"unknown mode {work.mode!r} of {work.model}.{nearest(work.mode, known)}")
    torch.manual_seed(seed)
    fields = fields_of(work)
    model: Any = build_model(work.model, device=device, **fields)
    if work.mode == "transformers":
        with torch.device(device):
            model = GPT2LMHeadModel(model.config)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def halve_residual(model: Any, dtype: str) -> None:
    """The residual stream in bf16 where products are, as the trainer has it."""
    if hasattr(model, "half_residual"):
        model.half_residual = dtype == "bfloat16"


class TrainingStep:
    """Forward, backward and AdamW (fused on a GPU) under autocast, queued by a call.

    Args:
        work: what is measured.
        device: where.
        dtype: a key of ``DTYPES``: of the autocast; weights are float32.
        seed: of weights and tokens.
        batches: where batches ``{"input_ids", "shift_labels"}`` come from; ``None``: one batch of
            random tokens over and over.
        checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self,
        work: Work,
        device: torch.device,
        dtype: str,
        seed: int = 0,
        batches: Iterator[Any] | None = None,
        checkpointing: bool = False,
    ) -> None:
        self.work, self.device, self.dtype = work, device, DTYPES[dtype]
        self.model = build(work, device, seed, checkpointing)
        halve_residual(self.model, dtype)
        self.vocab_size = int(build_model(work.model, device="meta").config.vocab_size)
        self.extra = loss_only(self.model)
        self.loss: Any = self._loss
        if work.compiled == "yes":
            compile_model(self.model)
        elif work.compiled != "no":
            self.loss = torch.compile(self.loss, dynamic=False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, fused=device.type == "cuda"
        )
        self.batches = self._same_batch(seed) if batches is None else batches

    def __call__(self) -> Tensor:
        """One step; returns its loss without waiting for it."""
        batch = next(self.batches)
        with self._kernels():
            with self._autocast():
                loss = self.loss(batch["input_ids"], batch["shift_labels"])
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.model(
            input_ids=ids, labels=targets, shift_labels=targets, use_cache=False, **self.extra
        ).loss

    def _same_batch(self, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        size = (self.work.batch_size, self.work.length + 1)
        tokens = torch.randint(self.vocab_size, size, generator=generator).to(self.device)
        batch = {
            "input_ids": tokens[:, :-1].contiguous(),
            "shift_labels": tokens[:, 1:].contiguous(),
        }
        while True:
            yield batch

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _kernels(self) -> AbstractContextManager[Any]:
        flash = self.work.mode == "flash"
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext()
