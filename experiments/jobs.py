"""The commands of an experiment, several side by side on this machine: resumable, each with its log.

What stands finished in the folder is not run again, what was left half-way is started over, and a job that fails stops
only those that need it. experiments/ablations.py and benchmarks/bench_losses.py use it.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import yaml
from tqdm import tqdm

import config
from runtime.signals import handled

REPO = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "train_sft.py": config.SftConfig,
    "train_grpo.py": config.GrpoConfig,
    "select_data.py": config.SelectConfig,
    "eval.py run": config.EvalRunConfig,
}
RESULTS = ("final", "metrics.json", "summary.json")  # what a training, an evaluation and a selection write at their end
TAIL = 12  # lines of a failed job's log that are shown
BAR = "runs |{bar:20}| {elapsed}, {remaining} left"  # counts the expected seconds of jobs that have ended


@dataclass(frozen=True)
class Job:
    """One command. `name` is its run folder below the root, and its log stands beside that folder."""

    name: str
    program: str  # of PROGRAMS
    words: Callable[[], Sequence[str]]  # files and overrides but run.dir, made when its turn comes; may raise
    needs: tuple[str, ...] = ()  # names of jobs before it in the list
    seconds: float = 15.0  # that it is expected to take


def unfinished(jobs: Sequence[Job], root: Path) -> list[Job]:
    """The jobs whose result is not there, and those that are made from such a one.

    Raises ValueError where a folder holds something else, or a result of another configuration than the job has now.
    """
    todo: dict[str, Job] = {}
    for job in jobs:
        folder = root / job.name
        if folder.exists() and not _log_of(folder).is_file():
            raise ValueError(f"{folder} is there, and not from here: remove it, or use another folder")
        if todo.keys() & set(job.needs) or not _is_finished(job, root):
            todo[job.name] = job
    return list(todo.values())


def run_all(jobs: Sequence[Job], root: Path, parallel: int, threads: int = 1) -> dict[str, str]:
    """Run what is not finished, at most `parallel` jobs at a time; returns why those failed that did, by name.

    Ctrl-C and SIGTERM end the running ones. Raises ValueError as `unfinished` does, and where another call works in the
    same folder.
    """
    running: dict[str, subprocess.Popen] = {}
    failed: dict[str, str] = {}
    with _locked(root) as lock, _all_ended(running):
        todo = {job.name: job for job in unfinished(jobs, root)}
        for name in todo:  # all of them now, so that no result outlives the one that it was made from
            shutil.rmtree(root / name, ignore_errors=True)
        order = TopologicalSorter({name: todo.keys() & set(job.needs) for name, job in todo.items()})
        order.prepare()
        ready = list(order.get_ready())
        bar = tqdm(total=sum(job.seconds for job in todo.values()), bar_format=BAR, smoothing=0)
        while ready or running:
            while ready and len(running) < parallel:
                name = ready.pop(0)
                try:
                    running[name] = _start(todo[name], root, threads, lock)
                except (ValueError, OSError, KeyError) as error:
                    failed[name] = str(error)
            time.sleep(0.1)
            for name in [name for name, child in running.items() if child.poll() is not None]:
                code = running.pop(name).returncode
                bar.update(todo[name].seconds)
                if code:
                    failed[name] = f"exit code {code}; the end of {_log_of(root / name)}:\n{_tail(root / name)}"
                    continue
                shutil.rmtree(root / name / "checkpoints", ignore_errors=True)  # only a resume would need them
                order.done(name)
            ready += order.get_ready()  # what needs a failed job never is
        bar.close()
    return failed


def report(failed: dict[str, str]) -> str:
    return "\n\n".join(f"FAILED {name}: {why}" for name, why in failed.items())


def _is_finished(job: Job, root: Path) -> bool:
    """Whether the result is there. Raises ValueError where its config.yaml is not what the job would write now.

    The folder of all results may have moved since: its path in a value counts as `ROOT`.
    """
    folder = root / job.name
    if not any((folder / name).exists() for name in RESULTS):
        return False
    words = [*job.words(), f"run.dir={folder}"]
    files, overrides = [str(REPO / w) for w in words if "=" not in w], [w for w in words if "=" in w]
    cfg = config.load(PROGRAMS[job.program], files, overrides)
    now, there = (config.flat(yaml.safe_load(y)) for y in (config.to_yaml(cfg), (folder / "config.yaml").read_text()))
    for values, place in ((now, root), (there, there["run.dir"].removesuffix(f"/{job.name}"))):
        values |= {key: v.replace(str(place), "ROOT") for key, v in values.items() if isinstance(v, str)}
    keys = sorted(key for key in now.keys() | there.keys() if now.get(key) != there.get(key))
    if keys:
        raise ValueError(f"{folder} is of another configuration ({', '.join(keys)}): remove it, or use another folder")
    return True


def _start(job: Job, root: Path, threads: int, lock: int) -> subprocess.Popen:
    """A process that holds the lock for as long as it lives, whatever becomes of this one."""
    folder = root / job.name
    command = [sys.executable, *job.program.split(), "--config", *job.words(), f"run.dir={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(_log_of(folder), "w") as log:
        files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT, "pass_fds": (lock,)}
        return subprocess.Popen(command, cwd=REPO, env=environment, **files)


def _log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _tail(folder: Path) -> str:
    """The end of a job's log; of a bar that was drawn over itself, the last state."""
    lines = _log_of(folder).read_bytes().decode("utf-8", "replace").split("\n")
    return "\n".join([line.rstrip("\r").rpartition("\r")[2] for line in lines if line.strip()][-TAIL:])


@contextmanager
def _locked(root: Path) -> Iterator[int]:
    """The folder for this call and its processes alone: a file descriptor that holds the lock."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{root} is in use, by another call or by a process that one left behind") from None
        yield file.fileno()


@contextmanager
def _all_ended(running: dict[str, subprocess.Popen]) -> Iterator[None]:
    """However the block is left, no process stays; SIGTERM is as Ctrl-C."""

    def interrupt(number: int) -> None:
        raise KeyboardInterrupt

    try:
        with handled(interrupt):
            yield
    finally:
        for child in running.values():
            child.terminate()
        for child in running.values():
            child.wait()
