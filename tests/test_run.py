"""The run folder: never overwritten, resumed only under its own configuration, cut back to its newest checkpoint."""

import json
import math
import platform
import time

import pytest
import torch

from checkpoint import cut_back, newest_checkpoint
from engine import check_batch
from run import (
    Clock,
    Run,
    environment,
    user_errors,
)

YAML = "run:\n  seed: 0\n  steps: 4\nloss:\n  beta: 0.1\n"


def open_run(path, text: str = YAML, resume: bool = False, keep: int = 2) -> Run:
    return Run(str(path), text, 0, "none", resume, keep)


def prepared(run: Run) -> tuple[torch.nn.Module, object]:
    """A linear model of 2 inputs and its optimizer, wrapped as in training."""
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0]]))
        model.bias.zero_()
    return run.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1), grad_clip=1e9)


def take_step(run: Run, model, optimizer, grad_clip: float = 1e9) -> float:
    run.engine.backward(model, [torch.rand(3, 2)], lambda x: model(x).square().sum())
    return run.engine.step(model, optimizer, grad_clip)


# ---- folder --------------------------------------------------------------------------------------------------------


def test_a_new_folder_holds_configuration_and_environment_first(tmp_path):
    run = open_run(tmp_path / "a" / "b")
    assert (run.dir / "config.yaml").read_text() == YAML
    assert json.loads((run.dir / "env.json").read_text()).keys() == environment().keys()
    assert (run.start_step, run.state, run.checkpoint) == (0, {}, None)


def test_an_existing_folder_is_never_overwritten(tmp_path):
    run = open_run(tmp_path / "a")
    run.log(1, {"loss": 1.0})
    files = {path: path.read_bytes() for path in run.dir.iterdir()}
    with pytest.raises(FileExistsError, match=r"run\.dir .*a exists; give --resume to go on, or another run\.dir"):
        open_run(tmp_path / "a")
    assert {path: path.read_bytes() for path in run.dir.iterdir()} == files
    (tmp_path / "empty").mkdir()
    open_run(tmp_path / "empty")


def test_resuming_needs_the_same_configuration(tmp_path):
    run = open_run(tmp_path / "a")
    run.save_checkpoint(3, {"best": 0.5})
    other = "run:\n  seed: 1\n  steps: 4\nloss:\n  beta: 0.1\n  clip_low: 0.2\n"
    with pytest.raises(ValueError) as raised:
        open_run(tmp_path / "a", other, resume=True)
    keys = "loss.clip_low (None there, 0.2 now), run.seed (0 there, 1 now)"
    assert str(raised.value) == f"--resume: {run.dir}/config.yaml differs in {keys}"
    assert (run.dir / "config.yaml").read_text() == YAML
    longer = YAML.replace("steps: 4", "steps: 9") + "data:\n  workers: 4\n  max_bad_share: 0.5\n"  # change no result
    again = open_run(tmp_path / "a", longer, resume=True)
    assert (again.start_step, again.state, again.checkpoint.name) == (3, {"best": 0.5}, "step_000003")
    assert (run.dir / "config.yaml").read_text() == longer


def test_resuming_needs_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--resume: .*a/config.yaml not found"):
        open_run(tmp_path / "a", resume=True)
    open_run(tmp_path / "a")
    with pytest.raises(ValueError, match=r"--resume: no complete checkpoint in .*a/checkpoints"):
        open_run(tmp_path / "a", resume=True)


def test_user_errors_are_one_line_and_others_keep_their_traceback():
    with pytest.raises(SystemExit, match=r"^error: a key$"), user_errors():
        raise ValueError("a key")
    with pytest.raises(ZeroDivisionError), user_errors():
        raise ZeroDivisionError


# ---- metrics and samples -------------------------------------------------------------------------------------------


