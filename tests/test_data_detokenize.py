"""WikiText's spaces undone, and what is counted."""

from pathlib import Path

import pytest

from scanlm.data import prepare
from scanlm.data.corpora import load_corpus
from scanlm.data.detokenize import detokenize


@pytest.mark.parametrize(
    ("spaced", "printed"),
    [
        (" Hung 's works , he said ; some ( not all ) were lost . \n",
         "Hung's works, he said; some (not all) were lost.\n"),
        (" a clear @-@ sighted 1 @,@ 200 @.@ 5 t \n", "a clear-sighted 1,200.5 t\n"),
        (' " One " , " two ( 2 ) " and " three \n', '"One", "two (2)" and "three\n'),
        (" It didn 't , they 're sure : 50 % of $ 3 ! \n", "It didn't, they're sure: 50% of $3!\n"),
        (" the workers ' rights and ' 97 \n", "the workers' rights and ' 97\n"),
        (" a [ sic ] { b } \n", "a [sic] {b}\n"),
        (" = = Early life , and later = = \n", "= = Early life , and later = =\n"),
        (" \n", "\n"),
        ("", ""),
        ("Ordinary text, as it is: 3.5 (or more).\n", "Ordinary text, as it is: 3.5 (or more).\n"),
    ],
)  # fmt: skip
def test_lines_worked_by_hand(spaced: str, printed: str) -> None:
    assert detokenize(spaced) == printed
    assert detokenize(printed) == printed  # twice is once


def test_a_corpus_is_read_printed_and_counted_in_the_original(tmp_path: Path) -> None:
    (tmp_path / "wikitext").mkdir()
    text = " = A = \n \n One , two @-@ three . \n"
    for split in ("train", "test"):
        (tmp_path / "wikitext" / f"{split}.txt").write_text(text)
    folder = str(tmp_path / "wikitext")
    corpus = load_corpus(f"{folder}#detokenized")
    assert "".join(corpus.texts("test")) == "= A =\n\nOne, two-three.\n"
    assert corpus.name == "wikitext#detokenized"
    assert corpus.fingerprint("test") != load_corpus(folder).fingerprint("test")
    tokens = prepare(f"{folder}#detokenized", "bytes", tmp_path / "cache")
    part = tokens.splits["test"]
    assert (part.num_tokens, part.num_words, part.num_lines) == (23, 9, 3)
    assert part.num_bytes == 23


def test_it_goes_together_with_slices(tmp_path: Path) -> None:
    (tmp_path / "validation.txt").write_text("".join(f" line , {i} \n" for i in range(10)))
    spec = f"{tmp_path}#detokenized,train=validation[:50%],validation=validation[50%:]"
    corpus = load_corpus(spec)
    assert "".join(corpus.texts("train")) == "".join(f"line, {i}\n" for i in range(5))
    assert corpus.name == (
        f"{tmp_path.name}#detokenized,train=validation[:50%],validation=validation[50%:]"
    )


def test_documents_are_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": " One , \\n two . "}\n')
    corpus = load_corpus(f"{tmp_path}#detokenized")
    assert list(corpus.texts("test")) == ["One,\ntwo."]
