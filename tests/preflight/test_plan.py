"""`--plan` as a user types it: the recipe on its annotations, supervised tuning, what does not fit, bad input."""

import gzip
import shutil

import pytest
from conftest import REPO, SHARED, make_cfg, sft_cfg

import config
import convert
import train_grpo
import train_sft
from config import GrpoConfig
from preflight import plan
from preflight.costs import Launch
from preflight.plan import GIB
from runtime.arguments import PlanConfig, from_command_line

N = 3_754_622_976  # parameters of the published Qwen2.5-VL-3B
RECIPE = str(REPO / "configs" / "grpo_qwen2_5_vl_3b_charades.yaml")
ZERO2 = str(REPO / "configs" / "accelerate" / "zero2.yaml")
CHARADES = SHARED / "data" / "annotations" / "charades_sta"


@pytest.fixture(scope="module")
def tiny_plan(world, tmp_path_factory):
    cfg = make_cfg(world, tmp_path_factory.mktemp("plan"), "loss.beta=0.1", "data.micro_batch_size=2")
    return plan.plan(cfg, PlanConfig(completion_tokens=3, longest_tokens=5))


def test_a_plan_of_the_tiny_world(tiny_plan):
    tokens, mean, longest = tiny_plan.tokens, tiny_plan.mean, tiny_plan.longest
    assert tiny_plan.num_samples > 10
    assert tokens["completion"] == (1, 3, 6, 6)
    assert (mean.num_new, mean.num_decoded, longest.num_new, longest.num_decoded) == (3, 5, 6, 6)
    for i in range(4):
        assert tokens["row"][i] == tokens["prompt"][i] + 4 * tokens["completion"][i]
        assert tokens["prompt"][i] > tokens["video"][i] > 0
    parameters = longest.parameters
    assert parameters["total"] == parameters["vision"] + parameters["text"]
    assert parameters["trained"] == parameters["text"]  # the tower is frozen
    assert all(phase.peak >= mean.run.phases[name].peak for name, phase in longest.run.phases.items())


def test_decoding_is_as_long_as_the_longest_completion(world, tmp_path):
    """Today's seconds took all completions as equally long. By default the longest has all tokens that it may have."""
    cfg = make_cfg(world, tmp_path, "rollout.max_new_tokens=64")
    equal, tail, default = (
        plan.plan(cfg, PlanConfig(completion_tokens=8, longest_tokens=longest)) for longest in (8, 32, 0)
    )
    assert [found.mean.num_decoded for found in (equal, tail, default)] == [8, 32, 64]
    expected = equal.mean.run.phases
    for found, times in ((tail, 4), (default, 8)):
        phases = found.mean.run.phases
        assert phases["decode"].seconds == pytest.approx(times * expected["decode"].seconds, rel=1e-3)
        assert phases["backward"] == expected["backward"] and ", 128 tokens sampled" in plan.report(found)
        assert found.longest.run.phases == equal.longest.run.phases  # of memory nothing is new
    with pytest.raises(ValueError, match=r"plan\.longest_tokens=7 is below the mean, plan\.completion_tokens=8"):
        PlanConfig(completion_tokens=8, longest_tokens=7)


def test_a_card_without_fused_attention_in_bfloat16_needs_more(world, tmp_path):
    """What the kernel takes is decided as training decides it; in float32 both cards have one."""
    lora = ("model.lora_rank=4", "model.dtype=bfloat16", "rollout.max_new_tokens=64")
    for overrides, cards_differ in ((lora, True), (lora[2:], False)):
        cfg = make_cfg(world, tmp_path, *overrides)
        ampere, turing = (plan.plan(cfg, PlanConfig(capability=card)).longest.totals for card in (8.0, 7.5))
        assert (turing["backward"] > 1.1 * ampere["backward"]) == cards_differ
    with pytest.raises(ValueError, match=r"plan.capability must be above 0"):
        PlanConfig(capability=0)
    with pytest.raises(ValueError, match=r"plan.capability must be below 20, .* got 80"):
        PlanConfig(capability=80)


