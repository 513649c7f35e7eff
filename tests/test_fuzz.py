"""Some hundred seeded hostile inputs; the full run is `python dev.py fuzz`."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import CLASSES
from fuzz.planted import FAULTS
from fuzz.runner import Worker, run

COUNT = 120
SECONDS = 60  # a case, on a machine that may be loaded; the full run allows 10


def test_hostile_inputs():
    table = run(CLASSES, COUNT, seed=1, seconds=SECONDS)
    assert not table.bad, f"\n{table}"
    for verdict, share in (("refused", 4), ("accepted", 20)):
        assert all(counts[verdict] > COUNT / share for counts in table.counts.values()), f"\n{table}"


def test_the_fuzzer_finds_what_is_planted():
    first = {}  # of each fault the first case that draws it
    for number in range(200):
        first.setdefault(random.Random(f"planted 0 {number}").choice(range(len(FAULTS))), number)
    worker = Worker()
    try:
        found = [worker.ask("planted", 0, first[i], seconds=3)[0] for i in range(len(FAULTS))]
    finally:
        worker.stop()
    assert found == [verdict for verdict, _ in FAULTS]
