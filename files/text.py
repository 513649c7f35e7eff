"""Untrusted text in messages: names and values from files, links and workflows."""

from collections.abc import Iterable

LIMIT = 100  # characters shown


def shown(value: object, limit: int = LIMIT) -> str:
    """A value as one printable line of at most `limit` characters.

    Unprintable characters (control characters, newlines, lone surrogates, which no log can encode) are escaped as in
    Python's repr. Longer text is cut, and its length added.
    """
    if isinstance(value, int):
        try:
            text = str(value)
        except ValueError:  # more digits than Python converts
            return f"an integer of {value.bit_length()} bits"
    else:
        text = str(value)
    length = len(text)
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: limit + 1])
    if length <= limit and len(printable) <= limit:
        return printable
    return f"{printable[:limit]}… ({length} characters)"


def first_few(names: Iterable, limit: int = 4, length: int = LIMIT) -> str:
    """The first `limit` names, each printable and of at most `length` characters, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown(name, length) for name in names[:limit]) + more
