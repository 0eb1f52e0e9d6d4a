"""Typed configuration: defaults < YAML files (later ones win) < `section.key=value` on the command line.

Not a registry and not a place for logic: a field is a name, a type, a default and one line of meaning. YAML holds
only what differs from the defaults; an unknown key or a wrong type is an error that names the nearest valid key.

    cfg = config.load(config.GrpoConfig, ["configs/tiny.yaml"], ["loss.beta=0.0", "run.seed=1"])
"""

import dataclasses
import difflib
import math
import re
from dataclasses import astuple, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from yaml import YAMLError

ConfigT = TypeVar("ConfigT")
ANSWER_MODES = ("tagged", "tagged_or_text")
UNANSWERED_MODES = ("wrong", "skip")

LEAST_LORA_LR = 5e-6  # a smaller learning rate of adapters is warned of


@dataclass(frozen=True)
class RunConfig:
    dir: str = "runs/grpo"  # run folder; an existing one is never overwritten, see --resume
    seed: int = 0  # of data order, sampling and weights; a sample depends on (seed, step, sample id, g) alone
    steps: int = 200  # batches: for GRPO rollouts, with loss.updates_per_rollout optimizer steps on each
    save_every: int = 100  # steps between checkpoints; the last step is always saved
    keep_checkpoints: int = 2  # newest checkpoints kept
    print_every: int = 20  # steps between two printed completions
    max_skipped: int = 5  # updates in a row without a finite gradient until the run stops; each of them moves nothing
    max_first_grad_norm: float = 1e4  # the run ends if its first update has a larger gradient norm; 0 for no limit
    timeout: float = 1800.0  # seconds that a process waits for others, then ends and names them; see docs/clusters.md
    self_check: bool = (
        True  # before the first step: positions, log-probs, video and processes, see preflight/selfcheck.py
    )
    tracker: str = "tensorboard"  # any tracker that accelerate knows, or "none"; metrics.jsonl is always written

    def __post_init__(self):
        _check_positive({"run.timeout": self.timeout})


@dataclass(frozen=True)
class ModelConfig:
    path: str = "tiny_world/model"  # Hugging Face folder or hub id, Qwen2-VL or Qwen2.5-VL
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and activations; log-probs are always float32
    freeze_vision: bool = True  # tower and merger get no gradient and run once per video and step
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    gather_weights: bool = True  # ZeRO-3: each device holds the model whole while it samples; False: anew every token
    lora_rank: int = 0  # above 0: only adapters of this rank on the language model's linear layers are trained (peft)
    lora_alpha: float = 32.0  # an adapter's output is scaled by lora_alpha / lora_rank
    lora_merger: bool = False  # adapters on the vision merger's linear layers as well


@dataclass(frozen=True)
class DataConfig:
    train: str = "tiny_world/tvg_train.yaml"  # .yaml list of data sets, .jsonl records or Temporal-R1 .json
    validation: str = "tiny_world/tvg_validation.yaml"  # same forms; "" for no validation
    batch_size: int = 16  # videos per optimizer step, over all processes
    micro_batch_size: int = 16  # videos per forward and backward pass and process; changes no gradient
    out_of_clip: Literal["clamp", "drop", "error"] = "clamp"  # a segment that ends after its video
    manifest: str = ""  # written by `python data.py check`; the records it calls bad are dropped; "" for none
    workers: int = 2  # processes of each training process that decode ahead; 0: none, and no decode_timeout
    decode_timeout: float = 120.0  # seconds that decoding one video may take
    max_bad_share: float = 0.1  # of the samples asked for; past it, videos that cannot be read end the run
    order: Literal["uniform", "curriculum"] = "uniform"  # curriculum: every epoch from easy to hard, see select_data.py
    refilter_every: int = 0  # epochs until samples whose group was dead when last sampled are dropped, again and again
    cache_dir: str = "tiny_world/cache"  # decoded frames; "" for none
    cache_gib: float = 4.0  # size of that cache, in GiB


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


THINK = (
    "Think about the video and the question first, inside <think> </think> tags. "
    "Then give the final answer inside <answer> </answer> tags."
)
PLAIN = "Give only the final answer, inside <answer> </answer> tags."
WORDS = {"question", "options"}  # what a prompt's {word} may be


