"""The start-up self-check: silent on good models, a named failure for each that is spoiled, and no trace in a run."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REPO, make_cfg, make_policy, metrics_of, open_run, read_jsonl, sft_cfg, weights_of, write_data
from cuda_kernels import as_it_was, emulate

import config
import eval as evaluation
import rollout
import select_data
import train_grpo
import train_sft
from data import make_reader
from model import attention
from model.positions import rope_positions
from policy import Policy, load_policy
from preflight import selfcheck
from records import files

TEXT = b"this is no video\n" * 100
LORA = {"lora_rank": 4, "lora_alpha": 8.0}


def check(world, tmp_path, policy, reference=None, train="", total_pixels=None) -> None:
    """`check_model` on the first sample of a data set; it may draw nothing random."""
    cfg = make_cfg(world, tmp_path, "run.self_check=true", f"data.train={train or f'{world}/tvg_train.yaml'}")
    samples, run = files.read_samples(cfg.data.train), open_run(cfg)
    reader = make_reader(cfg, policy.tokenizer, policy.device)
    if total_pixels:
        cfg = replace(cfg, video=replace(cfg.video, total_pixels=total_pixels))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with reader.workers:
        selfcheck.check_model(policy, reference, samples, reader, cfg, run)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def failures(*args, **kwargs) -> list[str]:
    """What `check` finds, one text for each thing that is wrong."""
    with pytest.raises(ValueError) as error:
        check(*args, **kwargs)
    first, *found = str(error.value).split("\n- ")
    assert first == "the start-up self-check failed (run.self_check=false switches it off):"
    assert all("Usual causes: " in text and text.endswith(".") for text in found)
    return found


def spoiled_folder(world, tmp_path, **changes):
    """A copy of the model with other values in its vision_config; None: without the key."""
    folder = shutil.copytree(world / "model", tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    content["vision_config"] |= changes
    for key in [key for key, value in changes.items() if value is None]:
        del content["vision_config"][key]
    (folder / "config.json").write_text(json.dumps(content))
    return folder


# ---- good models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, lora", [("float32", {}), ("bfloat16", LORA | {"lora_merger": True})])
def test_a_good_model_passes(world, tmp_path, capsys, family, dtype, lora):
    policy = make_policy(world, family, dtype=dtype, **lora).train()
    check(world, tmp_path, policy, policy if lora else make_policy(world, family, dtype=dtype))
    line = capsys.readouterr().out
    assert line.startswith("self-check: 7 checks in ") and line.count("\n") == 1 and "reference = policy" in line
    assert policy.training and policy.model.model.rope_deltas is None


def test_an_untrained_model_passes(world, tmp_path, family):
    """Its distributions are not sharpened here: a model that knows nothing sees the video all the same."""
    check(world, tmp_path, make_policy(world, family, sharpen=1.0))


def test_a_trained_model_passes(world, tmp_path, sft_run):
    check(world, tmp_path, load_policy(config.ModelConfig(path=str(sft_run / "final"))))


def test_a_model_that_is_sure_of_its_answer_is_not_called_blind(world, tmp_path):
    """Its own completions have log-prob 0 whatever the video shows; the prompt's text as a completion has not."""
    policy = make_policy(world)
    bias = torch.zeros(policy.model.config.text_config.vocab_size)
    bias[policy.eos_ids[0]] = 100.0
    policy.model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    check(world, tmp_path, policy)


# ---- what the kernels of attention read --------------------------------------------------------------------------


