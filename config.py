"""Typed configuration: defaults < YAML files (later ones win) < `section.key=value` on the command line.

Not a registry and not a place for logic: a field is a name, a type, a default and one line of meaning. YAML holds
only what differs from the defaults. An unknown key, a wrong type and a value out of range are errors that name the key.

    cfg = config.load(config.GrpoConfig, ["configs/tiny.yaml"], ["loss.beta=0.0", "run.seed=1"])
"""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from records.tasks import TASKS

ConfigT = TypeVar("ConfigT")
AnswerMode = Literal["tagged", "tagged_or_text"]
UnansweredMode = Literal["wrong", "skip"]
ANSWER_MODES, UNANSWERED_MODES = get_args(AnswerMode), get_args(UnansweredMode)

PLAIN = "Give only the final answer, inside <answer> </answer> tags."
THINK = "Think about the video and the question first, inside <think> </think> tags. "
THINK += "Then give the final answer inside <answer> </answer> tags."


def positive(default: float) -> Any:
    """A field whose number must be above 0. Every other number must be at least 0, see `check_numbers`."""
    return field(default=default, metadata={"positive": True})


@dataclass(frozen=True)
class RunConfig:
    dir: str = "runs/grpo"  # run folder; an existing one is never overwritten, see --resume
    seed: int = 0  # of data order, sampling and weights; a sample depends on (seed, step, sample id, g) alone
    steps: int = positive(200)  # batches: for GRPO rollouts, with loss.updates_per_rollout optimizer steps on each
    save_every: int = positive(100)  # steps between checkpoints; the last step is always saved
    keep_checkpoints: int = positive(2)  # newest checkpoints kept
    print_every: int = positive(20)  # steps between two printed completions
    max_skipped: int = positive(5)  # the run stops after so many updates in a row without a finite gradient
    max_first_grad_norm: float = 1e4  # the run ends if its first update has a larger gradient norm; 0 means no limit
    timeout: float = positive(1800.0)  # seconds that a process waits for others, then names them; docs/clusters.md
    self_check: bool = True  # check positions, log-probs, video and processes first, see preflight/selfcheck.py
    tracker: str = "tensorboard"  # any tracker that accelerate knows, or "none"; metrics.jsonl is always written


@dataclass(frozen=True)
class ModelConfig:
    path: str = "tiny_world/model"  # Hugging Face folder or hub id, Qwen2-VL or Qwen2.5-VL
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and activations; log-probs are always float32
    freeze_vision: bool = True  # tower and merger get no gradient and run once per video and step
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    gather_weights: bool = True  # ZeRO-3: each device holds the model whole while it samples; False: anew every token
    lora_rank: int = 0  # above 0: only adapters of this rank on the language model's linear layers are trained (peft)
    lora_alpha: float = positive(32.0)  # an adapter's output is scaled by lora_alpha / lora_rank
    lora_merger: bool = False  # adapters on the vision merger's linear layers as well

    def __post_init__(self):
        if self.lora_rank and not self.freeze_vision:
            raise ValueError("model.lora_rank trains adapters only: model.freeze_vision must be true (see lora_merger)")
        if self.lora_merger and not self.lora_rank:
            raise ValueError("model.lora_merger=true needs model.lora_rank above 0")


@dataclass(frozen=True)
class ReadConfig:
    """What every command that reads records and decodes their videos has in its section `data`."""

    out_of_clip: Literal["clamp", "drop", "error"] = "clamp"  # what becomes of a segment that ends after its video
    manifest: str = ""  # written by `python data.py check`, whose bad records are dropped; "" means no manifest
    workers: int = 2  # processes of each training process that decode ahead; 0 decodes in place, without time limit
    decode_timeout: float = positive(120.0)  # seconds that decoding one video may take
    max_bad_share: float = 0.1  # of the samples asked for; past it, videos that cannot be read end the command
    cache_dir: str = "tiny_world/cache"  # decoded frames; "" means no cache
    cache_gib: float = 4.0  # size of that cache, in GiB

    def __post_init__(self):
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"data.max_bad_share must be from 0 to 1, got {self.max_bad_share}")


