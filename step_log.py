"""What a GRPO run says of a step: its row of metrics.jsonl, its rows of samples.jsonl, warnings, completions to read.

README.md defines every metric.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from answers import parse_segments
from config import GrpoConfig, RunConfig
from groups import Groups, choose_groups
from grpo import group_stats, is_nearly_equal
from prompts import video_means, video_sums
from records.record import to_record
from rewards import PARTS
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


def step_metrics(groups: Groups, stats: dict[str, float], functions, cfg: GrpoConfig, run: Run) -> dict[str, float]:
    """The step's metrics over all processes, from sums."""
    rollout, num_updates = groups.rollout, cfg.loss.updates_per_rollout
    sums = {name: stats[name] for name in ("loss", "kl", "clipped", "entropy", "tokens", "gap")}
    sums |= {
        "num_completions": float(len(groups.rewards)),
        "completion_tokens": float(rollout.mask_BT.sum()),
        "prompt_tokens": float(sum(len(prompt.ids) for prompt in rollout.prompts)),
        "truncated": float(rollout.truncated_B.sum()),
        "total": sum(reward.total for reward in groups.rewards),
        **video_sums(rollout.prompts),
    }
    parts = [*PARTS["gqa"], "overlong", *(function.name for function in functions)]
    for part in parts:
        having = [reward.parts[part] for reward in groups.rewards if part in reward.parts]
        sums |= {f"sum/{part}": sum(having), f"num/{part}": float(len(having))}
    s = run.engine.sums(sums)
    num = s["num_completions"]
    counts = group_stats(groups.earned_NG, groups.right_NG, cfg.group.tolerance)
    metrics = {
        "reward/total": s["total"] / num,
        **{f"reward/{part}": s[f"sum/{part}"] / s[f"num/{part}"] for part in parts if s[f"num/{part}"]},
        **{f"group/frac_{kind}": count / len(groups.totals_NG) for kind, count in counts.items()},
        "group/refills": float(groups.num_refills),
        "group/trained": stats["trained"],
        "length/mean": s["completion_tokens"] / num,
        "length/max": run.engine.maximum(rollout.mask_BT.sum(1).max().item()),
        "frac_truncated": s["truncated"] / num,
        "grad_norm": stats["grad_norm"],
        "update/num_skipped": stats["num_skipped"],
        "tokens/prompt": s["prompt_tokens"],
        "tokens/completion": s["completion_tokens"],
        **video_means(s),
    }
    gap_max = run.engine.maximum(stats["gap_max"])
    if s["tokens"]:  # the gap is the first update's
        metrics |= {"loss": s["loss"] / num_updates, "clip_frac": s["clipped"] * num_updates / s["tokens"]}
        metrics |= {"kl": s["kl"] / s["tokens"], "entropy": s["entropy"] / s["tokens"]}
        metrics |= {
            "logp_gap/mean": s["gap"] * num_updates / s["tokens"],
            "logp_gap/max": gap_max,
        }  # of the first update
    return metrics


def frac_nearly_equal(groups: Groups, cfg: GrpoConfig) -> float:
    """Share of the step's groups that are dead though their rewards are not equal."""
    return is_nearly_equal(groups.earned_NG, cfg.group.tolerance).float().mean().item()


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


def sample_rows(groups: Groups, step: int, cfg: GrpoConfig) -> list[dict]:
    """One row per video for samples.jsonl: the record, and its G completions with their rewards and advantages."""
    rollout, rewards, size = groups.rollout, groups.rewards, groups.rollout.group_size
    advantages_NG = choose_groups(groups, cfg)[2]
    return [
        {
            "step": step,
            "group": groups.own[p],
            **to_record(prompt.sample),
            "completions": rollout.texts[p * size : (p + 1) * size],
            "rewards": [reward.total for reward in rewards[p * size : (p + 1) * size]],
            "parts": [reward.parts for reward in rewards[p * size : (p + 1) * size]],
            "advantages": advantages_NG[groups.own[p]].tolist(),
        }
        for p, prompt in enumerate(rollout.prompts)
    ]


def batch_rows(groups: Groups, cfg: GrpoConfig, step: int) -> list[dict]:
    """The rows of samples.jsonl, and whether the update ran on them."""
    trained = choose_groups(groups, cfg)[1]
    return [row | {"trained": row["group"] in trained} for row in sample_rows(groups, step, cfg)]


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
