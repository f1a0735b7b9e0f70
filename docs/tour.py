"""Runs examples/tour.ipynb and keeps what its cells show; needs nbclient, ipykernel and matplotlib."""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"
SHOWN = ("text/plain", "text/html", "image/png")


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type != "code":
            continue
        # What goes to standard error is progress, with the seconds of this machine.
        cell.outputs = [own for own in cell.outputs if own.get("name") != "stderr"]
        for output in cell.outputs:
            output.get("metadata", {}).clear()
            if "data" in output:
                output.data = {kind: value for kind, value in output.data.items() if kind in SHOWN}
                if "image/png" in output.data:
                    output.data.pop("text/plain", None)
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec",)} | {"language_info": {"name": "python"}}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
