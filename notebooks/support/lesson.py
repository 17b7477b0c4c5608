"""What every lesson shares: one core, one look, and code shown from where it lives."""

import inspect
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds nanovlm/

TEXT_COLOR, VISION_COLOR, GREY = "#3f6fb0", "#e07b39", "#9a9a9a"

torch.set_num_threads(1)
plt.rcParams.update({
    "figure.dpi": 70,  # small files; nothing here needs more
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.interpolation": "nearest",
})  # fmt: skip


def show_source(thing):
    """Show the code of a function, method or class, and the file that owns it."""
    path = Path(inspect.getsourcefile(inspect.unwrap(thing))).resolve().relative_to(ROOT).as_posix()
    code = textwrap.dedent(inspect.getsource(thing)).rstrip()
    display(Markdown(f"`{path}`\n```python\n{code}\n```"))


def show_pictures(pictures, titles, columns, size=1.6):
    """Draw pictures side by side, each under its title.

    Args:
      pictures: list of what imshow takes. titles: list of str. columns: pictures in one line.
      size: inches of one picture.
    """
    lines = -(-len(pictures) // columns)
    rows_of_title = 1 + max(title.count("\n") for title in titles)
    height = (size + 0.2 * rows_of_title) * lines  # inches
    figure, axes = plt.subplots(lines, columns, figsize=(size * columns, height), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, title in zip(axes.flat, pictures, titles):
        axis.imshow(picture)
        axis.set_title(title)
    plt.show()


def grouped_bars(axis, labels, series):
    """Bars side by side in groups, their values on top.

    Args:
      labels: list of str, one per group. series: {name: (color, list of values in %)}, one value per group.
    """
    width = 0.76 / len(series)
    for number, (name, (color, values)) in enumerate(series.items()):
        places = [group + width * (number - (len(series) - 1) / 2) for group in range(len(labels))]
        axis.bar_label(axis.bar(places, values, width - 0.02, color=color, label=name), fmt="%.0f")
    axis.set_xticks(range(len(labels)), labels)
    axis.set_yticks(range(0, 101, 25))
    axis.set_ylim(0, 128)  # room for the legend
    axis.legend(ncols=3, loc="upper center", frameon=False, fontsize=10)
