"""Reading and writing that the data modules share: decompression, UTF-8, tables, atomic JSON."""

from __future__ import annotations

import codecs
import difflib
import gzip
import hashlib
import json
import lzma
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from scanlm.errors import ScanLMError

COMPRESSIONS = (".gz", ".xz", ".zst")
CHUNK_BYTES = 1 << 18
LISTED_COLUMNS = 20  # in an error message: a table may have hundreds
# A text and how much of its file, by bytes on disk, had been read when it came out (0 to 1).
Piece = tuple[str, float]


def suffixes(path: Path) -> tuple[str, str]:
    """The format and the compression of a file: ``train.txt.xz`` -> ``(".txt", ".xz")``."""
    name = path.name.lower()
    compression = next((end for end in COMPRESSIONS if name.endswith(end)), "")
    return Path(name.removesuffix(compression)).suffix, compression


def read_text(path: Path) -> Iterator[Piece]:
    """The text of a UTF-8 file in pieces of a few hundred kB, nothing changed.

    Raises:
        ScanLMError: the file cannot be read or decompressed, or holds a byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    decoded = 0
    for chunk, done in _chunks(path):
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, decoded - held + error.start) from None
        decoded += len(chunk)
        yield text, done
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, decoded - len(decoder.getstate()[0]) + error.start) from None


def read_rows(path: Path, column: str) -> Iterator[Piece]:
    """The non-blank texts of one column of a parquet or jsonl file, a document each.

    Raises:
        ScanLMError: the file is damaged, the column is missing or does not hold text.
    """
    rows = _parquet_rows(path, column) if suffixes(path)[0] == ".parquet" else _jsonl(path, column)
    for number, (value, done) in enumerate(rows, 1):
        if value is not None and not isinstance(value, str):
            raise ScanLMError(
                f"{path}, row {number}: column {column!r} holds {type(value).__name__}, expected "
                "text; name the text column in the corpus: 'folder#column=NAME'"
            )
        if value and not value.isspace():
            yield value, done


def _chunks(path: Path) -> Iterator[tuple[bytes, float]]:
    size = max(path.stat().st_size, 1)
    try:
        with path.open("rb") as raw:
            for chunk in _decompressed(raw, suffixes(path)[1]):
                yield chunk, min(raw.tell() / size, 1.0)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise _unreadable(path, error) from error


def _decompressed(raw: IO[bytes], compression: str) -> Iterator[bytes]:
    if compression == ".zst":
        yield from _unzstd(raw)
        return
    stream: Any = raw
    if compression == ".gz":
        stream = gzip.GzipFile(fileobj=raw)
    elif compression == ".xz":
        stream = lzma.LZMAFile(raw)  # noqa: SIM115 - the caller closes the file it opened
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def _unzstd(raw: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame: zstandard's own stream takes the end of a truncated file for its end."""
    frame = None
    while data := raw.read(1 << 16):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            if chunk := frame.decompress(data):
                yield chunk
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last zstd frame is cut off")


def _unreadable(path: Path, error: Exception) -> ScanLMError:
    return ScanLMError(f"cannot read {path}: {error}; is the file complete?")


def _not_utf8(path: Path, offset: int) -> ScanLMError:
    where = "byte offset" if not suffixes(path)[1] else "byte offset after decompression"
    return ScanLMError(
        f"{path} is not UTF-8 text: bad byte at {where} {offset}; "
        "convert it, for example with iconv -f latin1 -t utf-8"
    )


def split_lines(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The lines of a text that comes in pieces, each with its line feed (no other line breaks)."""
    rest: list[str] = []
    done = 0.0
    for text, done in pieces:
        *complete, last = text.split("\n")
        for line in complete:
            yield "".join([*rest, line, "\n"]), done
            rest = []
        rest.append(last)
    if tail := "".join(rest):
        yield tail, done


def _jsonl(path: Path, column: str) -> Iterator[tuple[Any, float]]:
    for number, (line, done) in enumerate(split_lines(read_text(path)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ScanLMError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise ScanLMError(f"{path}, line {number}: expected a JSON object a line")
        if column not in row:
            raise _no_column(f"{path}, line {number}", column, list(row))
        yield row[column], done


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[Any, float]]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as table:
            if column not in table.schema_arrow.names:
                raise _no_column(str(path), column, table.schema_arrow.names)
            total = max(table.metadata.num_rows, 1)
            seen = 0
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    seen += 1
                    yield value, seen / total
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, error) from error


def _no_column(where: str, column: str, names: list[str]) -> ScanLMError:
    if not names:
        return ScanLMError(f"{where}: no column {column!r} nor any other; every row needs a text")

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, column.lower(), name.lower()).ratio()

    names = sorted(names, key=likeness, reverse=True)
    listed = ", ".join(repr(name) for name in names[:LISTED_COLUMNS])
    more = f" and {len(names) - LISTED_COLUMNS} more" if len(names) > LISTED_COLUMNS else ""
    return ScanLMError(
        f"{where}: no column {column!r}, there are {listed}{more}; name the text column in the "
        f"corpus, for example 'folder#column={names[0]}'"
    )


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(value: Any) -> str:
    """The sha256 of a value that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when the file is missing, damaged or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            json.dump(value, handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
