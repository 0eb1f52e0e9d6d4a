r"""The memory that `--plan` expects of a GRPO run against the peak of a real one, by phase.

    python benchmarks/bench_plan.py                                     # about 300 M parameters, float32
    accelerate launch --config_file configs/accelerate/zero2.yaml --num_processes 1 \
        benchmarks/bench_plan.py --size 3b

A model of the given shape with random weights, videos of noise, completions that never end early. train_grpo.train
runs two steps of it on one process, under the engine that was launched, and the second is measured: by then the
optimizer has its state. `3b` is the recipe grpo_qwen2_5_vl_3b_charades.yaml with two videos a step; it wants a GPU of
140 GB.

On a GPU the peak is torch.cuda.max_memory_allocated; on a CPU it is the process's VmHWM above what it held before the
models were loaded, with every tensor in pages of its own, so the kernels' own buffers count as well. Phases:

    vision       the tower, once for all videos of the step
    sampling     prefill and decode, with the KV cache
    update       reference, forward and backward
    optimizer    the step on the weights

`own` is without what is held all the time. The last line is JSON: peaks in GiB, expected over measured.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

import config
import tiny
import train_grpo
from policy import Policy
from preflight import plan
from preflight.costs import Case
from runtime.clock import peak_bytes, restart_peak
from runtime.engine import Engine
from runtime.environment import environment

REPO = Path(__file__).resolve().parents[1]
GIB = 2**30
M_MMAP_THRESHOLD = -3  # of malloc.h: from here on memory is taken from the system, and given back when it is freed
BASE = plan.MODELS / "Qwen" / "Qwen2.5-VL-3B-Instruct"  # the shape that a size changes, and its vocabulary
TEXT_300M = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2816}
VISION_300M = {"hidden_size": 768, "depth": 8, "num_heads": 12, "intermediate_size": 2048, "out_hidden_size": 1024}
SIZES = {
    "300m": {
        "shape": {"text_config": TEXT_300M, "vision_config": VISION_300M | {"fullatt_block_indexes": [3, 7]}},
        "video": (8, 168, 112),  # frames, width, height
        "config": "configs/tiny.yaml",
        "overrides": "data.batch_size=2 data.micro_batch_size=1 data.validation= model.freeze_vision=false "
        "rollout.group_size=4 rollout.micro_batch_size=2 rollout.max_new_tokens=48 loss.beta=0.01 loss.entropy=0.001 "
        "group.skip_dead=false",
    },
    "3b": {
        "shape": {"text_config": {}, "vision_config": {}},
        "video": (62, 480, 360),
        "config": "configs/grpo_qwen2_5_vl_3b_charades.yaml",
        "overrides": "data.batch_size=2 data.workers=0",
    },
}
PHASES = {
    "vision": ("vision",),
    "sampling": ("prefill", "decode", "sampler"),
    "update": ("reference", "forward", "head", "backward"),
    "optimizer": ("optimizer",),
}


def write_model(folder: Path, size: dict, dtype: str) -> None:
    """A model folder with random weights: the tiny world's tokenizer, the given shape."""
    tiny.write_model(folder, seed=0, family="qwen2_5_vl")
    ids = AutoConfig.from_pretrained(folder).to_dict()
    shape = AutoConfig.from_pretrained(BASE).to_dict()
    shape |= {name: value for name, value in ids.items() if name.endswith("_token_id")}
    for section, values in size["shape"].items():
        shape[section] |= values
    shape["text_config"]["layer_types"] = None
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**shape), dtype=getattr(torch, dtype))
    model.save_pretrained(folder)