def test_the_report_says_it_all(tiny_plan):
    longest, text = tiny_plan.longest, plan.report(tiny_plan)
    words = ("tokens", "p95", "fits in 80 GiB\n", "KV cache", "48 tokens sampled")
    for word in (*longest.resident, *longest.run.phases, *words):
        assert word in text, word
    assert f"parameters: total {longest.parameters['total']:,}" in text
    assert f"{tiny_plan.num_samples} records: {tiny_plan.num_samples / 4:.1f} steps an epoch" in text
    seconds = sum(phase.seconds for phase in tiny_plan.mean.run.phases.values())
    assert f"a step: {seconds:.3g} s at " in text
    assert (
        "with 3 tokens a completion in the update (the mean, plan.completion_tokens) and 5 in decoding (the longest"
        in text
    )
    size = longest.checkpoint / 1e9
    assert f"disk: {size:.3g} GB a checkpoint, {3 * size:.3g} GB while one is written" in text


def test_what_does_not_fit_is_said_with_its_phase_and_by_how_much(world, tmp_path):
    found = plan.plan(make_cfg(world, tmp_path, "data.micro_batch_size=4"), PlanConfig(memory_gib=2.001))
    phase, size = found.longest.peak
    text, missing = plan.report(found), size / GIB + 2 - 2.001
    assert f" GiB in phase {phase}, " in text
    assert f": DOES NOT FIT in 2.001 GiB, {missing:.3g} GiB are missing\n" in text


@pytest.mark.slow
def test_bfloat16_without_an_engine_is_planned_under_deepspeed(tmp_path):
    found = plan.plan(recipe(tmp_path, "rollout.max_new_tokens=16"), PlanConfig(memory_gib=40.0))
    assert found.longest.launch == Launch(1, 2) and "ZeRO-2 on one process is assumed" in found.notes[0]
    assert "DOES NOT FIT in 40 GiB" in plan.report(found)


def recipe(tmp_path, *overrides: str, durations=(10.0, 30.0)) -> GrpoConfig:
    """The recipe on a few records without files."""
    lines = [
        f'{{"id": "{i}", "task": "tvg", "video": "{i}.mp4", "duration": {d}, "question": "q", "segments": [[1, 2]]}}\n'
        for i, d in enumerate(durations)
    ]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    return config.load(GrpoConfig, [RECIPE], [f"data.train={tmp_path}/data.jsonl", *overrides])


@pytest.mark.slow
@pytest.mark.skipif(not CHARADES.is_dir(), reason="needs the annotations in ../shared/data")
def test_the_recipe_on_charades_sta(tmp_path, capsys):
    """No network, no weights, no video; everything as typed but for where the records lie."""
    (tmp_path / "charades.json").write_bytes(gzip.decompress((CHARADES / "charades.json.gz").read_bytes()))
    source = ["charades_sta", "--annotations", str(CHARADES / "charades_sta_train.txt")]
    convert.main([*source, "--durations", str(tmp_path / "charades.json"), "--out", str(tmp_path / "train.jsonl")])
    capsys.readouterr()
    words = ["--config", RECIPE, f"data.train={tmp_path}/train.jsonl", "--plan", ZERO2, "plan.completion_tokens=110"]
    train_grpo.main([*words, "plan.longest_tokens=500"])
    text = capsys.readouterr().out
    assert "parameters: total 3,754,622,976, vision 668,684,288" in text and "12,408 records" in text
    assert "775.5 steps an epoch" in text and "fits in 80 GiB" in text and "14,080 tokens sampled" in text
    assert "disk: 52.6 GB a checkpoint, 158 GB while one is written" in text
    cfg = config.load(GrpoConfig, [RECIPE], [f"data.train={tmp_path}/train.jsonl"])
    found = plan.plan(cfg, PlanConfig(engine=ZERO2))
    assert found.longest.parameters["total"] == N and found.tokens["video"][3] <= 2048
    assert found.longest.resident["weights"] == pytest.approx(2 * N, rel=0.01)
    assert found.longest.resident["optimizer"] == pytest.approx(12 * N / 8, rel=0.01)
    # 36 layers, keys and values of 2 x 128 numbers of 2 bytes; 2 prompts, 16 completions of 2,048 tokens
    assert found.longest.run.cache == 36 * 2 * 256 * 2 * (2 * (found.tokens["prompt"][3] - 1) + 16 * 2048)


