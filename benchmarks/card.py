"""A smaller machine: another process takes the rest of the VRAM, and a control group limits the RAM."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

GIB = 2**30

BALLAST = """
import sys, torch
for line in sys.stdin:
    ballast = None
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    ballast = torch.empty(max(free - int(line), 0), dtype=torch.uint8, device="cuda")
    print(torch.cuda.mem_get_info()[0], flush=True)
"""


class Card:
    """While the `with` block lasts, `leave_free` decides how much of the card other processes can have."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", BALLAST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_):
        self.process.communicate()  # the end of its input ends it

    def leave_free(self, gib: float) -> float:
        """Takes all but `gib` GiB of what is free now (0: takes nothing). Returns what is free then, in GiB."""
        print(round(gib * GIB) or 2**62, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline()) / GIB


@contextlib.contextmanager
def limited_ram(gib: float) -> Iterator[Callable[[], object] | None]:
    """Yields a `preexec_fn` for subprocesses, which may together use `gib` GiB of RAM, the cache of the files they read
    included (0: no limit, None). The cache is emptied first. Needs Linux, its control groups v2, and root."""
    if not gib:
        yield None
        return
    group = Path("/sys/fs/cgroup/worldstereo_bench")
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.max").write_text(str(round(gib * GIB)))
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        sys.exit(f"The RAM cannot be limited here; that needs Linux's control groups v2 and root: {error}")
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def own_ram() -> float:
    """GiB of RAM that are this process's own: not a file's cache, except for a file in a tmpfs. Linux only; 0
    elsewhere."""
    status = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    return sum(int(lines[name].split()[0]) / 2**20 for name in ("RssAnon", "RssShmem") if name in lines)
