"""Byte-level BPE tokenizers, and cutting a text where tokenising the parts changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from scanlm.data.corpora import Corpus
from scanlm.data.files import Piece, digest
from scanlm.data.fingerprints import file_stamp
from scanlm.errors import ScanLMError, nearest

END_OF_TEXT = "<|endoftext|>"
HUB_NAMES = {"gpt2": "openai-community/gpt2", "openai-community/gpt2": "openai-community/gpt2"}
NUM_BYTES = 256
LARGEST_BPE = 2**20  # entries
GPT2_VOCABULARY = 50257
_BPE = re.compile(r"bpe:(\d+)")


def load_tokenizer(
    spec: str | Path, corpus: Corpus | None = None, cache_dir: str | Path = "data/cache"
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that gives every text back exactly.

    Args:
        spec: ``gpt2`` (from the Hub the first time, then from the cache), a folder (of a Hugging
            Face tokenizer, or with only ``vocab.json`` and ``merges.txt``), ``bytes`` (id = byte,
            256 is the end of text), or ``bpe:<size>`` (trained on the corpus's train split, at most
            `size` entries with the 256 bytes and the end of text).
        corpus: the corpus to train ``bpe:<size>`` on.
        cache_dir: where tokenizers that were downloaded or trained are kept.

    Raises:
        ScanLMError: unknown, missing, damaged or not GPT-2's kind of tokenizer; ``bpe`` without a
            corpus or train split.
    """
    spec = str(spec)
    cache = Path(cache_dir) / "tokenizers"
    if spec == "bytes":
        return _wrap(_byte_tokenizer())
    if spec in HUB_NAMES:
        return _from_hub(HUB_NAMES[spec], cache / "gpt2")
    if match := _BPE.fullmatch(spec):
        return _trained(int(match.group(1)), corpus, Path(cache_dir))
    if Path(spec).expanduser().is_dir():
        return _from_folder(Path(spec).expanduser())
    _unknown(spec)


def vocabulary_size(spec: str | Path) -> tuple[int, bool]:
    """How many entries the tokenizer of `load_tokenizer` has, without a corpus or a download.

    Args:
        spec: as for `load_tokenizer`.

    Returns:
        The size, and whether it is exact: of ``bpe:<size>`` it is the largest possible, which a
        short text does not reach.

    Raises:
        ScanLMError: as `load_tokenizer`.
    """
    spec = str(spec)
    if spec == "bytes":
        return NUM_BYTES + 1, True
    if spec in HUB_NAMES:
        return GPT2_VOCABULARY, True
    if match := _BPE.fullmatch(spec):
        return _check_size(int(match.group(1))), False
    folder = Path(spec).expanduser()
    if folder.is_dir():
        # a sweep asks once a run, and GPT-2's takes half a second to load
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        stamps = tuple((path.name, *file_stamp(path).values()) for path in files)
        return _folder_size(folder.resolve(), stamps), True
    _unknown(spec)


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of everything that decides which ids a text gets; library versions do not matter."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    added = sorted((token["id"], token["content"]) for token in state["added_tokens"])
    return digest([sorted(state["model"]["vocab"].items()), merges, added])


