"""Defaults < YAML < overrides, and an error that names file, key and the nearest valid key for all that is wrong."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import REPO

import config
from config import EvalRunConfig, GrpoConfig, SelectConfig, SftConfig, load, to_yaml
from records import files
from runtime.arguments import PlanConfig
from runtime.run import config_differences

CONFIGS = sorted(REPO.glob("configs/*.yaml"))
LAUNCHERS = sorted(REPO.glob("configs/accelerate/*.yaml"))
DATA_SETS = sorted(REPO.glob("configs/data/*.yaml"))
BENCHMARKS = {  # configs/eval_<name>.yaml: the data file it reads
    "charades_sta": "charades_sta_test",
    "activitynet": "activitynet_test",
    "anet_rtl": "anet_rtl",
    "nextgqa": "nextgqa_test",
    "mvbench": "mvbench",
    "tempcompass": "tempcompass",
    "videomme": "videomme",
    "mmvu": "mmvu",
}
FLOORS = {  # the training set that it takes the best constant answers of; the others have none in configs/data
    "charades_sta": "configs/data/charades_sta.yaml",
    "activitynet": "configs/data/activitynet.yaml",
    "nextgqa": "configs/data/nextgqa_val.yaml",
}


def write(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def message_of(*args) -> str:
    """The one line that `load` ends with."""
    with pytest.raises(ValueError) as raised:
        load(GrpoConfig, *args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- layers --------------------------------------------------------------------------------------------------------


def test_defaults_then_yaml_then_overrides(tmp_path):
    path = write(tmp_path / "a.yaml", "run: {seed: 1, steps: 7}\nloss: {beta: 0.5}\n")
    assert load(GrpoConfig) == GrpoConfig()
    cfg = load(GrpoConfig, [path], ["run.seed=2"])
    assert (cfg.run.seed, cfg.run.steps, cfg.loss.beta) == (2, 7, 0.5)
    assert cfg.loss == dataclasses.replace(GrpoConfig().loss, beta=0.5)
    assert cfg.optim == GrpoConfig().optim


def test_later_files_and_later_overrides_win(tmp_path):
    a = write(tmp_path / "a.yaml", "run: {seed: 1, steps: 7}\n")
    b = write(tmp_path / "b.yaml", "run: {seed: 2}\n")
    assert (load(GrpoConfig, [a, b]).run.seed, load(GrpoConfig, [b, a]).run.seed) == (2, 1)
    assert load(GrpoConfig, [a, b]).run.steps == 7
    assert load(GrpoConfig, [a], ["run.seed=3", "run.seed=4"]).run.seed == 4


def test_a_section_of_a_section_keeps_its_other_defaults():
    rewards = load(GrpoConfig, [], ["rewards.tvg.iou=2"]).rewards
    assert dataclasses.astuple(rewards.tvg) == (0.5, 0.0, 2.0)
    assert rewards.gqa == GrpoConfig().rewards.gqa


def test_defaults_of_a_whole_configuration_survive_a_file(tmp_path):
    """The run folder of supervised tuning is not the section's own default."""
    path = write(tmp_path / "a.yaml", "run: {steps: 7}\n")
    assert load(SftConfig, [path]).run == config.RunConfig(dir="runs/sft", steps=7)


def test_an_empty_file_changes_nothing(tmp_path):
    assert load(GrpoConfig, [write(tmp_path / "a.yaml", "# nothing yet\n")]) == GrpoConfig()


@pytest.mark.parametrize("config_class", [GrpoConfig, SftConfig, EvalRunConfig])
def test_to_yaml_comes_back_equal(config_class, tmp_path):
    text = 'prompt.tvg="{question}\\n\\"two\\" lines"'
    overrides = ["run.seed=5", "run.dir='a: b # c'", text, "video.fps=0.1"]
    for cfg in (config_class(), load(config_class, [], overrides)):
        assert load(config_class, [write(tmp_path / "c.yaml", to_yaml(cfg))]) == cfg
    assert cfg.prompt.tvg == '{question}\n"two" lines' and cfg.run.dir == "a: b # c"


def test_the_order_of_keys_means_nothing_to_a_resumed_run(tmp_path):
    """A config.yaml of an older version lists the same keys in another order."""
    cfg = load(GrpoConfig, [], ["rewards.functions={a/b.py:f: 1}"])
    old = write(tmp_path / "config.yaml", yaml.safe_dump(yaml.safe_load(to_yaml(cfg)), sort_keys=True))
    assert Path(old).read_text() != to_yaml(cfg) and config_differences(Path(old), to_yaml(cfg)) == {}
    assert load(GrpoConfig, [old]) == cfg


