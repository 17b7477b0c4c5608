"""Does the quality of instruction data matter, and do the indicators of the VLIT review see it?

A small model learns from captions once. Then it is tuned on equally many instructions about drawn scenes, with equally
many steps, but the instructions have controlled defects: wrong answers, one task that crowds out the others, few
samples repeated, or all of these; and what `filter` leaves of a larger pool that has them all. Every set is written to
disk with its pictures and annotations and goes through the same commands as real data.

    python notebooks/ablations/ablation_vlit.py        writes notebooks/ablations/ablation_vlit.csv and notebooks/ablations/ablation_vlit.png
"""

import functools
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

from ablations import ablation_04, ablation_table
from ablations.agreement import pearson
import numpy
from ablations.ablation_04 import (
    IMAGE_SIZE, KINDS, ONE_OBJECT, Arm, blind, examine, exam_records, make_model, make_tokenizer, records, rows, train,
)  # fmt: skip

from nanovlm.data.datasets import LlavaJson
from nanovlm.data.scene_questions import Scenes
from nanovlm.training.stages import Stage
from nanovlm.vlit import annotations, filtering
from nanovlm.vlit.__main__ import Parser
from nanovlm.vlit.correctness import facts_of
from nanovlm.vlit.indicators import Helpers, measure
from nanovlm.vlit.indicators import Settings as MeasureSettings
from nanovlm.vlit.matching import own_encoder

CSV_PATH, PNG_PATH = Path(__file__).with_suffix(".csv"), Path(__file__).with_suffix(".png")
MODEL = Arm("MLP", 4, tower=True, frozen=True)  # of lesson 04: four image tokens, the ViT as captions have made it
CROWDED = "color"  # the task that crowds out the others
INDICATORS = ("MD", "C", "T", "I", "R", "vendi", "O/G", "IC", "B")


@dataclass(frozen=True)
class Defects:
    """How a set of instructions is spoiled.

    wrong: share of answers replaced by another answer to the same kind of question. crowded: share of CROWDED, the
    other kinds share the rest; None = all equally often. repeated: how often every sample stands in the set. filtered:
    what `filter` leaves of a pool with these defects.
    """

    name: str
    wrong: float = 0.0
    crowded: float | None = None
    repeated: int = 1
    filtered: bool = False


