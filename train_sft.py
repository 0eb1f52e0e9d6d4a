"""The supervised baseline: the same data, prompts, model and run folder as GRPO, and one loss.

    python train_sft.py --config configs/tiny_sft.yaml optim.lr=1e-3

The loss is the mean negative log-prob of the target's tokens (the answer block and EOS) over the whole step.
"""

from tqdm import tqdm

import config
from config import SftConfig
from data import read_samples
from engine import check_batch, check_precision
from eval import Validator
from loader import Loader, make_workers
from optim import make_optimizer, set_learning_rate
from policy import pack
from pretrained import load_policy, save_model
from prompts import Prompt, make_builder, video_means, video_sums
from records import Sample
from rewards import format_answer
from run import Clock, Run, user_errors


def target_text(sample: Sample, think: bool) -> str:
    """The response to imitate: the record's own, or the right answer in its block."""
    if sample.response is not None:
        return sample.response
    if think:
        raise ValueError(f"sample {sample.id}: prompt.think=true needs a `response` to imitate; records have none")
    return format_answer(sample)


def target_ids(prompts: list[Prompt], policy, think: bool) -> list[list[list[int]]]:
    """One completion per prompt, EOS at its end: P lists of one list of token ids."""
    texts = [target_text(prompt.sample, think) for prompt in prompts]
    return [[policy.tokenizer(text, add_special_tokens=False).input_ids + policy.eos_ids[:1]] for text in texts]


def update(policy, optimizer, prompts, targets, num_tokens: float, cfg: SftConfig, run: Run) -> tuple[float, float]:
    """One optimizer step; returns the loss over all processes and the gradient norm."""
    raw, size = run.engine.unwrap(policy), cfg.data.micro_batch_size
    losses = []

    def loss_of(rows: slice):
        packed = pack(prompts[rows], targets[rows], raw.model.config, raw.device)
        loss = -policy(packed)[0].sum() / num_tokens
        losses.append(loss.item())
        return loss

    policy.train()
    micro_batches = [slice(i, i + size) for i in range(0, len(prompts), size)]
    run.engine.backward(policy, micro_batches, loss_of)
    grad_norm = run.engine.step(policy, optimizer, cfg.optim.grad_clip)
    return run.engine.sums({"loss": sum(losses[: len(micro_batches)])})["loss"], grad_norm


def train(cfg: SftConfig, resume: bool = False) -> Run:
    with user_errors():
        check_precision(cfg.model)
        run = Run(cfg.run.dir, config.to_yaml(cfg), cfg.run.seed, cfg.run.tracker, resume, cfg.run.keep_checkpoints)
        samples = read_samples(cfg.data.train, cfg.data.out_of_clip, cfg.run.seed, cfg.data.manifest, chat=True)
        for sample in samples:
            target_text(sample, cfg.prompt.think)
        check_batch(cfg.data.batch_size, run.engine.world_size)
        raw = load_policy(cfg.model).to(run.engine.device)
        builder = make_builder(cfg, raw.tokenizer)
        workers = make_workers(builder, cfg.data)
        validator = Validator(cfg, builder, workers, run)
        clock = Clock()
        loader = Loader(samples, builder, workers, cfg, run, clock)
    policy, optimizer = run.prepare(raw, make_optimizer(raw, cfg.optim), cfg.optim.grad_clip)
    with workers:
        for step in tqdm(range(run.start_step, cfg.run.steps), desc="sft", disable=not run.is_main):
            with clock("step"):
                lr = set_learning_rate(optimizer, step, cfg.run.steps, cfg.optim)
                with clock("data"):
                    prompts = loader.batch(step).prompts
                    targets = target_ids(prompts, raw, cfg.prompt.think)
                num_targets = sum(len(group[0]) for group in targets)
                sums = run.engine.sums({"tokens": float(num_targets)} | video_sums(prompts))
                with clock("update"):
                    loss, grad_norm = update(policy, optimizer, prompts, targets, sums["tokens"], cfg, run)
            metrics = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens/targets": sums["tokens"]}
            metrics |= video_means(sums) | {"data/num_replaced": loader.num_replaced}
            metrics |= validator(step + 1, raw) | clock.times()
            run.log(step + 1, metrics)
            if (step + 1) % cfg.run.save_every == 0 or step + 1 == cfg.run.steps:
                run.save_checkpoint(step + 1, validator.state | loader.state)
    if run.is_main:
        save_model(raw, run.dir / "final", cfg.model.path)
    run.finish()
    return run


def main(argv: list[str] | None = None) -> Run:
    with user_errors():
        cfg, resume = config.from_command_line(SftConfig, argv, __doc__, "configs/tiny_sft.yaml")
    return train(cfg, resume)


if __name__ == "__main__":
    main()
