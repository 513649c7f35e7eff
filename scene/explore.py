"""Lists of paths to take through a scene, one line each, and the lists that come with the pack.

    NAME [from VIEW]: PRESET AMOUNT [asks PATH | mirrors PATH]

VIEW is the name of the view that the path starts with, "first", or "last" (the default: the last frame of the previous
path). AMOUNT is in degrees if the preset turns and in units of the scene's depth if it travels. A path can ask for the
views of an earlier path that it follows or mirrors.
"""

import re
from dataclasses import dataclass

from ..files.text import shown
from .camera_path import AROUND_CENTRE, ON_THE_SPOT, PRESETS
from .start import HEADINGS, level_view
from .walk import ASK_MIRRORED, ASK_NOTHING, ASK_SPARSELY, LAST

MAX_PATHS, MAX_NAME = 100, 100
MAX_DEGREES, MAX_DISTANCE = 720, 100
LINE = re.compile(
    rf"(?P<name>[\w-]+)(?:\s+from\s+(?P<view>\S+))?\s*:\s*(?P<preset>{'|'.join(map(re.escape, PRESETS))})"
    r"\s+(?P<amount>\d+(?:\.\d+)?)(?:\s+(?P<ask>asks|mirrors)\s+(?P<asked>[\w-]+))?"
)


@dataclass(frozen=True)
class Walk:
    """One path of a list. view: the name of the view it starts with, walk.FIRST or walk.LAST. degrees or distance is 0.
    ask: one of walk.ASKING; asked: the earlier path whose views it prefers, or empty."""

    name: str
    view: str
    preset: str
    degrees: float
    distance: float
    ask: str
    asked: str


def read_walks(text: str) -> list[Walk]:
    """The paths of a list. Empty lines and everything after a # are ignored. Raises ValueError, naming the line."""
    walks: list[Walk] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = LINE.fullmatch(line)
        if not found:
            raise ValueError(
                f"paths, line {number} is '{shown(line)}': write it as `left from first: orbit left 30`, with one of "
                f"the presets of WorldStereo Camera Path ({', '.join(PRESETS)})."
            )
        names = [walk.name for walk in walks]
        if found["name"] in names:
            raise ValueError(
                f"paths, line {number}: {shown(found['name'])} is the name of an earlier line; give another."
            )
        if found["asked"] and found["asked"] not in names:
            raise ValueError(f"paths, line {number}: {shown(found['asked'])} is not the name of an earlier line.")
        turns = found["preset"] in AROUND_CENTRE or found["preset"] in ON_THE_SPOT
        amount = float(found["amount"])
        if len(found["name"]) > MAX_NAME or amount > (MAX_DEGREES if turns else MAX_DISTANCE):
            raise ValueError(
                f"paths, line {number}: a name has at most {MAX_NAME} characters, a turn at most {MAX_DEGREES} "
                f"degrees, and a distance is at most {MAX_DISTANCE}."
            )
        ask = {None: ASK_NOTHING, "asks": ASK_SPARSELY, "mirrors": ASK_MIRRORED}[found["ask"]]
        walks.append(
            Walk(
                found["name"],
                found["view"] or LAST,
                found["preset"],
                amount if turns else 0.0,
                0.0 if turns else amount,
                ask,
                found["asked"] or "",
            )
        )
    if not 0 < len(walks) <= MAX_PATHS:
        raise ValueError(f"paths holds {len(walks)} paths: give 1 to {MAX_PATHS}, one per line.")
    return walks


def _of_panorama(headings):
    return "\n".join(
        f"rise_{heading} from {level_view(heading)}: arc up 25\n"
        f"right_{heading} from {level_view(heading)}: orbit right 40 asks rise_{heading}\n"
        f"left_{heading} from {level_view(heading)}: orbit left 40 mirrors rise_{heading}"
        for heading in headings
    )


OWN_LIST = "my own list"
LISTS = {
    "picture: left, right, up, loop": "left from first: orbit left 25\n"
    "right from first: orbit right 25\n"
    "up from first: arc up 15\n"
    "loop from first: ellipse loop 0.15",
    "picture: left and right": "left from first: orbit left 25\nright from first: orbit right 25",
    "panorama: 3 headings, 3 moves each": _of_panorama(range(0, HEADINGS, 3)),
    "panorama: 9 headings, 3 moves each": _of_panorama(range(HEADINGS)),
    "on from the last path: forward": "ahead: dolly in 0.3",
}
