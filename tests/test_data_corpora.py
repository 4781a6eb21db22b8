import gzip
import json
import lzma
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from scanlm.data import files
from scanlm.data.corpora import EmbeddedCorpus, load_corpus
from scanlm.data.files import split_lines
from scanlm.errors import ScanLMError

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def text_of(corpus, split):
    return "".join(corpus.texts(split))


def write_folder(folder, **texts):
    folder.mkdir(exist_ok=True)
    for split, text in texts.items():
        (folder / f"{split}.txt").write_bytes(text.encode())
    return folder


def test_embedded_splits_are_all_topics_and_share_no_paragraph():
    from pydoc_data.topics import topics

    corpus = EmbeddedCorpus()
    names = [name for split in corpus.splits for name in corpus.topics[split]]
    assert sorted(names) == sorted(topics)
    paragraphs = {}
    for split in corpus.splits:
        for paragraph in text_of(corpus, split).split("\n\n"):
            if len(paragraph) > 80:
                assert paragraphs.setdefault(paragraph, split) == split


def test_embedded_splits_have_their_shares():
    corpus = load_corpus("embedded")
    sizes = {split: len(text_of(corpus, split)) for split in corpus.splits}
    shares = {split: size / sum(sizes.values()) for split, size in sizes.items()}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.01)


@pytest.mark.parametrize("compression", COMPRESS)
def test_folder_text_comes_back_exactly(tmp_path, monkeypatch, compression):
    # Small reads cut characters of two, three and four bytes apart.
    monkeypatch.setattr(files, "CHUNK_BYTES", 5)
    text = "a\r\n café – 中文 \U0001f600\n\n" * 20
    (tmp_path / f"test.txt{compression}").write_bytes(COMPRESS[compression](text.encode()))
    corpus = load_corpus(tmp_path)
    assert corpus.splits == ("test",)
    assert text_of(corpus, "test") == text


def test_compressed_files_of_several_members_are_read_to_the_end(tmp_path):
    for number, (compression, compress) in enumerate(COMPRESS.items()):
        data = compress(b"one\n") + compress(b"two\n")
        (tmp_path / f"train-{number}.txt{compression}").write_bytes(data)
    assert text_of(load_corpus(tmp_path), "train") == "one\ntwo\n" * 4


def test_shards_are_joined_in_natural_order(tmp_path):
    for number in (10, 2, 1):
        (tmp_path / f"train-{number}.txt").write_text(f"{number} ")
    assert text_of(load_corpus(tmp_path), "train") == "1 2 10 "


def test_two_files_for_one_shard_are_refused(tmp_path):
    write_folder(tmp_path, train="a")
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(b"a"))
    with pytest.raises(ScanLMError, match=r"train\.txt and train\.txt\.gz both claim.*'train'"):
        load_corpus(tmp_path)


def test_a_split_both_whole_and_in_shards_is_refused(tmp_path):
    write_folder(tmp_path, train="a")
    (tmp_path / "train-0.txt").write_text("b")
    with pytest.raises(ScanLMError, match="both claim split 'train'"):
        load_corpus(tmp_path)


def test_single_files_take_their_split_from_their_name(tmp_path):
    for name, split in (("novel.txt", "train"), ("validation-3.txt", "validation")):
        (tmp_path / name).write_text("words")
        assert load_corpus(tmp_path / name).splits == (split,)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst"])
def test_table_rows_are_documents_and_blank_rows_are_left_out(tmp_path, kind):
    rows = [{"body": "first\nrow", "n": 1}, {"body": None}, {"body": " \n"}, {"body": "zweite ü"}]
    path = tmp_path / f"validation-0.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
        path.write_bytes(COMPRESS[path.suffix if kind != "jsonl" else ""](data))
    corpus = load_corpus(f"{tmp_path}#column=body")
    assert corpus.documents
    assert list(corpus.texts("validation")) == ["first\nrow", "zweite ü"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_missing_column_offers_the_nearest(tmp_path, kind):
    path = tmp_path / f"train.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"texts": ["a"]}), path)
    else:
        path.write_text('{"texts": "a"}\n')
    with pytest.raises(ScanLMError, match=r"no column 'text', .* 'folder#column=texts'"):
        list(load_corpus(path).texts("train"))


def test_a_column_of_numbers_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(ScanLMError, match="row 2: column 'text' holds int, expected text"):
        list(load_corpus(tmp_path).texts("train"))


def test_bad_json_names_its_line(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ScanLMError, match="line 2: not JSON"):
        list(load_corpus(tmp_path).texts("train"))


@pytest.mark.parametrize("offset", [0, 3, 4, 11, 12, 40])
def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path, monkeypatch, offset):
    monkeypatch.setattr(files, "CHUNK_BYTES", 4)
    data = b"a" * offset + b"\xff" + b"b" * 9
    (tmp_path / "train.txt").write_bytes(data)
    with pytest.raises(ScanLMError, match=rf"train\.txt is not UTF-8 .*byte offset {offset};"):
        list(load_corpus(tmp_path).texts("train"))


