"""The embedded default: synthetic clips with known events and a tiny Qwen-VL, written as ordinary files.

    python tiny.py [--out tiny_world] [--seed 0] [--size full|small] [--family qwen2_5_vl|qwen2_vl]

What trains and evaluates does not import this file. It reads the clips, records and model folder as it would read a
real data set and checkpoint.
"""

import argparse
import json
import multiprocessing
import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

VERSION = 4  # raise it when the written files change: an older world is then rebuilt
WORKERS, PARALLEL_FROM = 2, 100  # processes that encode clips, where there are at least so many
SPLITS = ("base", "train", "validation", "test", "ood")  # the index is part of every seed: only append
NUM_CLIPS = {"full": (1000, 600, 100, 240, 240), "small": (8, 8, 4, 8, 4)}  # of each split
QUESTIONS = {
    "tvg": "When is the {colour} {shape} visible?",
    "mcqa": "Which colour appears {place}?",
    "gqa": "Which colour appears {place}, and when is it visible?",
}
TASKS = tuple(QUESTIONS)
RATES = (6, 8, 10, 12)  # frames per second
COLOURS = {"red": (225, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 235), "yellow": (235, 215, 50)}
OPTIONS = tuple(COLOURS)  # of every choice question, always in this order: A is red
SHAPES = ("circle", "square", "triangle")
PROCESSORS = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen2_vl": "Qwen2VLProcessor"}  # by model family
COARSE_S = 3  # largest error of either end of a span in the base data, whole seconds

BPE_SIZE = 460  # bytes and merges, without the tokens below
INIT_STD = 0.06  # of the initial weights
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>")
SPECIAL += ("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>")
SPECIAL += ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # one token each, and ordinary text when decoding
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}"
    "{% else %}{{ raise_exception('unknown content type ' ~ part.type) }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the byte-pair merges are learned from, beside the questions of task tvg: the same for every world.
TEXTS = """\
Which colour appears first, and when is it visible? Which colour appears last, and when is it visible?
You are a helpful assistant. Watch the video and answer the question. system user assistant
Give the start and end time of the event in seconds inside answer tags, like <answer>3 to 7</answer>.
Give the letter of the correct option inside answer tags, like <answer>B</answer>.
Give the letter of the option, then the start and end time in seconds, like <answer>B, 3 to 7</answer>.
First think inside <think> and </think> tags, then answer inside <answer> and </answer> tags.
Answer in seconds inside answer tags. Answer with the option's letter from the given choices directly.
The video lasts from 0 to 24 seconds. Options: A. red B. green C. blue D. yellow
<think>The red circle appears at 3 seconds and ends at 7 seconds, so</think><answer>3 to 7</answer>
[[3, 7]] {"start_time": "3", "end_time": "7"} (B) 3.0 - 7.0
"""


@dataclass(frozen=True)
class Event:
    """A shape, visible from `start` to `end` (whole seconds); radius and centres (x, y) in pixels."""

    colour: str
    shape: str
    radius: float
    start: int
    end: int
    first_centre: np.ndarray
    last_centre: np.ndarray


@dataclass(frozen=True)
class Clip:
    """One synthetic clip; `duration` in whole seconds, its two events in order of appearance."""

    name: str
    seed: tuple[int, int, int]
    duration: int
    fps: int
    width: int
    height: int
    ood: bool
    events: list[Event]


def draw_spans(rng: np.random.Generator, duration: int, num: int) -> list[tuple[int, int]]:
    """One or two spans of 2 to 8 whole seconds in the clip, starting at least 2 s apart, the earlier one first."""
    lengths = rng.integers(2, min(8, duration - 2) + 1, size=num)
    while True:
        starts = rng.integers(0, duration - lengths + 1)
        if abs(starts[0] - starts[-1]) >= 2 or num == 1:
            return sorted((int(start), int(start + length)) for start, length in zip(starts, lengths))


