"""Content hashes of source files, remembered so that a second run does not reread them."""

from __future__ import annotations

import contextlib
from hashlib import sha256
from pathlib import Path

from scanlm.data.files import read_json, sha256_file, write_json


def file_stamp(path: Path) -> dict[str, int]:
    """What changes when somebody writes to a file: size, modification and inode change time (ns).

    The inode change time cannot be set back, so an edit that restores the modification time shows.
    """
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}


def file_fingerprint(path: Path, cache_dir: str | Path | None = None) -> str:
    """The sha256 of a file, taken from the cache while its path and stamp are unchanged."""
    if cache_dir is None:
        return sha256_file(path)
    absolute = str(path.resolve())
    memory = Path(cache_dir) / "files" / f"{sha256(absolute.encode()).hexdigest()[:24]}.json"
    stamp = file_stamp(path)
    remembered = read_json(memory)
    if remembered.get("stamp") == stamp and isinstance(remembered.get("sha256"), str):
        return str(remembered["sha256"])
    value = sha256_file(path)
    # Without a writable cache the hash is only computed again next time.
    with contextlib.suppress(OSError):
        write_json(memory, {"path": absolute, "stamp": stamp, "sha256": value})
    return value
