"""One step's gradients: neither micro-batches nor processes nor skipped groups change them; refills, odd groups."""

import contextlib
import dataclasses
import os
import socket
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import (
    make_cfg,
    make_policy,
    make_prompts,
    metrics_of,
    open_run,
    read_jsonl,
    rewards_of,
    sft_cfg,
    sgd,
    weights_of,
    write_data,
)
from safetensors.torch import load_file

import train_grpo
import train_sft
from config import DataConfig, GrpoConfig, PromptConfig
from data import batch_indices, refill_indices
from groups import choose_groups
from grpo import group_advantages
from policy import Policy, pack, packed_logps
from records.files import read_samples
from records.record import Sample
from rewards import score
from rollout import Rollout
from runtime import engine
from runtime.run import Run
from step_log import Alarm, frac_nearly_equal

NO_CLIPPING = "optim.grad_clip=1e9"
UPDATE = ("loss.beta=0.1", "loss.old_logps=sampled", "loss.clip_high=0.3", "optim.lr=1.0", NO_CLIPPING)
LOOP = ("optim.lr=0.1", NO_CLIPPING, "run.seed=3")
SUMS = ("loss", "kl", "clipped", "entropy", "tokens", "gap")
VARIANTS = {
    "token_mean": (),
    "sequence_mean": ("loss.aggregation=sequence_mean", "loss.entropy=0.01"),
    "gspo": (
        "loss.ratio=sequence",
        "loss.aggregation=constant",
        "loss.scale=batch_std",
        "loss.kl=k2",
        "loss.clip_low=0.01",
    ),
    "two_updates": ("loss.updates_per_rollout=2", "loss.old_logps=policy", "loss.clip_high=0.02", "optim.lr=0.01"),
}


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
    embeds = tuple(policy.embed_each(prompts))
    not_cut_B = torch.zeros(len(lengths_B)).bool()
    silent = Rollout(tuple(prompts), embeds, tokens_BT, mask_BT, noise_BT, not_cut_B, texts)
    packed = pack(prompts, silent.completions, policy.model.config, "cpu")
    with torch.no_grad():
        return dataclasses.replace(silent, logps_BT=packed_logps(policy, packed, None, 9)[0] + noise_BT)


def update_once(
    world, cfg, run: Run, start: int = 0, stop: int = 4, family: str = "qwen2_5_vl", dead: tuple[int, ...] = ()
) -> dict:
    """The SGD steps on videos `start` to `stop` of a recorded rollout, the groups `dead` of which have equal rewards:
    gradients, parameters and the update's sums."""
    raw = make_policy(world, family, freeze_vision=cfg.model.freeze_vision)
    reference = make_policy(world, family, sharpen=2.5).requires_grad_(False)
    whole = recorded_rollout(raw, make_prompts(world, raw, num=4))
    tokens_NG = whole.mask_BT.sum(1).view(4, 4)
    assert 1.2 * tokens_NG[:2].sum() < tokens_NG[2:].sum() < 3 * tokens_NG[:3].sum()
    rollout = whole.take(range(start, stop))
    totals_NG = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    totals_NG[list(dead)] = 0.7
    optimizer = sgd(raw, cfg.optim)
    policy, prepared = run.engine.accelerator.prepare(raw, optimizer)
    rollout = replace(rollout, video_embeds=tuple(raw.embed_each(rollout.prompts)))
    batch = choose_groups(rewards_of(totals_NG, tokens_NG=tokens_NG, places=range(start, stop)), cfg)
    stats = train_grpo.update(policy, reference, prepared, rollout, batch, cfg, run)
    return {
        "grads": optimizer.grads,
        "params": [p.detach().clone() for p in raw.parameters()],
        "stats": dataclasses.asdict(stats) | {"grad_norm": sum(stats.grad_norms)},
    }


