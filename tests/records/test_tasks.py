"""The table of tasks: every row has what the rest of the code looks up under its name."""

import pytest

from config import PromptConfig, RewardsConfig
from metrics.tasks import sample_values
from records.tasks import TASKS

ROW = {"id": "a", "answer": "B", "pred_choice": "B", "segments": [[3, 7]], "pred_segments": [[3, 7]]}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_a_prompt_weights_for_its_parts_alone_and_a_metric(name):
    task = TASKS[name]
    assert "{question}" in getattr(PromptConfig(), name)
    assert ("{options}" in getattr(PromptConfig(), name)) == task.has_options
    weights = vars(getattr(RewardsConfig(), name))
    assert {part for part, weight in weights.items() if weight} == set(task.parts) and task.parts[0] == "format"
    assert sample_values(ROW | {"task": name})[task.main_metric] == 1.0
