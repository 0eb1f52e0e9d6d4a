r"""What test_engines.py has one process do, or several under `accelerate launch`: the same training by every engine.

    accelerate launch --config_file configs/accelerate/cpu2_zero3.yaml \
        tests/engine_worker.py zero3 FOLDER WORLD section.key=value ...
"""

import io
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from conftest import make_cfg, make_policy, make_prompts, metrics_of, open_run, rewards_of, sft_cfg, sgd

import config
import eval as evaluation
import policy as policy_module
import select_data
import train_grpo
import train_sft
from config import GrpoConfig
from groups import Batch, choose_groups
from model.optim import make_optimizer, set_learning_rate
from policy import pack
from rollout import Rollout, generate
from runtime.run import Run

NUM_STEPS, NUM_VIDEOS, GROUP_SIZE, LONGEST = 20, 4, 4, 9
ADAMW = ("loss.beta=0.1", "optim.lr=3e-4", "optim.warmup_steps=3", "optim.schedule=cosine", "optim.weight_decay=0.1")
CLIPPED = (*ADAMW, "optim.grad_clip=0.3", f"run.steps={NUM_STEPS}", "data.micro_batch_size=2")
VISION = ("model.freeze_vision=false", "model.gradient_checkpointing=true")
CASES = {  # overrides by case; names with sgd: plain SGD
    "adamw": CLIPPED,
    "sgd": (*CLIPPED, "optim.lr=0.01", "optim.grad_clip=1e9"),
    "two_updates": (*CLIPPED, *VISION, "loss.updates_per_rollout=2", "loss.clip_low=0.02", "loss.clip_high=0.02"),
}
# Steps that bfloat16 would round away: they are less than half as wide as its gaps between most weights
SMALL = (*CLIPPED, "run.steps=8", "optim.lr=1e-5", "optim.warmup_steps=0", "optim.schedule=constant")
DTYPES = {"one": "float32", "zero2": "bfloat16", "zero3": "bfloat16"}  # in which an engine takes those steps
NUM_REST, REST = 8, 2**-9  # further micro-batches and their weight; 1 + 2**-9 is 1 in bfloat16
SHORT = ("rollout.group_size=2", "rollout.max_new_tokens=3", "eval.max_new_tokens=3", "group.skip_dead=false")
SHORT = (*SHORT, "loss.entropy=0.01", "group.max_refills=0")
LOOPS = {  # overrides by GRPO run
    "grpo": (),
    "lora": ("model.lora_rank=4", "optim.lr=1e-2"),
    "sharded": ("model.gather_weights=false", "model.freeze_vision=false", "rollout.micro_batch_size=1", *SHORT),
}
PROGRAMS = {"one": (*LOOPS, "sft", "eval", "select"), "ddp": (), "zero2": ("grpo",)}
PROGRAMS |= {"zero3": PROGRAMS["one"]}
SPLITS = [(2, ()), (3, ()), (1, ()), (2, (0, 1)), (3, (2,))]  # videos of the first process, dead groups; by step


# ---- recorded completions and advantages ---------------------------------------------------------------------------


def recorded(prompts, step: int, dead: tuple[int, ...]) -> tuple[Rollout, torch.Tensor]:
    """A step's completions, of 1 to 9 tokens, and their rewards (4, 4); the same in any process."""
    generator = torch.Generator().manual_seed(step)
    lengths_B = torch.randint(1, LONGEST + 1, (NUM_VIDEOS * GROUP_SIZE,), generator=generator)
    lengths_B[: 2 * GROUP_SIZE] = lengths_B[: 2 * GROUP_SIZE].clamp_max(4)  # so that shares are unequal
    tokens_BT = torch.randint(0, 256, (len(lengths_B), LONGEST), generator=generator)
    mask_BT = torch.arange(LONGEST) < lengths_B[:, None]
    truncated_B, texts = torch.zeros(len(lengths_B)).bool(), [""] * len(lengths_B)
    rewards_NG = torch.randn(NUM_VIDEOS, GROUP_SIZE, generator=generator)
    rewards_NG[list(dead)] = 0.7
    embeds = (torch.empty(0),) * len(prompts)  # for the caller to fill in
    logps_BT = torch.zeros(mask_BT.shape)
    return Rollout(tuple(prompts), embeds, tokens_BT, mask_BT, logps_BT, truncated_B, texts), rewards_NG


def own_groups(raw, prompts, step: int, cfg, run: Run) -> tuple[Rollout, Batch]:
    """This process's share of a step; one process has all of it."""
    split, dead = SPLITS[step % len(SPLITS)]
    some = [prompts[(NUM_VIDEOS * step + i) % len(prompts)] for i in range(NUM_VIDEOS)]
    rollout, rewards_NG = recorded(some, step, dead)
    ends = (0, split, NUM_VIDEOS) if run.engine.world_size == 2 else (0, NUM_VIDEOS)
    own = list(range(*ends[run.engine.rank : run.engine.rank + 2]))
    tokens_NG = rollout.mask_BT.sum(1).view(NUM_VIDEOS, GROUP_SIZE)
    rollout = rollout.take(own)
    with run.engine.whole_weights():
        rollout = replace(rollout, video_embeds=tuple(raw.embed_each(rollout.prompts)))
    return rollout, choose_groups(rewards_of(rewards_NG, tokens_NG=tokens_NG, places=own), cfg)


