"""Hugging Face's Trainer with the exactness that comparisons need.

* Data order follows from the seed alone: any model, any number of ranks, any interruption.
* A checkpoint appears by rename, so one that exists is whole; continuing from it repeats the
  uninterrupted run bit for bit (same machine and precision).
* A loss that is not finite is remembered on the device and looked at when something is logged or
  saved: no step waits for it, and no such weights are written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer

from scanlm.checkpoints import damage
from scanlm.data import Blocks
from scanlm.errors import ScanLMError
from scanlm.loss import loss_only
from scanlm.streams import CarriedState, StreamedBlocks

SAVING, STATE_FILE = ".saving", "trainer_state.json"


class Diverged(ArithmeticError):
    """The loss, a gradient or a weight is not finite; ``step`` is the first one noticed."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"{what} is not finite at step {step}: lower lr or raise warmup_steps")
        self.step = step


class OrderedBlocks(Dataset[dict[str, Tensor]]):
    """All blocks of a run in training order: one shuffled permutation after another.

    Item i, of ``count``, is block ``permutation(seed, i // n)[i % n]`` of the n blocks there are,
    whatever model, batch size or number of ranks reads it.
    """

    def __init__(self, blocks: Blocks, seed: int, count: int) -> None:
        self.blocks, self.seed, self.count = blocks, seed, count
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        """Blocks of the whole run."""
        return self.count

    def block(self, index: int) -> int:
        """Which block item ``index`` is."""
        epoch, place = divmod(index, len(self.blocks))
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._order, self._epoch = generator.permutation(len(self.blocks)), epoch
        return int(self._order[place])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids`` and the next tokens ``(seq_len,)``, these under both their names."""
        item = self.blocks[self.block(index)]
        return {**item, "shift_labels": item["labels"]}


class ExactTrainer(Trainer):
    """See the module.

    Args:
        score: evaluates the model and logs; returns the validation loss.
        record: called with ``(name, value)`` pairs of an interval: loss, grad_norm, learning_rate.
        keep: complete checkpoints to keep, the best besides.
        kwargs: of ``Trainer``; with ``StreamedBlocks`` as the data states are carried.
    """

    def __init__(
        self,
        score: Callable[[], float],
        record: Callable[[dict[str, float]], None],
        keep: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.score, self.record, self.keep = score, record, keep
        # blocks are full, so parts of a batch weigh the same and the Trainer averages their means
        self.model_accepts_loss_kwargs = False
        self.carried: CarriedState | None = None
        if isinstance(self.train_dataset, StreamedBlocks):
            self.carried = CarriedState(
                self.model,
                self.train_dataset,
                self.args.gradient_accumulation_steps,
                self.args.process_index,
                self.args.world_size,
            )
        self.extra = loss_only(kwargs["model"])
        self.first_bad = torch.full((), -1, dtype=torch.long, device=self.args.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices, but no embeddings; a head tied to the embedding is one."""
        return decayed_parameters(model)

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Mean over the tokens of a part of the batch, nats."""
        done = self.state.global_step
        if self.carried is not None:
            inputs = {**inputs, "past_key_values": self.carried.take(done)}
        loss: Tensor = model(**inputs, **self.extra).loss
        if self.carried is not None:
            self.carried.cut()
        step = done + 1
        new = (self.first_bad < 0) & ~torch.isfinite(loss.detach())
        self.first_bad = torch.where(new, step, self.first_bad)
        return loss

    def check_finite(self) -> None:
        """Raise ``Diverged`` if a loss of any step so far was not finite (on any rank)."""
        bad = self.accelerator.gather(self.first_bad.reshape(1))
        steps = [int(step) for step in bad.tolist() if step >= 0]
        if steps:
            raise Diverged(min(steps), "the loss")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record the interval, after a look at whether it was finite."""
        if "learning_rate" in logs:
            self.check_finite()
            norm = logs.get("grad_norm")
            # a loss scaler's first tries overflow and are skipped
            if norm is not None and not np.isfinite(norm) and not self.args.fp16:
                raise Diverged(self.state.global_step, "the gradient")
            self.record(dict(logs))
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation loss, by ``scanlm.scoring``, for the Trainer to remember the best step."""
        self.check_finite()
        metrics = {"eval_loss": self.score()}
        super().log(dict(metrics))  # for TensorBoard and W&B
        # the handler takes back the request to evaluate
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _get_output_dir(self, trial: Any = None) -> str:
        return os.path.join(str(self.args.output_dir), SAVING)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        self.check_finite()
        unwrapped = self.accelerator.unwrap_model(model)
        finite = torch.stack([_finite(p) for p in unwrapped.parameters()]).all()
        if not bool(self.accelerator.gather(finite.reshape(1)).all()):
            raise Diverged(self.state.global_step, "a weight")
        root, name = Path(str(self.args.output_dir)), f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            shutil.rmtree(root / SAVING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        if self.carried is not None:
            self.carried.save(root / SAVING / name)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            if (root / name).exists():  # saved by a run that is being continued from before it
                shutil.rmtree(root / name)
            os.replace(root / SAVING / name, root / name)
            shutil.rmtree(root / SAVING)
            self._drop_old_checkpoints(root)
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # called when the weights are loaded and before the first step
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self.carried is not None:
            self.carried.load(Path(checkpoint))

    def _drop_old_checkpoints(self, root: Path) -> None:
        steps = saved_steps(root)
        for step in steps[: -self.keep]:
            if step != self.state.best_global_step:
                shutil.rmtree(root / f"checkpoint-{step}")


def _finite(parameter: Tensor) -> Tensor:
    """Whether all of a parameter, or of this rank's part of it, is finite."""
    values = parameter.detach()
    return torch.isfinite(values.to_local() if isinstance(values, DTensor) else values).all()


def decayed_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay applies to: those of two and more dimensions.

    Biases and norms have one; embeddings, and a head that shares their weight, are left out.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [n for n, p in model.named_parameters() if p.dim() >= 2 and id(p) not in embeddings]


def saved_steps(folder: Path) -> list[int]:
    """Steps of a run's complete checkpoints, ascending."""
    names = [p.parent.name for p in folder.glob(f"checkpoint-*/{STATE_FILE}")]
    return sorted(int(n.removeprefix("checkpoint-")) for n in names if n[11:].isdigit())


def check_saved(folder: Path) -> None:
    """Refuse to go on from a run's latest checkpoint if a file of it is damaged.

    Args:
        folder: of the run, with at least one checkpoint.

    Raises:
        ScanLMError: names the file, and where the run goes on without that checkpoint.
    """
    *earlier, latest = saved_steps(folder)
    checkpoint = folder / f"checkpoint-{latest}"
    for file in sorted(checkpoint.iterdir()):
        if reason := damage(file):
            instead = f"goes on from checkpoint-{earlier[-1]}" if earlier else "starts again"
            raise ScanLMError(
                f"{file} is truncated or damaged ({reason}): remove {checkpoint}, and the same "
                f"command {instead}"
            )