def assert_same_update(ours, theirs):
    assert max(grad.abs().max() for grad in theirs["grads"]) > 1e-2
    for kind in ("grads", "params"):
        for a, b in zip(ours[kind], theirs[kind], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    for name in (*SUMS, "gap_max", "grad_norm"):
        assert ours["stats"][name] == pytest.approx(theirs["stats"][name], rel=1e-5, abs=1e-6), name
    assert theirs["stats"]["clipped"] > 0 and theirs["stats"]["kl"] > 0


# ---- one process ---------------------------------------------------------------------------------------------------


def updates_by_size(world, tmp_path, overrides, sizes, family: str = "qwen2_5_vl") -> list[dict]:
    results = []
    for size in sizes:
        names = (f"data.micro_batch_size={size}", f"run.dir={tmp_path}/run{size}")
        cfg = make_cfg(world, tmp_path, *UPDATE, *overrides, *names)
        results.append(update_once(world, cfg, open_run(cfg), family=family))
    return results


def test_the_reference_is_waited_for_under_the_eyes_of_the_watchdog(world, tmp_path, monkeypatch):
    """Under ZeRO-3 each layer of it is a collective call, and a process that hangs in one is named to the others."""
    cfg = make_cfg(world, tmp_path, *UPDATE, "loss.beta=0.1")
    run, watched, score = open_run(cfg), [], train_grpo.packed_logps

    def watching(policy, *args, **kwargs):
        watched.append(run.engine.watchdog._waiting_since is not None)
        return score(policy, *args, **kwargs)

    monkeypatch.setattr(train_grpo, "packed_logps", watching)
    update_once(world, cfg, run)
    assert len(watched) >= 2 and all(watched)  # by the reference, and by the policy


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_the_micro_batch_changes_no_gradient(world, tmp_path, family, freeze_vision):
    whole, *others = updates_by_size(world, tmp_path, [f"model.freeze_vision={freeze_vision}"], (16, 1, 2, 3), family)
    for other in others:
        assert_same_update(other, whole)


@pytest.mark.parametrize("variant", list(VARIANTS)[1:])
def test_the_micro_batch_changes_no_variant(world, tmp_path, variant):
    whole, one = updates_by_size(world, tmp_path, VARIANTS[variant], (16, 1))
    assert_same_update(one, whole)


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


@pytest.mark.parametrize("loop", ["grpo", "sft"])
def test_a_huge_gradient_in_the_first_update_ends_the_loop(world, tmp_path, loop):
    """Before a checkpoint of it is saved; its row is there. A resume checks again, and 0 is no limit."""
    module, make = (train_grpo, make_cfg) if loop == "grpo" else (train_sft, sft_cfg)
    names = ("run.save_every=1", "loss.entropy=0.01", "group.skip_dead=false")
    for resume in (False, True):
        with pytest.raises(SystemExit, match=r"^error: the first update has a gradient norm of .*_grad_norm=1e-06"):
            module.train(make(world, tmp_path, *names, "run.max_first_grad_norm=1e-6"), resume)
        assert len(metrics_of(tmp_path / "run")) == 1 and not (tmp_path / "run" / "checkpoints").exists()
    module.train(make(world, tmp_path, *names, "run.max_first_grad_norm=0"), resume=True)
    assert min(row["grad_norm"] for row in metrics_of(tmp_path / "run")) > 1e-6


def test_the_rollout_micro_batch_changes_no_sample(world, tmp_path):
    rows = {}
    for size in (1, 16):
        cfg = make_cfg(world, tmp_path, f"rollout.micro_batch_size={size}", f"run.dir={tmp_path}/run{size}")
        train_grpo.train(cfg)
        rows[size] = read_jsonl(tmp_path / f"run{size}" / "samples.jsonl")
    assert [row["completions"] for row in rows[1]] == [row["completions"] for row in rows[16]]


# ---- two processes -------------------------------------------------------------------------------------------------


CASES = {  # overrides, videos of the first process, dead groups
    "frozen_2": ((), 2, ()),
    "frozen_3": ((), 3, ()),  # of 3 and 1 videos, the 1 is repeated at weight 0
    "vision_2": (("model.freeze_vision=false",), 2, ()),
    "vision_3": (("model.freeze_vision=false",), 3, ()),
    **{name: (overrides, 3, ()) for name, overrides in VARIANTS.items() if overrides},
    "nothing_left": ((), 2, (0, 1)),  # the first process has dead groups only
    "one_dead": ((), 2, (1,)),
}
MIXED_IF = """
DEAD = {dead}


def mixed_if_alive(completions, id, **columns):
    return [0.5 if i in DEAD else sum(map(ord, text)) % 7 / 7 for text, i in zip(completions, id)]
"""


def grpo_loops(world, folder) -> dict[str, tuple[str, ...]]:
    """Overrides by loop. In `refill` the first process's videos of step 1 are dead, its refill too; the other's not."""
    samples = read_samples(str(world / "tvg_train.yaml"))
    first = batch_indices(len(samples), 4, 0, seed=3)
    refill = refill_indices(len(samples), first, 2, 0, 1, seed=3)
    assert not set(batch_indices(len(samples), 4, 1, seed=3)) & {*first[:2], refill[0]}
    path = folder / "mixed_if.py"
    path.write_text(MIXED_IF.format(dead={samples[i].id for i in (*first[:2], refill[0])}))
    no_parts = "rewards.tvg={format: 0, iou: 0}"
    refilled = (f"rewards.functions={{{path}:mixed_if_alive: 1}}", no_parts, "group.max_refills=1")
    return {"grpo": (), "refill": refilled, "broken": broken_data(world, folder)}


def broken_data(world, folder) -> tuple[str, ...]:
    """Overrides under which both processes meet videos that cannot be read, in the first round and in refills."""
    bad = [*batch_indices(12, 4, 0, seed=3)[1:], batch_indices(12, 4, 1, seed=3)[0]]
    path = folder / "data" / "data.jsonl"
    if not path.exists():
        write_data(world, folder / "data", 12, dict.fromkeys(bad, b"no video"))
    refills = ("group.max_refills=2", "group.tolerance=0.3")
    return (f"data.train={path}", "data.max_bad_share=1", "data.workers=1", "data.cache_dir=", *refills)


def worker(rank: int, ports: list[int], folder, world, taught) -> None:
    """What one of two processes does; its results go to `folder`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    torch.set_num_threads(1)
    results = {}
    for case, (overrides, split, dead) in CASES.items():
        names = ("data.micro_batch_size=1", f"run.dir={folder}/{case}")
        cfg = make_cfg(world, folder, *UPDATE, *overrides, *names)
        run = open_run(cfg)
        result = update_once(world, cfg, run, *((0, split), (split, 4))[rank], dead=dead)
        sums = {name: result["stats"][name] for name in SUMS}
        largest = {"gap_max": run.engine.maximum(result["stats"]["gap_max"])}
        results[case] = result | {"stats": result["stats"] | run.engine.sums(sums) | largest}
    try:
        train_grpo.train(make_cfg(world, folder, "data.batch_size=3", f"run.dir={folder}/indivisible"))
    except SystemExit as error:
        results["indivisible"] = str(error)
    train_sft.make_optimizer = train_grpo.make_optimizer = sgd
    train_sft.train(sft_cfg(world, folder, *LOOP, "data.micro_batch_size=1", f"run.dir={folder}/sft"))
    for port, (loop, overrides) in zip(ports[1:], grpo_loops(world, folder).items(), strict=True):
        AcceleratorState._reset_state(reset_partial_state=True)  # a run ends with its process group: another one
        os.environ["MASTER_PORT"] = str(port)
        names = ("data.micro_batch_size=1", f"run.dir={folder}/{loop}")
        train_grpo.train(make_cfg(world, folder, *LOOP, *taught, *overrides, *names))
    results["num_ended"] = len(engine.ENDED_GROUPS)
    torch.save(results, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(world, taught, tmp_path_factory):
    """The folder in which two processes (gloo, DDP) have done `worker`, and what each of them found."""
    folder = tmp_path_factory.mktemp("two_processes")
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(1 + len(grpo_loops(world, folder)))]
        for one in free:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in free]
    context = torch.multiprocessing.spawn(worker, (ports, folder, world, taught), nprocs=2, join=False)
    if not any(context.join(timeout=600) for _ in range(2)):  # returns when the first is done, then the second
        for process in context.processes:
            process.kill()
        pytest.fail("the two processes hang")
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_step_of_one(world, tmp_path, two_processes, case):
    """Gradients, parameters and sums, on shares of unequal total length, one video per pass (so `no_sync` acts)."""
    overrides, _, dead = CASES[case]
    cfg = make_cfg(world, tmp_path, *UPDATE, *overrides)
    alone = update_once(world, cfg, open_run(cfg), dead=dead)
    assert alone["stats"]["trained"] == 4 - len(dead)
    for results in two_processes[1]:
        assert_same_update(results[case], alone)


@pytest.mark.parametrize("loop", ["sft", "grpo", "refill", "broken"])
def test_two_processes_run_the_loop_of_one(world, taught, tmp_path, two_processes, monkeypatch, loop):
    """The same samples, metrics and weights after two SGD steps."""
    monkeypatch.setattr(train_sft, "make_optimizer", sgd)
    monkeypatch.setattr(train_grpo, "make_optimizer", sgd)
    if loop == "sft":
        train_sft.train(sft_cfg(world, tmp_path, *LOOP))
    else:
        train_grpo.train(make_cfg(world, tmp_path, *LOOP, *taught, *grpo_loops(world, tmp_path)[loop]))
        paths = (tmp_path / "run", two_processes[0] / loop)
        ours, theirs = ([row | {"video": ""} for row in read_jsonl(path / "samples.jsonl")] for path in paths)
        assert ours == theirs and len({text for row in ours for text in row["completions"]}) > 4
    ours, theirs = metrics_of(tmp_path / "run"), metrics_of(two_processes[0] / loop)
    assert [row["grad_norm"] > 0 for row in ours] == [True, True]
    if loop == "broken":
        lists = [(path / "bad_samples.jsonl").read_text() for path in (tmp_path / "run", two_processes[0] / loop)]
        assert lists[0].replace(str(tmp_path), "") == lists[1].replace(str(two_processes[0]), "")
        assert len(lists[0].splitlines()) == 4 and max(row["group/refills"] for row in ours) > 0
        assert ours[0]["data/num_replaced"] >= 3 and ours[1]["data/num_replaced"] >= 1
    if loop == "refill":
        assert [row["group/refills"] for row in ours] == [1, 0]
        assert [row["group/trained"] for row in ours] == [3, 4]
        assert [row["group/frac_mixed"] for row in ours] == [3 / 6, 1]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    ours, theirs = weights_of(tmp_path / "run"), weights_of(two_processes[0] / loop)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_an_indivisible_batch_ends_every_process(two_processes):
    for results in two_processes[1]:
        assert results["indivisible"] == "error: data.batch_size 3 does not divide by the 2 processes"


def test_groups_of_processes_outlive_their_runs(two_processes):
    """A run of two processes hung at its end, now and then, while its group of processes was destroyed."""
    for results in two_processes[1]:
        assert results["num_ended"] == 4  # sft, grpo, refill, broken


# ---- groups --------------------------------------------------------------------------------------------------------


def test_skipping_dead_groups_changes_no_gradient(world, tmp_path):
    """Without KL and entropy; the sums over tokens are then of the others only."""
    results = {}
    for skip in (True, False):
        names = (f"group.skip_dead={skip}", f"run.dir={tmp_path}/run{skip}", "data.micro_batch_size=3")
        cfg = make_cfg(world, tmp_path, *UPDATE, "loss.beta=0", *names)
        results[skip] = update_once(world, cfg, open_run(cfg), dead=(0, 2))
    for a, b in zip(results[True]["grads"], results[False]["grads"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    assert max(grad.abs().max() for grad in results[True]["grads"]) > 1e-2
    assert results[True]["stats"]["loss"] == pytest.approx(results[False]["stats"]["loss"], abs=1e-6)
    assert [results[skip]["stats"]["trained"] for skip in (True, False)] == [2, 4]
    assert results[True]["stats"]["tokens"] < results[False]["stats"]["tokens"]


def test_a_step_with_dead_groups_only_moves_nothing(world, tmp_path):
    """Not even the optimizer's momentum and weight decay."""
    path = tmp_path / "same.py"
    path.write_text("def same(completions, **columns):\n    return [0.25] * len(completions)\n")
    function = (f"rewards.functions={{{path}:same: 2}}", "rewards.tvg={format: 0, iou: 0}")
    train_grpo.train(make_cfg(world, tmp_path, *function, "group.max_refills=2", "optim.weight_decay=0.1"))
    rows = metrics_of(tmp_path / "run")
    for row in rows:
        expected = {"reward/total": 0.5, "reward/same": 0.25, "group/frac_mixed": 0, "group/trained": 0, "grad_norm": 0}
        assert {name: row[name] for name in expected} == expected
        assert row["group/refills"] == 2 and not {"loss", "kl", "entropy", "logp_gap/mean"} & row.keys()
    assert len(read_jsonl(tmp_path / "run" / "samples.jsonl")) == 2 * 3 * 4
    start = load_file(world / "model" / "model.safetensors")
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights_of(tmp_path / "run").items())


