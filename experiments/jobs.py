"""The commands of an experiment, several side by side: resumable, each with its log, one bar over all of them.

Not a scheduler for several machines: `run_all` calls train_sft.py, eval.py and the like as processes on this one. What
stands finished in the folder is not run again, what was left half-way is started over, and a job that fails stops only
those that need it. Nothing to run; used by experiments/ablations.py and benchmarks/bench_losses.py.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
MARKER = "job.json"  # in the folder of a finished job: what it was, and what it took
NOT_RUN = "not run, for want of"
TAIL = 12  # lines of a failed job's log that are shown
GRACE_S = 10  # that a process has to end in when it is told to


@dataclass(frozen=True)
class Job:
    """One command. `name` is its run folder below the root; its log stands beside that folder."""

    name: str
    words: Callable[[], Sequence[str]]  # script and arguments but run.dir, made when its turn comes; may raise
    needs: tuple[str, ...] = ()  # names of jobs before it in the list
    seconds: float = 1.0  # that it is expected to take: the bar counts in them


def run_all(jobs: Sequence[Job], root: Path, parallel: int, threads: int = 1) -> dict[str, str]:
    """Run what is not finished, at most `parallel` jobs at a time; returns why those failed that did, by name.

    Ctrl-C and SIGTERM end the running ones. Raises ValueError where another call works in the same folder.
    """
    names = [job.name for job in jobs]
    assert all(name not in names[:i] and set(jobs[i].needs) <= set(names[:i]) for i, name in enumerate(names))
    waiting, done, failed = list(jobs), set[str](), dict[str, str]()
    running: dict[Future, tuple[Job, Sequence[str]]] = {}
    children: list[subprocess.Popen] = []
    expected = {job.name: job.seconds for job in jobs if not read_marker(root / job.name)}  # of those to be run
    with locked(root) as lock, ThreadPoolExecutor(parallel) as pool, ending(children), bar_of(expected) as bar:
        while waiting or running:
            for job in [job for job in waiting if set(job.needs) <= done | failed.keys()]:
                if len(running) == parallel:
                    break
                waiting.remove(job)
                try:
                    words = checked_words(job, root, failed)
                except (ValueError, OSError, KeyError) as error:
                    failed[job.name] = str(error)
                    bar.total -= expected.get(job.name, 0)
                    continue
                if is_finished(job, root):
                    done.add(job.name)
                    continue
                bar.total += 0 if job.name in expected else job.seconds
                children.append(start(root / job.name, words, threads, lock))
                running[pool.submit(seconds_of, children[-1])] = job, words
            show(bar, len(jobs), len(done) + len(failed), [job.name for job, _ in running.values()])
            for future in wait(running, timeout=5, return_when=FIRST_COMPLETED).done:
                job, words = running.pop(future)
                code, seconds = future.result()
                if code in (-signal.SIGINT, -signal.SIGTERM):
                    failed[job.name] = "a signal has stopped it"
                elif code:
                    log = log_of(root / job.name)
                    failed[job.name] = "\n".join([f"exit code {code}; the end of {log}:", *last_lines(log)])
                else:
                    done.add(job.name)
                    write_marker(job, words, root, seconds)
                bar.update(job.seconds)
        show(bar, len(jobs), len(done) + len(failed), [])
    return failed


def checked_words(job: Job, root: Path, failed: dict[str, str]) -> list[str]:
    """The job's words; ValueError where what it needs is missing, or its folder holds something else."""
    missing = [name for name in job.needs if name in failed]
    if missing:
        raise ValueError(f"{NOT_RUN} {missing[0]}")
    words = list(job.words())
    folder, marker = root / job.name, read_marker(root / job.name)
    if marker and marker["words"] != named(words, root):
        raise ValueError(f"{folder} is of another command or configuration: remove it, or use another folder")
    if folder.exists() and not log_of(folder).is_file():
        raise ValueError(f"{folder} is there, and not from here: remove it, or use another folder")
    return words


def is_finished(job: Job, root: Path) -> bool:
    """Whether its result is there, and newer than those it was made from."""
    marker = read_marker(root / job.name)
    return bool(marker) and all(read_marker(root / name)["time"] <= marker["time"] for name in job.needs)


def named(words: Sequence[str], root: Path) -> list[str]:
    """The words as a marker has them: without the root, which may move, and with the content of configuration files."""
    files = [word for word in words if word.endswith(".yaml") and "=" not in word]
    hashes = [f"{Path(file).name}: {hashlib.sha256((REPO / file).read_bytes()).hexdigest()[:12]}" for file in files]
    return [word.replace(str(root), "ROOT") for word in words if word not in files] + hashes


def read_marker(folder: Path) -> dict[str, Any]:
    """{} where the job is not finished."""
    path = folder / MARKER
    return json.loads(path.read_text()) if path.is_file() else {}


def write_marker(job: Job, words: Sequence[str], root: Path, seconds: float) -> None:
    """Says that the job is finished; its checkpoints, which only a resume would need, go."""
    folder = root / job.name
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    content = {"words": named(words, root), "seconds": round(seconds, 1), "time": time.time()}
    aside = folder / f"{MARKER}.tmp"
    aside.write_text(json.dumps(content, indent=2) + "\n")
    aside.replace(folder / MARKER)


def start(folder: Path, words: Sequence[str], threads: int, lock: int) -> subprocess.Popen:
    """A process of its own group, which keeps the lock for as long as it lives, whatever becomes of this one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30"}
    with open(log_of(folder), "w") as log:
        return subprocess.Popen(
            [sys.executable, *words, f"run.dir={folder}"],
            cwd=REPO,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )


def seconds_of(child: subprocess.Popen) -> tuple[int, float]:
    """Exit code of a process, and how long it went on."""
    begin = time.perf_counter()
    return child.wait(), time.perf_counter() - begin


@contextmanager
def locked(root: Path) -> Iterator[int]:
    """The folder for this call and its processes alone: a file descriptor that holds the lock."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{root} is in use, by another call or by a process that one left behind") from None
        yield file.fileno()


@contextmanager
def ending(children: list[subprocess.Popen]) -> Iterator[None]:
    """However this is left, no process stays; SIGTERM is as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        alive = [child for child in children if child.poll() is None]
        for child in alive:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
        for child in alive:
            try:
                child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)


def bar_of(expected: dict[str, float]) -> tqdm:
    """Counts expected seconds, so that the time left is right for jobs of unequal length."""
    layout = "{desc} |{bar:20}| {elapsed}, {remaining} left{postfix}"
    return tqdm(total=sum(expected.values()), bar_format=layout, smoothing=0)


def show(bar: tqdm, num: int, num_ended: int, names: Sequence[str]) -> None:
    """Drawn at once on a terminal, or at the end; elsewhere with the next update."""
    bar.set_description_str(f"{num_ended}/{num} runs", refresh=False)
    bar.set_postfix_str(" ".join(names), refresh=sys.stderr.isatty() or not names)


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def last_lines(path: Path) -> list[str]:
    """Of a log; of a bar that was drawn over itself, the last state."""
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    return [line.rstrip("\r").rpartition("\r")[2] for line in lines if line.strip()][-TAIL:]


def report(failed: dict[str, str]) -> str:
    """What is printed of the failed jobs at the end: those that ended badly, and how many they stopped."""
    ended = [f"FAILED {name}: {why}" for name, why in failed.items() if not why.startswith(NOT_RUN)]
    num = len(failed) - len(ended)
    return "\n\n".join([*ended, f"{num} more not run, for want of these"] if num else ended)
