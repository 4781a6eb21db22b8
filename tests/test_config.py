"""Sizes by name, and clear refusals of values that make no model."""

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from scanlm import ScanLMConfig, ScanLMError

SIZES = {
    "tiny": (64, 3, 2),
    "small": (128, 6, 4),
    "standard": (256, 12, 8),
    "base": (768, 12, 12),
    "medium": (1024, 24, 16),
    "large": (1280, 36, 20),
}


@pytest.mark.parametrize("name", SIZES)
def test_presets_are_the_original_table(name: str) -> None:
    config = ScanLMConfig.preset(name, chunk_size=32)
    assert (config.n_embd, config.t2_layers, config.n_head) == SIZES[name]
    assert (config.t1_layers, config.chunk_size) == (1, 32)


def test_an_override_wins_over_the_preset() -> None:
    config = ScanLMConfig.preset("base", n_head=6, t2_layers=2, t1_layers=3)
    assert (config.n_embd, config.n_head, config.t2_layers, config.t1_layers) == (768, 6, 2, 3)


def test_transformers_names_reach_the_fields() -> None:
    config = ScanLMConfig.preset("tiny", n_positions=77)
    assert config.hidden_size == 64
    assert config.num_attention_heads == 2
    assert config.num_hidden_layers == 3
    assert config.max_position_embeddings == 77


def test_survives_a_dictionary_and_auto_config() -> None:
    config = ScanLMConfig.preset(
        "tiny", chunk_size=8, t1_causal=True, leaf_norm=False, position_embedding="chunk"
    )
    again = AutoConfig.for_model(**config.to_dict())
    assert isinstance(again, ScanLMConfig)
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "name", ["chunk_size", "t1_layers", "t2_layers", "n_embd", "n_head", "vocab_size"]
)
@pytest.mark.parametrize("value", [0, -1, 2.0, 1.5, "4", True, None, math.nan])
def test_counts_must_be_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ScanLMError) as error:
        ScanLMConfig(**{name: value})
    message = str(error.value)
    assert f"{name} must be an integer >= 1, got {value!r}" in message
    assert "\n" not in message


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ScanLMError, match=r"n_embd=64 is not divisible by n_head=3"):
        ScanLMConfig(n_embd=64, n_head=3)


@pytest.mark.parametrize(
    ("name", "wrong", "meant"),
    [
        ("train_mode", "bleloch", "blelloch"),
        ("train_mode", "Sequential", "sequential"),
        ("position_embedding", "chunks", "chunk"),
        ("position_embedding", "absolut", "absolute"),
    ],
)
def test_an_unknown_choice_offers_the_nearest(name: str, wrong: str, meant: str) -> None:
    with pytest.raises(ScanLMError, match=rf"unknown {name} '{wrong}'.* Did you mean '{meant}'\?"):
        ScanLMConfig(**{name: wrong})


def test_an_unknown_choice_far_from_all_lists_them() -> None:
    with pytest.raises(ScanLMError, match="Known: blelloch, parallel, sequential"):
        ScanLMConfig(train_mode="xyz")


def test_an_unknown_preset_offers_the_nearest() -> None:
    with pytest.raises(ScanLMError, match=r"unknown preset 'standart'.* Did you mean 'standard'\?"):
        ScanLMConfig.preset("standart")


@pytest.mark.parametrize("size", [None, 3, ["tiny"]])
def test_a_preset_that_is_no_name_is_refused(size: Any) -> None:
    with pytest.raises(ScanLMError, match="unknown preset"):
        ScanLMConfig.preset(size)


@pytest.mark.parametrize(
    ("wrong", "meant"), [("chunk_siz", "chunk_size"), ("n_layer", "t2_layers")]
)
def test_unknown_fields_are_refused(wrong: str, meant: str) -> None:
    with pytest.raises(ScanLMError, match=f"unknown field '{wrong}' .* Did you mean '{meant}'"):
        ScanLMConfig(**{wrong: 4})


@pytest.mark.parametrize(
    "given",
    [
        {"dtype": "float32"},
        {"torch_dtype": "float32"},
        {"attn_implementation": "eager"},
        {"_attn_implementation": "eager"},
        {"architectures": ["ScanLMForCausalLM"]},
        {"auto_map": {"AutoConfig": "config.ScanLMConfig"}},
        {"name_or_path": "folder"},
        {"num_labels": 3},
        {"output_attentions": False},
        {"quantization_config": {}},
    ],
    ids=str,
)
def test_fields_of_transformers_are_none_of_ours_and_pass(given: dict[str, Any]) -> None:
    assert ScanLMConfig(chunk_size=5, **given).chunk_size == 5


def test_a_saved_configuration_keeps_what_others_put_there(tmp_path: Path) -> None:
    config = ScanLMConfig(chunk_size=5)
    config.of_another_tool = "kept"
    config.save_pretrained(tmp_path)
    for again in (AutoConfig.from_pretrained(tmp_path), ScanLMConfig(**config.to_dict())):
        assert isinstance(again, ScanLMConfig)
        assert (again.chunk_size, again.of_another_tool) == (5, "kept")


def test_a_preset_refuses_fields_that_are_none() -> None:
    with pytest.raises(ScanLMError, match=r"unknown field 'chunksize' .*'chunk_size'\?"):
        ScanLMConfig.preset("tiny", chunksize=8)
    config = ScanLMConfig.preset("tiny", hidden_size=128, dtype="bfloat16", architectures=["X"])
    assert config.n_embd == 128
    assert ScanLMConfig.preset("tiny", attn_implementation="sdpa")._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "name", ["t1_causal", "leaf_norm", "prefix_embedding", "use_cache", "tie_word_embeddings"]
)
def test_switches_are_true_or_false(name: str) -> None:
    for value in ("nope", "no", "", None, 2):
        with pytest.raises(ScanLMError, match=rf"{name} must be true or false, got {value!r}"):
            ScanLMConfig(**{name: value})
    for value in (True, False, 0, 1):
        assert getattr(ScanLMConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("names", "expected", "wrong", "right"),
    [
        (
            ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
            r"a probability in \[0, 1\)",
            (-0.1, 1, 1.5, math.nan, "0.1", True, None),
            (0, 0.0, 0.99),
        ),
        (
            ("layer_norm_epsilon",),
            "a number > 0",
            (0, -1, math.nan, math.inf, "1e-5", None),
            (1e-6, 1),
        ),
        (("initializer_range",), "a number >= 0", (-1, math.nan, math.inf, "a", None), (0, 0.02)),
        (("n_inner",), "an integer >= 1, or None for 4", (0, -4, 2.0, "8", True), (None, 1)),
    ],
)
def test_numbers_in_range(names: Any, expected: str, wrong: Any, right: Any) -> None:
    for name in names:
        for value in wrong:
            with pytest.raises(ScanLMError, match=f"{name} must be {expected}.*, got {value!r}"):
                ScanLMConfig(**{name: value})
        for value in right:
            assert getattr(ScanLMConfig(**{name: value}), name) == value


def test_an_unknown_activation_offers_the_nearest() -> None:
    with pytest.raises(ScanLMError, match=r"unknown activation_function 'gelu_nww'.*'gelu_new'"):
        ScanLMConfig(activation_function="gelu_nww")
    with pytest.raises(ScanLMError, match=r"unknown activation_function None\..*"):
        ScanLMConfig(activation_function=None)
