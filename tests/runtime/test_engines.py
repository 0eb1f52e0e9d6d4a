"""DDP, ZeRO-2 and ZeRO-3 on two CPU processes train as one process does; sharded weights sample, save and hang nowhere.

Every engine is one launch of engine_worker.py, in which all that is compared here is done.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import REPO, metrics_of, read_jsonl
from engine_worker import CASES, DTYPES, LOOPS, NUM_REST, NUM_STEPS, PROGRAMS, REST
from safetensors.torch import load_file

from config import ModelConfig
from policy import load_policy

pytestmark = pytest.mark.slow
TRAINED = (*LOOPS, "sft")
ENGINES = {"ddp": "cpu2.yaml", "zero2": "cpu2_zero2.yaml", "zero3": "cpu2_zero3.yaml"}
BFLOAT16 = [name for name, dtype in DTYPES.items() if dtype == "bfloat16"]
LIMIT_S = 1800


@pytest.fixture(scope="module")
def results(world, taught, tmp_path_factory):
    """A function from an engine's name to the folder of its runs and what its first process found."""
    folder, found = tmp_path_factory.mktemp("engines"), {}

    def result_of(name: str):
        if name not in found:
            found[name] = launched(name, folder / name, world, taught)
        return folder / name, found[name]

    return result_of


def launched(name: str, folder, world, taught) -> dict:
    folder.mkdir()
    launcher = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    launcher = [*launcher, f"configs/accelerate/{ENGINES[name]}"] if name in ENGINES else []
    command = [sys.executable, *launcher, "tests/engine_worker.py", name, str(folder), str(world), *taught]
    env = os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'tests'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(folder / "results.pt", weights_only=False)


def assert_close(ours: dict, theirs: dict, **tolerances) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


