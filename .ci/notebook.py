"""Makes examples/tour.ipynb, with its outputs and pictures, from examples/tour.md."""

from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

SOURCE = Path(__file__).parents[1] / "examples" / "tour.md"

notebook = jupytext.read(SOURCE)
NotebookClient(notebook, record_timing=False, coalesce_streams=True).execute()
# Nothing in the file tells when or where it was made.
notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
for number, cell in enumerate(notebook.cells, start=1):
    cell.id, cell.metadata = f"cell-{number}", {}
nbformat.write(notebook, SOURCE.with_suffix(".ipynb"))
