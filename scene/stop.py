"""ComfyUI's interrupt (the stop button) during long work: between the pieces of what can be split, and during a library
call that cannot."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

import torch

from ..core import throw_exception_if_processing_interrupted

SECONDS = 0.2  # between two checks for an interrupt
Result = TypeVar("Result")


def pieces(count: int, size: int) -> Iterator[slice]:
    """Slices of `size` each, the last one shorter, that cover range(count). ComfyUI's interrupt is checked before each."""
    for start in range(0, count, size):
        throw_exception_if_processing_interrupted()
        yield slice(start, min(start + size, count))


def stoppable(work: Callable[..., Result], *arguments) -> Result:
    """work(*arguments), run in its own thread; directly if a tensor is on a GPU, where the call returns at once. Raises
    what `work` raises, and ComfyUI's interrupt within SECONDS of the stop button. After an interrupt the thread runs on
    and its result is dropped, so `work` must not have side effects."""
    if any(isinstance(argument, torch.Tensor) and argument.device.type != "cpu" for argument in arguments):
        return work(*arguments)
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