SETS = (
    Defects("clean"),
    Defects("25% wrong", wrong=0.25),
    Defects("50% wrong", wrong=0.5),
    Defects("unbalanced", crowded=0.85),
    Defects("repeated", repeated=10),
    Defects("all defects", wrong=0.4, crowded=0.7, repeated=2),
    Defects("all defects, filtered", wrong=0.4, crowded=0.7, repeated=2, filtered=True),
)


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths."""

    tower_steps: int = 100  # optimizer steps of the towers
    caption_steps: int = 120  # optimizer steps of the model on captions
    samples: int = 800  # instructions of a set
    pool: int = 7200  # instructions that `filter` chooses from
    steps: int = 200  # optimizer steps on a set
    batch: int = 20  # instructions of a step
    exam: int = 300  # pictures of the exam


@dataclass(frozen=True)
class Result:
    """One row of the table. Shares right and their mean between 0 and 1; indicators as indicators.Indicator."""

    name: str
    seed: int
    samples: int
    color: float
    shape: float
    place: float
    size: float
    accuracy: float  # mean over the four kinds
    MD: float
    C: float
    coverage: float
    T: float
    I: float
    R: float
    vendi: float
    OG: float
    IC: float
    B: float


@functools.lru_cache(maxsize=1)
def start(settings):
    """What every run starts from: (the model after captions, the towers). Trained once, from seed 0."""
    towers = ablation_04.learn_towers(0, ablation_04.Settings(tower_steps=settings.tower_steps))
    model, source = make_model(MODEL, towers.vision, 0), ablation_04.captions(0)
    size = settings.batch
    tune(model, lambda step: records(source, step * size, size), settings.caption_steps, settings, 4e-3)
    return model, towers


def tune(model, batch_of, steps, settings, rate):
    """Train bridge and decoder for some steps. batch_of: step -> list of Record."""
    parts = {part: parameters for part, parameters in model.parts().items() if parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("vision."))
    rates = dict.fromkeys((part for part in parts if part != "vision"), rate)
    warmup = min(10, steps - 1)
    stage = Stage("tune", "language", rates, {"set": 1.0}, steps, settings.batch, optimizer="muon", warmup_steps=warmup)
    train(parts, stage, lambda step: ablation_table.mean_loss(model, rows(batch_of(step), model)))


def write_set(folder, defects, number, seed):
    """Write instructions about scenes, their pictures and annotations: samples.jsonl, annotations.jsonl, N.png.

    Args:
      folder: Path. defects: Defects. number: of instructions, repetitions included. seed: int.
    """
    rng, different = numpy.random.default_rng((seed, 5)), number // defects.repeated
    shares = [1 / len(KINDS) if defects.crowded is None else defects.crowded if kind == CROWDED
              else (1 - defects.crowded) / (len(KINDS) - 1) for kind in KINDS]  # fmt: skip
    sources = {
        kind: Scenes("train", seed=seed + 200, questions_per_picture=1, weights={kind: 1.0}, **ONE_OBJECT)
        for kind in KINDS
    }
    kinds = [KINDS[place] for place in rng.choice(len(KINDS), size=different, p=shares)]
    drawn = [(kind, sources[kind].scene(n), sources[kind].record(n)) for n, kind in enumerate(kinds)]
    answers = {kind: [record.conversations[0][1].text for its, _, record in drawn if its == kind] for kind in KINDS}
    items, notes = [], []
    for n, (kind, scene, record) in enumerate(drawn):
        question, answer = (turn.text for turn in record.conversations[0])
        others = [other for other in answers[kind] if other != answer]
        if rng.random() < defects.wrong and others:
            answer = others[rng.integers(len(others))]
        record.visuals[0].frames[0].save(folder / f"{n}.png")
        said = [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": answer}]
        items.append({"id": str(n), "image": f"{n}.png", "conversations": said, "task": kind})
        things = [_instance(thing, scene) for thing in scene.objects]
        notes.append({"id": str(n), "image": f"{n}.png", "captions": [], "instances": things})
    repeated = [item | {"id": f"{item['id']}/{turn}"} for turn in range(defects.repeated) for item in items]
    for name, values in (("samples", repeated), ("annotations", notes)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))


def _instance(thing, scene):
    sides = (thing.x - thing.radius, thing.y - thing.radius, thing.x + thing.radius, thing.y + thing.radius)
    box = [min(1.0, max(0.0, side / scene.canvas)) for side in sides]
    return {"category": f"{thing.size} {thing.color} {thing.shape}", "bbox": box}


def filter_set(folder, number):
    """Let `filter` choose from the pool in a folder: the samples that are kept, `number` at most, replace it."""
    parser = Parser(allow_abbrev=False)
    filtering.add_flags(parser)
    args = parser.parse([
        str(folder / "samples.jsonl"), "--annotations", str(folder / "annotations.jsonl"), "--task-field",
        "--per-task", str(number // len(KINDS)), "--out", str(folder / "filtered"), "--without-report",
    ])  # fmt: skip
    told = filtering.run(args)
    os.replace(folder / "filtered" / "kept.jsonl", folder / "samples.jsonl")
    return told


def indicators(folder, towers, seed):
    """{name of INDICATORS or "coverage": number} of the set in a folder."""
    facts = facts_of(annotations.read([folder / "annotations.jsonl"]).pictures.values())
    encoder = own_encoder(towers.eval(), make_tokenizer(), IMAGE_SIZE)
    settings = MeasureSettings(seed=seed, task_field=True)
    found, _ = measure(folder / "samples.jsonl", settings, folder, Helpers(facts=facts, encoder=encoder))
    told = {one.key: one for one in found}
    return {key: one.value for key, one in told.items()} | {
        "vendi": told["R"].beside["vendi"], "coverage": told["C"].beside["coverage"],
    }  # fmt: skip


def run_set(defects, seed, settings):
    """Result of one set and seed."""
    model, towers = start(settings)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_set(folder, defects, settings.pool if defects.filtered else settings.samples, seed)
        if defects.filtered:
            print("\n".join(filter_set(folder, settings.samples)), flush=True)
        told = indicators(folder, towers, seed)
        source = LlavaJson(folder / "samples.jsonl", folder, seed=seed)
        tuned = make_model(MODEL, towers.vision, seed)
        tuned.load_state_dict(model.state_dict())
        tune(tuned, lambda step: records(source, step * settings.batch, settings.batch), settings.steps, settings, 2e-3)
    shares = examine(tuned, exam_records(settings.exam))
    return Result(
        defects.name, seed, len(source), **shares, accuracy=sum(shares.values()) / len(shares),
        OG=told["O/G"], **{name: told[name] for name in ("MD", "C", "coverage", "T", "I", "R", "vendi", "IC", "B")},
    )  # fmt: skip


def run(seeds, settings, sets=SETS):
    """Results of every set and seed."""
    for seed in seeds:
        for defects in sets:
            yield run_set(defects, seed, settings)


def correlations(results):
    """{indicator: (r, p)} with accuracy over the sets' means, None where the indicator is the same for all."""
    names = list(dict.fromkeys(one.name for one in results))

    def means(field):
        return [numpy.mean([vars(one)[field] for one in results if one.name == name]) for name in names]

    accuracy, found = means("accuracy"), {}
    for name in INDICATORS:
        values = means(name.replace("/", ""))
        constant = min(numpy.ptp(values), numpy.ptp(accuracy)) < 1e-9
        found[name] = None if constant else pearson(values, accuracy)
    return found