def draw_clip(seed: int, split: str, index: int) -> Clip:
    """Clip `index` of a split, a function of its arguments alone.

    Four clips with one event, four with two, and so on; colours are balanced over every four.
    """
    clip_seed = (seed, SPLITS.index(split), index)
    rng = np.random.default_rng(clip_seed)
    ood = split == "ood"
    duration = int(rng.integers(24, 37) if ood else rng.integers(8, 25))
    size = np.array(((84, 28), (28, 56))[rng.integers(2)] if ood else (56, 28))
    half = size // ((2, 1) if size[0] > size[1] else (1, 2))  # each shape keeps to its own half of the frame
    colours = (index % 4, (index % 4 + 1 + index // 8 % 3) % 4)[: 1 + index // 4 % 2]
    corners = rng.permutation([(0, 0), size - half])
    events = []
    for colour, corner, span in zip(colours, corners, draw_spans(rng, duration, len(colours))):
        radius = rng.uniform(9.0, 12.5)
        centres = rng.uniform(corner + radius, corner + half - radius, size=(2, 2))
        events.append(Event(OPTIONS[colour], str(rng.choice(SHAPES)), radius, *span, *centres))
    fps = int(rng.choice(RATES))
    return Clip(f"{split}_{index}.mp4", clip_seed, duration, fps, int(size[0]), int(size[1]), ood, events)


def draw_background(rng: np.random.Generator, clip: Clip) -> np.ndarray:
    """A noisy, greyish, moving texture (drifting stripes out of domain), (F, H, W, 3) float32."""
    num_frames = clip.duration * clip.fps
    time, y, x = np.ogrid[:num_frames, : clip.height, : clip.width]
    velocity = rng.uniform(-6, 6, size=2) / clip.fps
    if clip.ood:
        angle, period = rng.uniform(0, np.pi), rng.uniform(10, 24)
        phase = x * np.cos(angle) + y * np.sin(angle) + 2 * velocity[0] * time
        grey = 110 + 40 * np.sin(2 * np.pi * phase / period)
    else:
        texture = np.kron(rng.uniform(50, 170, size=(8, 8)), np.ones((14, 14)))
        for axis, shift in product((0, 1), (3, 4, 6)):  # blur the edges of the blocks
            texture = (texture + np.roll(texture, shift, axis)) / 2
        shift_y, shift_x = (np.floor(v * time).astype(int) for v in velocity)
        grey = texture[(y + shift_y) % len(texture), (x + shift_x) % len(texture)]
    noise = rng.normal(0, 5, size=(16, clip.height, clip.width))[rng.integers(0, 16, size=num_frames)]
    flicker = rng.normal(0, 5, size=(num_frames, 1, 1))
    tint = rng.uniform(-10, 10, size=3)
    return ((grey + noise + flicker)[..., None] + tint).astype(np.float32)


def shape_mask(event: Event, centres: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels that the shape covers, (N, H, W) bool, for its centres (N, 2) as (x, y)."""
    dx = np.arange(width) + 0.5 - centres[:, 0, None, None]
    dy = np.arange(height)[:, None] + 0.5 - centres[:, 1, None, None]
    if event.shape == "circle":
        return dx**2 + dy**2 <= event.radius**2
    if event.shape == "square":
        return np.maximum(abs(dx), abs(dy)) <= 0.9 * event.radius
    return (abs(dy) <= event.radius) & (2 * abs(dx) <= dy + event.radius)


def render(clip: Clip) -> np.ndarray:
    """All frames of a clip, (F, H, W, 3) uint8 with F = fps x duration."""
    rng = np.random.default_rng((*clip.seed, 1))
    frames = draw_background(rng, clip)
    for event in clip.events:
        seconds = event.end - event.start
        passed = np.linspace(0, 1, seconds * clip.fps)[:, None]
        if clip.ood:  # to and fro every 3 s, instead of once across
            passed = 0.5 - 0.5 * np.cos(2 * np.pi * passed * seconds / 3)
        centres = event.first_centre * (1 - passed) + event.last_centre * passed
        mask = shape_mask(event, centres, clip.height, clip.width)
        colour = np.array(COLOURS[event.colour]) * rng.uniform(0.85, 1.0)
        frames[event.start * clip.fps : event.end * clip.fps][mask] = colour
    return frames.clip(0, 255).astype(np.uint8)


def write_clip(clip: Clip, folder: Path) -> None:
    """Render and encode one clip, as MPEG-4 with one thread: the same clip has the same bytes."""
    import av  # here, so that the model can be written without it

    with av.open(str(folder / clip.name), "w") as container:
        options = {"qmin": "3", "qmax": "5", "threads": "1"}
        stream = container.add_stream("mpeg4", rate=clip.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
        for pixels in render(clip):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def write_clips(clips: list[Clip], folder: Path) -> None:
    """Encode the clips, on several processes when there are many."""
    folder.mkdir()
    write = partial(write_clip, folder=folder)
    with multiprocessing.get_context("spawn").Pool(WORKERS) if len(clips) >= PARALLEL_FROM else nullcontext() as pool:
        done = pool.imap_unordered(write, clips, chunksize=8) if pool else map(write, clips)
        for _ in tqdm(done, "clips", len(clips), unit="clip"):
            pass


def coarse_span(rng: np.random.Generator, event: Event, duration: int) -> list[int]:
    """The event's span with both ends off by up to `COARSE_S` whole seconds, still a span inside the clip."""
    while True:
        start, end = (int(t + rng.integers(-COARSE_S, COARSE_S + 1)) for t in (event.start, event.end))
        if 0 <= start < end <= duration:
            return [start, end]


def clip_records(clip: Clip, tasks: tuple[str, ...], coarse: bool = False) -> list[dict]:
    """One question per task and event of a clip, without ids; spans in seconds, true or coarse.

    A lone event is the first and the last to appear: it is asked for as either.
    """
    rng = np.random.default_rng((*clip.seed, 2))
    records = []
    places = ("first", "last") if len(clip.events) == 2 else (str(rng.choice(["first", "last"])),)
    for task, (event, place) in product(tasks, zip(clip.events, places)):
        question = QUESTIONS[task].format(colour=event.colour, shape=event.shape, place=place)
        record = {"task": task, "video": clip.name, "duration": float(clip.duration), "question": question}
        if task != "tvg":
            record |= {"options": list(OPTIONS), "answer": "ABCD"[OPTIONS.index(event.colour)]}
        if task != "mcqa":
            record["segments"] = [coarse_span(rng, event, clip.duration) if coarse else [event.start, event.end]]
        records.append(record)
    return records


def write_records(clips: dict[str, list[Clip]], out: Path) -> dict[str, int]:
    """Write the JSONL of every data set and the YAMLs that name them; returns their lengths."""
    sets = {"base_train": ("base", TASKS), "tvg_ood_test": ("ood", ("tvg",))}
    mixes = {}
    for split in ("train", "validation", "test"):
        sets |= {f"{task}_{split}": (split, (task,)) for task in TASKS}
        mixes[f"mix_{split}"] = [f"{task}_{split}" for task in TASKS]
    counts = {}
    for name, (split, tasks) in sets.items():
        records = [r for clip in clips[split] for r in clip_records(clip, tasks, coarse=split == "base")]
        lines = [json.dumps({"id": f"tiny/{name}/{i}"} | record) for i, record in enumerate(records)]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        counts[name] = len(records)
    entry = "  - json_path: {}.jsonl\n    data_folder: videos\n    sampling_strategy: all\n"
    for name, parts in (mixes | {name: [name] for name in sets}).items():
        (out / f"{name}.yaml").write_text("datasets:\n" + "".join(entry.format(part) for part in parts))
    return counts


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Save a byte-level BPE of Qwen's class, splitting and special tokens; returns the id of every token."""
    # Here and below, not above: the processes that encode clips do without these imports.
    from tokenizers import AddedToken, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    empty = Qwen2Tokenizer().backend_tokenizer  # has Qwen's normalizer and splitting (digits one by one)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=BPE_SIZE, show_progress=False, initial_alphabet=alphabet)
    questions = [QUESTIONS["tvg"].format(colour=colour, shape=shape) for colour in COLOURS for shape in SHAPES]
    empty.train_from_iterator(3 * questions + 2 * TEXTS.splitlines(), trainer)
    bpe = json.loads(empty.to_str())["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=bpe["vocab"], merges=merges, model_max_length=32768)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    tokenizer.eos_token = "<|im_end|>"  # the pad token stays <|endoftext|>, as in Qwen's folders
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer.get_vocab()


def build_model(ids: dict[str, int], seed: int, family: str):
    """A randomly initialised model of 1.1 million parameters; the last embeddings belong to no token."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"intermediate_size": 384, "vocab_size": -(-(len(ids) + 20) // 64) * 64}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [8, 4, 4]}}
    text |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    text |= {"pad_token_id": ids["<|endoftext|>"], "initializer_range": INIT_STD}
    vision = {"depth": 2, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {
        "qwen2_vl": {"embed_dim": 64, "mlp_ratio": 2, "hidden_size": text["hidden_size"]},
        "qwen2_5_vl": {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": text["hidden_size"]}
        | {"window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2},
    }[family]
    vision["initializer_range"] = INIT_STD
    whole = {"text_config": text, "vision_config": vision, "tie_word_embeddings": True}
    whole |= {f"{name}_token_id": ids[f"<|{name}_pad|>"] for name in ("image", "video")}
    whole |= {f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    config = AutoConfig.for_model(family, **whole)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config)


def released(config: dict) -> dict:
    """The content of a config.json as the checkpoints on the hub have it: transformers 4 reads no other form.

    There the language model's keys stand beside the others, and rope_theta and rope_scaling are two of them. Version 5
    writes a section text_config with rope_parameters, and reads both.
    """
    vision = {key: value for key, value in config["vision_config"].items() if key not in ("rope_parameters", "dtype")}
    text = dict(config["text_config"])
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    for key in ("model_type", "dtype", "layer_types", "tie_word_embeddings"):
        text.pop(key, None)
    whole = {key: value for key, value in config.items() if key not in ("text_config", "dtype", "transformers_version")}
    whole |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "torch_dtype": "float32"}
    return text | whole | {"vision_config": vision, "transformers_version": "4.41.2"}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_model(folder: Path, seed: int, family: str) -> None:
    """Write a Hugging Face folder: tokenizer, weights, generation defaults and preprocessor sizes."""
    ids = write_tokenizer(folder)
    build_model(ids, seed, family).save_pretrained(folder)
    write_json(folder / "config.json", released(json.loads((folder / "config.json").read_text())))
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    generation = {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": [end, pad], "do_sample": True}
    generation |= {"repetition_penalty": 1.05, "temperature": 1e-6, "top_k": 50}  # as Qwen ships it
    write_json(folder / "generation_config.json", generation)
    preprocessor = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2}
    preprocessor |= {"merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073]}
    preprocessor |= {"image_std": [0.26862954, 0.26130258, 0.27577711]}
    preprocessor |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": PROCESSORS[family]}
    write_json(folder / "preprocessor_config.json", preprocessor)


def write_world(out: str | Path, seed: int = 0, size: str = "full", family: str = "qwen2_5_vl") -> Path:
    """Write clips, records and model to the folder `out`; keep the same world, replace another one.

    The same arguments give the same bytes. All is built in a folder beside `out` that is renamed at the end:
    an interrupted run leaves no half world. Raises `ValueError` when `out` holds something else.
    """
    out = Path(out).resolve()
    arguments = {"version": VERSION, "seed": seed, "size": size, "family": family}
    if (out / "world.json").is_file():
        if arguments.items() <= json.loads((out / "world.json").read_text()).items():
            print(f"{out}: this world is already there")
            return out
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no tiny world: remove it, or choose another --out")
    part = out.with_name(f"{out.name}.part{os.getpid()}")
    part.mkdir(parents=True)
    try:
        num_clips = dict(zip(SPLITS, NUM_CLIPS[size]))
        clips = {split: [draw_clip(seed, split, i) for i in range(n)] for split, n in num_clips.items()}
        write_clips([clip for split in SPLITS for clip in clips[split]], part / "videos")
        counts = write_records(clips, part)
        write_model(part / "model", seed, family)
        write_json(part / "world.json", arguments | {"clips": num_clips, "records": counts})
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{out}: {sum(NUM_CLIPS[size])} clips, {sum(counts.values())} records, a {family} model")
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="tiny_world", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of clips, records and weights")
    parser.add_argument("--size", choices=tuple(NUM_CLIPS), default="full", help="small: for tests")
    parser.add_argument("--family", choices=tuple(PROCESSORS), default="qwen2_5_vl", help="of the model")
    args = parser.parse_args(argv)
    try:
        write_world(args.out, args.seed, args.size, args.family)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
