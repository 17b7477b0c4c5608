"""What a run shows and records: the JSON-lines log, the progress bar, and curves.png.

log.jsonl holds one JSON object a line, each with "stage" and "step":
    {"loss", "lr", "gradient_norm", "tokens_per_second", "data_seconds", "seconds"}  one per optimizer step;
        "utilisation", the share of the GPU's peak, where that is known; "spike", the limit, where loss exceeds it
        (diagnostics.py)
    {"skipped": message}                                      an update that was left out (Stage.non_finite)
    {"when": "before" | "after", "measures": {name: number}}  held-out measures of a stage
    {"exam": [line, ...]}                                     answers, when one has changed
    {"parts": {part: {"gradient", "moved"}}}                  see diagnostics.py
    {"held_out": {source: loss}, "answers": [line, ...]}      likewise
where step counts the optimizer steps of the whole run, lr is the largest of all groups, data_seconds those that the
step waited for its records, and seconds those since the run began. To follow a run elsewhere, give a recipe of your own
a function `log` that takes one such entry (README.md); after an interruption some steps are told again.
"""

import contextlib
import os
import signal
import time

from tqdm import tqdm

from nanovlm.files import JsonLines
from nanovlm.training.checkpoint import CheckpointError

PLAIN_LINES = 10  # lines per stage where there is no terminal to draw a bar on


class Log:
    """The file log.jsonl; path None = another process keeps it. follow: function that is told every entry, or None."""

    def __init__(self, path, follow=None):
        self.lines, self.follow = path and JsonLines(path), follow or (lambda entry: None)

    def write(self, **entry):
        """Append one entry. Raises: CheckpointError if the file cannot be written: a full disk, a lost folder."""
        if self.lines is None:
            return
        try:
            self.lines.add(entry)
        except OSError as error:
            found = f"{self.lines.path} cannot be written ({error})"
            raise CheckpointError(f"{found}; make room or give the folder back") from error
        self.follow(entry)

    def size(self):
        """Bytes of the file, forced to the disk: what a checkpoint remembers."""
        return self.lines and self.lines.size()

    def cut(self, size):
        """Forget what was written after a checkpoint. Raises: CheckpointError if the file is shorter than it was."""
        if self.lines is None:
            return
        found = self.lines.size()
        if found < size:
            raise CheckpointError(f"{self.lines.path} has {found} bytes, but {size} when the checkpoint was written; "
                                  "put the file back, or start again in another --out")
        self.lines.cut(size)

    def read(self):
        """All entries: list of dict."""
        return list(self.lines or ())


def say(text):
    """Print a line or several without tearing the progress bar."""
    tqdm.write(text)


def readable(text, longest=40):
    """A model's words in one line of printable characters, at most so many. Untrained models say anything."""
    text = " ".join(text.split())
    text = "".join(character if character.isprintable() and character != "\ufffd" else "·" for character in text)
    return (text if len(text) <= longest else text[: longest - 1] + "…") or "(nothing)"


class Bar:
    """Progress of one stage: a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, stage, done, shown=True):
        self.stage = stage
        self.bar = tqdm(desc=stage.name, total=stage.steps, initial=done, disable=None if shown else True, unit="step",
                        mininterval=0.5)
        self.done, self.began = done, time.monotonic()

    def update(self, step, loss, lr, tokens_per_second, waited, utilisation=None):
        """Show that `step` steps are done; loss None = left out. waited, utilisation: shares of time and peak."""
        numbers = "update left out"
        if loss is not None:
            numbers = f"loss {loss:.4f}, lr {lr:.2g}, {tokens_per_second:,.0f} tokens/s"
        if utilisation is not None:
            numbers += f", {utilisation:.0%} of peak"
        numbers += f", {waited:.0%} waiting for data"
        self.bar.set_postfix_str(numbers, refresh=False)
        self.bar.update()
        name, steps = self.stage.name, self.stage.steps
        if self.bar.disable and (step % max(1, steps // PLAIN_LINES) == 0 or step == steps):
            left = (steps - step) * (time.monotonic() - self.began) / max(1, step - self.done)
            print(f"{name} {step}/{steps}: {numbers}, {tqdm.format_interval(left)} left", flush=True)

    def close(self):
        """Leave the finished bar standing."""
        self.bar.close()


def measures_table(measures):
    """Held-out measures {stage: {"before" | "after": {name: number}}}: list of str, a line per stage and measure."""
    lines = [f"{'stage':<12}{'measure':<26}{'before':>9}{'after':>9}"]
    for stage, moments in measures.items():
        for name, before in moments["before"].items():
            lines.append(f"{stage:<12}{name:<26}{before:>9.1%}{moments['after'][name]:>9.1%}")
    return lines if len(lines) > 1 else []


def plot_curves(entries, path, seed):
    """Draw the losses, and the measures before and after each stage, of the log's entries into a PNG."""
    from matplotlib.figure import Figure  # takes a second to import, which only the end of a run should pay

    lines = {}  # (key of the log, name) -> [(step, number)]
    for entry in entries:
        found = {"loss": {entry["stage"]: entry["loss"]}} if "loss" in entry else entry
        for key in ("loss", "held_out", "measures"):
            for name, number in found.get(key, {}).items():
                lines.setdefault((key, name), []).append((entry["step"], number))
    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    for (key, name), points in lines.items():
        axes, style = {"loss": (top, "-"), "held_out": (top, ".--"), "measures": (bottom, "o-")}[key]
        axes.plot(*zip(*points), style, label=f"held out: {name}" if key == "held_out" else name, linewidth=0.8)
    top.set(yscale="log", ylabel="loss (nats)", title=f"seed {seed}")
    bottom.set(ylabel="held-out accuracy (share)", xlabel="optimizer step of the whole run", ylim=(-0.02, 1.02))
    for axes in (top, bottom):
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=100)


# Ctrl-C and SIGTERM as requests: finish the step, write a checkpoint, leave. Asking twice leaves at once.


class Stopped(Exception):
    """The run ended before its last step, with everything saved. exit_code: int, of the process. reason: str."""

    def __init__(self, exit_code, reason):
        super().__init__(exit_code, reason)  # both, so that it can be sent to another process
        self.exit_code, self.reason = exit_code, reason

    def __str__(self):
        return self.reason


class StopRequests:
    """Context in which SIGINT and SIGTERM only set `requested`, the Stopped to raise at the next safe moment."""

    def __init__(self):
        self.requested, self.safe, self.previous = None, False, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = Stopped(128 + number, f"{signal.Signals(number).name} received")
        if self.safe:
            raise self.requested

    @contextlib.contextmanager
    def anywhere(self):
        """Within, nothing trains and nothing is unsaved: a request takes effect immediately."""
        if self.requested is not None:
            raise self.requested
        self.safe = True
        try:
            yield
        finally:
            self.safe = False
