"""The training loops: rewards rise, resuming changes nothing, recipes and data of all kinds run, bad input is named."""

import dataclasses
import json

import pytest
import torch
from conftest import SHARED, make_cfg, metrics_of, read_jsonl, sft_cfg, weights_of
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import config
import eval as evaluation
import train_grpo
import train_sft
from page.samples import frames_for, views_of
from records.files import read_samples
from records.record import FIELDS, to_sample
from runtime.clock import restart_peak

CLIPS = {
    "llamafactory/1.mp4": 3.0,
    "llamafactory/2.avi": 3.0,
    "ask_anything/yoga.mp4": 10.0,
    "dmlc_decord/flipping_a_pancake.mkv": 10.0,
    "pytorch_torchcodec/nasa_13013.mp4": 13.0,
}

# ---- learning ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grpo_run(world, taught, tmp_path_factory):
    """Folder of a short GRPO run with validation."""
    folder = tmp_path_factory.mktemp("grpo")
    validation = (f"data.validation={world}/tvg_validation.yaml", "eval.every=10", "eval.num_samples=4")
    sizes = ("data.batch_size=8", "run.steps=30", "run.save_every=15", "optim.lr=5e-4")
    return train_grpo.train(make_cfg(world, folder, *taught, *validation, *sizes)).dir


def test_the_sft_loss_falls(sft_run):
    losses = [row["loss"] for row in metrics_of(sft_run)]
    assert losses[0] > 5 and losses[-1] < 1.5  # uniform over 500 tokens is 6.2


@pytest.mark.parametrize("loop", ["grpo", "sft"])
def test_a_step_makes_its_patches_once_and_keeps_none(world, tmp_path, patches_held, loop):
    """The tower is trained, and the reference has its own: three runs of a tower read them. The device holds them, so
    those of the step before must not be there any more."""
    make, train = (make_cfg, train_grpo.train) if loop == "grpo" else (sft_cfg, train_sft.train)
    names = ("model.freeze_vision=false", "loss.beta=0.1", "run.steps=3")
    validation = (f"data.validation={world}/tvg_validation.yaml", "eval.every=2", "eval.num_samples=2")
    train(make(world, tmp_path, *names, *validation))
    assert patches_held == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4]  # the step's are there while it is validated


def test_the_reward_rises(grpo_run):
    rewards = torch.tensor([row["reward/total"] for row in metrics_of(grpo_run)], dtype=torch.float64)
    first, last = rewards[:10], rewards[-10:]
    rise, error = last.mean() - first.mean(), ((first.var() + last.var()) / 10).sqrt()
    assert rise > 0.1 and rise > 3 * error


def test_the_kl_starts_at_zero_and_grows(grpo_run):
    kls = [row["kl"] for row in metrics_of(grpo_run)]
    assert kls[0] == 0.0 and all(kl > 0 for kl in kls[1:]) and kls[-1] > 0.01


def test_sampled_and_scored_agree_throughout(grpo_run):
    rows = metrics_of(grpo_run)
    assert max(row["logp_gap/max"] for row in rows) < 1e-4
    assert all(0 <= row["logp_gap/mean"] <= row["logp_gap/max"] for row in rows)


def test_metrics_are_those_of_the_samples(grpo_run):
    """The means of metrics.jsonl, again from the completions that samples.jsonl holds."""
    samples = read_jsonl(grpo_run / "samples.jsonl")
    assert [row["step"] for row in samples] == [1 + i // 8 for i in range(240)]
    for row in metrics_of(grpo_run):
        groups = [sample for sample in samples if sample["step"] == row["step"]]
        assert len({group["id"] for group in groups}) > 4 and {group["task"] for group in groups} == {"tvg"}
        assert all(len(group[key]) == 8 for group in groups for key in ("completions", "rewards", "parts"))
        parts = [part for group in groups for part in group["parts"]]
        for name in ("format", "iou"):
            assert row[f"reward/{name}"] == pytest.approx(sum(part[name] for part in parts) / 64)
        totals = torch.tensor([group["rewards"] for group in groups])
        torch.testing.assert_close(totals.flatten(), torch.tensor([(p["format"] + p["iou"]) / 2 for p in parts]))
        assert row["reward/total"] == pytest.approx(totals.mean().item())
        assert row["group/frac_mixed"] == (totals.std(1) > 1e-4).sum() / 8
    assert any(0 < row["group/frac_mixed"] < 1 for row in metrics_of(grpo_run))


def test_a_row_of_samples_is_a_record_with_advantages(grpo_run, world):
    """All that a report shows of a group, its frames too, is known from the row."""
    known = {sample.id: sample for sample in read_samples(f"{world}/tvg_train.yaml")}
    for row in read_jsonl(grpo_run / "samples.jsonl"):
        sample, _ = to_sample({key: row[key] for key in FIELDS if key in row}, grpo_run)
        assert sample == known[row["id"]]
        rewards = torch.tensor(row["rewards"])
        alive = rewards.std() > 1e-4
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6) * alive
        # float32 rewards that differ by little: their differences have few digits
        torch.testing.assert_close(torch.tensor(row["advantages"]), expected, atol=1e-3, rtol=0)
    views, num = views_of(grpo_run / "samples.jsonl", 5, [], [])
    frames = frames_for(views)
    assert num == 240 and len(views) == 5
    for view in views:
        times = [time for time, _ in frames[view["frames"]]]
        assert len(times) == 8 and 0 < times[0] < times[-1] < view["duration"] == known[view["id"]].duration


