"""A model folder that we write is an ordinary one, and evaluation sees what training sees.

Not tested: what needs torchvision, which its wheels do not offer for the CPU build of torch. `AutoProcessor`, and with
it lmms-eval, does not load without it, from our folders and from those of the base alike.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import REPO, make_cfg, make_prompts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import config
import eval as evaluation
import groups
import tiny
import train_grpo
import train_sft
from metrics import predictions
from model.folder import save_model
from model.positions import rope_positions
from policy import load_policy, pack, prompt_positions
from video.budget import seen_step

MROPE = json.loads((REPO / "tests" / "golden" / "mrope.json").read_text())
FOLDERS = {"qwen2_5_vl": "model", "qwen2_vl": "model_qwen2_vl"}

# ---- what the model is asked ---------------------------------------------------------------------------------------


def write_records(world, folder) -> str:
    """Two records of each task, of clips of several lengths, each with a response to imitate."""
    lines = []
    for task in ("tvg", "mcqa", "gqa"):
        for line in (world / f"{task}_train.jsonl").read_text().splitlines()[:8:5]:
            lines.append(json.dumps(json.loads(line) | {"response": "<think>so</think><answer>A</answer>"}))
    (folder / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "mixed.yaml").write_text(f"datasets: [{{json_path: mixed.jsonl, data_folder: {world}/videos}}]")
    return str(folder / "mixed.yaml")


def record_prompts(monkeypatch, module, name: str) -> dict:
    """By sample id, the prompts that `module` hands to its function `name`, which still does its work."""
    seen, call = {}, getattr(module, name)

    def recording(*args, **kwargs):
        prompts = args[0] if name == "pack" else args[1]
        seen.update((prompt.sample.id, prompt) for prompt in prompts)
        return call(*args, **kwargs)

    monkeypatch.setattr(module, name, recording)
    return seen


@pytest.mark.parametrize("think", [True, False])
def test_training_and_evaluation_ask_the_same_of_the_same_sample(world, tmp_path, monkeypatch, think):
    """Whole loops, with the wording and the video budget of the files in configs/; frames are cached in training only.

    To the bit: an answer is only comparable if nothing differs that the model gets.
    """
    data = write_records(world, tmp_path)
    common = [f"prompt.think={think}".lower(), f"model.path={world}/model", "model.dtype=float32", "data.workers=0"]
    train = [f"data.train={data}", "data.validation=''", "data.batch_size=6", "run.steps=1", "run.tracker=none"]
    train += [f"data.cache_dir={tmp_path}/cache", "rollout.max_new_tokens=4", "rollout.group_size=2", "loss.beta=0"]
    grpo = [str(REPO / "configs/grpo_qwen2_5_vl_3b_charades.yaml")]
    test = [f"data.test={data}", "data.floor=", "eval.max_new_tokens=4", "eval.batch_size=4"]
    by_grpo = record_prompts(monkeypatch, groups, "generate")
    by_sft = record_prompts(monkeypatch, train_sft, "pack")
    by_eval = record_prompts(monkeypatch, predictions, "generate")
    train_grpo.train(config.load(config.GrpoConfig, grpo, [*common, *train, f"run.dir={tmp_path}/grpo"]))
    in_sft = [override for override in train if not override.startswith(("rollout", "loss"))]
    train_sft.train(config.load(config.SftConfig, [], [*common, *in_sft, f"run.dir={tmp_path}/sft"]))
    file = str(REPO / "configs/eval_charades_sta.yaml")
    evaluation.evaluate(config.load(config.EvalRunConfig, [file], [*common, *test, f"run.dir={tmp_path}/eval"]))

    assert by_grpo.keys() == by_sft.keys() == by_eval.keys()
    assert Counter(prompt.sample.task for prompt in by_eval.values()) == {"tvg": 2, "mcqa": 2, "gqa": 2}
    assert len({prompt.video.grid_thw for prompt in by_eval.values()}) > 1
    for name, theirs in by_eval.items():
        for ours in (by_grpo[name], by_sft[name]):
            assert ours.ids == theirs.ids and ours.video_start == theirs.video_start
            assert torch.equal(ours.video.patches, theirs.video.patches)
            assert ours.video.grid_thw == theirs.video.grid_thw
            assert ours.video.second_per_grid == theirs.video.second_per_grid


# ---- what a run leaves ---------------------------------------------------------------------------------------------

STOCK = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
asked, answered = torch.load(sys.argv[1]), {}
for folder, inputs in asked.items():
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = torch.tensor([tokenizer("When is the red circle visible?").input_ids])
    with torch.no_grad():
        answered[folder] = text, model(input_ids=text).logits, model(**inputs).logits
torch.save(answered, sys.argv[2])
"""