def test_values_keep_their_text():
    """An equals sign in a value, an empty value (what a shell makes of `key=''`), and a number in both notations."""
    rates = ["optim.lr=1e-3", "loss.beta=1.0e-3"]
    cfg = load(GrpoConfig, [], ["run.dir=a=b=", "data.validation=", "prompt.system_plain=''", *rates])
    assert (cfg.run.dir, cfg.data.validation, cfg.prompt.system_plain) == ("a=b=", "", "")
    assert cfg.optim.lr == cfg.loss.beta == 0.001


def test_a_whole_number_is_a_float_where_one_is_asked_for():
    beta = load(GrpoConfig, [], ["loss.beta=0"]).loss.beta
    assert type(beta) is float and beta == 0.0


def test_interpolation_is_resolved_and_checked(tmp_path):
    path = write(tmp_path / "a.yaml", "run: {seed: 3, dir: 'runs/${run.seed}'}\neval: {batch_size: '${run.seed}'}\n")
    cfg = load(GrpoConfig, [path])
    assert cfg.run.dir == "runs/3" and cfg.eval.batch_size == 3
    cfg = load(GrpoConfig, [path], ["run.seed=4", "optim.lr=${loss.beta}"])  # of another layer, and of a default
    assert cfg.run.dir == "runs/4" and cfg.optim.lr == cfg.loss.beta == GrpoConfig().loss.beta


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("eval.batch_size=${run.dir}", "Value 'runs/grpo' of type 'str' could not be converted to Integer"),
        ("data.order=${data.out_of_clip}", "Invalid value 'clamp', expected one of"),
        ("run.dir=${nowhere.at_all}", "Interpolation key 'nowhere.at_all' not found"),
        ("run.dir=${run.dir}", "Recursive interpolation detected"),
        ("run.dir=${", "no viable alternative"),
        ("loss.beta=${oc.env:NOT_A_NUMBER}", "must be finite, got nan"),
        ("rewards.functions=${run.dir}", "must be a mapping, got '${run.dir}' (str)"),
        ("select.allow=${run.dir}", "must be a list, got '${run.dir}' (str)"),
        ("model=${loss}", "must be a mapping, got '${loss}' (str)"),
    ],
)
def test_an_interpolation_that_does_not_fit_is_named(monkeypatch, override, reason):
    monkeypatch.setenv("NOT_A_NUMBER", "nan")
    with pytest.raises(ValueError) as raised:
        load(config.SelectConfig if "select" in override else GrpoConfig, [], [override])
    key = override.partition("=")[0]
    assert str(raised.value).startswith(f"override {override!r}: {key}") and "\n" not in str(raised.value)
    assert reason in str(raised.value)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GrpoConfig().run.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        GrpoConfig().run = config.RunConfig()


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("los.beta", "did you mean loss?"),
        ("loss.betta", "did you mean loss.beta?"),
        ("rewards.tvgg.iou", "did you mean rewards.tvg?"),
        ("rewards.tvg.iuo", "did you mean rewards.tvg.iou?"),
        ("rollout.max_tokens", "did you mean rollout.max_new_tokens?"),
        ("optim.zzzz", "valid are optim.lr, optim."),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(tmp_path, key, nearest):
    parts = key.split(".")
    path = write(tmp_path / "a.yaml", "{" + ": {".join(parts) + ": 1" + "}" * len(parts) + "\n")
    unknown = key if key not in ("los.beta", "rewards.tvgg.iou") else key.rpartition(".")[0]
    for message, source in (
        (message_of([path]), path),
        (message_of([], [f"{key}=1"]), f"override '{key}=1'"),
    ):
        assert message.startswith(f"{source}: unknown key {unknown};") and nearest in message


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("model.freeze_vision", "1", "must be bool, got 1 (int)"),
        ("model.freeze_vision", "-7", "must be bool, got -7 (int)"),
        ("model.freeze_vision", "'yes'", "must be bool, got 'yes' (str)"),
        ("run.dir", "-7", "must be str, got -7 (int)"),
        ("run.dir", "true", "must be str, got True (bool)"),
        ("run.dir", "null", "must be str, got None (NoneType)"),
        ("run.steps", "2.0", "must be int, got 2.0 (float)"),
        ("run.steps", "true", "must be int, got True (bool)"),
        ("run.steps", "'2'", "must be int, got '2' (str)"),
        ("run.steps", "[1, 2]", "must be int, got [1, 2] (list)"),
        ("run.steps", "{a: 1}", "must be int, got {'a': 1} (dict)"),
        ("loss.beta", "'0.1'", "must be float, got '0.1' (str)"),
        ("loss.beta", "true", "must be float, got True (bool)"),
        ("loss.beta", "nan", "must be float, got 'nan' (str)"),
        ("loss.beta", ".nan", "must be finite, got nan"),
        ("loss.beta", ".inf", "must be finite, got inf"),
        ("loss.beta", "-.inf", "must be finite, got -inf"),
        ("data.out_of_clip", "clip", "Invalid value 'clip', expected one of ['clamp', 'drop', 'error']"),
        ("data.out_of_clip", "0", "must be str, got 0 (int)"),
        ("optim.schedule", "Cosine", "Invalid value 'Cosine', expected one of ['constant', 'cosine']"),
        ("loss", "1", "must be a mapping, got 1 (int)"),
        ("loss", "null", "must be a mapping, got None (NoneType)"),
        ("rewards.tvg", "[0.5, 0.5]", "must be a mapping, got [0.5, 0.5] (list)"),
        ("rewards.functions", "{f: '1'}", "rewards.functions.f must be float, got '1' (str)"),
        ("rewards.functions", "{f: .nan}", "rewards.functions.f must be finite, got nan"),
        ("run.dir", "'???'", "Missing mandatory value: dir"),
    ],
)
def test_a_wrong_type_is_named(tmp_path, key, value, reason):
    parts = key.split(".")
    path = write(tmp_path / "a.yaml", "{" + ": {".join(parts) + f": {value}" + "}" * len(parts) + "\n")
    override = f"{key}={value}"
    messages = {path: message_of([path]), f"override {override!r}": message_of([], [override])}
    for source, message in messages.items():
        assert message.startswith(f"{source}: {key}") and message.endswith(reason), message


