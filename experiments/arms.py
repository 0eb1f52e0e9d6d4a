"""The arms of the ablations: which configuration, from which model, on which data.

An arm's folder is <root>/<arm>/seed_<n>/. What an arm takes from the results of others (a choice of data, a number of
steps) is an override that is made when those are finished. experiments/ablations.py runs them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import config
from experiments.jobs import REPO
from metrics.rows import read_rows
from records.files import read_samples
from records.record import to_record
from rewards import format_answer

THINK = "Think first. "  # the cue of think.yaml and answer_think.yaml, which `both_modes` teaches


def folder(root: Path, arm: str, seed: int, run: str = "run") -> Path:
    return root / arm / f"seed_{seed}" / run


def kept(root: Path, seed: int, arm: str = "select") -> list[str]:
    """The records that a selection kept."""
    return [f"data.train={folder(root, arm, seed) / 'selected.jsonl'}"]


def same_size(root: Path, seed: int) -> list[str]:
    """A random choice among the same items, with the same scores at hand."""
    select = folder(root, "select", seed)
    num = len(read_rows(select / "selected.jsonl"))
    return [f"select.budget={num}", f"select.seed={seed}", f"select.scores={select / 'scores.jsonl'}"]


def rejected(root: Path, seed: int) -> list[str]:
    """The records that the selection left out."""
    select = folder(root, "select", seed)
    source = config.load(config.SelectConfig, [str(select / "config.yaml")]).data.train
    ids = {row["id"] for row in read_rows(select / "rejected.jsonl")}
    records = [to_record(sample) for sample in read_samples(str(REPO / source)) if sample.id in ids]
    return [f"data.train={write_records(select.with_name('rejected.jsonl'), records)}"]


def same_tokens(root: Path, seed: int) -> list[str]:
    """As many steps as the tokens last that training on all samples: the selection's own are spent first.

    The steps are those of the arm `selected` again: of a constant learning rate, the first ones of a longer run.
    """
    budget = sum(tokens(root, "grpo", seed)) - selection_tokens(root, seed)
    num = sum(total <= budget for total in accumulate(tokens(root, "selected", seed)))
    return [*kept(root, seed), f"run.steps={max(1, num)}"]


def both_modes(root: Path, seed: int) -> list[str]:
    """The base's records, and each again as one to think about: what it is, and about when, before the answer."""
    cfg = config.load(config.SftConfig, [str(folder(root, "base", seed) / "config.yaml")])
    records = []
    for sample in read_samples(str(REPO / cfg.data.train)):
        thought = sample.question.removeprefix("When is the ").removesuffix(" visible?")
        if sample.options:
            thought = sample.options["ABCD".index(sample.answer)]
        if sample.segments:
            thought += f" at {sum(sample.segments[0]) // 2:.0f}"
        response = f"<think>{thought}</think>{format_answer(sample)}"
        thinking = {"id": f"{sample.id}/think", "question": THINK + sample.question, "response": response}
        records += [to_record(sample), to_record(sample) | thinking]
    return [f"data.train={write_records(folder(root, 'both', seed, 'train.jsonl'), records)}"]


def write_records(path: Path, records: Sequence[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tokens(root: Path, arm: str, seed: int) -> list[float]:
    """Sampled tokens of each step."""
    return [row["tokens/completion"] for row in read_rows(folder(root, arm, seed) / "metrics.jsonl")]


def selection_tokens(root: Path, seed: int) -> int:
    return json.loads((folder(root, "select", seed) / "summary.json").read_text())["responses"]["sampled_tokens"]


@dataclass(frozen=True)
class Arm:
    """One run, and how its final model is tested."""

    config: str  # the last file of its chain, in configs/ablations
    start: str = "base"  # the arm whose final model it starts from; "": the config's model
    needs: tuple[str, ...] = ()  # further arms it is made from
    extra: Callable[[Path, int], list[str]] | None = None  # overrides, of root and seed, when those are finished
    answers: tuple[str, ...] = ("plain",)  # of ANSWERS; none: not tested
    seconds: float = 110.0  # expected of the run, on one thread


BOTH = ("plain", "think")
ARMS = {
    "base": Arm("../tiny_base.yaml", start="", seconds=400),
    "grpo": Arm("grpo.yaml"),
    "select": Arm("select.yaml", answers=(), seconds=25),
    "select_random": Arm("select_random.yaml", needs=("select",), extra=same_size, answers=(), seconds=7),
    "selected": Arm("grpo.yaml", needs=("select",), extra=kept),
    "random": Arm("grpo.yaml", needs=("select_random",), extra=partial(kept, arm="select_random")),
    "rejected": Arm("grpo.yaml", needs=("select",), extra=rejected),
    "selected_tokens": Arm("grpo.yaml", needs=("grpo", "selected"), extra=same_tokens, seconds=70),
    "both": Arm("both.yaml", extra=both_modes, answers=BOTH, seconds=160),
    "plain": Arm("grpo.yaml", start="both", answers=BOTH),
    "think": Arm("think.yaml", start="both", answers=BOTH, seconds=155),
    "gqa": Arm("gqa.yaml", seconds=115),
    "gqa_answer": Arm("gqa_answer.yaml", seconds=95),
    "gqa_iou": Arm("gqa_iou.yaml", seconds=105),
    "gqa_format": Arm("gqa_format.yaml", seconds=60),
    "threshold": Arm("threshold.yaml", seconds=75),
    "sft_1e-4": Arm("sft_1e-4.yaml", seconds=40),
    "sft_3e-4": Arm("sft_3e-4.yaml", seconds=40),
    "sft": Arm("sft.yaml", seconds=40),
    "group_2": Arm("group_2.yaml", seconds=180),
    "group_4": Arm("group_4.yaml", seconds=110),
    "group_16": Arm("group_16.yaml", seconds=60),
    "beta_0.01": Arm("beta_0.01.yaml", seconds=95),
    "beta_0.04": Arm("beta_0.04.yaml", seconds=95),
}
