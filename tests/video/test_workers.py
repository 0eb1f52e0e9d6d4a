"""Calls in other processes: order, failures, processes that die or hang, and that none is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import failing
import pytest
from conftest import REPO

from video.workers import CallFailed, Workers

BROKEN = {
    "killed": "the process that read it died (signal 9)",
    "exits": "the process that read it died (exit code 3)",
    "hangs": "took more than 2 s",
}


@pytest.fixture(scope="module")
def workers():
    with Workers(failing.shout, 2, timeout_s=2.0) as workers:
        yield workers


def is_alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_for_end(pids, seconds: float = 20.0) -> list[int]:
    """Those of the processes that are still there after so long."""
    end = time.time() + seconds
    while any(map(is_alive, pids)) and time.time() < end:
        time.sleep(0.05)
    return [pid for pid in pids if is_alive(pid)]


def test_results_come_in_order_and_calls_run_side_by_side(workers, capfd):
    names = ["slow", "a", "slow b", "c", "d", "slow e"]
    results = [workers.result(call) for call in workers.ahead(((name,) for name in names), window=4)]
    assert [name for name, _, _ in results] == names
    assert len({pid for _, pid, _ in results}) == 2 and os.getpid() not in {pid for _, pid, _ in results}
    assert capfd.readouterr() == ("", "")


def test_a_worker_imports_what_its_function_needs(workers):
    modules = workers.result(workers.start("a"))[2]
    assert "failing" in modules and not {"accelerate", "transformers", "conftest", "pytest"} & set(modules)


def test_no_more_is_started_than_the_window(monkeypatch):
    started = []
    workers = Workers(failing.shout, 0, 1.0)
    monkeypatch.setattr(workers, "start", lambda name: started.append(name) or name)
    calls = workers.ahead(((i,) for i in range(100)), window=3)
    assert next(calls) == 0 and started == [0, 1, 2, 3]
    assert next(calls) == 1 and started == [0, 1, 2, 3, 4]
    assert list(calls) == list(range(2, 100))


@pytest.mark.parametrize("name", ["killed", "hangs", pytest.param("exits", marks=pytest.mark.slow)])
def test_a_process_that_dies_or_hangs_is_a_reason_and_the_others_go_on(workers, name):
    calls = [workers.start(text) for text in ("a", name, "b", name, "c")]
    for call, text in zip(calls, ("a", name, "b", name, "c")):
        if text in BROKEN:
            with pytest.raises(CallFailed) as raised:
                workers.result(call)
            assert str(raised.value) == BROKEN[text]
        else:
            assert workers.result(call)[0] == text


def test_an_error_of_the_function_is_raised_here(workers):
    with pytest.raises(KeyError, match="raises"):
        workers.result(workers.start("raises"))


def test_processes_that_die_without_a_call_are_replaced(workers):
    pids = {workers.result(call)[1] for call in workers.ahead([("slow",)] * 6, window=6)}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert wait_for_end(pids) == []
    assert [workers.result(call)[0] for call in workers.ahead([("a",), ("b",), ("c",)], window=3)] == ["a", "b", "c"]


def test_without_processes_calls_run_here_when_asked_for():
    with Workers(failing.shout, 0, timeout_s=1.0) as workers:
        call = workers.start("raises")
        assert workers.result(workers.start("a"))[1] == os.getpid()
        with pytest.raises(KeyError):
            workers.result(call)


def test_processes_end_with_the_block():
    with pytest.raises(ZeroDivisionError), Workers(failing.shout, 1, timeout_s=100.0) as workers:
        pid = workers.result(workers.start("a"))[1]
        workers.start("hangs")
        raise ZeroDivisionError
    assert wait_for_end([pid]) == []


SCRIPT = """
import sys
print("imported", flush=True)
sys.path[:0] = [{repo!r}, {tests!r}]
import failing
from video.workers import Workers

with Workers(failing.shout, 2, timeout_s=1000.0) as workers:
    pids = {{workers.result(call)[1] for call in workers.ahead([("slow",)] * 6, window=6)}}
    print(*pids, flush=True)
    calls = [workers.start("hangs") for _ in range(3)]
    workers.result(calls[0])
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, *(pytest.param(s, marks=pytest.mark.slow) for s in (9, 15))])
def test_no_process_outlives_the_script(tmp_path, sent):
    """However it ends; and it needs no guard against being imported by its workers, for they do not import it."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(repo=str(REPO), tests=str(REPO / "tests")))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background may have it ignored
    with subprocess.Popen([sys.executable, str(script)], preexec_fn=hears, **pipes) as process:
        try:
            assert process.stdout.readline() == b"imported\n"
            pids = [int(word) for word in process.stdout.readline().split()]
            assert len(pids) == 2 and all(map(is_alive, pids))
            time.sleep(0.3)
            process.send_signal(sent)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert wait_for_end(pids) == []
    assert (b"KeyboardInterrupt" in errors) == (sent == signal.SIGINT)
