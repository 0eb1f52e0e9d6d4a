"""A run of a linear model, for the tests of runtime/run.py and runtime/engine.py."""

import torch

from config import RunConfig
from runtime.run import Run

YAML = "run:\n  seed: 0\n  steps: 4\nloss:\n  beta: 0.1\n"


def open_run(path, text: str = YAML, resume: bool = False, keep: int = 2, **keys) -> Run:
    """`keys` are further ones of the section run."""
    cfg = RunConfig(dir=str(path), steps=4, keep_checkpoints=keep, tracker="none", **keys)
    return Run(cfg, text, resume)


def prepared(run: Run) -> tuple[torch.nn.Module, object]:
    """A linear model of 2 inputs and its optimizer, wrapped as in training."""
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0]]))
        model.bias.zero_()
    return run.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1), grad_clip=1e9)


def take_step(run: Run, model, optimizer, grad_clip: float = 1e9) -> float:
    run.engine.backward(model, [torch.rand(3, 2)], lambda x: model(x).square().sum())
    return run.engine.step(model, optimizer, grad_clip)