@pytest.fixture(scope="module")
def finals(world, tmp_path_factory) -> dict[str, Path]:
    """Run folder of a short GRPO run of each family, with final/ and best/; an entropy bonus moves the weights."""
    folders = {}
    for family, name in FOLDERS.items():
        folder = tmp_path_factory.mktemp(family)
        moving = ("loss.entropy=1", "group.skip_dead=false", "model.freeze_vision=false", "optim.lr=1e-2")
        best = (f"data.validation={world}/tvg_validation.yaml", "eval.every=1", "eval.num_samples=2")
        cfg = make_cfg(world, folder, f"model.path={world}/{name}", *moving, *best)
        folders[family] = train_grpo.train(cfg).dir
    return folders


def names_in(folder) -> Counter:
    """How often each tensor name stands in a folder's weight files."""
    names = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    return names


def assert_ordinary(folder, base, dtype=torch.float32):
    """The base's files byte for byte, its names of tensors, and nothing besides."""
    is_weight = ("*.safetensors", "*.safetensors.index.json")
    ours, theirs = (
        {path.name: path.read_bytes() for path in where.iterdir() if not any(fnmatch(path.name, w) for w in is_weight)}
        for where in (folder, base)
    )
    assert ours == theirs
    assert names_in(folder) == names_in(base) and set(names_in(folder).values()) == {1}
    for path in folder.glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}


def test_stock_transformers_gives_the_logits_of_our_policy(world, finals, tmp_path):
    """In a process of its own that has none of our code, on text and on video; there with our positions, given."""
    asked, ours = {}, {}
    for run in finals.values():
        policy = load_policy(config.ModelConfig(path=str(run / "final"))).eval()
        (prompt,), completion = make_prompts(world, policy, num=1), [5, 6, 7, 8]
        packed = pack([prompt], [[completion]], policy.model.config, "cpu")
        inputs = {"input_ids": packed.ids_S[None], "position_ids": packed.positions_3S[:, None]}
        inputs |= {"pixel_values_videos": prompt.video.patches, "video_grid_thw": torch.tensor([prompt.video.grid_thw])}
        asked[str(run / "final")], ours[str(run / "final")] = inputs, (policy, packed)
    torch.save(asked, tmp_path / "asked.pt")
    script = [sys.executable, "-I", "-c", STOCK, str(tmp_path / "asked.pt"), str(tmp_path / "answered.pt")]
    subprocess.run(script, cwd=tmp_path, check=True, capture_output=True)
    for folder, (text, on_text, on_video) in torch.load(tmp_path / "answered.pt").items():
        policy, packed = ours[folder]
        with torch.no_grad():
            torch.testing.assert_close(policy.model(input_ids=text).logits, on_text, atol=1e-5, rtol=1e-5)
            logps_NV = policy.log_softmax(on_video[0, packed.predictor_N])
            theirs = logps_NV.gather(1, packed.targets_N[:, None]).squeeze(1)
            torch.testing.assert_close(policy(packed)[0], theirs, atol=1e-5, rtol=0)


def test_final_and_best_of_a_run_have_the_files_and_names_of_the_base(world, family, finals):
    base = world / FOLDERS[family]
    for part in ("final", "best"):
        assert_ordinary(finals[family] / part, base)
    moved, start = load_file(finals[family] / "final/model.safetensors"), load_file(base / "model.safetensors")
    assert sum(not torch.equal(moved[name], start[name]) for name in start) > 0.9 * len(start)


def test_so_has_the_final_model_of_supervised_tuning(world, sft_run):
    assert_ordinary(sft_run / "final", world / "model")


def test_the_processor_needs_torchvision_whoever_wrote_the_folder(world, finals):
    """With it (tried by hand: 0.28.0) AutoProcessor loads our folders, chat template included."""
    if importlib.util.find_spec("torchvision"):
        assert AutoProcessor.from_pretrained(finals["qwen2_5_vl"] / "final").chat_template
        return
    for folder in (world / "model", finals["qwen2_5_vl"] / "final"):
        with pytest.raises(ImportError, match=r"[Tt]orchvision"):
            AutoProcessor.from_pretrained(folder)


# ---- bases of every layout -----------------------------------------------------------------------------------------

LAYOUTS = ("released", "version 5", "renamed", "sharded", "untied", "bfloat16")


