"""Adapters: what they train, the reference without them, and their folders.

The adapters' B is 0 at the start; `strong_policy` makes it random, or any two models would be equal.
"""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import REPO, make_policy, make_prompts
from safetensors.torch import load_file, save_file
from test_policy import assert_same_gradients, completions_for, gradients, repeated_logps
from transformers import AutoModelForImageTextToText, AutoTokenizer

import config
from config import RolloutConfig
from model import folder
from model.folder import save_model
from policy import load_policy, pack, packed_logps
from rollout import generate
from video.budget import read_geometry

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lora_merger": True}
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
MERGER = ["model.visual.merger.mlp.0", "model.visual.merger.mlp.2"]


def source(world, family):
    return str(world / ("model" if family == "qwen2_5_vl" else "model_qwen2_vl"))


def strong_policy(world, family="qwen2_5_vl", seed=0, **model):
    """A policy with adapters far from 0."""
    policy = make_policy(world, family, **({"sharpen": 1.0} | LORA | model))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return policy


def packed_for(world, policy, num_groups=3):
    prompts = make_prompts(world, policy)
    return pack(prompts, completions_for(prompts, num_groups), policy.model.config, "cpu")


def trained(policy):
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("merger", [False, True])
def test_only_the_adapters_are_trained(world, family, merger, dtype):
    policy = make_policy(world, family, dtype=dtype, **LORA | {"lora_merger": merger})
    num_layers = policy.model.config.text_config.num_hidden_layers
    modules = [f"model.language_model.layers.{i}.{linear}" for i in range(num_layers) for linear in LINEARS]
    modules += MERGER if merger else []
    ours = trained(policy)
    assert ours.keys() == {f"model.{module}.lora_{ab}.default.weight" for module in modules for ab in "AB"}
    assert {p.dtype for p in ours.values()} == {torch.float32}
    assert policy.vision_is_frozen == (not merger)
    assert len(policy.state_dict()) == len(policy.model.state_dict())  # peft's wrapper is not in it a second time


def test_without_lora_nothing_changes(world):
    policy = make_policy(world)
    assert policy.adapter is None and policy.vision_is_frozen
    assert not make_policy(world, freeze_vision=False).vision_is_frozen
    packed = packed_for(world, policy)
    with policy.adapter_off():
        off = policy(packed)[0]
    assert torch.equal(off, policy(packed)[0]) and off.requires_grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_start_is_exactly_the_base_and_random_by_the_seed(world, family, dtype):
    policies = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        policies.append(make_policy(world, family, dtype=dtype, **LORA))
    packed = packed_for(world, policies[0])
    assert torch.equal(policies[0](packed)[0], make_policy(world, family, dtype=dtype)(packed)[0])
    first, again, other = (trained(policy) for policy in policies)
    assert all(torch.equal(p, again[name]) for name, p in first.items())
    assert all(torch.equal(p, other[name]) == ("lora_B" in name) for name, p in first.items())


