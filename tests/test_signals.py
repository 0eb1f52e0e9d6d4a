"""SIGTERM and SIGINT: handlers come and go, a second signal ends a run at once, one line names the command."""

import os
import shlex
import signal
import subprocess
import sys
import threading

import pytest
from conftest import REPO

import signals
from signals import StopRequest, command, handled, interruptible

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


@pytest.mark.parametrize("number", NUMBERS)
def test_what_can_be_stopped_anywhere_ends_with_one_line(number):
    told = rf"^stopped by {number.name}; to go on: .*python.* --resume$"
    with pytest.raises(SystemExit, match=told), interruptible():
        os.kill(os.getpid(), number)


SCRIPT = """
import os, signal, sys
import signals
request = signals.StopRequest(tell=True)
with signals.handled(request):
    for number in (signal.SIGTERM, signal.SIGINT):  # the second is the first one again, so soon after it
        os.kill(os.getpid(), number)
    print(request.received, flush=True)
    signals.ECHO_S = 0.0
    os.kill(os.getpid(), signal.SIGINT)
    print("too late", flush=True)
"""


def test_a_second_signal_ends_at_once():
    """But not the same one that came a second way: Slurm signals us and our launcher, which forwards it."""
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=50)
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
