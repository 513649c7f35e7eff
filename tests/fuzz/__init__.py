"""Seeded hostile inputs, a module for each class of them.

A class is a module with

    def case(random: random.Random, folder: pathlib.Path) -> Case

that draws one input, writes what is to be written into the empty `folder`, and says how it is taken. `worker` runs
cases in a process of their own, whose memory is limited; `runner` watches it and counts.
"""

from collections.abc import Callable
from dataclasses import dataclass

CLASSES = ("headers", "indexes", "configs", "cameras", "folders", "inputs")
SERVED = ("prompts",)  # these run on a real server, each case for a second or more
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
    one of `named`. wrong: says of what `run` returned why it should not have been accepted, or None."""

    run: Callable[[], object]
    named: tuple[str, ...]
    wrong: Callable[[object], str | None] = lambda result: None


def judge(case: Case) -> tuple[str, str]:
    """Runs a case. Returns refused, accepted, hang, unclear or wrong, and what there is to say."""
    try:
        result = case.run()
    except TimeoutError as e:
        return "hang", ascii(str(e)[:300])
    except (ValueError, OSError) as e:
        text = str(e)
        if not text.isprintable() or len(text) > LONGEST or not any(name in text for name in case.named):
            return "unclear", f"{type(e).__name__}: {text[:300]!a}"
        return "refused", ""
    except BaseException as e:
        return "unclear", f"{type(e).__name__}: {str(e)[:300]!a}"
    why = case.wrong(result)
    return ("accepted", "") if why is None else ("wrong", ascii(why[:300]))
