"""Values of the command line and of YAML files: YAML 1.2's scalars, one-line mistakes."""

import math
from pathlib import Path
from typing import Any

import pytest

from scanlm.errors import ScanLMError
from scanlm.values import (
    check_duration,
    check_picture,
    format_value,
    parse_assignments,
    parse_value,
    read_mapping,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("010", 10),
        ("1e-3", 1e-3),
        ("-.5", -0.5),
        ("3.", 3.0),
        (".inf", math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("None", None),
        ("~", None),
        ("", ""),
        ("on", "on"),
        ("no", "no"),
        ("12:30", "12:30"),
        ("2026-11-24", "2026-11-24"),
        ("bpe:4096", "bpe:4096"),
        ("a: b", "a: b"),
        ("1_000", "1_000"),
        ("[1, 2.5, x]", [1, 2.5, "x"]),
        ("{a: 1}", {"a": 1}),
        ("'7'", "7"),
        ("[unclosed", "[unclosed"),
        ("!!python/object:os.system x", "!!python/object:os.system x"),
    ],
)
def test_a_value_is_read_as_it_is_meant(text: str, value: Any) -> None:
    read = parse_value(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "value", [3, 1e-05, True, None, "", "7", "null", "two words", "a\nb", [1, "x", None], {"a": 1}]
)
def test_a_written_value_is_read_back(value: Any) -> None:
    read = parse_value(format_value(value))
    assert read == value
    assert type(read) is type(value)


def test_assignments_keep_everything_behind_the_first_equals_sign() -> None:
    given = ["lr=3e-4", "config.chunk_size = 16", "name=a=b", "empty="]
    expected = {"lr": 3e-4, "config.chunk_size": 16, "name": "a=b", "empty": ""}
    assert parse_assignments(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lr"], "'lr' is no assignment: expected key=value"),
        (["=3"], "'=3' is no assignment"),
        (["lr=1", "lr=2"], "'lr' is given twice"),
    ],
)
def test_wrong_assignments_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(ScanLMError, match=message):
        parse_assignments(given)


def test_pictures_that_cannot_be_saved_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    for name, message in (
        ("folder.png", "Is a directory"),
        ("file/a.png", "Not a directory"),
    ):
        with pytest.raises(ScanLMError, match=f"cannot write figure .*{name}': {message}; choose"):
            check_picture(tmp_path / name)


def test_looking_for_a_pictures_place_changes_nothing(tmp_path: Path) -> None:
    there = tmp_path / "there.png"
    there.write_bytes(b"as it was")
    for path in (there, tmp_path / "new.svg", tmp_path / "not" / "made" / "a.pdf"):
        check_picture(path)
    assert there.read_bytes() == b"as it was"
    assert list(tmp_path.iterdir()) == [there]


def test_a_mapping_file_has_the_same_scalars(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("lr: 1e-3\nmode: on\nsizes: [1, 010]\n# nothing\nnested: {x: None}\n")
    expected = {"lr": 1e-3, "mode": "on", "sizes": [1, 10], "nested": {"x": None}}
    assert read_mapping(path) == expected
    path.write_text("# only a comment\n")
    assert read_mapping(path) == {}


def test_a_merged_mapping_may_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("x: &x {lr: 1, seed: 2}\ny: {<<: *x, lr: 3}\n")
    assert read_mapping(path)["y"] == {"lr": 3, "seed": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: [1\nc: 2\n", r"a\.yaml, line \d, is not YAML: "),
        (b"a: 1\n\tb: 2\n", r"a\.yaml, line 2, is not YAML: "),
        (b"- 1\n- 2\n", "must hold one mapping, name: value; got list"),
        (b"1: x\n", "must hold one mapping"),
        (b"a: \xff\n", "is not UTF-8: .* at byte 3"),
        (b"a: \x00\n", "is not YAML: "),
        (b"a: 1\nb: {c: 1}\na: 2\n", r"a\.yaml, line 3, is not YAML: 'a' is given twice"),
        (b"b: {c: 1, c: 1}\n", r"a\.yaml, line 1, is not YAML: 'c' is given twice"),
    ],
)
def test_a_wrong_mapping_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ScanLMError, match=message) as caught:
        read_mapping(path)
    assert "\n" not in str(caught.value)


def test_a_missing_mapping_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ScanLMError, match=r"cannot read .*b\.yaml: No such file"):
        read_mapping(tmp_path / "b.yaml")


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_what_is_no_duration_is_refused(seconds: float) -> None:
    with pytest.raises(ScanLMError, match=f"max_seconds={seconds}: expected seconds"):
        check_duration("max_seconds", seconds)
    check_duration("max_seconds", 0.0)
    check_duration("max_seconds", None)