@pytest.mark.parametrize("kernel, dtype", [("flash", "float32"), ("flash", "bfloat16"), ("efficient", "float32")])
def test_a_good_model_passes_with_the_kernels_of_a_gpu(world, tmp_path, monkeypatch, kernel, dtype):
    emulated = emulate(monkeypatch, kernel)
    check(world, tmp_path, make_policy(world, dtype=dtype))
    assert emulated.calls[f"{kernel}_backward"] == 2  # of the check alone: the model is only scored


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_gradients_of_a_kernel_are_named(world, tmp_path, monkeypatch, dtype):
    """Without this check a run of 30 steps ended with exit code 0, a small log-prob gap and worthless weights."""
    emulate(monkeypatch, "flash")
    monkeypatch.setattr(attention, "attend_backward", as_it_was)
    (text,) = failures(world, tmp_path, make_policy(world, dtype=dtype))
    assert text.startswith("gradients of attention: on cpu, with ") and " 4 completions of 1 to 6, the packed" in text
    num_prompt = len(first_prompt_of(world, tmp_path).ids)
    assert f"with {num_prompt} prompt tokens and" in text and num_prompt > 20
    assert "gradient of query" in text and "gradient of key" in text and "values" not in text
    assert f"{dtype} allows " in text and "benchmarks/gpu.py" in text


def first_prompt_of(world, tmp_path):
    cfg = make_cfg(world, tmp_path)
    reader = make_reader(cfg, make_policy(world).tokenizer, "cpu")
    return next(reader.ahead(files.read_samples(cfg.data.train), 0))


def test_a_gradient_that_is_no_number_is_named(world, tmp_path, monkeypatch):
    """The defect gives NaN at the shapes of released models, and a comparison with NaN is never true."""
    errors = {"values": 1e-7, "gradient of query": 1e-7, "gradient of key": float("nan"), "gradient of value": 1e-7}
    monkeypatch.setattr("preflight.kernelcheck.attention_errors", lambda *_: errors)
    (text,) = failures(world, tmp_path, make_policy(world))
    assert "float32 allows 0.0001: gradient of key nan. Usual" in text


def test_attention_is_tried_in_the_shapes_of_the_run(world, tmp_path):
    def lengths(size: int, longest: int) -> list[int]:
        overrides = f"rollout.group_size={size}", f"rollout.max_new_tokens={longest}"
        return selfcheck.ragged_lengths(make_cfg(world, tmp_path, *overrides))

    assert lengths(4, 10) == [1, 4, 7, 10] and lengths(2, 4) == [1, 4] and lengths(16, 2048)[::7] == [1, 150]
    assert len(lengths(16, 2048)) == 8 and selfcheck.ragged_lengths(sft_cfg(world, tmp_path)) == [1, 150]


def test_wrong_gradients_end_a_run_before_its_first_step(world, tmp_path, monkeypatch):
    emulate(monkeypatch, "flash")
    monkeypatch.setattr(attention, "attend_backward", as_it_was)
    with pytest.raises(SystemExit, match=r"^error: the start-up self-check failed .*\n- gradients of attention: "):
        train_grpo.train(make_cfg(world, tmp_path, "run.self_check=true"))
    assert not (tmp_path / "run/metrics.jsonl").exists()
    monkeypatch.undo()
    train_grpo.train(make_cfg(world, tmp_path, "run.self_check=true"))
    assert len(metrics_of(tmp_path / "run")) == 2


def test_what_a_kernel_returns_for_another_row_is_seen(world, tmp_path, monkeypatch):
    """Values too, though sampled and scored log-probs would agree on them."""
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args: tuple(x.roll(1, 2) for x in attend(*args)))
    first, *_ = failures(world, tmp_path, make_policy(world))
    assert first.startswith("gradients of attention: ") and "values" in first


# ---- spoiled ones --------------------------------------------------------------------------------------------------


def test_a_config_without_tokens_per_second_is_named(world, tmp_path):
    """transformers fills in 4 positions a second, where every released model was trained with 2."""
    folder = spoiled_folder(world, tmp_path, tokens_per_second=None)
    (text,) = failures(world, tmp_path, load_policy(config.ModelConfig(path=str(folder))))
    assert text.startswith("rotary positions: a video of 3 x 4 x 4 patches, 1.5 s a step, after 2 tokens of text has ")
    assert (
        "has time [2, 8, 14], height [2, 3], width [2, 3], text at 15; in the released qwen2_5_vl time [2, 5, 8], "
        in text
    )
    assert "text at 9. " in text and "than 2 (here 4; 4 where the key is missing)" in text


