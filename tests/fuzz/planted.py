"""Not of CLASSES: faults that the fuzzer must find, and what it must call them."""

import os
import time
from pathlib import Path
from random import Random

from . import Case


def fail(error):
    raise error


FAULTS = (
    ("dead", lambda folder: os._exit(1)),
    ("hang", lambda folder: time.sleep(60)),
    ("unclear", lambda folder: fail(KeyError("m.json"))),
    ("unclear", lambda folder: fail(ValueError("this names no file"))),
    ("unclear", lambda folder: fail(ValueError("m.json: \ud800"))),
    ("unclear", lambda folder: fail(ValueError("m.json: " + "x" * 5000))),
    ("unclear", lambda folder: bytearray(2**34)),
    ("wrong", lambda folder: None),
    ("overwritten", lambda folder: (folder / "there").write_text("new")),
    ("overwritten", lambda folder: (folder / "there").unlink()),
    ("half", lambda folder: (folder / "ComfyUI" / "output" / ".a.abcdefgh.writing").write_text("")),
    ("outside", lambda folder: (folder / "a").write_text("")),
    ("refused", lambda folder: fail(ValueError("m.json is broken"))),
)


def case(random: Random, folder: Path) -> Case:
    (folder / "ComfyUI" / "output").mkdir(parents=True)
    (folder / "there").write_text("old")
    fault = random.choice(FAULTS)[1]
    return Case(lambda: fault(folder), ("m.json",), lambda result: "it was accepted")
