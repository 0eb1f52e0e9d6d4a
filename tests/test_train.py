"""The training loops: batches and processes change no gradient, resuming changes nothing, rewards rise."""

import dataclasses
import json
import os
import socket

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SHARED, make_cfg, make_policy, make_prompts
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import config
import train_grpo
import train_sft
from policy import Policy, pack, packed_logps
from rollout import Rollout
from run import Run

NO_CLIPPING = "optim.grad_clip=1e9"
UPDATE = ("loss.beta=0.1", "loss.old_logps=sampled", "loss.clip_high=0.3", "optim.lr=1.0", NO_CLIPPING)
LOOP = ("optim.lr=0.1", NO_CLIPPING, "run.seed=3")
MACHINE = ("time/", "memory/", "tokens_per_s")
CLIPS = {
    "llamafactory/1.mp4": 3.0,
    "llamafactory/2.avi": 3.0,
    "ask_anything/yoga.mp4": 10.0,
    "dmlc_decord/flipping_a_pancake.mkv": 10.0,
    "pytorch_torchcodec/nasa_13013.mp4": 13.0,
}


class RecordingSGD(torch.optim.SGD):
    """Plain SGD, whose step is linear in the gradient (Adam's hides a wrong scale), and which keeps the gradients."""

    def step(self, closure=None):
        self.grads = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def sgd(model, cfg) -> RecordingSGD:
    """In the place of run.make_optimizer."""
    return RecordingSGD([p for p in model.parameters() if p.requires_grad], lr=cfg.lr)


def sft_cfg(world, tmp_path, *overrides) -> config.SftConfig:
    """The sections of conftest.make_cfg that supervised tuning has too."""
    cfg = make_cfg(world, tmp_path, *overrides)
    return config.SftConfig(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(config.SftConfig)})


def open_run(cfg) -> Run:
    return Run(cfg.run.dir, config.to_yaml(cfg), cfg.run.seed, "none", resume=False, keep=1)


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def metrics_of(run_dir, machine: bool = False) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the machine."""
    rows = read_jsonl(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if machine or not k.startswith(MACHINE)} for row in rows]


def weights_of(run_dir) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "final" / "model.safetensors")


def recorded_rollout(policy: Policy, prompts, group_size: int = 4) -> Rollout:
    """Ragged completions of 1 to 9 tokens, the later videos' longer; the sampler's log-probs are off by some noise,
    so that ratios differ from 1 and some are clipped."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1 + p // group_size + int(torch.randint(0, 6, (), generator=generator)) for p in range(16)]
    lengths_B = torch.tensor(lengths[: len(prompts) * group_size])
    tokens_BT = torch.randint(0, 256, (len(lengths_B), 9), generator=generator)
    mask_BT = torch.arange(9) < lengths_B[:, None]
    noise_BT = 0.3 * torch.randn(mask_BT.shape, generator=generator) * mask_BT
    texts = [""] * len(lengths_B)
    silent = Rollout(tuple(prompts), tokens_BT, mask_BT, noise_BT, torch.zeros(len(lengths_B)).bool(), texts)
    packed = pack(prompts, silent.completions, policy.model.config, "cpu")
    with torch.no_grad():
        return dataclasses.replace(silent, logps_BT=packed_logps(policy, packed, None, 9)[0] + noise_BT)


def some_videos(rollout: Rollout, start: int, stop: int) -> Rollout:
    size = len(rollout.texts) // len(rollout.prompts)
    rows = slice(start * size, stop * size)
    tensors = {name: getattr(rollout, name)[rows] for name in ("tokens_BT", "mask_BT", "logps_BT", "truncated_B")}
    return Rollout(prompts=rollout.prompts[start:stop], texts=rollout.texts[rows], **tensors)


