"""Not of CLASSES: faults that the fuzzer must find, and what it must call them."""

import os
import time
from pathlib import Path
from random import Random

from . import Case


def fail(error):
    raise error


FAULTS = (
    ("dead", lambda: os._exit(1)),
    ("hang", lambda: time.sleep(60)),
    ("unclear", lambda: fail(KeyError("m.json"))),
    ("unclear", lambda: fail(ValueError("this names no file"))),
    ("unclear", lambda: fail(ValueError("m.json: \ud800"))),
    ("unclear", lambda: fail(ValueError("m.json: " + "x" * 5000))),
    ("unclear", lambda: bytearray(2**34)),
    ("wrong", lambda: None),
    ("refused", lambda: fail(ValueError("m.json is broken"))),
)


def case(random: Random, folder: Path) -> Case:
    return Case(random.choice(FAULTS)[1], ("m.json",), lambda result: "it was accepted")
