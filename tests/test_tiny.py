"""The tiny world: its bytes, clips, records, tokenizer and model; nothing here trains."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import decord
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tiny.write_world(tmp_path_factory.mktemp("tiny") / "world", seed=0, size="small")


@pytest.fixture(scope="module")
def other_world(tmp_path_factory) -> Path:
    """Another seed and the other family."""
    folder = tmp_path_factory.mktemp("tiny") / "other"
    return tiny.write_world(folder, seed=1, size="small", family="qwen2_vl")


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "model")


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def decode(path: Path) -> tuple[np.ndarray, float]:
    """All frames (F, H, W, 3) and the frame rate."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames), float(container.streams.video[0].average_rate)


def num_pixels(frames: np.ndarray, colour: str) -> np.ndarray:
    """Pixels of each frame that are clearly of the colour, (F,)."""
    red, green, blue = np.moveaxis(frames.astype(int), -1, 0)
    excess = {
        "red": red - np.maximum(green, blue),
        "green": green - np.maximum(red, blue),
        "blue": blue - np.maximum(red, green),
        "yellow": np.minimum(red, green) - blue,
    }[colour]
    return (excess > 70).sum(axis=(1, 2))


# The folder as a whole.


def test_same_arguments_same_bytes(world, tmp_path):
    """Another process writes the same world, file by file."""
    command = [sys.executable, tiny.__file__, "--out", str(tmp_path / "again"), "--size", "small"]
    subprocess.run(command, check=True, capture_output=True)
    assert hashes(tmp_path / "again") == hashes(world)


def test_worker_processes_change_nothing(world, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "PARALLEL_FROM", 2)
    tiny.write_clips([tiny.draw_clip(0, "test", i) for i in range(4)], tmp_path / "videos")
    written = hashes(tmp_path / "videos")
    assert len(written) == 4
    assert written.items() <= hashes(world / "videos").items()


def test_other_seed_other_bytes(world, other_world):
    """Clips, records and weights follow the seed; the tokenizer does not."""
    ours, others = hashes(world), hashes(other_world)
    assert ours.keys() == others.keys()
    same = {name for name in ours if ours[name] == others[name]}
    assert not {name for name in same if name.endswith((".mp4", ".jsonl", ".safetensors"))}
    assert {"model/tokenizer.json", "model/chat_template.jinja", "model/generation_config.json"} <= same


