"""The processes of a run and the engine they train with: collectives, backward, optimizer step.

Not a trainer: it holds no loop and knows no model. One process, DDP and DeepSpeed ZeRO give the same gradients.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object

DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def use_deepspeed() -> bool:
    """Whether `accelerate launch` was given a DeepSpeed configuration."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def check_precision(cfg) -> None:
    """Raises ValueError where steps of 1e-6 would be lost in the rounding of bfloat16 weights. `cfg`: section model."""
    if cfg.dtype == "bfloat16" and not cfg.lora_rank and not use_deepspeed():
        raise ValueError(
            "model.dtype=bfloat16 trains with adapters (model.lora_rank), which are float32, or under DeepSpeed, "
            "which keeps float32 weights beside them"
        )


def check_batch(size: int, world_size: int) -> None:
    """Raises ValueError when a batch of `size` videos does not divide by the number of processes."""
    if size % world_size:
        raise ValueError(f"data.batch_size {size} does not divide by the {world_size} processes")


class Engine:
    """All processes of a run; everything here but the properties must be called by each of them."""

    def __init__(self, dir: str | Path, tracker: str):
        on_cpu = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
        self.accelerator = Accelerator(
            cpu=on_cpu and not use_deepspeed(),
            log_with=None if tracker == "none" else tracker,
            project_dir=dir,
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu else None,
        )
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError("ZeRO-3 is not supported yet: sampling would run on sharded weights; use zero2.yaml")

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        return self.accelerator.unwrap_model(model)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def broadcast(self, value):
        """The object of the main process, on all."""
        box = [value]
        broadcast_object_list(box)
        return box[0]

    def raise_together(self, action: Callable[[], None]) -> None:
        """Run `action` on the main process; what it raises is raised on all."""
        error = None
        if self.is_main:
            try:
                action()
            except (ValueError, OSError) as caught:
                error = caught
        error = self.broadcast(error)
        if error is not None:
            raise error

    def gather_rows(self, rows: Sequence) -> list:
        """The objects of all processes in one list, in rank order."""
        return gather_object(list(rows))

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """The same numbers summed over all processes; every process must bring the same keys."""
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, self.accelerator.reduce(tensor, "sum").tolist(), strict=True))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, in rank order; every process must bring equally many."""
        return self.accelerator.gather(rows.to(self.device)).cpu()

    def maximum(self, value: float) -> float:
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        return self.accelerator.gather(tensor).max().item()

    def prepare(self, model, optimizer, grad_clip: float):
        """Model and optimizer for the engine at hand."""
        if use_deepspeed():  # it clips within its own step, and wants a batch size though no loader is prepared
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
            settings |= {"gradient_clipping": grad_clip, "train_micro_batch_size_per_gpu": 1}
        return self.accelerator.prepare(model, optimizer)

    def backward(self, model, micro_batches: Sequence, loss_of: Callable) -> None:
        """Gradients of the sum of `loss_of(micro_batch)`; each is already divided by the step's denominator.

        The number of passes is the largest of all processes: one that has run out repeats its first micro-batch with
        weight 0, so that every collective call finds its partners. Engines average over processes; we want the sum.
        """
        num, world = int(self.maximum(len(micro_batches))), self.world_size
        for i in range(num):
            last = i == num - 1
            self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed reduces and steps at the last one
            delay = self.accelerator.distributed_type in DDP and not last
            with model.no_sync() if delay else nullcontext():
                loss = loss_of(micro_batches[i if i < len(micro_batches) else 0])
                self.accelerator.backward(loss * (world if i < len(micro_batches) else 0.0))

    def step(self, model, optimizer, grad_clip: float) -> float:
        """Clip, step and clear; returns the gradient norm before clipping.

        A gradient that is not finite is thrown away, with a warning, and its norm returned: the run goes on.
        """
        norm = self.accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], grad_clip)
        norm = float(norm if norm is not None else model.get_global_grad_norm())
        if math.isfinite(norm) or use_deepspeed():  # DeepSpeed has stepped, or not, by itself
            optimizer.step()
        elif self.is_main:
            print(f"WARNING: the gradient's norm is {norm}; this update is skipped", file=sys.stderr)
        optimizer.zero_grad()
        return norm
