import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from scanlm.data import load_corpus, load_tokenizer, tokenizer_hash
from scanlm.data.tokenizers import check_byte_level, safe_pieces, vocabulary_size
from scanlm.errors import ScanLMError

REAL_DATA = Path(os.environ.get("SCANLM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bpe(cache):
    return load_tokenizer("bpe:700", load_corpus("embedded"), cache)


def save_vocabulary(tokenizer, folder):
    """Only vocab.json and merges.txt, as OpenAI published GPT-2's."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    vocabulary = state["vocab"] | {"<|endoftext|>": tokenizer.eos_token_id}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return folder


# What GPT-2's split treats differently, and whitespace on which Python and Unicode disagree.
TRICKY = st.lists(
    st.sampled_from("aé中1'.,-\U0001f600 \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u2028\u3000")
    | st.sampled_from(["'s", "'ll", "the ", "  ", "    ", "\n\n", "<|endoftext|>", "<|end"]),
    max_size=40,
).map("".join)


@given(TRICKY, st.integers(1, 9), st.integers(1, 30))
@example("a  <|endoftext|>", 1, 30)
@example("a  <|endoftext|>  b", 1, 3)
@example("a  <|endoftext|>aa", 2, 3)
@example("a\x1c \x1cb", 1, 30)
def test_the_ids_of_the_parts_are_the_ids_of_the_whole(bpe, text, size, step):
    pieces = ((text[i : i + step], 0.0) for i in range(0, len(text), step))
    parts = [part for part, _ in safe_pieces(pieces, bpe, size)]
    assert "".join(parts) == text
    ids = [i for part in parts for i in bpe.encode(part, add_special_tokens=False)]
    assert ids == bpe.encode(text, add_special_tokens=False)


def test_prose_is_cut_about_as_often_as_asked(bpe):
    text = "".join(load_corpus("embedded").texts("test"))
    parts = [part for part, _ in safe_pieces([(text, 1.0)], bpe, 100)]
    assert "".join(parts) == text
    assert len(parts) > len(text) / 200
    assert bpe(parts, add_special_tokens=False)["input_ids"][0] == bpe.encode(parts[0])


def test_a_text_without_a_place_to_cut_is_kept_whole(bpe):
    pieces = [("x" * 50, 0.0)] * 40
    assert [part for part, _ in safe_pieces(iter(pieces), bpe, 10)] == ["x" * 2000]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_real_text_in_parts_has_the_ids_of_one_string(split):
    if not (REAL_DATA / "gpt2").is_dir():
        pytest.skip("needs GPT-2's vocabulary and WikiText-103; set SCANLM_TEST_DATA")
    gpt2 = load_tokenizer(REAL_DATA / "gpt2")
    corpus = load_corpus(REAL_DATA / "wikitext-103")
    parts = [part for part, _ in safe_pieces(corpus.pieces(split), gpt2, 2000)]
    whole = gpt2("".join(parts), add_special_tokens=False)["input_ids"]
    assert len(whole) == {"validation": 247_265, "test": 282_440}[split]
    assert [i for ids in gpt2(parts, add_special_tokens=False)["input_ids"] for i in ids] == whole


def test_byte_ids_are_bytes():
    tokenizer = load_tokenizer("bytes")
    text = "é 中\n" + "".join(map(chr, range(256)))
    assert tokenizer.encode(text) == list(text.encode())
    assert len(tokenizer) == 257
    assert tokenizer.eos_token_id == tokenizer.encode("<|endoftext|>")[0] == 256


@given(st.text())
def test_text_comes_back_exactly(bpe, text):
    for tokenizer in (load_tokenizer("bytes"), bpe):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_spaces_before_punctuation_come_back(bpe):
    assert bpe.decode(bpe.encode(" it 's , well . n't !")) == " it 's , well . n't !"


def test_long_texts_raise_no_warning(bpe, caplog):
    bpe.encode("word " * 3000)
    assert not caplog.records


def test_bpe_has_the_size_asked_for_and_is_trained_once(bpe, cache, monkeypatch):
    assert len(bpe) == 700
    monkeypatch.setattr("tokenizers.trainers.BpeTrainer", lambda **kwargs: pytest.fail("trained"))
    again = load_tokenizer("bpe:700", load_corpus("embedded"), cache)
    assert tokenizer_hash(again) == tokenizer_hash(bpe)


@pytest.mark.parametrize("spec", ["bytes", "bpe:700", "folder"])
def test_the_size_is_known_without_a_corpus(bpe, cache, tmp_path, spec):
    if spec == "folder":
        bpe.save_pretrained(spec := tmp_path)
    size, exact = vocabulary_size(spec)
    assert size == len(load_tokenizer(spec, load_corpus("embedded"), cache))
    assert exact is (spec != "bpe:700")


def test_the_size_of_gpt2_needs_no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    assert vocabulary_size("gpt2") == vocabulary_size("openai-community/gpt2") == (50257, True)
    if (REAL_DATA / "gpt2").is_dir():
        assert vocabulary_size(REAL_DATA / "gpt2") == (50257, True)


def test_a_short_text_does_not_fill_bpe(tmp_path):
    (tmp_path / "train.txt").write_text("abab " * 9)
    tokenizer = load_tokenizer("bpe:300", load_corpus(tmp_path), tmp_path / "cache")
    assert len(tokenizer) < vocabulary_size("bpe:300")[0]


def test_the_size_of_a_folder_follows_its_files(bpe, tmp_path):
    bpe.save_pretrained(tmp_path)
    assert vocabulary_size(tmp_path) == (700, True)
    load_tokenizer("bytes").save_pretrained(tmp_path)
    assert vocabulary_size(str(tmp_path)) == (257, True)


def test_bpe_follows_the_corpus(tmp_path):
    hashes = set()
    for name, text in (("a", "abab abab " * 9), ("b", "baba baba " * 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text(text)
        tokenizer = load_tokenizer("bpe:260", load_corpus(tmp_path / name), tmp_path / "cache")
        hashes.add(tokenizer_hash(tokenizer))
    assert len(hashes) == 2


@pytest.mark.parametrize("layout", ["transformers", "tokenizer.json", "vocab.json and merges.txt"])
def test_folders_give_the_same_ids(bpe, tmp_path, layout):
    folder = tmp_path / "folder"
    if layout == "vocab.json and merges.txt":
        save_vocabulary(bpe, folder)
    else:
        bpe.save_pretrained(folder)
    if layout == "tokenizer.json":
        for path in folder.iterdir():
            if path.name != "tokenizer.json":
                path.unlink()
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(bpe)
    text = "'s  def f(x):\n\n    return  <|endoftext|> é"
    assert tokenizer.encode(text) == bpe.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_hash_tells_tokenizers_apart(bpe):
    assert tokenizer_hash(bpe) != tokenizer_hash(load_tokenizer("bytes"))
    assert tokenizer_hash(load_tokenizer("bytes")) == tokenizer_hash(load_tokenizer("bytes"))


def test_gpt2_is_kept_in_the_cache_for_machines_without_network(bpe, tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    save_vocabulary(bpe, folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(folder))
    load_tokenizer("gpt2", cache_dir=tmp_path)

    def offline(*args, **kwargs):
        raise OSError("offline\nagain")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    kept = load_tokenizer("openai-community/gpt2", cache_dir=tmp_path)
    assert tokenizer_hash(kept) == tokenizer_hash(bpe)
    with pytest.raises(
        ScanLMError, match=r"cannot load tokenizer 'gpt2'.*scanlm prepare"
    ) as caught:
        load_tokenizer("gpt2", cache_dir=tmp_path / "other")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt-2", "unknown tokenizer 'gpt-2'.*Did you mean 'gpt2'"),
        ("bpe:100", "at least 257 entries"),
        ("bpe:999999999999", "bpe:999999999999: .* at most 1048576; e.g. bpe:4096"),
        ("bpe:many", "unknown tokenizer 'bpe:many'.*bpe:<size>"),
        ("bpe:300", "is trained on a corpus; give one"),
    ],
)
def test_bad_specs_are_refused(spec, message, tmp_path):
    with pytest.raises(ScanLMError, match=message):
        load_tokenizer(spec, cache_dir=tmp_path)
    if "corpus" not in message:
        with pytest.raises(ScanLMError, match=message):
            vocabulary_size(spec)


def test_bpe_needs_a_train_split(tmp_path):
    (tmp_path / "test.txt").write_text("text")
    with pytest.raises(ScanLMError, match="no split 'train'"):
        load_tokenizer("bpe:300", load_corpus(tmp_path), tmp_path / "cache")


def test_folders_that_hold_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(ScanLMError, match=r"expected tokenizer\.json, or vocab\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ScanLMError, match="cannot load tokenizer folder"):
        load_tokenizer(tmp_path)


def test_tokenizers_of_another_kind_are_refused():
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    prefix = Tokenizer(models.BPE())
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for backend in (words, prefix):
        with pytest.raises(ScanLMError, match="'mine' is not GPT-2's kind of byte-level BPE"):
            check_byte_level(PreTrainedTokenizerFast(tokenizer_object=backend), "mine")


def test_a_tokenizer_without_its_vocabulary_is_refused():
    # what transformers makes of a name when there is no network
    with pytest.raises(ScanLMError, match="'mine' has no token for 256 of the 256 bytes"):
        check_byte_level(GPT2Tokenizer(), "mine")
