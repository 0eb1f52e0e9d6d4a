"""The table of tasks: what a reward of each is made of, and which metric it is judged by.

A new task is a row here and, in config.py, a user turn and weights of its name. An answer of a new kind also needs a
part of the reward (rewards.py) and a metric (metrics/tasks.py).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    title: str  # in reports
    parts: tuple[str, ...]  # of its reward, the format first
    main_metric: str  # what validation, floors and tables go by: one that metrics/tasks.py computes

    @property
    def has_options(self) -> bool:
        """Whether its records have `options` and the letter of the right one."""
        return "answer" in self.parts

    @property
    def has_segments(self) -> bool:
        """Whether its records have `segments`, the spans in which it happens."""
        return "iou" in self.parts


TASKS = {
    "tvg": Task("temporal grounding", ("format", "iou"), "miou"),
    "mcqa": Task("multiple choice", ("format", "answer"), "accuracy"),
    "gqa": Task("grounded QA", ("format", "answer", "iou"), "acc_gqa"),
}
