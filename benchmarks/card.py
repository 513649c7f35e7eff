"""A smaller card: another process takes the rest of the VRAM."""

import subprocess
import sys

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
