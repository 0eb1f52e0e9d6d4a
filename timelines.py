"""What TensorBoard shows of a step's samples: time lines of some videos, and completions to read.

No training and no page (report.py): rows of samples.jsonl in, a matplotlib figure or a text out. Nothing to run.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from rewards import parse_segments

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