@dataclass(frozen=True)
class PromptConfig:
    think: bool = True  # responses are a think block, then an answer block; otherwise an answer block alone
    system_think: str = THINK  # system turn in thinking mode; "" for none
    system_plain: str = PLAIN  # system turn otherwise; "" for none
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
        for task, known in (("tvg", {"question"}), ("mcqa", WORDS), ("gqa", WORDS)):
            found = re.findall(r"(\\\w+)?\{(\w+)\}", getattr(self, task))
            words = {word for command, word in found if not command}  # \boxed{B} is meant as it stands
            if "question" not in words:  # a model that is not asked can only guess
                raise ValueError(f"prompt.{task} must hold {{question}}, got {getattr(self, task)!r}")
            if unknown := sorted(words - known):  # it would reach the model as it stands
                listed = " and ".join(f"{{{word}}}" for word in sorted(known, reverse=True))
                raise ValueError(f"prompt.{task} may hold {listed}, and {{{unknown[0]}}} is unknown")


@dataclass(frozen=True)
class RolloutConfig:
    group_size: int = 8  # G, completions per video
    temperature: float = 1.0  # of sampling and of every log-prob
    max_new_tokens: int = 2048  # T at most, EOS included
    micro_batch_size: int = 16  # videos in one call of generate and process; changes no sample


@dataclass(frozen=True)
class Weights:
    format: float = 0.0  # the response is laid out as asked and its answer parses
    answer: float = 0.0  # discrete: the right option
    iou: float = 0.0  # continuous: temporal IoU


@dataclass(frozen=True)
class RewardsConfig:
    tvg: Weights = field(default_factory=lambda: Weights(format=0.5, iou=0.5))
    mcqa: Weights = field(default_factory=lambda: Weights(format=0.5, answer=0.5))
    gqa: Weights = field(default_factory=lambda: Weights(format=0.2, answer=0.4, iou=0.4))
    format_gates_task: bool = True  # no task reward without the format, no format reward without a parsed answer
    overlap: Literal["iou", "timestamp_iou", "distance_iou"] = "iou"  # what the part `iou` is, see rewards.py
    functions: dict[str, float] = field(default_factory=dict)  # "path/to/file.py:function": weight; added to the total
    conversational: bool = False  # those functions get completions as TRL's message lists instead of strings


@dataclass(frozen=True)
class GroupConfig:
    tolerance: float = 5e-4  # dead: a standard deviation of rewards (without the penalty for length) up to this
    skip_dead: bool = True  # no update work for dead groups; their KL and entropy terms go with it
    max_refills: int = 0  # rounds of sampling further videos in place of dead groups (DAPO's dynamic sampling)
    warn_after: int = 20  # steps in a row with dead or nearly equal groups, or over 90% truncated, before a warning


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
    kl_clamp: float = 10.0  # the KL's log-ratio is clamped to +- this
    entropy: float = 0.0  # coefficient of the entropy bonus
    updates_per_rollout: int = 1  # mu, optimizer steps on one rollout; above 1 the clip gets to work
    old_logps: Literal["policy", "sampled"] = "policy"  # policy: of the first pass over the rollout
    truncated: Literal["keep", "mask", "penalise"] = "keep"  # of no EOS: mask leaves out of the loss
    overlong_buffer: float = 0.2  # share of rollout.max_new_tokens, at its end, within which that penalty grows from 0
    overlong_penalty: float = 0.5  # to this; DAPO's is 1, where a right answer earns 2 more than a wrong one


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-6  # AdamW learning rate; adapters want about ten times that of full tuning
    muon_lr: float = 0.0  # above 0: matrices but embeddings are trained by Muon at this rate (from scratch)
    weight_decay: float = 0.01  # AdamW, decoupled
    beta1: float = 0.9  # AdamW
    beta2: float = 0.999  # AdamW
    grad_clip: float = 1.0  # maximum gradient norm
    warmup_steps: int = 0  # linear warm-up of the learning rate
    schedule: Literal["constant", "cosine"] = "constant"  # cosine falls to 0 at run.steps


@dataclass(frozen=True)
class EvalConfig:
    every: int = 50  # steps between validations; 0 for none
    num_samples: int = 200  # at most so many validation samples, evenly over tasks and sources; 0 for all
    batch_size: int = 32  # videos per call of generate and process
    max_new_tokens: int = 2048  # greedy tokens at most
    answer: Literal["tagged", "tagged_or_text"] = "tagged"  # the answer block in the form asked for, or plain words too


