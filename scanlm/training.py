"""Train a language model of any family: one record, exact resume, the same tokens for all.

``train`` builds what the settings name, hands it to ``scanlm.trainer.ExactTrainer`` and keeps the
record. The same settings find their run again: finished, it is returned; interrupted, it goes on
from its last checkpoint, and the metrics after it are measured again.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import math
import os
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import (
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.utils import logging as transformers_logging

from scanlm.compiling import as_compiled, compile_model
from scanlm.data import (
    Blocks,
    TokenizedCorpus,
    experiment_name,
    load_corpus,
    prepare,
    unigram_entropy,
)
from scanlm.data.token_files import default_tokenizer
from scanlm.data.tokenizers import vocabulary_size
from scanlm.dropout import no_dropout, set_dropout
from scanlm.errors import ScanLMError
from scanlm.flops import training_flops
from scanlm.interrupts import held_interrupts
from scanlm.progress import Progress
from scanlm.records import SUMMARY_FILE, Run, model_name, read_metrics, run_id
from scanlm.scoring import (
    Evaluation,
    NotFinite,
    check_context,
    context_limit,
    evaluate_blocks,
)
from scanlm.settings import DROPOUT_FIELDS, PRESETS, TrainingSettings, resolve_settings
from scanlm.streams import StreamedBlocks
from scanlm.trainer import (
    STATE_FILE,
    Diverged,
    ExactTrainer,
    OrderedBlocks,
    check_saved,
    saved_steps,
)
from scanlm.values import format_value

PADDED_VOCABULARY = 128  # a model may round its vocabulary up to such multiples


def train(
    settings: TrainingSettings,
    model: Any = None,
    corpus: TokenizedCorpus | None = None,
    progress: bool | None = None,
) -> Run:
    """Train, or continue, the run that the settings name.

    Args:
        settings: see ``resolve_settings``.
        model: use this model instead of building ``settings.model``; its weights are the start, and
            other weights are another run. Of several ranks each gives the same.
        corpus: use these tokens instead of preparing ``settings.corpus``.
        progress: a bar (True) or a line at each record (False); default a bar if somebody looks.

    Returns:
        The finished run. Its folder holds ``checkpoint-<steps>``, which ``from_pretrained`` loads.

    Raises:
        ScanLMError: settings that do not fit each other, the model or the corpus; an output folder
            that cannot be written, or that another process writes; training that diverged (the
            record says so too).
        KeyboardInterrupt: recorded as "interrupted"; the same call continues. One process saves
            a checkpoint first, unless it is interrupted again; one rank of several does not,
            since another may be a step further.
    """
    tokens = corpus or prepare(
        settings.corpus, settings.tokenizer, settings.cache_dir, ("train", "validation")
    )
    with _hidden("ACCELERATE_USE_FSDP") as launched:  # by accelerate launch --use_fsdp
        if launched.lower() == "true":
            settings = settings.model_copy(update={"fsdp": True})
        return _train(settings, model, tokens, progress)


@contextmanager
def _hidden(variable: str) -> Iterator[str]:
    """An environment variable's value, while nobody else sees it: accelerate would shard, too."""
    value = os.environ.pop(variable, None)
    try:
        yield value or ""
    finally:
        if value is not None:
            os.environ[variable] = value


def _train(
    settings: TrainingSettings, model: Any, tokens: TokenizedCorpus, progress: bool | None
) -> Run:
    set_seed(settings.seed)
    initial = None if model is None else _weights_hash(model)
    model = _build(settings, tokens.vocab_size) if model is None else model
    _set_dropout(model, settings.dropout)
    blocks = Blocks(tokens["train"].tokens, settings.seq_len)
    _check(settings, model, tokens, blocks)
    precision = resolve_precision(settings.precision)
    parameters = _parameters(settings, model, tokens, precision)
    if initial is not None:
        parameters["initial"] = initial
    name = model_name(settings.model)
    experiment = settings.experiment or experiment_name(tokens.name)
    rank = int(os.environ.get("RANK", "0"))
    writer: Run | None = None
    if rank == 0:
        run = Run.create(experiment, name, parameters, settings.seed, settings.root)
        if run.finished:
            print(f"already finished: {run.folder}\n{_result_line(run.summary)}")
            return run
        writer, folder = run, run.folder
    else:
        identity = run_id(name, parameters, settings.seed)
        folder = Path(settings.root) / experiment / identity
        if (folder / SUMMARY_FILE).is_file():
            return Run.open(folder)
    with writer.only_writer() if writer is not None else nullcontext():
        session = _Session(settings, model, tokens, writer, folder, precision, progress)
        try:
            with _own_wandb_run(settings, folder):
                session.train(blocks)
            _leave_together(session)
        except BaseException as error:
            if writer is not None:
                writer.fail(_status(error), str(error) or type(error).__name__)
            if _lost_rank(error):
                raise ScanLMError(
                    f"rank {rank}: another rank of this job has ended, so this one ends too; the "
                    "same command goes on from the last checkpoint"
                ) from error
            if isinstance(error, Diverged):
                raise ScanLMError(f"training diverged: {error} (record: {folder})") from error
            raise
    return Run.open(folder)


