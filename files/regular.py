"""Opening regular files, and nothing else."""

import os
import stat
from io import FileIO
from pathlib import Path

from .text import shown


def open_regular(path: str | os.PathLike) -> FileIO:
    """Opens a regular file for reading, unbuffered and in binary.

    Raises ValueError for a folder, a FIFO (opening one would block), a socket or a device, and the OSError of `open`
    for a file that cannot be opened.
    """
    path = Path(path)
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    if path.is_dir():  # Windows opens no folder at all
        raise ValueError(f"{shown(path.name)} is a folder, not a file.")
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{shown(path.name)} is not a regular file (a FIFO, a socket or a device).")
    return open(descriptor, "rb", buffering=0)


def read_regular(path: str | os.PathLike, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises ValueError for a larger one, and as
    `open_regular`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{shown(Path(path).name)} has {size} bytes; more than {limit} are not read.")
        content = bytearray()
        while len(content) <= limit and (block := file.read(1 << 20)):
            content += block
        if len(content) > limit:
            raise ValueError(f"{shown(Path(path).name)} grew over {limit} bytes while it was read.")
        return bytes(content)
