"""A reward function in TRL's form: 1 from an IoU of 0.5 on, else 0; see threshold.yaml."""

from answers import parse_answer, parse_segments
from rewards import temporal_iou

THRESHOLD = 0.5


def threshold_iou(completions, segments, duration, **columns) -> list[float | None]:
    """As the part `iou`, which it stands in for: spans end with the video, and only an answer block alone pays."""
    return [
        None if truth is None else _value(text, truth, end) for text, truth, end in zip(completions, segments, duration)
    ]


def _value(text: str, truth, end_s: float) -> float:
    if text.strip() != f"<answer>{parse_answer(text)}</answer>":
        return 0.0
    spans = [(min(start, end_s), min(end, end_s)) for start, end in parse_segments(text)]
    return float(temporal_iou(spans, truth) >= THRESHOLD)
