"""Run lessons and keep what they show: python notebooks/support/build.py [01 …] writes NN_name.ipynb beside NN_name.py.

Without a number all lessons run. A lesson runs in its own process, on one core, in this folder.
"""

import base64
import io
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent  # the lessons
CELL_SECONDS = 3600  # a cell that takes longer hangs, even on a busy machine


def lessons(numbers=()):
    """Sources of the lessons with these numbers ("01"), in order; all of them without any.

    Raises: ValueError for a number that no lesson has.
    """
    found = {path.name[:2]: path for path in sorted(FOLDER.glob("[0-9][0-9]_*.py"))}
    for number in numbers:
        if number not in found:
            raise ValueError(f"there is no lesson {number!r}; lessons: {', '.join(found)}")
    return [found[number] for number in numbers or found]


def execute(source, environment=None):
    """Run one lesson from its source.

    Args:
      source: path of the .py file. environment: dict of environment variables for its process, None = this one's.
    Returns: (notebook with outputs, CPU-seconds that its process took).
    Raises: nbclient.exceptions.CellExecutionError if a cell fails.
    """
    notebook = jupytext.read(source)
    for place, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{place}"  # the random ones would differ after every run
    environment = {**(environment or os.environ), "OMP_NUM_THREADS": "1"}
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )  # fmt: skip
    before = os.times()
    client.execute(env=environment)
    after = os.times()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook, after.children_user + after.children_system - before.children_user - before.children_system


def shrink_pictures(notebook):
    """Store every picture with at most 128 colours: a third of the size, and no difference to the eye."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            picture = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))).convert("RGB")
            small = io.BytesIO()
            picture.quantize(128, dither=Image.Dither.NONE).save(small, "png", optimize=True)
            output["data"]["image/png"] = base64.b64encode(small.getvalue()).decode() + "\n"


def main(numbers):
    """Run lessons and write their notebooks; an interrupted or failed run leaves the old one."""
    for source in lessons(numbers):
        start = time.monotonic()
        notebook, cpu_seconds = execute(source)
        notebook.metadata["cpu_seconds"] = round(cpu_seconds, 1)
        shrink_pictures(notebook)
        text = nbformat.writes(notebook)
        partial = source.with_suffix(".tmp")
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, source.with_suffix(".ipynb"))
        size = len(text.encode()) / 1000
        print(f"{source.stem}: {cpu_seconds:.0f} CPU-s, {time.monotonic() - start:.0f} s, {size:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
