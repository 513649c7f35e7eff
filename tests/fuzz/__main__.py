"""The full run: python tests/fuzz [--count N] [--seed N] [class …]; python dev.py fuzz sets everything up first."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fuzz import CLASSES, SERVED, SHARES
from fuzz.runner import Worker, run


def main() -> int:
    parser = argparse.ArgumentParser(description="Hostile inputs, counted by class and what became of them.")
    parser.add_argument(
        "classes", nargs="*", metavar="class", help=f"of {', '.join(CLASSES + SERVED)}; without any all of them"
    )
    parser.add_argument(
        "--count",
        type=int,
        default=5000,
        help="cases of each class (5000), but "
        + ", ".join(f"1 in {share} of {name}" for name, share in SHARES.items()),
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case, to see one again")
    given = parser.parse_args()
    for name in given.classes:
        if name not in CLASSES + SERVED:
            parser.error(f"{name} is no class; there are {', '.join(CLASSES + SERVED)}")
    with Worker() as worker:
        table = run(worker, given.classes or CLASSES + SERVED, given.count, given.seed, first=given.first)
    print(table)
    return 1 if table.bad else 0


if __name__ == "__main__":
    sys.exit(main())
