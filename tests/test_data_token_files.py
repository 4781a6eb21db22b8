import errno
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from scanlm.data import load_corpus, load_tokenizer, prepare, token_files, tokenizer_hash, writer
from scanlm.errors import ScanLMError

TEXT = "The cat sat.\n\nThe  dog   ran – café.\n" * 50


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "mine"
    path.mkdir()
    (path / "train.txt").write_text(TEXT)
    (path / "test.txt").write_text("A test.\n")
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def counted(monkeypatch):
    """The splits that are tokenised, in order."""
    calls = []
    write = writer.write_tokens

    def write_tokens(corpus, split, *args):
        calls.append(split)
        return write(corpus, split, *args)

    monkeypatch.setattr("scanlm.data.token_files.write_tokens", write_tokens)
    return calls


def temporary_files(cache):
    return list(Path(cache).rglob("*.tmp"))


def test_tokens_and_counts_of_a_text(folder, cache):
    corpus = prepare(folder, "bytes", cache)
    train = corpus["train"]
    assert bytes(train.tokens.astype(np.uint8)) == TEXT.encode()
    assert isinstance(train.tokens, np.memmap)
    assert not train.tokens.flags.writeable
    assert train.tokens.dtype == np.uint16
    assert train.num_tokens == train.num_bytes == len(TEXT.encode())
    assert train.num_words == len(TEXT.split())
    assert train.num_lines == TEXT.count("\n")
    assert (corpus.name, corpus.tokenizer_spec, corpus.vocab_size) == ("mine", "bytes", 257)
    assert corpus.tokenizer_hash == tokenizer_hash(load_tokenizer("bytes"))
    assert list(corpus.splits) == ["train", "test"]


@pytest.mark.parametrize("parts", [1, 3, 64])
def test_batches_of_parts_hold_the_ids_of_one_string(folder, cache, monkeypatch, parts):
    monkeypatch.setattr(writer, "BATCH_PARTS", parts)
    (folder / "train.txt").write_text("".join(load_corpus("embedded").texts("validation")) * 3)
    corpus = prepare(folder, "bpe:500", cache, splits=["train"])
    text = (folder / "train.txt").read_text()
    assert corpus["train"].tokens.tolist() == corpus.tokenizer.encode(text)


def test_documents_are_each_ended(tmp_path, cache):
    rows = ["one", "two  <|endoftext|>\n", "three"]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    train = prepare(path, "bytes", cache)["train"]
    expected = [*b"one", 256, *b"two  ", 256, *b"\n", 256, *b"three", 256]
    assert train.tokens.tolist() == expected
    assert train.num_bytes == sum(len(row) for row in rows)
    assert train.num_words == 4


def test_vocabularies_beyond_16_bits_get_32(folder, cache):
    state = json.loads(load_tokenizer("bytes").backend_tokenizer.to_str())
    vocabulary = {character: 70_000 + i for character, i in state["model"]["vocab"].items()}
    state["model"]["vocab"] = vocabulary | {f"filler {i}": i for i in range(70_000)}
    state["added_tokens"] = []
    backend = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    train = prepare(folder, tokenizer, cache, splits=["train"])["train"]
    assert train.tokens.dtype == np.uint32
    assert (train.tokens - 70_000).astype(np.uint8).tobytes() == TEXT.encode()


def test_the_side_file_says_what_the_token_file_is(folder, cache):
    train = prepare(folder, "bytes", cache)["train"]
    side = json.loads(train.path.with_suffix(".json").read_text())
    assert side["corpus"] == "mine"
    assert side["tokenizer_spec"] == "bytes"
    assert side["dtype"] == "uint16"
    assert side["num_tokens"] == len(train.tokens)
    assert side["stamp"]["size"] == train.path.stat().st_size
    assert {"python", "scanlm", "tokenizers", "transformers", "numpy"} <= side["versions"].keys()
    assert str(folder) not in json.dumps(side)


def test_a_second_run_tokenises_nothing(folder, cache, counted):
    first = prepare(folder, "bytes", cache)
    second = prepare(folder, "bytes", cache)
    assert counted == ["train", "test"]
    assert second["train"].sha256 == first["train"].sha256
    assert second.fingerprint == first.fingerprint


def test_only_the_missing_split_is_made(folder, cache, counted):
    assert list(prepare(folder, "bytes", cache, splits=["test"]).splits) == ["test"]
    prepare(folder, "bytes", cache)
    assert counted == ["test", "train"]