def test_a_batch_is_filled_with_live_groups_first(world, tmp_path):
    """Six sampled, batch of four: the mixed 1, 4 and 5, then the first dead one, 0."""
    totals = [[0.5, 0.5], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.2, 0.4]]
    cfg = make_cfg(world, tmp_path, "rollout.group_size=2", "loss.scale=none")
    batch = choose_groups(rewards_of(torch.tensor(totals)), cfg)
    assert (batch.groups, batch.trained) == ([1, 4, 5, 0], [1, 4, 5])
    expected = [[0, 0], [-0.5, 0.5], [0, 0], [0, 0], [0.5, -0.5], [-0.1, 0.1]]
    torch.testing.assert_close(batch.advantages_NG, torch.tensor(expected))
    cfg = make_cfg(world, tmp_path, "rollout.group_size=2", "group.skip_dead=false", "group.tolerance=0.2")
    batch = choose_groups(rewards_of(torch.tensor(totals)), cfg)
    assert batch.groups == batch.trained == [1, 4, 0, 2]  # 5: std 0.14


def test_groups_that_differ_in_length_alone_or_have_no_tokens_are_dead(world, tmp_path):
    """Group 0 earns the same but for a penalty; of group 1 every completion is masked; group 2 lives."""
    totals, earned = [[0.5, 0.2], [0.0, 1.0], [0.0, 1.0]], [[0.5, 0.5], [0.0, 1.0], [0.0, 1.0]]
    cfg = make_cfg(world, tmp_path, "rollout.group_size=2", "loss.scale=none")
    tokens = [[3.0, 3.0], [0.0, 0.0], [0.0, 4.0]]
    batch = choose_groups(rewards_of(*map(torch.tensor, (totals, earned, tokens))), cfg)
    assert batch.trained == [2] and batch.groups == [2, 0, 1]
    torch.testing.assert_close(batch.advantages_NG, torch.tensor([[0.0, 0.0], [0.0, 0.0], [-0.5, 0.5]]))


