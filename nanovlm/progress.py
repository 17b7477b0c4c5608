"""What a run shows and records: the JSON-lines log, the progress bar, and curves.png.

log.jsonl holds one JSON object a line:
    {"stage", "step", "loss", "lr", "gradient_norm", "tokens_per_second", "data_seconds", "seconds"}  one per optimizer step
    {"stage", "step", "when": "before" | "after", "measures": {name: number}}         held-out measures of a stage
    {"stage", "step", "exam": [line, ...]}                                            answers, when one has changed
where step counts the optimizer steps of the whole run, lr is the largest of all groups, data_seconds those that
the step waited for its records, and seconds those since the run began. To follow a run elsewhere, give `Log` your own `write`.
"""

import json
import os

from tqdm import tqdm

from nanovlm.checkpoint import CheckpointError

PLAIN_LINES = 10  # lines per stage where there is no terminal to draw a bar on


class Log:
    """The file log.jsonl, appended to line by line."""

    def __init__(self, path):
        self.path = path

    def write(self, **entry):
        """Append one entry. It is in the file when this returns, though perhaps not on the disk; see `size`."""
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def size(self):
        """Bytes of the file, forced to the disk: what a checkpoint remembers."""
        with open(self.path, "a") as file:
            os.fsync(file.fileno())
            return file.tell()

    def cut(self, size):
        """Forget what was written after a checkpoint.

        Raises: CheckpointError if the file holds less than the checkpoint remembers.
        """
        found = self.size()
        if found < size:
            raise CheckpointError(f"{self.path} has {found} bytes, but {size} when the checkpoint was written; "
                                  "put the file back, or start again in another --out")
        os.truncate(self.path, size)

    def read(self):
        """All entries: list of dict."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]


class NoLog:
    """The log of a process that keeps none, as the main process does that."""

    def write(self, **entry):
        """Nothing."""

    def size(self):
        """Nothing."""

    def cut(self, size):
        """Nothing."""


def say(text):
    """Print a line or several without tearing the progress bar."""
    tqdm.write(text)


class Bar:
    """Progress of one stage: a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, stage, done, shown=True):
        self.stage = stage
        self.bar = tqdm(desc=stage.name, total=stage.steps, initial=done, disable=None if shown else True, unit="step",
                        mininterval=0.5)

    def update(self, step, loss, tokens_per_second):
        """Show that `step` steps of the stage are done; loss in nats."""
        numbers = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s"
        self.bar.set_postfix_str(numbers, refresh=False)
        self.bar.update()
        every = max(1, self.stage.steps // PLAIN_LINES)
        if self.bar.disable and (step % every == 0 or step == self.stage.steps):
            print(f"{self.stage.name} {step}/{self.stage.steps}: {numbers}", flush=True)

    def close(self):
        """Leave the finished bar standing."""
        self.bar.close()


def measures_table(measures):
    """Held-out measures before and after each stage.

    Args:
      measures: dict stage name -> {"before": {name: number}, "after": {name: number}}.
    Returns: list of str, lines: a row per stage and measure.
    """
    lines = [f"{'stage':<12}{'measure':<26}{'before':>9}{'after':>9}"]
    for stage, moments in measures.items():
        for name, before in moments["before"].items():
            lines.append(f"{stage:<12}{name:<26}{before:>9.1%}{moments['after'][name]:>9.1%}")
    return lines


def plot_curves(entries, path, seed):
    """Draw curves.png: the loss of every step, and the measures before and after each stage.

    Args:
      entries: list of dict, `Log.read()`.
      path: where the PNG goes.
      seed: int, of the run; stands in the title.
    """
    from matplotlib.figure import Figure  # takes a second to import, which only the end of a run should pay

    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    steps = [entry for entry in entries if "loss" in entry]
    for stage in dict.fromkeys(entry["stage"] for entry in steps):
        mine = [entry for entry in steps if entry["stage"] == stage]
        top.plot([entry["step"] for entry in mine], [entry["loss"] for entry in mine], label=stage, linewidth=0.8)
    points = [entry for entry in entries if "measures" in entry]
    for name in dict.fromkeys(name for entry in points for name in entry["measures"]):
        mine = [entry for entry in points if name in entry["measures"]]
        bottom.plot([entry["step"] for entry in mine], [entry["measures"][name] for entry in mine], "o-", label=name)
    top.set(yscale="log", ylabel="training loss (nats)", title=f"seed {seed}")
    bottom.set(ylabel="held-out accuracy (share)", xlabel="optimizer step of the whole run", ylim=(-0.02, 1.02))
    for axes in (top, bottom):
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=100)
