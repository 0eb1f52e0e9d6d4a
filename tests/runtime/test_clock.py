"""Phases of a step: their seconds and their peaks, one within the other."""

import time

import numpy as np
import pytest

from runtime import clock as clock_module
from runtime.clock import Clock, peak_bytes, restart_peak

HERE = pytest.mark.skipif(restart_peak() is None, reason="nothing here tells the peak memory of a process")


def test_the_clock_adds_up_phases_and_starts_again():
    clock = Clock()
    start = time.perf_counter()
    with clock("step"):
        for _ in range(2):
            with clock("data"):
                sum(range(20000))
    whole = time.perf_counter() - start
    found = clock.read()
    assert 0 < found["time/data"] <= found["time/step"] <= whole
    assert clock.read() == {}


@HERE
def test_a_phase_keeps_its_peak_when_one_within_it_begins_anew():
    """What `step` held before, between and after the phases within it counts for it, and not for them."""
    clock, mib = Clock(), 2**20 / clock_module.GIB
    with clock("step"):
        np.ones(2**25)  # 256 MiB, gone at once
        with clock("reward"):
            pass
        with clock("update"):
            np.ones(2**24)
    found = clock.read()
    step, update, reward = (found[f"memory/{name}"] for name in ("step", "update", "reward"))
    assert step - reward == pytest.approx(256 * mib, abs=16 * mib)
    assert update - reward == pytest.approx(128 * mib, abs=16 * mib)


@HERE
def test_a_phase_that_fails_is_over_as_well():
    """A video that cannot be read ends one; what is around it keeps its peak, and the seconds count."""
    clock, mib = Clock(), 2**20 / clock_module.GIB
    with clock("data"):
        np.ones(2**25)  # 256 MiB
        for _ in range(3):
            with pytest.raises(ValueError), clock("data_wait"):
                raise ValueError
    found = clock.read()
    assert 0 < found["time/data_wait"] < found["time/data"]
    assert found["memory/data"] - found["memory/data_wait"] == pytest.approx(256 * mib, abs=16 * mib)


@HERE
def test_the_peak_starts_again():
    before = restart_peak()
    np.ones(2**24)
    assert peak_bytes() - before == pytest.approx(2**27, abs=2**23)
    assert restart_peak() <= before + 2**23 and peak_bytes() <= before + 2**23


def test_where_no_peak_is_known_none_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(clock_module.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(clock_module, "CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    clock = Clock()
    with clock("step"), clock("update"):
        pass
    assert set(clock.read()) == {"time/step", "time/update"}
