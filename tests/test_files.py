"""Untrusted text, bounded JSON, regular files, and files that are never left half written."""

import errno
import io
import os
import stat
import time

import pytest
from worldstereo_fp8.files import atomic, json, regular
from worldstereo_fp8.files.atomic import new_file, new_folder, new_large_file
from worldstereo_fp8.files.regular import open_regular, read_regular
from worldstereo_fp8.files.text import first_few, shown


@pytest.mark.parametrize(
    "value, text",
    [
        ("plain é 漢", "plain é 漢"),
        ("\ud800", "\\ud800"),
        ("a\nb\x1b[31m", "a\\nb\\x1b[31m"),
        (12, "12"),
        ("x" * 100, "x" * 100),
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
    assert first_few("abcd") == "a, b, c, d"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[" * 100_000, "x.json is nested more than 64 deep"),
        (b'{"a": [' * 70, "nested more than 64 deep"),
        (b"[[]," * 70, "nested more than 64 deep"),
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


def test_the_limits_of_json_are_exact(monkeypatch):
    nested = lambda depth: "[" * depth + "]" * depth
    assert json.parse(nested(64), "x") and json.parse(f"[{', '.join([nested(3)] * 100)}]", "x")
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        json.parse(nested(65), "x")
    assert json.parse("1" * 64, "x") == int("1" * 64)
    with pytest.raises(ValueError, match="an integer of 65 digits"):
        json.parse("1" * 65, "x")
    assert json.parse("12345", "x", limit=5) == 12345
    with pytest.raises(ValueError, match="x has 5 bytes; more than 4 are not read"):
        json.parse("12345", "x", limit=4)
    monkeypatch.setattr(json, "MAX_VALUES", 10)
    assert len(json.parse(f"[{','.join('1' * 19)}]", "x")) == 19  # 18 commas and 2 brackets
    assert len(json.parse('"' + r"\"" * 38 + '"', "x")) == 38  # 40 quotes
    for content in (f"[{','.join('1' * 20)}]", '"' + r"\"" * 39 + '"'):
        with pytest.raises(ValueError, match="x holds more than 10 values"):
            json.parse(content, "x")


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
    with open_regular(tmp_path / "file") as file:
        assert isinstance(file, io.RawIOBase)  # unbuffered


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"123")
    with open(tmp_path / "file", "rb") as small:
        for blocks in ([b"123456"], [b"12345", b"6"]):
            growing = io.BytesIO()
            growing.fileno, growing.read = small.fileno, lambda _, blocks=blocks: blocks.pop(0) if blocks else b""
            monkeypatch.setattr(regular, "open_regular", lambda path, growing=growing: growing)
            with pytest.raises(ValueError, match="file grew over 5 bytes"):
                read_regular(tmp_path / "file", 5)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="This system does not list open files.")
def test_a_refused_file_is_closed(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError):
        open_regular(tmp_path / "fifo")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.bin"
    with new_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(FileExistsError, match=r"a\.bin exists already"), new_file(path):
        pytest.fail("the name is refused before the work")
    with pytest.raises(RuntimeError), new_file(path, overwrite=True) as file:
        file.write(b"two")
        raise RuntimeError
    assert path.read_bytes() == b"one"
    with new_file(path, overwrite=True) as file:
        file.write(b"two")
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["a.bin"]
    with pytest.raises(FileExistsError, match="is a folder"), new_file(tmp_path, overwrite=True):
        pass


def test_what_is_written_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with new_file(tmp_path / "a.bin") as file:
        file.write(b"one")
    assert synced == [3]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes.")
def test_modes_are_those_of_the_system(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain.bin").touch()
    with new_folder(tmp_path / "folder"), new_file(tmp_path / "a.bin"):
        pass
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "a.bin").stat().st_mode == (tmp_path / "plain.bin").stat().st_mode


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "link", link)
    with new_file(tmp_path / "a.bin") as file:
        file.write(b"mine")
    assert (tmp_path / "a.bin").read_bytes() == b"mine" and os.listdir(tmp_path) == ["a.bin"]
    with pytest.raises(FileExistsError), new_file(tmp_path / "b.bin"):
        (tmp_path / "b.bin").write_bytes(b"theirs")
    assert (tmp_path / "b.bin").read_bytes() == b"theirs"


