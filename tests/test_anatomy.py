"""Tables of a model's parts."""

import pytest
import torch

from scanlm.anatomy import parameter_table, shape_table
from scanlm.model import ScanLMConfig, ScanLMForCausalLM


@pytest.mark.parametrize("tied", [False, True])
def test_parts_add_up_to_the_model(tied):
    config = ScanLMConfig.preset("tiny", vocab_size=50, chunk_size=8, tie_word_embeddings=tied)
    model = ScanLMForCausalLM(config)
    table = parameter_table(model, seq_len=32).set_index("part")
    assert table.parameters.sum() == model.num_parameters()
    assert table.share.sum() == pytest.approx(1)
    assert (table.parameters["head"] == 0) == tied
    assert table.mflop_per_token["T2"] > table.mflop_per_token["T1"] > 0


def test_shapes_are_those_of_the_forward_pass():
    model = ScanLMForCausalLM(ScanLMConfig.preset("tiny", vocab_size=50, chunk_size=8)).eval()
    table = shape_table(model, torch.zeros(2, 32, dtype=torch.long)).set_index("tensor")
    assert table["shape"]["prefix states"] == (2, 3, 8, 64)
    assert table["shape"]["logits"] == (2, 32, 50)
