"""Frozen dataclasses of settings from YAML files and `section.key=value` overrides, every key and type checked.

config.py has the dataclasses; here is what reads them.
"""

import dataclasses
import difflib
import math
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from yaml import YAMLError

ConfigT = TypeVar("ConfigT")


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
