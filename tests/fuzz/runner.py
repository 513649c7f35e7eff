"""Sends cases to a worker process, watches it, and counts by class."""

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from . import SERVED, SHARES

SECONDS = 10  # a case that takes longer hangs
SERVED_SECONDS = 300  # with the start of the server; the class itself looks at what a prompt takes
START_SECONDS = 300
BAD = ("dead", "hang", "unclear", "wrong", "overwritten", "half", "outside")
VERDICTS = ("refused", "accepted", *BAD)


class Worker:
    """A process that runs cases; where one dies of a case or is ended, another takes its place."""

    def __init__(self):
        self.process = None
        self.runs_cases = None  # a process id: a fork of the process, or the process itself

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        if self.process is None:
            self._start()
        if self.runs_cases is None:
            line = self.lines.get(timeout=START_SECONDS)
            if line is None:
                raise RuntimeError("The fuzzer's worker does not start.")
            self.runs_cases = int(line)

    def _start(self):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # OpenMP's threads do not survive a fork
            start_new_session=True,  # so that a server it started ends with it
        )
        self.lines = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()

    @staticmethod
    def _read(process, lines):
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def ask(self, name: str, seed: int, number: int, seconds: float) -> tuple[str, str]:
        """The verdict on one case, and what there is to say."""
        self.start()
        self.process.stdin.write(json.dumps([name, seed, number]) + "\n")
        self.process.stdin.flush()
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            self._end_cases()
            return "hang", f"longer than {seconds} s"
        if line is None:
            code = self.process.wait()
            self.stop()
            return "dead", f"exit status {code}"
        verdict, what = json.loads(line)
        if verdict == "dead":
            self.runs_cases = None
        return verdict, what

    def _end_cases(self):
        if self.runs_cases == self.process.pid:
            self.stop()
            return
        os.kill(self.runs_cases, signal.SIGKILL)
        self.lines.get(timeout=START_SECONDS)  # that it is dead
        self.runs_cases = None

    def stop(self):
        if self.process is not None:
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
            self.process = self.runs_cases = None


@dataclass
class Table:
    """Verdicts counted by class, and the cases that should not have come out so."""

    counts: dict = field(default_factory=lambda: collections.defaultdict(collections.Counter))
    bad: list[str] = field(default_factory=list)
    slowest: dict = field(default_factory=dict)  # of each class: seconds, and the case's number

    def __str__(self):
        lines = [f"{'class':<12}{'cases':>8}" + "".join(f"{verdict:>12}" for verdict in VERDICTS) + "   slowest"]
        for name, counts in self.counts.items():
            cells = "".join(f"{counts[verdict]:>12}" for verdict in VERDICTS)
            seconds, number = self.slowest[name]
            lines.append(f"{name:<12}{sum(counts.values()):>8}{cells}{seconds:>8.1f} s (case {number})")
        return "\n".join([*lines, *self.bad])


def run(worker: Worker, classes, count: int, seed: int = 0, seconds: float = SECONDS, first: int = 0) -> Table:
    """`count` cases of each class, fewer of those in SHARES. The same seed gives the same cases, each by its number
    alone."""
    table = Table()
    for name in classes:
        for number in range(first, first + count // SHARES.get(name, 1)):
            worker.start()
            started = time.monotonic()
            verdict, what = worker.ask(name, seed, number, SERVED_SECONDS if name in SERVED else seconds)
            took = time.monotonic() - started, number
            table.slowest[name] = max(took, table.slowest.get(name, took))
            table.counts[name][verdict] += 1
            if verdict in BAD:
                table.bad.append(f"{name}, seed {seed}, case {number}: {verdict}: {what}")
    return table
