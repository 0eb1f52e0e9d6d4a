"""What a GRPO run says of a step: its row of metrics.jsonl, its rows of samples.jsonl, warnings, completions to read.

docs/metrics.md defines every metric.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from answers import parse_segments
from config import GrpoConfig, RunConfig
from groups import Batch, GroupRewards
from grpo import group_stats, is_nearly_equal
from prompts import video_means, video_sums
from records.record import to_record
from records.tasks import TASKS
from rollout import Rollout
from runtime.run import Run

CAUSES = {
    "no group had rewards that differ, so there was no gradient": "questions that are all too easy or too hard for "
    "the model (group/frac_all_good and frac_all_bad tell; select the data), answers that never parse (read "
    "samples.jsonl), too few completions, too low a temperature",
    "over 90% of the completions were cut off at rollout.max_new_tokens": "too small a limit for thinking, a prompt "
    "template that is not the model's own, a generation_config.json that does not name the model's EOS ids",
}
NEARLY_EQUAL = "most groups had rewards that differ by no more than group.tolerance, and so gave no gradient"
ONCE = {
    NEARLY_EQUAL: "answers that differ by hundredths of a second, rewards on a small scale. A lower group.tolerance "
    "makes a signal of such differences, and a large one: advantages are divided by the standard deviation"
}


@dataclass
class UpdateStats:
    """Sums over this process's tokens of all updates on one rollout, but for what says otherwise."""

    trained: int = 0  # groups of all processes that the updates ran on
    grad_norms: list[float] = field(default_factory=list)  # of each update, over all processes
    loss: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    tokens: float = 0.0
    clipped: float = 0.0  # of the last update: in the first one the ratio is 1
    gap: float = 0.0  # between the log-probs of policy and sampler, in the first update
    gap_max: float = 0.0

    passes: list[dict[str, Tensor]] = field(default_factory=list)  # sums of the present update's, on the device

    def end_update(self, grad_norm: float, num_own: int) -> None:
        """Take in the first `num_own` passes of an update; their numbers are fetched from the device at once."""
        own, self.passes = self.passes[:num_own], []
        self.grad_norms.append(grad_norm)
        self.clipped = 0.0
        values = [value.double() for sums in own for value in sums.values()]
        for row in torch.stack(values).view(num_own, -1).tolist() if own else ():
            sums = dict(zip(own[0], row, strict=True))
            self.gap_max = max(self.gap_max, sums.pop("gap_max"))
            for name, value in sums.items():
                setattr(self, name, getattr(self, name) + value)


def step_metrics(
    rollout: Rollout, rewards: GroupRewards, stats: UpdateStats, functions, cfg: GrpoConfig, run: Run
) -> dict[str, float]:
    """The step's metrics over all processes, from sums."""
    num_updates, scores = cfg.loss.updates_per_rollout, rewards.scores
    sums = {name: getattr(stats, name) for name in ("loss", "kl", "clipped", "entropy", "tokens", "gap")}
    sums |= {
        "num_completions": float(len(rewards.rewards)),
        "completion_tokens": float(rollout.mask_BT.sum()),
        "prompt_tokens": float(sum(len(prompt.ids) for prompt in rollout.prompts)),
        "truncated": float(rollout.truncated_B.sum()),
        "total": sum(reward.total for reward in rewards.rewards),
        **video_sums(rollout.prompts),
    }
    parts = list(dict.fromkeys(part for task in TASKS.values() for part in task.parts))
    parts += ["overlong", *(function.name for function in functions)]
    for part in parts:
        having = [reward.parts[part] for reward in rewards.rewards if part in reward.parts]
        sums |= {f"sum/{part}": sum(having), f"num/{part}": float(len(having))}
    s = run.engine.sums(sums)
    num = s["num_completions"]
    counts = group_stats(scores.earned, scores.right, cfg.group.tolerance)
    metrics = {
        "reward/total": s["total"] / num,
        **{f"reward/{part}": s[f"sum/{part}"] / s[f"num/{part}"] for part in parts if s[f"num/{part}"]},
        **{f"group/frac_{kind}": count / len(scores.total) for kind, count in counts.items()},
        "group/refills": float(rewards.num_refills),
        "group/trained": float(stats.trained),
        "length/mean": s["completion_tokens"] / num,
        "length/max": run.engine.maximum(rollout.mask_BT.sum(1).max().item()),
        "frac_truncated": s["truncated"] / num,
        "grad_norm": sum(norm / num_updates for norm in stats.grad_norms),
        "update/num_skipped": float(sum(not math.isfinite(norm) for norm in stats.grad_norms)),
        "tokens/prompt": s["prompt_tokens"],
        "tokens/completion": s["completion_tokens"],
        **video_means(s),
    }
    gap_max = run.engine.maximum(stats.gap_max)
    if s["tokens"]:  # the gap is the first update's
        metrics |= {"loss": s["loss"] / num_updates, "clip_frac": s["clipped"] * num_updates / s["tokens"]}
        metrics |= {"kl": s["kl"] / s["tokens"], "entropy": s["entropy"] / s["tokens"]}
        metrics |= {"logp_gap/mean": s["gap"] * num_updates / s["tokens"], "logp_gap/max": gap_max}
    return metrics


