"""Records, answers and configurations for the tests of rewards."""

from functools import cache

from config import GrpoConfig, load
from records.record import Sample

OPTIONS = ["a dog", "a cat", "two birds", "nobody"]
THINK = "<think>I look.</think>"
OVERLAPS = ["iou", "timestamp_iou", "distance_iou"]


@cache
def config(think: bool = True, gate: bool = True, overlap: str = "iou") -> GrpoConfig:
    """The recipe's weights: grounding 0.5 / 0.5, multiple choice 0.5 / 0.5, grounded QA 0.2 / 0.4 / 0.4."""
    chosen = {"prompt.think": think, "rewards.format_gates_task": gate, "rewards.overlap": overlap}
    return load(GrpoConfig, [], [f"{key}={str(value).lower()}" for key, value in chosen.items()])


def sample(task: str, **fields) -> Sample:
    """A record whose true span is 20% of its video: 4 to 8 s of 20 s; option B is right."""
    row = {"id": "a", "video": "v.mp4", "question": "When?", "options": OPTIONS, "answer": "B"}
    row |= {"segments": [(4.0, 8.0)], "duration": 20.0}
    return Sample(task=task, **(row | fields))


def thought(answer: str) -> str:
    return f"{THINK}<answer>{answer}</answer>"