def test_weights_of_zero_are_fine_beside_reward_functions(tmp_path):
    no_parts = ["rewards.tvg={format: 0, iou: 0}", "rewards.functions={a/b.py:f: 0.5}"]
    cfg = load(GrpoConfig, [], no_parts)
    assert cfg.rewards.functions == {"a/b.py:f": 0.5}
    assert load(GrpoConfig, [write(tmp_path / "again.yaml", to_yaml(cfg))]) == cfg


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["rollout.group_size=1"], "rollout.group_size is 1; a group needs at least 2 completions"),
        (["run.steps=0"], "run.steps must be above 0, got 0"),
        (["data.micro_batch_size=-1"], "data.micro_batch_size must be above 0, got -1"),
        (["data.workers=-1"], "data.workers must be at least 0, got -1"),
        (["data.decode_timeout=0"], "data.decode_timeout must be above 0, got 0.0"),
        (["data.max_bad_share=1.5"], "data.max_bad_share must be from 0 to 1, got 1.5"),
        (["data.max_bad_share=-0.1"], "data.max_bad_share must be from 0 to 1, got -0.1"),
        (["rollout.temperature=0"], "rollout.temperature must be above 0, got 0.0"),
        (["rewards.gqa.iou=-0.1"], "rewards.gqa.iou must be at least 0, got -0.1"),
        (["rewards.tvg.iou=0", "rewards.tvg.format=0"], "rewards.tvg: weights must not all be 0"),
        (["rewards.functions=[a.py:f]"], "override 'rewards.functions=[a.py:f]': rewards.functions must be a mapping"),
        (
            ["rewards.functions={a.py:f: much}"],
            "override 'rewards.functions={a.py:f: much}': rewards.functions.a.py:f must be float, got 'much' (str)",
        ),
        (["loss.kl=k4"], "override 'loss.kl=k4': loss.kl: Invalid value 'k4', expected one of ['k1', 'k2', 'k3']"),
        (["loss.updates_per_rollout=0"], "loss.updates_per_rollout must be above 0, got 0"),
        (["loss.overlong_buffer=0"], "loss.overlong_buffer must be above 0, got 0.0"),
        (["loss.overlong_buffer=1.5"], "loss.overlong_buffer must be at most 1, got 1.5"),
        (["run.max_first_grad_norm=-1"], "run.max_first_grad_norm must be at least 0, got -1.0"),
        (["loss.clip_low=-1"], "loss.clip_low must be at least 0, got -1.0"),
        (["loss.beta=-0.1"], "loss.beta must be at least 0, got -0.1"),
        (["rewards.mcqa={format: 0, answer: 0, iou: 1}"], "rewards.mcqa.iou must be 0: the task has no such part"),
        (["group.max_refills=-1"], "group.max_refills must be at least 0, got -1"),
        (["model.lora_rank=-1"], "model.lora_rank must be at least 0, got -1"),
        (["model.lora_rank=4", "model.freeze_vision=false"], "model.lora_rank trains adapters only"),
        (["model.lora_rank=4", "optim.muon_lr=0.1"], "optim.muon_lr is for training from scratch"),
        (["model.lora_merger=true"], "model.lora_merger=true needs model.lora_rank above 0"),
    ],
)
def test_values_out_of_range_are_named(overrides, reason):
    assert message_of([], overrides).startswith(reason)


def test_every_command_checks_its_numbers():
    for config_class in (EvalRunConfig, SftConfig, config.SelectConfig):
        with pytest.raises(ValueError, match=r"^data\.workers must be at least 0, got -2$"):
            load(config_class, [], ["data.workers=-2"])


