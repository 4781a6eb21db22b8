"""WikiText's spaced tokens turned back into ordinary prose.

WikiText sets spaces around punctuation and writes ``@-@``, ``@,@`` and ``@.@`` for signs inside
words and numbers. To a model trained on ordinary text this is foreign. Undoing it makes such a
model's reading of WikiText fair; its loss is still divided by the *original's* words, as is usual,
so that perplexities per word compare with those of models that read the spaced text.

The rules are heuristics (a space before an apostrophe may be a quotation or a plural), applied line
by line. Headings, ``= Title =``, stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from scanlm.data.corpora import Corpus, with_rule
from scanlm.data.files import Piece, digest, split_lines

RULE = "detokenized"
VERSION = 1  # of the rules: part of the fingerprint

_INSIDE = re.compile(r" ?@([-,.])@ ?")
_CLITIC = re.compile(r" '(?=(?:s|t|d|m|re|ve|ll|em)\b)", re.IGNORECASE)
_PLURAL = re.compile(r"(?<=s) ' (?=\w)")
_CLOSING = re.compile(r" (?=[,.;:!?%)\]}])")
_OPENING = re.compile(r"(?<=[(\[{$£€¥]) ")
_QUOTE = re.compile(r'(?:(?<= )|^)"(?=$| )')


def detokenize(line: str) -> str:
    """One line of WikiText as it would be printed, without the spaces at its ends.

    >>> detokenize(' It cost $ 1 @,@ 200 ( " a bargain " ) , didn \\'t it ? \\n')
    'It cost $1,200 ("a bargain"), didn\\'t it?\\n'
    """
    text = line.rstrip("\n")
    end = line[len(text) :]
    text = text.strip(" ")
    if text.startswith("= "):
        return text + end
    text = _CLITIC.sub("'", _INSIDE.sub(r"\1", text))
    text = _PLURAL.sub("' ", text)
    return _OPENING.sub("", _CLOSING.sub("", _quotes(text))) + end


def _quotes(text: str) -> str:
    """Quotation marks set against what they enclose, opening and closing in turn."""
    pieces, begin, opening = [], 0, True
    for match in _QUOTE.finditer(text):
        at = match.start()
        if opening:
            pieces += [text[begin:at], '"']
            begin = at + 2  # without the space behind
        else:
            pieces += [text[begin : max(at - 1, begin)], '"']
            begin = at + 1
        opening = not opening
    return "".join([*pieces, text[begin:]])


class DetokenizedCorpus(Corpus):
    """Another corpus, detokenised; words and lines are counted in the original."""

    def __init__(self, base: Corpus) -> None:
        self.base, self.splits, self.documents = base, base.splits, base.documents
        self.name = with_rule(base.name, RULE)
        self.offline_key = base.offline_key and with_rule(base.offline_key, RULE)

    def pieces(self, split: str) -> Iterator[Piece]:
        """The base's lines or documents."""
        if not self.documents:
            for line, done in split_lines(self.base.pieces(split)):
                yield detokenize(line), done
            return
        for document, done in self.base.pieces(split):
            yield "".join(map(detokenize, document.splitlines(keepends=True))), done

    def fingerprint(self, split: str, cache_dir: str | Path | None = None) -> str:
        """The base's, with the version of the rules."""
        return digest([self.base.fingerprint(split, cache_dir), RULE, VERSION])

    def counts(self, split: str) -> dict[str, int]:
        """Of the base: another pass over its text."""
        words = lines = 0
        for text in self.base.texts(split):
            words += len(text.split())
            lines += text.count("\n")
        return {"num_words": words, "num_lines": lines}
