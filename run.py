"""A run and its folder: seeds, environment, metrics, samples, checkpoints, resume.

Not a trainer: it holds no loop and knows no model. The folder has config.yaml and env.json (written first),
metrics.jsonl (one row per step, the truth; trackers mirror it), samples.jsonl, bad_samples.jsonl where there were
such, checkpoints/, best/ and final/.
"""

import fcntl
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import yaml
from accelerate.utils import set_seed

from checkpoint import cut_back, newest_checkpoint
from engine import Engine

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "deepspeed",
    "decord2",
    "decord",
    "av",
    "numpy",
    "tokenizers",
)
UNUSED = {"config.yaml", "env.json", "config.yaml.tmp", "env.json.tmp", "logs", "lock"}  # of a run without a step
MAY_CHANGE = {"run.steps", "data.workers", "data.decode_timeout", "data.max_bad_share"}  # from one resume to the next


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user can mend (a config key, a path, a record) ends the program with one line, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


class Run:
    """The folder of one run, and the processes that share it.

    `keep` is how many checkpoints stay; 0: there are none, and resuming finds what is done by itself.
    """

    def __init__(self, dir: str, config_yaml: str, seed: int, tracker: str, resume: bool, keep: int):
        self.dir, self.keep = Path(dir), keep
        self._lock_file = None  # on the main process, until the end
        self.engine = Engine(dir, tracker)
        self.checkpoint: Path | None = None
        self.start_step, self.state = 0, {}
        self.engine.raise_together(lambda: self._open(config_yaml, resume))
        self.checkpoint, self.start_step, self.state = self.engine.broadcast(
            (self.checkpoint, self.start_step, self.state)
        )
        set_seed(seed)
        if tracker != "none":
            self.engine.accelerator.init_trackers("logs")

    @property
    def is_main(self) -> bool:
        return self.engine.is_main

    def _lock(self) -> None:
        """Hold the folder while this process lives: two runs in one would mix their rows."""
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock_file = open(self.dir / "lock", "a")  # noqa: SIM115
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"run.dir {self.dir} is in use by another process") from None

    def _open(self, config_yaml: str, resume: bool) -> None:
        if not (self.dir / "config.yaml").is_file() and resume and self.keep:
            raise FileNotFoundError(f"--resume: {self.dir / 'config.yaml'} not found")
        resume = resume and (self.dir / "config.yaml").is_file()  # else it was stopped before it began
        if not resume and self.dir.exists() and {path.name for path in self.dir.iterdir()} - UNUSED:
            raise FileExistsError(f"run.dir {self.dir} exists; give --resume to go on, or another run.dir")
        self._lock()
        if not resume:
            write_text(self.dir / "env.json", json.dumps(environment(), indent=2) + "\n")
            write_text(self.dir / "config.yaml", config_yaml)
            return
        self._check_same_config(config_yaml)
        if self.keep:
            self.checkpoint = newest_checkpoint(self.dir)
            if self.checkpoint is None:
                raise ValueError(f"--resume: no complete checkpoint in {self.dir / 'checkpoints'}")
            saved = json.loads((self.checkpoint / "run.json").read_text())
            self.start_step, self.state = saved["step"], saved["state"]
            for name in ("metrics.jsonl", "samples.jsonl", "bad_samples.jsonl"):
                cut_back(self.dir / name, self.start_step)

    def _check_same_config(self, config_yaml: str) -> None:
        path = self.dir / "config.yaml"
        differences = config_differences(path, config_yaml)
        differing = [text for key, text in differences.items() if key not in MAY_CHANGE]
        if differing:
            raise ValueError(f"--resume: {path} differs in {', '.join(differing)}")
        write_text(path, config_yaml)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one row to metrics.jsonl and hand it to the tracker. Main process only acts."""
        self.append("metrics.jsonl", [{"step": step} | metrics])
        self.engine.accelerator.log(metrics, step=step)

    def log_samples(self, rows: Sequence[dict]) -> None:
        """Append the rows of all processes, in the order of their `group`, to samples.jsonl."""
        self.append("samples.jsonl", sorted(self.engine.gather_rows(rows), key=lambda row: row["group"]))

    def append(self, name: str, rows: Sequence[dict]) -> None:
        """Append rows to a .jsonl of the folder, which a resume cuts back by their `step`. Main process only acts."""
        if self.is_main:
            with open(self.dir / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def rows(self, name: str) -> list[dict]:
        """The rows of a .jsonl of the folder; none where it is not there."""
        path = self.dir / name
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def prepare(self, model, optimizer, grad_clip: float):
        """Model and optimizer for the engine at hand, back at the checkpoint when resuming."""
        prepared = self.engine.prepare(model, optimizer, grad_clip)
        if self.checkpoint is not None:
            self.engine.accelerator.load_state(str(self.checkpoint))
        return prepared

    def save_checkpoint(self, step: int, state: dict) -> None:
        """Weights, optimizer and random states after `step` steps, written aside and renamed when complete."""
        folder = self.dir / "checkpoints" / f"step_{step:06d}"
        aside = folder.with_name(f"tmp_{step:06d}")
        if self.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.engine.wait()
        self.engine.accelerator.save_state(str(aside))
        self.engine.wait()
        if self.is_main:
            (aside / "run.json").write_text(json.dumps({"step": step, "state": state}))
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            for old in sorted(folder.parent.glob("step_*"))[: -self.keep]:
                shutil.rmtree(old)
        self.engine.wait()

    def finish(self) -> None:
        self.engine.accelerator.end_training()
        if self._lock_file is not None:
            self._lock_file.close()


class Clock:
    """Seconds spent per phase of a step.

    >>> clock = Clock()
    >>> with clock("update"):
    ...     pass
    >>> list(clock.times()), clock.times()
    (['time/update'], {})
    """

    def __init__(self):
        self.seconds = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[f"time/{phase}"] += time.perf_counter() - start

    def times(self) -> dict[str, float]:
        """The seconds since the last call, and start again."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def config_differences(path: Path, config_yaml: str) -> dict[str, str]:
    """Keys (section.key) whose values differ in a config.yaml and in this text, each with a text that says how."""
    try:
        old, new = flat(yaml.safe_load(path.read_text())), flat(yaml.safe_load(config_yaml))
    except (yaml.YAMLError, AttributeError):
        raise ValueError(f"{path} is not a configuration") from None
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: f"{key} ({old.get(key)} there, {new.get(key)} now)" for key in differing}


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that it is never seen half-written."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def code_hash() -> str:
    """Of the Python files beside this one: equal where the same code ran, whatever else was committed."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(part for f in files for part in (f.name.encode(), f.read_bytes()))).hexdigest()[
        :12
    ]


def environment() -> dict:
    """Versions, commit and uncommitted changes, devices: what a number needs beside it to be trusted."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": packages,
        "devices": devices or [f"cpu, {torch.get_num_threads()} threads"],
        "code_hash": code_hash(),
        "commit": _git("rev-parse", "HEAD"),
        "diff": _git("diff", "HEAD"),
    }


def _git(*args: str) -> str | None:
    here = Path(__file__).parent
    try:
        return subprocess.run(["git", "-C", here, *args], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, keys joined by dots.

    >>> flat({"video": {"fps": 2.0}, "answer": "tagged"})
    {'video.fps': 2.0, 'answer': 'tagged'}
    """
    found: dict = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