def test_the_final_model_loads_elsewhere(grpo_run):
    model = AutoModelForImageTextToText.from_pretrained(grpo_run / "final")
    tokenizer = AutoTokenizer.from_pretrained(grpo_run / "final")
    assert model.config.model_type == "qwen2_5_vl" and len(tokenizer) > 256
    trained = load_file(grpo_run / "checkpoints" / "step_000030" / "model.safetensors")
    assert len(trained) > 50
    for name, tensor in trained.items():
        assert torch.equal(model.state_dict()[name.removeprefix("model.")], tensor), name


def test_validation_keeps_the_best_model(grpo_run):
    rows = metrics_of(grpo_run)
    scores = {row["step"]: row["validation/score"] for row in rows if "validation/score" in row}
    assert sorted(scores) == [10, 20, 30]
    assert all(row["validation/tvg/miou"] == row["validation/score"] for row in rows if row["step"] in scores)
    saved = json.loads((grpo_run / "checkpoints" / "step_000030" / "run.json").read_text())
    state = {"best": max(scores.values()), "num_asked": 240, "num_bad": 0, "alarm": [0, 0, 0], "skipped_in_a_row": 0}
    assert saved == {"step": 30, "state": state, "num_processes": 1, "sharding": "none"}
    AutoModelForImageTextToText.from_pretrained(grpo_run / "best")
    best, final = load_file(grpo_run / "best" / "model.safetensors"), weights_of(grpo_run)
    is_last = max(scores, key=lambda step: (scores[step], -step)) == 30
    assert all(torch.equal(best[name], final[name]) for name in final) == is_last


@pytest.mark.parametrize("loop", ["grpo", "sft"])
def test_validation_is_of_all_tasks_and_tells_what_it_shares_with_training(world, tmp_path, capsys, loop):
    """The first samples of a mix are all of one task; those of the training set are no test of anything."""
    make, train = (make_cfg, train_grpo.train) if loop == "grpo" else (sft_cfg, train_sft.train)
    for split, tells in (("validation", False), ("train", True)):
        mix = (f"data.train={world}/mix_train.yaml", f"data.validation={world}/mix_{split}.yaml")
        few = ("run.steps=1", "eval.every=1", "eval.num_samples=6", f"run.dir={tmp_path}/{split}")
        run = train(make(world, tmp_path, *mix, *few))
        said, num = capsys.readouterr(), len(read_samples(f"{world}/mix_{split}.yaml"))
        line = f"validation: 6 of {num} records: tvg/tiny 2, mcqa/tiny 2, gqa/tiny 2\n"
        assert said.out.count(line) == 1
        assert {f"validation/{name}" for name in ("tvg/miou", "mcqa/accuracy", "gqa/acc_gqa")} <= metrics_of(run.dir)[
            0
        ].keys()
        warned = [line for line in said.err.splitlines() if "validation records" in line]
        assert len(warned) == tells
        if tells:
            assert warned[0].startswith("WARNING: 6 validation records and ") and "in the training set" in warned[0]


def test_beta_zero_loads_no_reference(world, taught, tmp_path, monkeypatch):
    loads = []

    def counted(*args):
        loads.append(args)
        return original(*args)

    original = train_grpo.load_policy
    monkeypatch.setattr(train_grpo, "load_policy", counted)
    for beta, expected in ((0.0, 1), (0.04, 2)):
        loads.clear()
        train_grpo.train(make_cfg(world, tmp_path, *taught, f"loss.beta={beta}", f"run.dir={tmp_path}/run{beta}"))
        assert len(loads) == expected
    kls = {beta: [row["kl"] for row in metrics_of(tmp_path / f"run{beta}")] for beta in (0.0, 0.04)}
    assert kls[0.0] == [0.0, 0.0]
    assert kls[0.04][0] == 0.0 and kls[0.04][1] > 0


