"""Model folders: load, freeze and save a Qwen2-VL / Qwen2.5-VL model, with adapters (LoRA) or without.

What is computed with one is in policy.py. A saved model is an ordinary Hugging Face folder. With LoRA it is an adapter
folder, which `model.path` takes as well. The full model, for other programs:

    python -m model.folder merge runs/grpo/final runs/grpo/merged
"""

import hashlib
import json
import shutil
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from runtime.arguments import of_merge, user_errors

if __name__ == "__main__":  # here, so that a misspelt option is told before torch is imported, which takes seconds
    of_merge(None, __doc__)


import torch
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from config import ModelConfig
from runtime.checkpoint import identity

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json", ".bin.index.json")
LORA_TEXT = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"  # modules of both families that get an adapter
LORA_MERGER = r"model\.visual\.merger\.mlp\.(0|2)"


def load_model(cfg: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PeftModel | None]:
    """Model, tokenizer and new adapter (`freeze_and_adapt`) of a Hugging Face folder or hub id.

    An adapter folder gives the full model it names with its adapter merged in, in `cfg.dtype`; a relative name counts
    from the working folder, as all paths of a config do.
    Raises ValueError in one line for what is missing, unreadable, of another family or short of weights.
    """
    full, where = cfg.path, f"model.path {cfg.path}"
    try:
        full, *adapters = _layers(cfg.path)
        where += f", an adapter of {full}" if adapters else ""
        read_config(full)
        tokenizer = _load_tokenizer(full)
        _side_files(full)  # now: saving them is late to find that the hub cannot be reached
        model, info = AutoModelForImageTextToText.from_pretrained(
            full, dtype=getattr(torch, cfg.dtype), attn_implementation="shared_prefix", output_loading_info=True
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ValueError(f"no weights for {sorted(info['missing_keys'])[:3]} or of another shape")
        for folder in adapters:
            model = _merged(model, folder)
    except SafetensorError as error:  # which names no file
        damaged = ", ".join(_unreadable_weights(_layers(cfg.path))) or "a file of weights"
        raise ValueError(f"{where}: {damaged} is damaged or incomplete ({error}); copy or download it again") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())[:300]}") from None
    return model, tokenizer, freeze_and_adapt(model, cfg)


def freeze_and_adapt(model: PreTrainedModel, cfg: ModelConfig) -> PeftModel | None:
    """Leave trainable what the config says, and return the new adapter, which is None without LoRA.

    With LoRA nothing but the adapter is trained, in float32 whatever the model's dtype. Its A is random (set the seed
    first) and its B is 0, so that the start is the model as it was. It has no dropout, because then the log-prob of a
    sampled token and its scored one would be those of different models.
    """
    model.set_attn_implementation({"vision_config": "flash_windows"})
    if cfg.freeze_vision:
        model.model.visual.requires_grad_(False)
    adapter = None
    if cfg.lora_rank:
        targets = f"{LORA_TEXT}|{LORA_MERGER}" if cfg.lora_merger else LORA_TEXT
        model.name_or_path = cfg.path  # what peft saves as the adapter's base
        adapter = get_peft_model(model, LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=targets))
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # a need of reentrant checkpoints: the frozen tower would get a backward
    return adapter