def test_new_text_or_another_tokenizer_is_tokenised_anew(folder, cache):
    first = prepare(folder, "bytes", cache)
    other = prepare(folder, "bpe:300", cache)
    assert other["train"].path != first["train"].path
    (folder / "train.txt").write_text("New text.")
    assert bytes(prepare(folder, "bytes", cache)["train"].tokens.astype(np.uint8)) == b"New text."
    assert first["train"].num_bytes == len(TEXT.encode())


def test_a_tokenizer_by_name_or_as_an_object_shares_its_tokens(folder, cache, counted):
    first = prepare(folder, "bytes", cache)
    assert prepare(folder, load_tokenizer("bytes"), cache)["test"].path == first["test"].path
    assert counted == ["train", "test"]


def truncate(path):
    os.truncate(path, path.stat().st_size - 2)


def edit(path):
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def edit_and_set_the_time_back(path):
    before = path.stat()
    edit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_another(path):
    path.write_bytes(np.zeros(path.stat().st_size // 2, np.uint16).tobytes())


def remove(path):
    path.unlink()


def break_the_side_file(path):
    path.with_suffix(".json").write_text('{"num_tokens": 3')


def forge_the_side_file(path):
    side = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(side | {"tokenizer_hash": "another"}))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        edit,
        edit_and_set_the_time_back,
        replace_by_another,
        remove,
        break_the_side_file,
        forge_the_side_file,
    ],
)
def test_a_damaged_file_is_made_again(folder, cache, counted, damage):
    first = prepare(folder, "bytes", cache)
    digest = first["train"].sha256
    damage(first["train"].path)
    again = prepare(folder, "bytes", cache)
    assert counted == ["train", "test", "train"]
    assert again["train"].sha256 == digest
    assert bytes(again["train"].tokens.astype(np.uint8)) == TEXT.encode()


def test_a_touched_file_is_hashed_once_and_kept(folder, cache, counted, monkeypatch):
    train = prepare(folder, "bytes", cache)["train"]
    os.utime(train.path, ns=(1, 1))
    prepare(folder, "bytes", cache)
    monkeypatch.setattr("scanlm.data.token_files.sha256_file", lambda path: pytest.fail("hashed"))
    prepare(folder, "bytes", cache)
    assert counted == ["train", "test"]


def test_what_a_killed_run_left_behind_is_removed(folder, cache):
    train = prepare(folder, "bytes", cache)["train"]
    (train.path.parent / "train.bin.999.tmp").write_bytes(b"half")
    train.path.unlink()
    prepare(folder, "bytes", cache)
    assert not temporary_files(cache)


def prepare_together(folder, cache, barrier, results):
    made = []
    write = writer.write_tokens

    def slow(corpus, split, *args):
        time.sleep(0.2)
        made.append(split)
        return write(corpus, split, *args)

    token_files.write_tokens = slow
    barrier.wait()
    tokens = prepare(folder, "bytes", cache)["train"].tokens
    results.put((made, bytes(tokens.astype(np.uint8))))


