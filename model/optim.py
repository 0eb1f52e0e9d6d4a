"""Optimizers and the learning rate: AdamW, or Muon for matrices, and a rate that is a pure function of the step.

Nothing to run.
"""

import math
from collections import defaultdict

import torch


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, AdamW for the other groups.

    Not torch.optim.Muon: its Newton-Schulz iteration is in bfloat16, which most CPUs are slow at, one matrix at a
    time; this one is in float32, all matrices of a shape at once. Updates have AdamW's size (0.2 RMS).
    """

    def __init__(self, matrices: list[torch.Tensor], others: list[dict], muon_lr: float, cfg):
        self.adamw = torch.optim.AdamW(others, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
        own = {"params": matrices, "lr": muon_lr, "base_lr": muon_lr, "weight_decay": cfg.weight_decay}
        super().__init__([own], {"momentum": 0.95})
        self._join()

    def _join(self) -> None:
        self.param_groups[1:] = self.adamw.param_groups

    @torch.no_grad()
    def step(self, closure=None) -> None:
        self.adamw.step()
        group, by_shape = self.param_groups[0], defaultdict(list)
        for p in group["params"]:
            by_shape[p.shape].append(p)
        for matrices in by_shape.values():
            updates = []
            for p in matrices:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                updates.append(p.grad.lerp(momentum, group["momentum"]))
            scale = 0.2 * max(matrices[0].shape) ** 0.5
            for p, update in zip(matrices, orthogonalise(torch.stack(updates)), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"] * scale)

    def state_dict(self) -> dict:
        own = [self.state[p]["momentum"] for p in self.param_groups[0]["params"] if p in self.state]
        return {"momentum": own, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.adamw.load_state_dict(state_dict["adamw"])
        self._join()
        for p, momentum in zip(self.param_groups[0]["params"], state_dict["momentum"]):
            self.state[p]["momentum"] = momentum.to(p.device, copy=True)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(n, rows, columns) to matrices of the same singular vectors, singular values near 1 (quintic Newton-Schulz)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if tall else x


def make_optimizer(model: torch.nn.Module, cfg) -> torch.optim.Optimizer:
    """AdamW on what is trained; matrices decay, vectors (norms, biases) do not. `cfg` is the section `optim`.

    With `cfg.muon_lr` the two-dimensional weights of layers, not the embeddings, go to Muon instead.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    is_muon = {name: cfg.muon_lr > 0 and p.ndim == 2 and "embed_tokens" not in name for name, p in trained}
    groups = [
        {
            "params": [p for n, p in trained if p.ndim >= 2 and not is_muon[n]],
            "weight_decay": cfg.weight_decay,
        },
        {"params": [p for n, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # adapters have no vectors
    if cfg.muon_lr:
        return Muon([p for n, p in trained if is_muon[n]], groups, cfg.muon_lr, cfg)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))


def set_learning_rate(optimizer, step: int, steps: int, cfg) -> float:
    """Set and return the learning rate of step `step` (from 0): linear warm-up, then constant or cosine to 0.

    A pure function of the step, so that resuming needs no scheduler state. `cfg` is the section `optim`.
    """
    scale = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    if cfg.schedule == "cosine":
        done = max(0, step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
        scale *= 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = group.get("base_lr", cfg.lr) * scale
    return cfg.lr * scale
