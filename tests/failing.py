"""Calls that fail in every way, as a name says; other processes import them from here."""

import os
import signal
import sys
import time


def fail_as_named(name: str) -> None:
    if "killed" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "exits" in name:
        os._exit(3)
    if "hangs" in name:
        time.sleep(1000)
    if "raises" in name:
        raise KeyError(name)
    if "slow" in name:
        time.sleep(0.3)


def shout(name: str) -> tuple[str, int, list[str]]:
    """Fails as named, else prints, and returns the name, the process's id and the modules it has imported."""
    fail_as_named(name)
    os.write(1, b"noise")
    os.write(2, b"noise")
    return name, os.getpid(), sorted(sys.modules)