def test_refills_are_other_videos_and_depend_on_nothing_else():
    draws = [refill_indices(50, [1, 2, 3], 10, step=4, refill=1, seed=0) for _ in range(2)]
    assert draws[0] == draws[1] and len(set(draws[0])) == 10 and not {1, 2, 3} & set(draws[0])
    others = [refill_indices(50, [1, 2, 3], 10, *numbers) for numbers in ((5, 1, 0), (4, 2, 0), (4, 1, 1))]
    assert all(other != draws[0] for other in others)
    assert sorted(refill_indices(6, [0, 3], 10, 0, 1, 0)) == [1, 2, 4, 5]  # fewer are left than asked for
    assert refill_indices(3, [0, 1, 2], 10, 0, 1, 0) == []


# ---- truncated completions, warnings -------------------------------------------------------------------------------


def test_truncated_completions_can_be_left_out_of_the_loss(world, tmp_path):
    """The untrained model never stops within two tokens: all truncated, then masked, so that nothing moves."""
    for kind in ("keep", "mask"):
        names = (f"loss.truncated={kind}", f"run.dir={tmp_path}/{kind}", "rollout.max_new_tokens=2", "loss.beta=0")
        path = tmp_path / "letters.py"
        path.write_text("def letters(completions, **columns):\n    return [len(set(c)) / 9 for c in completions]\n")
        cfg = make_cfg(world, tmp_path, *names, f"rewards.functions={{{path}:letters: 1}}")
        train_grpo.train(cfg)
    keep, mask = (metrics_of(tmp_path / kind) for kind in ("keep", "mask"))
    assert keep[0]["reward/total"] == mask[0]["reward/total"] and keep[0]["frac_truncated"] == 1
    assert keep[0]["grad_norm"] > 0 and mask[0]["grad_norm"] == mask[0]["group/trained"] == 0
    start = load_file(world / "model" / "model.safetensors")
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights_of(tmp_path / "mask").items())
    assert mask[0]["tokens/completion"] == keep[0]["tokens/completion"] > 0


