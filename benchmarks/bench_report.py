"""What a report of a very long run costs: seconds to write it, its size, and seconds until a browser has opened it.

    python benchmarks/bench_report.py                 # 100,000 steps, half as many groups; needs Chromium or Chrome
    python benchmarks/bench_report.py --steps 1000    # frames need the clips in ../shared

The run is made up: groups of 8 completions of 1,000 characters about parts of one real clip, no two of them the same.
As many are asked for as make texts and frames fill the page as far as they may. write: all of report.py but its
imports, wall clock and CPU. load: from asking for the file to the end of its script; first paint: to the first text on
the screen; each time in a new browser window.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

from playwright.sync_api import sync_playwright
from run_folders import metrics_row, sample_row, write_training

import report

CLIP = Path(__file__).resolve().parents[2] / "shared" / "data" / "videos" / "dmlc_decord" / "flipping_a_pancake.mkv"
CLIP_S = 10.0
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
LOAD = "performance.getEntriesByType('navigation')[0].loadEventEnd"


def made_up(folder: Path, num_steps: int) -> Path:
    num_groups = num_steps // 2
    thought = "<think>" + "because " * 120 + "</think><answer>5 to 9</answer>"
    group = {"completions": [thought] * 8, "rewards": [0.1 * i for i in range(8)], "parts": [{"iou": 1.0}] * 8}
    group |= {"advantages": [0.5] * 8, "video": str(CLIP), "segments": [[1.0, 2.0]]}
    metrics = (metrics_row(step, num_steps) for step in range(1, num_steps + 1))
    rows = (
        sample_row(2 * i, f"id{i % 5000}", duration=CLIP_S - 1e-4 * (i % 5000), **group)
        for i in range(1, num_groups + 1)
    )
    return write_training(folder, metrics, rows)


def open_times(page: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds to the load event and to the first paint, of each round."""
    loads, paints = [], []
    with sync_playwright() as engine:
        path = next(filter(None, map(shutil.which, BROWSERS)), engine.chromium.executable_path)
        browser = engine.chromium.launch(executable_path=path)
        for _ in range(rounds):
            window = browser.new_page(viewport={"width": 1280, "height": 900})
            window.goto(page.as_uri(), wait_until="load")
            window.wait_for_function(PAINT)
            loads.append(window.evaluate(LOAD) / 1e3)
            paints.append(window.evaluate(PAINT) / 1e3)
            window.close()
        browser.close()
    return loads, paints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7, help="the first is a warm-up")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = made_up(Path(folder) / "run", args.steps)
        wall, cpu = time.perf_counter(), time.process_time()
        report.main([str(run), "--samples", "1000"])
        write_s, write_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        page = run / "report.html"
        loads, paints = (times[1:] for times in open_times(page, args.rounds))
        size = page.stat().st_size
    print(
        f"steps {args.steps:,}, groups {args.steps // 2:,}, clip {'there' if CLIP.is_file() else 'missing: no frames'}"
    )
    for name, times in (("load", loads), ("first paint", paints)):
        print(f"{name:12s} median {median(times):.2f} s, from {min(times):.2f} to {max(times):.2f}")
    print(f"write        {write_s:.1f} s, {write_cpu_s:.1f} s of CPU; {size / 1e6:.1f} MB")
    result = {
        "write_s": write_s,
        "write_cpu_s": write_cpu_s,
        "page_mb": size / 1e6,
        "load_s": median(loads),
        "paint_s": median(paints),
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
