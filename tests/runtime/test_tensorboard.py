"""What TensorBoard shows of a run: scalars, time lines of samples, completions, the configuration."""

import errno

import pytest
import yaml
from conftest import make_cfg, read_jsonl
from run_folders import sample_row
from small_runs import YAML
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_grpo
from config import RunConfig
from runtime.run import Run
from step_log import completions_text, draw_timelines


def test_tensorboard_has_scalars_time_lines_completions_and_the_configuration(world, tmp_path):
    """Read back from the event files: the numbers of metrics.jsonl, and at run.print_every what there is to look at."""
    cfg = make_cfg(world, tmp_path, "run.tracker=tensorboard", "run.print_every=2", "run.steps=3")
    logs = train_grpo.train(cfg).dir / "logs"
    found = EventAccumulator(str(logs), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    rows = read_jsonl(logs.parent / "metrics.jsonl")
    assert set(found.Tags()["scalars"]) == {name for row in rows for name in row} - {"step"}
    for name in ("reward/total", "length/mean", "time/step"):
        events = [(event.step, event.value) for event in found.Scalars(name)]
        assert events == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    (image,) = found.Images("samples/timelines")
    assert image.step == 2 and image.width > 600 and image.encoded_image_string.startswith(b"\x89PNG")
    (text,) = found.Tensors("samples/completions/text_summary")
    (sample,) = [row for row in read_jsonl(logs.parent / "samples.jsonl") if (row["step"], row["group"]) == (2, 0)]
    shown = text.tensor_proto.string_val[0].decode()
    assert text.step == 2 and sample["question"] in shown and f"reward {sample['rewards'][0]:.2f}" in shown
    (settings,) = logs.glob("*/hparams.yml")
    found = yaml.safe_load(settings.read_text())
    assert found["optim.lr"] == cfg.optim.lr and found["run.steps"] == 3 and found["model.path"] == cfg.model.path


def test_a_figure_that_cannot_be_written_ends_the_run_like_a_row(tmp_path, monkeypatch):
    run = Run(RunConfig(dir=str(tmp_path / "a"), steps=4), YAML, False)
    (tracker,) = run.engine.accelerator.trackers

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tracker.tracker, "add_figure", full)
    run.show(1, "a text", figure=object())
    with pytest.raises(SystemExit, match="No space left on device; --resume goes on from step 0"):
        run.save_due(1)


def test_time_lines_are_where_the_segments_are():
    rows = [
        sample_row(id="cost $5$"),
        sample_row(task="mcqa", segments=None),
        *(sample_row(id=str(i)) for i in range(20)),
    ]
    figure = draw_timelines(rows, 8)
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == [r"cost \$5\$, step 1", "0, step 1"] and len(
        figure.axes
    ) == 8
    bars = [collection.get_paths()[0].get_extents() for collection in figure.axes[0].collections]
    assert [(bar.x0, bar.x1) for bar in bars] == [(5, 15), (5, 15), (0, 4)] and figure.axes[0].get_xlim() == (0, 20)
    figure.canvas.draw()
    assert draw_timelines([sample_row(segments=None)]) is None


def test_completions_are_code_in_markdown():
    rows = [sample_row(completions=["# head\n</code><b>", ""]), sample_row(), sample_row()]
    lines = completions_text(rows).splitlines()
    written_by_us = [line for line in lines if line and not line.startswith("    ")]
    assert written_by_us == ["step 1", "reward 1.00", "reward 0.50"] * 2
    assert "    # head" in lines and "    </code><b>" in lines and "    a: When?" in lines
