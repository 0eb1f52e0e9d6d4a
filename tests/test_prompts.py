"""Prompt layout: the video's placeholders, the wording of each task, time steps, braces."""

from dataclasses import replace

import pytest
from conftest import PROMPT, read_prompts
from transformers import AutoTokenizer

from config import PLAIN, THINK, PromptConfig, VideoConfig
from prompts import Prompt, user_text
from records.files import read_samples
from records.record import Sample
from video.budget import seen_step


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "model")


def prompt_of(sample: Sample, world, tokenizer, video: VideoConfig | None = None, **prompt) -> Prompt:
    return read_prompts(world, tokenizer, [sample], video, **prompt)[0]


def samples_by_task(world) -> dict[str, Sample]:
    return {sample.task: sample for sample in read_samples(str(world / "mix_train.yaml"))}


def test_placeholders_are_the_tokens_of_the_video(world, tokenizer):
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    counts = set()
    for sample in read_samples(str(world / "mix_train.yaml"))[::5]:
        prompt = prompt_of(sample, world, tokenizer, **PROMPT)
        num, start = prompt.video.num_tokens, prompt.video_start
        t, h, w = prompt.video.grid_thw
        assert num == t * h * w // 4 == len(prompt.video.patches) // 4
        assert prompt.ids.count(pad) == num and prompt.ids[start : start + num] == [pad] * num
        around = tokenizer.convert_ids_to_tokens([prompt.ids[start - 1], prompt.ids[start + num]])
        assert around == ["<|vision_start|>", "<|vision_end|>"]
        text = tokenizer.decode(prompt.ids[:start] + prompt.ids[start + num :])
        assert text.endswith(f"{user_text(sample, PromptConfig(**PROMPT))}<|im_end|>\n<|im_start|>assistant\n")
        counts.add(num)
    assert len(counts) > 2


@pytest.mark.parametrize(("think", "words"), [(True, THINK), (False, PLAIN)])
def test_the_system_turn_follows_the_mode(world, tokenizer, think, words):
    sample = samples_by_task(world)["tvg"]
    text = tokenizer.decode(prompt_of(sample, world, tokenizer, think=think).ids)
    assert text.startswith(f"<|im_start|>system\n{words}<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert sample.question in text
    other = {"think": think, "system_think" if think else "system_plain": ""}
    without = prompt_of(sample, world, tokenizer, **other)
    assert tokenizer.decode(without.ids).startswith("<|im_start|>user\n<|vision_start|>") and without.video_start == 4


@pytest.mark.parametrize("think", [True, False])
def test_a_chat_record_is_asked_as_it_is(world, tokenizer, think):
    """Without the system turn, which asks for an answer block that the response to imitate does not have."""
    sample = replace(samples_by_task(world)["tvg"], task="chat", question="Why {question}?", response="So.")
    text = tokenizer.decode(prompt_of(sample, world, tokenizer, think=think).ids)
    assert text.startswith("<|im_start|>user\n<|vision_start|>")
    assert text.endswith("<|vision_end|>Why {question}?<|im_end|>\n<|im_start|>assistant\n")


def test_options_stand_in_the_text_with_their_letters(world):
    cfg = PromptConfig()
    sample = Sample("a", "mcqa", "v.mp4", "Which {options}?", options=("red", "a b", "blue"), answer="B")
    text = user_text(sample, replace(cfg, mcqa="{question}\n{options}\nLetter, please."))
    assert text.startswith("Which {options}?\nA. red\nB. a b\nC. blue") and text.endswith("\nC. blue\nLetter, please.")
    many = replace(sample, options=tuple(f"option {i}" for i in range(26)))
    assert "\nZ. option 25\n" in user_text(many, cfg)
    assert "A." not in user_text(samples_by_task(world)["tvg"], cfg)


def test_every_task_has_its_own_wording(world, tokenizer):
    cfg = PromptConfig()
    for task, sample in samples_by_task(world).items():
        text = user_text(sample, cfg)
        assert sample.question in text and "{" not in text
        assert ("letter" in text) == (task != "tvg") and ("seconds" in text) == (task != "mcqa")


def test_long_prompts_are_never_cut(world, tokenizer):
    """A question past the tokenizer's model_max_length, after a video of its full length."""
    sample = samples_by_task(world)["tvg"]
    question = "when does it happen " * 9000
    prompt = prompt_of(replace(sample, question=question.strip()), world, tokenizer, **PROMPT)
    assert len(prompt.ids) > tokenizer.model_max_length
    assert question.strip() in tokenizer.decode(prompt.ids)
    assert prompt.ids.count(tokenizer.convert_tokens_to_ids("<|video_pad|>")) == prompt.video.num_tokens


def test_a_placeholder_in_a_question_is_an_error(world, tokenizer):
    sample = replace(samples_by_task(world)["tvg"], question="what is <|video_pad|> ?")
    with pytest.raises(ValueError, match=rf"sample {sample.id}: the chat template gives 2 video placeholders, not one"):
        prompt_of(sample, world, tokenizer)


def test_the_budget_bounds_the_placeholders(world, tokenizer):
    sample = max(read_samples(str(world / "mix_train.yaml")), key=lambda sample: sample.duration)
    small = VideoConfig(total_pixels=16 * 28 * 28)
    whole, cut = (prompt_of(sample, world, tokenizer, video, **PROMPT) for video in (VideoConfig(), small))
    assert cut.video.num_tokens <= 16 < whole.video.num_tokens
    assert len(whole.ids) - len(cut.ids) == whole.video.num_tokens - cut.video.num_tokens
    assert cut.video.frames_cut > 0 == whole.video.frames_cut


def test_time_step(world, tokenizer):
    """Half a second a frame makes steps of about 1 s; rounded down to whole seconds, 0.9 s would be none at all."""
    assert [seen_step(value, "exact") for value in (0.5, 0.97, 2.3)] == [0.5, 0.97, 2.3]
    assert [seen_step(value, "whole_seconds") for value in (0.5, 0.97, 1.0, 2.3)] == [0.0, 0.0, 1.0, 2.0]
    sample = samples_by_task(world)["tvg"]
    exact = prompt_of(sample, world, tokenizer, **PROMPT).video
    whole = prompt_of(sample, world, tokenizer, VideoConfig(time_step="whole_seconds"), **PROMPT).video
    times = exact.frame_times
    assert exact.second_per_grid == pytest.approx(2 * (times[-1] - times[0]) / (len(times) - 1))
    assert whole.second_per_grid == int(exact.second_per_grid)


def test_braces_in_questions_and_options_are_text():
    """An option that held `{question}` was filled in with the question."""
    sample = Sample("a", "mcqa", "v.mp4", "what is {options}?", options=("{question}", "b"), answer="A")
    text = user_text(sample, PromptConfig(mcqa="{question}|{options}"))
    assert text == "what is {options}?|A. {question}\nB. b"
