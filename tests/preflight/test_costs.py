"""What a device holds under each engine, by hand, and what a step takes of it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import REPO, folder_size, make_cfg, sft_cfg
from transformers import AutoConfig, AutoTokenizer

import config
import train_grpo
from preflight.costs import Case, Launch, read_launch
from preflight.dryrun import Device, meta_policy
from preflight.lengths import Length, RoughTokenizer

ACCELERATE = REPO / "configs" / "accelerate"
MODEL_3B = REPO / "configs" / "models" / "Qwen" / "Qwen2.5-VL-3B-Instruct"
N = 3_754_622_976  # parameters of the published Qwen2.5-VL-3B
LENGTH = Length(10, (2, 8, 8), 32, 8, 0)
DEVICE = Device(1e12, 1e12, 1e-5, "cuda", (8, 0))
PATCHES = 2 * 8 * 8 * 1176 * 4  # bytes of its video: float32, 3 x 2 x 14 x 14 numbers a patch


def recipe(launch: Launch, *overrides: str) -> Case:
    cfg = config.load(config.GrpoConfig, [str(REPO / "configs/grpo_qwen2_5_vl_3b_charades.yaml")], list(overrides))
    policy = meta_policy(cfg.model, AutoConfig.from_pretrained(MODEL_3B), RoughTokenizer(151665))
    return Case(cfg, launch, policy, LENGTH, 16, 16, DEVICE)


def tiny_case(world, cfg, launch: Launch | None = None) -> Case:
    policy = meta_policy(cfg.model, *(kind.from_pretrained(world / "model") for kind in (AutoConfig, AutoTokenizer)))
    return Case(cfg, launch or Launch(), policy, LENGTH, 6, 6, DEVICE)


def test_the_3b_model_has_the_published_number_of_parameters():
    """Counted by hand from its layers: 36 of 77,076,992, 32 of the tower of 19,702,200, merger, embeddings."""
    embeddings, tower = 151936 * 2048 + 2048, 32 * 19_702_200 + 1_505_280 + 36_708_608
    case = recipe(Launch(8, 2))
    assert sum(p.numel() for p in case.policy.parameters()) == N == embeddings + 36 * 77_076_992 + tower
    assert sum(p.numel() for p in case.policy.model.model.visual.parameters()) == tower
    assert all(p.requires_grad and p.itemsize == 2 for p in case.policy.parameters())


ENGINES = {
    Launch(8, 2): {"weights": 2 * N, "gradients": N // 2, "optimizer": 12 * N // 8, "buffers": 10**9},
    Launch(8, 3): {"weights": N // 4, "gradients": N // 2, "optimizer": 12 * N // 8, "buffers": 3 * 10**9},
    Launch(8, 3, True): {"weights": N // 4, "gradients": 0, "optimizer": 0, "buffers": 3 * 10**9},
    Launch(8, 3, True, True): {"weights": 0, "gradients": 0, "optimizer": 0, "buffers": 3 * 10**9},
    Launch(8, 3, bucket=10, live=20): {"weights": N // 4, "gradients": N // 2, "optimizer": 12 * N // 8, "buffers": 60},
    Launch(1, 2): {"weights": 2 * N, "gradients": 4 * N, "optimizer": 12 * N, "buffers": 10**9},
}


@pytest.mark.parametrize("launch", ENGINES, ids=str)
def test_what_deepspeed_holds_of_the_3b_model(launch):
    case, expected = recipe(launch), ENGINES[launch]
    assert case.resident == expected | {"reference": expected["weights"]}
    assert recipe(launch, "loss.beta=0").resident["reference"] == 0
    offloaded = 2 * N * launch.offload_params + 16 * N * launch.offload_optimizer
    assert case.host == offloaded // 8


@pytest.mark.parametrize(
    ("launch", "overrides", "expected"),
    [
        (Launch(8, 2), (), 14 * N),  # bfloat16 weights, and AdamW's two averages and weights in float32
        (Launch(8, 3), (), 12 * N),
        (Launch(8, 3, True, True), (), 12 * N),  # what is on the host is saved as well
        (Launch(8, 2), ("model.freeze_vision=true",), 2 * N + 12 * (N - 668_684_288)),
        (Launch(8, 3), ("model.freeze_vision=true",), 2 * 668_684_288 + 12 * (N - 668_684_288)),
    ],
    ids=str,
)
def test_a_checkpoint_of_the_3b_model(launch, overrides, expected):
    assert recipe(launch, *overrides).checkpoint == expected


@pytest.mark.parametrize("overrides", [(), ("model.lora_rank=4",), ("optim.muon_lr=0.01",)], ids=str)
def test_a_checkpoint_takes_the_bytes_that_are_planned(world, tmp_path, overrides):
    """But for a few kilobytes of random states, lists and the file formats. Sharded ones: test_faults.py."""
    cfg = make_cfg(world, tmp_path, "run.steps=1", "group.skip_dead=false", "loss.entropy=0.01", *overrides)
    planned = tiny_case(world, cfg).checkpoint
    train_grpo.train(cfg)
    assert planned == pytest.approx(folder_size(tmp_path / "run" / "checkpoints" / "step_000001"), rel=0.02)


def test_decoding_runs_until_the_longest_ends(world, tmp_path):
    """Four times the tokens in the longest completion take four times the decoding, by hand: a step is launches alone.

    Two ways that agree: FLOPs of the sampler, which sees no past, and seconds. The update is of the mean.
    """
    cfg = make_cfg(world, tmp_path, "rollout.max_new_tokens=64")
    short, tail, long = (
        replace(tiny_case(world, cfg), num_new=mean, num_decoded=longest).run.phases
        for mean, longest in ((16, 16), (16, 64), (64, 64))
    )
    assert tail["decode"].seconds == pytest.approx(4 * short["decode"].seconds, rel=1e-3)
    assert tail["sampler"].flops == 4 * short["sampler"].flops
    assert (tail["decode"], tail["sampler"]) == (long["decode"], long["sampler"])
    for name in ("vision", "prefill", "forward", "head", "backward"):
        assert tail[name].flops == short[name].flops and tail[name].seconds == short[name].seconds, name
    assert long["forward"].flops > 1.5 * short["forward"].flops


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_holds_what_the_table_says(stage):
    """Two real processes: weights, gradients and optimizer of a small model, before and after a step."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(REPO / "tests" / "zero_memory.py"), str(stage)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    n, bucket = found["num"], 2 * found["bucket"]  # bytes
    if stage == 2:  # gradients are gone after a step, the bucket after each backward pass
        before, after = 2 * n + 4 * n // 2 + 12 * n // 2, 2 * n + 12 * n // 2
    else:
        before = after = 2 * n // 2 + 4 * n // 2 + 12 * n // 2 + bucket
    assert found["before_step"] == pytest.approx(before, rel=0.01)
    assert found["after_step"] == pytest.approx(after, rel=0.01)


