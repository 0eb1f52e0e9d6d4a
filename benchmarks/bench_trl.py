"""A step of TRL's GRPOTrainer against ours: the same tiny model, equal numbers of tokens, one process.

    python -m venv .venv_bench && .venv_bench/bin/pip install -r requirements/bench.txt
    .venv_bench/bin/python benchmarks/bench_trl.py [--size 1046,64,8] [--repeats 5]

TRL takes no videos, so a clip's frames are images: each of 112 x 112 pixels is 16 tokens and two brackets, and as many
are taken as come nearest to P tokens of prompt; our prompt has the same length, as one clip. Both sample G completions
of exactly C tokens, with a reference model, one update, AdamW, a frozen tower, float32, no gradient checkpointing.

What differs in work, beside the prompt that TRL computes G times in sampling, reference and update:

    images         an image is a doubled frame to the tower, a time step of a clip two frames: patches per token are
                   equal; ours has more of them, for it needs no brackets (12% at P = 1049)
    preparing      TRL makes patches of images in memory, anew for sampling and for scoring; ours decodes a file once
    sampling       multinomial draws in TRL; a generator per row and recorded log-probs in ours
    reporting      TRL adds up its metrics within the step, ours does after it

Steps of TRL are timed between its callbacks, ours as in bench_step.py. The last line is JSON.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from datasets import Dataset
from floors import now
from PIL import Image
from transformers import AutoTokenizer, TrainerCallback
from transformers import Qwen2_5_VLProcessor as Processor
from transformers import Qwen2VLImageProcessor as ImageProcessor
from transformers import Qwen2VLVideoProcessor as VideoProcessor
from trl import GRPOConfig, GRPOTrainer
from ways import SIDES, Meter, first_letters, make_bench, ours, timed_calls

import tiny
from runtime.environment import environment

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE_TOKENS = (SIDES["tiny"] // 28) ** 2 + 2  # with the brackets


class Steps(TrainerCallback):
    """Seconds of every step: batch, sampling, reference, forward, backward, optimizer."""

    def __init__(self):
        self.seconds, self._start = [], 0.0

    def on_step_begin(self, *_, **__):
        self._start = now()

    def on_step_end(self, *_, **__):
        self.seconds.append(now() - self._start)


def make_processor(folder: str) -> Processor:
    sizes = {"min_pixels": 3136, "max_pixels": 12845056}
    parts = {"tokenizer": AutoTokenizer.from_pretrained(folder), "chat_template": TEMPLATE}
    return Processor(image_processor=ImageProcessor(**sizes), video_processor=VideoProcessor(), **parts)


def make_row(processor: Processor, num_tokens: int) -> tuple[dict, int]:
    """A prompt of images and a question, and its length: as near to `num_tokens` as whole images come."""
    question = {"type": "text", "text": "When does it happen?"}

    def messages(num: int) -> list[dict]:
        return [{"role": "user", "content": [{"type": "image"}] * num + [question]}]

    def length(num: int) -> int:
        text = processor.apply_chat_template(messages(num), add_generation_prompt=True)
        return len(processor.tokenizer(text).input_ids) + num * (IMAGE_TOKENS - 3)  # a placeholder is one token yet

    num = max(1, round((num_tokens - length(0)) / IMAGE_TOKENS))
    pixels = np.random.default_rng(0).integers(0, 256, (num, SIDES["tiny"], SIDES["tiny"], 3), np.uint8)
    return {"prompt": messages(num), "images": [Image.fromarray(frame) for frame in pixels]}, length(num)


def letters(completions, **_) -> list[float]:
    return first_letters([message[0]["content"] for message in completions])


def time_trl(
    folder: str, row: dict, processor: Processor, suppressed: list[int], size: tuple[int, int, int], repeats: int
) -> tuple[float, float]:
    """Medians of the seconds of a step and of its `generate`, after a warm-up, at exactly (P, C, G)."""
    num_prompt, num_new, group_size = size
    args = GRPOConfig(
        output_dir=f"{folder}/trl",
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=group_size,
        num_generations=group_size,
        max_completion_length=num_new,
        generation_kwargs={"suppress_tokens": suppressed},
        beta=0.04,
        max_steps=repeats + 1,
        learning_rate=0.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    steps = Steps()
    trainer = GRPOTrainer(
        model=folder,
        args=args,
        reward_funcs=letters,
        train_dataset=Dataset.from_list([row] * (repeats + 1)),
        processing_class=processor,
        callbacks=[steps],
    )
    trainer.model.model.visual.requires_grad_(False)
    with timed_calls(trainer.model, "generate") as generate:
        trainer.train()
    found, expected = trainer.state.log_history[-1], (repeats + 1) * group_size * (num_prompt + num_new)
    if found["completions/min_length"] != num_new or found["num_tokens"] != expected:
        raise RuntimeError(f"{found['num_tokens']} tokens in all, not {expected}")
    return median(steps.seconds[1:]), median(generate[1:])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": lambda text: tuple(map(int, text.split(","))), "metavar": "P,C,G"}
    parser.add_argument("--size", default=(1046, 64, 8), help="prompt and completion tokens, completions", **size)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each")
    args = parser.parse_args(argv)
    device, (p, c, g) = "cuda" if torch.cuda.is_available() else "cpu", args.size
    env = environment()
    commit = f"{env['commit']}{' and uncommitted changes' if env['diff'] else ''}"
    load = f"{os.getloadavg()[0]:.1f} processes running in the last minute"
    print(f"{env['devices'][0]}; {load}; torch {env['packages']['torch']}; commit {commit}")
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_model(Path(folder), seed=0, family="qwen2_5_vl")
        processor = make_processor(folder)
        row, num_prompt = make_row(processor, p)
    with tempfile.TemporaryDirectory() as folder:
        bench = make_bench("tiny", device, (num_prompt, c, g), 1, False, Path(folder))
        trl = time_trl(folder, row, processor, bench.policy.banned.tolist(), (num_prompt, c, g), args.repeats)
        rounds = []
        for _ in range(args.repeats + 1):
            meter, start = Meter(), now()
            ours(bench, meter)
            rounds.append((now() - start, meter.found["generate"]))
    own = [median(times) for times in zip(*rounds[1:])]
    print(f"P = {num_prompt}, C = {c}, G = {g}; {len(row['images'])} images; medians of {args.repeats}\n")
    for name, a, b in zip(("step", "generate"), own, trl):
        print(f"{name:9} ours {a:8.4f} s   TRL {b:8.4f} s   TRL / ours {b / a:6.2f}")
    last = {"trl_over_ours": trl[0] / own[0], "generate_ratio": trl[1] / own[1], "ours_s": own[0], "trl_s": trl[0]}
    print(json.dumps({name: round(value, 4) for name, value in last.items()} | {"prompt_tokens": num_prompt}))


if __name__ == "__main__":
    main()
