"""Who has not come to a meeting: several watchdogs in one process, each for a rank. With processes: test_faults.py."""

import os
import subprocess
import sys
import threading

import pytest
from conftest import REPO
from torch.distributed import TCPStore

import watchdog
from watchdog import Watchdog


@pytest.fixture
def dogs(monkeypatch):
    """Makes watchdogs that know of each other, with their threads, which say something every tenth of a second."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(watchdog, "LONGEST_BEAT_S", 0.1)
    made = []

    def make(world_size: int, *ranks: int) -> list[Watchdog]:
        made.extend(Watchdog(rank, world_size, limit_s=60.0) for rank in ranks)
        return made

    yield make
    for dog in made:
        dog.stop()


def listen(dog: Watchdog, seconds: float) -> str:
    """What it reports after it has listened for so long."""
    dog.report()
    threading.Event().wait(seconds)
    return dog.report()


def test_alone_it_only_counts():
    dog = Watchdog(0, 1, 10.0)
    with dog.meeting(), pytest.raises(ZeroDivisionError), dog.phase("rollout"):
        1 / 0  # noqa: B018
    assert dog.num_meetings == 1


def test_those_that_have_not_come_are_named_with_what_they_do(dogs):
    first, second, third = dogs(4, 0, 1, 2)
    for dog in (first, third):
        dog.step = 12
        with dog.meeting():
            pass
    second.step = 11
    with second.phase("step"), second.phase("rollout"), first.meeting():
        for dog in (second, third):
            dog._beat()
        told = first.report()
    assert told.startswith(
        "error: rank 0 has waited for 0 s in phase start of step 12: rank 1 has not arrived, it is in"
    )
    assert "rank 1 has not arrived, it is in phase rollout of step 11 for 0 s; rank 2 has not arrived, it is in" in told
    assert told.endswith("rank 3 has not started")
    third.num_meetings += 1
    third._beat()
    with first.meeting():
        first.num_meetings -= 1
        assert "rank 2" not in first.report()


def test_the_silent_are_named_even_if_they_have_come(dogs):
    """Killed while it waited with us: it came to as many meetings as we did."""
    first, second = dogs(2, 0, 1)
    assert "all others have come, so it is their connection that hangs" in listen(first, 1.0)
    second.stop()
    with second.phase("update"):
        second._beat()
    told = listen(first, 1.0)
    assert told.endswith("rank 1 gives no sign of life, it was in phase update of step 0 for 0 s")


def test_a_lost_connection_is_one_line(dogs):
    first, second = dogs(2, 0, 1)
    second.stop()
    first.limit_s = 1e9
    told = r"rank 1 gives no sign of life.* \(Connection closed by peer \[::1\]:5\)"
    with pytest.raises(SystemExit, match=told), first.meeting():
        raise RuntimeError("Connection closed by peer [::1]:5")
    with pytest.raises(RuntimeError, match="out of memory"), first.meeting():
        raise RuntimeError("out of memory")


SCRIPT = """
import sys, threading
from torch.distributed import TCPStore
from watchdog import Watchdog
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
import os
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
dog = Watchdog(0, 2, limit_s=0.5)
for _ in range(5):  # of which each ends in time
    with dog.meeting():
        threading.Event().wait(0.3)
threading.Event().wait(1.0)  # no meeting
print("so far", flush=True)
with dog.meeting():
    threading.Event().wait(60)
"""


def test_waiting_for_too_long_ends_the_process():
    """Only waiting does, each time anew."""
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (1, "so far\n")
    assert "error: rank 0 has waited for 1 s in phase start of step 0: rank 1 has not started" in done.stderr