def test_two_processes_at_once_make_one_set_of_files(folder, cache):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (folder, cache, barrier, results)
    workers = [context.Process(target=prepare_together, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    made, texts = zip(*(results.get(timeout=60) for _ in workers), strict=True)
    for worker in workers:
        worker.join()
    assert sorted(made) == [[], ["train", "test"]]
    assert texts == (TEXT.encode(), TEXT.encode())
    assert not temporary_files(cache)


def test_prepared_files_are_opened_without_the_lock(folder, cache):
    train = prepare(folder, "bytes", cache)["train"]
    with FileLock(train.path.parent / "lock"):
        prepare(folder, "bytes", cache)


def test_a_full_disk_is_named_and_leaves_nothing(folder, cache, monkeypatch):
    def full(handle, data):
        handle.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write", full)
        with pytest.raises(ScanLMError, match=r"no space left in .*cache.*need about [\d.]+ MB"):
            prepare(folder, "bytes", cache)
    assert not temporary_files(cache)
    assert not list(cache.rglob("*.bin"))
    assert prepare(folder, "bytes", cache)["train"].num_bytes == len(TEXT.encode())


def test_the_space_named_is_that_of_the_whole_split(folder, cache, monkeypatch):
    (folder / "train.txt").write_text("word " * 2_000_000)
    written = []

    def full_soon(handle, data):
        written.append(len(data))
        if sum(written) > 12_000_000:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_write", full_soon)
    with pytest.raises(ScanLMError) as caught:
        prepare(folder, "bytes", cache)
    named = float(str(caught.value).split("about ")[1].split(" MB")[0])
    assert named == pytest.approx(20, rel=0.05)


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ScanLMError, match=r"cannot write token files to .*file/cache.*choose"):
        prepare(folder, "bytes", tmp_path / "file" / "cache")
    with pytest.raises(ScanLMError, match="cannot write to cache folder"):
        prepare(folder, "bpe:300", tmp_path / "file" / "cache")


@pytest.mark.parametrize("text", ["", " \n\t\n  "])
def test_a_blank_split_is_refused(folder, cache, text):
    (folder / "test.txt").write_text(text)
    with pytest.raises(ScanLMError, match="split 'test' of corpus 'mine' is empty or blank"):
        prepare(folder, "bytes", cache)
    assert not temporary_files(cache)


def test_missing_splits_are_named(folder, cache):
    with pytest.raises(ScanLMError, match="no split 'validation'; it has train, test"):
        prepare(folder, "bytes", cache, splits=["validation"])
    with pytest.raises(ScanLMError, match="no split 'train'; it has test"):
        prepare(folder, "bytes", cache, splits=["test"])["train"]


def test_another_tokenizer_is_noticed(folder, cache):
    corpus = prepare(folder, "bpe:300", cache)
    corpus.require_tokenizer(tokenizer_hash(corpus.tokenizer), "the run")
    with pytest.raises(ScanLMError, match=r"'mine' is tokenised with 'bpe:300', the run with ano"):
        corpus.require_tokenizer(tokenizer_hash(load_tokenizer("bytes")), "the run")


def test_the_embedded_corpus_needs_no_download(cache):
    corpus = prepare("embedded", cache_dir=cache)
    assert corpus.tokenizer_spec == "bytes"
    text = "".join(load_corpus("embedded").texts("validation"))
    assert corpus.tokenizer.decode(corpus["validation"].tokens) == text


def test_a_slice_of_the_embedded_corpus_keeps_its_tokenizer(cache):
    corpus = prepare("embedded#train=test[:50%]", cache_dir=cache, splits=["train"])
    assert corpus.tokenizer_spec == "bytes"


@pytest.mark.parametrize("spec", ["wikitext-2", "wikitext-2#train=validation[:50%]"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_prepared_hub_corpus_needs_no_network(cache, monkeypatch, counted, spec, tokenizer):
    import datasets

    rows = {"text": ["", " Some text here . \n", " More of it . \n"] * 30}
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_dict(rows))
        first = prepare(spec, tokenizer, cache)

    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    second = prepare(spec, tokenizer, cache)
    assert counted == ["train", "validation", "test"]
    assert second["test"].tokens.tolist() == first["test"].tokens.tolist()
    assert second.fingerprint == first.fingerprint
    assert second.name == first.name == spec
    assert tokenizer_hash(second.tokenizer) == second.tokenizer_hash == first.tokenizer_hash
    with pytest.raises(ScanLMError, match="scanlm prepare wikitext-103"):
        prepare("wikitext-103", "bytes", cache)
    edit(second["test"].path)
    with pytest.raises(ScanLMError, match="HF_HUB_OFFLINE"):
        prepare(spec, tokenizer, cache)
    assert prepare(spec, tokenizer, cache, splits=["train"])["train"].num_words > 0


def test_a_copied_cache_is_used_elsewhere(folder, cache, tmp_path, counted):
    prepare(folder, "bytes", cache)
    shutil.copytree(cache, tmp_path / "copy", copy_function=shutil.copyfile)
    prepare(folder, "bytes", tmp_path / "copy")
    assert counted == ["train", "test"]


def test_each_column_of_a_table_has_token_files_of_its_own(tmp_path, cache):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "first", "content": "second"}))
    text, content = (prepare(f"{path}{rule}", "bytes", cache) for rule in ("", "#column=content"))
    assert (text.name, content.name) == ("rows.jsonl", "rows.jsonl#column=content")
    assert bytes(content["train"].tokens[:-1].astype(np.uint8)) == b"second"
    assert text["train"].path.parent != content["train"].path.parent
    assert prepare(f"{path}#column=text", "bytes", cache)["train"].path == text["train"].path