class Recorder:
    """In the place of train_grpo.packed_logps: keeps what it returned, by sample and by policy or reference."""

    def __init__(self):
        self.rows: dict[tuple[str, str], torch.Tensor] = {}

    def __call__(self, policy, packed, *args, **kwargs):
        logps_BT, entropy_BT = policy_module.packed_logps(policy, packed, *args, **kwargs)
        kind = "policy" if torch.is_grad_enabled() else "reference"
        for prompt, rows in zip(packed.prompts, logps_BT.detach().split(GROUP_SIZE), strict=True):
            self.rows[kind, prompt.sample.id] = rows.clone()
        return logps_BT, entropy_BT


def train_recorded(world: Path, cfg: GrpoConfig, case: str) -> dict:
    """Per step the gradient norm, KL and log-probs, and the weights at the end; the first process has all of it."""
    run = open_run(cfg)
    m = cfg.model
    raw = make_policy(
        world,
        sharpen=1.5,
        freeze_vision=m.freeze_vision,
        gradient_checkpointing=m.gradient_checkpointing,
        dtype=m.dtype,
    )
    prompts = make_prompts(world, raw, num=2 * NUM_VIDEOS)
    reference = make_policy(world, sharpen=1.0, dtype=m.dtype).requires_grad_(False)
    optimizer = sgd(raw, cfg.optim) if "sgd" in case else make_optimizer(raw, cfg.optim)
    policy, optimizer = run.prepare(raw, optimizer, cfg.optim.grad_clip)
    reference = run.engine.prepare_frozen(reference)
    steps, start = [], weights_of(raw, run) if case == "small" else {}
    for step in range(cfg.run.steps):
        lr = set_learning_rate(optimizer, step, cfg.run.steps, cfg.optim)
        steps.append(recorded_step(raw, policy, reference, optimizer, prompts, step, cfg, run) | {"lr": lr})
    results = {case: {"steps": steps, "weights": weights_of(raw, run)}}
    if case == "sgd":
        results["after_nan"] = around_nan(raw, policy, reference, optimizer, prompts, cfg, run)
    if case == "adamw":
        how = [(gather, num) for gather in (True, False) for num in (4, 9)]
        results["gathers"] = {(gather, num): count_gathers(raw, prompts, num, gather, run) for gather, num in how}
    if case == "small":
        masters = masters_of(raw, run)
        norms = [norm_of_sum(raw, policy, optimizer, prompts, num, run) for num in (0, NUM_REST)]
        results[case] |= {"start": start, "masters": masters, "sums": norms}
    return results


def recorded_step(raw, policy, reference, optimizer, prompts, step: int, cfg, run: Run) -> dict:
    recorder = train_grpo.packed_logps = Recorder()
    own = own_groups(raw, prompts, step, cfg, run)
    stats = train_grpo.update(policy, reference, optimizer, *own, cfg, run)
    rows = {key: value for part in run.engine.gather_rows([recorder.rows]) for key, value in part.items()}
    sums = run.engine.sums({name: getattr(stats, name) for name in ("kl", "tokens", "clipped")})
    return sums | {
        "grad_norm": sum(stats.grad_norms) / max(1, len(stats.grad_norms)),
        "logps": rows,
        "kl": sums["kl"] / sums["tokens"],
    }


def weights_of(raw, run: Run) -> dict[str, torch.Tensor]:
    weights = run.engine.gathered_weights()
    weights = raw.state_dict() if weights is None and run.is_main else weights or {}
    return {name: weight.clone() for name, weight in weights.items()}


def masters_of(raw, run: Run) -> dict[str, torch.Tensor]:
    """The float32 weights that the optimizer steps on, of what is trained."""
    trained = {name: p for name, p in raw.named_parameters() if p.requires_grad}
    if run.engine.sharding == "none":
        return {name: p.detach().clone() for name, p in trained.items()}
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in trained.items()}


def norm_of_sum(raw, policy, optimizer, prompts, num: int, run: Run) -> float:
    """The gradient norm of one micro-batch and of `num` more like it, but for their small weight."""
    packed = pack(prompts[:1], [[[65, 66, 67]]], raw.model.config, raw.device)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # so that every sum is of the same weights
    run.engine.backward(policy, [1.0] + [REST] * num, lambda weight: weight * policy(packed)[0].sum())
    return run.engine.step(policy, optimizer, 1e9)