@dataclass(frozen=True)
class DataConfig(ReadConfig):
    train: str = "tiny_world/tvg_train.yaml"  # .yaml list of data sets, .jsonl records or Temporal-R1 .json
    validation: str = "tiny_world/tvg_validation.yaml"  # same forms; "" means no validation
    batch_size: int = positive(16)  # videos per optimizer step, over all processes
    micro_batch_size: int = positive(16)  # videos per forward and backward pass and process; changes no gradient
    order: Literal["uniform", "curriculum"] = "uniform"  # curriculum: every epoch from easy to hard, see select_data.py
    refilter_every: int = 0  # every so many epochs, samples whose last group was dead are dropped; 0 means never


@dataclass(frozen=True)
class TestDataConfig(ReadConfig):
    test: str = "tiny_world/tvg_test.yaml"  # what to evaluate: .yaml, .jsonl or .json, as for training
    floor: str = ""  # training set whose best constant answers are scored too, see metrics/blind.py; "" means no floor


@dataclass(frozen=True)
class SelectDataConfig(ReadConfig):
    train: str = "tiny_world/mix_train.yaml"  # what to select from, in the forms that training takes


@dataclass(frozen=True)
class VideoConfig:
    fps: float = 2.0  # frames per second asked for
    min_frames: int = 4  # at least so many frames
    max_frames: int = 768  # at most so many frames
    min_pixels: int = 3136  # at least so many pixels a frame
    max_pixels: int = 602112  # at most so many pixels a frame
    total_pixels: int = 1605632  # budget of a video in pixels of frame pairs: 28 x 28 make one token, 2,048 tokens
    time_step: Literal["exact", "whole_seconds"] = "exact"  # whole_seconds: as in transformers 4.50 until PR 48669

    def __post_init__(self):
        for unit in ("frames", "pixels"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if most < least:
                raise ValueError(f"video.max_{unit} must be at least video.min_{unit}={least}, got {most}")


@dataclass(frozen=True)
class PromptConfig:
    think: bool = True  # responses are a think block, then an answer block; otherwise an answer block alone
    system_think: str = THINK  # system turn in thinking mode; "" means no system turn
    system_plain: str = PLAIN  # system turn otherwise; "" means no system turn
    tvg: str = (
        'Give the query: "{question}", when does the described content occur in the video? '
        "Answer with its start and end time in seconds, as in <answer>3.5 to 12.0</answer>."
    )  # user turn of temporal grounding, after the video
    mcqa: str = "{question}\n{options}\nAnswer with the letter of the right option, as in <answer>B</answer>."
    gqa: str = (
        "{question}\n{options}\nAnswer with the letter of the right option and the start and end time in seconds "
        "of the moment that shows it, as in <answer>B, 3.5 to 12.0</answer>."
    )  # user turn of grounded question answering

    def __post_init__(self):
        for task, kind in TASKS.items():
            known = {"question", "options"} if kind.has_options else {"question"}
            found = re.findall(r"(\\\w+)?\{(\w+)\}", getattr(self, task))
            words = {word for command, word in found if not command}  # \boxed{B} is meant as it stands
            if "question" not in words:  # a model that is not asked can only guess
                raise ValueError(f"prompt.{task} must hold {{question}}, got {getattr(self, task)!r}")
            if unknown := sorted(words - known):  # it would reach the model as it stands
                listed = " and ".join(f"{{{word}}}" for word in sorted(known, reverse=True))
                raise ValueError(f"prompt.{task} may hold {listed}, and {{{unknown[0]}}} is unknown")


@dataclass(frozen=True)
class RolloutConfig:
    group_size: int = positive(8)  # G, completions per video
    temperature: float = positive(1.0)  # of sampling and of every log-prob
    max_new_tokens: int = positive(2048)  # T at most, EOS included
    micro_batch_size: int = positive(16)  # videos in one call of generate and process; changes no sample


@dataclass(frozen=True)
class Weights:
    format: float = 0.0  # the response is laid out as asked and its answer parses
    answer: float = 0.0  # discrete: the right option
    iou: float = 0.0  # continuous: temporal IoU


@dataclass(frozen=True)
class RewardsConfig:
    tvg: Weights = Weights(format=0.5, iou=0.5)
    mcqa: Weights = Weights(format=0.5, answer=0.5)
    gqa: Weights = Weights(format=0.2, answer=0.4, iou=0.4)
    format_gates_task: bool = True  # no task reward without the format, no format reward without a parsed answer
    overlap: Literal["iou", "timestamp_iou", "distance_iou"] = "iou"  # what the part `iou` is, see rewards.py
    functions: dict[str, float] = field(default_factory=dict)  # "path/to/file.py:function": weight; added to the total
    conversational: bool = False  # those functions get completions as TRL's message lists instead of strings

    def __post_init__(self):
        for name, task in TASKS.items():
            weights = asdict(getattr(self, name))
            if not any(weights.values()) and not self.functions:
                raise ValueError(f"rewards.{name}: weights must not all be 0 without rewards.functions")
            if absent := [part for part, weight in weights.items() if weight and part not in task.parts]:
                raise ValueError(f"rewards.{name}.{absent[0]} must be 0: the task has no such part")


@dataclass(frozen=True)
class GroupConfig:
    tolerance: float = 5e-4  # dead: a standard deviation of rewards (without the penalty for length) up to this
    skip_dead: bool = True  # no update work for dead groups; their KL and entropy terms go with it
    max_refills: int = 0  # rounds of sampling further videos in place of dead groups (DAPO's dynamic sampling)
    warn_after: int = positive(20)  # steps in a row with (nearly) equal rewards or over 90% truncated, before a warning


@dataclass(frozen=True)
class LossConfig:
    baseline: Literal["group_mean", "leave_one_out"] = "group_mean"  # what is subtracted from a reward
    scale: Literal["group_std", "batch_std", "none"] = "group_std"  # what the difference is divided by
    std_eps: float = 1e-6  # added to that standard deviation
    ratio: Literal["token", "sequence"] = "token"  # importance ratio; sequence: GSPO
    clip: Literal["ppo", "cispo", "none"] = "ppo"
    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2  # larger than clip_low: DAPO's "clip higher"
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"  # DAPO, GRPO, Dr. GRPO
    beta: float = 0.01  # KL coefficient; 0 loads no reference model
    kl: Literal["k1", "k2", "k3"] = "k3"  # estimate of the KL to the reference; k1's expected gradient is 0 at ratio 1
    kl_clamp: float = positive(10.0)  # the KL's log-ratio is clamped to +- this
    entropy: float = 0.0  # coefficient of the entropy bonus
    updates_per_rollout: int = positive(1)  # mu, optimizer steps on one rollout; above 1 the clip gets to work
    old_logps: Literal["policy", "sampled"] = "policy"  # policy: of the first pass over the rollout
    truncated: Literal["keep", "mask", "penalise"] = "keep"  # completions cut off before EOS; mask: not in the loss
    overlong_buffer: float = positive(0.2)  # last share of rollout.max_new_tokens, in which that penalty grows from 0
    overlong_penalty: float = 0.5  # to this; DAPO's is 1, where a right answer earns 2 more than a wrong one

    def __post_init__(self):
        if self.clip_low >= 1 and self.clip != "cispo":  # MiniMax-M1 sets no lower bound for CISPO
            raise ValueError(f"loss.clip_low must be below 1, as no ratio is below 0, got {self.clip_low}")
        if self.overlong_buffer > 1:
            raise ValueError(f"loss.overlong_buffer must be at most 1, got {self.overlong_buffer}")


@dataclass(frozen=True)
class OptimConfig:
    lr: float = positive(1e-6)  # AdamW learning rate; adapters want about ten times that of full tuning
    muon_lr: float = 0.0  # above 0: matrices but embeddings are trained by Muon at this rate (from scratch)
    weight_decay: float = 0.01  # AdamW, decoupled
    beta1: float = 0.9  # AdamW
    beta2: float = 0.999  # AdamW
    grad_clip: float = positive(1.0)  # maximum gradient norm
    warmup_steps: int = 0  # linear warm-up of the learning rate
    schedule: Literal["constant", "cosine"] = "constant"  # cosine falls to 0 at run.steps


@dataclass(frozen=True)
class AskConfig:  # how a model is asked, while it trains and afterwards, and what counts as its answer
    batch_size: int = positive(32)  # videos per call of generate and process
    max_new_tokens: int = positive(2048)  # tokens of an answer at most
    answer: AnswerMode = "tagged"  # the answer block in the form asked for, or plain words too


@dataclass(frozen=True)
class EvalConfig(AskConfig):
    every: int = 50  # steps between validations, whose answers are greedy; 0 means never
    num_samples: int = 200  # at most so many validation samples, evenly over tasks and sources; 0 means all


@dataclass(frozen=True)
class AnswerConfig(AskConfig):
    num_answers: int = positive(1)  # answers to each question; metrics are means, and *_best the best of them
    temperature: float = 0.0  # of sampling; 0 means greedy
    unanswered: UnansweredMode = "wrong"  # skip: questions without a usable answer are left out
    blind: bool = False  # the questions are asked again, each with the clip of another video of similar length

    def __post_init__(self):
        if self.num_answers > 1 and not self.temperature:
            raise ValueError(f"eval.temperature must be above 0 (0: one greedy answer), got {self.temperature}")


@dataclass(frozen=True)
class RuleConfig:  # a reward here is the task's own, without the format: IoU, right option, or the mean of both
    rule: Literal["mixed", "mean_range", "top_variance", "random"] = "mixed"  # see selection/rules.py
    min_std: float = 0.1  # mixed, of tvg and gqa: rewards with a smaller standard deviation are of low variance
    min_best: float = 0.5  # mixed, of tvg and gqa: a smaller best reward is too low
    low: float = 0.1  # mean_range: a smaller mean reward is too hard
    high: float = 0.7  # mean_range: a larger mean reward is too easy
    budget: int = 0  # at most so many items are kept, shared out by task and source; 0 means no limit
    seed: int = 0  # of what is random in a rule: the draw of `random`, and who goes first among equals
    scores: str = ""  # score file to use instead of sampling: scores.jsonl of a run.dir, or rows with id and rewards
    allow: list[str] = field(default_factory=list)  # keys or sections in which those scores may differ from this config

    def __post_init__(self):
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"select.low and select.high must be 0 <= low <= high <= 1, got {self.low}, {self.high}")
        if self.rule in ("top_variance", "random") and not self.budget:
            raise ValueError(f"select.rule={self.rule} needs select.budget, the number of items to keep")
        if self.allow and not self.scores:
            raise ValueError("select.allow is for select.scores: the scores of run.dir are of this config")