def test_what_one_process_and_ddp_hold(world, tmp_path):
    """Float32, AdamW: 4 bytes of weight and gradient, 8 of state; DDP copies gradients into its buckets."""
    cfg = make_cfg(world, tmp_path, "model.freeze_vision=false", "loss.beta=0.1")
    one, two = tiny_case(world, cfg), tiny_case(world, cfg, Launch(2))
    size = sum(p.numel() for p in one.policy.parameters())
    expected = {"weights": 4 * size, "reference": 4 * size, "gradients": 4 * size, "optimizer": 8 * size, "buffers": 0}
    assert one.resident == expected
    assert two.resident == expected | {"buffers": 4 * size}
    adapters = tiny_case(world, make_cfg(world, tmp_path, "model.lora_rank=4", "loss.beta=0.1"))
    trained = sum(p.numel() for p in adapters.policy.parameters() if p.requires_grad)
    assert 0 < trained < size / 10
    assert adapters.resident["gradients"] * 2 == adapters.resident["optimizer"] == 8 * trained
    assert adapters.resident["reference"] == 0  # it is the model without them


def test_a_phase_adds_to_what_is_held_meanwhile(world, tmp_path):
    """Gradients are there once the second micro-batch begins, and under ZeRO-3 always; sampling has whole weights."""
    cfg = make_cfg(world, tmp_path, "data.micro_batch_size=2", "model.freeze_vision=false", "loss.beta=0.1")
    case = tiny_case(world, cfg)
    held, phases = case.resident, case.run.phases
    still = held["weights"] + held["reference"] + held["optimizer"]
    assert case.totals["decode"] == still + phases["decode"].peak
    assert case.totals["backward"] == still + held["gradients"] + phases["backward"].peak
    sharded = tiny_case(world, cfg, Launch(2, 3))
    held, whole = sharded.resident, sum(p.nbytes for p in sharded.policy.parameters())
    assert sharded.totals["decode"] == sum(held.values()) + whole + sharded.run.phases["decode"].peak
    assert sharded.totals["backward"] == sum(held.values()) + sharded.run.phases["backward"].peak
    assert case.peak == max(case.totals.items(), key=lambda item: item[1])


