"""Lesson 12's runs: the project's commands, run in this process and in a folder of their own."""

import contextlib
import io
import json
import os
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

import train
from nanovlm.data import __main__ as data
from nanovlm.recipes import load
from nanovlm.training.stages import Stage
from support import lesson, recipe_12

PROGRAMS = {"python train.py": train.main, "python -m nanovlm.data": data.main}
SEVENTH = " ".join(["--data data/with_descriptions.json", *(f"--set {setting}" for setting in recipe_12.SEVENTH)])


def enter_folder():
    """Go to a new folder with the recipe, colors.py, and data/; what is returned removes it when the lesson ends."""
    folder = tempfile.TemporaryDirectory()
    os.chdir(folder.name)
    shutil.copy(recipe_12.__file__, "colors.py")
    Path("data").mkdir()
    recipe_12.write_data(Path("data"))
    return folder


def command(line):
    """Run a command line: (str that it printed, exit code)."""
    program = next(name for name in PROGRAMS if line.startswith(name))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = PROGRAMS[program](shlex.split(line)[len(program.split()) :])
        except SystemExit as error:
            code = error.code
    return said.getvalue().strip(), code or 0


def show(line):
    """Run a command line and show it with what it prints."""
    print(f"$ {line}\n{command(line)[0]}")


@dataclass(frozen=True)
class Run:
    """A finished run of train.py. out: Path of its folder. said: str, what it printed."""

    out: Path
    said: str

    def log(self, key):
        """The values of a key in log.jsonl, in order: list."""
        entries = map(json.loads, (self.out / "log.jsonl").read_text().splitlines())
        return [entry[key] for entry in entries if key in entry]

    def stage(self):
        """Its stage, as config.json keeps it: Stage."""
        values = json.loads((self.out / "config.json").read_text())["stages"]["answers"]
        return Stage(**values | {"betas": tuple(values["betas"])})

    def assistant(self):
        """Its model, to be asked: generation.chat.Assistant."""
        return load(self.out, recipe="colors.py")

    def parts(self):
        """Print the first table of parts, of the beginning, and the last, of the end: without the parts that it lacks."""
        for line in self.said.splitlines():
            words = line.split()
            if words[:1] == ["part"] or words[:1] and words[0] in (*recipe_12.EVERYTHING, "all"):
                print(line)


def start(name, flags):
    """Train the recipe in this folder with more flags: Run, in out/name. Raises: RuntimeError with what train.py said."""
    out = Path("out") / name
    said, code = command(f"python train.py colors.py {flags} --out {out} --threads 1 --device cpu")
    if code:
        raise RuntimeError(said)
    return Run(out, said)


def curves(runs, levels=()):
    """Draw the loss of runs over their steps. runs: {name: Run}, a healthy one first. levels: {words: nats}."""
    figure, axis = plt.subplots(figsize=(7.4, 3.2), layout="constrained")
    colors = (lesson.GREY, lesson.VISION_COLOR, lesson.TEXT_COLOR)
    for (name, run), color in zip(runs.items(), colors):
        losses = run.log("loss")
        axis.plot(range(1, len(losses) + 1), losses, color=color, label=name)
    for words, level in dict(levels).items():
        axis.axhline(level, color="black", linestyle=":", linewidth=1)
        axis.annotate(words, (1, level), xytext=(0, 3), textcoords="offset points", fontsize=8)
    axis.set(xlabel="step (32 questions each)", ylabel="loss (nats per trained token)", yscale="log", title="seed 0")
    axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    plt.show()
