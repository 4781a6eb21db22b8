"""Evaluate checkpoints on a corpus, with a record of it, and compare them.

The scoring itself, and what each context mode predicts a token from, is in ``scanlm.scoring``.
Perplexity per token depends on the tokenizer; bits per byte and perplexity per word do not. The
latter divides by whitespace-separated words, on WikiText by words and line ends, as published
results do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scanlm.checkpoints import NAMED_STEPS, Loaded, checkpoints, load_checkpoint, resolve
from scanlm.data import (
    TokenizedCorpus,
    TokenSplit,
    default_tokenizer,
    experiment_name,
    load_corpus,
    prepare,
    tokenizer_hash,
)
from scanlm.devices import usable_device
from scanlm.errors import ScanLMError, check_name
from scanlm.scoring import (
    PRECISIONS,
    Evaluation,
    check_context,
    context_limit,
    evaluate_blocks,
    evaluate_sliding,
    evaluate_streaming,
)

if TYPE_CHECKING:
    import pandas as pd

    from scanlm.records import Run

CONTEXTS = ("blocks", "sliding", "streaming")
DEFAULT_SEQ_LEN = 512  # the original's
PADDED_VOCABULARY = 128  # models round their vocabulary up to such multiples for tensor cores


def evaluate(
    target: str | Path,
    corpus: str | Path | TokenizedCorpus,
    split: str = "test",
    context: str = "blocks",
    seq_len: int | None = None,
    stride: int | None = None,
    steps: Sequence[int | str] | str | None = None,
    batch_size: int = 16,
    original_positions: bool = False,
    chunk_size: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    config: str | Path | None = None,
    tokenizer: str | None = None,
    max_tokens: int | None = None,
    cache_dir: str | Path = "data/cache",
    root: str | Path = "data/runs",
    record: bool = True,
    progress: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
    dry_run: bool = False,
    load: Callable[..., Loaded] = load_checkpoint,
) -> list[dict[str, Any]]:
    """Score one or several checkpoints of a model on a split of a corpus.

    Args:
        target: a run, a checkpoint, a Hugging Face folder or hub name, or a distributed checkpoint.
        corpus: a corpus' name or path, or one that is tokenised already.
        context: "blocks", "sliding" or "streaming": see ``scanlm.scoring``.
        seq_len: tokens a block, window or piece reads; default that of the run, else 512 or as many
            as the model has positions for.
        stride: of "sliding"; default half of ``seq_len``.
        steps: of a run: which checkpoints, in this order: steps, "best", "latest" or "all";
            default the latest.
        batch_size: blocks at a time; no result depends on it.
        original_positions: leave out each chunk's first token, as the original does.
        chunk_size: for ``original_positions``; default the model's own.
        device: default the GPU if there is one.
        precision: autocast to "fp32", "bf16" or "fp16"; default the weights' own.
        config: for a distributed checkpoint: its ``config.json``.
        tokenizer: for a model that comes without one: what ``load_tokenizer`` takes.
        max_tokens: score only the first so many tokens.
        cache_dir: where token files are.
        root, record: write a record under ``root/<corpus>/``.
        report: gets each row as soon as it is scored.
        dry_run: raise what is raised before anything is scored, and score and record nothing.
        load: stands for ``load_checkpoint``, e.g. to have one in memory for several calls.

    Returns:
        One row a checkpoint: ``model, step, corpus, split, context, seq_len, stride,
        original_positions, loss`` (nats per token), ``perplexity, word_perplexity, bits_per_byte``
        (both ``None`` unless all tokens of the split after the first were scored), ``num_tokens``
        (scored), ``loss_by_position``, ``counts_by_position``, ``positions``, ``target, path`` and
        ``record`` (the record's folder, or ``None``). Of a dry run one row: ``target`` and what the
        record's parameters would be.

    Raises:
        ScanLMError: a checkpoint that cannot be loaded, a corpus tokenised with another tokenizer,
            a device that is not there, more context than the model has positions for, or a loss
            that is not finite.
    """
    check_name("context", context, CONTEXTS)
    if stride is not None and context != "sliding":
        raise ScanLMError(
            f"stride={stride} is for context='sliding', not {context!r}: leave it out"
        )
    if precision is not None:
        check_name("precision", precision, PRECISIONS)
    wanted = _steps(target, steps)
    place = usable_device(device)
    loaded = load(target, wanted[0], place, config=config, cache_dir=cache_dir)
    tokens = tokenized(corpus, split, loaded, tokenizer, cache_dir)
    part = tokens[split]
    targets = min(part.num_tokens - 1, max_tokens or part.num_tokens)
    options = _resolve(loaded, targets, context, seq_len, stride, original_positions, chunk_size)
    options |= {"batch_size": batch_size, "precision": precision, "max_tokens": max_tokens}
    parameters = {
        "kind": "evaluation",
        "target": _readable(loaded),
        "steps": list(wanted),
        "corpus": tokens.name,
        "corpus_fingerprint": tokens.fingerprint,
        "tokenizer": tokens.tokenizer_spec,
        "tokenizer_hash": tokens.tokenizer_hash,
        "split": split,
        "context": context,
        "original_positions": original_positions,
        **options,
    }
    if dry_run:
        return [parameters | {"target": str(target)}]
    seed = int((loaded.run or {}).get("seed") or 0)
    experiment = experiment_name(tokens.name)
    run = _new_record(experiment, loaded.name, parameters, seed, root) if record else None
    rows: list[dict[str, Any]] = []
    with run.failures_recorded() if run else nullcontext():
        for step in wanted:
            if rows:
                loaded = load(target, step, place, config=config, cache_dir=cache_dir)
                _check_vocabulary(loaded, tokens)
            result = _score(loaded, part, context, options, progress)
            row = {
                "model": loaded.name,
                "step": loaded.step,
                "corpus": tokens.name,
                "split": split,
                "context": context,
                "seq_len": options["seq_len"],
                "stride": options["stride"],
                "original_positions": original_positions,
                **_figures(result, part, tokens.counted_words(split)),
                "target": str(target),
                "path": str(loaded.path),
                "record": str(run.folder) if run else None,
            }
            rows.append(row)
            if run:
                _log(run, row)
            if report:
                report(row)
        if run:
            names = ("step", "split", *_METRICS, "num_tokens")
            run.finish({name: rows[-1][name] for name in names if rows[-1][name] is not None})
    return rows


def compare(
    targets: Iterable[str | Path], corpus: str | Path | TokenizedCorpus, **options: Any
) -> pd.DataFrame:
    """Evaluate several targets alike.

    Args:
        targets: as for ``evaluate``.
        corpus, options: of ``evaluate``, the same for all. Without ``seq_len`` each is read at its
            own, and the table says which.

    Returns:
        ``evaluate``'s rows, lowest loss first. Models of different tokenizers are comparable by
        ``bits_per_byte`` and ``word_perplexity`` only.
    """
    import pandas as pd

    rows = [row for target in targets for row in evaluate(target, corpus, **options)]
    return pd.DataFrame(rows).sort_values("loss", ignore_index=True, kind="stable")


def tokenized(
    corpus: str | Path | TokenizedCorpus,
    split: str,
    loaded: Loaded,
    tokenizer: str | None = None,
    cache_dir: str | Path = "data/cache",
) -> TokenizedCorpus:
    """The corpus in the tokens that the model was trained on.

    Raises:
        ScanLMError: the tokens are another tokenizer's, or of another vocabulary.
    """
    whose = loaded.name
    own = loaded.tokenizer
    if isinstance(corpus, TokenizedCorpus):
        tokens = corpus
    else:
        source = load_corpus(corpus)
        chosen = tokenizer or own or default_tokenizer(source)
        tokens = prepare(source, chosen, cache_dir, splits=[split])
    if own is not None:
        tokens.require_tokenizer(tokenizer_hash(own), whose)
    elif expected := (loaded.run or {}).get("parameters", {}).get("tokenizer_hash"):
        tokens.require_tokenizer(expected, whose)
    _check_vocabulary(loaded, tokens)
    return tokens


def _check_vocabulary(loaded: Loaded, tokens: TokenizedCorpus) -> None:
    model, corpus = int(loaded.model.config.vocab_size), tokens.vocab_size
    largest = -(-corpus // PADDED_VOCABULARY) * PADDED_VOCABULARY
    if not corpus <= model <= largest:
        raise ScanLMError(
            f"corpus {tokens.name!r} is tokenised with {tokens.tokenizer_spec!r} ({corpus} "
            f"tokens), {loaded.name} has a vocabulary of {model}: tokenise the corpus with the "
            "model's tokenizer (--tokenizer)"
        )


def _steps(target: str | Path, steps: Sequence[int | str] | str | None) -> list[int | str | None]:
    if steps is None:
        return [None]
    chosen: list[int | str | None] = []
    for step in [steps] if isinstance(steps, str | int) else steps:
        if step == "all":
            found = checkpoints(Path(target).expanduser())
            if not found:
                raise ScanLMError(f"{str(target)!r} holds no checkpoints to choose steps from")
            chosen += found
        elif isinstance(step, int) or step in NAMED_STEPS:
            chosen.append(step)
        elif step.isdecimal():
            chosen.append(int(step))
        else:
            raise ScanLMError(
                f"unknown step {step!r}: expected a number, or one of all, {', '.join(NAMED_STEPS)}"
            )
    if not chosen:
        raise ScanLMError("steps is empty: name at least one, or leave it out for the latest")
    folder = Path(target).expanduser()
    for each in chosen if folder.exists() else ():
        resolve(folder, each)  # which refuses a later one before the first is scored
    return chosen


def _resolve(
    loaded: Loaded,
    targets: int,
    context: str,
    seq_len: int | None,
    stride: int | None,
    original_positions: bool,
    chunk_size: int | None,
) -> dict[str, Any]:
    """Defaults filled in, and what the model cannot do refused before anything is recorded."""
    limit = context_limit(loaded.model)
    if seq_len is None:
        trained = (loaded.run or {}).get("parameters", {}).get("seq_len")
        default = trained if isinstance(trained, int) else DEFAULT_SEQ_LEN
        seq_len = default if limit is None else min(default, limit)
    streaming = context == "streaming"
    check_context(loaded.model, targets if streaming else min(seq_len, targets), streaming)
    if context == "sliding" and stride is None:
        stride = max(seq_len // 2, 1)
    if original_positions and chunk_size is None:
        if loaded.model.config.model_type != "scanlm":  # Mamba-2 has chunks of another kind
            raise ScanLMError(
                f"original_positions skips each chunk's first token, and {loaded.name} "
                f"({loaded.model.config.model_type}) has no chunks: give chunk_size, that of the "
                "scan model to compare with"
            )
        chunk_size = int(loaded.model.config.chunk_size)
    if chunk_size is not None and not original_positions:
        raise ScanLMError(f"chunk_size={chunk_size} is for original_positions only: leave it out")
    return {"seq_len": seq_len, "stride": stride, "chunk_size": chunk_size}


def _score(
    loaded: Loaded, part: TokenSplit, context: str, options: dict[str, Any], progress: bool
) -> Evaluation:
    common = {name: options[name] for name in ("precision", "max_tokens", "chunk_size")}
    common["progress"] = progress
    model, tokens, seq_len = loaded.model, part.tokens, options["seq_len"]
    if context == "streaming":
        return evaluate_streaming(model, tokens, seq_len, **common)
    common["batch_size"] = options["batch_size"]
    if context == "sliding":
        return evaluate_sliding(model, tokens, seq_len, options["stride"], **common)
    return evaluate_blocks(model, tokens, seq_len, **common)


def _new_record(
    experiment: str, model: str, parameters: dict[str, Any], seed: int, root: str | Path
) -> Run:
    from scanlm.records import Run

    # never continue an earlier one: the weights behind its parameters may have changed
    return Run.create(experiment, model, parameters, seed, root=root, resume=False)


_METRICS = ("loss", "perplexity", "word_perplexity", "bits_per_byte")


def _figures(result: Evaluation, part: TokenSplit, words: int) -> dict[str, Any]:
    # per word and per byte only if their nats were all counted
    whole = result.num_tokens == part.num_tokens - 1
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "word_perplexity": result.word_perplexity(words) if whole else None,
        "bits_per_byte": result.bits_per_byte(part.num_bytes) if whole else None,
        "num_tokens": result.num_tokens,
        "loss_by_position": result.loss_by_position,
        "counts_by_position": result.counts_by_position,
        "positions": result.positions,
    }


def _log(run: Run, row: dict[str, Any]) -> None:
    """The row's figures over the axes that apply; a loss with a position is the mean there."""
    axes = {"split": row["split"]} | ({} if row["step"] is None else {"step": row["step"]})
    for name in _METRICS:
        if row[name] is not None:
            run.log(name, row[name], **axes, n=row["num_tokens"])
    by_position = zip(
        row["positions"], row["loss_by_position"], row["counts_by_position"], strict=True
    )
    for position, loss, count in by_position:
        if count:
            run.log("loss", float(loss), **axes, position=int(position), n=int(count))


def _readable(loaded: Loaded) -> str:
    """What was evaluated, without a path of this machine: a run, a hub name or a folder's name."""
    if isinstance(loaded.path, str):
        return loaded.path
    if loaded.run and "run_id" in loaded.run:
        return str(loaded.run["run_id"])
    return loaded.path.name


__all__ = [
    "CONTEXTS",
    "Evaluation",
    "compare",
    "evaluate",
    "evaluate_blocks",
    "evaluate_sliding",
    "evaluate_streaming",
    "tokenized",
]