class TestLargeFiles:
    def test_they_need_room_on_the_disk(self, tmp_path):
        with pytest.raises(OSError, match=r"a\.bin needs 1000000.00 GB and .* GB free"):
            with new_large_file(tmp_path / "a.bin", 10**15):
                pass
        assert not any(tmp_path.iterdir())

    def test_they_are_flushed_while_they_grow(self, tmp_path, monkeypatch):
        synced = []
        monkeypatch.setattr(atomic, "SECONDS_BETWEEN_SYNCS", 0.01)
        folders = []

        def fsync(descriptor):
            (folders if stat.S_ISDIR(os.fstat(descriptor).st_mode) else synced).append(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with new_large_file(tmp_path / "a.bin", 10) as file:
            file.write(b"1234")
            until = time.monotonic() + 10
            while not synced and time.monotonic() < until:
                time.sleep(0.01)
            assert file.fileno() in synced
        assert (tmp_path / "a.bin").read_bytes() == b"1234" and os.listdir(tmp_path) == ["a.bin"]
        assert len(folders) == (1 if hasattr(os, "O_DIRECTORY") else 0)
        with pytest.raises(FileExistsError, match=r"a\.bin exists already"), new_large_file(tmp_path / "a.bin", 10):
            pytest.fail("the name is refused before the work")

    def test_a_failed_flush_or_an_exception_leaves_nothing(self, tmp_path, monkeypatch):
        with pytest.raises(RuntimeError), new_large_file(tmp_path / "a.bin", 10) as file:
            file.write(b"1234")
            raise RuntimeError
        assert not any(tmp_path.iterdir())

        failed = []

        def fsync(_):  # as the system does, it reports a failed write only once
            if not failed:
                failed.append(True)
                raise OSError(errno.EIO, "broken disk")

        monkeypatch.setattr(atomic, "SECONDS_BETWEEN_SYNCS", 0.01)
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"a\.bin could not be written: broken disk"):
            with new_large_file(tmp_path / "a.bin", 10) as file:
                file.write(b"1234")
                until = time.monotonic() + 10
                while not failed and time.monotonic() < until:
                    time.sleep(0.01)
        assert not any(tmp_path.iterdir())

    def test_one_run_at_a_time_and_what_a_killed_one_left_is_removed(self, tmp_path):
        (tmp_path / f"old.bin{atomic.GROWING}").write_bytes(b"killed")
        (tmp_path / f"other.txt{atomic.GROWING}").write_bytes(b"not ours")
        with new_large_file(tmp_path / "a.bin", 10) as file:
            file.write(b"first")
            with pytest.raises(FileExistsError, match=r"a\.bin is being made already"):
                with new_large_file(tmp_path / "a.bin", 10):
                    pass
        assert sorted(os.listdir(tmp_path)) == ["a.bin", f"other.txt{atomic.GROWING}"]
        assert (tmp_path / "a.bin").read_bytes() == b"first"

    def test_a_finished_file_that_cannot_take_its_name_gets_a_free_one(self, tmp_path, monkeypatch):
        (tmp_path / "a.bin").write_bytes(b"in use")
        (tmp_path / "a-2.bin").write_bytes(b"taken")

        def replace(*_):
            raise OSError(errno.EACCES, "in use")

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match=r"The finished file is a-3\.bin"):
            with new_large_file(tmp_path / "a.bin", 10, overwrite=True) as file:
                file.write(b"new")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
            "a.bin": b"in use", "a-2.bin": b"taken", "a-3.bin": b"new",
        }  # fmt: skip


def test_of_two_folders_written_at_once_the_second_is_told(tmp_path, monkeypatch):
    """The other one appears after the name was looked at for the last time."""
    rename = os.rename

    def late(source, target):
        target.mkdir()
        (target / "theirs").touch()
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with (
        pytest.raises(FileExistsError, match="f is a folder that exists already"),
        new_folder(tmp_path / "f") as folder,
    ):
        (folder / "ours").touch()
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")] == ["f", "f/theirs"]


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
    with pytest.raises(FileExistsError), new_folder(tmp_path / "other"):
        (tmp_path / "other").write_text("a file")
    with pytest.raises(FileExistsError), new_folder(tmp_path / "other"):
        pytest.fail("the name is refused before the work")


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


def test_what_killed_runs_left_is_removed_after_a_day(tmp_path):
    """And nothing else: no run that is at work, no file of others."""
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "x"):
        left = {kind: next(tmp_path.glob(".x.*")).name.replace(".x.", f".{kind}.") for kind in ("old", "young", "dir")}
        raise KeyboardInterrupt
    (tmp_path / left["old"]).write_bytes(b"half")
    (tmp_path / left["young"]).write_bytes(b"half")
    (tmp_path / left["dir"] / "images").mkdir(parents=True)
    others = (".a.writing", "a.abcdefgh.writing", ".a.abcdefgh.writing.txt", ".a.ABCDEFGH.writing")
    for name in others:
        (tmp_path / name).write_text("theirs")
    day_ago = time.time() - 86_500
    for name in (left["old"], left["dir"], *others):
        os.utime(tmp_path / name, (day_ago, day_ago))
    (tmp_path / ".link.abcdefgh.writing").symlink_to(tmp_path / others[0])
    with new_file(tmp_path / "a.bin"):
        pass
    link = ".link.abcdefgh.writing"
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", left["young"], link, *others}


@pytest.mark.skipif(atomic.fcntl is None, reason="Windows locks open files by itself")
def test_another_runs_file_is_not_taken_for_the_abandoned_one(tmp_path, monkeypatch):
    """Between the opening of an abandoned file and its lock, a third run removes it, and may begin its own."""
    target, growing = tmp_path / "x.bin", tmp_path / f"x.bin{atomic.GROWING}"
    lock = atomic._lock

    def others(begin):
        def first(file):
            growing.unlink()
            if begin:
                growing.write_text("another run's")
            monkeypatch.setattr(atomic, "_lock", lock)
            return lock(file)

        return first

    growing.write_text("abandoned")
    monkeypatch.setattr(atomic, "_lock", others(begin=True))
    atomic._remove_abandoned(target)
    assert growing.read_text() == "another run's"
    monkeypatch.setattr(atomic, "_lock", others(begin=False))
    with new_large_file(target, 1) as file:
        file.write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"] and target.read_bytes() == b"x"


def test_a_file_that_goes_while_it_is_looked_for(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("")
    with open(tmp_path / "x") as file:
        assert atomic._is_at(file, tmp_path / "x")
        monkeypatch.setattr(atomic.Path, "exists", lambda path: True)  # as it was a moment ago
        assert not atomic._is_at(file, tmp_path / "y")