def make_base(world, family: str, layout: str, out: Path) -> Path:
    """The tiny model as another folder holds it.

    released: names and config.json of version 4, side files that we read none of; version 5: the config.json that
    transformers 5 writes; renamed: the names that it has in memory. Tied embeddings are stored once, but for `untied`.
    """
    shutil.copytree(world / FOLDERS[family], out)
    weights = load_file(out / "model.safetensors")
    whole = json.loads((out / "config.json").read_text())
    if layout == "version 5":
        AutoConfig.from_pretrained(out).save_pretrained(out)
        whole = json.loads((out / "config.json").read_text())
    if layout == "renamed":
        inside = {re.sub(r"^model\.", "model.language_model.", name): tensor for name, tensor in weights.items()}
        weights = {re.sub(r"^visual\.", "model.visual.", name): tensor for name, tensor in inside.items()}
    if layout == "untied":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
        whole["tie_word_embeddings"] = False
    if layout == "bfloat16":
        weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
        whole["torch_dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(whole, indent=4))
    (out / "chat_template.json").write_text(json.dumps({"chat_template": (out / "chat_template.jinja").read_text()}))
    for name in ("merges.txt", "README.md", "LICENSE"):
        (out / name).write_text(f"{name} of the base\n")
    parts = {"model.safetensors": list(weights)}
    if layout == "sharded":
        (out / "model.safetensors").unlink()
        parts = {f"model-0000{i + 1}-of-00003.safetensors": list(weights)[i::3] for i in range(3)}
        places = {name: file for file, names in parts.items() for name in names}
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, out / file, metadata={"format": "pt"})
    return out


def moved_policy(base, **model):
    """A policy loaded from `base` whose every weight has changed."""
    policy = load_policy(config.ModelConfig(path=str(base), **model))
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.25)
    return policy


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_files_are_those_of_the_base_whatever_its_layout(world, family, layout, tmp_path):
    """vLLM and lmms-eval with transformers 4 read the released names and config; 5 has others in memory."""
    base = make_base(world, family, layout, tmp_path / "base")
    dtype = "bfloat16" if layout == "bfloat16" else "float32"
    policy = moved_policy(base, dtype=dtype)
    save_model(policy.model, policy.adapter, tmp_path / "out", str(base))
    assert_ordinary(tmp_path / "out", base, getattr(torch, dtype))
    assert ("lm_head.weight" in names_in(tmp_path / "out")) == (layout == "untied")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()  # one file holds it all
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=dtype)
    expected = policy.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.config.tie_word_embeddings == (layout != "untied")


KEYS = set(json.loads((REPO / "configs/models/Qwen/Qwen2.5-VL-3B-Instruct/config.json").read_text()))


def test_the_config_of_the_tiny_model_has_the_form_of_the_released_ones(world, family):
    """transformers 4.57.6 found no rope_scaling in the section text_config that version 5 writes, and failed in the
    first forward pass of a checkpoint of the tiny world."""
    whole = json.loads((world / FOLDERS[family] / "config.json").read_text())
    assert KEYS - whole.keys() <= {"vision_token_id", "sliding_window"}
    assert not {"text_config", "rope_parameters", "layer_types", "dtype"} & whole.keys()
    assert whole["rope_scaling"] == {"type": "mrope", "mrope_section": [8, 4, 4]} and whole["rope_theta"] == 1000
    assert "rope_parameters" not in whole["vision_config"]
    read = AutoConfig.from_pretrained(world / FOLDERS[family])
    built = tiny.build_model(AutoTokenizer.from_pretrained(world / FOLDERS[family]).get_vocab(), 0, family).config
    for ours, theirs in ((read.text_config, built.text_config), (read.vision_config, built.vision_config)):
        ours, theirs = ours.to_dict() | {"dtype": None}, theirs.to_dict()
        ours["rope_parameters"].pop("type", None)  # version 4's name of rope_type, which stands beside it
        assert ours == theirs


def test_the_other_form_of_the_tiny_model_is_the_tiny_model(world, family, tmp_path):
    """Else the tests above would say nothing of the checkpoints that transformers 5 writes."""
    base = make_base(world, family, "version 5", tmp_path / "base")
    assert "rope_parameters" in json.loads((base / "config.json").read_text())["text_config"]
    ours, theirs = (load_policy(config.ModelConfig(path=str(path))) for path in (base, world / FOLDERS[family]))
    prompts = make_prompts(world, ours)
    packed = pack(prompts, [[[1, 2, 3]]] * len(prompts), ours.model.config, "cpu")
    assert torch.equal(ours(packed)[0], theirs(packed)[0])


def test_shards_of_ours_come_with_an_index_of_ours(world, tmp_path):
    """A model past 50 GB is saved in several files; the base's index must not stand beside them."""
    base = make_base(world, "qwen2_5_vl", "sharded", tmp_path / "base")
    policy = moved_policy(base)
    policy.model.save_pretrained = partial(policy.model.save_pretrained, max_shard_size="1MB")
    save_model(policy.model, policy.adapter, tmp_path / "out", str(base))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3 and shards == sorted(set(index.values()))
    assert index == {name: file for file in shards for name in load_file(tmp_path / "out" / file)}
    assert_ordinary(tmp_path / "out", base)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")


