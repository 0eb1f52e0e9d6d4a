"""SIGTERM and SIGINT: a program stops with one line that says how to go on, a training run after the step at hand.

Once all is saved and said the process dies of that very signal. A shell then sees exit code 143 or 130, and a loop in
a shell ends at Ctrl-C: it goes on after a program that took SIGINT and exited by itself, whatever its exit code.
"""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ECHO_S = 2.0  # a second signal so soon is the first one again: Slurm tells us and our launcher, which tells us too
LAUNCHER_GRACE_S = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # of torch's launcher: so long after its signal it kills us


@contextmanager
def handled(handler: Callable[[int], None]) -> Iterator[None]:
    """Calls `handler(number)` at SIGTERM and SIGINT. Python allows that in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: handler(number)) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before):
            signal.signal(number, old)


@contextmanager
def interruptible(flag: str = "--resume") -> Iterator[None]:
    """A signal ends the program here and now, with the command that goes on: the present one and `flag`."""
    received = []

    def stop(number: int) -> None:
        received.append(number)
        raise SystemExit(f"stopped by {signal.Signals(number).name}; to go on: {command(flag)}")

    try:
        with handled(stop):
            yield
    except SystemExit as ending:  # all `with` blocks inside are left
        if not received:
            raise
        print(ending, file=sys.stderr)
        die_of(received[0])


def die_of(number: int) -> None:
    """End this process as the signal does where nobody handles it; in a notebook only the cell."""
    if hasattr(sys, "ps1"):  # interactive: what is in memory outlives the run
        raise KeyboardInterrupt
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class StopRequest:
    """A signal that asks a training run to stop; once more, and the process ends at once."""

    def __init__(self, tell: bool):
        self.tell, self.came_s = tell, 0.0
        self.number: int | None = None  # of the first signal; None while there was none

    def __call__(self, number: int) -> None:
        if self.number is not None:
            if time.monotonic() - self.came_s > ECHO_S:
                die_of(number)
            return
        self.number, self.came_s = number, time.monotonic()
        if self.tell:
            seconds = os.environ.get(LAUNCHER_GRACE_S, 30)
            grace = f"; the launcher waits {seconds} s ({LAUNCHER_GRACE_S})" if is_launched() else ""
            name = signal.Signals(number).name
            print(f"\n{name}: stopping after this step, with a checkpoint{grace}", file=sys.stderr)


def is_launched() -> bool:
    """Whether torch's launcher, which `accelerate launch` calls for several processes, has started this one."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def command(flag: str = "") -> str:
    """The command this program was started with, as for a shell, and `flag` at its end."""
    words = sys.orig_argv
    if is_launched():  # by our parent
        try:
            words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1]
        except OSError:  # not Linux
            words = ["accelerate", "launch", "...", *sys.argv]
    return shlex.join([*words, flag] if flag and flag not in words else words)