def around_nan(raw, policy, reference, optimizer, prompts, cfg, run: Run) -> dict:
    """A step whose loss is not a number on one process, and one more; the weights before, between and after."""
    weights, norms = [weights_of(raw, run)], []
    whole_loss = train_grpo.policy_loss
    for factor in (float("nan") if run.is_main else 1.0, 1.0):

        def scaled_loss(*args, factor=factor, **kwargs):
            loss, sums = whole_loss(*args, **kwargs)
            return loss * factor, sums

        train_grpo.policy_loss = scaled_loss
        norms.append(recorded_step(raw, policy, reference, optimizer, prompts, 0, cfg, run)["grad_norm"])
        weights.append(weights_of(raw, run))
    train_grpo.policy_loss = whole_loss
    return {"norms": norms, "weights": weights}


def count_gathers(raw, prompts, max_new_tokens: int, gather: bool, run: Run) -> int:
    """Collectives that gather while two videos are embedded and answered with exactly so many tokens."""
    eos_ids, raw.eos_ids = raw.eos_ids, []
    generation, raw.model.generation_config.eos_token_id = raw.model.generation_config.eos_token_id, None
    with torch.profiler.profile() as profile, run.engine.whole_weights(gather) as whole:
        embeds = raw.embed_each(prompts[:2])
        sizes = config.RolloutConfig(group_size=2, max_new_tokens=max_new_tokens, micro_batch_size=2)
        generate(raw, prompts[:2], embeds, sizes, synced=not whole)
    raw.eos_ids, raw.model.generation_config.eos_token_id = eos_ids, generation
    return sum("gather" in event.name for event in profile.events() if event.name.startswith("gloo:"))


# ---- whole programs ------------------------------------------------------------------------------------------------


def run_program(name: str, world: Path, folder: Path, taught: list[str]) -> None:
    run_dir, cache = f"run.dir={folder}/{name}", f"data.cache_dir={folder}/cache"
    if name in ("eval", "select"):
        same = (taught[0], cache, run_dir, "data.workers=0", "prompt.think=false", "prompt.system_plain=")
        test = (f"data.test={world}/tvg_test.yaml", "eval.batch_size=3", "eval.max_new_tokens=12")
        train = (f"data.train={world}/tvg_test.yaml", "rollout.micro_batch_size=3", "rollout.max_new_tokens=12")
        if name == "eval":
            evaluation.evaluate(config.load(config.EvalRunConfig, [], [*same, *test]))
        else:
            rule = ("select.rule=mean_range", "select.low=0", "select.high=1")
            select_data.select(config.load(config.SelectConfig, [], [*same, *train, *rule]))
        return
    data = (f"data.train={world}/mix_train.yaml", "data.micro_batch_size=1", "run.seed=3", "run.save_every=1")
    data += (f"data.validation={world}/tvg_validation.yaml", "eval.every=1", "eval.num_samples=3", "eval.batch_size=1")
    if name == "sft":
        train_sft.train(sft_cfg(world, folder, *taught, *data, run_dir))
    else:
        refilled = ("loss.beta=0.1", "group.max_refills=1")
        train_grpo.train(make_cfg(world, folder, *taught, *data, *refilled, *LOOPS[name], run_dir))


def run_twice(world: Path, folder: Path, taught: list[str]) -> list[dict]:
    """A program in bfloat16 with the self-check, then its second step again, from the checkpoint of the first."""
    names = ("model.dtype=bfloat16", "run.self_check=true", "run.save_every=1", f"run.dir={folder}/twice")
    data, found = f"data.train={world}/mix_train.yaml", []
    cfg = make_cfg(world, folder, *taught, *SHORT, *names, data, "loss.beta=0.1")
    for resume in (False, True):
        AcceleratorState._reset_state()
        with redirect_stdout(io.StringIO()) as printed:
            run = train_grpo.train(cfg, resume)
        raw = run.engine.unwrap(run.engine.accelerator._models[0])
        found.append({"masters": masters_of(raw, run), "rows": metrics_of(run.dir), "printed": printed.getvalue()})
        if run.is_main and not resume:
            shutil.rmtree(run.dir / "final")
            shutil.rmtree(run.dir / "checkpoints" / "step_000002")
    return found


def work(engine: str, folder: Path, world: Path, taught: list[str]) -> None:
    torch.set_num_threads(1)
    policy_module.HEAD_CHUNK = 32  # so that processes would call the head more or less often
    end_training, Accelerator.end_training = Accelerator.end_training, lambda self: None
    results = {}
    cases = CASES | ({"small": (*SMALL, f"model.dtype={DTYPES[engine]}")} if engine in DTYPES else {})
    for case, overrides in cases.items():
        AcceleratorState._reset_state()  # DeepSpeed's settings are those of the run before
        results |= train_recorded(world, make_cfg(world, folder, *overrides, f"run.dir={folder}/{case}"), case)
    train_grpo.packed_logps = policy_module.packed_logps
    if DTYPES.get(engine) == "bfloat16":
        results["twice"] = run_twice(world, folder, taught)
    if PartialState().is_main_process:
        torch.save(results, folder / "results.pt")
    for name in PROGRAMS[engine]:
        AcceleratorState._reset_state()
        run_program(name, world, folder, taught)
    Accelerator.end_training = end_training
    Accelerator().end_training()


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
