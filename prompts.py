"""Samples to prompts: the wording of each task, the video's placeholders in place, its patches beside it.

Not a reader of records (data.py) or of video files (video/frames.py), and it decides on no order. Nothing to run.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from config import PromptConfig, VideoConfig
from records.record import CHAT, LETTERS, Sample
from video.budget import Geometry, read_geometry
from video.cache import FrameCache
from video.frames import Frames, Video, decode_video, to_video


@dataclass(frozen=True)
class Prompt:
    """What one sample's video and question become: token ids with the video placeholders in place."""

    sample: Sample
    ids: list[int]  # (P,) prompt tokens, video.num_tokens of them the video placeholder, in one run
    video_start: int  # index of the first placeholder
    video: Video


def user_text(sample: Sample, cfg: PromptConfig) -> str:
    """The user turn after the video: the task's template, filled in; of a chat record the question as it is."""
    if sample.task == CHAT:
        return sample.question
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, sample.options or ()))
    values = {"question": sample.question, "options": options}
    return re.sub(r"\{(question|options)\}", lambda match: values[match[1]], getattr(cfg, sample.task))


def time_step(second_per_grid: float, rule: str) -> float:
    """Seconds between two time steps of a video as the rotary positions see them.

    `exact` is the truth. `whole_seconds` rounds down, as transformers 4.50 to 5.2 did by a cast to the index's integer
    type (QwenLM/Qwen3-VL#1282): a step below 1 s then puts all frames at one position. Only for reproducing results.
    """
    return second_per_grid if rule == "exact" else float(int(second_per_grid))


def decode_sample(sample: Sample, video: VideoConfig, geometry: Geometry, cache: FrameCache | None) -> Frames:
    """The frames that a sample is asked about. Raises video.VideoError when the file cannot be read."""
    return decode_video(sample.video, video, geometry, clip=sample.clip, fps=sample.fps, cache=cache)


class PromptBuilder:
    """Samples to prompts, with one video specification and one prompt wording for training and evaluation alike.

    `decode(sample)` is the expensive half, and can be sent to another process; `prompt(sample, frames)` is the other.
    The patches of a prompt's video are on `device`, where they take memory as long as the prompt lives.
    """

    def __init__(
        self,
        tokenizer,
        geometry: Geometry,
        video: VideoConfig,
        prompt: PromptConfig,
        cache: FrameCache | None,
        device="cpu",
    ):
        self.tokenizer, self.geometry, self.video, self.wording = tokenizer, geometry, video, prompt
        self.device = device
        self.decode = partial(decode_sample, video=video, geometry=geometry, cache=cache)

    def __call__(self, sample: Sample) -> Prompt:
        """Decode the video and lay out the prompt. Raises video.VideoError when the file cannot be read."""
        return self.prompt(sample, self.decode(sample))

    def prompt(self, sample: Sample, frames: Frames) -> Prompt:
        """Lay out the prompt of a sample whose video is decoded."""
        video = to_video(frames, self.geometry, self.device)
        video = replace(video, second_per_grid=time_step(video.second_per_grid, self.video.time_step))
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
        system = "" if sample.task == CHAT else system  # it asks for an answer block
        content = [{"type": "video"}, {"type": "text", "text": user_text(sample, self.wording)}]
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": content})
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def make_builder(cfg, tokenizer, device) -> PromptBuilder:
    """The prompt builder of a whole config, for a policy on `device`.

    Raises ValueError when the model folder has no preprocessor file.
    """
    cache = FrameCache(cfg.data.cache_dir, cfg.data.cache_gib) if cfg.data.cache_dir else None
    return PromptBuilder(tokenizer, read_geometry(cfg.model.path), cfg.video, cfg.prompt, cache, device)


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
