"""The counted arithmetic against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from scanlm import flops
from scanlm.errors import ScanLMError
from scanlm.model import ScanLMConfig, ScanLMForCausalLM
from scanlm.scan import num_combines, scan_tree


def products(model, seq_len):
    """Operations of the forward pass' matrix products alone, as torch counts them."""
    ids = torch.zeros(1, seq_len, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize("seq_len", [1, 5, 8, 9, 64, 71])
@pytest.mark.parametrize("layers", [(1, 1), (2, 3)])
def test_scan_model_products_are_those_that_run(monkeypatch, seq_len, layers):
    t1, t2 = layers
    config = ScanLMConfig(
        vocab_size=33, n_embd=8, n_head=2, chunk_size=8, t1_layers=t1, t2_layers=t2
    )
    with torch.device("meta"):
        model = ScanLMForCausalLM(config).eval()
    monkeypatch.setattr(flops, "_pairs", lambda *args: 0)
    assert sum(flops.scanlm_parts(config, seq_len).values()) == products(model, seq_len)


def test_gpt2_products_are_those_that_run():
    config = GPT2Config(vocab_size=33, n_embd=8, n_head=2, n_layer=3)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config).eval()
    counted = 20 * sum(flops.training_flops(model, 20).values()) / 3
    attention = 3 * 4 * 8 * 20 * 20 / 2
    assert counted - attention == pytest.approx(products(model, 20))


def test_attention_counts_the_pairs_that_are_seen():
    mask = torch.ones(4, 10).tril(6)
    assert flops._pairs(10, 4, causal=False) == 40
    assert flops._pairs(10, 4, causal=True) == mask.sum() - 4 / 2  # the diagonal counts half


@pytest.mark.parametrize("n", [*range(1, 20), 64, 100])
def test_num_combines_is_what_a_scan_calls(n):
    trace = []
    scan_tree(lambda pairs: pairs.sum(1), torch.zeros(1, n, 1), trace=trace)
    assert num_combines(n) == len(trace)


def test_a_negative_number_of_leaves_is_refused():
    assert num_combines(0) == 0
    with pytest.raises(ScanLMError, match="n=-1: expected a number of leaves >= 0"):
        num_combines(-1)


def test_an_unknown_family_has_no_count():
    model = torch.nn.Linear(2, 2)
    model.config = type("Config", (), {"model_type": "other"})
    assert flops.training_flops(model, 8) is None
