"""What a number needs beside it to be trusted: versions, commit and uncommitted changes, devices."""

import hashlib
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[1]
PACKAGES = "torch transformers accelerate peft deepspeed decord2 decord av numpy tokenizers"


def code_hash() -> str:
    """Of the Python files at the root and in its packages: equal where the same code ran, whatever else was committed.

    A package is a folder with an `__init__.py`, so tests and benchmarks do not count.
    """
    folders = [REPO, *sorted(init.parent for init in REPO.glob("*/__init__.py"))]
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    parts = (part for f in files for part in (str(f.relative_to(REPO)).encode(), f.read_bytes()))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def environment() -> dict:
    """What env.json holds: the command, versions, devices, commit and uncommitted changes."""
    packages = {}
    for name in PACKAGES.split():
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    packages["torch"] = torch.__version__  # with its build, as in 2.13.0+cpu
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": packages,
        "devices": devices or [f"cpu, {torch.get_num_threads()} threads"],
        "code_hash": code_hash(),
        "commit": _git("rev-parse", "HEAD"),
        "diff": _git("diff", "HEAD"),
    }


def _git(*args: str) -> str | None:
    try:
        return subprocess.run(["git", "-C", REPO, *args], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
