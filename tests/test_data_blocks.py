import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from scanlm.data import Blocks, unigram_entropy
from scanlm.errors import ScanLMError


@given(st.integers(2, 60), st.integers(1, 12))
def test_blocks_pair_each_token_with_the_next(length, seq_len):
    tokens = np.arange(length, dtype=np.uint16)
    if length < seq_len + 1:
        with pytest.raises(ScanLMError, match=f"{length} tokens.*seq_len={seq_len} "):
            Blocks(tokens, seq_len)
        return
    items = [Blocks(tokens, seq_len)[i] for i in range(len(Blocks(tokens, seq_len)))]
    inputs = torch.cat([item["input_ids"] for item in items])
    assert inputs.dtype == torch.int64
    assert inputs.tolist() == list(range(len(inputs)))
    assert torch.equal(torch.cat([item["labels"] for item in items]), inputs + 1)
    # No further block would fit.
    assert len(inputs) + seq_len + 1 > length


def test_blocks_hold_ids_that_only_uint32_can():
    tokens = np.array([0, 70_000, 1 << 31], dtype=np.uint32)
    assert Blocks(tokens, 2)[0]["labels"].tolist() == [70_000, 1 << 31]


def test_blocks_end_for_plain_iteration_and_loaders():
    blocks = Blocks(np.arange(17, dtype=np.uint16), 4)
    assert len(list(blocks)) == 4
    batch = next(iter(DataLoader(blocks, batch_size=3)))
    assert batch["input_ids"].shape == (3, 4)
    with pytest.raises(IndexError):
        blocks[4]


@pytest.mark.parametrize("seq_len", [0, -1, 2.0, "8"])
def test_seq_len_must_be_a_positive_integer(seq_len):
    with pytest.raises(ScanLMError, match="positive integer"):
        Blocks(np.arange(9), seq_len)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=50))
def test_unigram_entropy_is_the_loss_of_the_frequencies(ids):
    loss = -sum(math.log(ids.count(i) / len(ids)) for i in ids) / len(ids)
    assert unigram_entropy(np.array(ids, dtype=np.uint16), 10) == pytest.approx(loss, abs=1e-12)


def test_unigram_entropy_of_a_uniform_array_across_slices():
    tokens = np.tile(np.arange(8, dtype=np.uint16), 1 << 20)
    assert unigram_entropy(tokens, 300) == pytest.approx(math.log(8))


def test_unigram_entropy_refuses_other_vocabularies_and_no_tokens():
    with pytest.raises(ScanLMError, match="token id 9 is outside the vocabulary of 9"):
        unigram_entropy(np.array([1, 9]), 9)
    with pytest.raises(ScanLMError, match="no tokens"):
        unigram_entropy(np.array([], dtype=np.uint16), 9)