@dataclass(frozen=True)
class AnswerConfig:
    batch_size: int = 32  # videos per call of generate and process
    max_new_tokens: int = 2048  # tokens of an answer at most
    num_answers: int = 1  # answers to each question; of several, metrics are the means, and *_best the best of them
    temperature: float = 0.0  # of sampling; 0: greedy
    answer: Literal["tagged", "tagged_or_text"] = "tagged"  # the answer block in the form asked for, or plain words too
    unanswered: Literal["wrong", "skip"] = "wrong"  # skip: questions without a usable answer are left out
    blind: bool = False  # the questions are asked again, each with the clip of another video of similar length


@dataclass(frozen=True)
class TestDataConfig:
    test: str = "tiny_world/tvg_test.yaml"  # what to evaluate: .yaml, .jsonl or .json, as for training
    floor: str = (
        ""  # training set whose best constant answers are scored beside the model, see metrics/blind.py; "" for none
    )
    out_of_clip: Literal["clamp", "drop", "error"] = "clamp"
    manifest: str = ""
    workers: int = 2
    decode_timeout: float = 120.0
    max_bad_share: float = 0.1  # of the samples; past it, videos that cannot be read end the evaluation
    cache_dir: str = "tiny_world/cache"
    cache_gib: float = 4.0


@dataclass(frozen=True)
class SelectDataConfig:
    train: str = "tiny_world/mix_train.yaml"  # what to select from, in the forms that training takes
    out_of_clip: Literal["clamp", "drop", "error"] = "clamp"
    manifest: str = ""
    workers: int = 2
    decode_timeout: float = 120.0
    max_bad_share: float = 0.1  # of all samples; past it, videos that cannot be read end the command
    cache_dir: str = "tiny_world/cache"
    cache_gib: float = 4.0


@dataclass(frozen=True)
class RuleConfig:
    """A reward here is the task's own, without the format: IoU, right option, or the mean of both (gqa)."""

    rule: Literal["mixed", "mean_range", "top_variance", "random"] = "mixed"  # see selection/rules.py
    min_std: float = 0.1  # mixed, of tvg and gqa: rewards with a smaller standard deviation are of low variance
    min_best: float = 0.5  # mixed, of tvg and gqa: a smaller best reward is too low
    low: float = 0.1  # mean_range: a smaller mean reward is too hard
    high: float = 0.7  # mean_range: a larger mean reward is too easy
    budget: int = 0  # at most so many items are kept, shared out by task and source; 0 for no limit
    seed: int = 0  # of what is random in a rule: the draw of `random`, and who goes first among equals
    scores: str = ""  # score file to use instead of sampling: scores.jsonl of a run.dir, or rows with id and rewards
    allow: list[str] = field(default_factory=list)  # keys or sections in which those scores may differ from this config


@dataclass(frozen=True)
class PlanConfig:
    """What `--plan` assumes. Not part of a run's configuration, but given like it: `plan.tflops=300`."""

    engine: str = ""  # file of `accelerate launch`; "" for what it has set, or one process
    memory_gib: float = 80.0  # of a device
    tflops: float = 400.0  # TFLOP/s that a device reaches in matrix products, not its peak
    bandwidth: float = 2.0  # TB/s that it reaches in reading and writing memory
    capability: float = 8.0  # CUDA compute capability of a device; before 8.0 there is no fused attention in bfloat16
    launch_us: float = 10.0  # microseconds that any operation takes at least
    completion_tokens: int = 0  # mean length of a completion, for the update's time; 0: the longest
    longest_tokens: int = 0  # length of a step's longest completion, for decoding's time; 0: rollout.max_new_tokens

    def __post_init__(self):
        positive = ("memory_gib", "tflops", "bandwidth", "capability", "launch_us")
        _check_positive({f"plan.{name}": getattr(self, name) for name in positive})
        if self.capability >= 20:
            raise ValueError(f"plan.capability must be below 20, as in 8.6 for the card's 8.6, got {self.capability}")
        names = ("completion_tokens", "longest_tokens")
        _check_at_least_0({f"plan.{name}": getattr(self, name) for name in names})
        if 0 < self.longest_tokens < self.completion_tokens:
            raise ValueError(
                f"plan.longest_tokens={self.longest_tokens} is below the mean, "
                f"plan.completion_tokens={self.completion_tokens}"
            )