# ---- recorded completions and advantages ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_every_engine_takes_the_steps_of_one_process(results, name, case):
    """Shares of unequal length, of which some are empty; videos of unequal length and of several tasks."""
    ours, theirs = results(name)[1][case], results("one")[1][case]
    assert len(theirs["steps"]) == NUM_STEPS
    for a, b in zip(ours["steps"], theirs["steps"], strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["lr"] == b["lr"]
        assert a["kl"] == pytest.approx(b["kl"], abs=1e-5) and a["tokens"] == b["tokens"]
        own = {row: logps for row, logps in a["logps"].items() if row in b["logps"]}  # the others had weight 0
        assert_close(own, b["logps"], atol=1e-5, rtol=0)
    assert_close(ours["weights"], theirs["weights"], atol=1e-4, rtol=0)
    last, first = theirs["steps"][-1], theirs["steps"][0]
    assert last["kl"] > 1e-3 and len(first["logps"]) == 2 * 4  # policy and reference of 4 videos
    assert {step["lr"] for step in theirs["steps"]} != {first["lr"]}
    assert case != "two_updates" or sum(step["clipped"] for step in theirs["steps"]) > 0


@pytest.mark.parametrize("name", [*ENGINES, "one"])
def test_a_gradient_that_is_no_number_moves_nothing_anywhere(results, name):
    """The loss of one process is not a number: no process takes the step, and the next one is as ever."""
    ours, theirs = results(name)[1]["after_nan"], results("one")[1]["after_nan"]
    bad, good = ours["norms"]
    assert not torch.tensor(bad).isfinite() and good == pytest.approx(theirs["norms"][1], rel=1e-4)
    before, between, after = ours["weights"]
    assert all(torch.equal(between[name], weight) for name, weight in before.items())
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
    assert_close(after, theirs["weights"][2], atol=1e-4, rtol=0)


def test_gathers_do_not_grow_with_what_is_sampled(results):
    """Each weight once (ZeRO-3); with model.gather_weights=false anew for every token."""
    gathers = results("zero3")[1]["gathers"]
    num_weights = len(results("zero3")[1]["adamw"]["weights"])
    assert 0 < gathers[True, 4] == gathers[True, 9] <= num_weights
    assert gathers[False, 9] > gathers[False, 4] > 2 * gathers[True, 4]
    assert set(results("zero2")[1]["gathers"].values()) == {0}


# ---- bfloat16 ------------------------------------------------------------------------------------------------------


def flat(weights: dict[str, torch.Tensor], names) -> torch.Tensor:
    return torch.cat([weights[name].float().flatten() for name in names])


def moved(result: dict) -> torch.Tensor:
    """What all steps have added to the weights that are trained."""
    return flat(result["masters"], result["masters"]) - flat(result["start"], result["masters"])


def gap(ours: dict, theirs: dict) -> torch.Tensor:
    """How far the log-probs of two steps are apart."""
    shared = [(logps, theirs["logps"][row]) for row, logps in ours["logps"].items() if row in theirs["logps"]]
    return torch.cat([(a - b).abs().flatten() for a, b in shared])


def assert_steps_agree(ours: dict, theirs: dict, norm: float, kl: float, logps: float, weights: float) -> None:
    """`norm` and `weights` are relative; `logps` bounds the mean over all tokens of a step."""
    for a, b in zip(ours["steps"], theirs["steps"], strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=norm) and a["kl"] == pytest.approx(b["kl"], abs=kl)
        assert gap(a, b).mean() < logps
    assert (moved(ours) - moved(theirs)).norm() < weights * moved(theirs).norm()


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_takes_the_steps_of_float32(results, name):
    """Measured: norms agree to 0.5%, the KL to 0.006, log-probs to 0.015, what the weights have moved to 6%."""
    ours, theirs = results(name)[1]["small"], results("one")[1]["small"]
    assert {weight.dtype for weight in ours["weights"].values()} == {torch.bfloat16}
    assert_steps_agree(ours, theirs, norm=0.02, kl=0.02, logps=0.04, weights=0.15)


def test_sharding_weights_too_changes_little_in_bfloat16(results):
    """The first step is the same. Then a sum that is taken in another order may round a weight the other way.

    Measured: norms agree to 0.4%, the KL to 0.001, log-probs to 0.0025, what the weights have moved to 1.4%.
    """
    ours, theirs = (results(name)[1]["small"] for name in BFLOAT16)
    first, its = ours["steps"][0], theirs["steps"][0]
    assert first["grad_norm"] == pytest.approx(its["grad_norm"], rel=1e-6) and gap(first, its).max() == 0
    assert_steps_agree(ours, theirs, norm=0.01, kl=0.003, logps=0.006, weights=0.04)


@pytest.mark.parametrize("name", BFLOAT16)
def test_steps_too_small_for_bfloat16_add_up(results, name):
    """No single step of AdamW at this rate would move most of the weights if bfloat16 were all that is kept."""
    result = results(name)[1]["small"]
    start, weights, masters = (flat(result[kind], result["masters"]) for kind in ("start", "weights", "masters"))
    widest = 1e-5 * (1 - 0.9) / (1 - 0.999) ** 0.5 + 1e-6 * start.abs()  # of a step at this rate, and its decay
    stays = ((start + widest).bfloat16() == start) & ((start - widest).bfloat16() == start)
    assert stays.float().mean() > 0.5
    assert (masters != start)[stays].float().mean() > 0.9 and (weights != start)[stays].float().mean() > 0.003
    assert torch.equal(weights, masters.bfloat16().float())


@pytest.mark.parametrize("name", ["one", *BFLOAT16])
def test_micro_batches_are_summed_in_float32(results, name):
    """Each further micro-batch would vanish beside the first one in a sum of bfloat16."""
    alone, together = results(name)[1]["small"]["sums"]
    assert together / alone == pytest.approx(1 + NUM_REST * REST, rel=1e-4)


@pytest.mark.parametrize("name", BFLOAT16)
def test_a_program_in_bfloat16_checks_itself_and_goes_on(results, name):
    """A resume takes the same second step, because the checkpoint has the float32 weights; final/ has them rounded."""
    folder, found = results(name)
    whole, resumed = found["twice"]
    assert "self-check: 7 checks" in whole["printed"] and "self-check: 6 checks" in resumed["printed"]
    assert [row["step"] for row in whole["rows"]] == [1, 2] and min(row["grad_norm"] for row in whole["rows"]) > 0
    assert whole["rows"] == resumed["rows"]
    assert_close(resumed["masters"], whole["masters"], atol=0, rtol=0)
    (path,) = (folder / "twice" / "final").glob("*.safetensors")
    assert {weight.dtype for weight in load_file(path).values()} == {torch.bfloat16}
    loaded = load_policy(ModelConfig(path=str(folder / "twice" / "final"), dtype="bfloat16")).state_dict()
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in whole["masters"].values())
    for name, weight in whole["masters"].items():
        assert torch.equal(loaded[name], weight.bfloat16()), name


# ---- whole programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "loop"), [(n, loop) for n in ENGINES for loop in PROGRAMS[n] if loop in TRAINED])
def test_the_programs_run_as_in_one_process(results, name, loop):
    """The same tokens in the first step, the same metrics, one Hugging Face folder with the same names and types."""
    ours, theirs = (results(engine)[0] / loop for engine in (name, "one"))
    if loop != "sft":
        first = [[row for row in read_jsonl(run / "samples.jsonl") if row["step"] == 1] for run in (ours, theirs)]
        assert first[0] == first[1] and len({text for row in first[0] for text in row["completions"]}) > 4
    for a, b in zip(metrics_of(ours), metrics_of(theirs), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
        assert "validation/score" in a
    assert max(row["grad_norm"] for row in metrics_of(theirs)) > 0
    for folder in ("best", "final"):
        files = [sorted(path.name for path in (run / folder).iterdir()) for run in (ours, theirs)]
        assert files[0] == files[1]
        weights = [load_file(next((run / folder).glob("*.safetensors"))) for run in (ours, theirs)]
        assert [w.dtype for w in weights[0].values()] == [w.dtype for w in weights[1].values()]
        assert_close(*weights, atol=1e-4, rtol=0)


def test_weights_are_whole_where_nothing_is_trained(results):
    """Evaluation and selection under a ZeRO-3 file: each process holds the model, the answers are those of one."""
    for file in ("eval/predictions.jsonl", "select/scores.jsonl", "select/selected.jsonl"):
        ours, theirs = (results(name)[0] / file for name in ("zero3", "one"))
        assert ours.read_bytes() == theirs.read_bytes() and len(theirs.read_bytes().splitlines()) > 1