# ---- variants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["temporal_r1", "dapo", "dr_grpo", "rloo", "gspo", "lora"])
def test_every_recipe_runs_on_the_tiny_world(world, taught, tmp_path, recipe):
    """On top of tiny.yaml, as the README says: two steps, with the values of the recipe."""
    files = ["--config", "configs/tiny.yaml", f"configs/{recipe}.yaml"]
    small = make_cfg(world, tmp_path)
    where = [f"data.train={small.data.train}", "data.validation=", "data.batch_size=4", f"run.dir={small.run.dir}"]
    run = train_grpo.main(
        [*files, *taught, *where, f"data.cache_dir={small.data.cache_dir}", "run.steps=2", "optim.lr=1e-3"]
    )
    rows = metrics_of(run.dir)
    assert len(rows) == 2 and any(row["grad_norm"] > 0 for row in rows)
    assert max(row["logp_gap/max"] for row in rows) < 1e-4
    assert (rows[1]["kl"] > 0) == (recipe in ("temporal_r1", "lora"))
    assert rows[0]["clip_frac"] == 0 or recipe in ("gspo", "dapo")  # those with two updates
    assert rows[0]["clip_frac"] > 0 or recipe != "gspo"
    assert ("reward/overlong" in rows[0]) == (recipe == "dapo")


def test_the_release_recipe_wins_over_any_other():
    """What temporal_r1.yaml says of losses and groups are the defaults, the bonus and skip_dead apart."""
    others = [f"configs/{recipe}.yaml" for recipe in ("tiny", "dapo", "dr_grpo", "rloo", "gspo")]
    cfg = config.load(config.GrpoConfig, [*others, "configs/temporal_r1.yaml"])
    default = config.GrpoConfig()
    unused = {"overlong_buffer": cfg.loss.overlong_buffer, "overlong_penalty": cfg.loss.overlong_penalty}
    assert cfg.loss == dataclasses.replace(default.loss, entropy=0.001, **unused)
    assert cfg.group == dataclasses.replace(default.group, skip_dead=False)


def test_two_updates_per_rollout_get_clipped(world, taught, tmp_path):
    clipped = {}
    for mu in (1, 2):
        names = (f"loss.updates_per_rollout={mu}", f"run.dir={tmp_path}/run{mu}", "run.steps=3", "loss.clip_high=0.1")
        train_grpo.train(make_cfg(world, tmp_path, *taught, *names))
        clipped[mu] = [row["clip_frac"] for row in metrics_of(tmp_path / f"run{mu}")]
    assert clipped[1] == [0, 0, 0]
    assert 0 < max(clipped[2]) < 1  # of the second update; in the first the ratio is 1


def test_the_entropy_bonus_keeps_the_entropy_up(world, taught, tmp_path):
    """Against an equal run without it, at the end; the first step's entropy is measured before any update."""
    entropy = {}
    for coefficient in (0.0, 1.0):
        names = (f"loss.entropy={coefficient}", f"run.dir={tmp_path}/run{coefficient}", "run.steps=4", "loss.beta=0")
        names += ("group.skip_dead=false",)
        train_grpo.train(make_cfg(world, tmp_path, *taught, *names))
        entropy[coefficient] = [row["entropy"] for row in metrics_of(tmp_path / f"run{coefficient}")]
    assert entropy[0.0][0] == entropy[1.0][0] and entropy[1.0][-1] > entropy[0.0][-1] + 0.05


