"""Samples to prompts: the wording of each task, with the placeholders of the video in place.

It opens no video: data.py hands it the patches.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from config import PromptConfig
from records.record import CHAT, LETTERS, Sample
from video.frames import Video


@dataclass(frozen=True)
class Prompt:
    """What one sample's video and question become: token ids with the video placeholders in place."""

    sample: Sample
    ids: list[int]  # (P,) prompt tokens, video.num_tokens of them the video placeholder, in one run
    video_start: int  # index of the first placeholder
    video: Video


def user_text(sample: Sample, cfg: PromptConfig) -> str:
    """The user turn after the video: the task's template, filled in. A chat record gives its question as it is."""
    if sample.task == CHAT:
        return sample.question
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, sample.options or ()))
    values = {"question": sample.question, "options": options}
    return re.sub(r"\{(question|options)\}", lambda match: values[match[1]], getattr(cfg, sample.task))


class PromptBuilder:
    """The text of prompts: one wording, in the chat template of one tokenizer, for training and evaluation alike."""

    def __init__(self, tokenizer, wording: PromptConfig):
        self.tokenizer, self.wording = tokenizer, wording

    def __call__(self, sample: Sample, video: Video) -> Prompt:
        """The prompt of a sample whose video has been read."""
        before, pad, after = self.text_ids(sample)
        return Prompt(sample, before + [pad] * video.num_tokens + after, len(before), video)

    def text_ids(self, sample: Sample) -> tuple[list[int], int, list[int]]:
        """Token ids of a sample's prompt before its video, the placeholder's id, and those after it."""
        ids = self.tokenizer(self._text(sample), add_special_tokens=False).input_ids
        pad = self.tokenizer.convert_tokens_to_ids("<|video_pad|>")
        if ids.count(pad) != 1:
            raise ValueError(
                f"sample {sample.id}: the chat template gives {ids.count(pad)} video placeholders, not one"
            )
        start = ids.index(pad)
        return ids[:start], pad, ids[start + 1 :]

    def _text(self, sample: Sample) -> str:
        system = self.wording.system_think if self.wording.think else self.wording.system_plain
        content = [{"type": "video"}, {"type": "text", "text": user_text(sample, self.wording)}]
        turns = [{"role": "user", "content": content}]
        if system and sample.task != CHAT:  # the system turn asks for an answer block
            turns.insert(0, {"role": "system", "content": system})
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def video_sums(prompts: Sequence[Prompt]) -> dict[str, float]:
    """Numbers to add up over processes, for `video_means`."""
    videos = [prompt.video for prompt in prompts]
    return {
        "videos": float(len(videos)),
        "video_tokens": float(sum(video.num_tokens for video in videos)),
        "frames_cut": float(sum(video.frames_cut for video in videos)),
    }


def video_means(sums: dict[str, float]) -> dict[str, float]:
    """Tokens really used by a video, and frames that the token budget took away from it."""
    return {
        "tokens/video": sums["video_tokens"] / sums["videos"],
        "data/frames_cut": sums["frames_cut"] / sums["videos"],
    }
