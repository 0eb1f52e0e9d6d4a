"""The supervised baseline: the same data, prompts, model and run folder as GRPO, and one loss.

    python train_sft.py --config configs/tiny_sft.yaml optim.lr=1e-3

The loss is the mean negative log-prob of the target's tokens (the answer block and EOS) over the whole step.
"""

import math

from config import SftConfig
from runtime.arguments import from_command_line, user_errors

if __name__ == "__main__":  # here, so that a misspelt key is told before torch is imported, which takes seconds
    from_command_line(SftConfig, None, __doc__, "configs/tiny_sft.yaml")

import torch

from data import Loader, make_reader
from metrics.validation import Validator
from model.folder import save_model
from model.optim import make_optimizer, set_learning_rate
from policy import load_policy, pack
from preflight import plan
from preflight.selfcheck import check_model, check_ranks, open_run
from prompts import Prompt, video_means, video_sums
from records.files import read_samples
from records.record import Sample
from rewards import format_answer
from runtime.clock import Clock
from runtime.run import Run
from runtime.signals import interruptible


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
    micro_batches = [slice(i, i + size) for i in range(0, len(prompts), size)]
    num_tokens_of = [sum(len(group[0]) for group in targets[rows]) for rows in micro_batches]
    most_tokens, losses = int(run.engine.maximum(max(num_tokens_of))), []

    def loss_of(rows: slice):
        packed = pack(prompts[rows], targets[rows], raw.model.config, raw.device, most_tokens)
        loss = -policy(packed)[0].sum() / num_tokens
        losses.append(loss.detach())
        return loss

    policy.train()
    run.engine.backward(policy, micro_batches, loss_of)
    grad_norm = run.engine.step(policy, optimizer, cfg.optim.grad_clip)
    own = torch.stack(losses[: len(micro_batches)]).tolist()  # at once: a device that is asked stands still
    return run.engine.sums({"loss": sum(own)})["loss"], grad_norm


def train(cfg: SftConfig, resume: bool = False) -> Run:
    with user_errors():
        run = open_run(cfg, resume)
        samples = read_samples(cfg.data.train, cfg.data.out_of_clip, cfg.run.seed, cfg.data.manifest, chat=True)
        for sample in samples:  # so that one without a response is told now
            target_text(sample, cfg.prompt.think)
        raw = load_policy(cfg.model).to(run.engine.device)
        check_ranks(raw, samples, cfg, run)
        reader = make_reader(cfg, raw.tokenizer, raw.device)
        validator = Validator(cfg, reader, run, samples)
        clock = Clock(run.engine.phase)
        loader = Loader(samples, reader, cfg, run, clock)
    policy, optimizer = run.prepare(raw, make_optimizer(raw, cfg.optim), cfg.optim.grad_clip)
    with reader.workers, run.stoppable():
        with user_errors():
            check_model(policy, None, loader.peek(run.start_step), reader, cfg, run)
        for step in run.steps("sft"):
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
            metrics |= {"update/num_skipped": float(not math.isfinite(grad_norm))}
            metrics |= validator(step + 1, raw) | clock.read()
            run.log(step + 1, metrics)
            rows = [{"step": step + 1, "id": p.sample.id, "target": group[0]} for p, group in zip(prompts, targets)]
            run.check_finite(step + 1, rows)
            del prompts  # the next step needs the memory of their videos' patches
            if run.save_due(step + 1):
                run.save_checkpoint(step + 1, validator.state | loader.state)
    run.finish(lambda folder, weights: save_model(raw.model, raw.adapter, folder, cfg.model.path, weights))
    return run


def main(argv: list[str] | None = None) -> Run | None:
    cfg, resume, planned = from_command_line(SftConfig, argv, __doc__, "configs/tiny_sft.yaml")
    if planned:
        with user_errors():
            return plan.show(cfg, planned, lambda sample: target_text(sample, cfg.prompt.think))
    with interruptible():
        run = train(cfg, resume)
    run.die_if_stopped()
    return run


if __name__ == "__main__":
    main()