def test_of_a_hub_id_every_side_file_is_carried(world, tmp_path, monkeypatch):
    """Only what transformers reads itself was in its cache: chat_template.json was lost, and without it a processor
    of the saved folder has no chat template (lmms-eval and others ask it for one)."""
    base = make_base(world, "qwen2_5_vl", "released", tmp_path / "base")
    repository = tmp_path / "hub" / "models--tiny--world"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(base, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    later = ("chat_template.json", "merges.txt", "README.md", "LICENSE")
    for name in later:
        (snapshot / name).unlink()

    def download(repo_id, ignore_patterns):
        assert repo_id == "tiny/world"
        for path in base.iterdir():
            if not any(fnmatch(path.name, pattern) for pattern in ignore_patterns):
                shutil.copyfile(path, snapshot / path.name)
        assert not any(fnmatch(name, pattern) for name in later for pattern in ignore_patterns)
        assert any(fnmatch("model.safetensors", pattern) for pattern in ignore_patterns)
        return str(snapshot)

    monkeypatch.setattr("model.folder.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    policy = moved_policy("tiny/world")
    assert all((snapshot / name).exists() for name in later)  # before training, not when it is over
    save_model(policy.model, policy.adapter, tmp_path / "out", "tiny/world")
    assert_ordinary(tmp_path / "out", base)


# ---- transformers' own positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FOLDERS)
def test_transformers_still_puts_the_text_after_a_long_video_on_the_video(world, family):
    """From 5.3 on, text goes on after the video's larger side, however long it lasts (tests/golden/mrope.json has
    what the checkpoints were trained with). When this fails, upstream has mended it: take README.md's and docs/'s
    warnings back."""
    model = AutoModelForImageTextToText.from_pretrained(world / FOLDERS[family]).model
    num_wrong = 0
    for case in (case for case in MROPE if case["family"] == family):
        segments, kinds, steps, lasts = [], [], [], False
        for segment in case["segments"]:
            if "text" in segment:
                segments.append(segment["text"])
                kinds += [0] * segment["text"]
                continue
            t, h, w = segment["video"]
            steps.append(seen_step(segment.get("second_per_grid_ts", 1.0), "whole_seconds"))
            segments.append((t, h, w, steps[-1]))
            kinds += [2] * (t * h * w // 4)
            lasts |= (t - 1) * steps[-1] * (case["tokens_per_second"] or 1) >= max(h, w) // 2
        ours, _ = rope_positions(segments, case["spatial_merge_size"], case["tokens_per_second"])
        assert ours.tolist() == case["position_ids"]

        kinds_1L = torch.tensor([kinds])
        grids_N3 = torch.tensor([segment[:3] for segment in segments if isinstance(segment, tuple)])
        more = {"second_per_grid_ts": torch.tensor(steps)} if family == "qwen2_5_vl" else {}
        model.config.vision_config.tokens_per_second = case["tokens_per_second"]
        ids_1L = torch.zeros_like(kinds_1L)  # the kinds say which are video
        theirs, _ = model.get_rope_index(ids_1L, mm_token_type_ids=kinds_1L, video_grid_thw=grids_N3, **more)
        assert (theirs[:, 0].tolist() == case["position_ids"]) != lasts
        num_wrong += lasts
    assert num_wrong >= 6


@pytest.mark.parametrize("family", FOLDERS)
def test_without_our_positions_stock_transformers_gives_other_logits_on_a_video(world, family):
    """What the README warns of: the same weights and pixels, the positions of transformers in place of ours."""
    policy = load_policy(config.ModelConfig(path=str(world / FOLDERS[family]))).eval()
    prompt = make_prompts(world, policy, num=1)[0]
    positions, after = prompt_positions(prompt, policy.model.config)
    ids = torch.tensor([prompt.ids])
    is_video = ids == policy.model.config.video_token_id
    inputs = {"input_ids": ids, "pixel_values_videos": prompt.video.patches, "mm_token_type_ids": 2 * is_video}
    inputs |= {"video_grid_thw": torch.tensor([prompt.video.grid_thw])}
    inputs |= {"second_per_grid_ts": torch.tensor([prompt.video.second_per_grid])}
    stock = AutoModelForImageTextToText.from_pretrained(world / FOLDERS[family]).eval()
    with torch.no_grad():
        ours, theirs = stock(**inputs, position_ids=positions[:, None]).logits, stock(**inputs).logits
    assert int(stock.model.rope_deltas) + len(prompt.ids) < after  # the answer would start too early
    before = prompt.video_start + prompt.video.num_tokens
    torch.testing.assert_close(ours[0, :before], theirs[0, :before], atol=1e-5, rtol=1e-5)
    assert (ours[0, before:] - theirs[0, before:]).abs().max() > 1e-3
