"""Files and folders that appear under their names whole, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .text import shown

TEMPORARY = ".writing"  # what the name of an unfinished file or folder ends in


@contextlib.contextmanager
def new_file(path: str | os.PathLike, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A binary file that appears under `path`, synced, when the context ends well, and not at all otherwise.

    Until then it lies beside `path` under a name of its own. Raises FileExistsError for a name that is taken, also by a
    dangling link, unless `overwrite`; and OSError, naming file and cause, where it cannot be written.
    """
    path = Path(path)
    _refuse_taken(path, overwrite)
    with _told(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=TEMPORARY, dir=path.parent)
        temporary = Path(name)
    try:
        with _told(path), open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with _told(path):
            _open_to_others(temporary, 0o666)
            _put(temporary, path, overwrite)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill, which appears under `path` when the context ends well, and not at all otherwise.

    Raises FileExistsError for a name that is taken, and OSError, naming folder and cause, where it cannot be written.
    """
    path = Path(path)
    _refuse_taken(path, False)
    with _told(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}.", suffix=TEMPORARY, dir=path.parent))
    try:
        with _told(path):
            yield temporary
            _open_to_others(temporary, 0o777)
            _refuse_taken(path, False)
            os.rename(temporary, path)  # refused by the system where a folder with content has come there meanwhile
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _refuse_taken(path: Path, overwrite: bool):
    if path.is_dir() and not path.is_symlink():
        raise FileExistsError(f"{shown(path.name)} is a folder that exists already. Choose another name.")
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"{shown(path.name)} exists already. Choose another name, or allow it to be overwritten.")


def _put(temporary: Path, path: Path, overwrite: bool):
    """Renames; without `overwrite` in a way that never replaces what has come there meanwhile."""
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        _refuse_taken(path, overwrite)
        raise
    except OSError:  # a file system without hard links
        _refuse_taken(path, overwrite)
        os.rename(temporary, path)
    else:
        temporary.unlink()


def _open_to_others(path: Path, mode: int):
    """The mode that a plain open() or mkdir() would have given; temporary names are made for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(OSError):  # file systems without modes
        os.chmod(path, mode & ~umask)


@contextlib.contextmanager
def _told(path: Path):
    """Has an OSError name the file that was to be written."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as e:
        raise OSError(e.errno, f"{shown(path.name)} could not be written: {e.strerror or shown(e)}") from e