def test_gradients_of_a_single_micro_batch_come_as_activations_go(world, tmp_path):
    """They are counted once, in the pass that makes them."""
    cfg = make_cfg(world, tmp_path, "data.micro_batch_size=4", "model.freeze_vision=false")
    case = tiny_case(world, cfg)
    assert (
        case.keeps_gradients
        and not tiny_case(world, replace(cfg, data=replace(cfg.data, micro_batch_size=2))).keeps_gradients
    )
    held = case.resident
    assert (
        case.totals["backward"]
        == held["weights"] + held["optimizer"] + case.run.phases["backward"].peak + held["reference"]
    )
    assert case.run.phases["backward"].peak > held["gradients"]


def test_repeats_count_for_flops_and_not_for_memory(world, tmp_path):
    """A step has 4 videos: in one or in 4 micro-batches the same FLOPs but for what does not depend on them.

    The patches of all 4 are held either way.
    """
    whole, cut = (
        tiny_case(world, make_cfg(world, tmp_path, f"data.micro_batch_size={n}", f"rollout.micro_batch_size={n}"))
        for n in (4, 1)
    )
    for name in ("decode", "forward", "head", "backward"):
        a, b = whole.run.phases[name], cut.run.phases[name]
        assert a.flops == pytest.approx(b.flops, rel=0.01), name
        assert a.peak - 4 * PATCHES > 1.5 * (b.peak - 4 * PATCHES), name
    mu = tiny_case(world, make_cfg(world, tmp_path, "loss.updates_per_rollout=3", "loss.beta=0.1"))
    one = tiny_case(world, make_cfg(world, tmp_path, "loss.beta=0.1"))
    assert mu.run.phases["backward"].flops == pytest.approx(3 * one.run.phases["backward"].flops)
    assert mu.run.phases["reference"].flops == pytest.approx(one.run.phases["reference"].flops)


def test_flops_of_the_update_are_three_forwards(world, tmp_path):
    """2 FLOPs a weight and token forward, twice that backward, once more with checkpoints; attention is small here."""
    case = tiny_case(world, make_cfg(world, tmp_path))
    layers = sum(p.numel() for name, p in case.policy.model.model.language_model.named_parameters() if "layers" in name)
    num_tokens = 4 * (LENGTH.prompt + 4 * 6)  # 4 videos, 4 completions of 6
    assert case.run.phases["forward"].flops == pytest.approx(2 * layers * num_tokens, rel=0.1)
    assert case.run.phases["backward"].flops == pytest.approx(2 * case.run.phases["forward"].flops, rel=0.1)
    again = tiny_case(world, make_cfg(world, tmp_path, "model.gradient_checkpointing=true")).run.phases
    assert again["backward"].flops == pytest.approx(3 * case.run.phases["forward"].flops, rel=0.1)
    assert again["head"].held < case.run.phases["head"].held / 3


