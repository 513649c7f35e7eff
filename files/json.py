"""JSON that may come from strangers. Size, nesting, digits and the number of values are limited before it is parsed."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .regular import read_regular
from .text import shown

CONFIG_LIMIT = 1 << 20  # bytes of a config.json or an index of shards
CAMERA_LIMIT = 64 << 20  # bytes of a camera file
MAX_DEPTH = 64  # nested objects and lists
MAX_DIGITS = 64  # of an integer; the largest of 64 bits has 20

MAX_VALUES = 1 << 20  # counted by commas and brackets, those in strings included; a value takes up to 100 bytes
_STRING = re.compile(rb'"[^"]*"?')
_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse(
    content: str | bytes, where: str, *, limit: int = CONFIG_LIMIT, object_pairs_hook: Callable | None = None
) -> Any:
    """The value of a JSON text; a byte order mark is skipped.

    where: what to call the text in a message. object_pairs_hook: as for `json.loads`.
    Raises ValueError, naming `where`, for a text that is larger than `limit` bytes, nested more than MAX_DEPTH deep,
    holds an integer of more than MAX_DIGITS digits or more than about MAX_VALUES values, or is not UTF-8 or not JSON.
    """
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if len(raw) > limit:
        raise ValueError(f"{where} has {len(raw)} bytes; more than {limit} are not read.")
    if sum(map(raw.count, (b",", b"[", b"]", b"{", b"}"))) > 2 * MAX_VALUES or raw.count(b'"') > 4 * MAX_VALUES:
        raise ValueError(f"{where} holds more than {MAX_VALUES} values; no more are read.")
    without_strings = _STRING.sub(b"", raw.replace(b"\\\\", b"").replace(b'\\"', b""))
    depth = 0
    for bracket in without_strings.translate(None, _BUT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"{where} is nested more than {MAX_DEPTH} deep.")

    def parse_int(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"an integer of {len(digits)} digits")
        return int(digits)

    try:
        text = content.removeprefix("\ufeff") if isinstance(content, str) else raw.decode("utf-8-sig")
        return json.loads(text, parse_int=parse_int, object_pairs_hook=object_pairs_hook)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is not JSON that can be read: {shown(e)}") from e


def read(path: str | os.PathLike, *, limit: int = CONFIG_LIMIT) -> Any:
    """The value of a JSON file. Raises ValueError, naming the file, as `parse` and `read_regular` do, and OSError."""
    path = Path(path)
    return parse(read_regular(path, limit), shown(path.name), limit=limit)
