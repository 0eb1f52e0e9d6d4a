"""What is done and what is left of evaluation and selection, whose rows depend on nothing but their own batch."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from records import jsonl
from records.record import Sample
from runtime.run import Run


def cut(samples: Sequence[Sample], batch_size: int) -> list[Sequence[Sample]]:
    """Batches of `batch_size`, the last one shorter."""
    return [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]


class DoneBatches:
    """The batches that are done, in `<name>.<rank>.jsonl` of the run folder: one line a batch.

    Batches are known by their number in the whole data, so that a run that was killed goes on with the same ones, on
    any number of processes. A line that was being written is cut off and its batch done again. So is a batch with a
    video that could not be read (a row with an `error`). `by` names the weights and code that make the rows. Lines by
    others are an error, as are rows without their sample's `head`. `todo` is what is left, the same on all processes.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        batches: Sequence[Sequence[Sample]],
        head: Callable[[Sample], dict],
        by: dict[str, str],
    ):
        self.run, self.name, self.batches, self.head, self.by = run, name, batches, head, by
        self.path = run.dir / f"{name}.{run.engine.rank}.jsonl"
        self.rows: dict[int, list[dict]] = {}  # on the main process those of earlier starts too
        self.todo = sorted(set(range(len(batches))) - run.engine.raise_together(self._read))
        self.mine = self.todo[run.engine.rank :: run.engine.world_size]  # this process's share

    def _read(self) -> set[int]:
        for path in lines_files(self.run, self.name):
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
            for number, content in jsonl.read(path):
                try:
                    self._take(content)
                except (ValueError, TypeError, LookupError, AttributeError) as error:
                    reason = str(error) if type(error) is ValueError else f"not a line of {self.name} ({error!r})"
                    raise ValueError(f"{path}:{number}: {reason}") from None
        return set(self.rows)

    def _take(self, content: dict) -> None:
        for key, value in self.by.items():
            if content["by"][key] != value:
                raise ValueError(f"{self.name} by other {key} ({content['by'][key]} there, {value} now)")
        number, rows = content["batch"], content["rows"]
        heads = [self.head(sample) for sample in self.batches[number]]
        if [{key: row.get(key) for key in head} for row, head in zip(rows, heads)] != json.loads(json.dumps(heads)):
            raise ValueError(f"batch {number} is of other samples than the data has now")
        if not any("error" in row for row in rows):
            self.rows[number] = rows

    def add(self, number: int, rows: list[dict]) -> None:
        self.rows[number] = rows
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(jsonl.text_of([{"batch": number, "by": self.by, "rows": rows}]))

    def gather(self) -> list[dict]:
        """The rows of all batches of all processes, in the order of the data; the last one to be done is waited for."""
        self.run.engine.wait_for_work()
        rows = dict(self.run.engine.gather_rows(self.rows.items()))
        return [row for number in range(len(self.batches)) for row in rows[number]]


def lines_files(run: Run, name: str) -> list[Path]:
    """`<name>.<rank>.jsonl` of the run folder; a file that somebody else put there is none."""
    return sorted(path for path in run.dir.iterdir() if re.fullmatch(rf"{name}\.\d+\.jsonl", path.name))


def remove_lines(run: Run, name: str) -> None:
    """Remove the lines of batches once their rows stand in a finished file. Main process only acts."""
    for path in lines_files(run, name) if run.is_main else ():
        path.unlink()
