"""Command lines of the programs that import torch, and the one line that a user's error ends a program with.

Such a program reads its arguments twice. The first time is before its other imports, which take seconds, so that
`--help` and a misspelt key take none. The second time is in its `main`.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

from config import ANSWER_MODES, UNANSWERED_MODES, ConfigT, EvalRunConfig, check_numbers, load, positive
from records.files import check_floor

REPO = Path(__file__).resolve().parents[1]
CONFIGURED = argparse.ArgumentParser(add_help=False)  # what every program with a configuration takes
CONFIGURED.add_argument("--config", nargs="+", default=[], action="extend", metavar="FILE", help="YAML; later win")
CONFIGURED.add_argument("--resume", action="store_true", help="go on with a run.dir that was stopped")
CONFIGURED.add_argument("overrides", nargs="*", metavar="section.key=value")


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user can mend (a config key, a path, a record) ends the program with one line, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


@dataclass(frozen=True)
class PlanConfig:
    """What `--plan` assumes. Not part of a run's configuration, but given like it: `plan.tflops=300`."""

    engine: str = ""  # file of `accelerate launch`; "" means what it has set, or one process
    memory_gib: float = positive(80.0)  # of a device
    tflops: float = positive(400.0)  # TFLOP/s that a device reaches in matrix products, not its peak
    bandwidth: float = positive(2.0)  # TB/s that it reaches in reading and writing memory
    capability: float = positive(8.0)  # CUDA compute capability; before 8.0 there is no fused attention in bfloat16
    launch_us: float = positive(10.0)  # microseconds that any operation takes at least
    completion_tokens: int = 0  # mean length of a completion, for the update's time; 0 means the longest
    longest_tokens: int = 0  # longest completion of a step, for decoding's time; 0 means rollout.max_new_tokens

    def __post_init__(self):
        check_numbers(self, "plan.")
        if self.capability >= 20:
            raise ValueError(f"plan.capability must be below 20, as in 8.6 for the card's 8.6, got {self.capability}")
        if 0 < self.longest_tokens < self.completion_tokens:
            mean = f"plan.completion_tokens={self.completion_tokens}"
            raise ValueError(f"plan.longest_tokens={self.longest_tokens} is below the mean, {mean}")


@dataclass(frozen=True)
class _Planned:
    plan: PlanConfig = field(default_factory=PlanConfig)


def _files_and_overrides(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """`--config a.yaml b=1` takes both words."""
    words = args.config + args.overrides
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


@user_errors()
def from_command_line(
    config_class: type[ConfigT], argv: list[str] | None, doc: str, default: str
) -> tuple[ConfigT, bool, PlanConfig | None]:
    """The config, `resume`, and what --plan assumes or None without it.

    Without --config the file `default` of this repository is read.
    """
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=how, parents=[CONFIGURED])
    parser.set_defaults(plan=None)
    if "optim" in get_type_hints(config_class):  # it trains
        text = "print tokens, memory and time instead of training; FILE is that of `accelerate launch`"
        parser.add_argument("--plan", nargs="?", const="", metavar="FILE", help=text)
    args = parser.parse_intermixed_args(argv)
    files, overrides = _files_and_overrides(args)
    if args.plan:
        overrides.append(args.plan if "=" in args.plan else f"plan.engine={args.plan}")
    assumed = [text for text in overrides if text.startswith("plan.")]
    if assumed and args.plan is None:
        raise ValueError(f"override {assumed[0]!r} is for --plan")
    planned = None if args.plan is None else load(_Planned, [], assumed).plan
    if planned and planned.engine and not Path(planned.engine).is_file():
        raise FileNotFoundError(f"accelerate configuration {planned.engine} not found")
    overrides = [text for text in overrides if text not in assumed]
    return load(config_class, files or [str(REPO / default)], overrides), args.resume, planned


@user_errors()
def of_eval(argv: list[str] | None, doc: str) -> argparse.Namespace:
    """Parse the arguments of eval.py: `command` is run, score or compare, and `cfg` is the configuration of run."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command", metavar="{run,score,compare}")
    commands.add_parser("run", help="answers of a model, and their metrics", parents=[CONFIGURED])
    command = commands.add_parser("score", help="metrics from stored predictions, without a model")
    command.add_argument("predictions", help="predictions.jsonl")
    command.add_argument("--out", required=True, help="metrics.json to write")
    command.add_argument("--data", help="records with the truth; those without a prediction count too")
    command.add_argument("--answer", choices=ANSWER_MODES, help="what counts as the answer; default: as in the run")
    command.add_argument("--unanswered", choices=UNANSWERED_MODES, help="what becomes of no answer; default: as there")
    command = commands.add_parser("compare", help="results side by side, differences with paired intervals")
    command.add_argument("results", nargs="+", metavar="metrics.json", help="the first one is subtracted")
    command.add_argument("--allow", action="append", default=[], metavar="KEY", help="may differ; a section for all")
    args, rest = parser.parse_known_args(argv)
    if args.command != "run" or any(word.startswith("-") for word in rest):
        return parser.parse_args(argv)  # which names what it does not know
    args.overrides += rest  # overrides on both sides of an option
    args.cfg = load(EvalRunConfig, *_files_and_overrides(args))
    is_finished = (Path(args.cfg.run.dir) / "metrics.json").is_file()  # then its metrics are only printed
    if args.cfg.data.floor and not is_finished:
        check_floor(args.cfg.data.floor)
    return args


def of_merge(argv: list[str] | None, doc: str) -> argparse.Namespace:
    """Parse the arguments of model/folder.py: `adapter` and `out`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_subparsers(required=True).add_parser("merge", help="write the full model of an adapter folder")
    command.add_argument("adapter", help="folder with an adapter_config.json")
    command.add_argument("out", help="folder to write")
    return parser.parse_args(argv)


def of_gpu(argv: list[str] | None, doc: str) -> argparse.Namespace:
    """Parse the arguments of benchmarks/gpu.py: `shrink` and `out`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", action="store_true", help="small shapes, for a CPU or to try it out")
    parser.add_argument("--out", default="runs/gpu", metavar="DIR", help="folder that receives gpu.json")
    return parser.parse_args(argv)