def test_the_penalty_for_overlong_completions_is_part_of_the_reward(world, taught, tmp_path):
    """At most 12 tokens, buffer of half of it: from 7 tokens on, a sixth of the penalty each."""
    names = ("loss.truncated=penalise", "loss.overlong_buffer=0.5", "loss.overlong_penalty=0.3", "run.steps=1")
    train_grpo.train(make_cfg(world, tmp_path, *taught, *names))
    rows = read_jsonl(tmp_path / "run" / "samples.jsonl")
    parts = [part for row in rows for part in row["parts"]]
    sixths = {round(20 * part["overlong"], 5) for part in parts}
    assert sixths <= {0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0} and len(sixths) > 2
    totals = [reward for row in rows for reward in row["rewards"]]
    assert totals == pytest.approx([(part["format"] + part["iou"]) / 2 + part["overlong"] for part in parts])
    (metrics,) = metrics_of(tmp_path / "run")
    assert metrics["reward/total"] == pytest.approx(sum(totals) / len(totals))
    assert metrics["reward/overlong"] == pytest.approx(sum(part["overlong"] for part in parts) / len(parts))


def test_warnings_come_after_so_many_steps_in_a_row_and_name_causes():
    alarm = Alarm(3)
    dead = {"group/frac_mixed": 0.0, "frac_truncated": 0.5}
    assert [len(alarm(dead, 0.0)) for _ in range(7)] == [0, 0, 1, 0, 0, 1, 0]
    assert alarm({"group/frac_mixed": 0.1, "frac_truncated": 0.95}, 0.0) == []
    assert [len(alarm(dead, 0.0)) for _ in range(2)] == [0, 0]  # starts over
    alarm = Alarm(3, alarm.state["alarm"])  # a resume goes on counting
    (warning,) = alarm(dead, 0.0)
    assert warning.startswith("WARNING: for 3 steps no group had rewards that differ") and "samples.jsonl" in warning
    alarm = Alarm(1)
    (warning,) = alarm({"group/frac_mixed": 1.0, "frac_truncated": 0.91}, 0.0)
    assert "over 90%" in warning and "EOS" in warning


