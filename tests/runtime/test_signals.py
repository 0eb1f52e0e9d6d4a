"""SIGTERM and SIGINT: handlers come and go, a second signal ends a run at once, one line names the command."""

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import REPO

from runtime import signals
from runtime.signals import StopRequest, command, die_of, handled, interruptible

NUMBERS = (signal.SIGTERM, signal.SIGINT)


def test_handlers_hold_within_the_block_alone():
    before, got = [signal.getsignal(number) for number in NUMBERS], []
    with handled(got.append):
        for number in NUMBERS:
            os.kill(os.getpid(), number)
    assert got == list(NUMBERS) and [signal.getsignal(number) for number in NUMBERS] == before
    with pytest.raises(ZeroDivisionError), handled(got.append):
        1 / 0  # noqa: B018
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_another_thread_than_the_main_one_goes_without():
    entered = []

    def work():
        with handled(print):
            entered.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [1]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPO)}
WAITS = """
import sys, time
from runtime.signals import interruptible
with interruptible():
    try:
        print("there", flush=True)
        time.sleep(60)
    finally:
        print("left", flush=True)
"""
LOOP = 'for i in 1 2 3; do "$0" -c "$1"; echo "exit code $?"; done'


@pytest.mark.parametrize("number", NUMBERS)
def test_what_can_be_stopped_anywhere_ends_with_one_line(number):
    """Blocks are left first; then it dies of the signal: exit code 130 or 143 to a shell. It was 1."""
    words = [sys.executable, "-c", WAITS]
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "there\n"
        process.send_signal(number)
        out, error = process.communicate(timeout=50)
    assert (process.returncode, out) == (-number, "left\n")
    assert error.startswith(f"stopped by {number.name}; to go on: {sys.executable} -c ")
    assert error.endswith(" --resume\n")


def test_another_ending_stays_what_it_is():
    with pytest.raises(SystemExit, match="error: a key"), interruptible():
        raise SystemExit("error: a key")


def test_a_loop_in_a_shell_stops_at_ctrl_c():
    """Which is SIGINT to the whole group. It went on with the next one."""
    with shell_loop() as shell:
        os.killpg(shell.pid, signal.SIGINT)
        out, _ = shell.communicate(timeout=50)
    assert shell.returncode == -signal.SIGINT and out.startswith("left\nstopped by SIGINT; to go on: ")
    assert "\nthere\n" not in out and "exit code" not in out


def test_a_shell_is_told_of_sigterm():
    with shell_loop() as shell:
        (child,) = map(int, Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split())
        os.kill(child, signal.SIGTERM)
        lines = list(iter(shell.stdout.readline, "there\n"))  # until the next one is there
        os.killpg(shell.pid, signal.SIGKILL)
    assert lines[0] == "left\n" and "exit code 143\n" in lines


@contextmanager
def shell_loop() -> Iterator[subprocess.Popen]:
    """A shell in a group of its own, in the first round of its loop."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(["bash", "-c", LOOP, sys.executable, WAITS], env=ENVIRONMENT, **how) as shell:
        assert shell.stdout.readline() == "there\n"
        yield shell


SCRIPT = """
import os, signal, sys
from runtime import signals
request = signals.StopRequest(tell=True)
with signals.handled(request):
    for number in (signal.SIGTERM, signal.SIGINT):  # the second is the first one again, so soon after it
        os.kill(os.getpid(), number)
    print(request.number == signal.SIGTERM, flush=True)
    signals.ECHO_S = 0.0
    os.kill(os.getpid(), signal.SIGINT)
    print("too late", flush=True)
"""


def test_a_second_signal_ends_at_once():
    """But not the same one that came a second way: Slurm signals us and our launcher, which forwards it."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=ENVIRONMENT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "True\n")
    assert done.stderr == "\nSIGTERM: stopping after this step, with a checkpoint\n"


def test_the_command_is_the_one_that_was_typed(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train_grpo.py", "prompt.tvg='{question} now'"])
    assert command("--resume") == """python train_grpo.py 'prompt.tvg='"'"'{question} now'"'"'' --resume"""
    assert shlex.split(command()) == sys.orig_argv
    monkeypatch.setattr(sys, "orig_argv", [*sys.orig_argv, "--resume"])
    assert command("--resume").count("--resume") == 1


def test_under_a_launcher_it_is_the_launchers(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(signals.os, "getppid", os.getpid)
    assert shlex.split(command("--resume")) == [*sys.orig_argv, "--resume"]
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    StopRequest(tell=True)(signal.SIGTERM)
    assert "the launcher waits 600 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT)" in capsys.readouterr().err


def test_in_a_notebook_a_signal_ends_the_cell_and_not_the_kernel(monkeypatch):
    """What is in memory outlives the run; before, Ctrl-C in a cell that trained took the kernel with it."""
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    with pytest.raises(KeyboardInterrupt):
        die_of(signal.SIGINT)
