"""Seeded hostile inputs, a module for each class of them.

A class is a module with

    def case(random: random.Random, folder: pathlib.Path) -> Case

that draws one input, writes what is to be written into the empty `folder`, and says how it is taken. `worker` runs
cases in a process of their own, whose memory is limited; `runner` watches it and counts.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CLASSES = ("headers", "indexes", "configs", "cameras", "folders", "inputs", "writers")
SERVED = ("prompts",)  # these run on a real server
SHARES = {"prompts": 6, "writers": 3}  # of slow classes: one case where the others have so many
LONGEST = 1000  # characters of a clear error

# Values where others are expected.
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 255, 2**31, 2**63 - 1, 2**63, 2**64, 10**60, 10**5000, 0.5, -0.0, 1e-45,
    1e39, 1e308, float("inf"), float("nan"), "", "0", "1", "x", "\ud800", "a\0b", "\x1b[31m", "\n", "٣", "x" * 5000,
    "é" * 300, [], [[]], [1], [0, 0], ["x"], [None], {}, {"a": 1}, {"\ud800": []}, [[480, 832]], [[4096, 4096]],
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """run: takes the input; what it raises must be clear: a ValueError or OSError of one printable line that holds
    one of `named`. wrong: says of what `run` returned why it should not have been accepted, or None.

    watched: the folder, the case's own if None, whose files `run` must leave as they are, but for files and folders of the
    names `ignored`; new ones may only be in `places`, and be whole unless it is `killed`."""

    run: Callable[[], object]
    named: tuple[str, ...]
    wrong: Callable[[object], str | None] = lambda result: None
    watched: Path | None = None
    places: tuple[str, ...] = ("ComfyUI/models", "ComfyUI/output", "ComfyUI/temp")
    ignored: tuple[str, ...] = ()
    killed: bool = False


def judge(case: Case, folder: Path) -> tuple[str, str]:
    """Runs a case. Returns refused, accepted, hang, unclear, wrong, overwritten, half or outside, and what there is to
    say."""
    watched = case.watched or folder
    before = _files(watched, case.ignored)
    verdict = "accepted", ""
    try:
        result = case.run()
    except TimeoutError as e:
        verdict = "hang", ascii(str(e)[:300])
    except (ValueError, OSError) as e:
        text = str(e)
        if not text.isprintable() or len(text) > LONGEST or not any(name in text for name in case.named):
            verdict = "unclear", f"{type(e).__name__}: {text[:300]!a}"
        else:
            verdict = "refused", ""
    except BaseException as e:
        verdict = "unclear", f"{type(e).__name__}: {str(e)[:300]!a}"
    if damage := _damage(before, _files(watched, case.ignored), case):
        return damage
    if verdict[0] == "accepted" and (why := case.wrong(result)) is not None:
        verdict = "wrong", ascii(why[:300])
    return verdict


def _files(folder: Path, ignored: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """What tells whether a file or link was replaced or changed, by its path."""
    found = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ignored]
        for name in [name for name in names if name not in ignored] + folders:
            path = Path(place, name)
            about = path.lstat()
            if not path.is_dir() or path.is_symlink():
                found[path.relative_to(folder).as_posix()] = (
                    about.st_ino,
                    about.st_mode,
                    about.st_size,
                    about.st_mtime_ns,
                )
    return found


def _damage(before: dict, after: dict, case: Case) -> tuple[str, str] | None:
    if changed := [path for path, about in before.items() if after.get(path) != about]:
        return "overwritten", ascii(changed[:3])
    new = after.keys() - before.keys()
    if not case.killed and (
        half := [path for path in new if path.endswith((".writing", ".cooking")) or ".writing/" in path]
    ):
        return "half", ascii(half[:3])
    if out := [path for path in new if not path.startswith(tuple(place + "/" for place in case.places))]:
        return "outside", ascii(out[:3])
    return None
