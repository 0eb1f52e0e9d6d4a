"""A run and its folder: seeds, environment, metrics, samples, checkpoints, resume.

The folder has config.yaml and env.json (written first), metrics.jsonl (one row per step, which trackers mirror),
samples.jsonl, bad_samples.jsonl where a sample could not be read, checkpoints/, best/ and final/.
"""

import fcntl
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

import yaml
from accelerate.utils import set_seed
from tqdm import tqdm

from config import flat
from records import jsonl
from runtime import checkpoint
from runtime.engine import Engine
from runtime.environment import environment
from runtime.signals import StopRequest, command, die_of, handled, is_launched

UNUSED = {"config.yaml", "env.json", "config.yaml.tmp", "env.json.tmp", "logs", "lock", "report.html"}  # without a step
UNUSED |= {"reward_error.txt"}  # a function that failed in the first step is mended, and the command given again
ROWS = ("metrics.jsonl", "samples.jsonl", "bad_samples.jsonl")  # cut back to the checkpoint by a resume
# keys that may change from one start to the next
MAY_CHANGE = {f"data.{name}" for name in ("workers", "decode_timeout", "max_bad_share", "cache_dir", "cache_gib")}
MAY_CHANGE |= {f"run.{name}" for name in ("steps", "save_every", "keep_checkpoints", "print_every", "timeout")}
MAY_CHANGE |= {"run.max_skipped", "run.max_first_grad_norm", "run.self_check"}