def test_a_character_cut_off_at_the_end_is_named_with_its_offset(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"abc" + "中".encode()[:2])
    with pytest.raises(ScanLMError, match="byte offset 3;"):
        list(load_corpus(tmp_path).texts("train"))


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_truncated_compressed_file_is_refused(tmp_path, compression):
    data = COMPRESS[compression](bytes(range(65, 91)) * 400)
    path = tmp_path / f"train.txt{compression}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ScanLMError, match=r"cannot read .*is the file complete"):
        list(load_corpus(tmp_path).texts("train"))


def test_unknown_names_offer_the_nearest():
    with pytest.raises(ScanLMError, match=r"unknown corpus 'wikitext103'.*'wikitext-103'"):
        load_corpus("wikitext103")


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("a")
    with pytest.raises(ScanLMError, match=r"expected train\.txt"):
        load_corpus(tmp_path)


def test_a_missing_split_lists_those_there_are(tmp_path):
    corpus = load_corpus(write_folder(tmp_path / "mine", test="a", validation="b"))
    with pytest.raises(ScanLMError, match="'mine' has no split 'train'; it has validation, test"):
        corpus.texts("train")


def test_the_fingerprint_follows_content_not_time_or_place(tmp_path):
    first = load_corpus(write_folder(tmp_path / "a", train="same", test="x"))
    second = load_corpus(write_folder(tmp_path / "b", train="same", test="y"))
    assert first.fingerprint("train") == second.fingerprint("train", tmp_path / "cache")
    assert first.fingerprint("test") != second.fingerprint("test")


def test_an_unchanged_file_is_not_hashed_again(tmp_path, monkeypatch):
    corpus = load_corpus(write_folder(tmp_path / "a", train="text"))
    value = corpus.fingerprint("train", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("scanlm.data.fingerprints.sha256_file", lambda path: pytest.fail("hashed"))
        assert corpus.fingerprint("train", tmp_path / "cache") == value
    write_folder(tmp_path / "a", train="Text")
    assert corpus.fingerprint("train", tmp_path / "cache") != value


@given(st.lists(st.text(alphabet="ab\n\r\u2028", max_size=6)))
def test_lines_do_not_depend_on_the_pieces(pieces):
    lines = [line for line, _ in split_lines((piece, 0.0) for piece in pieces)]
    assert "".join(lines) == "".join(pieces)
    assert all(line.endswith("\n") for line in lines[:-1])
    assert all("\n" not in line[:-1] for line in lines)


@given(
    st.lists(st.text(alphabet="aé", max_size=9), min_size=1, max_size=30),
    st.sampled_from([10, 33.3, 50, 90]),
)
def test_slices_that_meet_share_no_line_and_miss_none(tmp_path_factory, lines, cut):
    text = "\n".join(lines) + "\n"
    folder = write_folder(tmp_path_factory.mktemp("corpus"), validation=text, test="kept")
    rules = f"train=validation[:{cut}%],validation=validation[{cut}%:]"
    corpus = load_corpus(f"{folder}#{rules}")
    assert corpus.splits == ("train", "validation", "test")
    train, validation = text_of(corpus, "train"), text_of(corpus, "validation")
    assert train + validation == text
    assert train.endswith("\n") or not train
    # The cut is the first line start at or behind the wanted character.
    wanted = math.ceil(cut * len(text) / 100)
    assert len(train) >= wanted
    assert "\n" not in text[wanted - 1 : len(train) - 1]
    assert text_of(corpus, "test") == "kept"


def test_documents_are_sliced_whole(tmp_path):
    rows = "".join(json.dumps({"text": f"{n}\nx"}) + "\n" for n in range(10))
    (tmp_path / "train.jsonl").write_text(rows)
    corpus = load_corpus(f"{tmp_path}#test=train[80%:]&train=train[:80%]")
    assert list(corpus.texts("test")) == ["8\nx", "9\nx"]
    assert len(list(corpus.texts("train"))) == 8


def test_slices_have_fingerprints_and_names_of_their_own(tmp_path):
    folder = write_folder(tmp_path / "mine", validation="a\nb\n")
    whole = load_corpus(folder)
    half = load_corpus(f"{folder}#train=validation[:50%]")
    assert half.name == "mine#train=validation[:50%]"
    assert half.fingerprint("train") != whole.fingerprint("validation")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("train=validation[:90]", "bad split rule"),
        ("trian=validation[:90%]", "unknown split 'trian'.*Did you mean 'train'"),
        ("train=test[:90%]", "has no split 'test'; it has validation"),
        ("train=validation[90%:10%]", "expected 0 <= LOW < HIGH <= 100"),
        ("train=validation[:110%]", "expected 0 <= LOW < HIGH <= 100"),
        ("train=validation,train=validation", "'train' is defined twice"),
    ],
)
def test_bad_slices_are_refused(tmp_path, rules, message):
    folder = write_folder(tmp_path, validation="a\nb\n")
    with pytest.raises(ScanLMError, match=message):
        load_corpus(f"{folder}#{rules}")