def write_data(folder: Path, size: dict, num: int) -> Path:
    """Records of `num` videos, each a folder of frames of noise at 2 a second."""
    num_frames, width, height = size["video"]
    rng, lines = np.random.default_rng(0), []
    for i in range(num):
        clip = folder / f"clip_{i}"
        clip.mkdir(parents=True)
        for frame in range(num_frames):
            noise = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
            Image.fromarray(noise).resize((width, height)).save(clip / f"{frame:03d}.jpg")
        record = {"id": clip.name, "task": "tvg", "video": clip.name, "fps": 2.0, "duration": num_frames / 2}
        lines.append(json.dumps(record | {"question": "When is it noisy?", "segments": [[1.0, 2.0]]}) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    return folder / "data.jsonl"


class Peaks:
    """Bytes at the most in every phase of a run's last step, above the baseline."""

    def __init__(self):
        self.baseline, self.held, self.found = 0, 0, {}

    def restart(self) -> None:
        gc.collect()
        if not torch.cuda.is_available():
            ctypes.CDLL(None).malloc_trim(0)  # memory kept from earlier phases is not this one's
        self.held = restart_peak()

    def peak(self) -> int:
        return peak_bytes() - self.baseline

    def watch(self, owner, name: str, phase: str) -> None:
        """Have every call of `owner.name` leave its peak; a later call of a phase counts if it is higher."""
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            self.restart()
            result = original(*args, **kwargs)
            self.found.setdefault(phase, []).append(self.peak())
            return result

        setattr(owner, name, watched)

    def start_from_here(self) -> None:
        """What the process holds now is not the models'."""
        self.restart()
        self.baseline = 0 if torch.cuda.is_available() else self.held


def run_two_steps(cfg: config.GrpoConfig) -> Peaks:
    """Peaks of the second step; completions have all `rollout.max_new_tokens` tokens."""
    peaks, load = Peaks(), train_grpo.load_policy

    def load_endless(*args):
        if not peaks.baseline:
            peaks.start_from_here()
        policy = load(*args)
        policy.banned = torch.cat([policy.banned, torch.tensor(policy.eos_ids)])
        return policy

    train_grpo.load_policy = load_endless
    peaks.watch(Policy, "embed_each", "vision")
    peaks.watch(train_grpo, "generate", "sampling")
    peaks.watch(Engine, "backward", "update")
    peaks.watch(Engine, "step", "optimizer")
    train_grpo.save_model = lambda *_: None  # gigabytes that nobody reads
    train_grpo.train(cfg)
    return peaks


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="300m")
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # else what is freed stays with the process, in pieces
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise SystemExit("error: one process only: each writes data and a model of its own")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = write_data(folder / "data", size, num=4)
        overrides = size["overrides"].split()
        overrides += [f"model.path={folder}/model", f"data.train={data}", f"run.dir={folder}/run", "run.steps=2"]
        overrides += ["run.save_every=1000", "run.tracker=none", "data.cache_dir=", "eval.every=0"]
        cfg = config.load(config.GrpoConfig, [str(REPO / size["config"])], overrides)
        write_model(folder / "model", size, cfg.model.dtype)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        expected = plan.plan(cfg, device=device).longest
        expected_peak = expected.peak[1]  # calculated here, before functions that the plan calls too are watched
        peaks = run_two_steps(cfg)
    print_table(args.size, expected, expected_peak, peaks)


def print_table(name: str, expected: Case, peak: int, peaks: Peaks) -> None:
    env, load = environment(), f"{os.getloadavg()[0]:.1f} processes running in the last minute"
    commit = f"{env['commit']}{' and uncommitted changes' if env['diff'] else ''}"
    print(f"{env['devices'][0]}; {load}; torch {env['packages']['torch']}; commit {commit}")
    held = ", ".join(f"{key} {size / GIB:.2f}" for key, size in expected.resident.items())
    print(f"{name}: {expected.parameters['total'] / 1e6:.0f} M parameters; {expected.launch}; GiB held: {held}\n")
    print(f"{'phase':<10} {'expected GiB':>13} {'measured':>9} {'ratio':>6} {'own expected':>13} {'own measured':>13}")
    ratios = {}
    for phase, parts in PHASES.items():
        part = max(parts, key=expected.totals.get)
        total, own = expected.totals[part], expected.run.phases[part].peak
        measured = max(peaks.found[phase][len(peaks.found[phase]) // 2 :])  # of the second step
        ratios[phase] = total / measured
        row = f"{phase:<10} {total / GIB:13.2f} {measured / GIB:9.2f} {total / measured:6.3f}"
        print(f"{row} {own / GIB:13.2f} {(measured - total + own) / GIB:13.2f}")
    measured = max(max(values[len(values) // 2 :]) for values in peaks.found.values())
    last = {"expected_gib": peak / GIB, "measured_gib": measured / GIB, "ratio": peak / measured}
    print(json.dumps({key: round(value, 3) for key, value in (last | ratios).items()}))


if __name__ == "__main__":
    main()