def test_groups_that_are_nearly_equal_are_said_once():
    """Over a resume too, and after a break; a checkpoint of before has two counts."""
    alarm, fine = Alarm(2, [0, 0]), {"group/frac_mixed": 0.3, "frac_truncated": 0.0}
    assert alarm(fine, 0.7) == alarm(fine, 0.5) == alarm(fine, 0.7) == []
    (warning,) = alarm(fine, 0.7)
    assert warning.startswith("WARNING: for 2 steps most groups had rewards that differ by no more than group.tol")
    assert "\n" not in warning
    assert [alarm(fine, share) for share in (0.7, 0.7, 0.0, 0.7, 0.7)] == [[]] * 5
    alarm = Alarm(2, alarm.state["alarm"])
    assert [alarm(fine, 0.7) for _ in range(5)] == [[]] * 5


def test_a_hundredth_of_a_second_is_no_signal():
    """By hand: of 8 answers to a span of 18 s seven end at 9 s, one at 9.01 s. IoUs 1/2 and 9.01/18 differ by 0.00056.

    Half of that is in the total: d = 0.000278, and the standard deviation d / sqrt(8) = 0.0000982. The advantage of
    the one would be 7/8 d / (d / sqrt(8) + 1e-6) = 2.45. Half a second more earns one, and the largest that there is.
    """
    totals = {}
    for end in (9.01, 9.5):
        sample = Sample("a", "tvg", "", "When?", duration=30.0, segments=((0.0, 18.0),))
        answers = [f"<answer>0 to {end if i == 0 else 9}</answer>" for i in range(8)]
        cfg = GrpoConfig(prompt=PromptConfig(think=False), data=DataConfig(batch_size=1))
        totals[end] = torch.tensor([[score(answer, sample, cfg).total for answer in answers]])
    assert totals[9.01][0, 0] - totals[9.01][0, 1] == pytest.approx(0.000278, abs=1e-6)
    assert group_advantages(totals[9.01])[0, 0].item() == pytest.approx(2.45, abs=0.01)
    for end, alive in ((9.01, 0), (9.5, 1)):
        rewards = rewards_of(totals[end])
        assert choose_groups(rewards, cfg).advantages_NG[0, 0].item() == pytest.approx(2.47 * alive, abs=0.01)
        assert frac_nearly_equal(rewards, cfg) == 1 - alive


def test_a_sample_that_is_twice_in_a_batch_is_sampled_anew(world, tmp_path):
    """Three samples, batches of four: the one that comes again has other completions."""
    entry = f'json_path: {world}/tvg_train.jsonl, data_folder: {world}/videos, sampling_strategy: "first:3"'
    (tmp_path / "three.yaml").write_text(f"datasets: [{{{entry}}}]\n")
    train_grpo.train(make_cfg(world, tmp_path, f"data.train={tmp_path}/three.yaml", "run.steps=1"))
    rows = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert len(rows) == 4 and len({row["id"] for row in rows}) == 3
    assert len({tuple(row["completions"]) for row in rows}) == 4
