"""Run notebooks from top to bottom and store them with what they print and draw, not with progress bars and warnings.

    python notebooks/store.py                                   # all of them, in place; minutes
    python notebooks/store.py notebooks/one_grpo_step.ipynb

The test runs them through `execute` too, with other parameters. Nothing here is needed to work in a notebook.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent


def execute(path: Path, parameters: str = "", checks: str = "", folder: Path = HERE) -> NotebookNode:
    """The notebook, run in `folder`; raises nbclient's CellExecutionError where a cell fails.

    `parameters` is code that runs after the cell tagged so, `checks` code that runs at the end.
    """
    notebook = nbformat.read(path, as_version=4)
    (place,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    more = {place + 1: parameters, len(notebook.cells) + bool(parameters): checks}
    for at, code in more.items():
        if code:
            notebook.cells.insert(at, nbformat.v4.new_code_cell(code))
    options = {"timeout": 600, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **options).execute()
    return notebook


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    for path in map(Path, words or sorted(HERE.glob("*.ipynb"))):
        notebook = execute(path)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
                for output in cell.outputs:
                    if "text" in output:  # less what libraries log
                        output.text = "".join(x for x in output.text.splitlines(True) if "[WARNING]" not in x)
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
