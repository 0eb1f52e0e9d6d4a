"""The benchmark of a whole step runs at small sizes, and its two ways agree; times are not looked at."""

import importlib
import json

import pytest
from conftest import REPO

from preflight import plan

pytestmark = pytest.mark.slow
KEYS = {"step_ratio", "generate_ratio", "update_ratio", "memory_ratio", "token_ratio", "step_over_floor"}
KEYS |= {"decode_over_floor", "update_share", "tokens_per_s", "same_tokens", "diff"}
BASE = "Qwen/Qwen2.5-VL-3B-Instruct/config.json"


@pytest.fixture
def bench(monkeypatch, capsys):
    """`bench(*arguments)` runs the benchmark and returns its last line."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))

    def run(*arguments: str) -> dict:
        importlib.import_module("bench_step").main([*arguments, "--repeats", "1"])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.mark.parametrize("options", [("--videos", "2"), ("--checkpointing",)], ids=["videos", "checkpointing"])
def test_both_ways_take_the_same_step(bench, options, tmp_path):
    figure = tmp_path / "ratios.png"
    last = bench("--sizes", "54,4,2", "--figure", str(figure), *options)
    assert last.keys() == KEYS and all(value is not None for value in last.values())
    assert last["same_tokens"] == 1 and last["diff"] < 1e-4
    assert last["token_ratio"] == pytest.approx(2 * (54 + 4) / (54 + 2 * 4), rel=1e-3)
    assert figure.stat().st_size > 1000


def test_the_large_model_takes_it_too(bench, tmp_path, monkeypatch):
    """What --model 3b does on a GPU, with fewer and narrower layers: bfloat16, so log-probs are only near."""
    shape = json.loads((plan.MODELS / BASE).read_text())
    shape |= {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    small = {"depth": 2, "hidden_size": 160, "num_heads": 2, "intermediate_size": 320, "fullatt_block_indexes": [1]}
    shape["vision_config"] |= small | {"out_hidden_size": 256}
    path = tmp_path / BASE
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(shape))
    monkeypatch.setattr(importlib.import_module("ways"), "MODELS", tmp_path)
    last = bench("--model", "3b", "--sizes", "320,4,2", "--checkpointing")
    assert all(value is not None for value in last.values()) and last["diff"] < 0.05


def test_a_way_that_runs_out_of_memory_is_reported(bench, monkeypatch):
    """The repeated prompt may not fit where ours does: its update has no number then, all else does."""
    ways = importlib.import_module("ways")

    def no_memory(*_, **__):
        raise ways.torch.OutOfMemoryError

    monkeypatch.setattr(ways, "policy_loss", no_memory)
    last = bench("--sizes", "54,4,2")
    assert {name for name, value in last.items() if value is None} == {"step_ratio", "update_ratio", "memory_ratio"}
