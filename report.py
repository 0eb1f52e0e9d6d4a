"""Run folders to one HTML page: what was run, curves, results against a baseline, and sampled groups to read.

It trains and scores nothing and only reads the folders, so a live run can be looked at. page/report.html.j2 is the
page. A folder is a training or an evaluation (eval.py run). The first evaluation of a test set is the baseline that
the other evaluations of this test set are compared with.

    python report.py runs/demo/grpo runs/demo/eval_base runs/demo/eval_grpo     # writes runs/demo/grpo/report.html
    python report.py runs/a runs/b --out ab.html                                # two trainings in one plot
    python report.py runs/a --id tiny/tvg_train/7                               # groups that are not on the page
    python report.py runs/a --watch 10                                          # until the run has ended
"""

import argparse
import base64
import hashlib
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from page.curves import number, sections
from page.runs import Evaluation, Training, facts, read_run, short_names
from page.samples import browse
from page.tables import by_questions, table_of
from records.tasks import TASKS
from runtime.arguments import user_errors
from runtime.checkpoint import write_text


def render(runs: Sequence[Training | Evaluation], num: int, steps: Sequence[int], ids: Sequence[str]) -> str:
    """The HTML of one report with at most `num` groups, those of `steps` and `ids` if any are given."""
    trainings = [run for run in runs if isinstance(run, Training)]
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "page")
    env = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    env.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    env.filters |= {"number": number, "signed": signed, "csp_hash": csp_hash}
    return env.get_template("report.html.j2").render(
        title=", ".join(run.name for run in trainings or runs),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        names=[run.name for run in trainings],
        facts=table_of([facts(run) for run in trainings]),
        config=table_of([run.config for run in trainings]),
        sections=sections({run.name: run.series for run in trainings}),
        tests=by_questions([run for run in runs if isinstance(run, Evaluation)]),
        task_names={name: task.title for name, task in TASKS.items()},
        browser=browse({run.name: run.dir / "samples.jsonl" for run in trainings}, num, steps, ids),
    )


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def csp_hash(text: str) -> str:
    """The source expression that lets a Content-Security-Policy take this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def write_report(args: argparse.Namespace, out: Path) -> bool:
    """Write the page; returns whether a training goes on."""
    paths = list(dict.fromkeys(map(Path, args.runs)))
    runs = [read_run(path, name) for path, name in zip(paths, short_names(paths))]
    html = render(runs, args.samples, args.step, args.id)
    write_text(out, html.encode("utf-8", "replace").decode("utf-8"))  # no half of a surrogate pair
    print(f"{out}: {len(html) / 1e6:.1f} MB", flush=True)
    return any(isinstance(run, Training) and not run.finished for run in runs)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of trainings and evaluations")
    parser.add_argument("--out", type=Path, help="report.html in the first folder unless given")
    parser.add_argument("--samples", type=int, default=200, help="groups in the sample browser at most")
    parser.add_argument("--step", type=int, nargs="+", default=[], help="show the groups of these steps")
    parser.add_argument("--id", nargs="+", default=[], help="show these samples, at every step they were sampled at")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="write it anew until the trainings have ended")
    args = parser.parse_args(argv)
    first = Path(args.runs[0])
    out = args.out or (first if first.is_dir() else first.parent) / "report.html"
    with user_errors():
        while True:
            start = time.monotonic()
            goes_on = write_report(args, out)
            if args.watch is None or not goes_on:
                return
            try:
                time.sleep(max(args.watch, 9 * (time.monotonic() - start)))  # a tenth of one core at most
            except KeyboardInterrupt:
                return


if __name__ == "__main__":
    main()