def update_once(world, cfg, run: Run, start: int = 0, stop: int = 4, family: str = "qwen2_5_vl") -> dict:
    """One SGD step on videos `start` to `stop` of a recorded rollout; gradients, parameters and the update's sums."""
    raw = make_policy(world, family, freeze_vision=cfg.model.freeze_vision)
    reference = make_policy(world, family, sharpen=2.5).requires_grad_(False)
    whole = recorded_rollout(raw, make_prompts(world, raw, num=4))
    assert 1.2 * whole.mask_BT[:8].sum() < whole.mask_BT[8:].sum() < 3 * whole.mask_BT[:12].sum()
    rollout = some_videos(whole, start, stop)
    advantages_PG = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))[start:stop]
    optimizer = sgd(raw, cfg.optim)
    policy, prepared = run.accelerator.prepare(raw, optimizer)
    embeds = raw.embed_each(rollout.prompts)
    stats = train_grpo.update(policy, reference, prepared, rollout, embeds, advantages_PG, cfg, run)
    return {"grads": optimizer.grads, "params": [p.detach().clone() for p in raw.parameters()], "stats": stats}


def assert_same_update(ours, theirs, sums=("loss", "kl", "clipped", "entropy", "gap", "gap_max", "grad_norm")):
    assert max(grad.abs().max() for grad in theirs["grads"]) > 1e-2
    for kind in ("grads", "params"):
        for a, b in zip(ours[kind], theirs[kind], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    for name in sums:
        assert ours["stats"][name] == pytest.approx(theirs["stats"][name], rel=1e-5, abs=1e-6), name
    assert theirs["stats"]["clipped"] > 0 and theirs["stats"]["kl"] > 0


# ---- one process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_the_micro_batch_changes_no_gradient(world, tmp_path, family, freeze_vision):
    results = {}
    for size in (1, 2, 3, 16):
        overrides = (*UPDATE, f"data.micro_batch_size={size}", f"model.freeze_vision={freeze_vision}")
        cfg = make_cfg(world, tmp_path, *overrides, f"run.dir={tmp_path}/run{size}")
        results[size] = update_once(world, cfg, open_run(cfg), family=family)
    for size in (1, 2, 3):
        assert_same_update(results[size], results[16])


def test_the_micro_batch_changes_no_sft_step(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sft, "make_optimizer", sgd)
    weights = {}
    for size in (1, 3, 16):
        names = (f"data.micro_batch_size={size}", f"run.dir={tmp_path}/run{size}", "run.steps=1")
        train = f"data.train={world}/mix_train.yaml"  # targets of several lengths
        train_sft.train(sft_cfg(world, tmp_path, *LOOP, *names, train))
        weights[size] = weights_of(tmp_path / f"run{size}")
    start = load_file(world / "model" / "model.safetensors")
    assert max((weights[16][name] - start[name]).abs().max() for name in start) > 1e-3
    for size in (1, 3):
        for name, tensor in weights[16].items():
            torch.testing.assert_close(weights[size][name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_the_rollout_micro_batch_changes_no_sample(world, tmp_path):
    rows = {}
    for size in (1, 16):
        cfg = make_cfg(world, tmp_path, f"rollout.micro_batch_size={size}", f"run.dir={tmp_path}/run{size}")
        train_grpo.train(cfg)
        rows[size] = read_jsonl(tmp_path / f"run{size}" / "samples.jsonl")
    assert [row["completions"] for row in rows[1]] == [row["completions"] for row in rows[16]]


# ---- two processes -------------------------------------------------------------------------------------------------


def worker(rank: int, ports: list[int], folder, world, taught) -> None:
    """What one of two processes does; its results go to `folder`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    torch.set_num_threads(1)
    results = {}
    for freeze in (True, False):
        for split in (2, 3):  # videos of the first process; of 3 and 1, the 1 is repeated at weight 0
            overrides = (*UPDATE, "data.micro_batch_size=1", f"model.freeze_vision={freeze}")
            cfg = make_cfg(world, folder, *overrides, f"run.dir={folder}/update_{freeze}_{split}")
            run = open_run(cfg)
            start, stop = ((0, split), (split, 4))[rank]
            result = update_once(world, cfg, run, start, stop)
            sums = {k: v for k, v in result["stats"].items() if k not in ("grad_norm", "gap_max")}
            largest = {"gap_max": run.maximum(result["stats"]["gap_max"])}
            results[freeze, split] = result | {"stats": result["stats"] | run.sums(sums) | largest}
    try:
        train_grpo.train(make_cfg(world, folder, "data.batch_size=3", f"run.dir={folder}/indivisible"))
    except SystemExit as error:
        results["indivisible"] = str(error)
    train_sft.make_optimizer = train_grpo.make_optimizer = sgd
    train_sft.train(sft_cfg(world, folder, *LOOP, "data.micro_batch_size=1", f"run.dir={folder}/sft"))
    AcceleratorState._reset_state(reset_partial_state=True)  # a run ends with its process group: another one
    os.environ["MASTER_PORT"] = str(ports[1])
    train_grpo.train(make_cfg(world, folder, *LOOP, *taught, "data.micro_batch_size=1", f"run.dir={folder}/grpo"))
    torch.save(results, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(world, taught, tmp_path_factory):
    """The folder in which two processes (gloo, DDP) have done `worker`, and what each of them found."""
    folder = tmp_path_factory.mktemp("two_processes")
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in (first, second)]
    context = torch.multiprocessing.spawn(worker, (ports, folder, world, taught), nprocs=2, join=False)
    if not any(context.join(timeout=600) for _ in range(2)):  # returns when the first is done, then the second
        for process in context.processes:
            process.kill()
        pytest.fail("the two processes hang")
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("freeze_vision", [True, False])
@pytest.mark.parametrize("split", [2, 3])
def test_two_processes_take_the_step_of_one(world, tmp_path, two_processes, freeze_vision, split):
    """Gradients, parameters and sums, on shares of unequal total length, one video per pass (so `no_sync` acts)."""
    cfg = make_cfg(world, tmp_path, *UPDATE, f"model.freeze_vision={freeze_vision}")
    alone = update_once(world, cfg, open_run(cfg))
    for results in two_processes[1]:
        assert_same_update(results[freeze_vision, split], alone)


@pytest.mark.parametrize("loop", ["sft", "grpo"])
def test_two_processes_run_the_loop_of_one(world, taught, tmp_path, two_processes, monkeypatch, loop):
    """The same samples, metrics and weights after two SGD steps."""
    monkeypatch.setattr(train_sft, "make_optimizer", sgd)
    monkeypatch.setattr(train_grpo, "make_optimizer", sgd)
    if loop == "sft":
        train_sft.train(sft_cfg(world, tmp_path, *LOOP))
    else:
        train_grpo.train(make_cfg(world, tmp_path, *LOOP, *taught))
        ours, theirs = (read_jsonl(path / "samples.jsonl") for path in (tmp_path / "run", two_processes[0] / "grpo"))
        assert ours == theirs and len({text for row in ours for text in row["completions"]}) > 4
    ours, theirs = metrics_of(tmp_path / "run"), metrics_of(two_processes[0] / loop)
    assert [row["grad_norm"] > 0 for row in ours] == [True, True]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    ours, theirs = weights_of(tmp_path / "run"), weights_of(two_processes[0] / loop)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_an_indivisible_batch_ends_every_process(two_processes):
    for results in two_processes[1]:
        assert results["indivisible"] == "error: data.batch_size 3 does not divide by the 2 processes"


# ---- learning ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft_run(world, tmp_path_factory):
    """Folder of a short supervised run: some of its answers have the format, few are right."""
    folder = tmp_path_factory.mktemp("sft")
    overrides = ("data.batch_size=16", "optim.lr=3e-3", "run.steps=12")
    return train_sft.train(sft_cfg(world, folder, *overrides)).dir


@pytest.fixture(scope="module")
def taught(sft_run) -> tuple[str, ...]:
    """Overrides under which a GRPO run starts from a model that earns rewards, different ones within a group."""
    sizes = ("rollout.group_size=8", "rollout.max_new_tokens=12", "eval.max_new_tokens=12")
    return f"model.path={sft_run}/final", *sizes


@pytest.fixture(scope="module")
def grpo_run(world, taught, tmp_path_factory):
    """Folder of a short GRPO run with validation."""
    folder = tmp_path_factory.mktemp("grpo")
    validation = (f"data.validation={world}/tvg_validation.yaml", "eval.every=10", "eval.num_samples=4")
    sizes = ("data.batch_size=8", "run.steps=30", "run.save_every=15", "optim.lr=5e-4")
    return train_grpo.train(make_cfg(world, folder, *taught, *validation, *sizes)).dir


def test_the_sft_loss_falls(sft_run):
    losses = [row["loss"] for row in metrics_of(sft_run)]
    assert losses[0] > 5 and losses[-1] < 1.5  # uniform over 500 tokens is 6.2


def test_the_reward_rises(grpo_run):
    rewards = torch.tensor([row["reward/total"] for row in metrics_of(grpo_run)], dtype=torch.float64)
    first, last = rewards[:10], rewards[-10:]
    rise, error = last.mean() - first.mean(), ((first.var() + last.var()) / 10).sqrt()
    assert rise > 0.1 and rise > 3 * error


def test_the_kl_starts_at_zero_and_grows(grpo_run):
    kls = [row["kl"] for row in metrics_of(grpo_run)]
    assert kls[0] == 0.0 and all(kl > 0 for kl in kls[1:]) and kls[-1] > 0.01


def test_sampled_and_scored_agree_throughout(grpo_run):
    rows = metrics_of(grpo_run)
    assert max(row["logp_gap/max"] for row in rows) < 1e-4
    assert all(0 <= row["logp_gap/mean"] <= row["logp_gap/max"] for row in rows)


def test_metrics_are_those_of_the_samples(grpo_run):
    """The means of metrics.jsonl, again from the completions that samples.jsonl holds."""
    samples = read_jsonl(grpo_run / "samples.jsonl")
    assert [row["step"] for row in samples] == [1 + i // 8 for i in range(240)]
    for row in metrics_of(grpo_run):
        groups = [sample for sample in samples if sample["step"] == row["step"]]
        assert len({group["id"] for group in groups}) > 4 and {group["task"] for group in groups} == {"tvg"}
        assert all(len(group[key]) == 8 for group in groups for key in ("completions", "rewards", "parts"))
        parts = [part for group in groups for part in group["parts"]]
        for name in ("format", "iou"):
            assert row[f"reward/{name}"] == pytest.approx(sum(part[name] for part in parts) / 64)
        totals = torch.tensor([group["rewards"] for group in groups])
        torch.testing.assert_close(totals.flatten(), torch.tensor([(p["format"] + p["iou"]) / 2 for p in parts]))
        assert row["reward/total"] == pytest.approx(totals.mean().item())
        assert row["group/frac_mixed"] == (totals.std(1) > 1e-4).sum() / 8
    assert any(0 < row["group/frac_mixed"] < 1 for row in metrics_of(grpo_run))


def test_the_final_model_loads_elsewhere(grpo_run):
    model = AutoModelForImageTextToText.from_pretrained(grpo_run / "final")
    tokenizer = AutoTokenizer.from_pretrained(grpo_run / "final")
    assert model.config.model_type == "qwen2_5_vl" and len(tokenizer) > 256
    trained = load_file(grpo_run / "checkpoints" / "step_000030" / "model.safetensors")
    assert len(trained) > 50
    for name, tensor in trained.items():
        assert torch.equal(model.state_dict()[name.removeprefix("model.")], tensor), name


def test_validation_keeps_the_best_model(grpo_run):
    rows = metrics_of(grpo_run)
    scores = {row["step"]: row["validation/score"] for row in rows if "validation/score" in row}
    assert sorted(scores) == [10, 20, 30]
    assert all(row["validation/tvg/miou"] == row["validation/score"] for row in rows if row["step"] in scores)
    saved = json.loads((grpo_run / "checkpoints" / "step_000030" / "run.json").read_text())
    assert saved == {"step": 30, "state": {"best": max(scores.values())}}
    AutoModelForImageTextToText.from_pretrained(grpo_run / "best")
    best, final = load_file(grpo_run / "best" / "model.safetensors"), weights_of(grpo_run)
    is_last = max(scores, key=lambda step: (scores[step], -step)) == 30
    assert all(torch.equal(best[name], final[name]) for name in final) == is_last


def test_beta_zero_loads_no_reference(world, taught, tmp_path, monkeypatch):
    loads = []

    def counted(*args):
        loads.append(args)
        return original(*args)

    original = train_grpo.load_policy
    monkeypatch.setattr(train_grpo, "load_policy", counted)
    for beta, expected in ((0.0, 1), (0.04, 2)):
        loads.clear()
        train_grpo.train(make_cfg(world, tmp_path, *taught, f"loss.beta={beta}", f"run.dir={tmp_path}/run{beta}"))
        assert len(loads) == expected
    kls = {beta: [row["kl"] for row in metrics_of(tmp_path / f"run{beta}")] for beta in (0.0, 0.04)}
    assert kls[0.0] == [0.0, 0.0]
    assert kls[0.04][0] == 0.0 and kls[0.04][1] > 0


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["sft", "grpo", "muon"])
def test_resumed_is_uninterrupted_bit_for_bit(world, taught, tmp_path, loop):
    """Stopped after step 2, and again while writing step 3: the files and the weights of 4 steps in one go."""
    make, train = (make_cfg, train_grpo.train) if loop == "grpo" else (sft_cfg, train_sft.train)
    validation = (f"data.validation={world}/tvg_validation.yaml", "eval.every=1", "eval.num_samples=2")
    overrides = (*taught, *validation, "loss.beta=0.1", "run.save_every=2", "optim.warmup_steps=1")
    overrides += ("optim.muon_lr=0.01", "model.freeze_vision=false") if loop == "muon" else ()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make(world, tmp_path, *overrides, "run.steps=4", f"run.dir={whole}"))
    train(make(world, tmp_path, *overrides, "run.steps=2", f"run.dir={parts}"))
    halfway = weights_of(parts)
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (parts / name).exists():
            with open(parts / name, "a") as file:
                file.write('{"step": 3}\n{"step": 3, "torn')
    train(make(world, tmp_path, *overrides, "run.steps=4", f"run.dir={parts}"), resume=True)

    assert metrics_of(parts) == metrics_of(whole)
    assert [row["step"] for row in metrics_of(parts)] == [1, 2, 3, 4]
    assert all(row["grad_norm"] > 0 and "validation/score" in row for row in metrics_of(parts))
    if loop == "grpo":
        assert read_jsonl(parts / "samples.jsonl") == read_jsonl(whole / "samples.jsonl")
    ours, theirs = weights_of(parts), weights_of(whole)
    assert ours.keys() == theirs.keys() and any(not torch.equal(ours[name], halfway[name]) for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for folder in ("checkpoints/step_000004", "best"):
        for file in (whole / folder).glob("*.json"):
            assert (parts / folder / file.name).read_bytes() == file.read_bytes(), file
    saved = [torch.load(run / "checkpoints/step_000004/optimizer.bin") for run in (whole, parts)]
    adamw = [state.get("adamw", state)["state"] for state in saved]
    assert adamw[0].keys() == adamw[1].keys() and ("momentum" in saved[0]) == (loop == "muon")
    assert all(torch.equal(adamw[0][i]["exp_avg_sq"], adamw[1][i]["exp_avg_sq"]) for i in adamw[0])
    assert all(torch.equal(a, b) for a, b in zip(*(state.get("momentum", []) for state in saved), strict=True))


def test_resuming_a_finished_run_changes_nothing(world, tmp_path):
    cfg = make_cfg(world, tmp_path)
    train_grpo.train(cfg)
    names = ("metrics.jsonl", "samples.jsonl", "config.yaml", "final/model.safetensors")
    before = [(tmp_path / "run" / name).read_bytes() for name in names]
    train_grpo.train(cfg, resume=True)
    assert [(tmp_path / "run" / name).read_bytes() for name in names] == before


# ---- data of other kinds -------------------------------------------------------------------------------------------


def test_all_tasks_in_one_batch(world, tmp_path, family):
    """A part's mean is over the samples whose task has it: `answer` is no part of grounding."""
    path = world / ("model" if family == "qwen2_5_vl" else "model_qwen2_vl")
    data = (f"data.train={world}/mix_train.yaml", "data.batch_size=12", "data.micro_batch_size=5", "run.steps=1")
    train_grpo.train(make_cfg(world, tmp_path, *data, f"model.path={path}"))
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    keys = {"tvg": {"format", "iou"}, "mcqa": {"format", "answer"}, "gqa": {"format", "answer", "iou"}}
    assert {sample["task"] for sample in samples} == set(keys)
    assert all(part.keys() == keys[sample["task"]] for sample in samples for part in sample["parts"])
    (row,) = metrics_of(tmp_path / "run", machine=True)
    assert {"reward/format", "reward/answer", "reward/iou"} <= row.keys() and row["logp_gap/max"] < 1e-4
    assert {f"time/{phase}" for phase in ("data", "vision", "rollout", "reward", "update", "step")} <= row.keys()


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared: real clips are not part of the repository")
def test_steps_on_real_clips(world, tmp_path):
    """mp4, avi and mkv files of several sizes and lengths, each within 64 video tokens."""
    lines = []
    for name, duration in CLIPS.items():
        record = {"id": name, "task": "tvg", "video": name, "duration": duration, "segments": [[1.0, 2.5]]}
        lines.append(json.dumps(record | {"question": "When does it happen?"}))
    (tmp_path / "real.jsonl").write_text("\n".join(lines) + "\n")
    yaml = f"datasets:\n  - json_path: real.jsonl\n    data_folder: {SHARED}/data/videos\n"
    (tmp_path / "real.yaml").write_text(yaml)
    budget = ("video.total_pixels=50176", "video.max_frames=16")
    data = (f"data.train={tmp_path}/real.yaml", "data.batch_size=5", "data.micro_batch_size=2")
    train_grpo.train(make_cfg(world, tmp_path, *data, *budget))
    rows = metrics_of(tmp_path / "run")
    assert len(rows) == 2 and max(row["logp_gap/max"] for row in rows) < 1e-4
    assert all(5 * 20 < row["tokens/prompt"] < 5 * (64 + 30) for row in rows)
    assert {row["id"] for row in read_jsonl(tmp_path / "run" / "samples.jsonl")} == set(CLIPS)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main", [train_grpo.main, train_sft.main])
@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["optim.lrr=1e-3"], ["optim.lrr", "did you mean optim.lr?"]),
        (["run.steps=many"], ["run.steps=many", "must be int"]),
        (["data.batch_size=0"], ["data.batch_size must be above 0"]),
        (["model.path=./nowhere"], ["model.path ./nowhere", "python tiny.py"]),
        (["data.train=nowhere.jsonl"], ["data file nowhere.jsonl not found", "python tiny.py"]),
        (["data.validation=nowhere.jsonl"], ["data file nowhere.jsonl not found"]),
        (["--config", "nowhere.yaml"], ["config file nowhere.yaml not found"]),
        (["--resume"], ["--resume", "config.yaml not found"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_ends_with_one_line_that_names_it(world, tmp_path, main, overrides, named):
    good = [f"model.path={world}/model", f"data.train={world}/tvg_train.yaml", "data.validation=", "prompt.think=false"]
    small = [f"run.dir={tmp_path}/run", "run.tracker=none", "run.steps=1", "data.cache_dir="]
    with pytest.raises(SystemExit) as raised:
        main([*good, *small, *overrides])
    message = str(raised.value)
    assert message.startswith("error: ") and "\n" not in message
    assert all(part in message for part in named), message


@pytest.mark.parametrize("main", [train_grpo.train, train_sft.train])
def test_an_existing_run_folder_is_left_alone(world, tmp_path, main):
    cfg = make_cfg(world, tmp_path) if main is train_grpo.train else sft_cfg(world, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("precious\n")
    with pytest.raises(SystemExit, match=r"^error: run\.dir .*run exists; give --resume to go on, or another"):
        main(cfg)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "precious\n"


def test_sft_says_that_it_has_no_thoughts_to_imitate(world, tmp_path):
    with pytest.raises(SystemExit, match=r"sample tiny/tvg_train/0: prompt.think=true needs a `response`"):
        train_sft.train(sft_cfg(world, tmp_path, "prompt.think=true"))
