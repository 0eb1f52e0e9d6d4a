"""The training script under `accelerate launch`, as a user types it."""

import json
import subprocess
import sys

import pytest
from conftest import REPO, make_cfg

import config

pytestmark = pytest.mark.slow


def launch(processes: int, cfg, tmp_path) -> list[dict]:
    """Metrics of a short run in so many processes, without what depends on the machine."""
    path = tmp_path / f"{processes}.yaml"
    path.write_text(config.to_yaml(cfg).replace("/run", f"/run{processes}"))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu2.yaml"]
    command = [sys.executable, *(launcher if processes == 2 else []), "train_grpo.py", "--config", str(path)]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / f"run{processes}" / "metrics.jsonl").read_text().splitlines()]
    machine = ("time/", "memory/", "tokens_per_s")
    return [{key: value for key, value in row.items() if not key.startswith(machine)} for row in rows]


def test_two_launched_processes_train_as_one(world, tmp_path):
    cfg = make_cfg(
        world, tmp_path, "loss.beta=0.1", "group.skip_dead=false", "data.micro_batch_size=1", "optim.lr=1e-4"
    )
    one, two = launch(1, cfg, tmp_path), launch(2, cfg, tmp_path)
    samples = [(tmp_path / f"run{n}" / "samples.jsonl").read_text() for n in (1, 2)]
    assert samples[0] == samples[1]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
