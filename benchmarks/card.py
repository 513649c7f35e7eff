"""A smaller machine: other processes take the rest of its VRAM and RAM."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

GIB = 2**30

TAKE_VRAM = """
import sys, torch
for line in sys.stdin:
    ballast = None
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    ballast = torch.empty(max(free - int(line), 0), dtype=torch.uint8, device="cuda")
    print(torch.cuda.mem_get_info()[0], flush=True)
"""
TAKE_RAM = """
import contextlib, sys, psutil, torch
with contextlib.suppress(PermissionError), open("/proc/self/oom_score_adj", "w") as file:
    file.write("-1000")  # where memory runs out, what is measured ends, and not this process
for line in sys.stdin:
    ballast = None
    ballast = torch.empty(max(psutil.virtual_memory().available - int(line), 0), dtype=torch.uint8).fill_(1)
    print(psutil.virtual_memory().available, flush=True)
"""


class Ballast:
    """While the `with` block lasts, `leave_free` decides how much memory other processes can have: of the GPU with
    TAKE_VRAM, RAM with TAKE_RAM."""

    def __init__(self, take: str = TAKE_VRAM):
        self.take = take

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.take], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_):
        self.process.communicate()  # the end of its input ends it
        if self.process.returncode:
            sys.exit("The process that took the rest of the memory was ended: what was measured is void.")

    def leave_free(self, gib: float) -> float:
        """Takes all but `gib` GiB of what is free now (0: takes nothing). Returns what is free then, in GiB."""
        print(round(gib * GIB) or 2**62, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline()) / GIB


@contextlib.contextmanager
def limited_ram(gib: float) -> Iterator[None]:
    """While it lasts, `gib` GiB of RAM are available to other processes, the cache of the files they read included (0:
    no limit). The cache is emptied first. Needs Linux, root, and no swap space."""
    if not gib:
        yield
        return
    try:
        if len(Path("/proc/swaps").read_text().splitlines()) > 1:
            sys.exit("The RAM cannot be limited while there is swap space: turn it off with `swapoff -a`.")
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        sys.exit(f"The RAM cannot be limited here; that needs Linux and root: {error}")
    with Ballast(TAKE_RAM) as ballast:
        ballast.leave_free(gib)
        yield


def own_ram() -> float:
    """GiB of RAM that are this process's own: not a file's cache, except for a file in a tmpfs. Linux only; 0
    elsewhere."""
    status = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    return sum(int(lines[name].split()[0]) / 2**20 for name in ("RssAnon", "RssShmem") if name in lines)