def plot(results, path, note):
    """Accuracy of every set, and every indicator against accuracy."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one.name for one in results))
    figure = Figure(figsize=(13, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2.2))
    axes = left.subplots()
    for place, name in enumerate(names):
        shares = [100 * one.accuracy for one in results if one.name == name]
        axes.barh(place, numpy.mean(shares), color=f"C{place}", alpha=0.6)
        axes.plot(shares, [place] * len(shares), "k.", markersize=6)
    unseen = blind(ablation_04.Settings())
    axes.axvline(100 * sum(unseen.values()) / len(unseen), color="k", linestyle=":", label="without looking")
    axes.legend(fontsize=8, loc="lower left")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("right answers about new scenes (%), mean of four kinds; dots: seeds")
    for one, (indicator, fit) in zip(right.subplots(3, 3).flatten(), correlations(results).items()):
        for place, name in enumerate(names):
            points = [(vars(r)[indicator.replace("/", "")], 100 * r.accuracy) for r in results if r.name == name]
            one.plot(*zip(*points), "o", color=f"C{place}", markersize=4)
        words = "the same for all" if fit is None else f"r {fit[0]:.2f}, p {fit[1]:.2f}"
        one.set_title(f"{indicator}: {words}", fontsize=9)
        one.tick_params(labelsize=8)
    right.supxlabel("indicator", fontsize=9)
    right.supylabel("right answers (%)", fontsize=9)
    figure.suptitle(note, fontsize=8)
    figure.savefig(path, dpi=110)


def read(path=CSV_PATH):
    """(note, list of Result) of a written table."""
    return ablation_table.read(path, Result)


if __name__ == "__main__":
    ablation_table.collect(run((0, 1, 2), Settings()), CSV_PATH)
    note, results = read()
    plot(results, PNG_PATH, note)
