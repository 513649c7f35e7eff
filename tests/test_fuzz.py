"""Some hundred seeded hostile inputs; the full run is `python dev.py fuzz`."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import CLASSES
from fuzz.planted import FAULTS
from fuzz.runner import Worker, run

COUNT = 80
SECONDS = 60  # a case, on a machine that may be loaded; the full run allows 10


@pytest.fixture(scope="module")
def worker():
    with Worker() as running:
        yield running


def test_hostile_inputs(worker):
    table = run(worker, CLASSES, COUNT, seed=1, seconds=SECONDS)
    assert not table.bad, f"\n{table}"
    for verdict, share in (("refused", 4), ("accepted", 20)):
        assert all(counts[verdict] > counts.total() / share for counts in table.counts.values()), f"\n{table}"


def test_the_fuzzer_finds_what_is_planted(worker):
    first = {}  # of each fault the first case that draws it
    for number in range(200):
        first.setdefault(random.Random(f"planted 0 {number}").choice(range(len(FAULTS))), number)
    found = [worker.ask("planted", 0, first[i], seconds=3)[0] for i in range(len(FAULTS))]
    assert found == [verdict for verdict, _ in FAULTS]
