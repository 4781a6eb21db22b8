"""Checkpoints scored on a corpus: rows, records, comparisons, and what does not fit."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from scanlm import ScanLMConfig, ScanLMError, ScanLMForCausalLM
from scanlm.data import load_tokenizer, prepare
from scanlm.evaluation import compare, evaluate
from scanlm.records import Run, read_metrics

VOCAB = 257
TEXT = "the cat sat on the mat \u2013 and the dog too\n" * 9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder whose name is that of the corpus."""
    folder = tmp_path_factory.mktemp("corpora") / "cats"
    folder.mkdir()
    (folder / "train.txt").write_text(TEXT * 2)
    (folder / "test.txt").write_text(TEXT)
    return folder


@pytest.fixture
def check(corpus, tmp_path):
    """``evaluate`` with everything under a temporary folder and no record."""

    def run(target, **options):
        places = {"cache_dir": tmp_path / "cache", "root": tmp_path / "runs"}
        return evaluate(target, corpus, **{"record": False, **places, **options})

    return run


def gpt2(seed=0, **overrides):
    torch.manual_seed(seed)
    config = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config |= {"bos_token_id": 256, "eos_token_id": 256, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**(config | overrides))).eval()


def scan(**overrides):
    torch.manual_seed(0)
    config = {"vocab_size": VOCAB, "n_embd": 8, "n_head": 2, "t1_layers": 1, "t2_layers": 1}
    config |= {"chunk_size": 4, "n_positions": 32, "initializer_range": 0.3}
    return ScanLMForCausalLM(ScanLMConfig(**(config | overrides))).eval()


def saved(model, folder, tokenizer="bytes"):
    model.save_pretrained(folder)
    if tokenizer:
        load_tokenizer(tokenizer).save_pretrained(folder)
    return folder


def make_run(folder, steps=(5, 10), **parameters):
    folder.mkdir()
    record = {"run_id": "cat-s3-00000000", "model": "cat", "seed": 3}
    record["parameters"] = {"tokenizer": "bytes", "seq_len": 8} | parameters
    (folder / "run.json").write_text(json.dumps(record))
    for step in steps:
        gpt2(seed=step).save_pretrained(folder / f"checkpoint-{step}")
    return folder