def test_an_adapter_is_trained_saved_and_evaluated(world, taught, tmp_path):
    """No second model for the KL; the run's folder works as a model of its own, for evaluation and further training."""
    lora = ("model.lora_rank=4", "model.lora_merger=true", "loss.beta=0.1", "optim.lr=1e-2")
    run = train_grpo.train(make_cfg(world, tmp_path, *taught, *lora))
    rows = metrics_of(run.dir)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[1]["kl"] > 1e-4
    size = (run.dir / "final" / "adapter_model.safetensors").stat().st_size
    assert size < 0.2 * (world / "model" / "model.safetensors").stat().st_size
    data = [f"data.test={world}/tvg_test.yaml", "data.cache_dir=", "prompt.think=false", "eval.max_new_tokens=4"]
    evaluation.main(["run", f"model.path={run.dir}/final", f"run.dir={tmp_path}/eval", *data])
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["tasks"]["tvg"]["n"] > 0
    names = (f"model.path={run.dir}/final", f"run.dir={tmp_path}/again", "run.steps=1")
    train_grpo.train(make_cfg(world, tmp_path, *taught, *names))
    assert (tmp_path / "again" / "final" / "model.safetensors").is_file()


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["sft", "grpo", "refill", "lora", "muon"])
def test_resumed_is_uninterrupted_bit_for_bit(world, taught, tmp_path, loop):
    """Stopped after step 2, and again while writing step 3: the files and the weights of 4 steps in one go."""
    make, train = (make_cfg, train_grpo.train) if loop in ("grpo", "refill", "lora") else (sft_cfg, train_sft.train)
    validation = (f"data.validation={world}/tvg_validation.yaml", "eval.every=1", "eval.num_samples=2")
    overrides = (*taught, *validation, "loss.beta=0.1", "run.save_every=2", "optim.warmup_steps=1")
    overrides += ("optim.muon_lr=0.01", "model.freeze_vision=false") if loop == "muon" else ()
    overrides += (
        ("group.max_refills=2", "group.tolerance=0.3", "loss.updates_per_rollout=2") if loop == "refill" else ()
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make(world, tmp_path, *overrides, "run.steps=4", f"run.dir={whole}"))
    train(make(world, tmp_path, *overrides, "run.steps=2", f"run.dir={parts}"))
    halfway = weights_of(parts)
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (parts / name).exists():
            with open(parts / name, "a") as file:
                file.write('{"step": 3}\n{"step": 3, "torn')
    train(make(world, tmp_path, *overrides, "run.steps=4", f"run.dir={parts}"), resume=True)

    assert metrics_of(parts) == metrics_of(whole)
    assert [row["step"] for row in metrics_of(parts)] == [1, 2, 3, 4]
    assert all(row["grad_norm"] > 0 and "validation/score" in row for row in metrics_of(parts))
    if loop == "refill":
        assert max(row["group/refills"] for row in metrics_of(whole)) > 0
    if loop in ("grpo", "refill", "lora"):
        assert read_jsonl(parts / "samples.jsonl") == read_jsonl(whole / "samples.jsonl")
    ours, theirs = weights_of(parts), weights_of(whole)
    assert ours.keys() == theirs.keys() and any(not torch.equal(ours[name], halfway[name]) for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for folder in ("checkpoints/step_000004", "best"):
        for file in (whole / folder).glob("*.json"):
            assert (parts / folder / file.name).read_bytes() == file.read_bytes(), file
    saved = [torch.load(run / "checkpoints/step_000004/optimizer.bin") for run in (whole, parts)]
    adamw = [state.get("adamw", state)["state"] for state in saved]
    assert adamw[0].keys() == adamw[1].keys() and ("momentum" in saved[0]) == (loop == "muon")
    assert all(torch.equal(adamw[0][i]["exp_avg_sq"], adamw[1][i]["exp_avg_sq"]) for i in adamw[0])
    assert all(torch.equal(a, b) for a, b in zip(*(state.get("momentum", []) for state in saved), strict=True))


def test_resuming_a_finished_run_changes_nothing(world, tmp_path):
    cfg = make_cfg(world, tmp_path)
    train_grpo.train(cfg)
    names = ("metrics.jsonl", "samples.jsonl", "config.yaml", "final/model.safetensors")
    before = [(tmp_path / "run" / name).read_bytes() for name in names]
    train_grpo.train(cfg, resume=True)
    assert [(tmp_path / "run" / name).read_bytes() for name in names] == before


# ---- data of other kinds -------------------------------------------------------------------------------------------


def test_all_tasks_in_one_batch(world, tmp_path, family):
    """A part's mean is over the samples whose task has it: `answer` is no part of grounding."""
    path = world / ("model" if family == "qwen2_5_vl" else "model_qwen2_vl")
    data = (f"data.train={world}/mix_train.yaml", "data.batch_size=12", "data.micro_batch_size=5", "run.steps=1")
    data += ("group.skip_dead=false",)  # the untrained model earns nothing
    train_grpo.train(make_cfg(world, tmp_path, *data, f"model.path={path}"))
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    keys = {"tvg": {"format", "iou"}, "mcqa": {"format", "answer"}, "gqa": {"format", "answer", "iou"}}
    assert {sample["task"] for sample in samples} == set(keys)
    assert all(part.keys() == keys[sample["task"]] for sample in samples for part in sample["parts"])
    (row,) = metrics_of(tmp_path / "run", machine=True)
    assert {"reward/format", "reward/answer", "reward/iou"} <= row.keys() and row["logp_gap/max"] < 1e-4
    assert {f"time/{phase}" for phase in ("data", "vision", "rollout", "reward", "update", "step")} <= row.keys()
    if restart_peak() is not None:
        assert 0 < row["memory/rollout"] <= row["memory/step"] and 0 < row["memory/update"] <= row["memory/step"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared: real clips are not part of the repository")
def test_steps_on_real_clips(world, tmp_path):
    """mp4, avi and mkv files of several sizes and lengths, each within 64 video tokens."""
    lines = []
    for name, duration in CLIPS.items():
        record = {"id": name, "task": "tvg", "video": name, "duration": duration, "segments": [[1.0, 2.5]]}
        lines.append(json.dumps(record | {"question": "When does it happen?"}))
    (tmp_path / "real.jsonl").write_text("\n".join(lines) + "\n")
    yaml = f"datasets:\n  - json_path: real.jsonl\n    data_folder: {SHARED}/data/videos\n"
    (tmp_path / "real.yaml").write_text(yaml)
    budget = ("video.total_pixels=50176", "video.max_frames=16", "group.skip_dead=false")
    data = (f"data.train={tmp_path}/real.yaml", "data.batch_size=5", "data.micro_batch_size=2")
    train_grpo.train(make_cfg(world, tmp_path, *data, *budget))
    rows = metrics_of(tmp_path / "run")
    assert len(rows) == 2 and max(row["logp_gap/max"] for row in rows) < 1e-4
    assert all(5 * 20 < row["tokens/prompt"] < 5 * (64 + 30) for row in rows)
    assert {row["id"] for row in read_jsonl(tmp_path / "run" / "samples.jsonl")} == set(CLIPS)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main", [train_grpo.main, train_sft.main])
@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["optim.lrr=1e-3"], ["optim.lrr", "did you mean optim.lr?"]),
        (["run.steps=many"], ["run.steps=many", "must be int"]),
        (["data.batch_size=0"], ["data.batch_size must be above 0"]),
        (["model.path=./nowhere"], ["model.path ./nowhere", "no such folder; give one"]),
        (["data.train=nowhere.jsonl"], ["data file nowhere.jsonl not found", "give another path"]),
        (["data.validation=nowhere.jsonl"], ["data file nowhere.jsonl not found"]),
        (["--config", "nowhere.yaml"], ["config file nowhere.yaml not found"]),
        (["--resume"], ["--resume", "config.yaml not found"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_ends_with_one_line_that_names_it(world, tmp_path, main, overrides, named):
    good = [f"model.path={world}/model", f"data.train={world}/tvg_train.yaml", "data.validation=", "prompt.think=false"]
    small = [f"run.dir={tmp_path}/run", "run.tracker=none", "run.steps=1", "data.cache_dir="]
    with pytest.raises(SystemExit) as raised:
        main([*good, *small, *overrides])
    message = str(raised.value)
    assert message.startswith("error: ") and "\n" not in message
    assert all(part in message for part in named), message


@pytest.mark.parametrize("main", [train_grpo.train, train_sft.train])
def test_an_existing_run_folder_is_left_alone(world, tmp_path, main):
    cfg = make_cfg(world, tmp_path) if main is train_grpo.train else sft_cfg(world, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("precious\n")
    with pytest.raises(SystemExit, match=r"^error: run\.dir .*run exists; give --resume to go on, or another"):
        main(cfg)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "precious\n"


def test_sft_says_that_it_has_no_thoughts_to_imitate(world, tmp_path):
    with pytest.raises(SystemExit, match=r"sample tiny/tvg_train/0: prompt.think=true needs a `response`"):
        train_sft.train(sft_cfg(world, tmp_path, "prompt.think=true"))


def test_chat_records_are_learned_by_sft_and_refused_by_grpo(world, tmp_path):
    """One response to a clip, in thinking mode: its loss falls; there is nothing to score a sampled answer by."""
    (tmp_path / "videos").mkdir()
    clip = json.loads((world / "tvg_train.jsonl").read_text().splitlines()[0])["video"]
    (tmp_path / "videos" / "a.mp4").symlink_to(world / "videos" / clip)
    chat = {"task": "chat", "video": "a.mp4", "question": "What is this?", "response": "<think>red</think> circle"}
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(chat | {"id": f"{i}"}) + "\n" for i in range(4)))
    overrides = (f"data.train={tmp_path}/chat.jsonl", "prompt.think=true", "run.steps=6", "optim.lr=1e-2")
    run = train_sft.train(sft_cfg(world, tmp_path, *overrides))
    losses = [row["loss"] for row in metrics_of(run.dir)]
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(SystemExit, match="'0' is a chat record: no answer can be scored by it"):
        train_grpo.train(make_cfg(world, tmp_path, overrides[0], f"run.dir={tmp_path}/grpo"))
