"""Optimizers and learning rates against hand-computed steps."""

import copy
import math

import pytest
import torch

import config
from model.optim import make_optimizer, orthogonalise, set_learning_rate


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    model[2].requires_grad_(False)
    optimizer = make_optimizer(model, config.OptimConfig(lr=0.5, weight_decay=0.1, beta1=0.8, beta2=0.9))
    decayed, plain = optimizer.param_groups
    assert decayed["params"] == [model[0].weight] and decayed["weight_decay"] == 0.1
    assert [id(p) for p in plain["params"]] == [id(p) for p in (model[0].bias, model[1].weight, model[1].bias)]
    assert plain["weight_decay"] == 0.0
    assert all(group["lr"] == 0.5 and group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    matrices *= torch.tensor([0.01, 1, 50]).view(3, 1, 1)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    levelled = u.mT @ orthogonalise(matrices) @ vh.mT
    values = levelled.diagonal(dim1=1, dim2=2)
    assert (s[:, 0] / s[:, -1]).min() > 1.5 and values[:, :-1].min() > 0.5 and values.max() < 1.3
    torch.testing.assert_close(levelled, torch.diag_embed(values), atol=1e-4, rtol=0)


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest():
    """First step of Muon: decay, then the orthogonalised gradient of 0.2 RMS; AdamW's: lr times the sign."""
    model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(4, 3), "layer": torch.nn.Linear(3, 5)})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, config.OptimConfig(lr=0.01, muon_lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    step = 0.1 * 0.2 * 5**0.5 * orthogonalise(model["layer"].weight.grad[None])[0]
    torch.testing.assert_close(model["layer"].weight.detach(), 0.95 * before["layer.weight"] - step)
    assert 0.014 < step.square().mean().sqrt() < 0.026
    bias, table = model["layer"].bias, model["embed_tokens"].weight
    torch.testing.assert_close(bias.detach(), before["layer.bias"] - 0.01 * bias.grad.sign())
    decayed = before["embed_tokens.weight"] * (1 - 0.01 * 0.5)
    torch.testing.assert_close(table.detach(), decayed - 0.01 * table.grad.sign(), atol=1e-6, rtol=0)
    set_learning_rate(optimizer, 0, 9, config.OptimConfig(lr=0.01, muon_lr=0.1, warmup_steps=1))
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.005, 0.005]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("warmup", "schedule", "steps", "expected"),
    [
        (0, "constant", 3, [1, 1, 1]),
        (3, "constant", 6, [0.25, 0.5, 0.75, 1, 1, 1]),
        (0, "cosine", 4, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        (1, "cosine", 5, [0.5, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        (5, "cosine", 3, [1 / 6, 2 / 6, 3 / 6]),
    ],
)
def test_learning_rates_by_hand(warmup, schedule, steps, expected):
    """cos(pi / 4) = sqrt(1 / 2), so a quarter of the way down the cosine is at 1/2 + sqrt(1 / 8)."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=9.0)
    cfg = config.OptimConfig(lr=2.0, warmup_steps=warmup, schedule=schedule)
    rates = []
    for step in range(steps):
        rates.append(set_learning_rate(optimizer, step, steps, cfg) / 2)
        assert optimizer.param_groups[0]["lr"] == 2 * rates[-1]
    assert rates == pytest.approx(expected)
    assert set_learning_rate(optimizer, 1, steps, cfg) == 2 * rates[1]  # a function of the step alone


def test_muon_moves_matrices_by_its_rate_and_resumes_exactly():
    """Matrices move by lr * 0.2 * sqrt(longest side) * an orthogonal matrix; vectors and embeddings are AdamW's."""

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(5, 4), "layer": torch.nn.Linear(4, 6)})
        return model, make_optimizer(model, config.OptimConfig(lr=0.1, muon_lr=0.5, weight_decay=0.0))

    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    model, optimizer = fresh()
    assert {group["lr"] for group in optimizer.param_groups} == {0.1, 0.5}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer, 0)
    moved = (before["layer.weight"] - model["layer"].weight.detach()) / (0.5 * 0.2 * 6**0.5)
    assert torch.linalg.svdvals(moved).min() > 0.5 and torch.linalg.svdvals(moved).max() < 1.3
    for name in ("embed_tokens.weight", "layer.bias"):  # AdamW's first step has the size of its rate
        torch.testing.assert_close((before[name] - model.get_parameter(name)).abs().max(), torch.tensor(0.1))
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    step(model, optimizer, 1)
    again, resumed = fresh()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    set_learning_rate(resumed, 0, 10, config.OptimConfig(lr=0.1, muon_lr=0.5))
    step(again, resumed, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
