"""Untrusted text, bounded JSON, regular files, and files that are never left half written."""

import os
import time

import pytest
from worldstereo_fp8.files import json
from worldstereo_fp8.files.atomic import new_file, new_folder
from worldstereo_fp8.files.regular import open_regular, read_regular
from worldstereo_fp8.files.text import first_few, shown


@pytest.mark.parametrize(
    "value, text",
    [
        ("plain é 漢", "plain é 漢"),
        ("\ud800", "\\ud800"),
        ("a\nb\x1b[31m", "a\\nb\\x1b[31m"),
        (12, "12"),
        ("x" * 101, "x" * 100 + "… (101 characters)"),
        ("\x00" * 60, "\\x00" * 25 + "… (60 characters)"),
    ],
)
def test_foreign_text_is_printable_and_short(value, text):
    assert shown(value) == text
    shown(value).encode("utf-8")


def test_large_foreign_text_is_quick():
    start = time.perf_counter()
    assert len(shown("\ud800" * 50_000_000)) < 150
    assert shown(10**5000) == "an integer of 16610 bits"
    assert time.perf_counter() - start < 1
    assert first_few(["a", "b\n", "c", "d", "e"]) == "a, b\\n, c, d and 1 more"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[" * 100_000, "x.json is nested more than 64 deep"),
        (b'{"a": [' * 70, "nested more than 64 deep"),
        (b"1" * 5000, "an integer of 5000 digits"),
        (b'{"a"', "x.json is not JSON"),
        (b"\xff", "x.json is not JSON"),
        (b'"' + b"a" * 2000 + b'"', "more than 1000 are not read"),
    ],
)
def test_hostile_json_is_refused_quickly(content, message):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        json.parse(content, "x.json", limit=1000 if b"aaa" in content else json.CONFIG_LIMIT)
    assert time.perf_counter() - start < 1


def test_json_is_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": "[[[[\\"]", "b": [1, 2.5, -3]}')
    assert json.read(file) == {"a": '[[[["]', "b": [1, 2.5, -3]}
    assert json.parse("\ufeff[]", "x") == []
    with pytest.raises(FileNotFoundError):
        json.read(tmp_path / "b.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="This system has no FIFOs.")
def test_only_ordinary_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="fifo is not a regular file"):
        open_regular(tmp_path / "fifo")
    with pytest.raises(ValueError, match="is a folder"):
        open_regular(tmp_path)
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match="has 5 bytes; more than 4"):
        read_regular(tmp_path / "file", 4)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.bin"
    with new_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(FileExistsError, match=r"a\.bin exists already"), new_file(path):
        pass
    with pytest.raises(RuntimeError), new_file(path, overwrite=True) as file:
        file.write(b"two")
        raise RuntimeError
    assert path.read_bytes() == b"one"
    with new_file(path, overwrite=True) as file:
        file.write(b"two")
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["a.bin"]


def test_what_came_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(FileExistsError, match=r"a\.bin"), new_file(path) as file:
        file.write(b"mine")
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs" and os.listdir(tmp_path) == ["a.bin"]
    folder = tmp_path / "folder"
    with pytest.raises(FileExistsError), new_folder(folder) as temporary:
        (temporary / "x").write_text("mine")
        folder.mkdir()
    assert not any(folder.iterdir()) and sorted(os.listdir(tmp_path)) == ["a.bin", "folder"]


def test_a_dangling_link_is_a_taken_name(tmp_path):
    (tmp_path / "a.bin").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError), new_file(tmp_path / "a.bin"):
        pass


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "f") as temporary:
        (temporary / "x").write_text("1")
        raise RuntimeError
    assert not any(tmp_path.iterdir())
    with new_folder(tmp_path / "f") as temporary:
        (temporary / "x").write_text("1")
    assert (tmp_path / "f" / "x").read_text() == "1" and os.listdir(tmp_path) == ["f"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="This system has no /dev/full.")
def test_a_failed_write_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"a\.bin could not be written: No space left"), new_file(tmp_path / "a.bin"):
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
    assert not any(tmp_path.iterdir())