def test_supervised_tuning_is_planned_with_its_targets(world, tmp_path, capsys):
    cfg = sft_cfg(world, tmp_path)
    (tmp_path / "sft.yaml").write_text(config.to_yaml(cfg))
    assert train_sft.main(["--config", str(tmp_path / "sft.yaml"), "--plan"]) is None
    text = capsys.readouterr().out
    assert "forward" in text and not [word for word in ("decode", "KV cache", "sampled") if word in text]
    found = plan.plan(cfg, target_text=lambda sample: train_sft.target_text(sample, False))
    low, mean, _, high = found.tokens["completion"]
    assert 2 < low <= mean <= high < 40 and found.longest.num_new == high
    assert not (tmp_path / "run").exists()


def test_the_command_line(world, tmp_path, capsys):
    """A file after --plan is accelerate's, an override is an override; nothing is trained or written."""
    cfg = make_cfg(world, tmp_path)
    (tmp_path / "a.yaml").write_text(config.to_yaml(cfg))
    words = ["--config", str(tmp_path / "a.yaml")]
    ddp = str(REPO / "configs" / "accelerate" / "ddp.yaml")
    train_grpo.main([*words, "--plan", ddp, "data.batch_size=8", "plan.memory_gib=24"])
    text = capsys.readouterr().out
    assert "DDP, 8 processes; 8 videos a step" in text and "fits in 24 GiB" in text
    assert not (tmp_path / "run").exists()
    _, _, assumed = from_command_line(GrpoConfig, [*words, "--plan", "loss.beta=0.0"], "", "")
    assert assumed == PlanConfig()
    cfg, _, assumed = from_command_line(GrpoConfig, ["plan.tflops=3", "--plan", "loss.beta=0.5"], "", words[1])
    assert (cfg.loss.beta, assumed.tflops) == (0.5, 3.0)
    assert from_command_line(GrpoConfig, words, "", "")[2] is None


def test_only_the_main_process_prints(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    plan.show(make_cfg(world, tmp_path), PlanConfig())
    assert capsys.readouterr().out == ""


def error_of(words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        train_grpo.main(words)
    assert capsys.readouterr().out == ""
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_bad_input_ends_with_one_line(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPO)
    cfg = make_cfg(world, tmp_path)
    (tmp_path / "a.yaml").write_text(config.to_yaml(cfg))
    words = ["--config", str(tmp_path / "a.yaml"), "--plan"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    for override, message in {
        f"model.path={tmp_path}/empty": "no config.json to plan with",
        f"model.path={tmp_path}/llama": "family llama is not one of",
        "data.train=nowhere.yaml": "data file nowhere.yaml not found",
        "plan.tflop=3": "unknown key plan.tflop; did you mean plan.tflops?",
        "plan.memory_gib=0": "plan.memory_gib must be above 0",
        "model.dtype=bfloat16 plan.engine=configs/accelerate/ddp.yaml": "or under DeepSpeed, not under DDP",
        "optim.muon_lr=0.1 plan.engine=configs/accelerate/zero2.yaml data.batch_size=8": "needs whole matrices",
        "plan.engine=configs/accelerate/ddp.yaml": "data.batch_size 4 does not divide by the 8 processes",
        "plan.engine=nowhere.yaml": "accelerate configuration nowhere.yaml not found",
    }.items():
        assert message in error_of([*words, *override.split()], capsys)
    with pytest.raises(SystemExit, match=r"'plan\.tflops=3' is for --plan"):
        train_grpo.main([*words[:2], "plan.tflops=3"])


def test_a_folder_with_a_config_alone_will_do(world, tmp_path):
    """Without its tokenizer texts are estimated, which is said; the plan is within a tenth of the exact one."""
    (tmp_path / "model").mkdir()
    shutil.copy(world / "model" / "config.json", tmp_path / "model")
    cfg = make_cfg(world, tmp_path)
    exact, rough = plan.plan(cfg), plan.plan(make_cfg(world, tmp_path, f"model.path={tmp_path}/model"))
    assert exact.tokens["video"] == rough.tokens["video"]
    assert "4 characters a token" in rough.notes[0] and "characters" not in exact.notes[0]
    assert rough.longest.peak[1] == pytest.approx(exact.longest.peak[1], rel=0.1)


def test_a_model_of_the_recipes_needs_no_network(tmp_path):
    """Its published config.json is here: 3,754,622,976 parameters."""
    case = plan.plan(recipe(tmp_path, "rollout.max_new_tokens=8", "data.batch_size=2")).longest
    assert case.parameters["total"] == N
    assert case.resident["weights"] / GIB == pytest.approx(6.99, abs=0.01)