def test_supervised_tuning_samples_nothing(world, tmp_path):
    run = tiny_case(world, sft_cfg(world, tmp_path)).run
    assert list(run.phases) == ["forward", "head", "backward", "optimizer"] and run.cache == 0


def test_validation_is_a_phase_of_its_own(world, tmp_path):
    """Its batch is not that of a step: 32 prompts at a time can take more than training."""
    few, many = (
        tiny_case(world, make_cfg(world, tmp_path, "data.validation=x", f"eval.batch_size={n}")).run.phases[
            "validation"
        ]
        for n in (2, 32)
    )
    assert many.peak > 8 * few.peak and many.flops == 0
    assert "validation" not in tiny_case(world, make_cfg(world, tmp_path)).run.phases


@pytest.mark.parametrize("refills", [0, 2])
def test_the_patches_of_a_step_are_held_from_its_first_phase_to_its_last(world, tmp_path, refills):
    """Of 4 videos, and of as many in every round of refilling; the tower's batch of the first round is a copy."""
    words = (f"group.max_refills={refills}", "loss.beta=0.1", "data.validation=x", "eval.batch_size=2")
    phases = tiny_case(world, make_cfg(world, tmp_path, *words)).run.phases
    step = 4 * (1 + refills) * PATCHES
    assert phases["vision"].held == phases["validation"].held == phases["optimizer"].held == step
    assert phases["vision"].peak > step + 4 * PATCHES and phases["validation"].peak > step + 2 * 2 * PATCHES
    assert all(phase.peak > step and phase.held >= step for phase in phases.values())
    tuned = tiny_case(world, sft_cfg(world, tmp_path)).run.phases
    assert tuned["forward"].held == 4 * PATCHES and all(phase.held >= 4 * PATCHES for phase in tuned.values())


def test_every_accelerate_file_can_be_read():
    found = {path.name: read_launch(str(path)) for path in ACCELERATE.glob("*.yaml")}
    assert found["ddp.yaml"] == Launch(8) and found["cpu2.yaml"] == Launch(2)
    assert found["zero2.yaml"] == Launch(8, 2) and found["zero3.yaml"] == Launch(8, 3)
    assert str(Launch()) == "one process" and str(Launch(8, 3, True)) == "ZeRO-3, 8 processes, optimizer on the host"


def test_a_deepspeed_file_is_read(tmp_path):
    own = {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "reduce_bucket_size": 1e7,
        "stage3_max_live_parameters": "auto",
    }
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": own}))
    section = f"deepspeed_config: {{deepspeed_config_file: {tmp_path}/ds.json}}"
    text = f"distributed_type: DEEPSPEED\nnum_processes: 4\n{section}\n"
    (tmp_path / "a.yaml").write_text(text)
    assert read_launch(str(tmp_path / "a.yaml")) == Launch(4, 3, True, bucket=10**7)


def test_the_launchers_environment_is_read(monkeypatch):
    assert read_launch() == Launch()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert read_launch() == Launch(4)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    assert read_launch() == Launch(4, 3, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distributed_type: FSDP\nnum_processes: 2\n", "distributed_type FSDP is not planned for"),
        ("distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stage: 1}\n", "ZeRO-1 is not planned"),
        ("distributed_type: MULTI_GPU\nnum_processes: -1\n", "num_processes is -1"),
        ("distributed_type: [\n", "not a configuration of accelerate"),
        ("- 1\n", "not a configuration of accelerate"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\nnonsense: 1\n", "nonsense"),
    ],
)
def test_a_bad_accelerate_file_is_named(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_launch(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_accelerate_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml not found"):
        read_launch(str(tmp_path / "nowhere.yaml"))