class _Session:
    """One process' part in a run, from its first or last checkpoint to its end."""

    def __init__(
        self,
        settings: TrainingSettings,
        model: Any,
        tokens: TokenizedCorpus,
        run: Run | None,
        folder: Path,
        precision: str,
        progress: bool | None,
    ) -> None:
        self.settings, self.model, self.tokens = settings, model, tokens
        self.run, self.folder, self.precision = run, folder, precision
        self.display = Progress(settings.steps, bar=progress, silent=run is None)
        self.tokens_per_step = settings.batch_size * settings.seq_len
        parts = training_flops(model, settings.seq_len) if hasattr(model, "config") else None
        self.flops = sum(parts.values()) if parts else None
        self.schedule = _Schedule(settings, self.display)
        self.trainer: ExactTrainer
        self.earlier = 0.0  # seconds of earlier sessions
        self.measured = (time.perf_counter(), 0)
        self.paused = 0.0  # seconds spent evaluating since the last record

    def train(self, blocks: Blocks) -> None:
        s = self.settings
        if hasattr(self.model, "half_residual"):
            self.model.half_residual = s.half_residual and self.precision == "bf16"
        if s.compile:
            compile_model(self.model)
        arguments = training_arguments(s, self.folder, self.precision)
        kind: type[ExactTrainer] = ExactTrainer
        if s.fsdp:
            from scanlm.sharding import ShardedTrainer, shard

            kind = ShardedTrainer
            shard(self.model, arguments.device)
        self.trainer = kind(
            score=self._score,
            record=self._record,
            keep=s.keep_checkpoints,
            model=self.model,
            args=arguments,
            train_dataset=_ordered(s, blocks),
            data_collator=default_data_collator,
            processing_class=self.tokens.tokenizer,  # saved with every checkpoint
            callbacks=[self.schedule],
        )
        for unwanted in (PrinterCallback, ProgressCallback):
            self.trainer.remove_callback(unwanted)
        done = (saved_steps(self.folder) or [0])[-1]
        if done:
            check_saved(self.folder)
        if self.run is not None:
            shutil.rmtree(self.folder / ".saving", ignore_errors=True)
            self.run.truncate(after_step=done)
            metrics = read_metrics(self.folder)
            if "seconds" in metrics:
                self.earlier = float(metrics["seconds"].fillna(0).max())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.begun = time.perf_counter()
        self.measured = (self.begun, done)
        if done:
            self.display.line(f"continuing from step {done:,}")
        self.display.start(done)
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()  # one for every file that is written
        try:
            checkpoint = str(self.folder / f"checkpoint-{done}") if done else None
            if done < s.steps:
                with _held(self.trainer.args.world_size) as interrupted:
                    self.schedule.interrupted = interrupted
                    self.trainer.train(resume_from_checkpoint=checkpoint)
                    if self.trainer.state.global_step < s.steps:
                        raise KeyboardInterrupt
            else:  # stopped between its last checkpoint and its summary
                self.trainer._load_from_checkpoint(str(checkpoint))
                # it knows which step was the best
                self.trainer.state = TrainerState.load_from_json(f"{checkpoint}/{STATE_FILE}")
        finally:
            self.display.close()
            if bars:
                transformers_logging.enable_progress_bar()
        self._finish()

    @property
    def seconds(self) -> float:
        """Wall time of this and earlier sessions, evaluations included."""
        return self.earlier + time.perf_counter() - self.begun

    def _axes(self, split: str) -> dict[str, Any]:
        step = self.trainer.state.global_step or self.settings.steps
        axes: dict[str, Any] = {"split": split, "step": step}
        axes["tokens"] = step * self.tokens_per_step
        if self.flops:
            axes["flops"] = axes["tokens"] * self.flops
        return axes | {"seconds": round(self.seconds, 3)}

    def _record(self, logs: dict[str, float]) -> None:
        """The means of the steps since the last record."""
        now, step = time.perf_counter(), self.trainer.state.global_step
        before, first = self.measured
        speed = (step - first) * self.tokens_per_step / max(now - before - self.paused, 1e-9)
        self.measured, self.paused = (now, step), 0.0
        self.display.show(step, loss=logs["loss"], lr=logs["learning_rate"], tokens_per_s=speed)
        if self.run is None:
            return
        axes = self._axes("train")
        self.run.log("loss", logs["loss"], **axes)
        for name in ("learning_rate", "grad_norm"):
            if name in logs:
                self.run.log(name, logs[name], **axes)
        self.run.log("tokens_per_second", speed, **axes)
        if (peak := _peak_memory()) is not None:
            self.run.log("peak_memory_bytes", peak, **axes)

    def _evaluate(self, max_tokens: int | None) -> Evaluation:
        s = self.settings
        try:
            with as_compiled():
                return evaluate_blocks(
                    self.model,
                    self.tokens["validation"].tokens,
                    s.seq_len,
                    batch_size=max(s.batch_size // s.gradient_accumulation, 1),
                    precision=self.precision if self.precision != "fp32" else None,
                    max_tokens=max_tokens,
                )
        except NotFinite as error:
            step = self.trainer.state.global_step or s.steps
            raise Diverged(step, "the validation loss") from error

    def _score(self) -> float:
        begun = time.perf_counter()
        result = self._evaluate(self.settings.eval_tokens)
        self.display.show(self.trainer.state.global_step, validation=result.loss)
        if self.run is not None:
            axes = self._axes("validation") | {"n": result.num_tokens}
            self.run.log("loss", result.loss, **axes)
            self.run.log("perplexity", result.perplexity, **axes)
        self.paused += time.perf_counter() - begun
        return result.loss

    def _finish(self) -> None:
        """Score all validation tokens, write the summary and say what came out."""
        result = self._evaluate(None)
        if self.run is None:
            return
        s, part = self.settings, self.tokens["validation"]
        axes = self._axes("validation")
        self.run.drop(lambda metric: "position" in metric)  # of a finish that was cut short
        for position, loss, count in zip(
            result.positions, result.loss_by_position, result.counts_by_position, strict=True
        ):
            if count:
                self.run.log("loss", loss, **axes, position=int(position), n=int(count))
        metrics = read_metrics(self.folder)
        speeds = metrics.loc[metrics["name"] == "tokens_per_second", "value"]
        # of earlier sessions too
        peaks = metrics.loc[metrics["name"] == "peak_memory_bytes", "value"]
        summary = {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte(part.num_bytes),
            "word_perplexity": result.word_perplexity(self.tokens.counted_words("validation")),
            "num_tokens": result.num_tokens,
            "split": "validation",
            "unigram_entropy": unigram_entropy(part.tokens, self.tokens.vocab_size),
            "steps": s.steps,
            "tokens": s.tokens,
            "best_step": self.trainer.state.best_global_step or s.steps,
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
            "wall_seconds": self.seconds,
            "tokens_per_second": float(speeds.median()) if len(speeds) else None,
            "peak_memory_bytes": int(peaks.max()) if len(peaks) else None,
        }
        self.run.finish(summary)
        print(f"{_result_line(summary)}\nrun: {self.folder}")


def _held(ranks: int) -> AbstractContextManager[Callable[[], bool]]:
    """Interrupts wait for the end of a step, unless other ranks would wait for this one."""
    return held_interrupts() if ranks == 1 else nullcontext(lambda: False)


class _Schedule(TrainerCallback):
    """When to log, evaluate, advance the bar, and stop because of ``interrupted``."""

    def __init__(self, settings: TrainingSettings, display: Progress) -> None:
        self.settings, self.display = settings, display
        self.interrupted: Callable[[], bool] = lambda: False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, s = state.global_step, self.settings
        last = step >= s.steps
        control.should_evaluate = last or step % s.eval_every == 0
        if self.interrupted() and not last:
            control.should_save = control.should_training_stop = True
        # an interval never spans a checkpoint, since its sum of losses is not in it
        control.should_log = last or step % s.log_every == 0 or control.should_save
        self.display.advance(step)


def training_arguments(s: TrainingSettings, folder: Path, precision: str) -> TrainingArguments:
    """The settings as transformers' Trainer takes them; logging and evaluation are asked for apart.

    Args:
        s: the settings.
        folder: of the run.
        precision: what ``resolve_precision`` returned.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=s.steps,
        per_device_train_batch_size=s.batch_size // s.gradient_accumulation // ranks,
        gradient_accumulation_steps=s.gradient_accumulation,
        learning_rate=s.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": s.min_lr_ratio},
        warmup_steps=s.warmup,
        weight_decay=s.weight_decay,
        adam_beta1=s.beta1,
        adam_beta2=s.beta2,
        adam_epsilon=s.eps,
        max_grad_norm=s.max_grad_norm,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        tf32=True if s.tf32 and cuda else None,
        use_cpu=not cuda,
        seed=s.seed,
        dataloader_num_workers=s.num_workers,
        dataloader_pin_memory=cuda,
        # else the host waits for the device once a step, and then the device for the host
        accelerator_config={"non_blocking": cuda},
        remove_unused_columns=False,
        eval_strategy="no",
        logging_strategy="no",
        # a NaN is kept and noticed; the filter would wait for the device at every step
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=s.save_every,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        disable_tqdm=True,
        log_level="error",
        report_to=_trackers(s, folder),
        run_name=folder.name,
    )
    # several GPUs are several ranks (torchrun), never threads of one process
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _trackers(s: TrainingSettings, folder: Path) -> list[str]:
    if s.tensorboard:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    if s.wandb:
        if not os.environ.get("WANDB_API_KEY"):
            os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_PROJECT", "scanlm")
    return _chosen_trackers(s) or ["none"]


@contextmanager
def _own_wandb_run(s: TrainingSettings, folder: Path) -> Iterator[None]:
    """W&B's run, which transformers begins, is in the run's folder and ends with it.

    Else the next training of the process would go on in it. One of the caller's is left alone.
    """
    wandb = import_module("wandb") if s.wandb else None
    if wandb is None or wandb.run is not None:
        yield
        return
    chosen = "WANDB_DIR" in os.environ
    os.environ.setdefault("WANDB_DIR", str(folder))
    failed = True
    try:
        yield
        failed = False
    finally:
        if not chosen:
            del os.environ["WANDB_DIR"]
        if wandb.run is not None:
            wandb.finish(exit_code=int(failed))


def _chosen_trackers(s: TrainingSettings) -> list[str]:
    chosen = [name for name in ("tensorboard", "wandb") if getattr(s, name)]
    for name in chosen:
        if importlib.util.find_spec(name) is None:
            raise ScanLMError(f"{name}=true needs a package: pip install 'scanlm[tracking]'")
    return chosen


def resolve_precision(precision: str) -> str:
    """What "auto" means here: bf16 on a GPU that computes in it, else fp32.

    Raises:
        ScanLMError: fp16 without a GPU.
    """
    cuda = torch.cuda.is_available()
    if precision == "auto":
        native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp32"
    if precision == "fp16" and not cuda:
        raise ScanLMError("precision='fp16' needs a GPU: use fp32 or bf16 on a CPU")
    return precision


def _build(settings: TrainingSettings, vocab_size: int | None, device: str | None = None) -> Any:
    from scanlm.baselines import build_model

    fields = {"vocab_size": vocab_size, **settings.config}
    return build_model(settings.model, device=device, **fields)


def _set_dropout(model: Any, rate: float | None) -> None:
    """Set the rate of every dropout of a GPT-2-like model, in its configuration too."""
    if rate is None:
        return
    fields = [name for name in DROPOUT_FIELDS if hasattr(model.config, name)]
    if not fields:
        raise no_dropout(model, rate, "leave it out")
    for name in fields:
        setattr(model.config, name, rate)
    set_dropout(model, rate)


def _ordered(s: TrainingSettings, blocks: Blocks) -> OrderedBlocks | StreamedBlocks:
    """The blocks of the whole run in training order."""
    if s.carry_state:
        return StreamedBlocks(blocks, s.batch_size, s.steps * s.batch_size, s.reset_every)
    return OrderedBlocks(blocks, s.seed, s.steps * s.batch_size)


def _check_streams(settings: TrainingSettings, model: Any, blocks: Blocks) -> None:
    """Refuse what cannot be trained with carried states."""
    if model.config.model_type != "scanlm":
        raise ScanLMError(
            f"carry_state=true: a model of type {model.config.model_type!r} has no state that is "
            "carried over blocks here; only scan models have"
        )
    streams = _ordered(settings, blocks)
    assert isinstance(streams, StreamedBlocks)
    limit, reached = context_limit(model), min(streams.span, settings.steps) * settings.seq_len
    if limit is not None and reached > limit:
        raise ScanLMError(
            f"carry_state=true reads {reached:,} tokens from one state, but absolute positions end "
            f"at {limit:,}: set config.position_embedding=chunk, or reset_every="
            f"{max(limit // settings.seq_len, 1)}"
        )


def _check(settings: TrainingSettings, model: Any, tokens: TokenizedCorpus, blocks: Blocks) -> None:
    """Refuse what cannot train before anything is written."""
    _check_vocabulary(model, tokens.name, tokens.tokenizer_spec, tokens.vocab_size)
    check_context(model, settings.seq_len)
    if settings.carry_state:
        _check_streams(settings, model, blocks)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch_size % (settings.gradient_accumulation * ranks):
        raise ScanLMError(
            f"batch_size={settings.batch_size} is not divisible by gradient_accumulation="
            f"{settings.gradient_accumulation} times {ranks} ranks"
        )
    if settings.fsdp and ranks == 1:
        raise ScanLMError(
            "fsdp=true shares the model out over several ranks and there is one: start it with "
            "torchrun --nproc-per-node 2 -m scanlm train ..."
        )
    _chosen_trackers(settings)
    chunk = int(getattr(model.config, "chunk_size", 0))
    # the prefix of a second chunk is the first one's leaf, unless there are chunks before
    least = chunk if settings.carry_state else 2 * chunk
    if model.config.model_type == "scanlm" and settings.seq_len <= least:
        count = "one chunk" if settings.seq_len <= chunk else "two chunks"
        warnings.warn(
            f"seq_len={settings.seq_len} is {count} of chunk_size={chunk}: nothing is scanned "
            "and T1 is not trained; choose a smaller config.chunk_size",
            stacklevel=4,
        )


def _check_vocabulary(model: Any, corpus: str, tokenizer: str, entries: int) -> None:
    size = int(model.config.vocab_size)
    if not entries <= size <= -(-entries // PADDED_VOCABULARY) * PADDED_VOCABULARY:
        raise ScanLMError(
            f"corpus {corpus!r} is tokenised with {tokenizer!r} ({entries} tokens) and the model "
            f"has a vocabulary of {size}: set config.vocab_size={entries} or take another tokenizer"
        )


def _parameters(
    settings: TrainingSettings, model: Any, tokens: TokenizedCorpus, precision: str
) -> dict[str, Any]:
    """What identifies the run: settings, the model's configuration and the tokens."""
    config = model.config.to_dict()
    noise = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
    return {
        "kind": "training",
        **settings.identity(),
        "corpus": tokens.name,
        "tokenizer": tokens.tokenizer_spec,
        "tokenizer_hash": tokens.tokenizer_hash,
        "corpus_fingerprint": tokens.fingerprint,
        "precision": precision,
        "config": {k: v for k, v in sorted(config.items()) if k not in noise},
    }


def _weights_hash(model: Any) -> str:
    """Of all weights and buffers that a checkpoint of the model would hold."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy())  # numpy has no bfloat16
    return digest.hexdigest()


def sizes(settings: TrainingSettings) -> dict[str, Any]:
    """What a run will cost, from shapes alone; neither corpus nor weights are touched.

    Returns:
        ``config`` (of the model), ``num_parameters``, ``tokens``, ``flops`` (``None`` where nothing
        counts them), ``memory_bytes``, ``memory_formula`` and ``upper_bound``: whether the
        tokenizer may get fewer entries than the model has here (``bpe:<size>``). A tokenizer's
        folder that is not there yet leaves the vocabulary of the model's entry.

    Raises:
        ScanLMError: a model that cannot be built, sequences longer than its positions, a
            tokenizer that is not known, or a vocabulary of another size than the tokenizer's.
    """
    tokenizer, vocabulary, exact = _expected_vocabulary(settings)
    model = _build(settings, vocabulary, "meta")
    _set_dropout(model, settings.dropout)
    if vocabulary is not None and exact:
        _check_vocabulary(model, settings.corpus, tokenizer, vocabulary)
    check_context(model, settings.seq_len)
    number = sum(p.numel() for p in model.parameters())
    c = model.config
    width = int(getattr(c, "hidden_size", 0) or getattr(c, "n_embd", 0))
    layers = int(getattr(c, "num_hidden_layers", 0)) + int(getattr(c, "t1_layers", 0))
    part = settings.batch_size // settings.gradient_accumulation * settings.seq_len
    bytes_a_number = 4 if resolve_precision(settings.precision) == "fp32" else 2
    windows = 2 if c.model_type == "scanlm" and settings.seq_len > c.chunk_size else 1
    flops = training_flops(model, settings.seq_len)
    return {
        "config": c.to_dict(),
        "num_parameters": number,
        "tokens": settings.tokens,
        "flops": settings.tokens * sum(flops.values()) if flops else None,
        "memory_bytes": 16 * number + 17 * windows * bytes_a_number * part * width * layers,
        "memory_formula": (
            "16 bytes a parameter (weights, gradients, two Adam moments in fp32) + 17 numbers a "
            "token, layer and feature kept for the backward pass; twice that for a scan model, "
            "whose T2 reads each chunk behind a prefix"
        ),
        "upper_bound": not exact and "vocab_size" not in settings.config,
    }


def _expected_vocabulary(settings: TrainingSettings) -> tuple[str, int | None, bool]:
    """The run's tokenizer, and ``vocabulary_size`` of it; no size if its folder is not there."""
    spec = settings.tokenizer
    if spec is None:
        try:
            spec = default_tokenizer(load_corpus(settings.corpus))
        except ScanLMError:  # a sweep is planned before its corpus is there
            spec = "gpt2"
    try:
        return spec, *vocabulary_size(spec)
    except ScanLMError:
        if "/" not in spec or Path(spec).expanduser().exists():
            raise
        return spec, None, True


def describe(settings: TrainingSettings) -> dict[str, Any]:
    """What ``scanlm train --dry-run`` prints; nothing is tokenised, built or written.

    Returns:
        ``sizes``, and ``settings``, ``experiment``, ``command``.

    Raises:
        ScanLMError: as ``sizes``; a corpus or a tokenizer's folder that is not there.
    """
    source = load_corpus(settings.corpus)
    tokenizer = settings.tokenizer or default_tokenizer(source)
    vocabulary_size(tokenizer)  # refuses a folder that is not there, which ``sizes`` does not
    return sizes(settings) | {
        "settings": settings.model_dump() | {"tokenizer": tokenizer},
        "experiment": settings.experiment or experiment_name(source.name),
        "command": equivalent_command(settings),
    }


def equivalent_command(settings: TrainingSettings) -> str:
    """A ``scanlm train`` command for these settings that names no preset."""
    return shlex.join(["scanlm", *command_words(settings)])


def command_words(settings: TrainingSettings) -> list[str]:
    """The words of ``equivalent_command`` behind the program's name."""
    without = resolve_settings(settings.model, None, {"corpus": settings.corpus}).model_dump()
    values = settings.model_dump(exclude={"model", "corpus", "config"})
    pairs = [(k, v) for k, v in values.items() if v != without[k]]
    pairs += [(f"config.{name}", value) for name, value in settings.config.items()]
    words = ["train", settings.model, "--corpus", settings.corpus]
    for name, value in pairs:
        words += ["--set", f"{name}={format_value(value)}"]
    return words


def _status(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt) or _lost_rank(error):
        return "interrupted"
    return "diverged" if isinstance(error, Diverged) else "failed"


def _leave_together(session: _Session) -> None:
    """No rank ends while another one still talks to it, nor with its connections open."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        session.trainer.accelerator.wait_for_everyone()
        atexit.unregister(torch.distributed.destroy_process_group)
        atexit.register(torch.distributed.destroy_process_group)


def _lost_rank(error: BaseException) -> bool:
    """Whether a collective operation failed since another process is gone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # then the pipe was somebody else's
        return False
    if isinstance(error, torch.distributed.DistError):
        return True
    gone = ("connection closed by peer", "connection reset by peer", "broken pipe")
    text = str(error).lower()  # gloo's errors have no class of their own
    return isinstance(error, RuntimeError) and any(words in text for words in gone)


def _result_line(summary: dict[str, Any]) -> str:
    return (
        f"validation loss {summary['loss']:.4f} nats a token, perplexity "
        f"{summary['perplexity']:.2f} ({summary['num_tokens']:,} tokens scored); unigram entropy "
        f"of the same text {summary['unigram_entropy']:.4f}, perplexity "
        f"{math.exp(summary['unigram_entropy']):.2f}"
    )


def _peak_memory() -> int | None:
    """Most memory held so far: on the GPU by this run, else by this process; ``None``: unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


__all__ = [
    "PRESETS",
    "TrainingSettings",
    "command_words",
    "describe",
    "equivalent_command",
    "resolve_settings",
    "sizes",
    "train",
]