@dataclass(frozen=True)
class GrpoConfig:
    """Everything `train_grpo.py` reads."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    group: GroupConfig = field(default_factory=GroupConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self):
        if self.rollout.group_size < 2:
            raise ValueError(f"rollout.group_size is {self.rollout.group_size}; a group needs at least 2 completions")
        _check_rewards(self.rewards)
        if self.loss.clip_low >= 1 and self.loss.clip != "cispo":  # MiniMax-M1 sets no lower bound for CISPO
            raise ValueError(f"loss.clip_low must be below 1, as no ratio is below 0, got {self.loss.clip_low}")
        if self.loss.overlong_buffer > 1:
            raise ValueError(f"loss.overlong_buffer must be at most 1, got {self.loss.overlong_buffer}")
        _check_training(self)


@dataclass(frozen=True)
class SftConfig:
    """Everything `train_sft.py` reads."""

    run: RunConfig = field(default_factory=lambda: RunConfig(dir="runs/sft"))
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self):
        if self.data.refilter_every:
            raise ValueError("data.refilter_every must be 0: supervised tuning samples no groups")
        _check_training(self)


@dataclass(frozen=True)
class SelectConfig:
    """Everything `select_data.py` reads; `run.dir` receives scores.jsonl, selected.jsonl and the like."""

    run: RunConfig = field(default_factory=lambda: RunConfig(dir="runs/select"))
    model: ModelConfig = field(default_factory=ModelConfig)
    data: SelectDataConfig = field(default_factory=SelectDataConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    select: RuleConfig = field(default_factory=RuleConfig)

    def __post_init__(self):
        _check_data(self.data)
        _check_rewards(self.rewards)
        _check_rollout(self.rollout)
        rule, k = self.select, self.rollout.group_size
        if not 0 <= rule.low <= rule.high <= 1:
            raise ValueError(f"select.low and select.high must be 0 <= low <= high <= 1, got {rule.low}, {rule.high}")
        _check_at_least_0({f"select.{name}": getattr(rule, name) for name in ("min_std", "min_best", "budget", "seed")})
        if rule.rule in ("top_variance", "random") and not rule.budget:
            raise ValueError(f"select.rule={rule.rule} needs select.budget, the number of items to keep")
        if rule.allow and not rule.scores:
            raise ValueError("select.allow is for select.scores: the scores of run.dir are of this config")
        if rule.rule in ("mixed", "top_variance") and k < 2 and not rule.scores:
            raise ValueError(f"select.rule={rule.rule} needs a variance, and rollout.group_size={k} has none")


@dataclass(frozen=True)
class EvalRunConfig:
    """Everything `eval.py run` reads; `run.dir` receives predictions.jsonl and metrics.json."""

    run: RunConfig = field(default_factory=lambda: RunConfig(dir="runs/eval"))
    model: ModelConfig = field(default_factory=ModelConfig)
    data: TestDataConfig = field(default_factory=TestDataConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    eval: AnswerConfig = field(default_factory=AnswerConfig)

    def __post_init__(self):
        _check_data(self.data)
        for name in ("batch_size", "max_new_tokens", "num_answers"):
            if getattr(self.eval, name) <= 0:
                raise ValueError(f"eval.{name} must be above 0, got {getattr(self.eval, name)}")
        if self.eval.temperature < 0 or (self.eval.num_answers > 1 and not self.eval.temperature):
            raise ValueError(f"eval.temperature must be above 0 (0: one greedy answer), got {self.eval.temperature}")


def _check_data(cfg) -> None:
    if cfg.workers < 0:
        raise ValueError(f"data.workers must be at least 0, got {cfg.workers}")
    if cfg.decode_timeout <= 0:
        raise ValueError(f"data.decode_timeout must be above 0, got {cfg.decode_timeout}")
    if not 0 <= cfg.max_bad_share <= 1:
        raise ValueError(f"data.max_bad_share must be from 0 to 1, got {cfg.max_bad_share}")


def _check_rewards(cfg: RewardsConfig) -> None:
    for name in ("tvg", "mcqa", "gqa"):
        weights = astuple(getattr(cfg, name))
        if min(weights) < 0 or (sum(weights) <= 0 and not cfg.functions):
            raise ValueError(f"rewards.{name}: weights must be >= 0 and not all 0, got {weights}")
    for name, absent in (("tvg", "answer"), ("mcqa", "iou")):
        if getattr(getattr(cfg, name), absent):
            raise ValueError(f"rewards.{name}.{absent} must be 0: the task has no such part")


def _check_rollout(cfg: RolloutConfig) -> None:
    names = ("group_size", "temperature", "max_new_tokens", "micro_batch_size")
    _check_positive({f"rollout.{name}": getattr(cfg, name) for name in names})


def _check_positive(values: dict[str, float]) -> None:
    for key, value in values.items():
        if value <= 0:
            raise ValueError(f"{key} must be above 0, got {value}")


def _check_at_least_0(values: dict[str, float]) -> None:
    for key, value in values.items():
        if value < 0:
            raise ValueError(f"{key} must be at least 0, got {value}")


def _check_training(cfg) -> None:
    _check_data(cfg.data)
    at_least_0 = {"model.lora_rank": cfg.model.lora_rank, "data.refilter_every": cfg.data.refilter_every}
    at_least_0 |= {"run.max_first_grad_norm": cfg.run.max_first_grad_norm, "optim.warmup_steps": cfg.optim.warmup_steps}
    positive = {
        "model.lora_alpha": cfg.model.lora_alpha,
        "run.steps": cfg.run.steps,
        "run.save_every": cfg.run.save_every,
        "run.keep_checkpoints": cfg.run.keep_checkpoints,
        "run.print_every": cfg.run.print_every,
        "run.max_skipped": cfg.run.max_skipped,
        "data.batch_size": cfg.data.batch_size,
        "data.micro_batch_size": cfg.data.micro_batch_size,
        "optim.lr": cfg.optim.lr,
        "optim.grad_clip": cfg.optim.grad_clip,
        "eval.batch_size": cfg.eval.batch_size,
        "eval.max_new_tokens": cfg.eval.max_new_tokens,
    }
    if isinstance(cfg, GrpoConfig):
        _check_rollout(cfg.rollout)
        positive |= {
            "loss.updates_per_rollout": cfg.loss.updates_per_rollout,
            "loss.kl_clamp": cfg.loss.kl_clamp,
            "loss.overlong_buffer": cfg.loss.overlong_buffer,
            "group.warn_after": cfg.group.warn_after,
        }
        names = ("std_eps", "clip_low", "clip_high", "beta", "entropy", "overlong_penalty")
        at_least_0 |= {f"loss.{name}": getattr(cfg.loss, name) for name in names}
        at_least_0 |= {"group.tolerance": cfg.group.tolerance, "group.max_refills": cfg.group.max_refills}
    _check_positive(positive)
    _check_at_least_0(at_least_0)
    if cfg.optim.warmup_steps > cfg.run.steps:
        raise ValueError(
            f"optim.warmup_steps must be at most run.steps={cfg.run.steps}, got {cfg.optim.warmup_steps}: optim.lr "
            "would never be reached"
        )
    if cfg.model.lora_rank and not cfg.model.freeze_vision:
        raise ValueError("model.lora_rank trains adapters only: model.freeze_vision must be true (see lora_merger)")
    if cfg.model.lora_rank and cfg.optim.muon_lr:
        raise ValueError("optim.muon_lr is for training from scratch, not for the adapters of model.lora_rank")
    if cfg.model.lora_merger and not cfg.model.lora_rank:
        raise ValueError("model.lora_merger=true needs model.lora_rank above 0")


def cautions(cfg: GrpoConfig | SftConfig) -> list[str]:
    """What a training can do and its user hardly means, one line each."""
    found = []
    if cfg.model.lora_rank and cfg.optim.lr < LEAST_LORA_LR:
        found.append(
            f"optim.lr={cfg.optim.lr:g} is a rate for full tuning: the adapters of model.lora_rank want about ten "
            "times as much, see configs/lora.yaml"
        )
    if isinstance(cfg, GrpoConfig) and cfg.loss.updates_per_rollout == 1 and cfg.loss.old_logps == "policy":
        default = LossConfig()
        names = ("ratio", "clip", "clip_low", "clip_high")
        changed = [f"loss.{name}={getattr(cfg.loss, name)}" for name in names]
        changed = [text for text, name in zip(changed, names) if getattr(cfg.loss, name) != getattr(default, name)]
        if changed:
            found.append(
                f"{', '.join(changed)} changes nothing at loss.updates_per_rollout=1, where every ratio is 1: set it "
                "to 2 or more"
            )
    return found


def load(config_class: type[ConfigT], paths: list[str] = (), overrides: list[str] = ()) -> ConfigT:
    """Merge defaults, YAML files and `section.key=value` overrides into one frozen `config_class`.

    Raises ValueError that names file or override, key and the nearest valid key.
    """
    from omegaconf import OmegaConf  # here and below, so that a config can be made in Python without it
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.create({})
    for path in paths:
        merged = OmegaConf.merge(merged, _read_yaml(config_class, path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is not of the form section.key=value")
        try:
            layer = OmegaConf.from_dotlist([f"{key}={value or repr('')}"])  # a shell makes `key=` of `key=''`
        except (OmegaConfBaseException, YAMLError) as error:
            raise ValueError(f"override {override!r}: {' '.join(str(error).split())}") from None
        _check_keys(config_class, OmegaConf.to_container(layer), "", f"override {override!r}")
        merged = OmegaConf.merge(merged, layer)
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{', '.join([*paths, *overrides])}: {' '.join(str(error).split())}") from None
    return _build(config_class, values, "")


def to_yaml(cfg: Any) -> str:
    """The effective configuration as YAML; `load` of it gives an equal object."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(cfg)))


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """YAML files and `section.key=value` overrides, told apart: `--config a.yaml b=1` takes both.

    >>> split_overrides(["configs/tiny.yaml", "run.seed=1"])
    (['configs/tiny.yaml'], ['run.seed=1'])
    """
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, keys joined by dots.

    >>> flat({"video": {"fps": 2.0}, "answer": "tagged"})
    {'video.fps': 2.0, 'answer': 'tagged'}
    """
    found: dict = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _read_yaml(config_class: type, path: str):
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not Path(path).is_file():
        raise ValueError(f"config file {path} not found")
    try:
        layer = OmegaConf.load(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(layer):
        raise ValueError(f"{path}: expected sections of keys, got {type(layer).__name__}")
    _check_keys(config_class, OmegaConf.to_container(layer), "", path)
    return layer


def _check_keys(config_class: type, values: Any, prefix: str, source: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{source}: {prefix.rstrip('.')} is a section, not a value")
    types = get_type_hints(config_class)
    for key, value in values.items():
        if key not in types:
            raise ValueError(f"{source}: unknown key {prefix}{key}{_nearest(config_class, prefix, str(key))}")
        if dataclasses.is_dataclass(types[key]):
            _check_keys(types[key], value, f"{prefix}{key}.", source)
        else:
            _check_type(value, types[key], f"{source}: {prefix}{key}")


def _nearest(config_class: type, prefix: str, key: str) -> str:
    names = list(get_type_hints(config_class))
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; valid are {', '.join(prefix + n for n in names)}"


def _check_type(value: Any, hint: Any, where: str) -> None:
    if isinstance(value, str) and value.startswith("${"):
        return  # an interpolation, checked once resolved
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where} must be one of {', '.join(map(str, get_args(hint)))}, got {value!r}")
        return
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {value!r}")
        for key, item in value.items():
            _check_type(item, get_args(hint)[1], f"{where}[{key}]")
        return
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}")
        for i, item in enumerate(value):
            _check_type(item, get_args(hint)[0], f"{where}[{i}]")
        return
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if float in kinds and type(value) is int:
        return
    if type(value) not in kinds:
        raise ValueError(f"{where} must be {hint.__name__}, got {value!r} ({type(value).__name__})")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}")


def _build(config_class: type[ConfigT], values: dict, prefix: str) -> ConfigT:
    types, built = get_type_hints(config_class), {}
    default = config_class()
    for key, hint in types.items():
        if dataclasses.is_dataclass(hint):
            base = dataclasses.asdict(getattr(default, key))
            built[key] = _build(hint, _deep_merge(base, values.get(key, {})), f"{prefix}{key}.")
        elif key in values:
            _check_type(values[key], hint, f"{prefix}{key}")
            built[key] = float(values[key]) if hint is float else values[key]
    return config_class(**built)


def _deep_merge(base: dict, over: dict) -> dict:
    return base | {k: _deep_merge(base[k], v) if isinstance(v, dict) else v for k, v in over.items()}
