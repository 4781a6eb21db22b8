"""Tables of a model's parts."""

import pytest
import torch

from scanlm.anatomy import parameter_table, shape_table, size_table
from scanlm.baselines import build_model
from scanlm.errors import ScanLMError
from scanlm.model import ScanLMConfig, ScanLMForCausalLM


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("marked", [False, True])
def test_parts_add_up_to_the_model(tied, marked):
    fields = {"vocab_size": 50, "chunk_size": 8, "tie_word_embeddings": tied}
    model = ScanLMForCausalLM(ScanLMConfig.preset("tiny", **fields, prefix_embedding=marked))
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


def test_sizes_of_other_models_are_told_from_shapes_alone():
    table = size_table(["gpt2_tiny", "scanlm_tiny"], seq_len=64)
    gpt2 = build_model("gpt2_tiny")
    assert table.loc["gpt2_tiny", "parameters"] == sum(p.numel() for p in gpt2.parameters())
    tied = gpt2.get_input_embeddings().weight.numel()
    assert table.loc["gpt2_tiny", "without embeddings"] == gpt2.num_parameters() - tied
    assert table.loc["scanlm_tiny", "family"] == "scanlm"
    assert (table["MFLOP per token"] > 0).all()


@pytest.mark.parametrize("seq_len", [0, -1])
def test_the_cost_of_no_tokens_is_refused(seq_len):
    with torch.device("meta"):
        model = ScanLMForCausalLM(ScanLMConfig.preset("tiny", vocab_size=50, chunk_size=8))
    for table in (
        lambda: parameter_table(model, seq_len),
        lambda: size_table(["gpt2_tiny"], seq_len),
        lambda: size_table(["scanlm_tiny"], seq_len),
    ):
        with pytest.raises(ScanLMError, match=f"seq_len={seq_len}: expected at least one token"):
            table()