def test_a_configuration_made_in_python_is_checked_too():
    with pytest.raises(ValueError, match=r"^loss\.beta must be at least 0, got -1$"):
        GrpoConfig(loss=config.LossConfig(beta=-1))
    with pytest.raises(ValueError, match=r"^run\.steps must be above 0, got 0$"):
        dataclasses.replace(GrpoConfig(), run=config.RunConfig(steps=0))
    with pytest.raises(ValueError, match=r"^loss\.clip_low must be below 1"):
        dataclasses.replace(GrpoConfig().loss, clip_low=1.0)
    with pytest.raises(ValueError, match=r"^plan\.tflops must be above 0, got 0$"):
        PlanConfig(tflops=0)


def test_an_override_needs_a_value():
    assert message_of([], ["loss.beta"]) == "override 'loss.beta' is not of the form section.key=value"
    assert message_of([], ["loss.beta="]) == "override 'loss.beta=': loss.beta must be float, got '' (str)"
    assert message_of([], ["run.dir=[1"]).startswith("override 'run.dir=[1':")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("run: {seed: 1", "not valid YAML"),
        ("run:\n\tseed: 1\n", "not valid YAML"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", "not valid YAML"),
        ("- run\n- loss\n", "a configuration must be a mapping, got ['run', 'loss'] (list)"),
        ("run:\n", "run must be a mapping, got None (NoneType)"),
        ("7: {seed: 1}\n", "unknown key 7"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, reason):
    path = write(tmp_path / "a.yaml", text)
    assert message_of([path]).startswith(f"{path}: {reason}")


def test_a_missing_file_is_named(tmp_path):
    assert message_of([str(tmp_path / "a.yaml")]) == f"config file {tmp_path}/a.yaml not found"
    assert message_of([str(tmp_path)]) == f"config file {tmp_path} not found"


# ---- the files in configs/ -----------------------------------------------------------------------------------------


def class_for(name: str) -> type:
    if "eval" in name:
        return EvalRunConfig
    return SftConfig if re.match(r"tiny_sft|tiny_base|sft_", name) else GrpoConfig


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_load(path):
    """Each changes something, says what it is in a comment, and holds only what differs from the defaults."""
    cfg = load(class_for(path.name), [str(path)])
    assert cfg != class_for(path.name)()
    assert path.read_text().startswith("#")


def test_there_are_configs():
    assert {"tiny.yaml", "tiny_base.yaml"} <= {path.name for path in CONFIGS}


def test_every_benchmark_has_a_config():
    assert {path.stem.removeprefix("eval_") for path in CONFIGS if path.name.startswith("eval_")} == BENCHMARKS.keys()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_asks_as_training_does(name):
    """Each works alone, on the data file of its name; wording, video budget and precision are those of training."""
    cfg = load(EvalRunConfig, [str(REPO / f"configs/eval_{name}.yaml")], ["model.path=runs/x/final"])
    assert cfg.data.test == f"configs/data/{BENCHMARKS[name]}.yaml" and cfg.run.dir == f"runs/eval_{name}"
    training = load(GrpoConfig, [str(REPO / "configs/grpo_qwen2_5_vl_3b_charades.yaml")])
    assert (cfg.prompt, cfg.video, cfg.model.dtype) == (training.prompt, training.video, training.model.dtype)
    assert cfg.eval.answer == "tagged_or_text" and cfg.eval.max_new_tokens == training.rollout.max_new_tokens


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_with_a_training_set_has_a_floor(name):
    cfg = load(EvalRunConfig, [str(REPO / f"configs/eval_{name}.yaml")])
    assert cfg.data.floor == FLOORS.get(name, "")
    assert not cfg.data.floor or files.sources_of(str(REPO / cfg.data.floor), need_videos=False)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_accelerate_configs_load(path):
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes >= 1 and not getattr(loaded, "gradient_accumulation_steps", None)


@pytest.mark.parametrize("path", DATA_SETS, ids=lambda path: path.name)
def test_data_set_lists_load(path):
    assert all(entry["json_path"] and entry["data_folder"] for entry in files._data_sets(path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rewards.functions={1: 1}"], "rewards.functions"),
        (["rewards.functions={a.py:f: x}"], r"rewards.functions.a.py:f must be float, got 'x' \(str\)"),
    ],
)
def test_keys_of_the_users_own_are_checked_too(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        load(GrpoConfig, [], overrides)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"override {overrides[-1]!r}: ")


def test_items_of_a_list_are_texts():
    with pytest.raises(ValueError, match=r"select.allow\[1\] must be str, got 1 \(int\)"):
        load(SelectConfig, [], ["select.scores=x", "select.allow=[1]"])
