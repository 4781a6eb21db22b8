"""Stream one split through the tokenizer into a token file."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from tokenizers import Tokenizer
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerFast

from scanlm.data.corpora import Corpus
from scanlm.data.files import Piece
from scanlm.data.tokenizers import safe_pieces
from scanlm.errors import ScanLMError

# 64 parts of 16,384 characters: enough for every core of a machine, small beside its memory.
BATCH_PARTS = 64


def write_tokens(
    corpus: Corpus, split: str, tokenizer: PreTrainedTokenizerFast, path: Path
) -> dict[str, Any]:
    """Write a split's ids to `path`, whole or not at all.

    Returns:
        what the side file needs: ``num_tokens``, ``num_words``, ``num_lines``, ``num_bytes``,
        ``dtype`` and ``sha256``.

    Raises:
        ScanLMError: the split is blank; the disk is full.
    """
    # A copy, so that truncation or padding set by somebody else does not reach the tokens.
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    largest = max(tokenizer.get_vocab().values())
    dtype = np.dtype("<u2" if largest < 1 << 16 else "<u4")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    counts = {"num_tokens": 0, "num_words": 0, "num_lines": 0, "num_bytes": 0}
    sha256 = hashlib.sha256()
    progress = tqdm(
        desc=f"tokenising {corpus.name} {split}",
        total=1.0,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        disable=not sys.stderr.isatty(),
    )
    done = 0.0
    try:
        with progress, temporary.open("wb") as handle:
            parts = _parts(corpus, split, tokenizer)
            while batch := list(islice(parts, BATCH_PARTS)):
                done = batch[-1][1]
                texts = [text for text, _, _ in batch]
                encoded = encoder.encode_batch_fast(texts, add_special_tokens=False)
                pairs = zip(batch, encoded, strict=True)
                ids = [np.asarray([*found.ids, *end], dtype) for (_, _, end), found in pairs]
                data = np.concatenate(ids).tobytes()
                counts["num_tokens"] += len(data) // dtype.itemsize
                counts["num_words"] += sum(len(text.split()) for text in texts)
                counts["num_lines"] += sum(text.count("\n") for text in texts)
                counts["num_bytes"] += sum(len(text.encode()) for text in texts)
                sha256.update(data)
                _write(handle, data)
                progress.set_postfix_str(f"{counts['num_tokens'] / 1e6:.1f}M tokens", refresh=False)
                progress.update(done - progress.n)
            handle.flush()
            os.fsync(handle.fileno())
        if not counts["num_words"]:
            raise ScanLMError(
                f"split {split!r} of corpus {corpus.name!r} is empty or blank; expected text"
            )
        counts |= corpus.counts(split)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = counts["num_tokens"] * dtype.itemsize / max(done, 1e-3)
        raise ScanLMError(
            f"no space left in {path.parent}: the tokens of split {split!r} need about "
            f"{needed / 1e6:,.1f} MB; free some or choose another cache folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return counts | {"dtype": dtype.name, "sha256": sha256.hexdigest()}


def _write(handle: IO[bytes], data: bytes) -> None:
    handle.write(data)


def _parts(
    corpus: Corpus, split: str, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[str, float, list[int]]]:
    """Parts of the text, the fraction read, and the ids that follow: the end of a document."""
    if not corpus.documents:
        for text, done in safe_pieces(corpus.pieces(split), tokenizer):
            yield text, done, []
        return
    if tokenizer.eos_token_id is None:
        raise ScanLMError(
            f"corpus {corpus.name!r} is made of documents, but its tokenizer has no end-of-sequence"
            " token to put after each; set one"
        )
    for document, done in corpus.pieces(split):
        parts: list[Piece] = list(safe_pieces([(document, done)], tokenizer))
        for text, _ in parts[:-1]:
            yield text, done, []
        yield parts[-1][0], done, [tokenizer.eos_token_id]
