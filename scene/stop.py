"""ComfyUI's interrupt (the stop button) during a library call that takes seconds and cannot be split."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import torch

from ..core import throw_exception_if_processing_interrupted

SECONDS = 0.2  # between two checks for an interrupt
Result = TypeVar("Result")


def stoppable(work: Callable[..., Result], *arguments) -> Result:
    """work(*arguments), run in its own thread. Raises what `work` raises, and ComfyUI's interrupt within SECONDS of the
    stop button. After an interrupt the thread runs on and its result is dropped, so `work` must not have side effects."""
    done: Future = Future()
    inference = torch.is_inference_mode_enabled()  # the mode is per thread

    def run():
        try:
            with torch.inference_mode(inference):
                done.set_result(work(*arguments))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not done.done():
        throw_exception_if_processing_interrupted()
        wait([done], SECONDS)
    return done.result()