def safe_pieces(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerFast, size: int = 1 << 14
) -> Iterator[Piece]:
    r"""Cut a text so that the ids of the parts, put together, are the ids of the whole.

    GPT-2 splits a text into words by ``... ?\p{L}+|...|\s+(?!\S)|\s+`` before it merges bytes. In
    a run of whitespace before something else, the last whitespace character always begins a new
    word, and nothing that follows decides how the text before it is split: that is where to cut.
    The exception is an added token such as ``<|endoftext|>`` behind the run, because it is taken
    out of the text first and the run then ends a string of its own.

    Args:
        pieces: the text in pieces of any size.
        tokenizer: a tokenizer that `load_tokenizer` accepts.
        size: about how many characters a part has; longer where a single word or a single run of
            whitespace is.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    lookahead = max((len(content) for content in added), default=0) + 1
    forbidden = "|".join(re.escape(content) for content in added)
    guard = f"(?!.(?:{forbidden}))" if added else ""
    # Python counts four control characters as \s that Unicode does not, so its \S is the narrower.
    cut = re.compile(rf"(?s){guard}[ \t\r\n](?=\S)")
    held: list[str] = []
    held_size, wanted, done = 0, size, 0.0
    for piece, done in pieces:
        held.append(piece)
        held_size += len(piece)
        if held_size < wanted + lookahead:
            continue
        text, start = "".join(held), 0
        # not search's endpos: it would hide an added token that crosses it
        while (match := cut.search(text, start + size)) and match.end() + lookahead <= len(text):
            yield text[start : match.start()], done
            start = match.start()
        held, held_size = [text[start:]], len(text) - start
        # Without a place to cut, look again only when the rest has doubled.
        wanted = max(size, 2 * held_size)
    if tail := "".join(held):
        yield tail, done


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a tokenizer folder so that it is there as a whole or not at all; keeps an older one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.", suffix=".tmp")
    try:
        tokenizer.save_pretrained(temporary)
        Path(temporary).chmod(0o755)
        os.rename(temporary, folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():
            raise


def _unknown(spec: str) -> NoReturn:
    raise ScanLMError(
        f"unknown tokenizer {spec!r}: expected gpt2, bytes, bpe:<size> or a tokenizer folder."
        f"{nearest(spec, ('gpt2', 'bytes', 'bpe:<size>'))}"
    )


@cache
def _folder_size(folder: Path, stamps: tuple[Any, ...]) -> int:
    return len(_from_folder(folder))


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return _settle(
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            unk_token=END_OF_TEXT,
        )
    )


def _settle(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """No spaces cleaned up when decoding, and no length past which the library warns."""
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def _byte_level(model: models.BPE) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_tokenizer() -> Tokenizer:
    # GPT-2's printable stand-ins for bytes: these characters themselves, the others from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable}
    stand_in |= {byte: chr(NUM_BYTES + index) for index, byte in enumerate(others)}
    vocabulary = {stand_in[byte]: byte for byte in range(NUM_BYTES)}
    backend = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens([END_OF_TEXT])
    return backend


def _from_hub(name: str, kept: Path) -> PreTrainedTokenizerFast:
    if (kept / "tokenizer.json").is_file():
        return _from_folder(kept)
    from huggingface_hub import snapshot_download

    try:
        # from_pretrained(name) would, without a network, return a tokenizer without vocabulary
        folder = snapshot_download(name, allow_patterns=["vocab.json", "merges.txt"])
    # Without a network the loader raises whatever its HTTP client does.
    except Exception as error:
        raise ScanLMError(
            f"cannot load tokenizer 'gpt2' ({name}) from the Hugging Face Hub: "
            f"{type(error).__name__}; run `scanlm prepare` once on a machine with network, or give "
            "a folder that has GPT-2's vocab.json and merges.txt"
        ) from error
    tokenizer = _from_folder(Path(folder))
    try:
        save_tokenizer(tokenizer, kept)
    except OSError as error:
        raise ScanLMError(f"cannot write to cache folder {kept.parent}: {error}") from error
    return tokenizer


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    present = {path.name for path in folder.iterdir()}
    if not present & {"tokenizer.json", "tokenizer_config.json"} and not (
        {"vocab.json", "merges.txt"} <= present
    ):
        raise ScanLMError(
            f"tokenizer folder {str(folder)!r}: expected tokenizer.json, or vocab.json and "
            "merges.txt"
        )
    try:
        if "tokenizer_config.json" in present:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        elif "tokenizer.json" in present:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        else:
            tokenizer = GPT2Tokenizer.from_pretrained(str(folder), local_files_only=True)
    # The loaders raise bare Exception for damaged files.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ScanLMError(f"cannot load tokenizer folder {str(folder)!r}: {reason}") from error
    check_byte_level(tokenizer, str(folder))
    return _settle(tokenizer)


def check_byte_level(tokenizer: Any, name: str) -> None:
    """Raise a ScanLMError unless the tokenizer is a byte-level BPE that splits words as GPT-2 does.

    Only for these are the cuts of `safe_pieces` proved, and only these give every text back.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    splitter = state.get("pre_tokenizer") or {}
    plain = (
        state.get("model", {}).get("type") == "BPE"
        and not state.get("normalizer")
        and splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter.get("add_prefix_space")
    )
    strips = any(
        token["lstrip"]
        or token["rstrip"]
        or token["single_word"]
        or re.search(r"\s", token["content"])
        for token in state.get("added_tokens", [])
    )
    if not plain or strips:
        raise ScanLMError(
            f"tokenizer {name!r} is not GPT-2's kind of byte-level BPE (no normaliser, no prefix "
            "space, no added token with whitespace); use gpt2, bytes, bpe:<size> or such a folder"
        )
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - state["model"]["vocab"].keys()
    if missing:
        raise ScanLMError(
            f"tokenizer {name!r} has no token for {len(missing)} of the {NUM_BYTES} bytes, so text "
            "would be lost: a file of it is missing or damaged; load it again"
        )


def _check_size(size: int) -> int:
    """The size of a ``bpe:<size>``, if all bytes and the end of text fit into it.

    The trainer of the tokenizers library asks for memory for all entries at once and ends the
    process where there is too little.
    """
    if not NUM_BYTES + 1 <= size <= LARGEST_BPE:
        raise ScanLMError(
            f"tokenizer bpe:{size}: expected at least {NUM_BYTES + 1} entries, the bytes and the "
            f"end of text, and at most {LARGEST_BPE}; e.g. bpe:4096"
        )
    return size


def _trained(size: int, corpus: Corpus | None, cache_dir: Path) -> PreTrainedTokenizerFast:
    _check_size(size)
    if corpus is None:
        raise ScanLMError(f"tokenizer bpe:{size} is trained on a corpus; give one")
    corpus.require("train")
    kept = cache_dir / "tokenizers" / f"bpe-{size}-{corpus.fingerprint('train', cache_dir)[:16]}"
    if (kept / "tokenizer.json").is_file():
        return _from_folder(kept)
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = safe_pieces(corpus.pieces("train"), _wrap(_byte_tokenizer()))
    backend.train_from_iterator((text for text, _ in pieces), trainer)
    try:
        save_tokenizer(_wrap(backend), kept)
    except OSError as error:
        raise ScanLMError(f"cannot write to cache folder {kept.parent}: {error}") from error
    # Two processes may both have trained: all read what was saved first.
    return _from_folder(kept)
