"""Reward functions of the user's own, with TRL's signature, added to the built-in reward.

    python train_grpo.py --config configs/tiny.yaml "rewards.functions={my_rewards.py:brevity: 0.1}"

Not a registry: a function is a path and a name. One that fails is one error, `RewardFunctionError`.
"""

import asyncio
import importlib.machinery
import importlib.util
import inspect
import math
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from rewards import Reward, score

COLUMNS = (
    "id", "task", "video", "question", "duration", "options", "answer", "segments", "clip", "fps", "type", "source",
    "response",
)  # fmt: skip
_TAKEN = {"format", "answer", "iou", "total", "overlong"}  # names of metrics `reward/<part>` that are not for functions
TRACEBACK = "reward_error.txt"  # file of the run folder
TOOK_TEXT_FOR_MESSAGES = ("string indices must be", "'str' object has no attribute")  # in the error of a function
_ASYNC = asyncio.Runner()  # one event loop for all steps: a client that a function keeps stays usable


@dataclass(frozen=True)
class RewardFunction:
    """A function of `rewards.functions`: adds `weight` x its value to the total; the value is the part `name`."""

    name: str
    call: Callable[..., Any]
    weight: float


class RewardFunctionError(ValueError):
    """A reward function that raised, or returned what is no reward: names the function, the step and the sample."""


@contextmanager
def failures_in(folder: Path) -> Iterator[None]:
    """A function that fails within the block ends the program with one line; its traceback is in a file of `folder`."""
    try:
        yield
    except RewardFunctionError as error:
        where = ""
        if error.__cause__ is not None:
            text = "".join(traceback.format_exception(error.__cause__))
            (folder / TRACEBACK).write_text(text, encoding="utf-8")
            where = f"; the traceback is in {folder / TRACEBACK}"
        raise SystemExit(f"error: {error}{where}") from None


def load_functions(functions: dict[str, float]) -> list[RewardFunction]:
    """Import the reward functions of {"path/to/file.py:function": weight}, each file once.

    Paths count from the working directory. A part is named after its function, and by the whole key where another
    function or a metric has that name. Raises ValueError naming file and function, in one line.
    """
    names = [key.rpartition(":")[2] for key in functions]
    modules: dict[Path, ModuleType] = {}
    loaded = []
    for (key, weight), name in zip(functions.items(), names):
        path, colon, _ = key.rpartition(":")
        if not colon:
            raise ValueError(f"rewards.functions: {key!r} is not of the form path/to/file.py:function")
        path = Path(path).resolve()
        if not path.is_file():
            raise ValueError(f"rewards.functions: {key}: file not found")
        if path not in modules:
            try:
                modules[path] = _import_file(path)
            except (Exception, SystemExit) as error:  # whatever the user's file raises
                raise ValueError(f"rewards.functions: {key}: the file does not import: {_one_line(error)}") from error
        function = getattr(modules[path], name, None)
        if not callable(function):
            raise ValueError(f"rewards.functions: {key}: the file has no function {name!r}")
        unique = names.count(name) == 1 and name not in _TAKEN
        loaded.append(RewardFunction(name if unique else key, function, float(weight)))
    return loaded


def score_all(
    texts: Sequence[str],
    samples: Sequence[Any],
    cfg: Any,
    functions: Sequence[RewardFunction],
    completion_ids: Sequence[Sequence[int]] | None = None,
    step: int = 0,
) -> list[Reward]:
    """`score` of B responses, plus weight x value of each reward function, called once for the whole batch.

    As TRL calls it: f(prompts=, completions=, completion_ids=, trainer_state=, **columns), all but the state lists of
    B; columns are the record's fields (`COLUMNS`) and the keys of its `extra`, None where a row has none. Prompts (the
    questions) and completions are strings, or with `rewards.conversational` lists of one message; the state has
    `global_step` and `max_steps`. It returns B numbers, as a coroutine if it likes; None adds nothing and is no part.
    Raises RewardFunctionError when it raises or returns anything else.
    """
    rewards = [score(text, sample, cfg) for text, sample in zip(texts, samples, strict=True)]
    for function in functions if rewards else ():
        keywords = _keywords(texts, samples, cfg, completion_ids, step)
        values = _values(function, keywords, samples, step, cfg.rewards.conversational)
        for i, value in enumerate(values):
            if value is not None:
                total = rewards[i].total + function.weight * value
                rewards[i] = Reward(total, rewards[i].parts | {function.name: value})
    return rewards


def _keywords(texts: Sequence[str], samples: Sequence[Any], cfg: Any, completion_ids: Any, step: int) -> dict[str, Any]:
    """What a reward function is called with, in new lists for each: one that changes its own disturbs no other."""
    prompts, completions = [sample.question for sample in samples], list(texts)
    if cfg.rewards.conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    ids = None if completion_ids is None else [list(row) for row in completion_ids]
    state = SimpleNamespace(global_step=step, max_steps=cfg.run.steps)
    named = {"prompts": prompts, "completions": completions, "completion_ids": ids, "trainer_state": state}
    extras = [sample.extra or {} for sample in samples]
    extra = {key: [row.get(key) for row in extras] for key in {key: None for row in extras for key in row}}
    return extra | {name: [getattr(sample, name) for sample in samples] for name in COLUMNS} | named


def _values(
    function: RewardFunction, keywords: dict, samples: Sequence[Any], step: int, conversational: bool
) -> list[float | None]:
    """What the function returns for B samples, checked; raises RewardFunctionError."""
    where, ids = f"reward function {function.name}, step {step + 1}", [sample.id for sample in samples]
    batch = f"the batch of {len(ids)} completions that begins with sample {ids[0]!r}"
    try:
        values = function.call(**keywords)
        if inspect.iscoroutine(values):
            values = _ASYNC.run(values)
    except Exception as error:  # whatever the user's function raises
        told = f"{where}: {_one_line(error)}, on {batch}"
        if not conversational and any(sign in told for sign in TOOK_TEXT_FOR_MESSAGES):
            told += "; a function that reads message lists (completion[0]['content']) needs rewards.conversational=true"
        raise RewardFunctionError(told) from error
    is_vector = isinstance(values, Sequence) or getattr(values, "ndim", None) == 1  # 1-d: an array or a tensor
    if isinstance(values, str | bytes) or not is_vector:
        raise RewardFunctionError(f"{where}: returned {type(values).__name__}, not a list, for {batch}")
    if len(values) != len(ids):
        raise RewardFunctionError(f"{where}: returned {len(values)} values for {batch}")
    return [_value(value, f"{where}, sample {sample_id!r}") for value, sample_id in zip(values, ids)]


def _value(value: Any, where: str) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: a tensor of several numbers
        raise RewardFunctionError(f"{where}: {type(value).__name__} is not a number") from error
    if not math.isfinite(number):
        raise RewardFunctionError(f"{where}: returned {str(value)[:40]!r}, not a finite number")
    return number


def _import_file(path: Path) -> ModuleType:
    name = f"reward_functions_{zlib.crc32(bytes(path)):08x}"
    spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, str(path)))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses and pickle look it up there
    spec.loader.exec_module(module)
    return module


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
