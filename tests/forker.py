"""A process that has imported ComfyUI and the pack, which takes seconds, and forks a child for each piece of work.

Run as a script it is that process; `Forker` is the tests' side of it. Windows has no fork.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

SECONDS = 300  # a child that takes longer is ended


class Forker:
    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Neither OpenMP's threads nor CUDA survive a fork.
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def start(self, code: str, *arguments) -> int:
        """Run Python code in a child, with `arguments` as its sys.argv[1:]. Returns the child's process id."""
        print(json.dumps([code, *map(str, arguments)]), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """Wait for that child. Returns its exit status, negative for a signal, and all that it printed."""
        status, printed = json.loads(self.process.stdout.readline())
        return status, printed

    def run(self, code: str, *arguments) -> str:
        """Run Python code in a child to its end, which must be a good one. Returns what it printed."""
        self.start(code, *arguments)
        status, printed = self.wait()
        assert status == 0, printed[-2000:]
        return printed


def work(code: str, output: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.alarm(SECONDS)
    status = 1
    try:
        exec(code, {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import standalone

    standalone.import_all()

    for line in sys.stdin:
        code, *sys.argv[1:] = json.loads(line)
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if not child:
                work(code, output.fileno())
            print(child, flush=True)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            print(json.dumps([status, output.read().decode(errors="replace")]), flush=True)


if __name__ == "__main__":
    main()