def test_finished_world_is_kept_and_another_replaced(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tiny, "write_model", lambda folder, seed, family: folder.mkdir())
    monkeypatch.setitem(tiny.NUM_CLIPS, "small", (1, 1, 1, 1, 1))
    arguments = ["--out", str(tmp_path / "world"), "--size", "small"]
    tiny.main(arguments)
    marker = tmp_path / "world" / "world.json"
    first = marker.stat().st_mtime_ns
    capsys.readouterr()
    tiny.main(arguments)
    assert marker.stat().st_mtime_ns == first
    assert len(capsys.readouterr().out.splitlines()) == 1
    tiny.main([*arguments, "--seed", "5"])
    assert json.loads(marker.read_text())["seed"] == 5
    monkeypatch.setattr(tiny, "VERSION", tiny.VERSION + 1)
    tiny.main([*arguments, "--seed", "5"])
    assert json.loads(marker.read_text())["version"] == tiny.VERSION
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no tiny world"):
        tiny.write_world(tmp_path, size="small")
    with pytest.raises(SystemExit):
        tiny.main(["--out", str(tmp_path), "--size", "small"])
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(clips, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "write_clips", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny.write_world(tmp_path / "world", size="small")
    assert not list(tmp_path.iterdir())


# Clips.


@pytest.mark.parametrize("split", tiny.SPLITS)
def test_clips_are_read_by_both_readers(world, split):
    for index in range(4):
        clip = tiny.draw_clip(0, split, index)
        path = world / "videos" / clip.name
        frames, fps = decode(path)
        assert frames.shape == (clip.fps * clip.duration, clip.height, clip.width, 3)
        assert fps == clip.fps
        reader = decord.VideoReader(str(path), num_threads=1)
        assert (len(reader), reader.get_avg_fps()) == (len(frames), fps)
        assert np.array_equal(reader.get_batch(range(len(reader))).asnumpy(), frames)


@pytest.mark.parametrize("name", ["tvg_test", "tvg_ood_test"])
def test_colours_are_visible_exactly_when_the_records_say(world, name):
    records = read_jsonl(world / f"{name}.jsonl")
    for video in {record["video"] for record in records}:
        frames, fps = decode(world / "videos" / video)
        time = np.arange(len(frames)) / fps
        spans = {colour: (0, 0) for colour in tiny.COLOURS}
        for record in records:
            if record["video"] == video:
                spans[record["question"].split()[3]] = record["segments"][0]
        for colour, (start, end) in spans.items():
            visible = (time >= start) & (time < end)
            pixels = num_pixels(frames, colour)
            assert (pixels[visible] > 120).all()
            assert (pixels[~visible] < 10).all()


def test_drawn_clips_keep_their_promises():
    """Durations, spans, room between the shapes, balanced colours and seeds, without rendering."""
    for split in ("train", "ood"):
        clips = [tiny.draw_clip(7, split, i) for i in range(240)]
        low, high = (24, 36) if split == "ood" else (8, 24)
        for clip in clips:
            assert low <= clip.duration <= high
            if len(clip.events) == 2:
                first, last = clip.events
                assert last.start - first.start >= 2 and first.colour != last.colour
            for event in clip.events:
                assert 2 <= event.end - event.start <= 8 and 0 <= event.start < event.end <= clip.duration
                centres = np.stack([event.first_centre, event.last_centre])
                assert (centres >= event.radius).all()
                assert (centres + event.radius <= (clip.width, clip.height)).all()
            covered = [np.zeros((clip.height, clip.width), dtype=bool) for _ in range(2)]
            for mask, event in zip(covered, clip.events):
                path = np.linspace(event.first_centre, event.last_centre, 20)
                mask |= tiny.shape_mask(event, path, clip.height, clip.width).any(axis=0)
            assert not (covered[0] & covered[1]).any()
        pairs = [clip.events for clip in clips if len(clip.events) == 2]
        assert len(pairs) == 120
        for k in range(2):
            assert set(Counter(events[k].colour for events in pairs).values()) == {30}
        assert {clip.duration for clip in clips} >= {low, high}
    seeds = [tiny.draw_clip(0, split, i).seed for split in tiny.SPLITS for i in range(50)]
    assert len(set(seeds)) == len(seeds)


def test_splits_share_no_clip(world):
    digests = list(hashes(world / "videos").values())
    assert len(set(digests)) == len(digests) == sum(tiny.NUM_CLIPS["small"])
    sets = {path.stem: {r["video"] for r in read_jsonl(path)} for path in world.glob("*.jsonl")}
    for split in ("train", "validation", "test"):
        assert sets[f"tvg_{split}"] == sets[f"mcqa_{split}"] == sets[f"gqa_{split}"]
    kinds = [sets[name] for name in ("base_train", "tvg_train", "tvg_validation", "tvg_test", "tvg_ood_test")]
    assert sum(map(len, kinds)) == len(set.union(*kinds))


# Records.


def test_records_are_valid(world):
    keys = {"id", "task", "video", "duration", "question"}
    more = {"tvg": {"segments"}, "mcqa": {"options", "answer"}, "gqa": {"options", "answer", "segments"}}
    ids = set()
    for path in world.glob("*.jsonl"):
        for record in read_jsonl(path):
            assert record.keys() == keys | more[record["task"]]
            assert record["id"] not in ids
            ids.add(record["id"])
            assert (world / "videos" / record["video"]).is_file()
            for start, end in record.get("segments", []):
                assert 0 <= start < end <= record["duration"]
            if record["task"] != "tvg":
                assert record["options"] == ["red", "green", "blue", "yellow"]
                assert record["answer"] in "ABCD"
    assert len(ids) == sum(json.loads((world / "world.json").read_text())["records"].values())


def test_answers_are_right_and_balanced(world):
    """First and last colours follow from the grounding records of the same clip."""
    starts = {}
    for record in read_jsonl(world / "tvg_test.jsonl"):
        starts.setdefault(record["video"], []).append((*record["segments"][0], record["question"].split()[3]))
    for task in ("mcqa", "gqa"):
        records = read_jsonl(world / f"{task}_test.jsonl")
        for record in records:
            events = sorted(starts[record["video"]])
            start, end, colour = events[0 if "first" in record["question"] else -1]
            assert record["options"]["ABCD".index(record["answer"])] == colour
            assert task == "mcqa" or record["segments"] == [[start, end]]
        assert len(set(Counter(record["answer"] for record in records).values())) == 1


def test_base_spans_are_coarse(world):
    """Every span of the base data is within 3 s of the truth at both ends, and few are exact."""
    records = [record for record in read_jsonl(world / "base_train.jsonl") if record["task"] != "mcqa"]
    errors = []
    for record in records:
        clip = tiny.draw_clip(0, "base", int(re.search(r"\d+", record["video"])[0]))
        colour = record["question"].split()[3]
        if record["task"] == "gqa":
            colour = record["options"]["ABCD".index(record["answer"])]
        event = next(event for event in clip.events if event.colour == colour)
        errors.append(np.subtract(record["segments"][0], (event.start, event.end)))
    errors = np.abs(errors)
    assert errors.max() == tiny.COARSE_S
    assert (errors == 0).mean() < 0.5
    assert {record["task"] for record in read_jsonl(world / "base_train.jsonl")} == set(tiny.TASKS)


def test_data_set_files_name_files_that_exist(world):
    files = sorted(world.glob("*.yaml"))
    assert {path.stem for path in files} >= {path.stem for path in world.glob("*.jsonl")} | {"mix_validation"}
    for path in files:
        entries = yaml.safe_load(path.read_text())["datasets"]
        assert len(entries) == (3 if path.stem.startswith("mix_") else 1)
        for entry in entries:
            assert (path.parent / entry["json_path"]).is_file()
            assert (path.parent / entry["data_folder"]).is_dir()
            assert entry["sampling_strategy"] == "all"


# Tokenizer and model.


@pytest.mark.parametrize(
    ("text", "num_tokens"),
    [
        ("<answer>3 to 7</answer>", 6),
        ("<answer>13 to 17</answer>", 8),
        ("<answer>B</answer>", 3),
        ("<answer>B, 3 to 7</answer>", 9),
        ("<think></think><answer>3 to 7</answer>", 8),
        ("When is the yellow triangle visible?", 7),
    ],
)
def test_answers_are_short_and_survive_decoding(tokenizer, text, num_tokens):
    ids = tokenizer(text).input_ids
    assert len(ids) == num_tokens
    assert tokenizer.decode([*ids, *tokenizer("<|im_end|>").input_ids], skip_special_tokens=True) == text


def test_digits_are_split_and_any_text_survives(tokenizer):
    assert tokenizer.tokenize("1234567") == list("1234567")
    text = "Zürich 東京 🎬\n\t{} \\frac"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_ids_are_hostile_as_in_the_real_checkpoints(world, tokenizer):
    """Two EOS ids with pad among them, sampling defaults that bend training, embeddings past the tokens."""
    generation = json.loads((world / "model" / "generation_config.json").read_text())
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert generation["eos_token_id"] == [end, pad]
    assert generation["pad_token_id"] == pad == tokenizer.pad_token_id
    assert tokenizer.eos_token_id == end
    assert [generation[key] for key in ("top_k", "repetition_penalty", "temperature")] == [50, 1.05, 1e-6]
    config = AutoConfig.from_pretrained(world / "model")
    assert config.text_config.vocab_size % 64 == 0
    assert config.text_config.vocab_size >= len(tokenizer) + 20
    assert len(tokenizer) - len(tiny.SPECIAL) - len(tiny.TAGS) == tiny.BPE_SIZE > 256
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config.video_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert config.vision_start_token_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert config.vision_end_token_id == tokenizer.convert_tokens_to_ids("<|vision_end|>")


def test_chat_template(tokenizer):
    content = [{"type": "video"}, {"type": "text", "text": "When?"}]
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nAnswer.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>When?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|video_pad|>")) == 1
    image = [{"role": "user", "content": [{"type": "image"}]}]
    text = tokenizer.apply_chat_template(image, tokenize=False)
    assert text == "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
    with pytest.raises(Exception, match="unknown content type"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}], tokenize=False)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_model_loads_and_every_weight_gets_a_gradient(family, world, other_world, tokenizer):
    folder = (world if family == "qwen2_5_vl" else other_world) / "model"
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert model.config.model_type == family
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert 1e6 < model.num_parameters() < 2e6
    grid = torch.tensor([[8, 4, 4]])
    pixels = torch.randn(8 * 4 * 4, 3 * 2 * 14 * 14)
    video = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    before, after = tokenizer(["<|im_start|>user\n<|vision_start|>", "<|vision_end|>When?"]).input_ids
    ids = torch.tensor([[*before, *[video] * (8 * 4 * 4 // 4), *after]])
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    inputs = {"input_ids": ids, "position_ids": positions, "video_grid_thw": grid}
    loss = model(**inputs, pixel_values_videos=pixels, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    with torch.no_grad():
        other = model(**inputs, pixel_values_videos=-pixels, labels=ids).loss
    assert other != loss
