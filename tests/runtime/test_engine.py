"""Gradients of one process, what is not finite, and what a launcher may not ask for."""

import json
import logging
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPO, make_cfg
from small_runs import open_run, prepared, take_step

import config
from runtime.engine import Engine, check_batch


def test_backward_sums_over_micro_batches(tmp_path):
    """d/dw of (w . x) summed over x = (1, 0), (2, 0), (4, 1): 7 and 1, however they are grouped."""
    xs = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 1.0]])
    run = open_run(tmp_path / "a")
    for size in (1, 2, 3):
        model, _ = prepared(run)
        run.engine.backward(model, xs.split(size), lambda x, model=model: model(x).sum())
        assert model.weight.grad.tolist() == [[7.0, 1.0]] and model.bias.grad.tolist() == [3.0]


def test_step_clips_and_reports_the_norm_before(tmp_path):
    """Gradient (3, 4): norm 5; plain SGD at rate 1 moves by the gradient, or by a fifth of it when clipped to 1."""
    run = open_run(tmp_path / "a")
    for grad_clip, moved in ((10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])):
        model = torch.nn.Linear(2, 1, bias=False)
        before = model.weight.detach().clone()
        model, optimizer = run.engine.accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
        run.engine.backward(model, [torch.tensor([[3.0, 4.0]])], lambda x, model=model: model(x).sum())
        assert run.engine.step(model, optimizer, grad_clip) == pytest.approx(5.0)
        torch.testing.assert_close(before - model.weight, torch.tensor([moved]), atol=1e-5, rtol=0)
        assert model.weight.grad is None


def test_a_gradient_that_is_not_finite_moves_nothing(tmp_path, capsys):
    run = open_run(tmp_path / "a")
    model, optimizer = prepared(run)
    before = model.weight.detach().clone()
    run.engine.backward(model, [torch.tensor([[torch.inf, 1.0]])], lambda x: model(x).sum())
    assert not math.isfinite(run.engine.step(model, optimizer, 1.0))
    assert torch.equal(model.weight, before) and "this update is skipped" in capsys.readouterr().err
    assert math.isfinite(take_step(run, model, optimizer)) and not torch.equal(model.weight, before)


def test_sums_and_maximum_of_one_process_are_its_own(tmp_path):
    run = open_run(tmp_path / "a")
    assert run.engine.sums({"a": 0.1, "b": 2**53}) == {"a": 0.1, "b": 2.0**53}
    assert run.engine.maximum(-0.1) == -0.1


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_was_not_finite_is_named(tmp_path, where):
    """sqrt at 0 has a value and no finite gradient; a loss that is not finite may have a finite one."""
    run = open_run(tmp_path / "a")
    model, optimizer = prepared(run)
    before = model.weight.detach().clone()

    def loss_of(x):
        loss = model(x).square().sum()
        return loss + torch.inf if where == "loss" else (loss * 0).sqrt()

    run.engine.backward(model, [torch.rand(3, 2)], loss_of)
    assert not math.isfinite(run.engine.step(model, optimizer, 1.0)) and torch.equal(model.weight, before)
    named = ["rank 0: gradient of weight", "rank 0: gradient of bias"]
    assert run.engine.not_finite == (["rank 0: loss inf in pass 0"] if where == "loss" else []) + named


