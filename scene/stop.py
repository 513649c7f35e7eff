"""The stop button during a library's call that takes seconds and cannot be cut into pieces."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

import torch

from ..core import throw_exception_if_processing_interrupted

SECONDS = 0.2  # between two looks at the stop button


def stoppable(work: Callable, *arguments):
    """work(*arguments), in a thread of its own. Raises ComfyUI's interruption within SECONDS of the stop button; the
    thread then ends by itself, and its result is dropped. So `work` must change nothing that others see."""
    done: Future = Future()
    inference = torch.is_inference_mode_enabled()  # each thread has a mode of its own

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
