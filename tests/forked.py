"""Real training processes that start within a second: forked from a server that has imported everything.

`start` runs train_grpo.py in a process of its own, `start_all` in several that train together, under a configuration
of `accelerate launch`. Each says into a pipe which phase it enters; a fault strikes one of them where it does.
"""

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import deepspeed  # noqa: F401  (what a process would import in its first step)
import torch
from accelerate.commands import launch

import train_grpo
from runtime.watchdog import Watchdog

REPO = Path(__file__).resolve().parents[1]
SERVER = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Fault:
    """What happens to one process where it enters a phase: it is killed, it hangs, or it is stopped (SIGSTOP)."""

    kind: str
    phase: str
    step: int
    rank: int = 0

    def strike(self) -> None:
        if self.kind == "hangs":
            time.sleep(1000)
        os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[self.kind])


@dataclass
class Child:
    process: BaseProcess
    log: Path
    phases: Connection

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def wait(self, seconds: float = 1000.0) -> int:
        """Its exit code."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.kill()
            raise TimeoutError(f"still there after {seconds} s:\n{self.text}")
        return code

    def entered(self, seconds: float = 1000.0) -> Iterator[tuple[int, str]]:
        """The step and the name of each phase as it enters them, until it ends."""
        try:
            while self.phases.poll(seconds):
                yield self.phases.recv()
        except EOFError:
            return
        self.kill()
        raise TimeoutError(f"no further phase within {seconds} s:\n{self.text}")

    def wait_for(self, phase: str, step: int) -> None:
        assert (step, phase) in self.entered(), f"ended before phase {phase} of step {step}:\n{self.text}"


def start_server() -> None:
    """Needed once, before the first process; it sees no GPU and uses one thread."""
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}", "OMP_NUM_THREADS": "1"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    SERVER.set_forkserver_preload(["forked"])
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


def start(
    arguments: Sequence[str],
    log: Path,
    fault: Fault | None = None,
    setup: Callable[[], None] | None = None,
    environment: dict[str, str] | None = None,
) -> Child:
    """train_grpo.py with these arguments; `setup` is called in its process before."""
    ours, theirs = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_main, args=(list(arguments), log, fault, setup, environment or {}, theirs))
    process.start()
    theirs.close()
    return Child(process, log, ours)


def start_all(
    config: str,
    arguments: Sequence[str],
    log: Path,
    fault: Fault | None = None,
    setup: Callable[[], None] | None = None,
) -> list[Child]:
    """The processes of a file in configs/accelerate; the log of each has its rank in the name."""
    common, children = launch_environment(config), []
    for rank in range(int(common["WORLD_SIZE"])):
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        struck = fault if fault is not None and fault.rank == rank else None
        children.append(start(arguments, log.with_suffix(f".{rank}.log"), struck, setup, environment))
    return children


def launch_environment(config: str) -> dict[str, str]:
    """What `accelerate launch` with this file would give to each process of one machine, but for its rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["--config_file", str(REPO / "configs" / "accelerate" / config), "--main_process_port", port, "script.py"]
    args, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    made = launch.prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else launch.prepare_multi_gpu_env(args)
    num = {"WORLD_SIZE": str(args.num_processes), "LOCAL_WORLD_SIZE": str(args.num_processes)}
    own = {name: value for name, value in made.items() if os.environ.get(name) != value}
    return own | num | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def _main(arguments, log, fault, setup, environment, phases) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    phase = Watchdog.phase

    @contextmanager
    def told_phase(watchdog: Watchdog, name: str):
        with phase(watchdog, name):
            place = watchdog.step, name
            phases.send(place)
            if fault is not None and place == (fault.step, fault.phase):
                fault.strike()
            yield

    Watchdog.phase = told_phase
    if setup is not None:
        setup()
    sys.argv = sys.orig_argv = ["train_grpo.py", *arguments]
    train_grpo.main(arguments)


# ---- what `setup` may be -------------------------------------------------------------------------------------------


def own_group() -> None:
    """A process group of its own, as a shell gives to what it runs in the foreground."""
    os.setpgid(0, 0)


def jumping_clock() -> None:
    """The wall clock is set forward or back by up to a year at every look."""
    jumps, now = random.Random(0), time.time
    time.time = lambda: now() + jumps.uniform(-3e7, 3e7)


def loss_times(factor: float, rank: int, first_step: int) -> None:
    """On one process, the loss is multiplied by this from this step on."""
    if os.environ["RANK"] == str(rank):
        update = train_grpo.update
        train_grpo.update = partial(_update, update, train_grpo.policy_loss, factor, first_step)


def _update(update, policy_loss, times, first_step, policy, reference, optimizer, rollout, batch, cfg, run):
    factor = times if run.engine.watchdog.step >= first_step else 1.0

    def loss(*args, **kwargs):
        value, sums = policy_loss(*args, **kwargs)
        return value * factor, sums

    train_grpo.policy_loss = loss
    return update(policy, reference, optimizer, rollout, batch, cfg, run)
