"""Files and folders that get their names only once they are complete."""

import contextlib
import itertools
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from .regular import open_regular
from .text import shown

try:
    import fcntl
except ImportError:  # Windows, which locks open files by itself
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".writing"  # what the name of an unfinished file or folder ends in
ABANDONED_AFTER = 24 * 3600  # seconds without a change after which such a file or folder is a killed run's
UNFINISHED = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(TEMPORARY)}", re.DOTALL)  # as tempfile makes these names
GROWING = ".cooking"  # what the name of an unfinished large file ends in
SECONDS_BETWEEN_SYNCS = 0.2


@contextlib.contextmanager
def new_file(path: str | os.PathLike, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A binary file that gets the name `path`, flushed to disk, when the context exits without an exception. After an
    exception nothing is left of it.

    It is written beside `path` under a temporary name; what killed runs have left in the folder is removed once it is
    older than ABANDONED_AFTER. Raises FileExistsError if the name is taken, even by a dangling link, unless
    `overwrite`; and OSError, naming the file and the cause, if it cannot be written.
    """
    path = Path(path)
    refuse_taken(path, overwrite)
    _remove_old(path.parent)
    with naming(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=TEMPORARY, dir=path.parent)
        temporary = Path(name)
    try:
        with naming(path), open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with naming(path):
            _open_to_others(temporary, 0o666)
            _put(temporary, path, overwrite)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder to fill, which gets the name `path` when the context exits without an exception; see `new_file`.
    After an exception nothing is left of it.

    Raises FileExistsError if the name is taken, and OSError, naming the folder and the cause, if it cannot be written.
    """
    path = Path(path)
    refuse_taken(path, False)
    _remove_old(path.parent)
    with naming(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}.", suffix=TEMPORARY, dir=path.parent))
    try:
        with naming(path):
            yield temporary
            _open_to_others(temporary, 0o777)
            refuse_taken(path, False)
            try:
                os.rename(temporary, path)
            except OSError:
                refuse_taken(path, False)  # a folder that has appeared in the meantime
                raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_large_file(path: str | os.PathLike, nbytes: int, overwrite: bool = False) -> Iterator[BinaryIO]:
    """`new_file` for a file of `nbytes` bytes that takes minutes to write: it is flushed to disk while it grows, and
    only one run at a time can write it.

    Until it is complete its name is that of `path` followed by GROWING. Files of that kind that killed runs have left
    in the folder are removed first. If the finished file cannot take its name (Windows does not replace a file that a
    program has open), it gets a free name beside it, and the OSError says which. Also raises OSError if the disk has
    too little room, and FileExistsError if another run is writing the file.
    """
    path = Path(path)
    refuse_taken(path, overwrite)
    _remove_abandoned(path)
    free = shutil.disk_usage(path.parent).free
    if free < nbytes:
        raise OSError(
            f"{shown(path.name)} needs {nbytes / 1e9:.2f} GB and {shown(path.parent)} has {free / 1e9:.2f} GB free. "
            "Make room, or choose another folder."
        )
    temporary = path.with_name(path.name + GROWING)
    in_work = f"{shown(path.name)} is being made already: another run has {shown(temporary.name)}. Wait for it."
    try:
        with naming(path):
            file = open(temporary, "xb")
    except FileExistsError as e:
        raise FileExistsError(in_work) from e
    with file:
        # Before the lock another run may have removed the file as abandoned.
        if not (_lock(file) and _is_at(file, temporary)):
            raise FileExistsError(in_work)
        try:
            with _written_out(file, path):
                yield file
            with naming(path):
                file.flush()
                os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file; elsewhere it is renamed while it is locked
            _put_or_keep(temporary, path, overwrite)
        except BaseException:
            if fcntl is None:
                _close(file)
            temporary.unlink(missing_ok=True)
            _close(file)
            raise
    if hasattr(os, "O_DIRECTORY"):  # the new name itself is on disk once the folder is synced; Windows has no such call
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


@contextlib.contextmanager
def _written_out(file, path: Path):
    """Flushes the file to disk while it grows, so that the final fsync has little left to write."""
    stop = threading.Event()

    def run():
        while not stop.wait(SECONDS_BETWEEN_SYNCS):
            os.fsync(file.fileno())

    with ThreadPoolExecutor(1) as pool:
        syncs = pool.submit(run)
        try:
            yield
        finally:
            stop.set()
        with naming(path):
            syncs.result()  # the system reports a failed write only once, to the next fsync


def _close(file):
    """Closes a file that is given up. What a full disk did not take is tried again, whose error would hide the first."""
    with contextlib.suppress(OSError):
        file.close()


def _lock(file) -> bool:
    """Locks a file for as long as it is open; False if another process has locked it. Windows needs no lock."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _is_at(file, path: Path) -> bool:
    """Whether an open file is the one that has this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_old(folder: Path):
    """Removes unfinished files and folders of `new_file` and `new_folder` that no run is still working on."""
    before = time.time() - ABANDONED_AFTER
    for entry in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(OSError):  # it may be gone by now, or belong to another user
            if not UNFINISHED.fullmatch(entry.name) or entry.is_symlink() or entry.stat().st_mtime > before:
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _remove_abandoned(path: Path):
    for temporary in path.parent.glob(f"*{path.suffix}{GROWING}"):
        # It may be gone by now, not a regular file, or on Windows open in another process.
        with contextlib.suppress(OSError, ValueError):
            with open_regular(temporary) as file:
                # Before the lock another run may have removed the file and begun its own, which must stay.
                abandoned = _lock(file) and _is_at(file, temporary)
                if abandoned and fcntl is not None:
                    temporary.unlink()
            if abandoned and fcntl is None:  # Windows removes no open file
                temporary.unlink()


def _put_or_keep(temporary: Path, path: Path, overwrite: bool):
    """Gives a finished file its name; if that fails, a free one, which the OSError names."""
    try:
        _put(temporary, path, overwrite)
    except OSError as e:
        names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
        kept = next(name for name in names if not os.path.lexists(name))
        _put(temporary, kept, False)
        raise OSError(
            e.errno,
            f"{shown(path.name)} could not be put in place: {e.strerror or shown(e)} The finished file is "
            f"{shown(kept.name)}. If a program has the old one open (ComfyUI, where the model is loaded), close it and "
            "rename the new one.",
        ) from e


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raises FileExistsError if a file, a link (even a dangling one) or a folder has this name; with `overwrite` only
    for a folder."""
    if path.is_dir() and not path.is_symlink():
        raise FileExistsError(f"{shown(path.name)} is a folder that exists already. Choose another name.")
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"{shown(path.name)} exists already. Choose another name, or allow it to be overwritten.")


def _put(temporary: Path, path: Path, overwrite: bool):
    """Renames the file. Without `overwrite` it never replaces one that has appeared in the meantime."""
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        refuse_taken(path, overwrite)
        raise
    except OSError:  # a file system without hard links
        refuse_taken(path, overwrite)
        os.rename(temporary, path)
    else:
        temporary.unlink()


def _open_to_others(path: Path, mode: int):
    """Sets the mode that open() or mkdir() would have given; temporary files are created for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(OSError):  # file systems without modes
        os.chmod(path, mode & ~umask)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds to an OSError the name of the file that was being written."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as e:
        raise OSError(e.errno, f"{shown(path.name)} could not be written: {e.strerror or shown(e)}") from e
