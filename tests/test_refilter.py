"""Training on what groups have shown: a curriculum, and dropping the samples whose groups were dead."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO, make_cfg, metrics_of, read_jsonl, weights_of, write_data

import config
import train_grpo


def test_a_curriculum_needs_statistics(world, tmp_path):
    with pytest.raises(SystemExit) as raised:
        train_grpo.train(make_cfg(world, tmp_path, "data.order=curriculum"))
    assert str(raised.value).startswith("error: data.order=curriculum: record 'tiny/tvg_train/0' has no number extra.")


def refilter_cfg(world, taught, folder, *overrides):
    """16 clips, one of them broken, four a step; dead groups are dropped after every epoch, first before step 5."""
    train = folder / "data" / "data.jsonl"
    if not train.exists():
        write_data(world, folder / "data", 16, {4: b""})
    data = (f"data.train={train}", "data.batch_size=4", "data.refilter_every=1", "data.max_bad_share=0.5")
    dead = ("group.tolerance=0.15", "group.max_refills=1", "loss.beta=0.1")
    return make_cfg(world, folder, *taught, *data, *dead, *overrides)


def test_training_with_refilter_resumes_bit_for_bit(world, taught, tmp_path):
    """Stopped in the middle of an epoch, and before the very step that drops."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    save = ("run.save_every=1", "run.keep_checkpoints=1")
    train_grpo.train(refilter_cfg(world, taught, tmp_path, f"run.dir={whole}", *save, "run.steps=7"))
    for steps in (2, 4, 7):
        cfg = refilter_cfg(world, taught, tmp_path, f"run.dir={parts}", *save, f"run.steps={steps}")
        train_grpo.train(cfg, resume=steps > 2)
    assert metrics_of(parts) == metrics_of(whole)
    rows = read_jsonl(whole / "samples.jsonl")
    assert read_jsonl(parts / "samples.jsonl") == rows
    state = [(run / "checkpoints" / "step_000007" / "run.json").read_bytes() for run in (parts, whole)]
    ours, theirs = weights_of(parts), weights_of(whole)
    assert state[0] == state[1] and all(torch.equal(ours[name], theirs[name]) for name in ours)

    alive = {row["id"]: bool(np.std(row["rewards"], ddof=1) > 0.15) for row in rows if row["step"] <= 4}  # the last
    dead, active = {name for name in alive if not alive[name]}, [row["data/num_active"] for row in metrics_of(whole)]
    assert 0 < len(dead) <= 8 and active[:5] == [16, 16, 16, 16, 16 - len(dead)]
    assert not {row["id"] for row in rows if row["step"] > 4} & dead
    assert set(json.loads(state[0])["state"]["order"]["dropped"]) >= dead


@pytest.mark.slow
def test_two_processes_refilter_as_one(world, taught, tmp_path):
    for processes in (1, 2):
        cfg = refilter_cfg(world, taught, tmp_path, f"run.dir={tmp_path}/run{processes}", "run.steps=6")
        path = tmp_path / f"{processes}.yaml"
        path.write_text(config.to_yaml(cfg))
        launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu2.yaml"]
        command = [sys.executable, *(launcher if processes == 2 else []), "train_grpo.py", "--config", str(path)]
        result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
    rows = [read_jsonl(tmp_path / f"run{n}" / "samples.jsonl") for n in (1, 2)]
    assert [(row["step"], row["id"], row["rewards"]) for row in rows[0]] == [
        (row["step"], row["id"], row["rewards"]) for row in rows[1]
    ]
    active = [[row["data/num_active"] for row in metrics_of(tmp_path / f"run{n}")] for n in (1, 2)]
    assert active[0] == active[1] and active[0][-1] < 16


def test_supervised_tuning_has_no_groups_to_refilter_by():
    with pytest.raises(ValueError, match=r"data\.refilter_every must be 0"):
        config.SftConfig(data=config.DataConfig(refilter_every=1))
