"""Token counts without decoding: those of the data loader, wherever a video's size is known from."""

from pathlib import Path

import pytest
from clips import QWEN2, VIDEOS, Spec, real_clips, real_files, write_clip
from conftest import PROMPT, make_policy, make_prompts
from transformers import AutoTokenizer

import config
from preflight import lengths
from preflight.lengths import RoughTokenizer, measure, plan_videos
from prompts import PromptBuilder
from records import manifest as manifest_io
from records.check import records_of
from records.files import read_samples
from records.record import Sample
from video import readers
from video.budget import read_geometry
from video.frames import decode_video
from video.readers import VideoError

SPECS = {
    "recipe": Spec(),
    "few": Spec(fps=1.0, max_frames=16, max_pixels=50176),
    "budget": Spec(total_pixels=100352, min_frames=2),
}


def make_builder(world: Path, tokenizer=None) -> PromptBuilder:
    return PromptBuilder(tokenizer or AutoTokenizer.from_pretrained(world / "model"), config.PromptConfig(**PROMPT))


def loaded(sample: Sample, spec) -> tuple | None:
    """Grid and frames cut of the loader, which decodes; None where it would replace the sample."""
    try:
        frames = decode_video(sample.video, spec, QWEN2, sample.clip, sample.fps)
    except VideoError:
        return None
    num, _, height, width = frames.frames.shape
    return (num // 2, height // 14, width // 14), frames.frames_cut


@real_clips
@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_counts_are_the_loaders_on_real_clips(spec, tmp_path):
    """Every file that can be read at all, by its header and by the manifest; one is damaged after its header."""
    samples = [Sample(name, "tvg", str(VIDEOS / name), "") for name in real_files()]
    truth = [loaded(sample, spec) for sample in samples]
    assert sum(found is not None for found in truth) >= 20
    rows = [("", sample) for sample in samples]
    manifest_io.write(manifest_io.examine(rows, 0, 60.0), str(tmp_path / "manifest.jsonl"))
    for manifest in ("", str(tmp_path / "manifest.jsonl")):
        plans, _ = plan_videos(samples, spec, QWEN2, manifest)
        for sample, plan, expected in zip(samples, plans, truth):
            if not manifest and sample.id.endswith("corrupted.mp4"):
                continue  # its header promises more frames than it holds
            assert (plan and (plan.grid_thw, plan.frames_cut)) == expected, (sample.id, manifest)


@real_clips
def test_counts_are_the_loaders_on_two_real_clips():
    samples = [Sample(name, "tvg", str(VIDEOS / name), "") for name in ("llamafactory/1.mp4", "mmcv/test.mp4")]
    samples += [Sample("part", "tvg", samples[0].video, "", clip=(1.0, 3.5))]
    plans, source = plan_videos(samples, Spec(), QWEN2)
    assert [(plan.grid_thw, plan.frames_cut) for plan in plans] == [loaded(sample, Spec()) for sample in samples]
    assert source == "3 records by their files' headers"


def test_whole_prompts_are_the_loaders(world):
    """Text, placeholders and video of several tasks, in the tiny world."""
    policy = make_policy(world)
    prompts = make_prompts(world, policy, num=12)
    found, source = measure(
        [prompt.sample for prompt in prompts], make_builder(world, policy.tokenizer), config.VideoConfig(), QWEN2
    )
    assert [length.prompt for length in found] == [len(prompt.ids) for prompt in prompts]
    assert [length.before for length in found] == [prompt.video_start for prompt in prompts]
    assert [(length.video, length.grid_thw) for length in found] == [
        (prompt.video.num_tokens, prompt.video.grid_thw) for prompt in prompts
    ]
    assert "headers" in source and "record" not in source.replace("records by their files", "")


def test_an_uneven_clip_and_a_folder_of_frames(tmp_path):
    """By the manifest too: there a file of uneven times has no list of them."""
    uneven = write_clip(tmp_path / "uneven.mp4", 20, times=[0.05 * i**1.5 for i in range(20)])
    late = write_clip(tmp_path / "late.mp4", 16, times=[1.0 + i / 8 for i in range(16)], audio_s=4)
    samples = [Sample(path.name, "tvg", str(path), "") for path in (uneven, late)]
    manifest_io.write(
        manifest_io.examine([("", sample) for sample in samples], 0, 60.0), str(tmp_path / "manifest.jsonl")
    )
    truth = [loaded(sample, Spec()) for sample in samples]
    for manifest in ("", str(tmp_path / "manifest.jsonl")):
        plans, _ = plan_videos(samples, Spec(), QWEN2, manifest)
        assert [(plan.grid_thw, plan.frames_cut) for plan in plans] == truth


def test_records_alone_will_do(tmp_path):
    """No file is there: duration and an assumed size; what has neither is left out, what is refused as well."""
    samples = [Sample(str(d), "tvg", f"/nowhere/{d}.mp4", "", duration=d) for d in (10.0, 30.0, 0.01)]
    samples += [Sample("mcqa", "mcqa", "/nowhere/m.mp4", "")]
    plans, source = plan_videos(samples, Spec(min_pixels=602112, max_pixels=602112), QWEN2)
    # 4 frames of at least 602,112 pixels fit, 2 pairs of 728 x 812; 20 frames do not: there are fewer
    assert [plan and plan.grid_thw[0] for plan in plans] == [2, 2, 2, None]
    plans, source = plan_videos(samples, Spec(), QWEN2)
    # 10 s: 20 frames; 640x480 shrinks to 1,605,632 / 10 pixels: 14 x 16 squares of 28
    assert plans[0].grid_thw == (10, 24, 32) and plans[0].num_tokens == 10 * 12 * 16
    assert plans[1].grid_thw[0] == 30 and plans[1].num_tokens <= 2048
    assert source == (
        "3 records by the record's duration, with frames of 640x480 at 30 a second, assumed: no file and no manifest "
        "is there; 1 records left out: neither a duration in the record nor a file"
    )
    with pytest.raises(ValueError, match="no record's video has a known length: 1 records left out"):
        measure(samples[3:], PromptBuilder(RoughTokenizer(9), config.PromptConfig()), Spec(), QWEN2)


def test_most_files_are_not_opened(world, monkeypatch):
    """A few headers tell the size of the others, whose length is the record's."""
    samples = read_samples(str(world / "tvg_train.yaml"))
    opened, real = [], readers.probe
    monkeypatch.setattr(lengths, "MOST_PROBED", 5)
    monkeypatch.setattr(lengths, "probe", lambda *file: opened.append(file) or real(*file))
    plans, source = plan_videos(samples, config.VideoConfig(), read_geometry(str(world / "model")))
    assert 1 <= len(opened) <= 5 and all(plans)
    assert "by their files' headers; " in source and "the commonest of those" in source


def test_the_response_to_imitate_is_counted_with_its_end(world):
    builder = make_builder(world)
    (sample,) = read_samples(str(world / "tvg_train.yaml"))[:1]
    (length,), _ = measure([sample], builder, Spec(), QWEN2, target_text=lambda sample: "<answer>1 to 2</answer>")
    assert length.target == len(builder.tokenizer("<answer>1 to 2</answer>").input_ids) + 1


def test_a_rough_tokenizer_counts_characters(world):
    """Of one with Qwen's vocabulary, whose template it has."""
    rough = make_builder(world, RoughTokenizer(100))
    before, pad, after = rough.text_ids(read_samples(str(world / "tvg_train.yaml"))[0])
    assert (pad, len(rough.tokenizer)) == (1, 100)
    # "<|im_start|>user\n<|vision_start|>" are 34 characters, "<|vision_end|>" and the rest 4 to a token
    assert len(before) == 9 and 5 < len(after) < 25


def test_the_manifest_keeps_what_it_says_of_files(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 16)
    rows = [(row, sample) for row, sample in records_of(str(tmp_path))]
    manifest_io.write(manifest_io.examine(rows, 0, 60.0), str(tmp_path / "manifest.jsonl"))
    line = manifest_io.Manifest(str(tmp_path / "manifest.jsonl")).file_of(clip.name)
    assert (line["frames"], line["width"], line["height"], line["fps"]) == (16, 56, 56, 8.0)
    assert manifest_io.Manifest(str(tmp_path / "manifest.jsonl")).file_of("other") is None
