"""Token arrays as training blocks, and their unigram entropy."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from scanlm.errors import ScanLMError


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Independent training blocks of consecutive tokens; block ``i`` starts at ``i * seq_len``.

    An item is ``{"input_ids": (seq_len,), "labels": (seq_len,)}``, both int64, where ``labels[t]``
    is the token after ``input_ids[t]``. Only full blocks are items; the tokens after the last one
    are not used.

    Raises:
        ScanLMError: `seq_len` is not a positive integer, or there are too few tokens for one block.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        if not isinstance(seq_len, int) or seq_len < 1:
            raise ScanLMError(f"seq_len={seq_len!r}: expected a positive integer")
        if len(tokens) < seq_len + 1:
            raise ScanLMError(
                f"corpus of {len(tokens)} tokens is shorter than one block: seq_len={seq_len} "
                f"needs {seq_len + 1}, inputs and next tokens; lower seq_len or take a longer one"
            )
        self.tokens = tokens
        self.seq_len = seq_len

    def __len__(self) -> int:
        """The number of full blocks."""
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Block `index`, counted from 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index * self.seq_len
        block = torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))
        return {"input_ids": block[:-1], "labels": block[1:]}


def unigram_entropy(tokens: np.ndarray, vocab_size: int) -> float:
    """The entropy, in nats per token, of the array's own token frequencies.

    No model that ignores context has a lower loss on these tokens. Memory is bounded by
    `vocab_size`, not by the length of a memory-mapped array.

    Raises:
        ScanLMError: no tokens, or a token id outside the vocabulary.
    """
    if len(tokens) == 0:
        raise ScanLMError("unigram entropy of no tokens: expected at least one")
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), 1 << 22):
        part = np.bincount(tokens[start : start + (1 << 22)], minlength=vocab_size)
        if len(part) > vocab_size:
            raise ScanLMError(
                f"token id {len(part) - 1} is outside the vocabulary of {vocab_size}; "
                "tokens and vocabulary come from different tokenizers"
            )
        counts += part
    probabilities = counts[counts > 0] / len(tokens)
    return float(-(probabilities * np.log(probabilities)).sum())