def test_the_policy_without_its_adapter_is_a_separately_loaded_reference(world, family):
    """The merger is trained too, so the reference needs a pass of its own through tower and merger."""
    policy, reference = strong_policy(world, family), make_policy(world, family, sharpen=1.0)
    packed = packed_for(world, policy)
    before, expected = policy(packed), reference(packed)
    with torch.no_grad(), policy.adapter_off():
        off, embeds = policy(packed), policy.embed_each(packed.prompts)
        assert not policy.vision_is_frozen
    for ours, theirs in zip(off, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert (before[0] - expected[0]).abs().mean() > 0.1
    difference = torch.cat(policy.embed_each(packed.prompts)) - torch.cat(embeds)
    assert difference.abs().mean() > 0.1 * torch.cat(embeds).abs().mean()
    names = trained(policy).keys()
    with pytest.raises(KeyError), policy.adapter_off():
        raise KeyError
    assert torch.equal(policy(packed)[0], before[0]) and trained(policy).keys() == names


@torch.no_grad()
def test_sampled_equals_scored(world, family):
    policy = strong_policy(world, family)
    gap = sampled_gap(world, policy, seed=0)
    assert gap.max() < 1e-5


@torch.no_grad()
def test_sampled_is_close_to_scored_in_bfloat16(world, family):
    """Measured over 12 seeds of both families, 140 tokens each: at most 0.023, on average 0.0025 (float32: 4e-6)."""
    gaps = [sampled_gap(world, strong_policy(world, family, seed, dtype="bfloat16"), seed) for seed in range(3)]
    assert max(gap.max() for gap in gaps) < 0.06 and torch.cat(gaps).mean() < 0.005


def sampled_gap(world, policy, seed):
    """|sampled - scored| log-prob of each token of 8 completions of 3 prompts, which the adapter has changed."""
    prompts = make_prompts(world, policy)
    rollout = generate(policy, prompts, policy.embed_each(prompts), RolloutConfig(8, 1.0, 6, 8), seed)
    packed = pack(prompts, rollout.completions, policy.model.config, "cpu")
    scored_BT = packed_logps(policy, packed, None, rollout.mask_BT.shape[1])[0]
    with policy.adapter_off():
        base_BT = packed_logps(policy, packed, None, rollout.mask_BT.shape[1])[0]
    assert scored_BT.dtype == rollout.logps_BT.dtype == torch.float32
    assert (scored_BT - base_BT).abs()[rollout.mask_BT].mean() > 0.1
    return (scored_BT - rollout.logps_BT).abs()[rollout.mask_BT]


def test_gradients_equal_those_of_the_repeated_prompt_and_under_checkpointing(world, family):
    policy = strong_policy(world, family)
    packed = packed_for(world, policy)
    completions = completions_for(packed.prompts)
    weights = torch.randn(len(packed.targets_N), generator=torch.Generator().manual_seed(1))
    logps, repeated = policy(packed)[0], repeated_logps(policy, packed.prompts, completions)
    torch.testing.assert_close(logps, repeated, atol=1e-5, rtol=0)
    expected = gradients(policy, repeated, weights)
    assert expected.keys() == trained(policy).keys() and all(grad.abs().max() > 0 for grad in expected.values())
    assert_same_gradients(gradients(policy, logps, weights), expected)
    checkpointed = strong_policy(world, family, gradient_checkpointing=True).train()
    with torch.no_grad(), checkpointed.adapter_off():
        checkpointed(packed)  # the reference's pass, as in a training step
    assert_same_gradients(gradients(checkpointed, checkpointed(packed)[0], weights), expected)


def test_gradients_in_bfloat16_are_finite_and_near_those_in_float32(world, family):
    low, high = strong_policy(world, family, dtype="bfloat16"), strong_policy(world, family)
    packed = packed_for(world, low)
    weights = torch.ones(len(packed.targets_N))
    theirs = gradients(high, high(packed)[0], weights)
    for name, grad in gradients(low, low(packed, entropy_grad=True)[0], weights).items():
        assert grad.dtype == torch.float32 and torch.isfinite(grad).all()
        assert torch.cosine_similarity(grad.flatten(), theirs[name].flatten(), dim=0) > 0.99, name


def test_an_adapter_folder_is_small_and_loads_as_the_model_it_was(world, family, tmp_path):
    """Merging adds A and B to the weights, not their output to the layer's: measured 6e-7 of a log-prob, in float32."""
    policy, base = strong_policy(world, family), source(world, family)
    save_model(policy.model, policy.adapter, tmp_path / "final", base)
    files = {file.name: file.stat().st_size for file in (tmp_path / "final").iterdir()}
    full = {file.name: file.stat().st_size for file in (world / "model").iterdir()}
    side_files = full.keys() - {"config.json", "model.safetensors"}
    assert files.keys() == side_files | {"adapter_config.json", "adapter_model.safetensors"}
    assert files["adapter_model.safetensors"] < 0.1 * full["model.safetensors"]
    assert json.loads((tmp_path / "final" / "adapter_config.json").read_text())["base_model_name_or_path"] == base

    loaded = load_policy(config.ModelConfig(path=str(tmp_path / "final"))).eval()
    packed = packed_for(world, policy)
    torch.testing.assert_close(loaded(packed)[0], policy(packed)[0], atol=1e-6, rtol=1e-6)
    plain = load_policy(config.ModelConfig(path=base))
    assert trained(loaded).keys() == trained(plain).keys() and loaded.adapter is None
    assert loaded.tokenizer.get_vocab() == plain.tokenizer.get_vocab() and loaded.eos_ids == plain.eos_ids
    assert read_geometry(str(tmp_path / "final")) == read_geometry(base)
    assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template == plain.tokenizer.chat_template


def test_transformers_loads_an_adapter_folder_too(world, family, tmp_path):
    """It takes a folder with a config.json for a full model, so there is none."""
    policy = strong_policy(world, family)
    save_model(policy.model, policy.adapter, tmp_path / "final", source(world, family))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, policy.model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_the_merged_folder_is_a_full_model_with_the_same_logits(world, family, tmp_path, monkeypatch):
    """Measured over 6 seeds: logits differ by 1.6e-6 of the largest. The command once ended with a NameError."""
    policy, base = strong_policy(world, family), world / source(world, family)
    save_model(policy.model, policy.adapter, tmp_path / "final", str(base))
    monkeypatch.setattr("sys.argv", ["folder", "merge", str(tmp_path / "final"), str(tmp_path / "merged")])
    runpy.run_path(str(REPO / "model" / "folder.py"), run_name="__main__")  # as `python -m model.folder`
    files = {file.name: file for file in (tmp_path / "merged").iterdir()}
    assert files.keys() == {file.name for file in base.iterdir()}
    assert all(files[f.name].read_bytes() == f.read_bytes() for f in base.iterdir() if f.suffix != ".safetensors")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert not any("lora" in name for name in model.state_dict())
    prompt = make_prompts(world, policy, num=1)[0]
    grid = torch.tensor([prompt.video.grid_thw])
    inputs = {"input_ids": torch.tensor([prompt.ids]), "pixel_values_videos": prompt.video.patches}
    is_video = inputs["input_ids"] == model.config.video_token_id
    inputs |= {"video_grid_thw": grid, "mm_token_type_ids": 2 * is_video}
    ours, theirs = policy.model(**inputs).logits, model(**inputs).logits
    assert (ours - theirs).abs().max() < 5e-6 * ours.abs().max()
    plain = load_policy(config.ModelConfig(path=str(base))).model(**inputs).logits
    assert (ours - plain).abs().max() > 0.1 * ours.abs().max()


def test_an_adapter_on_an_adapter_and_a_full_training_run_on_one(world, tmp_path):
    """The second adapter names the first one's folder as its base; a model trained in full needs neither."""
    base, first, second = source(world, "qwen2_5_vl"), tmp_path / "first", tmp_path / "second"
    policy = strong_policy(world)
    save_model(policy.model, policy.adapter, first, base)
    policy = load_policy(config.ModelConfig(path=str(first), **LORA)).eval()
    with torch.no_grad():
        for name, p in trained(policy).items():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    packed = packed_for(world, policy)
    save_model(policy.model, policy.adapter, second, str(first))
    assert {file.name for file in first.iterdir()} == {file.name for file in second.iterdir()}
    loaded = load_policy(config.ModelConfig(path=str(second))).eval()
    torch.testing.assert_close(loaded(packed)[0], policy(packed)[0], atol=1e-6, rtol=1e-6)
    save_model(loaded.model, loaded.adapter, tmp_path / "full", str(second))
    shutil.rmtree(first)
    again = load_policy(config.ModelConfig(path=str(tmp_path / "full"))).eval()
    assert torch.equal(again(packed)[0], loaded(packed)[0])
    with pytest.raises(ValueError, match=r"model.path .*second, an adapter of .*first"):
        load_policy(config.ModelConfig(path=str(second)))


def test_accelerate_saves_and_restores_adapters(world, tmp_path):
    accelerator = Accelerator(cpu=True)
    policy = strong_policy(world)
    packed = packed_for(world, policy)
    prepared, optimizer = accelerator.prepare(policy, torch.optim.AdamW(trained(policy).values(), lr=1e-2))
    accelerator.backward(prepared(packed)[0].sum())
    optimizer.step()
    accelerator.save_state(str(tmp_path / "state"))
    expected = policy(packed)[0]
    with torch.no_grad():
        for p in trained(policy).values():
            p.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(policy(packed)[0], expected)


def error_of(call, *args) -> str:
    with pytest.raises((ValueError, SystemExit)) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def load(folder):
    return load_policy(config.ModelConfig(path=str(folder)))


def test_merging_names_what_is_wrong(world, tmp_path):
    base, adapter, out = source(world, "qwen2_5_vl"), str(tmp_path / "final"), str(tmp_path / "out")
    policy = strong_policy(world)
    save_model(policy.model, policy.adapter, adapter, base)
    text = error_of(folder.main, ["merge", base, out])
    assert text == f"error: {base} is no adapter folder: it has no adapter_config.json"
    assert error_of(folder.main, ["merge", adapter, base]) == f"error: {base} exists; give another folder"
    change_settings(adapter, base_model_name_or_path=f"{tmp_path}/gone")
    text = error_of(folder.main, ["merge", adapter, out])
    assert text.startswith(f"error: model.path {adapter}, an adapter of {tmp_path}/gone: ")
    assert not (tmp_path / "out").exists()


def change_settings(adapter, **changes):
    file = Path(adapter, "adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_loading_an_adapter_names_what_is_wrong(world, tmp_path):
    adapter = tmp_path / "final"
    policy = strong_policy(world)
    save_model(policy.model, policy.adapter, adapter, source(world, "qwen2_5_vl"))
    weights = load_file(adapter / "adapter_model.safetensors")
    first, tensor = next(iter(weights.items()))
    rest = {name: tensor for name, tensor in weights.items() if name != first}
    for changed, expected in (
        (rest, "missing or unknown.*down_proj.lora_A"),
        (weights | {f"{first}.more": tensor.clone()}, "missing or unknown.*down_proj.lora_A.*more"),
        (rest | {first: tensor[:, :-1].contiguous()}, "size mismatch for .*down_proj.lora_A"),
    ):
        save_file(changed, adapter / "adapter_model.safetensors")
        assert re.search(f"^model.path .*final, an adapter of .*world/model: .*{expected}", error_of(load, adapter))
    change_settings(adapter, base_model_name_or_path=None)
    assert error_of(load, adapter).endswith("adapter_config.json has no base_model_name_or_path")


def test_a_relative_base_counts_from_the_working_folder(world, tmp_path, monkeypatch):
    policy = strong_policy(world)
    save_model(policy.model, policy.adapter, tmp_path / "final", source(world, "qwen2_5_vl"))
    change_settings(tmp_path / "final", base_model_name_or_path="./model")
    monkeypatch.chdir(world)
    load(tmp_path / "final")
    monkeypatch.chdir(tmp_path)
    assert error_of(load, tmp_path / "final").startswith(f"model.path {tmp_path}/final, an adapter of ./model: ")
