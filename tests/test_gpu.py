"""benchmarks/gpu.py on a CPU with small shapes: it passes, it finds a wrong gradient, and it needs few packages."""

import importlib
import json
import subprocess
import sys

import pytest
from conftest import REPO
from cuda_kernels import as_it_was, emulate

from model import attention

MISSING = ("omegaconf", "decord", "av", "diskcache", "pebble", "deepspeed")
BLOCKED = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({MISSING!r}))  # to import one of them is an ImportError
sys.argv = ["gpu.py", "--shrink", "--out", sys.argv[1]]
runpy.run_path({str(REPO / "benchmarks" / "gpu.py")!r}, run_name="__main__")
"""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    return importlib.import_module("gpu")


def checks_of(folder) -> list[dict]:
    return json.loads((folder / "gpu.json").read_text())["checks"]


def test_it_passes_without_the_packages_that_a_gpu_machine_may_lack(tmp_path):
    result = subprocess.run([sys.executable, "-c", BLOCKED, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    last, checks = json.loads(result.stdout.splitlines()[-1]), checks_of(tmp_path)
    assert last["failed"] == 0 and last["checks"] == len(checks) > 40 and all(check["passed"] for check in checks)
    assert {check["part"] for check in checks} == {"attention", "packed", "sampling"}


def test_it_finds_the_wrong_gradients_of_a_kernel(gpu, tmp_path, monkeypatch, capsys):
    """The kernels are emulated, first with what they read and then with the defect that was here once."""
    emulate(monkeypatch, "flash")
    monkeypatch.setattr(gpu, "kernels_of", lambda *_: ["flash"])
    monkeypatch.setattr(gpu, "check_sampling", lambda *_: [])
    assert gpu.main(["--shrink", "--out", str(tmp_path / "good")]) == 0
    monkeypatch.setattr(attention, "attend_backward", as_it_was)
    assert gpu.main(["--shrink", "--out", str(tmp_path / "bad")]) == 1
    failed = [check for check in checks_of(tmp_path / "bad") if not check["passed"]]
    assert {check["part"] for check in failed} == {"attention", "packed"}
    assert all("gradients" in check["name"] for check in failed)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == len(failed)


def test_what_is_done_is_written_before_the_next_part(gpu, tmp_path, monkeypatch):
    def breaks(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "check_sampling", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        gpu.main(["--shrink", "--out", str(tmp_path)])
    assert {check["part"] for check in checks_of(tmp_path)} == {"attention", "packed"}


def test_a_folder_that_cannot_be_made_is_named(gpu, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^error: .*File exists: .*file"):
        gpu.main(["--shrink", "--out", str(tmp_path / "file")])


def test_without_a_gpu_it_says_so(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"error: torch finds no NVIDIA GPU here; --shrink"):
        gpu.main(["--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
