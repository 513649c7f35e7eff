"""Runs cases: each line of its input is [class, seed, number], each line of its output [verdict, what there is to say].

A fork runs them, as the imports take seconds; where it dies the next one goes on. Each says its process id first.
Windows has no fork: there the process itself runs them.
"""

import importlib
import json
import logging
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import standalone

standalone.import_all()

from fuzz import CLASSES, judge

MEMORY = 2 * 2**30  # bytes a case may take


def limit_memory():
    try:
        import resource
    except ImportError:  # Windows
        return
    pages = int(Path("/proc/self/statm").read_text().split()[5]) if Path("/proc/self/statm").exists() else 0
    resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


def run_cases():
    limit_memory()
    logging.disable()
    print(os.getpid(), flush=True)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, seed, number = json.loads(line)
        module = importlib.import_module(f"fuzz.{name}")
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            print(
                json.dumps(judge(module.case(random.Random(f"{name} {seed} {number}"), folder), folder)),
                file=answers,
                flush=True,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for name in CLASSES:
        importlib.import_module(f"fuzz.{name}")
    while hasattr(os, "fork") and (child := os.fork()):
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:  # the end of the input
            sys.exit()
        print(json.dumps(["dead", f"exit status {status}"]), flush=True)
    run_cases()