def test_logged_rows_come_back(tmp_path):
    run = open_run(tmp_path / "a")
    run.log(1, {"loss": 0.1, "kl": 1e-9})
    run.log(2, {"loss": 1 / 3})
    rows = [
        {"step": 1, "group": 1, "completions": []},
        {"step": 1, "group": 0, "completions": ["é\u2028\x85\n", "<answer>"]},
    ]
    run.log_samples(rows)
    rows = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.1, "kl": 1e-9}, {"step": 2, "loss": 1 / 3}]
    lines = (run.dir / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert json.loads(lines[0])["completions"] == ["é\u2028\x85\n", "<answer>"] and lines[2] == ""


@pytest.mark.parametrize("torn", ["", "{", '{"step": 2', '{"step": 3, "text": "é', '{"step": 3}'])
def test_rows_after_the_checkpoint_and_a_torn_last_line_are_cut(tmp_path, torn):
    """The last character may be torn too: é is two bytes."""
    kept = '{"step": 1, "a": 1}\n{"step": 2, "a": "é"}\n{"step": 2}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((kept + '{"step": 3}\n').encode() + torn.encode()[: -1 if torn.endswith("é") else None])
    cut_back(path, 2)
    assert path.read_text(encoding="utf-8") == kept
    cut_back(path, 0)
    assert path.read_text() == ""
    cut_back(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_cutting_keeps_rows_with_unicode_line_ends(tmp_path):
    """A completion may hold U+2028 or U+0085, which str.splitlines takes for line ends."""
    path = tmp_path / "samples.jsonl"
    rows = [{"step": s, "completions": [f"a{sign}b"]} for s, sign in enumerate("\u2028\x85\x1c\r", 1)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    before = path.read_bytes()
    cut_back(path, 4)
    assert path.read_bytes() == before
    cut_back(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == [1, 2]


def test_a_whole_row_without_its_line_end_is_kept_and_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    cut_back(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_the_newest_complete_checkpoint_is_taken(tmp_path):
    run = open_run(tmp_path / "a")
    assert newest_checkpoint(run.dir) is None
    for step in (9, 10):
        run.save_checkpoint(step, {"best": float(step)})
    for name in ("step_000011", "tmp_000012"):  # the first has no run.json, the second was never renamed
        (run.dir / "checkpoints" / name).mkdir()
    (run.dir / "checkpoints" / "tmp_000012" / "run.json").write_text('{"step": 12, "state": {}}')
    assert newest_checkpoint(run.dir).name == "step_000010"
    assert open_run(tmp_path / "a", resume=True).state == {"best": 10.0}


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run = open_run(tmp_path / "a", keep=2)
    names = []
    for step in (1, 2, 9, 10):
        run.save_checkpoint(step, {})
        names.append(sorted(path.name[-2:] for path in (run.dir / "checkpoints").iterdir()))
    assert names == [["01"], ["01", "02"], ["02", "09"], ["09", "10"]]


def test_a_checkpoint_brings_back_weights_optimizer_and_random_states(tmp_path):
    run = open_run(tmp_path / "a")
    model, optimizer = prepared(run)
    take_step(run, model, optimizer)
    run.save_checkpoint(1, {})
    norms = [take_step(run, model, optimizer) for _ in range(2)]
    weight = model.weight.detach().clone()

    torch.manual_seed(99)
    again = open_run(tmp_path / "a", resume=True)
    model, optimizer = prepared(again)
    assert [take_step(again, model, optimizer) for _ in range(2)] == norms
    assert torch.equal(model.weight, weight)


# ---- gradients -----------------------------------------------------------------------------------------------------


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


def test_a_run_that_failed_before_its_first_step_does_not_block_the_next(tmp_path):
    """The folder was refused after a typo in data.train, though nothing had been trained."""
    open_run(tmp_path / "a")
    run = open_run(tmp_path / "a")
    run.log(1, {"loss": 0.0})
    with pytest.raises(FileExistsError, match="exists"):
        open_run(tmp_path / "a")


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_an_indivisible_batch_is_an_error():
    with pytest.raises(ValueError, match=r"data.batch_size 7 does not divide by the 2 processes"):
        check_batch(7, 2)
    check_batch(6, 2)


def test_the_clock_adds_up_phases_and_starts_again():
    clock = Clock()
    start = time.perf_counter()
    with clock("step"):
        for _ in range(2):
            with clock("data"):
                sum(range(20000))
    whole = time.perf_counter() - start
    times = clock.times()
    assert list(times) == ["time/data", "time/step"]
    assert 0 < times["time/data"] <= times["time/step"] <= whole
    assert clock.times() == {}


def test_the_environment_names_versions_and_commit():
    found = json.loads(json.dumps(environment()))
    assert found["python"] == platform.python_version() and found["packages"]["torch"] == torch.__version__
    assert found["devices"] and {"command", "commit", "diff"} <= found.keys()
