"""The trainer's own loop and input pipeline, timed without a corpus."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, default_data_collator
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from scanlm.benchmark.timing import synchronize
from scanlm.benchmark.training_step import Work, build, halve_residual
from scanlm.compiling import compile_model
from scanlm.data import Blocks
from scanlm.settings import TrainingSettings
from scanlm.trainer import ExactTrainer, OrderedBlocks
from scanlm.training import training_arguments

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
FILE_TOKENS = 2**24  # more than any cache holds of them


class StepClock(TrainerCallback):
    """Notes when each step ended, on the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the end of a step."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Of every step but the first."""
        synchronize(self.device)
        if self.device.type == "cuda":
            return [a.elapsed_time(b) for a, b in pairwise(self.marks)]
        return [1e3 * (b - a) for a, b in pairwise(self.marks)]


@contextmanager
def trainer_of(
    work: Work, model: Any, dtype: str, steps: int, num_workers: int = 0, seed: int = 0
) -> Iterator[ExactTrainer]:
    """The trainer of ``scanlm train`` over a file of random tokens; nothing logged or saved."""
    with tempfile.TemporaryDirectory() as folder:
        needed = work.batch_size * work.length * steps + 1
        size = max(min(needed, FILE_TOKENS), work.length + 1)
        path = Path(folder) / "tokens.bin"
        generator = np.random.default_rng(seed)
        vocabulary = min(int(model.config.vocab_size), 2**16)
        generator.integers(0, vocabulary, size, dtype=np.uint16).tofile(path)
        settings = TrainingSettings(
            model=work.model,
            seq_len=work.length,
            batch_size=work.batch_size,
            steps=steps,
            precision=PRECISIONS[dtype],
            num_workers=num_workers,
            save_every=steps + 1,
        )
        arguments = training_arguments(settings, Path(folder), settings.precision)
        arguments.save_strategy = "no"
        blocks = Blocks(np.memmap(path, dtype=np.uint16, mode="r"), work.length)
        trainer = ExactTrainer(
            score=lambda: 0.0,
            record=lambda logs: None,
            keep=1,
            model=model,
            args=arguments,
            train_dataset=OrderedBlocks(blocks, seed, steps * work.batch_size),
            data_collator=default_data_collator,
        )
        for unwanted in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(unwanted)
        yield trainer


def time_trainer(
    work: Work, device: torch.device, dtype: str, steps: int, warmup: int, num_workers: int
) -> list[float]:
    """Milliseconds of ``steps`` steps through the trainer, after ``warmup``."""
    model = build(work, device, seed=0)
    halve_residual(model, dtype)
    if work.compiled != "no":
        compile_model(model)
    clock = StepClock(device)
    with trainer_of(work, model, dtype, steps + warmup, num_workers) as trainer:
        trainer.add_callback(clock)
        trainer.train()
        return clock.milliseconds()[-steps:]


@contextmanager
def batches_of(work: Work, dtype: str, steps: int, num_workers: int) -> Iterator[Iterator[Any]]:
    """The trainer's batches, moved to its device as it moves them."""
    model = torch.nn.Linear(1, 1)
    model.config = build(work, torch.device("meta"), seed=0).config  # type: ignore[assignment]
    with trainer_of(work, model, dtype, steps, num_workers) as trainer:
        yield iter(trainer.get_train_dataloader())