def test_gpt2_agrees_with_the_loss_of_transformers(check, tmp_path):
    model = gpt2()
    (row,) = check(saved(model, tmp_path / "m"), seq_len=16)
    ids = torch.tensor(list(TEXT.encode()))
    nats = 0.0
    for start in range(0, len(ids) - 1, 16):
        block = ids[start : start + 17][None]  # transformers shifts labels: 16 are scored
        with torch.no_grad():
            nats += model(block, labels=block).loss.item() * (block.shape[1] - 1)
    assert row["num_tokens"] == len(ids) - 1
    assert len(ids) % 16 != 1  # so that the last block is partial
    assert row["loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)


def test_the_columns_follow_from_the_loss_and_the_text(check, tmp_path):
    (row,) = check(saved(scan(), tmp_path / "m"), seq_len=16)
    tokens = len(TEXT.encode())
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    # a token is a byte; the first is not scored
    per_byte = row["loss"] * (tokens - 1) / tokens / math.log(2)
    assert row["bits_per_byte"] == pytest.approx(per_byte)
    words = len(TEXT.split())
    assert row["word_perplexity"] == pytest.approx(math.exp(row["loss"] * (tokens - 1) / words))
    assert (row["model"], row["corpus"], row["split"]) == ("m", "cats", "test")
    assert (row["step"], row["seq_len"], row["record"]) == (None, 16, None)


def test_words_of_wikitext_count_line_ends(tmp_path):
    folder = tmp_path / "wikitext-2"
    folder.mkdir()
    (folder / "test.txt").write_text(TEXT)
    target = saved(gpt2(), tmp_path / "m")
    (row,) = evaluate(target, folder, record=False, cache_dir=tmp_path / "cache")
    nats = row["loss"] * row["num_tokens"]
    words = len(TEXT.split()) + TEXT.count("\n")
    assert row["word_perplexity"] == pytest.approx(math.exp(nats / words))


def test_per_word_and_per_byte_only_for_the_whole_split(check, tmp_path):
    target = saved(scan(), tmp_path / "m")
    for options in ({"max_tokens": 50}, {"original_positions": True}):
        (row,) = check(target, **options)
        assert row["word_perplexity"] is None
        assert row["bits_per_byte"] is None


def test_original_positions_take_the_chunk_size_of_the_model(check, tmp_path):
    scan_folder = saved(scan(), tmp_path / "m")
    (row,) = check(scan_folder, original_positions=True, seq_len=16)
    assert np.flatnonzero(row["counts_by_position"] == 0).tolist() == [3, 7, 11, 15]
    gpt2_folder = saved(gpt2(), tmp_path / "g")
    (other,) = check(gpt2_folder, original_positions=True, seq_len=16, chunk_size=4)
    assert other["counts_by_position"].tolist() == row["counts_by_position"].tolist()
    with pytest.raises(ScanLMError, match=r"g \(gpt2\) has no chunks: give chunk_size"):
        check(gpt2_folder, original_positions=True)
    with pytest.raises(ScanLMError, match="chunk_size=4 is for original_positions only"):
        check(gpt2_folder, chunk_size=4)


def test_context_modes_score_the_same_tokens(check, tmp_path):
    target = saved(scan(position_embedding="chunk"), tmp_path / "m")
    rows = [check(target, context=c, seq_len=16)[0] for c in ("blocks", "sliding", "streaming")]
    assert {row["num_tokens"] for row in rows} == {len(TEXT.encode()) - 1}
    assert len({row["loss"] for row in rows}) == 3
    assert [row["stride"] for row in rows] == [None, 8, None]


def test_streaming_a_gpt2_is_refused_before_anything_is_recorded(check, tmp_path):
    target = saved(gpt2(), tmp_path / "m")
    with pytest.raises(ScanLMError, match="absolute positions end at 32; use context='sliding'"):
        check(target, context="streaming", record=True)
    assert not (tmp_path / "runs").exists()
    (row,) = check(target, context="streaming", max_tokens=30)
    assert row["num_tokens"] == 30


def test_seq_len_is_that_of_the_run_or_as_long_as_the_model_allows(check, tmp_path):
    assert check(make_run(tmp_path / "run"))[0]["seq_len"] == 8
    assert check(saved(gpt2(), tmp_path / "m"))[0]["seq_len"] == 32
    unlimited = saved(scan(position_embedding="chunk"), tmp_path / "s")
    assert check(unlimited)[0]["seq_len"] == 512


def test_several_checkpoints_of_a_run(check, tmp_path):
    run = make_run(tmp_path / "run", steps=(5, 10, 20))
    rows = check(run, steps=[20, "5"])
    assert [row["step"] for row in rows] == [20, 5]
    alone = [check(run / f"checkpoint-{s}")[0]["loss"] for s in (20, 5)]
    assert [row["loss"] for row in rows] == alone
    assert [row["step"] for row in check(run, steps="all")] == [5, 10, 20]
    assert [row["step"] for row in check(run, steps=["all"])] == [5, 10, 20]
    assert [row["step"] for row in check(run)] == [20]


def test_a_record_holds_the_figures(check, tmp_path):
    rows = check(make_run(tmp_path / "run"), steps="all", record=True)
    folder = rows[0]["record"]
    assert {row["record"] for row in rows} == {folder}
    run = Run.open(folder)
    assert (run.status, run.summary["loss"]) == ("finished", rows[-1]["loss"])
    assert {run.info[name] for name in ("experiment", "model", "seed")} == {"cats", "cat", 3}
    parameters = run.info["parameters"]
    assert (parameters["kind"], parameters["target"]) == ("evaluation", "cat-s3-00000000")
    assert str(tmp_path) not in json.dumps(parameters)  # no path of this machine
    metrics = read_metrics(folder)
    for row in rows:
        here = metrics[(metrics["step"] == row["step"]) & (metrics["split"] == "test")]
        whole = here[here["position"].isna()].set_index("name")
        for name in ("loss", "perplexity", "word_perplexity", "bits_per_byte"):
            assert whole["value"][name] == row[name]
            assert whole["n"][name] == row["num_tokens"]
        by_position = here[here["position"].notna()]
        assert by_position["value"].tolist() == row["loss_by_position"].tolist()
        assert by_position["n"].tolist() == row["counts_by_position"].tolist()


def test_the_same_evaluation_again_is_another_record(check, tmp_path):
    target = saved(gpt2(), tmp_path / "m")
    (first,), (second,) = check(target, record=True), check(target, record=True)
    assert first["record"] != second["record"]
    assert first["loss"] == second["loss"]


@pytest.mark.parametrize(
    ("name", "experiment"),
    [("cats#test=train[:50%]", "cats"), ("wikitext-103", "wikitext103"), ("my cats", "my-cats")],
)
def test_the_experiment_is_named_after_the_corpus(name, experiment, corpus, tmp_path):
    target = saved(gpt2(), tmp_path / "m")
    tokens = prepare(corpus, "bytes", tmp_path / "cache", splits=["test"])
    tokens = dataclasses.replace(tokens, name=name)
    (row,) = evaluate(target, tokens, root=tmp_path / "runs")
    run = Run.open(row["record"])
    assert run.info["experiment"] == experiment
    assert run.info["parameters"]["corpus"] == name


def test_a_failed_evaluation_is_recorded_as_failed(check, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ScanLMError("the loss is nan at token 3")

    monkeypatch.setattr("scanlm.evaluation.evaluate_blocks", fail)
    with pytest.raises(ScanLMError, match="nan at token 3"):
        check(saved(gpt2(), tmp_path / "m"), record=True)
    (folder,) = (tmp_path / "runs" / "cats").iterdir()
    run = Run.open(folder)
    assert (run.status, run.info["message"]) == ("failed", "the loss is nan at token 3")


def test_compare_sorts_by_loss(corpus, tmp_path):
    targets = [saved(gpt2(seed=s), tmp_path / f"m{s}") for s in range(3)]
    options = {"cache_dir": tmp_path / "cache", "record": False, "seq_len": 16}
    table = compare(targets, corpus, **options)
    assert table["loss"].is_monotonic_increasing
    assert sorted(table["model"]) == ["m0", "m1", "m2"]


def test_a_prepared_corpus_is_taken_as_it_is(corpus, tmp_path):
    tokens = prepare(corpus, "bytes", tmp_path / "cache")
    target = saved(gpt2(), tmp_path / "m")
    by_name = evaluate(target, corpus, cache_dir=tmp_path / "cache", record=False)
    assert evaluate(target, tokens, record=False)[0]["loss"] == by_name[0]["loss"]


def test_another_tokenizer_is_refused(corpus, check, tmp_path):
    other = prepare(corpus, "bpe:270", tmp_path / "cache")
    with pytest.raises(ScanLMError, match="'cats' is tokenised with 'bpe:270', m with another"):
        evaluate(saved(gpt2(), tmp_path / "m"), other, record=False)
    with pytest.raises(ScanLMError, match="m with another tokenizer"):
        check(tmp_path / "m", tokenizer="bpe:270")
    # a model that comes without a tokenizer, whose vocabulary cannot be this one
    saved(gpt2(), tmp_path / "bare", tokenizer=None)
    with pytest.raises(ScanLMError, match=r"'bpe:270' \(270 tokens\), bare has a vocabulary of 25"):
        check(tmp_path / "bare", tokenizer="bpe:270")
    assert check(tmp_path / "bare", tokenizer="bytes")[0]["num_tokens"] > 0


def test_a_run_that_names_the_hash_of_its_tokenizer(corpus, check, tmp_path):
    run = make_run(tmp_path / "run", tokenizer="bpe:300", tokenizer_hash="0" * 64)
    with pytest.raises(ScanLMError, match="cat with another tokenizer"):
        check(run, tokenizer="bytes")


def test_a_padded_vocabulary_is_accepted(check, tmp_path):
    assert check(saved(gpt2(vocab_size=320), tmp_path / "m"))[0]["num_tokens"] > 0
    with pytest.raises(ScanLMError, match="has a vocabulary of 512"):
        check(saved(gpt2(vocab_size=512), tmp_path / "n"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "slide"}, "unknown context 'slide'. Did you mean 'sliding'?"),
        ({"stride": 4}, "stride=4 is for context='sliding', not 'blocks'"),
        ({"split": "tset"}, "has no split 'tset'; it has train, test"),
        ({"steps": []}, "steps is empty"),
        ({"steps": "all"}, "holds no checkpoints to choose steps from"),
        ({"steps": "lates"}, "unknown step 'lates': expected a number, or one of all, best"),
        ({"seq_len": 33}, "seq_len=33 is longer than the 32 positions of this gpt2 model"),
        ({"precision": "bf17"}, "unknown precision 'bf17'. Did you mean 'bf16'?"),
    ],
)
def test_bad_input_is_named_and_not_recorded(options, message, check, tmp_path):
    with pytest.raises(ScanLMError) as caught:
        check(saved(gpt2(), tmp_path / "m"), record=True, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
