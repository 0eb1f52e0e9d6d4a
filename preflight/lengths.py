"""How many tokens every record will cost, by the functions that training uses, without decoding a video.

What a file holds comes from the manifest of `python data.py check`, else from its header (of a few hundred files at
most), else from the record's duration and an assumed size. The plan says how many records there are of each kind.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from config import VideoConfig
from prompts import PromptBuilder
from records.manifest import Manifest
from records.record import Sample
from video.budget import Geometry, VideoPlan, plan, plan_file
from video.readers import Header, VideoError, probe

MOST_PROBED = 200  # files whose header is read: milliseconds each, and data sets have thousands
ASSUMED = (640, 480, 30.0)  # width, height, frames per second where no file is at hand


@dataclass(frozen=True)
class Length:
    """Tokens of one record."""

    before: int  # of text, before the video
    grid_thw: tuple[int, int, int]
    video: int
    after: int  # of text, after it
    target: int  # of the response to imitate, EOS included; 0 where responses are sampled

    @property
    def prompt(self) -> int:
        return self.before + self.video + self.after


class RoughTokenizer:
    """In the place of a tokenizer that is not at hand: four characters a token, and a chat template like Qwen's."""

    eos_token_id = pad_token_id = 0

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __call__(self, text: str, **_) -> SimpleNamespace:
        before, pad, after = text.partition("<|video_pad|>")
        return SimpleNamespace(input_ids=[0] * (-(-len(before) // 4)) + [1] * bool(pad) + [0] * (-(-len(after) // 4)))

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return 1 if token == "<|video_pad|>" else None

    def apply_chat_template(self, turns: list[dict], **_) -> str:
        contents = [[{"text": turn["content"]}] if turn["role"] == "system" else turn["content"] for turn in turns]
        video = "<|vision_start|><|video_pad|><|vision_end|>"
        texts = ["".join(part.get("text", video) for part in content) for content in contents]
        return "".join(f"<|im_start|>{turn['role']}\n{text}<|im_end|>\n" for turn, text in zip(turns, texts))


def measure(
    samples: Sequence[Sample],
    builder: PromptBuilder,
    spec: VideoConfig,
    geometry: Geometry,
    manifest: str = "",
    target_text: Callable[[Sample], str] | None = None,
) -> tuple[list[Length], str]:
    """The lengths of all records that can be used, and one line on where the videos' sizes come from.

    Raises ValueError where not one can be used.
    """
    plans, source = plan_videos(samples, spec, geometry, manifest)
    lengths = []
    for sample, video in zip(samples, plans, strict=True):
        if video is not None:
            before, _, after = builder.text_ids(sample)
            text = target_text(sample) if target_text else None
            target = 0 if text is None else len(builder.tokenizer(text, add_special_tokens=False).input_ids) + 1
            lengths.append(Length(len(before), video.grid_thw, video.num_tokens, len(after), target))
    if not lengths:
        raise ValueError(f"no record's video has a known length: {source}")
    return lengths, source


def plan_videos(
    samples: Sequence[Sample], spec: VideoConfig, geometry: Geometry, manifest: str = ""
) -> tuple[list[VideoPlan | None], str]:
    """Each record's frames and their size, None where nothing is known or video.plan refuses; and where it is from."""
    known = Manifest(manifest) if manifest else None
    lines = [known.file_of(sample.id) if known else None for sample in samples]
    headers = _probe_some([sample for sample, line in zip(samples, lines) if line is None])
    found = [(line["width"], line["height"], round(line["fps"], 3)) for line in lines if line]
    found += [(header.width, header.height, round(header.fps, 3)) for header in headers.values()]
    usual = Counter(found).most_common(1)[0][0] if found else ASSUMED
    plans, sources, done = [], Counter(), {}
    for sample, line in zip(samples, lines):
        key = (sample.video, sample.clip, sample.fps, sample.duration)
        if key not in done:
            header, (width, height, fps) = headers.get((sample.video, sample.fps)), usual
            try:
                if line is not None:
                    fps = line["frames"] / line["duration"] if line["vfr"] or line["first_time"] else line["fps"]
                    size = line["frames"], fps, line["height"], line["width"]
                    done[key] = "manifest", plan(*size, spec, geometry, sample.clip)
                elif header is not None:
                    done[key] = "header", plan_file(header, spec, geometry, sample.clip)
                elif sample.duration is None:
                    done[key] = "unknown", None
                else:
                    num_frames = max(1, round(sample.duration * fps))
                    done[key] = "record", plan(num_frames, fps, height, width, spec, geometry)
            except ValueError:  # what the loader would replace
                done[key] = "unusable", None
        source, video = done[key]
        plans.append(video)
        sources[source] += 1
    why = "the commonest of those" if found else "assumed: no file and no manifest is there"
    texts = {
        "manifest": "by the manifest",
        "header": "by their files' headers",
        "record": "by the record's duration, with frames of {}x{} at {:g} a second, ".format(*usual) + why,
        "unknown": "left out: neither a duration in the record nor a file",
        "unusable": "left out: training would replace them",
    }
    return plans, "; ".join(f"{sources[name]:,} records {text}" for name, text in texts.items() if sources[name])


def _probe_some(samples: Sequence[Sample]) -> dict[tuple[str, float | None], Header]:
    """Headers of at most `MOST_PROBED` of the samples' files, spread evenly over them; those that can be read."""
    files = list(dict.fromkeys((sample.video, sample.fps) for sample in samples))
    headers = {}
    for file in files[:: -(-len(files) // MOST_PROBED) or 1]:
        if Path(file[0]).exists():
            try:
                headers[file] = probe(*file)
            except VideoError:
                continue
    return headers