def test_hub_rows_become_the_lines_of_the_raw_file(monkeypatch):
    import datasets

    rows = ["", " = Title = \n", "", " Text .\n"] * 200

    def load(path, name, split):
        assert (path, name, split) == ("Salesforce/wikitext", "wikitext-103-raw-v1", "test")
        return datasets.Dataset.from_dict({"text": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("wikitext-103", "wikitext-103-raw-v1"):
        corpus = load_corpus(name)
        assert corpus.name == "wikitext-103"
        assert text_of(corpus, "test") == "\n = Title = \n\n Text .\n" * 200


def test_without_a_network_the_message_says_what_to_do(monkeypatch):
    import datasets

    def load(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ScanLMError, match=r"scanlm prepare wikitext-2.*HF_HUB_OFFLINE") as caught:
        list(load_corpus("wikitext-2").texts("test"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def table(tmp_path):
    """A folder of two splits whose rows have three columns of text."""
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [{"text": f"t{n}", "content": f" c , {n} ", "my text: a=b#c": f"m{n}"} for n in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows[:2]), folder / "validation.parquet")
    return folder


def test_the_column_is_part_of_the_name_and_of_the_content(table):
    default, content = load_corpus(table), load_corpus(f"{table}#column=content")
    assert (default.name, content.name) == ("mine", "mine#column=content")
    assert list(content.texts("validation")) == [" c , 0 ", " c , 1 "]
    for split in default.splits:
        assert default.fingerprint(split) != content.fingerprint(split)
    single = load_corpus(f"{table}/train.jsonl#column=content")
    assert single.name == "train.jsonl#column=content"
    assert list(single.texts("train")) == list(content.texts("train"))


def test_naming_the_default_column_names_the_same_corpus(table):
    default, named = load_corpus(table), load_corpus(f"{table}#column=text")
    assert named.name == default.name
    assert named.fingerprint("train") == default.fingerprint("train")


def test_columns_may_have_names_with_spaces_and_signs(table):
    corpus = load_corpus(f"{table}#column=my text: a=b#c,train=validation")
    assert list(corpus.texts("train")) == ["m0", "m1"]
    assert corpus.name == "mine#column=my text: a=b#c,train=validation"


@pytest.mark.parametrize(
    "rules",
    [
        "column=content,detokenized,train=validation[50%:],test=train[:50%]",
        "test=train[:50%] & detokenized & train=validation[50%:] & column=content",
    ],
)
def test_a_column_goes_together_with_the_other_rules_in_any_order(table, rules):
    corpus = load_corpus(f"{table}#{rules}")
    expected = "mine#column=content,detokenized,train=validation[50%:],test=train[:50%]"
    assert corpus.name == expected
    assert list(corpus.texts("train")) == ["c, 1"]
    assert list(corpus.texts("test")) == ["c, 0", "c, 1"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_missing_column_lists_those_there_are_nearest_first(table, split):
    expected = (
        f"{split}\\.\\w+(, line 1)?: no column 'contents', there are 'content', 'text', "
        "'my text: a=b#c'; name the text column in the corpus, for example 'folder#column=content'"
    )
    with pytest.raises(ScanLMError, match=expected):
        list(load_corpus(f"{table}#column=contents").texts(split))


def test_of_many_columns_the_nearest_are_listed(tmp_path):
    row = {f"c{n}": "" for n in range(40)} | {"Text": "a"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(ScanLMError, match=r"there are 'Text', 'c0'.* and 21 more;") as caught:
        list(load_corpus(tmp_path).texts("train"))
    assert "'c39'" not in str(caught.value)


def test_a_row_without_any_column_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{}\n')
    with pytest.raises(ScanLMError, match="line 2: no column 'text' nor any other"):
        list(load_corpus(tmp_path).texts("train"))


def test_a_column_of_plain_text_is_refused(tmp_path):
    folder = write_folder(tmp_path / "mine", train="a\n")
    for spec in (folder, folder / "train.txt", "embedded", "wikitext-2"):
        for column in ("content", "text"):
            message = f"plain text, which has no columns: leave out column={column}"
            with pytest.raises(ScanLMError, match=message):
                load_corpus(f"{spec}#column={column},test=train")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("column=", "expected one column, for example column=content"),
        ("column=a,column=b", "expected one column"),
        ("colum=content", "unknown split 'colum'.*Did you mean 'column'"),
        ("detokenised", "bad split rule.* other rules are column=NAME and detokenized"),
    ],
)
def test_bad_column_rules_are_refused(table, rules, message):
    with pytest.raises(ScanLMError, match=message):
        load_corpus(f"{table}#{rules}")