def frac_nearly_equal(rewards: GroupRewards, cfg: GrpoConfig) -> float:
    """Share of the step's groups that are dead though their rewards are not equal."""
    return is_nearly_equal(rewards.scores.earned, cfg.group.tolerance).float().mean().item()


class Alarm:
    """Says so, every `after` steps in a row, when a run learns nothing or never gets to the end of a sentence.

    That most groups are nearly equal is said once, after the first `after` such steps in a row. `state` is that of the
    run which is resumed, or None.
    """

    def __init__(self, after: int, state: list[int] | None = None):
        self.after, self.counts = after, dict.fromkeys(CAUSES | ONCE, 0) | dict(zip(CAUSES | ONCE, state or ()))

    @property
    def state(self) -> dict:
        return {"alarm": list(self.counts.values())}

    def __call__(self, metrics: dict[str, float], frac_near: float) -> list[str]:
        """The warnings due after this step, `frac_near` of whose groups are nearly equal."""
        signs = (metrics["group/frac_mixed"] == 0, metrics["frac_truncated"] > 0.9, frac_near > 0.5)
        due = []
        for sign, (name, cause) in zip(signs, (CAUSES | ONCE).items(), strict=True):
            was_told = name in ONCE and self.counts[name] >= self.after
            self.counts[name] = self.counts[name] + 1 if sign or was_told else 0
            if sign and not was_told and self.counts[name] % self.after == 0:
                due.append(f"WARNING: for {self.counts[name]} steps {name}. Usual causes: {cause}.")
        return due


def sample_rows(rollout: Rollout, rewards: GroupRewards, batch: Batch, step: int) -> list[dict]:
    """One row per video for samples.jsonl: the record, and its G completions with their rewards and advantages."""
    rows, size = [], rollout.group_size
    for p, (prompt, place) in enumerate(zip(rollout.prompts, rewards.places, strict=True)):
        own = slice(p * size, (p + 1) * size)
        row = {"step": step, "group": place, **to_record(prompt.sample), "completions": rollout.texts[own]}
        row["rewards"] = [reward.total for reward in rewards.rewards[own]]
        row["parts"] = [reward.parts for reward in rewards.rewards[own]]
        rows.append(row | {"advantages": batch.advantages_PG[p].tolist()})
    return rows


def print_step(
    step: int, metrics: dict[str, float], rows: list[dict], warnings: list[str], cfg: RunConfig, run: Run
) -> None:
    """Warnings; now and then two completions, and more of them for the tracker."""
    for warning in warnings:
        tqdm.write(warning, file=sys.stderr)
    if step % cfg.print_every == 0:
        shown = [f"  {r:.2f} {json.dumps(c)}" for c, r in list(zip(rows[0]["completions"], rows[0]["rewards"]))[:2]]
        tqdm.write("\n".join([f"step {step}: reward {metrics['reward/total']:.3f}; {rows[0]['id']}", *shown]))
        if cfg.tracker != "none":
            run.show(step, completions_text(rows), draw_timelines(rows))


NUM_ROWS = 8
MAX_TEXT = 4000  # characters of one text
TRUTH, PREDICTED = "#00875f", "#0072b2"  # told apart by colour-blind readers too


def draw_timelines(rows: Sequence[dict[str, Any]], num: int = NUM_ROWS) -> Figure | None:
    """Time lines of the first `num` rows of samples.jsonl that have a truth, the G predictions below; None of none."""
    rows = [row for row in rows if row.get("segments")][:num]
    if not rows:
        return None
    height = sum(len(row["completions"]) + 4 for row in rows)
    figure = Figure(figsize=(7, 0.14 * height + 0.3), layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows):
        lanes = [row["segments"], *(parse_segments(text, row.get("options")) for text in row["completions"])]
        for y, segments in enumerate(lanes):
            spans = [(start, end - start) for start, end in segments]
            axes.broken_barh(spans, (y - 0.4, 0.8), color=PREDICTED if y else TRUTH)
        for start, end in row["segments"]:
            axes.axvspan(start, end, color=TRUTH, alpha=0.15, linewidth=0)
        axes.set(xlim=(0, row["duration"]), ylim=(len(lanes) - 0.5, -0.5), yticks=[])
        axes.set_title(f"{row['id']}, step {row['step']}".replace("$", r"\$")[:100], fontsize=7, loc="left", pad=2)
        axes.tick_params(labelsize=6)
    axes.set_xlabel("seconds", fontsize=6)
    return figure


def completions_text(rows: Sequence[dict[str, Any]], num: int = 2) -> str:
    """Markdown of the first `num` rows: question and completions, all that data or a model wrote as indented code."""
    lines = []
    for row in rows[:num]:
        lines += [f"step {row['step']}", "", *_code(f"{row['id']}: {row['question']}")]
        for reward, completion in zip(row["rewards"], row["completions"]):
            lines += [f"reward {reward:.2f}", "", *_code(completion)]
    return "\n".join(lines)


def _code(text: str) -> list[str]:
    return [*("    " + line for line in text[:MAX_TEXT].splitlines() or [""]), ""]