def test_the_positions_of_newer_transformers_are_refused(world, tmp_path, family, monkeypatch):
    """They let the text start after the larger side of the grid, however many time steps there are."""

    def newer(segments, merge_size, tokens_per_second):
        before, (t, h, w, _), after = segments
        positions, _ = rope_positions(segments, merge_size, tokens_per_second)
        start = before + max(h, w) // merge_size
        positions[:, before + t * h * w // merge_size**2 :] = start + torch.arange(after)
        return positions, start + after

    monkeypatch.setattr("policy.rope_positions", newer)
    (text,) = failures(world, tmp_path, make_policy(world, family))
    assert text.startswith("rotary positions: ") and "text at 4; " in text


def test_files_of_different_models_in_one_folder_are_named(world, tmp_path, family):
    policy = make_policy(world, family)
    whole, text, vision = policy.model.config, policy.model.config.text_config, policy.model.config.vision_config
    for section, key, value, expected in (
        (whole, "video_token_id", 7, "video_token_id 7 (473 expected)"),
        (whole, "image_token_id", 7, "image_token_id 7 (472 expected)"),
        (vision, "patch_size", 16, "patch_size 16 (14 expected)"),
        (vision, "temporal_patch_size", 1, "temporal_patch_size 1 (2 expected)"),
        (vision, "spatial_merge_size", 1, "spatial_merge_size 1 (2 expected)"),
        (text, "hidden_size", 512, "mrope_section [8, 4, 4] ([16, 24, 24] expected)"),
    ):
        before = getattr(section, key)
        setattr(section, key, value)
        first, *rest = failures(world, tmp_path, policy)
        setattr(section, key, before)
        assert first.startswith(f"model folder: config.json has {expected}, ")
        assert [line.partition(":")[0] for line in rest] == ["rotary positions"] * (key == "spatial_merge_size")
    check(world, tmp_path, policy)


def test_token_counts_that_differ_are_named(world, tmp_path, monkeypatch):
    policy, embed_videos = make_policy(world), Policy.embed_videos
    (text,) = failures(world, tmp_path, policy, total_pixels=1600)
    assert text.startswith("token counts: ") and ", of 2 at most (video.total_pixels)" in text
    monkeypatch.setattr(Policy, "embed_videos", lambda policy, prompts: embed_videos(policy, prompts)[1:])
    (text,) = failures(world, tmp_path, policy)
    num = int(text.partition(" video placeholders")[0].split()[-1])
    assert f"{num} video placeholders in its prompt, {num - 1} embeddings" in text and f"{num} planned" in text


@pytest.mark.parametrize("dtype, factor", [("float32", 1.002), ("bfloat16", 1.5)])
def test_a_sampler_with_other_log_probs_is_named(world, tmp_path, family, monkeypatch, dtype, factor):
    """As with a temperature, or a repetition penalty, that the scoring knows nothing of."""
    sample = rollout.GumbelSampler.__call__
    monkeypatch.setattr(rollout.GumbelSampler, "__call__", lambda self, ids, scores: sample(self, ids, scores * factor))
    (text,) = failures(world, tmp_path, make_policy(world, family, dtype=dtype))
    assert text.startswith("sampled = scored: log-probs of ") and f"{dtype} allows " in text


def test_decoding_at_other_positions_is_named(world, tmp_path, family, monkeypatch):
    left_pad = rollout._left_pad

    def shifted(*args):
        *rest, deltas = left_pad(*args)
        return *rest, deltas + 8

    monkeypatch.setattr(rollout, "_left_pad", shifted)
    (text,) = failures(world, tmp_path, make_policy(world, family))
    assert text.startswith("sampled = scored: ")


@pytest.mark.parametrize("num_used, unused", [(0, "time, height, width"), (1, "height, width")])
def test_positions_that_the_model_does_not_use_are_named(world, tmp_path, family, num_used, unused):
    """It counts tokens instead, or takes the first axis for all three."""
    policy = make_policy(world, family)
    rotary = policy.model.model.language_model.rotary_emb
    forward = rotary.forward

    def plain(hidden, position_ids):
        used = position_ids[:1] if num_used else torch.arange(hidden.shape[1]).expand(1, len(hidden), -1)
        return forward(hidden, used.expand(3, -1, -1))

    rotary.forward = plain
    found = failures(world, tmp_path, policy)
    assert f"stay exactly as they are when those along {unused} are multiplied by 8" in found[-1]


def test_a_blind_model_is_named(world, tmp_path, family):
    """The vision merger's last layer is 0, as where its weights were never loaded."""
    policy = make_policy(world, family)
    with torch.no_grad():
        for weights in policy.model.model.visual.merger.mlp[2].parameters():
            weights.zero_()
    (text,) = failures(world, tmp_path, policy)
    assert text.startswith("video seen: ") and "change by 0 at most, not by more than 0.001" in text


def test_log_probs_that_are_no_numbers_are_named(world, tmp_path):
    policy = make_policy(world)
    with torch.no_grad():
        policy.model.model.visual.merger.mlp[2].bias.fill_(torch.nan)
    found = failures(world, tmp_path, policy, policy)
    assert [text.partition(":")[0] for text in found] == ["sampled = scored", "video seen", "reference = policy"]


def test_a_reference_that_is_not_the_policy_is_named(world, tmp_path, family):
    policy, reference = make_policy(world, family), make_policy(world, family)
    with torch.no_grad():
        reference.model.model.language_model.layers[0].mlp.down_proj.weight.mul_(1.05)
    (text,) = failures(world, tmp_path, policy, reference)
    assert text.startswith("reference = policy: log-probs of ")


def test_an_adapter_that_does_not_start_at_zero_is_named(world, tmp_path, family):
    policy = make_policy(world, family, **LORA)
    with torch.no_grad():
        for name, weights in policy.named_parameters():
            if "lora_B" in name:
                weights.fill_(0.01)
    (text,) = failures(world, tmp_path, policy, policy)
    assert text.startswith("reference = policy: ")


# ---- in a run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["grpo", "sft"])
def test_a_run_with_the_check_is_the_run_without(world, taught, tmp_path, capsys, loop):
    """Resumed after its updates, it is not compared with the reference again."""
    make, train = (make_cfg, train_grpo.train) if loop == "grpo" else (sft_cfg, train_sft.train)
    on, off = (
        make(world, tmp_path, *taught, "loss.beta=0.1", f"run.dir={tmp_path}/{name}", f"run.self_check={name}")
        for name in ("true", "false")
    )
    train(on)
    assert f"self-check: {7 if loop == 'grpo' else 6} checks in " in capsys.readouterr().out
    train(off)
    assert "self-check" not in capsys.readouterr().out
    folders = [tmp_path / "true", tmp_path / "false"]
    assert metrics_of(folders[0]) == metrics_of(folders[1]) and len(metrics_of(folders[0])) == 2
    if loop == "grpo":
        assert read_jsonl(folders[0] / "samples.jsonl") == read_jsonl(folders[1] / "samples.jsonl")
    ours, theirs = map(weights_of, folders)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    train(on, resume=True)
    assert "self-check: 6 checks in " in capsys.readouterr().out


def test_every_program_ends_before_it_begins(world, tmp_path):
    """And leaves its folder as good as new: the command goes on there with the switch that the message names."""
    folder = spoiled_folder(world, tmp_path, tokens_per_second=25)
    common = [f"model.path={folder}", "data.workers=0", f"data.cache_dir={tmp_path}/cache", "prompt.think=false"]
    records = f"data.train={world}/tvg_train.yaml"
    loop = [records, "data.validation=", "data.batch_size=4", "run.steps=1", "run.tracker=none"]
    sampling = ["rollout.group_size=2", "rollout.max_new_tokens=2"]
    programs = {
        "sft": (train_sft.main, loop),
        "select": (select_data.main, [records, *sampling]),
        "eval": (evaluation.main, ["run", f"data.test={world}/tvg_test.yaml"]),
        "grpo": (train_grpo.main, [*loop, *sampling]),
    }
    for name, (main, words) in programs.items():
        words = [*words, *common, f"run.dir={tmp_path}/{name}"]
        with pytest.raises(SystemExit) as error:
            main(words)
        first, *found = error.value.code.split("\n")
        assert first == "error: the start-up self-check failed (run.self_check=false switches it off):"
        assert len(found) == 1 and found[0].startswith("- rotary positions: ") and "(here 25; " in found[0]
        left = {path.name for path in (tmp_path / name).iterdir()}
        assert not left & {"metrics.jsonl", "metrics.json", "scores.jsonl", "checkpoints"}
    main([*words, "run.self_check=false"])
    assert len(metrics_of(tmp_path / "grpo")) == 1


def test_videos_that_cannot_be_read_are_passed_over(world, tmp_path, capsys):
    policy = make_policy(world)
    check(world, tmp_path, policy, train=write_data(world, tmp_path / "some", 12, dict.fromkeys(range(7), TEXT)))
    assert "self-check: 6 checks in " in capsys.readouterr().out
    check(world, tmp_path, policy, train=write_data(world, tmp_path / "many", 12, dict.fromkeys(range(8), TEXT)))
    out, err = capsys.readouterr()
    assert "self-check: left out, 1 processes found no video to read" in err and "self-check" not in out


# ---- two processes -------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys
sys.path.insert(0, {repo!r})
import torch, rollout, train_grpo
rank, spoil, words = os.environ["RANK"], sys.argv[1], sys.argv[2:]
load, sample = train_grpo.load_policy, rollout.GumbelSampler.__call__
def other_weights(*args):
    policy = load(*args)
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.mul_(1.01)
    return policy
if rank == "1" and spoil == "settings":
    words.append("run.seed=1")
    train_grpo.load_policy = other_weights
if rank == "1" and spoil == "sampler":
    rollout.GumbelSampler.__call__ = lambda self, ids, scores: sample(self, ids, scores * 1.1)
train_grpo.main(words)
"""


def launch(world, tmp_path, spoil: str, *overrides: str) -> subprocess.CompletedProcess:
    """A run in two processes, the second one's spoiled."""
    script, path = tmp_path / "script.py", tmp_path / "config.yaml"
    script.write_text(SCRIPT.format(repo=str(REPO)))
    cfg = make_cfg(world, tmp_path, "loss.beta=0.1", "group.skip_dead=false", "run.self_check=true", *overrides)
    path.write_text(config.to_yaml(cfg))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu2.yaml"]
    command = [*launcher, str(script), spoil, "--config", str(path)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["settings", "sampler"])
def test_all_processes_end_with_what_one_has_found(world, tmp_path, spoil):
    """Neither waits for the other: both say the same."""
    result = launch(world, tmp_path, spoil)
    assert result.returncode != 0 and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert result.stderr.count("error: the start-up self-check failed (run.self_check=false switches it off):") == 2
    found = [line for line in result.stderr.splitlines() if line.startswith("- ")]  # ends may run into each other
    settings = "- processes differ in run.seed (0 on rank 0, 1 on rank 1); weights ("
    start = settings if spoil == "settings" else "- rank 1: sampled = scored: log-probs of "
    assert found and all(line.startswith(start) for line in found)


@pytest.mark.slow
def test_two_processes_with_the_check_are_the_two_without(world, tmp_path):
    for switch in ("true", "false"):
        result = launch(world, tmp_path, "nothing", f"run.dir={tmp_path}/{switch}", f"run.self_check={switch}")
        assert result.returncode == 0, result.stderr[-2000:]
        assert result.stdout.count("self-check: 7 checks in ") == (switch == "true")
    assert metrics_of(tmp_path / "true") == metrics_of(tmp_path / "false")
    assert (tmp_path / "true/samples.jsonl").read_text() == (tmp_path / "false/samples.jsonl").read_text()
