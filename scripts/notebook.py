"""Run docs/batch_norm_in_gans.ipynb from top to bottom and keep what it prints and draws, and nothing of this machine.

pip install -e '.[notebook]' && python scripts/notebook.py
"""

from pathlib import Path

import nbformat  # pyright: ignore[reportMissingImports]  # an extra
from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]

NOTEBOOK = Path(__file__).parents[1] / "docs" / "batch_norm_in_gans.ipynb"
SHOWN = ("image/png", "text/plain")  # of an output's forms, the first that it has


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata = {}  # when each was run
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "data" in output:
                    shown = next(form for form in SHOWN if form in output.data)
                    output.data, output.metadata = {shown: output.data[shown]}, {}
    notebook.metadata.language_info = {"name": "python"}  # not which version
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
