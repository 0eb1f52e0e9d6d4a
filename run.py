"""A run and its folder: processes and seeds, environment, metrics, samples, checkpoints, resume.

Not a trainer: it holds no loop and knows no model. The folder has config.yaml and env.json (written first),
metrics.jsonl (one row per step, the truth; trackers mirror it), samples.jsonl, bad_samples.jsonl where there were
such, checkpoints/, best/ and final/.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    set_seed,
)

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
DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user can mend (a config key, a path, a record) ends the program with one line, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def use_deepspeed() -> bool:
    """Whether `accelerate launch` was given a DeepSpeed configuration."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def check_precision(cfg) -> None:
    """Raises ValueError where steps of 1e-6 would be lost in the rounding of bfloat16 weights. `cfg`: section model."""
    if cfg.dtype == "bfloat16" and not cfg.lora_rank and not use_deepspeed():
        raise ValueError(
            "model.dtype=bfloat16 trains with adapters (model.lora_rank), which are float32, or under DeepSpeed, "
            "which keeps float32 weights beside them"
        )


class Run:
    """The folder of one run, and the processes that share it.

    `keep` is how many checkpoints stay; 0: there are none, and resuming finds what is done by itself.
    """

    def __init__(self, dir: str, config_yaml: str, seed: int, tracker: str, resume: bool, keep: int):
        self.dir, self.keep = Path(dir), keep
        self._lock_file = None  # on the main process, until the end
        on_cpu = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
        self.accelerator = Accelerator(
            cpu=on_cpu and not use_deepspeed(),
            log_with=None if tracker == "none" else tracker,
            project_dir=dir,
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu else None,
        )
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError("ZeRO-3 is not supported yet: sampling would run on sharded weights; use zero2.yaml")
        self.checkpoint: Path | None = None
        self.start_step, self.state = 0, {}
        self.raise_together(lambda: self._open(config_yaml, resume))
        self.checkpoint, self.start_step, self.state = self._broadcast((self.checkpoint, self.start_step, self.state))
        set_seed(seed)
        if tracker != "none":
            self.accelerator.init_trackers("logs")

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def _broadcast(self, value):
        box = [value]
        broadcast_object_list(box)
        return box[0]

    def raise_together(self, action: Callable[[], None]) -> None:
        """Run `action` on the main process; what it raises is raised on all."""
        error = None
        if self.is_main:
            try:
                action()
            except (ValueError, OSError) as caught:
                error = caught
        error = self._broadcast(error)
        if error is not None:
            raise error

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

    def prepare(self, model, optimizer, grad_clip: float):
        """Model and optimizer for the engine at hand, back at the checkpoint when resuming."""
        if use_deepspeed():  # it clips within its own step, and wants a batch size though no loader is prepared
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
            settings |= {"gradient_clipping": grad_clip, "train_micro_batch_size_per_gpu": 1}
        prepared = self.accelerator.prepare(model, optimizer)
        if self.checkpoint is not None:
            self.accelerator.load_state(str(self.checkpoint))
        return prepared

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one row to metrics.jsonl and hand it to the tracker. Main process only acts."""
        self.append("metrics.jsonl", [{"step": step} | metrics])
        self.accelerator.log(metrics, step=step)

    def log_samples(self, rows: Sequence[dict]) -> None:
        """Append the rows of all processes, in the order of their `group`, to samples.jsonl."""
        self.append("samples.jsonl", sorted(gather_object(list(rows)), key=lambda row: row["group"]))

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

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """The same numbers summed over all processes; every process must bring the same keys."""
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(values, self.accelerator.reduce(tensor, "sum").tolist(), strict=True))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, in rank order; every process must bring equally many."""
        return self.accelerator.gather(rows.to(self.accelerator.device)).cpu()

    def maximum(self, value: float) -> float:
        tensor = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.gather(tensor).max().item()

    def save_checkpoint(self, step: int, state: dict) -> None:
        """Weights, optimizer and random states after `step` steps, written aside and renamed when complete."""
        folder = self.dir / "checkpoints" / f"step_{step:06d}"
        aside = folder.with_name(f"tmp_{step:06d}")
        if self.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(aside))
        self.accelerator.wait_for_everyone()
        if self.is_main:
            (aside / "run.json").write_text(json.dumps({"step": step, "state": state}))
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            for old in sorted(folder.parent.glob("step_*"))[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def backward(self, model, micro_batches: Sequence, loss_of: Callable) -> None:
        """Gradients of the sum of `loss_of(micro_batch)`; each is already divided by the step's denominator.

        The number of passes is the largest of all processes: one that has run out repeats its first micro-batch with
        weight 0, so that every collective call finds its partners. Engines average over processes; we want the sum.
        """
        num, world = int(self.maximum(len(micro_batches))), self.accelerator.num_processes
        for i in range(num):
            last = i == num - 1
            self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed reduces and steps at the last one
            delay = self.accelerator.distributed_type in DDP and not last
            with model.no_sync() if delay else nullcontext():
                loss = loss_of(micro_batches[i if i < len(micro_batches) else 0])
                self.accelerator.backward(loss * (world if i < len(micro_batches) else 0.0))

    def step(self, model, optimizer, grad_clip: float) -> float:
        """Clip, step and clear; returns the gradient norm before clipping.

        A gradient that is not finite is thrown away, with a warning, and its norm returned: the run goes on.
        """
        norm = self.accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], grad_clip)
        norm = float(norm if norm is not None else model.get_global_grad_norm())
        if math.isfinite(norm) or use_deepspeed():  # DeepSpeed has stepped, or not, by itself
            optimizer.step()
        elif self.is_main:
            print(f"WARNING: the gradient's norm is {norm}; this update is skipped", file=sys.stderr)
        optimizer.zero_grad()
        return norm

    def finish(self) -> None:
        self.accelerator.end_training()
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


def check_batch(size: int, accelerator: Accelerator) -> None:
    """Raises ValueError when a batch of `size` videos does not divide by the number of processes."""
    if size % accelerator.num_processes:
        raise ValueError(f"data.batch_size {size} does not divide by the {accelerator.num_processes} processes")


def config_differences(path: Path, config_yaml: str) -> dict[str, str]:
    """Keys (section.key) whose values differ in a config.yaml and in this text, each with a text that says how."""
    try:
        old, new = flat(yaml.safe_load(path.read_text())), flat(yaml.safe_load(config_yaml))
    except (yaml.YAMLError, AttributeError):
        raise ValueError(f"{path} is not a configuration") from None
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: f"{key} ({old.get(key)} there, {new.get(key)} now)" for key in differing}


def newest_checkpoint(dir: str | Path) -> Path | None:
    complete = [path for path in sorted(Path(dir, "checkpoints").glob("step_*")) if (path / "run.json").is_file()]
    return complete[-1] if complete else None


def cut_back(path: Path, step: int) -> None:
    """Drop the rows of a .jsonl written after `step` steps (rows count them from 1), and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):  # not splitlines: a completion may hold U+2028
        try:
            row = json.loads(line)
        except ValueError:  # torn, maybe within a character; or nothing, after the last line end
            break
        if row["step"] <= step:
            kept.append(line + b"\n")
    path.write_bytes(b"".join(kept))


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
