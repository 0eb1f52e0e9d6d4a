"""The processes of a run and the engine they train with: collectives, sharded weights, backward, optimizer step.

One process, DDP and DeepSpeed ZeRO give the same gradients. Under ZeRO-3 a process holds a share of every weight, and
each call of a layer is a collective: outside of `whole_weights` all processes must make the same calls.
"""

import copy
import logging
import math
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object

from runtime.checkpoint import PatientSaver, sync, write_error
from runtime.watchdog import Watchdog

DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
# Groups of processes that have ended, kept until the process ends: a run hung now and then as its group was destroyed.
# The likely cause is that the destructor keeps Python's lock while it waits for gloo's thread, which may wait for it.
ENDED_GROUPS = []
EXPECTED = {  # warnings of every good run, by logger: a model's head that is its embedding is saved once, as it should
    "accelerate.utils.other": r"Removed shared tensor \{'[\w.]*lm_head\.weight'\} while saving",
    "DeepSpeed": r"Setting accelerator to CPU\.",  # which is imported without a GPU, whether it is used or not
}
for _name, _pattern in EXPECTED.items():
    logging.getLogger(_name).addFilter(lambda record, _p=_pattern: not re.search(_p, record.getMessage()))


def use_deepspeed() -> bool:
    """Whether `accelerate launch` was given a DeepSpeed configuration."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def check_engine(cfg) -> None:
    """Raises ValueError for what the engine at hand does not train as it should. `cfg`: a configuration of training."""
    if cfg.model.dtype == "bfloat16" and not cfg.model.lora_rank and not use_deepspeed():  # a step of 1e-6 is rounded
        raise ValueError(
            "model.dtype=bfloat16 trains with adapters (model.lora_rank), which are float32, or under DeepSpeed, "
            "which keeps float32 weights beside them"
        )
    if cfg.optim.muon_lr and use_deepspeed():
        raise ValueError("optim.muon_lr needs whole matrices, and DeepSpeed cuts them up: train on one process or DDP")


def check_devices() -> None:
    """Raises ValueError where a launch file for GPUs starts more processes on this machine than it has GPUs.

    A file for CPUs hides the GPUs by its gpu_ids, as those of configs/accelerate/ do. Only the machine's first process
    raises, and the others just end, because a launcher stops all at the first one that fails.
    """
    hidden = set(os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace(" ", "").split(",")) <= {"", "-1"}
    hidden = hidden or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    num, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if "LOCAL_RANK" not in os.environ or hidden or num <= gpus:
        return
    if int(os.environ["LOCAL_RANK"]):
        raise SystemExit(0)
    cpu = "configs/accelerate/cpu2.yaml and its like, or CUDA_VISIBLE_DEVICES= before the command, train on the CPU"
    todo = f"--num_processes {gpus} after the file of `accelerate launch` starts as many" if gpus else cpu
    launched = "1 process is" if num == 1 else f"{num} processes are"
    found = "1 GPU is" if gpus == 1 else f"{gpus or 'no'} GPUs are"
    raise ValueError(f"{launched} launched for GPUs and {found} found on this machine: {todo}")


def check_batch(size: int, world_size: int) -> None:
    """Raises ValueError when a batch of `size` videos does not divide by the number of processes."""
    if size % world_size:
        raise ValueError(f"data.batch_size {size} does not divide by the {world_size} processes")


class Engine:
    """All processes of a run; each of them must call every method here. Only `phase` and `unwrap` are its own.

    A process that waits for others for more than `timeout_s` ends and names them. In `wait_for_work` those who give
    signs of life may take longer. See runtime/watchdog.py.
    """

    def __init__(self, dir: str | Path, tracker: str, timeout_s: float):
        check_devices()
        on_cpu = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
        if on_cpu and use_deepspeed():  # DeepSpeed's own collectives for CPUs wait in a busy loop, for the dead too
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.accelerator = Accelerator(
            cpu=on_cpu and not use_deepspeed(),
            log_with=None if tracker == "none" else tracker,
            project_dir=dir,
            kwargs_handlers=[  # the backend's own limit comes after ours, which names who is late
                InitProcessGroupKwargs("gloo" if on_cpu else "nccl", timeout=timedelta(seconds=2 * timeout_s + 60))
            ],
        )
        if self.accelerator.mixed_precision != "no":
            raise ValueError("mixed_precision in the accelerate file must be 'no': model.dtype says the precision")
        self._plugin = self.accelerator.state.deepspeed_plugin if use_deepspeed() else None
        steps = {self.accelerator.gradient_accumulation_steps}
        if self._plugin:  # it alone knows those of a DeepSpeed JSON
            steps.add(self._plugin.deepspeed_config.get("gradient_accumulation_steps", 1))
        if steps - {1, "auto"}:
            raise ValueError("gradient_accumulation_steps in the accelerate file must be 1: it would divide the loss")
        if self._plugin and self._plugin.zero3_init_flag:
            raise ValueError("zero3_init_flag in the accelerate file must be false: weights are sharded once loaded")
        if self._plugin:  # else transformers loads sharded weights under ZeRO-3, for evaluation too
            self._plugin.dschf = None
        # how weights and optimizer are cut up among the processes: "none", "zero2" or "zero3"
        self.sharding = f"zero{self._plugin.zero_stage}" if self._plugin else "none"
        self._sharded = None  # DeepSpeed's engine of the trained model, under ZeRO-3
        self.is_main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.watchdog = Watchdog(self.rank, self.world_size, timeout_s)
        self.phase, self.wait_for_work = self.watchdog.phase, self.watchdog.wait_for_work
        self.unwrap = self.accelerator.unwrap_model
        self.skipped_in_a_row = 0  # updates whose gradient was not finite, up to now
        self.not_finite: list[str] = []  # what was not, in the last of them
        self.first_norm = 0.0  # gradient norm of this process's first update that had one: finite and above 0
        self.accelerator.register_save_state_pre_hook(_without_wrapper)
        self.accelerator.register_load_state_pre_hook(self._unwrap_all)

    def wait(self) -> None:
        with self.watchdog.meeting():
            self.accelerator.wait_for_everyone()

    def raise_together(self, action: Callable):
        """Run `action` on the main process; what it returns or raises is returned or raised on all."""
        outcome = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except (ValueError, OSError) as error:
                outcome[1] = error
        with self.watchdog.meeting():
            found, error = broadcast_object_list(outcome)
        if error is not None:
            raise error
        return found

    def try_together(self, action: Callable[[], None], on_main: bool = False) -> list[str]:
        """Run `action` on every process or the main one; returns, on all, what could not be written."""
        error = write_error(action) if self.is_main or not on_main else None
        return self.gather_rows([f"rank {self.rank}: {error}"] if error else [])

    def gather_rows(self, rows: Sequence) -> list:
        """The objects of all processes in one list, in rank order."""
        rows = list(rows)
        with self.watchdog.meeting():
            return gather_object(rows)

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """The same numbers summed over all processes; every process must bring the same keys."""
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        with self.watchdog.meeting():
            return dict(zip(values, self.accelerator.reduce(tensor, "sum").tolist(), strict=True))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, in rank order; every process must bring equally many."""
        with self.watchdog.meeting():
            return self.accelerator.gather(rows.to(self.device)).cpu()

    def maximum(self, value: float) -> float:
        return self.gather(torch.tensor([value], dtype=torch.float64)).max().item()

    def prepare(self, model, optimizer, grad_clip: float):
        """Model and optimizer for the engine at hand."""
        if self._plugin:  # it clips within its own step, and wants a batch size though no loader is prepared
            settings = self._plugin.deepspeed_config
            settings |= {"gradient_clipping": grad_clip, "train_micro_batch_size_per_gpu": 1}
            is_bfloat16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
            # the sum over micro-batches stays float32
            settings |= {"bf16": {"enabled": is_bfloat16}, "data_types": {"grad_accum_dtype": "fp32"}}
            zero = settings["zero_optimization"]
            zero["stage3_gather_16bit_weights_on_model_save"] = True
            if self.device.type == "cpu":  # a try-out, in which small weights are to be sharded as well
                zero.setdefault("stage3_param_persistence_threshold", 0)
        prepared = self.accelerator.prepare(model, optimizer)
        if self.sharding == "zero3":
            self._sharded = prepared[0]
        return prepared

    def prepare_frozen(self, model):
        """A model that is only scored with, after `prepare`: on the device, sharded under ZeRO-3."""
        if self.sharding != "zero3":
            return model.to(self.device)
        import deepspeed

        deepspeed.initialize(model=model, config=copy.deepcopy(self.accelerator.deepspeed_config))
        return model

    @contextmanager
    def whole_weights(self, gather: bool = True) -> Iterator[bool]:
        """Gather ZeRO-3's weights, unless `gather` is False, so that every process may call the model at will.

        Its hooks are off meanwhile: they would shard each layer after its first call, and gather it for every token.
        Yields whether the weights are whole. If they are not, all processes must make the same calls.
        """
        if self._sharded is None or not gather:
            yield self._sharded is None
            return
        import deepspeed

        offload = self._sharded.optimizer.parameter_offload
        params = list(self._sharded.module.parameters())
        self.wait()  # under the watchdog's eyes, which the gathering itself is not
        with deepspeed.zero.GatheredParameters(params):
            for p in params:
                p.ds_active_sub_modules.clear()
            for hooks in (offload.forward_hooks, offload.backward_hooks):
                for hook in hooks:
                    hook.remove()
                hooks.clear()
            try:
                yield True
            finally:
                offload._register_deepspeed_module(offload.module)

    def gathered_weights(self) -> dict[str, torch.Tensor] | None:
        """The trained model's weights by name, on the main process where they are sharded; else None."""
        with self.watchdog.meeting():
            return None if self._sharded is None else self.accelerator.get_state_dict(self._sharded)

    def evened(self, micro_batches: Sequence) -> list:
        """As many on every process, to make equal calls: one that has fewer than others repeats its first one."""
        num = int(self.maximum(len(micro_batches)))
        return [*micro_batches, *micro_batches[:1] * (num - len(micro_batches))]

    def backward(self, model, micro_batches: Sequence, loss_of: Callable) -> None:
        """Gradients of the sum, over all processes, of `loss_of(micro_batch)`; what `evened` repeats has weight 0.

        A loss that is not finite makes the gradient so, on all processes.
        """
        passes = self.evened(micro_batches)
        self._losses = []
        for i, micro_batch in enumerate(passes):
            is_last = i == len(passes) - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)  # DeepSpeed reduces and steps at the last one
            delay = self.accelerator.distributed_type in DDP and not is_last
            with model.no_sync() if delay else nullcontext(), self.watchdog.meeting():
                loss = loss_of(micro_batch)
                self._losses.append(loss.detach())
                spread = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
                weight = self.world_size if i < len(micro_batches) else 0.0  # engines average over the processes
                self.accelerator.backward(loss * spread * weight)

    def step(self, model, optimizer, grad_clip: float) -> float:
        """Clip, step and clear; returns the gradient norm before clipping, the same on all processes.

        A gradient that is not finite is thrown away, on all processes, and its norm returned: the run goes on.
        """
        with self.watchdog.meeting():
            norm = self.accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], grad_clip)
            norm = float(norm if norm is not None else model.get_global_grad_norm())
        is_finite = math.isfinite(norm)
        if is_finite or self._plugin:  # DeepSpeed has stepped, or not, by itself
            optimizer.step()
        if is_finite:
            self.skipped_in_a_row = 0
            self.first_norm = self.first_norm or norm
        else:
            self.skipped_in_a_row += 1
            self.not_finite = self._name_not_finite(model)
            if self.is_main:
                print(f"WARNING: the gradient's norm is {norm}; this update is skipped", file=sys.stderr)
        optimizer.zero_grad()
        return norm

    def _name_not_finite(self, model) -> list[str]:
        """Losses and gradients of this process; DeepSpeed has cleared its gradients by now."""
        found = [f"loss {loss.item()} in pass {i}" for i, loss in enumerate(self._losses) if not loss.isfinite()]
        grads = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        found += [f"gradient of {name}" for name, grad in grads if not grad.isfinite().all()]
        return [f"rank {self.rank}: {text}" for text in found]

    def save_state(self, folder: Path) -> None:
        """Weights, optimizer and random states into a folder, on the disk. Raises what could not be written."""
        savers = [PatientSaver.of(model) for model in self.accelerator._models if hasattr(model, "checkpoint_engine")]
        for saver in savers:
            saver.errors.clear()
        with self.watchdog.meeting():
            self.accelerator.save_state(str(folder), **({"save_latest": False} if savers else {}))
        for error in [error for saver in savers for error in saver.errors]:
            raise error
        if self.accelerator.is_local_main_process:  # of what this machine has written
            sync(folder)

    def load_state(self, folder: Path) -> None:
        with self.watchdog.meeting():
            self.accelerator.load_state(str(folder))

    def end(self) -> None:
        # a barrier holds no tensors: meanwhile gloo's thread lets go of those of the last call, for which it needs
        # Python's lock, while the main thread, once it ends the group, may keep that lock and wait for the thread
        self.wait()
        if torch.distributed.is_initialized():
            ENDED_GROUPS.append(torch.distributed.group.WORLD)
        with self.watchdog.meeting():
            self.accelerator.end_training()
        self.watchdog.stop()

    def _unwrap_all(self, models: list, _) -> None:
        models[:] = [self.unwrap(model) for model in models]


def _without_wrapper(_, weights: list[dict], __) -> None:
    """Names without DDP's prefix: a checkpoint of whole weights goes on with any number of processes."""
    for i, part in enumerate(weights):  # accelerate looks for shared weights in an OrderedDict alone
        weights[i] = OrderedDict((name.removeprefix("module."), value) for name, value in part.items())
