"""Run records: what ran, where, with which result; written as it happens, read into pandas.

A run is a folder ``<root>/<experiment>/<run_id>/``:

    run.json        what, with which parameters, code, versions and device, and how it ended
    metrics.jsonl   one JSON object a line, appended as the run goes
    summary.json    the final figures; it exists if and only if the run finished
    checkpoint-*/   weights, if any

``run.json`` and ``summary.json`` are written by atomic rename. A line of metrics is flushed when it
is logged, and readers ignore a last line that a crash cut short. JSON has no NaN: a value that is
not finite is stored as ``"value": null`` with ``"value_text"`` "nan", "inf" or "-inf", and read
back as that number. An exported run is one JSON file with the same content and no machine's paths.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scanlm.errors import ScanLMError, check_name
from scanlm.provenance import command, device_info, git_state, versions
from scanlm.values import mapping_or_empty, natural_key

if TYPE_CHECKING:
    import pandas as pd

STATUSES = ("running", "finished", "failed", "interrupted", "diverged")
RUN_FILE, METRICS_FILE, SUMMARY_FILE = "run.json", "metrics.jsonl", "summary.json"
LOCK_FILE = ".lock"
_IDENTITY = ("run_id", "experiment", "model", "seed")
_FIELDS: dict[str, type] = {"run_id": str, "experiment": str, "model": str, "seed": int}
_FIELDS |= {"parameters": dict, "status": str}
_EXPORTED = _FIELDS | {"summary": dict, "metrics": list}
_KINDS = {str: "text", int: "an integer", dict: "an object", list: "a list"}
# an absolute path (POSIX, home or Windows) at the start of a word; the last part is kept
_PRIVATE = re.compile(r"(?<![^\s=\"'(,\[])(?:~|[A-Za-z]:(?=[\\/]))?(?:[\\/][^\s\\/\"',)\]]+)*[\\/]")


def run_id(model: str, parameters: Mapping[str, Any], seed: int) -> str:
    """``<model>-s<seed>-<8 hex of the parameters>``: the same settings find their run again."""
    text = json.dumps(plain(parameters), sort_keys=True)
    safe = re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"
    return f"{safe}-s{seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def model_name(id_or_file: str) -> str:
    """What runs of a model are called: its registry id, or of a YAML file its name, no suffix."""
    return Path(id_or_file).stem if id_or_file.endswith((".yaml", ".yml")) else id_or_file


def check_folder_name(what: str, name: str) -> None:
    """Refuse what is no good name of a folder.

    Raises:
        ScanLMError: empty, or with other signs than letters, digits and ``._+-``.
    """
    if not re.fullmatch(r"[\w][\w.+-]*", name):
        raise ScanLMError(
            f"{what}={name!r}: expected letters, digits, '.', '_' or '-', since it names a folder"
        )


_default_id = run_id  # the parameter of Run.create hides the name


class Run:
    """One run's folder, open for writing.

    Attributes:
        folder: where it is.
        info: the content of ``run.json``.
    """

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder = folder
        self.info = info
        self._repaired = False

    @classmethod
    def create(
        cls,
        experiment: str,
        model: str,
        parameters: Mapping[str, Any],
        seed: int,
        root: str | Path = "data/runs",
        run_id: str | None = None,
        resume: bool = True,
    ) -> Run:
        """A new run, or the one of these settings that is there already.

        Args:
            experiment: see design.md for the names the experiments share.
            model: registry id, or what else names the model.
            parameters: everything that decides the result.
            seed: of all random numbers.
            root: the folder of all runs.
            run_id: default ``run_id(model, parameters, seed)``.
            resume: an existing run is returned as it is if it has finished (``run.finished``; it
                cannot be written to), else continued. If False a new folder beside it is taken
                (``<run_id>-2``, ...), so nothing is ever overwritten.

        Raises:
            ScanLMError: the folder cannot be written, holds a run of other parameters, or one
                that another process writes.
        """
        check_folder_name("experiment", experiment)
        check_folder_name("run_id", run_id or "unnamed")
        identity = run_id or _default_id(model, parameters, seed)
        folder = Path(root) / experiment / identity
        fresh = {
            "run_id": identity,
            "experiment": experiment,
            "model": model,
            "parameters": plain(parameters),
            "seed": seed,
            "command": command(),
            **git_state(),
            "versions": versions(),
            "device": device_info(),
            "started": _now(),
            "finished": None,
            "status": "running",
        }
        try:
            if not resume:
                folder = _new_folder(folder)
                fresh["run_id"] = folder.name
            existing = cls._same(folder, fresh)
            if existing is not None and existing.finished:
                return existing
            run = cls(folder, fresh)
            folder.mkdir(parents=True, exist_ok=True)
            # a process that is refused here must not have said that the run is its own
            with run.only_writer():
                existing = cls._same(folder, fresh)
                if existing is not None:
                    if existing.finished:
                        return existing
                    # a resumed run is described by the code and machine that continue it
                    fresh["started"] = existing.info.get("started") or fresh["started"]
                    fresh["resumed"] = [*existing.info.get("resumed", []), _now()]
                run._write_info()
        except OSError as error:
            raise ScanLMError(
                f"cannot write to {folder}: {error.strerror or error}; choose another output "
                "folder or make this one writable"
            ) from error
        return run

    @classmethod
    def _same(cls, folder: Path, fresh: Mapping[str, Any]) -> Run | None:
        """The run in a folder, if there is one; it must be of the same settings."""
        if not (folder / RUN_FILE).is_file():
            return None
        run = cls.open(folder)
        for name in ("model", "seed", "parameters"):
            if run.info.get(name) != fresh[name]:
                raise ScanLMError(
                    f"{folder} holds a run of another {name}: choose another run_id or "
                    "another output folder"
                )
        return run

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run in a folder.

        Raises:
            ScanLMError: there is none, or its ``run.json`` is damaged.
        """
        folder = Path(folder)
        return cls(folder, _checked(folder / RUN_FILE, _FIELDS))

    @property
    def run_id(self) -> str:
        """Name of the folder and of the exported file."""
        return str(self.info["run_id"])

    @property
    def status(self) -> str:
        """One of ``STATUSES``."""
        return str(self.info["status"])

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; a finished run cannot be written to."""
        return self.status == "finished" and (self.folder / SUMMARY_FILE).is_file()

    @property
    def summary(self) -> dict[str, Any]:
        """The final figures; empty before the end."""
        path = self.folder / SUMMARY_FILE
        return _read_json(path) if path.is_file() else {}

    def log(self, name: str, value: float, **axes: Any) -> None:
        """Append one metric: a number and the axes that apply (``step``, ``tokens``, ...)."""
        self._check_open()
        line = json.dumps({"name": name, **_encode(float(value)), **plain(axes)})
        path = self.folder / METRICS_FILE
        if not self._repaired:
            _drop_partial_line(path)
            self._repaired = True
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def truncate(self, after_step: int) -> None:
        """Drop metrics of steps after ``after_step``: they will be measured again."""
        self.drop(lambda metric: (metric.get("step") or 0) > after_step)

    def drop(self, again: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop metrics that will be measured again: those that ``again`` picks, as logged."""
        self._check_open()
        path = self.folder / METRICS_FILE
        if path.is_file():
            kept = [metric for metric in _read_lines(path) if not again(metric)]
            _write(path, "".join(json.dumps(metric) + "\n" for metric in kept))

    def finish(self, summary: Mapping[str, Any], status: str = "finished") -> None:
        """Write the final figures and how the run ended."""
        self._check_open()
        check_name("status", status, STATUSES)
        _write(self.folder / SUMMARY_FILE, _dump(plain(summary)))
        self._end(status)

    def fail(self, status: str, message: str) -> None:
        """End without a result: "failed", "interrupted" or "diverged", and why."""
        self._check_open()
        check_name("status", status, STATUSES)
        self.info["message"] = message
        self._end(status)

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """No other process is in here with this run, whose metrics would be mixed with ours.

        Raises:
            ScanLMError: one is.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / LOCK_FILE, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ScanLMError(
                f"{self.folder} is being written by another process: wait for its end, or stop it"
            ) from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """An error within ends the run, "interrupted" by Ctrl-C and else "failed", and goes on.

        How a run has ended already, such as "diverged", stays.

        Raises:
            ScanLMError: another process writes this run, which is left alone.
        """
        with self.only_writer():
            try:
                yield
            except BaseException as error:
                if self.status == "running":
                    stopped = isinstance(error, KeyboardInterrupt)
                    self.fail(
                        "interrupted" if stopped else "failed", str(error) or type(error).__name__
                    )
                raise

    def update(self, **parameters: Any) -> None:
        """Add facts that are known only later to ``run.json`` (not part of the run's identity)."""
        self._check_open()
        self.info.update(plain(parameters))
        self._write_info()

    def _end(self, status: str) -> None:
        self.info |= {"status": status, "finished": _now()}
        self._write_info()

    def _write_info(self) -> None:
        _write(self.folder / RUN_FILE, _dump(self.info))

    def _check_open(self) -> None:
        if self.finished:
            raise ScanLMError(
                f"run {self.folder} has finished and is not written to again: remove the folder "
                "to repeat it"
            )


def read_runs(*paths: str | Path) -> pd.DataFrame:
    """One row a run, from run folders (found recursively) and exported files.

    Columns: the fields of ``run.json`` (``parameters``, ``versions`` and ``device`` as dicts),
    ``summary`` (dict), each parameter and final figure also by itself as ``parameters.<name>`` and
    ``summary.<name>``, and ``path``.

    Raises:
        ScanLMError: a path that does not exist, a damaged record, or one run in two files of a
            folder.
    """
    import pandas as pd

    rows = []
    for path, record in _records(paths):
        row = {name: value for name, value in record.items() if name != "metrics"}
        for group in ("parameters", "summary"):
            row |= {f"{group}.{name}": value for name, value in (row.get(group) or {}).items()}
        rows.append(row | {"path": str(path)})
    return pd.DataFrame(rows, columns=None if rows else [*_IDENTITY, "status", "path"])


def of_kind(runs: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Of a frame of ``read_runs`` the finished runs of a kind, "training" or "evaluation".

    Those that were stopped have no final figures.
    """
    fitting = runs["parameters"].map(lambda p: mapping_or_empty(p).get("kind") == kind)
    return runs[fitting & (runs["status"] == "finished")]


def short_columns(runs: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Of a frame of ``read_runs`` the named columns, those that no run has left out.

    A name is that of a column, else of a final figure, else of a parameter.
    """
    picked = {}
    for name in names:
        for column in (name, f"summary.{name}", f"parameters.{name}"):
            if column in runs:
                picked[column] = name
                break
    return runs[list(picked)].rename(columns=picked)


def read_metrics(*paths: str | Path) -> pd.DataFrame:
    """One row a metric: ``run_id, experiment, model, seed, name, value`` and the metrics' axes.

    A metric's own ``model``, ``seed`` or other axis wins over its run's; ``corpus`` and the scan
    model's ``chunk_size`` are filled in from the run's parameters.

    Raises:
        ScanLMError: as ``read_runs``.
    """
    import pandas as pd

    rows = []
    for _, record in _records(paths):
        identity = {name: record.get(name) for name in _IDENTITY}
        parameters = record.get("parameters") or {}
        config = parameters.get("config") or {}
        if "corpus" in parameters:
            identity["corpus"] = parameters["corpus"]
        # other models have chunks too (Mamba-2), but of another kind
        chunked = config.get("model_type", "scanlm") == "scanlm"
        chunk_size = parameters.get("chunk_size", config.get("chunk_size") if chunked else None)
        if chunk_size is not None:
            identity["chunk_size"] = chunk_size
        for metric in record["metrics"]:
            values = {key: value for key, value in metric.items() if key != "value_text"}
            rows.append({**identity, **values, "value": _decode(metric)})
    return pd.DataFrame(rows, columns=None if rows else [*_IDENTITY, "name", "value"])


def rows_at(metrics: pd.DataFrame, **axes: Any) -> pd.DataFrame:
    """Rows of a frame of ``read_metrics`` at these values of its axes; no row has one it lacks."""
    for axis, value in axes.items():
        metrics = metrics[metrics.reindex(columns=[axis])[axis] == value]
    return metrics


def export(
    run_folder: str | Path, results: str | Path = "data/results", unfinished: bool = False
) -> Path:
    """Write a run, without weights and private paths, to one JSON file.

    Args:
        run_folder: of the run.
        results: where to.
        unfinished: also one that was stopped, with what it had measured; captions say so.

    Returns:
        ``<results>/<experiment>/<run_id>.json``; exporting again writes the same bytes.

    Raises:
        ScanLMError: no run there, one that has not finished, or a folder that cannot be written.
    """
    run = Run.open(run_folder)
    if not (run.finished or unfinished):
        goes_on = run.status != "diverged"  # the same command would only diverge again
        advice = "continue it with the command that started it, or " if goes_on else ""
        raise ScanLMError(
            f"run {run.folder} has status {run.status!r}: only finished runs are exported; "
            f"{advice}keep what it has with --unfinished"
        )
    summary = run.summary if run.finished else {}
    record = _without_paths(run.info) | {"summary": _without_paths(summary)}
    lines = _read_lines(run.folder / METRICS_FILE, whole=run.finished)
    metrics = [json.dumps(_without_paths(m)) for m in lines]
    text = _dump(record).rstrip().removesuffix("}").rstrip()
    listed = ",\n".join(f"    {metric}" for metric in metrics)
    text += ',\n  "metrics": [' + (f"\n{listed}\n  ]" if metrics else "]") + "\n}\n"
    path = Path(results) / str(run.info["experiment"]) / f"{run.run_id}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, text)
    except OSError as error:
        raise ScanLMError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def exported(results: str | Path, experiment: str = "*") -> list[Path]:
    """The files of a folder of exported records, in the order of their names.

    Args:
        results: the folder.
        experiment: one alone; by default all.
    """
    found = Path(results).glob(f"{experiment}/*.json")
    return sorted(found, key=lambda path: natural_key(str(path)))


def check_results(results: str | Path) -> None:
    """Refuse a folder of exported records that is not there, whose figures would all be missing.

    Raises:
        ScanLMError: it is not there.
    """
    if not Path(results).is_dir():
        raise ScanLMError(
            f"no folder {str(results)!r} of exported records: run this in a clone of the "
            "repository, or name the folder that scanlm export wrote"
        )


def source_line(run: Run | Mapping[str, Any] | pd.Series) -> str:
    """One line for captions: model, training, device, versions, seed and commit.

    Args:
        run: a run, a record, or a row of ``read_runs``.
    """
    record: Any = {**run.info, "summary": run.summary} if isinstance(run, Run) else run
    summary = mapping_or_empty(record.get("summary"))
    device, used = mapping_or_empty(record.get("device")), mapping_or_empty(record.get("versions"))
    parts = [str(record.get("model"))]
    steps = summary.get("steps", summary.get("step"))
    if steps is not None:
        parts.append(f"{int(steps):,} steps")
    if summary.get("tokens") is not None:
        parts.append(f"{int(summary['tokens']):,} tokens")
    corpus = str(mapping_or_empty(record.get("parameters")).get("corpus", ""))
    usual = re.sub(r"\W", "", corpus) == record.get("experiment")
    if corpus and not usual:  # such as a part of a text, which a caption must say
        parts.append(f"on {corpus}")
    if device:
        count = device.get("count") or 1
        parts.append((f"{count} x " if count > 1 else "") + str(device.get("name")))
    named = [f"{n} {used[n]}" for n in ("torch", "transformers", "scanlm") if used.get(n)]
    parts += [", ".join(named)] if named else []
    parts.append(f"seed {record.get('seed')}")
    if record.get("status") not in (None, "finished"):
        parts.append(shown_status(record.get("status")))
    commit = record.get("git_commit")
    if isinstance(commit, str):
        parts.append(f"commit {commit[:8]}{' (modified)' if record.get('git_dirty') else ''}")
    return "; ".join(parts)


def shown_status(status: Any) -> str:
    """A record that says "running" was exported, or found, before its run came to an end."""
    return "unfinished" if status == "running" else str(status)


# Reading


def _records(paths: Iterable[str | Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every record below the paths, each once, in the order of paths and names."""
    seen = set()
    places: dict[tuple[Path, str], Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ScanLMError(f"no run or exported record at {path}: no such file or folder")
        for found in _find(path):
            if (place := found.resolve()) in seen:
                continue
            seen.add(place)
            record = _read_record(found)
            first = places.setdefault((place.parent, record["run_id"]), found)
            if first != found:  # it would be counted as another seed
                raise ScanLMError(f"{first} and {found} hold the same run: remove one of them")
            yield found, record


def _find(path: Path) -> list[Path]:
    if path.is_file():
        return [path.parent if path.name == RUN_FILE else path]
    if (path / RUN_FILE).is_file():
        return [path]
    runs = [file.parent for file in path.rglob(RUN_FILE)]
    exported = [
        file
        for file in path.rglob("*.json")
        if not any(run in file.parents for run in runs) and _is_exported(file)
    ]
    return sorted([*runs, *exported], key=lambda place: natural_key(str(place)))


def _is_exported(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and {"run_id", "metrics"} <= content.keys()


def _read_record(path: Path) -> dict[str, Any]:
    if path.is_dir():
        run = Run.open(path)
        lines = list(_read_lines(path / METRICS_FILE))
        return run.info | {"summary": run.summary, "metrics": lines}
    record = _checked(path, _EXPORTED)
    for number, metric in enumerate(record["metrics"], 1):
        _check_metric(metric, path, f", metric {number}")
    return record


def _checked(path: Path, fields: Mapping[str, type]) -> dict[str, Any]:
    """A JSON object with at least these fields of these types."""
    record = _read_json(path)
    for name, kind in fields.items():
        if not isinstance(record.get(name), kind):
            got = f"got {record[name]!r:.40}" if name in record else "there is none"
            raise _damaged(path, f"is no record of a run: {name} must be {_KINDS[kind]}, {got}")
        if name in ("run_id", "experiment"):  # as which it would be exported
            try:
                check_folder_name(name, record[name])
            except ScanLMError as error:
                raise _damaged(path, f"is no record of a run: {error}") from error
    return record


def _read_lines(path: Path, whole: bool = False) -> Iterator[dict[str, Any]]:
    """The metrics of a file, without a last line that was cut short; of a ``whole`` one none is."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                if whole:
                    raise _damaged(path, "ends within a line", f", line {number},")
                return
            where = f", line {number}"
            try:
                metric = _JSON.decode(line)
            except ValueError as error:
                raise _damaged(path, f"is not JSON that can be read: {error}", where) from error
            _check_metric(metric, path, where)
            yield metric


def _check_metric(metric: Any, path: Path, where: str) -> None:
    try:
        known = isinstance(metric["name"], str) and "value" in metric
        _decode(metric)
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise _damaged(path, f"is no metric, a name and a value: {metric!r:.60}", where)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = _JSON.decode(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScanLMError(f"no run record at {path}: {error.strerror}") from error
    except ValueError as error:
        raise _damaged(path, f"is not JSON that can be read: {error}") from error
    if not isinstance(content, dict):
        raise _damaged(path, f"must hold one JSON object, got {type(content).__name__}")
    return content


def _damaged(path: Path, what: str, where: str = "") -> ScanLMError:
    """The error of a file that is no record, with what can be done about it."""
    of_folder = path.name in (RUN_FILE, METRICS_FILE, SUMMARY_FILE)
    other = "remove its folder to repeat the run" if of_folder else "export its run again"
    return ScanLMError(f"{path}{where} {what}; restore the file, or {other}")


def _finite(text: str) -> float:
    """A number of a record; one too large for a float would fail wherever it is used."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text:.20} is not finite, or too large")
    return number


def _integer(text: str) -> int:
    _finite(text)
    return int(text)


_JSON = json.JSONDecoder(parse_float=_finite, parse_int=_integer, parse_constant=_finite)


# Writing


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _drop_partial_line(path: Path) -> None:
    """Cut off what a crash left of a line, so that the next one does not continue it."""
    if not path.is_file() or not (content := path.read_bytes()) or content.endswith(b"\n"):
        return
    os.truncate(path, content.rfind(b"\n") + 1)


def _dump(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """The value in JSON's types; numbers of numpy and torch as numbers, not finite ones as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if not isinstance(value, float) and hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    return str(value)


def _encode(value: float) -> dict[str, Any]:
    return {"value": value} if math.isfinite(value) else {"value": None, "value_text": str(value)}


def _decode(metric: Mapping[str, Any]) -> float:
    value = metric.get("value")
    return float(metric.get("value_text", "nan")) if value is None else float(value)


def _without_paths(value: Any) -> Any:
    """Every string without the folders of absolute paths."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return _PRIVATE.sub("", value) if isinstance(value, str) else value


def _new_folder(wanted: Path) -> Path:
    """Make a folder that was not there, of this name or with a number behind it."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    number, folder = 1, wanted
    while True:
        try:  # no look first, after which another process could make it
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


__all__ = [
    "STATUSES",
    "Run",
    "check_results",
    "export",
    "exported",
    "of_kind",
    "plain",
    "read_metrics",
    "read_runs",
    "rows_at",
    "run_id",
    "short_columns",
    "shown_status",
    "source_line",
]