class Run:
    """The folder of one run, and the processes that share it. `cfg` is the section run.

    Without `checkpoints` there are none and no tracker, and resuming finds what is done by itself.
    """

    def __init__(self, cfg, config_yaml: str, resume: bool, checkpoints: bool = True):
        self.cfg, self.dir, self.has_checkpoints = cfg, Path(cfg.dir), checkpoints
        tracker = cfg.tracker if checkpoints else "none"
        self._lock_file = None  # on the main process, until the end
        self._failed: OSError | None = None  # of the main process, to append a row
        self.engine = Engine(cfg.dir, tracker, cfg.timeout)
        self.is_main = self.engine.is_main
        found = self.engine.raise_together(lambda: self._open(config_yaml, resume))
        self.checkpoint, self.start_step, self.state = found or (None, 0, {})
        self.saved_step = self.start_step
        self.stopped = False  # by a signal, before the last step
        self._stop_request = StopRequest(tell=self.is_main)
        self.engine.skipped_in_a_row = self.state.get("skipped_in_a_row", 0)
        set_seed(cfg.seed)
        if tracker != "none":
            settings = flat(yaml.safe_load(config_yaml))  # trackers take numbers and texts
            settings = {key: v if isinstance(v, bool | int | float) else str(v) for key, v in settings.items()}
            self.engine.accelerator.init_trackers("logs", settings)

    def _lock(self) -> None:
        """Hold the folder while this process lives: two runs in one would mix their rows."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock_file = open(self.dir / "lock", "a")  # noqa: SIM115
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"run.dir {self.dir} is in use by another process") from None
        except OSError as error:
            raise ValueError(f"run.dir {self.dir} cannot be written and locked: {error.strerror}") from None

    def _open(self, config_yaml: str, resume: bool) -> tuple[Path, int, dict] | None:
        """Make the folder, or go back to its newest checkpoint; returns that, its step and its state."""
        path = self.dir / "config.yaml"
        is_there = path.is_file()
        is_used = self.dir.is_dir() and bool({entry.name for entry in self.dir.iterdir()} - UNUSED)
        if resume and self.has_checkpoints and not is_there and (is_used or not self.dir.is_dir()):
            raise FileNotFoundError(f"--resume: {path} not found")
        resume = resume and is_there  # else it was stopped before it began
        if not resume and is_used:
            raise FileExistsError(f"run.dir {self.dir} exists; give --resume to go on, or another run.dir")
        self._lock()
        if not resume:
            checkpoint.write_text(self.dir / "env.json", json.dumps(environment(), indent=2) + "\n")
            checkpoint.write_text(path, config_yaml)
            return None
        differences = config_differences(path, config_yaml)
        differing = [text for key, text in differences.items() if key not in MAY_CHANGE]
        if differing:
            raise ValueError(f"--resume: {path} differs in {', '.join(differing)}")
        checkpoint.write_text(path, config_yaml)
        return self._find_checkpoint() if self.has_checkpoints else None

    def _find_checkpoint(self) -> tuple[Path | None, int, dict]:
        """Go back to the newest checkpoint that is whole, or to the beginning where none was ever complete."""
        folder, saved = self.dir / "checkpoints", {"step": 0, "state": {}}
        newest, damaged = checkpoint.newest_whole(folder)
        if damaged and newest is None:
            listed = "; ".join(f"{path}, {how}" for path, how in damaged.items())
            raise ValueError(f"--resume: no checkpoint is whole: {listed}")
        if newest is None:
            print(f"{self.dir} has no complete checkpoint yet: starting at step 0")
        else:
            saved = json.loads((newest / "run.json").read_text())
            self._check_same_engine(newest, saved["num_processes"], saved["sharding"])
        for path, how in damaged.items():
            warn(f"{path} is damaged ({how}); going on from {newest.name}")
            checkpoint.put_in_place(path, path.with_name(f"damaged_{path.name}"))
        for place in (self.dir, folder):
            checkpoint.remove_unfinished(place)
        for name in ROWS:
            checkpoint.cut_back(self.dir / name, saved["step"])
        return newest, saved["step"], saved["state"]

    def _check_same_engine(self, newest: Path, num_processes: int, sharding: str) -> None:
        """Whole weights go on with any number of processes, those that are cut up with as many as they were cut for."""
        here = self.engine
        if sharding != here.sharding or (sharding != "none" and num_processes != here.world_size):
            raise ValueError(
                f"--resume: {newest} differs in sharding ({sharding} there, {here.sharding} now) or number of "
                f"processes ({num_processes} there, {here.world_size} now)"
            )
        if num_processes != here.world_size:
            print(f"going on with {here.world_size} processes, {newest} is of {num_processes}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one row to metrics.jsonl and hand it to the tracker, without what is not finite: JSON has no NaN."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.append("metrics.jsonl", [{"step": step} | finite])
        self._try_to_write(lambda: self.engine.accelerator.log(finite, step=step))

    def show(self, step: int, text: str, figure=None) -> None:
        """Hand a text to the tracker, and a matplotlib figure to TensorBoard."""

        def write() -> None:
            self.engine.accelerator.log({"samples/completions": text}, step=step)
            for tracker in self.engine.accelerator.trackers:
                if tracker.name == "tensorboard" and figure is not None:
                    tracker.tracker.add_figure("samples/timelines", figure, step)

        self._try_to_write(write)

    def log_samples(self, rows: Sequence[dict]) -> None:
        """Append the rows of all processes, in the order of their `group`, to samples.jsonl."""
        self.append("samples.jsonl", sorted(self.engine.gather_rows(rows), key=lambda row: row["group"]))

    def append(self, name: str, rows: Sequence[dict]) -> None:
        """Append rows to a .jsonl of the folder, which a resume cuts back by their `step`. Main process only acts."""
        self._try_to_write(lambda: checkpoint.append_whole(self.dir / name, jsonl.text_of(rows)))

    def _try_to_write(self, action: Callable[[], None]) -> None:
        """On the main process; once that has failed (a full disk), no more is tried, and `save_due` ends the run."""
        if self.is_main and self._failed is None:
            try:
                action()
            except OSError as error:
                self._failed = error

    def rows(self, name: str) -> list[dict]:
        """The rows of a .jsonl of the folder; none where it is not there."""
        path = self.dir / name
        return [row for _, row in jsonl.read(path, torn=True)] if path.is_file() else []

    def prepare(self, model, optimizer, grad_clip: float):
        """Model and optimizer for the engine at hand, back at the checkpoint when resuming."""
        with self.engine.watchdog.meeting():
            prepared = self.engine.prepare(model, optimizer, grad_clip)
        if self.checkpoint is not None:
            self.engine.load_state(self.checkpoint)
        return prepared

    def stoppable(self) -> AbstractContextManager:
        """Within the block SIGTERM and SIGINT end the steps after the one at hand, with a checkpoint."""
        return handled(self._stop_request)

    def steps(self, name: str) -> Iterator[int]:
        """The steps that are left, counted from 0, until a signal asks to stop; with a bar."""
        for step in tqdm(range(self.start_step, self.cfg.steps), desc=name, disable=not self.is_main):
            self.engine.watchdog.step = step + 1
            yield step
            if self.stopped:
                return

    def die_if_stopped(self) -> None:
        """Die of the signal that stopped the run, unless torch's launcher is there, which would report a failure."""
        if self.stopped and self._stop_request.number is not None and not is_launched():
            die_of(self._stop_request.number)

    def check_finite(self, step: int, rows: Sequence[dict]) -> None:
        """End the run after too many skipped updates or a huge first gradient; `rows` are this process's batch."""
        norm, limit = self.engine.first_norm, self.cfg.max_first_grad_norm
        if limit and norm > limit:
            self._end(
                f"error: the first update has a gradient norm of {norm:.3g}, above run.max_first_grad_norm={limit:g} "
                "(0 for no limit). Usual causes: an attention kernel that does not return the gradients that it should "
                "(`python benchmarks/gpu.py` checks them on the device at hand), weights that were not loaded, a "
                "learning set-up with huge gradients, for example rewards of a large scale"
            )
        if self.engine.skipped_in_a_row < self.cfg.max_skipped:
            return
        path, found = self.dir / "not_finite.json", self.engine.gather_rows(self.engine.not_finite)
        content = {"step": step, "not_finite": found, "batch": self.engine.gather_rows(rows)}
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        self.engine.raise_together(lambda: checkpoint.write_text(path, text))
        num = self.engine.skipped_in_a_row
        self._end(f"error: {num} updates in a row had no finite gradient (run.max_skipped); the batch is in {path}")

    def save_due(self, step: int) -> bool:
        """Whether to save a checkpoint after `step` steps: every so often, at the end, and before a stop.

        All processes agree here on a signal that one of them got. Here the run ends if a row could not be written.
        """
        stop, failed = self._stop_request.number is not None, self._failed is not None
        asked = self.engine.sums({"stop": float(stop), "failed": float(failed)})
        if asked["failed"]:
            self._end(f"error: {self._failed}; --resume goes on from step {self.saved_step}")
        self.stopped = bool(asked["stop"]) and step < self.cfg.steps
        return self.stopped or step % self.cfg.save_every == 0 or step == self.cfg.steps

    def save_checkpoint(self, step: int, state: dict) -> None:
        """Weights, optimizer and random states after `step` steps, written aside and renamed when complete.

        Where a process cannot write its part (a full disk), all go on without, and the older checkpoints stay.
        """
        folder = self.dir / "checkpoints" / f"step_{step:06d}"
        aside, engine = folder.with_name(f"tmp_{folder.name}"), self.engine

        def complete() -> None:
            saved = {"step": step, "state": state | {"skipped_in_a_row": engine.skipped_in_a_row}}
            saved |= {"num_processes": engine.world_size, "sharding": engine.sharding}
            (aside / "run.json").write_text(json.dumps(saved))
            checkpoint.write_list(aside)
            for path in [self.dir / name for name in ROWS if (self.dir / name).is_file()]:
                checkpoint.sync(path)  # no rows may be missing that this checkpoint counts on
            checkpoint.put_in_place(aside, folder)

        with engine.phase("save"):
            errors = engine.try_together(lambda: checkpoint.make_empty(aside), on_main=True)
            errors = errors or engine.try_together(lambda: engine.save_state(aside))
            errors = errors or engine.try_together(complete, on_main=True)
        self.saved_step = self.saved_step if errors else step
        if self.is_main and errors:
            shutil.rmtree(aside, ignore_errors=True)
            warn(f"no checkpoint of step {step}, the newest is of step {self.saved_step}: {'; '.join(errors)}")
        elif self.is_main:
            checkpoint.remove_old(folder.parent, self.cfg.keep_checkpoints)

    def write_folder(self, name: str, write: Callable[[Path, dict | None], None]) -> bool:
        """Have `write(folder, weights)`, on the main process, fill a folder aside, and rename it; False if that failed.

        `weights` is what the engine gathers of a model that it has cut up, else None.
        """
        aside, weights = self.dir / f"tmp_{name}", self.engine.gathered_weights()

        def fill() -> None:
            checkpoint.make_empty(aside)
            write(aside, weights)
            checkpoint.put_in_place(aside, self.dir / name)

        errors = self.engine.try_together(fill, on_main=True)
        if errors and self.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            warn(f"{self.dir / name} could not be written: {'; '.join(errors)}")
        return not errors

    def finish(self, write_final: Callable[[Path, dict | None], None] | None = None) -> None:
        """The end: final/, unless a signal has stopped the run; else a line that says how to go on."""
        is_final = self.stopped or write_final is None or self.write_folder("final", write_final)
        self.engine.end()
        if self._lock_file is not None:
            self._lock_file.close()
        done, saved, again = self.engine.watchdog.step, self.saved_step, command("--resume")
        if not is_final:
            self._end(f"error: {self.dir / 'final'} is not written; to try again: {again}")
        if self.stopped and saved < done:
            self._end(f"error: stopped after step {done}, without a checkpoint since step {saved}; to go on: {again}")
        if self.stopped and self.is_main:
            print(f"stopped after step {done} of {self.cfg.steps}, with a checkpoint; to go on: {again}", flush=True)

    def _end(self, message: str) -> NoReturn:
        raise SystemExit(message if self.is_main else 1)


def config_differences(path: Path, config_yaml: str) -> dict[str, str]:
    """Keys (section.key) whose values differ in a config.yaml and in this text, each with a text that says how."""
    try:
        old, new = flat(yaml.safe_load(path.read_text())), flat(yaml.safe_load(config_yaml))
    except (yaml.YAMLError, AttributeError):
        raise ValueError(f"{path} is not a configuration") from None
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: f"{key} ({old.get(key)} there, {new.get(key)} now)" for key in differing}


def warn(text: str) -> None:
    tqdm.write(f"WARNING: {text}", file=sys.stderr)