def test_updates_that_are_skipped_in_a_row_end_the_run(tmp_path):
    """Counted over a resume too; a finite one starts the count again."""
    run = open_run(tmp_path / "a")
    model, optimizer = prepared(run)
    rows = [{"id": "clip 7", "completions": ["é"], "advantages": [0.5]}]
    for i, bad in enumerate((1, 1, 0, 1, 1, 1, 1)):
        run.engine.backward(model, [torch.ones(1, 2)], lambda x, bad=bad: model(x).sum() * (torch.nan if bad else 1.0))
        run.engine.step(model, optimizer, 1.0)
        run.check_finite(i + 1, rows)
    run.log(7, {"grad_norm": math.nan, "loss": -math.inf, "lr": 0.1})
    assert run.rows("metrics.jsonl") == [{"step": 7, "lr": 0.1}]
    run.save_checkpoint(7, {})
    stricter = open_run(tmp_path / "a", resume=True, max_skipped=4)
    with pytest.raises(SystemExit, match="error: 4 updates in a row"):  # though none was taken since it resumed
        stricter.check_finite(8, rows)
    again = open_run(tmp_path / "a", resume=True)
    model, optimizer = prepared(again)
    again.engine.backward(model, [torch.ones(1, 2)], lambda x: model(x).sum() * torch.nan)
    again.engine.step(model, optimizer, 1.0)
    path = run.dir / "not_finite.json"
    with pytest.raises(
        SystemExit, match=rf"error: 5 updates in a row had no finite gradient .*; the batch is in {path}"
    ):
        again.check_finite(8, rows)
    content = json.loads(path.read_text())
    assert (content["step"], content["batch"]) == (8, rows) and content["not_finite"][0] == "rank 0: loss nan in pass 0"


def test_a_huge_gradient_in_the_first_update_ends_the_run(tmp_path):
    """Neither one that is not finite nor 0 is the first; a later one may be huge, but for the first after a resume."""

    def updates(run, *factors: float) -> None:
        model, optimizer = prepared(run)
        for factor in factors:  # gradient (1, 1, 1) times the factor
            run.engine.backward(model, [torch.ones(1, 2)], lambda x, factor=factor: model(x).sum() * factor)
            run.engine.step(model, optimizer, 1.0)
            run.check_finite(1, [])

    run = open_run(tmp_path / "a")
    updates(run, math.nan, 0.0, 5e3, 1e9)
    run.save_checkpoint(1, {})
    with pytest.raises(SystemExit, match=r"norm of 1.73e\+04, above run.max_first_grad_norm=10000 .*benchmarks/gpu.py"):
        updates(open_run(tmp_path / "a", resume=True), math.nan, 0.0, 1e4)
    updates(open_run(tmp_path / "a", resume=True, max_first_grad_norm=0.0), 1e4)


def test_accumulation_by_the_launcher_is_refused(tmp_path, monkeypatch):
    """Micro-batches are ours: accelerate would divide the gradient once more."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    with pytest.raises(ValueError, match="gradient_accumulation_steps in the accelerate file must be 1"):
        Engine(tmp_path, "none", timeout_s=60)


def test_a_good_run_warns_of_nothing(world, tmp_path):
    """It said on every checkpoint that a tensor was removed, and once that DeepSpeed runs on the CPU."""
    (tmp_path / "a.yaml").write_text(config.to_yaml(make_cfg(world, tmp_path, "run.steps=1")))
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "train_grpo.py", "--config", str(tmp_path / "a.yaml")],
        cwd=REPO,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()
    assert "shared tensor" not in done.stderr + done.stdout and "accelerator" not in done.stderr + done.stdout
    assert "WARNING" not in done.stderr + done.stdout


def test_other_warnings_are_heard(caplog):
    """Of the same loggers; what is filtered is the expected message alone."""
    end = "while saving. This should be OK, but ..."
    for name, text, heard in (
        ("accelerate.utils.other", f"Removed shared tensor {{'model.lm_head.weight'}} {end}", False),
        ("accelerate.utils.other", f"Removed shared tensor {{'model.lm_head.weight', 'model.layers.0.w'}} {end}", True),
        ("accelerate.utils.other", f"Removed shared tensor {{'model.layers.0.w'}} {end}", True),
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, ...", False),
        ("DeepSpeed", "something else", True),
    ):
        caplog.clear()
        logger = logging.getLogger(name)
        logger.addHandler(caplog.handler)
        logger.warning(text)
        logger.removeHandler(caplog.handler)
        assert bool(caplog.records) == heard, text


def test_an_indivisible_batch_is_an_error():
    with pytest.raises(ValueError, match=r"data.batch_size 7 does not divide by the 2 processes"):
        check_batch(7, 2)
    check_batch(6, 2)
