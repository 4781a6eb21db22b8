"""New splits out of slices of others, in the slicing syntax of Hugging Face datasets.

``train=validation[:90%],validation=validation[90%:]`` trains on the first 90 % of the validation
text and keeps the rest as validation; splits that no rule names (here test) stay as they are. A
slice is cut at line starts (documents: between documents): it holds exactly the lines whose first
character lies in ``[low, high)`` per cent of the split's characters, so slices that meet share no
line and miss none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from scanlm.data.corpora import COLUMN, SPLITS, Corpus, with_rule
from scanlm.data.detokenize import RULE
from scanlm.data.files import Piece, digest, split_lines
from scanlm.errors import ScanLMError, nearest

_NUMBER = r"(\d+(?:\.\d+)?)%"
_RULE = re.compile(rf"(\w+)=(\w+)(?:\[(?:{_NUMBER})?:(?:{_NUMBER})?\])?")


class SlicedCorpus(Corpus):
    """A corpus whose splits are slices ``(base split, low, high)`` of another's, in per cent."""

    def __init__(self, base: Corpus, slices: dict[str, tuple[str, float, float]]) -> None:
        self.base = base
        self.slices = {split: (split, 0.0, 100.0) for split in base.splits} | slices
        self.splits = tuple(split for split in SPLITS if split in self.slices)
        self.documents = base.documents
        rules = ",".join(f"{split}={_spell(*slices[split])}" for split in SPLITS if split in slices)
        self.name = with_rule(base.name, rules)
        self.offline_key = base.offline_key and with_rule(base.offline_key, rules)
        self._length: dict[str, int] = {}

    def pieces(self, split: str) -> Iterator[Piece]:
        """The lines or documents of the slice; two passes over the base split when it is a part."""
        source, low, high = self.slices[split]
        if (low, high) == (0.0, 100.0):
            yield from self.base.pieces(source)
            return
        if source not in self._length:
            self._length[source] = sum(len(text) for text, _ in self.base.pieces(source))
        # Compared as products, so that 90 % ends exactly where 90 % begins.
        first, last = low * self._length[source], high * self._length[source]
        start = 0
        pieces = self.base.pieces(source)
        for text, done in pieces if self.documents else split_lines(pieces):
            if start * 100 >= last:
                return
            if start * 100 >= first:
                yield text, min(max((done * 100 - low) / (high - low), 0.0), 1.0)
            start += len(text)

    def fingerprint(self, split: str, cache_dir: str | Path | None = None) -> str:
        """The base split's fingerprint, with the slice."""
        self.require(split)
        source, low, high = self.slices[split]
        return digest([self.base.fingerprint(source, cache_dir), low, high])


def resplit(base: Corpus, rules: str) -> SlicedCorpus:
    """The corpus with splits redefined by `rules`, as in the module's docstring.

    Rules are separated by commas or ``&``; the bounds of a slice default to the start and the end.

    Raises:
        ScanLMError: a rule that does not parse, an unknown split, an empty or reversed slice.
    """
    slices: dict[str, tuple[str, float, float]] = {}
    for rule in re.split(r"[,&]", rules):
        match = _RULE.fullmatch(rule.strip())
        if match is None:
            raise ScanLMError(
                f"bad split rule {rule!r}: expected SPLIT=SPLIT[LOW%:HIGH%], for example "
                "train=validation[:90%],validation=validation[90%:]; the other rules are "
                f"{COLUMN}NAME and {RULE}"
            )
        split, source = match.group(1, 2)
        low, high = float(match.group(3) or 0), float(match.group(4) or 100)
        if split not in SPLITS:
            known = [*SPLITS, COLUMN.removesuffix("=")]
            raise ScanLMError(f"unknown split {split!r} in rule {rule!r}.{nearest(split, known)}")
        base.require(source)
        if split in slices:
            raise ScanLMError(f"split {split!r} is defined twice in {rules!r}; keep one rule")
        if not 0 <= low < high <= 100:
            raise ScanLMError(
                f"bad slice in rule {rule!r}: expected 0 <= LOW < HIGH <= 100 per cent"
            )
        slices[split] = (source, low, high)
    return SlicedCorpus(base, slices)


def _spell(source: str, low: float, high: float) -> str:
    if (low, high) == (0.0, 100.0):
        return source
    return f"{source}[{f'{low:g}%' if low else ''}:{f'{high:g}%' if high < 100 else ''}]"