def read_config(full: str | Path):
    """The configuration of a folder or hub id with a full model. Raises ValueError or OSError where it cannot train."""
    check_found(str(full))
    config = AutoConfig.from_pretrained(full)
    if config.model_type not in FAMILIES:
        raise ValueError(f"family {config.model_type} is not one of {', '.join(FAMILIES)}")
    if set(getattr(config.text_config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise ValueError("a sliding window (use_sliding_window) is not supported")
    return config


def check_found(path: str) -> None:
    """Raises FileNotFoundError where a model folder is not here, and nothing of its hub id can be had.

    At once: the hub's own client tries for half a minute. What looks like a path here is not asked for there.
    """
    if (path and Path(path).is_dir()) or (_is_hub_id(path) and try_to_load_from_cache(path, "config.json")):
        return
    if path == ModelConfig.path:
        raise FileNotFoundError("no such folder; `python tiny.py` writes this embedded default")
    reason = _unreachable(constants.ENDPOINT) if _is_hub_id(path) else "it is a path"
    if reason and (not _is_hub_id(path) or Path(path).parent.is_dir()):
        raise FileNotFoundError("no such folder; give one that has a config.json, or a hub id like Qwen/NAME")
    if reason:
        raise FileNotFoundError(
            f"no such folder, and the hub cannot be reached ({constants.ENDPOINT}: {reason}); give a folder, or run "
            f"`hf download {path}` where there is a network"
        )


def _is_hub_id(path: str) -> bool:
    """Whether a name is of the form owner/name.

    >>> [_is_hub_id(path) for path in ("Qwen/Qwen2.5-VL-3B", "runs/x/final", "./model", "model")]
    [True, False, False, False]
    """
    return path.count("/") == 1 and path[0] not in "./~"


def _unreachable(url: str) -> str:
    """Why nobody answers at `url`; "" where somebody does, be it that he refuses."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if urllib.request.getproxies():  # the hub's client knows kinds of them that urllib does not
        return ""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10):
            return ""
    except urllib.error.HTTPError:
        return ""
    except OSError as error:
        reason = getattr(error, "reason", error)
        return "" if isinstance(reason, ssl.SSLError) else str(reason)  # the hub's client may know the certificate


def _load_tokenizer(full: str):
    """The tokenizer of a folder. transformers makes up an empty one where there is none."""
    tokenizer = AutoTokenizer.from_pretrained(full)
    if "<|video_pad|>" not in tokenizer.get_vocab():
        raise ValueError("no tokenizer of a Qwen-VL model; copy tokenizer.json and tokenizer_config.json of its base")
    if not tokenizer.chat_template:
        raise ValueError("no chat template; copy chat_template.jinja or tokenizer_config.json of its base")
    return tokenizer


def _unreadable_weights(folders: list[str]) -> list[str]:
    """The files of weights that safetensors cannot open, in folders of this machine."""
    found = []
    for file in [file for folder in folders for file in sorted(Path(folder).glob("*.safetensors"))]:
        try:
            safe_open(file, "pt")
        except SafetensorError:
            found.append(str(file))
    return found


def _layers(path: str) -> list[str]:
    """A model folder as [full model, adapter, ...]: an adapter's base may be an adapter folder too."""
    file = Path(path, "adapter_config.json")
    if not file.is_file():
        return [path]
    try:
        base = json.loads(file.read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not the settings of an adapter: {error}") from None
    if not base:
        raise ValueError(f"{file} has no base_model_name_or_path")
    return [*_layers(base), path]


def _side_files(full: str) -> list[Path]:
    """The files of a model folder beside its weights. Of a hub id all are fetched: not only what we read ourselves.

    Others need the processor's chat template, for one: `chat_template.json` in the released folders.
    """
    ignored = [f"*{ending}" for ending in WEIGHT_FILES]
    folder = full if Path(full).is_dir() else snapshot_download(full, ignore_patterns=ignored)
    return [file for file in Path(folder).iterdir() if file.is_file() and not file.name.endswith(WEIGHT_FILES)]


def weights_hash(path: str) -> str:
    """A hash of the weight files of a model folder and of what an adapter adds to; "" where there are none (hub ids).

    No model is loaded for it; policy.fingerprint is for one that is.
    """
    folders = _layers(path) if Path(path).is_dir() else []
    files = [file for folder in folders for file in sorted(Path(folder).iterdir()) if file.name.endswith(WEIGHT_FILES)]
    return hashlib.sha256("".join(map(identity, files)).encode()).hexdigest()[:12] if files else ""


def _merged(model, folder: str):
    """`model` with the weights of an adapter folder added to its own, and all of it trainable."""
    wrapper = PeftModel(model, PeftConfig.from_pretrained(folder))
    info = wrapper.load_adapter(folder, "default")
    if info.missing_keys or info.unexpected_keys:
        raise ValueError(f"weights that are missing or unknown: {[*info.missing_keys, *info.unexpected_keys][:3]}")
    return wrapper.merge_and_unload().requires_grad_(True)


def save_model(
    model: PreTrainedModel, adapter: PeftModel | None, folder: str | Path, source: str, weights: dict | None = None
) -> None:
    """Write a Hugging Face folder: our weights, with LoRA the adapter's alone, every other file as `source` has it.

    `weights` are the policy's tensors by name, where it does not hold them itself (runtime/engine.py).
    Where `source` is an adapter folder, those files are the full model's. Tensors have the names that they have in the
    files of `source` (transformers 5 renames on loading, and renames back here) and the dtype they are trained in.
    """
    folder = Path(folder)
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    own = model.state_dict() if weights is None else {name.removeprefix("model."): x for name, x in weights.items()}
    if adapter is None:
        model.save_pretrained(aside, state_dict=own)
    else:
        own = {f"base_model.model.{name}": tensor for name, tensor in own.items()}
        adapter.save_pretrained(aside, save_embedding_layers=False, state_dict=own)
    for file in _side_files(_layers(source)[0]):
        shutil.copyfile(file, aside / file.name)
    if adapter is not None:  # transformers takes a folder with a config.json for a full model
        for name in ("config.json", "README.md"):
            (aside / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def banned_ids(config, tokenizer) -> Tensor:
    """Ids that are never sampled: vision placeholders and brackets, and embeddings past the tokenizer."""
    names = ("image", "video", "vision_start", "vision_end", "vision")
    special = {getattr(config, f"{name}_token_id", None) for name in names}
    special |= {tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_pad", "image_pad", "video_pad")}
    ids = {i for i in special if i is not None} | set(range(len(tokenizer), config.text_config.vocab_size))
    return torch.tensor(sorted(ids))


def stop_ids(generation_config, tokenizer) -> tuple[list[int], int]:
    eos, pad = generation_config.eos_token_id, generation_config.pad_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    pad = tokenizer.pad_token_id if pad is None else pad
    if eos is None or pad is None:
        raise ValueError("neither generation_config.json nor the tokenizer names an EOS and a pad token")
    return ([eos] if isinstance(eos, int) else list(eos)), pad


def main(argv: list[str] | None = None) -> None:
    """`merge`, in float32, so that no small update is rounded away here; a user's error ends with one line."""
    args = of_merge(argv, __doc__)
    with user_errors():
        if len(_layers(args.adapter)) == 1:
            raise ValueError(f"{args.adapter} is no adapter folder: it has no adapter_config.json")
        if Path(args.out).exists():
            raise ValueError(f"{args.out} exists; give another folder")
        model, _, adapter = load_model(ModelConfig(path=args.adapter))
        save_model(model, adapter, args.out, args.adapter)


if __name__ == "__main__":
    main()
