"""Who has not come to a meeting: several watchdogs in one process, each for a rank. With training: test_faults.py."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import REPO
from torch.distributed import TCPStore

from runtime import watchdog
from runtime.watchdog import Watchdog


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


def test_work_is_waited_for_as_long_as_there_are_signs_of_life(dogs):
    """Three times the limit, and then as long as it takes to hear that it has come."""
    first, second = dogs(2, 0, 1)
    first.limit_s = 0.5
    threading.Timer(1.5, second.wait_for_work).start()
    start = time.monotonic()
    first.wait_for_work()
    assert 1.4 < time.monotonic() - start < 5 and first.num_meetings == 1
    Watchdog(0, 1, 10.0).wait_for_work()  # alone


def test_work_of_a_silent_process_is_not_waited_for(dogs):
    first, second = dogs(2, 0, 1)
    first.limit_s = 0.5
    second.stop()
    told = r"error: rank 0 has waited for 1 s in phase start of step 0: rank 1 gives no sign of life, it was in phase"
    with pytest.raises(SystemExit, match=told):
        first.wait_for_work()


WORK = """
import datetime, os, signal, sys, time
from records.record import Sample
from runtime import engine
from runtime.resumable import DoneBatches
from small_runs import open_run

rank, work = int(os.environ["RANK"]), sys.argv[2]
engine.timedelta = lambda seconds: datetime.timedelta(seconds=4)  # gloo's own limit
run = open_run(sys.argv[1], timeout=4.0)
samples = [Sample(str(i), "tvg", "", "") for i in range(4)]
done = DoneBatches(run, "rows", [samples[:2], samples[2:]], lambda sample: {"id": sample.id}, {})
for number in done.mine:
    if rank == 1:
        print("at work", flush=True)
        time.sleep(7.0)
        if work == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    done.add(number, [{"id": sample.id} for sample in done.batches[number]])
print([row["id"] for row in done.gather()], flush=True)
run.finish()
"""


@pytest.mark.parametrize("work", ["long", "killed"])
def test_processes_may_finish_further_apart_than_the_limit(tmp_path, work):
    """Two real processes. The first to be done ended the evaluation after run.timeout, and named the one at work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}", "OMP_NUM_THREADS": "1"}
    common |= {"CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(tmp_path / "run"), work],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (out, error), (late, _) = [child.communicate(timeout=100) for child in children]
    codes = [child.returncode for child in children]
    rows = "['0', '1', '2', '3']\n"
    if work == "long":
        assert (codes, out, late) == ([0, 0], rows, f"at work\n{rows}"), error
    else:
        assert codes == [1, -signal.SIGKILL] and "error: rank 0 has waited for " in error
        assert "rank 1 gives no sign of life, it was in phase start" in error


SCRIPT = """
import sys, threading
from torch.distributed import TCPStore
from runtime.watchdog import Watchdog
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
