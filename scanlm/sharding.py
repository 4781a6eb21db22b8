"""Fully sharded training: ranks share weights, gradients and optimiser out, gathered when used.

Torch's ``fully_shard`` on the model itself. accelerate's own plugin shards the output projection
apart, whose weight the loss of ``scanlm.loss`` reads without calling it, and knows no CPUs. Here
every block of T2 (or of another model) is gathered for its own call; what is left (embeddings,
head, and T1, which is called once for each level of the tree) stays gathered through a step.
Checkpoints hold whole tensors, as those of one process do.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from scanlm.trainer import ExactTrainer

WEIGHTS, OPTIMIZER, SCHEDULER = "model.safetensors", "optimizer.pt", "scheduler.pt"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, device: torch.device) -> None:
    """Share a model's weights out over all ranks, in place.

    Args:
        model: any causal language model of transformers; the same weights on every rank.
        device: where this rank computes.
    """
    model.to(device)
    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    names = set(getattr(model, "_no_split_modules", None) or ())
    for name, module in model.named_modules():
        if type(module).__name__ in names and not name.startswith("t1."):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


class ShardedTrainer(ExactTrainer):
    """``ExactTrainer`` of a model that ``shard`` has shared out."""

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # the precision alone: no wrapper for equal weights on every rank
        prepare = partial(
            self.accelerator.prepare_model, device_placement=False, evaluation_mode=True
        )
        self.accelerator.prepare_model = prepare  # type: ignore[method-assign]
        self.weights: dict[str, Any] | None = None

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm: Any = super()._clip_grad_norm(model)
        return norm.full_tensor()

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        self.weights = get_model_state_dict(self.model, options=WHOLE)
        super()._save_checkpoint(model, trial)
        self.weights = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, self.weights if state_dict is None else state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=WHOLE)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_file

        # a tied head is saved once
        options = StateDictOptions(full_state_dict=True, strict=False)
        weights: dict[str, Any] = {**load_file(Path(resume_from_checkpoint) / WEIGHTS)}
        set_model_state_dict(self.model, weights, options=options)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, state, options=options)
        self.lr_scheduler.load_state_dict(
            torch.load(Path(checkpoint) / SCHEDULER, weights_only=True)
        )


__all__ = ["ShardedTrainer", "shard"]