@dataclass(frozen=True)
class CommandConfig:
    """What every command reads that runs a model."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    video: VideoConfig = VideoConfig()
    prompt: PromptConfig = PromptConfig()

    def __post_init__(self):
        check_numbers(self)


@dataclass(frozen=True)
class TrainingConfig(CommandConfig):
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.optim.warmup_steps > self.run.steps:
            most = f"optim.warmup_steps must be at most run.steps={self.run.steps}"
            raise ValueError(f"{most}, got {self.optim.warmup_steps}: optim.lr would never be reached")
        if self.model.lora_rank and self.optim.muon_lr:
            raise ValueError("optim.muon_lr is for training from scratch, not for the adapters of model.lora_rank")


@dataclass(frozen=True)
class GrpoConfig(TrainingConfig):
    """Everything `train_grpo.py` reads."""

    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    group: GroupConfig = GroupConfig()
    loss: LossConfig = LossConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.rollout.group_size < 2:
            raise ValueError(f"rollout.group_size is {self.rollout.group_size}; a group needs at least 2 completions")


@dataclass(frozen=True)
class SftConfig(TrainingConfig):
    """Everything `train_sft.py` reads."""

    run: RunConfig = RunConfig(dir="runs/sft")

    def __post_init__(self):
        super().__post_init__()
        if self.data.refilter_every:
            raise ValueError("data.refilter_every must be 0: supervised tuning samples no groups")


@dataclass(frozen=True)
class SelectConfig(CommandConfig):
    """Everything `select_data.py` reads; `run.dir` receives scores.jsonl, selected.jsonl and the like."""

    run: RunConfig = RunConfig(dir="runs/select")
    data: SelectDataConfig = SelectDataConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    select: RuleConfig = RuleConfig()

    def __post_init__(self):
        super().__post_init__()
        rule, k = self.select, self.rollout.group_size
        if rule.rule in ("mixed", "top_variance") and k < 2 and not rule.scores:
            raise ValueError(f"select.rule={rule.rule} needs a variance, and rollout.group_size={k} has none")


@dataclass(frozen=True)
class EvalRunConfig(CommandConfig):
    """Everything `eval.py run` reads; `run.dir` receives predictions.jsonl and metrics.json."""

    run: RunConfig = RunConfig(dir="runs/eval")
    data: TestDataConfig = TestDataConfig()
    eval: AnswerConfig = AnswerConfig()


def check_numbers(section: Any, prefix: str = "") -> None:
    """Raises ValueError that names the key, such as run.steps, of a number below 0 or of a `positive` one of 0."""
    for item in fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        if is_dataclass(value):
            check_numbers(value, f"{key}.")
        elif isinstance(value, int | float) and (value < 0 or (value == 0 and item.metadata)):
            raise ValueError(f"{key} must be {'above' if item.metadata else 'at least'} 0, got {value}")


def load(config_class: type[ConfigT], paths: Sequence[str] = (), overrides: Sequence[str] = ()) -> ConfigT:
    """Merge defaults, YAML files and `section.key=value` overrides into one frozen `config_class`.

    Raises ValueError, in one line that names file or override, key and the nearest valid key.
    """
    from omegaconf import OmegaConf  # here and below, so that a config can be made in Python without it

    merged = OmegaConf.structured(config_class)
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"config file {path} not found")
        merged = _merge(merged, path, OmegaConf.load, path)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is not of the form section.key=value")
        words = [f"{key}={value or repr('')}"]  # a shell makes `key=` of `key=''`
        merged = _merge(merged, f"override {override!r}", OmegaConf.from_dotlist, words)
    return OmegaConf.to_object(merged)


def to_yaml(cfg: Any) -> str:
    """The effective configuration as YAML; `load` of it gives an equal object."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(asdict(cfg)))


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, keys joined by dots.

    >>> flat({"video": {"fps": 2.0}, "answer": "tagged"})
    {'video.fps': 2.0, 'answer': 'tagged'}
    """
    found: dict = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _merge(base: Any, source: str, read: Callable, given: Any) -> Any:
    """The values of one file or override, `read(given)`, on top of omegaconf's `base`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    defaults = asdict(OmegaConf.get_type(base)())
    try:
        layer = read(given)
        _check(OmegaConf.to_container(layer, throw_on_missing=True), defaults)  # ??? is no value
        merged = OmegaConf.unsafe_merge(base, layer)  # without a copy: `base` and `layer` are ours alone
        _check(OmegaConf.to_container(merged, resolve=True), defaults)  # what ${section.key} is converted to, too
        return merged
    except YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"{source}: {error.full_key}: {str(error).splitlines()[0]}") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{source}: {error}") from None


def _check(value: Any, default: Any, key: str = "") -> None:
    """Refuse unknown keys, NaN and infinity, and what omegaconf would convert: '2' to 2, 1 to true, -7 to '-7'."""
    if isinstance(value, str) and "${" in value and not isinstance(default, dict | list):
        return  # checked once resolved
    if type(value) is not type(default) and (type(value), type(default)) != (int, float):
        wanted = {dict: "a mapping", list: "a list"}.get(type(default), type(default).__name__)
        raise ValueError(f"{key or 'a configuration'} must be {wanted}, got {value!r} ({type(value).__name__})")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} must be finite, got {value}")
    if isinstance(value, dict):
        known = default or dict.fromkeys(value, 0.0)  # rewards.functions: keys of the user's own, and weights
        prefix = f"{key}." if key else ""
        for name, item in value.items():
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
                hint = (
                    f"did you mean {prefix}{close[0]}?" if close else f"valid are {prefix}" + f", {prefix}".join(known)
                )
                raise ValueError(f"unknown key {prefix}{name}; {hint}")
            _check(item, known[name], f"{prefix}{name}")
    for item in value if isinstance(value, list) else ():  # all lists are of texts
        _check(item, "", f"{key}[{item!r}]")
