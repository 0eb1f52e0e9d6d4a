"""What DeepSpeed holds of a small bfloat16 model, set up as runtime/engine.py does, in bytes a parameter; for
test_costs.py.

python -m torch.distributed.run --nproc_per_node 2 tests/zero_memory.py STAGE
"""

import gc
import json
import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.comm as dist
import torch

BUCKET = 2**20  # elements


def bytes_alive() -> int:
    """Of all tensors and gradients, each storage once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    storages = [x.untyped_storage() for x in [*tensors, *(x.grad for x in tensors if x.grad is not None)]]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr()}.values())


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(8)]).bfloat16()
    num = sum(p.numel() for p in model.parameters())
    zero = {"stage": int(sys.argv[1]), "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": zero}
    settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    optimizer = torch.optim.AdamW(model.parameters())
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    found = {"num": num, "bucket": BUCKET}
    for _ in range(2):  # the first step makes the optimizer's state
        loss = engine(torch.randn(4, 512, dtype=torch.bfloat16)).float().square().mean()
        engine.backward(loss)
        del loss
        found["before_step"] = bytes_alive()
        engine.step()
        found["after_step"] = bytes_alive()
    if dist.get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
