"""How good a data set of instructions is: the review's eight indicators in one report.

    python -m nanovlm.vlit quality FILE --images FOLDER
    python -m nanovlm.vlit quality FILE --annotations instances.json --encoder CLIP_FOLDER
    python -m nanovlm.vlit quality FILE --generator endpoint --base-url URL --model NAME      with a judge

How each is computed stands in the report and in indicators.py. Other forms than LLaVA's come through
`python -m nanovlm.data convert`. The folder holds report.json, report.txt, report.png, and with a judge replies.jsonl,
with which the same command goes on after an interruption.
"""

import dataclasses
from pathlib import Path

from tqdm import tqdm

from nanovlm.vlit import annotation_files, quality_report
from nanovlm.vlit.complexity import LEXICON
from nanovlm.vlit.correctness import facts_of, keys_of, known
from nanovlm.vlit.descriptions import sentences
from nanovlm.vlit.diversity import Options
from nanovlm.vlit.embedding import tfidf_vectors
from nanovlm.vlit.generator_flags import add_generator_flags, open_generator
from nanovlm.vlit.indicators import Helpers, Settings, measure
from nanovlm.vlit.matching import load_encoder
from nanovlm.vlit.replies import Replies
from nanovlm.vlit.simcse import simcse_vectors

EMBEDDINGS = {"tfidf": tfidf_vectors, "simcse": simcse_vectors}


def add_flags(parser):
    """The flags of `quality`."""
    add_measure_flags(parser)
    parser.add_argument("file", metavar="FILE", help="LLaVA-style .json or .jsonl; others through nanovlm.data convert")
    parser.add_argument("--size", type=int, metavar="N", help="samples drawn at random (default: all)")
    parser.add_argument("--out", default="out/quality", metavar="FOLDER")


def add_measure_flags(parser):
    """The flags that `quality` and `compare` share."""
    add = parser.add_argument
    add("--images", metavar="FOLDER", help="where image paths start (default: the folder of FILE)")
    add("--annotations", nargs="+", default=[], metavar="FILE", help="what people noted about the pictures, as for construct: "
        "rules check responses against it")  # fmt: skip
    add(
        "--encoder",
        metavar="FOLDER",
        help="a CLIP folder, or a trained model's with its text tower, for the matching degree",
    )
    add("--embedding", choices=EMBEDDINGS, default="tfidf", help="of responses (default: tfidf)")
    add("--lexicon", metavar="FILE", help="names of things, one a line, instead of the built-in ones")
    add("--task-field", action="store_true", help="take the samples' own `task` where there is one")
    add("--kept", type=int, default=Settings.kept, metavar="N", help="pairs that encoder and judge see, at most")
    for name, unit in (("instructions", "instructions of each task"), ("smallest", "personas of a cluster that counts"),
                       ("responses", "responses of a draw"), ("draws", "draws of responses"), ("min-samples", "of DBSCAN")):  # fmt: skip
        add(f"--{name}", type=int, default=vars(Options())[name.replace("-", "_")], metavar="N", help=unit)
    add("--eps", type=float, default=Options.eps, help="of DBSCAN, 1 - cosine")
    add("--seed", type=int, default=0)
    add_generator_flags(parser)


def settings_of(wishes, size=None):
    """The Settings that the flags ask for. Raises: ValueError for a number out of range."""
    for name in ("kept", "instructions", "smallest", "responses", "draws", "min_samples"):
        if vars(wishes)[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {vars(wishes)[name]}; it must be 1 or more")
    options = Options(**{one.name: vars(wishes)[one.name] for one in dataclasses.fields(Options) if one.name in wishes})
    return Settings(size, wishes.seed, wishes.kept, wishes.n, wishes.temperature, wishes.task_field, options)


def helpers_of(wishes, out):
    """What measuring needs beside the data set: indicators.Helpers.

    out: Path of the folder where the judge's answers are written down.
    """
    collection = annotation_files.read(wishes.annotations) if wishes.annotations else None
    for problem in collection.problems if collection else ():
        tqdm.write(f"annotation not read: {problem}")
    facts = facts_of(collection.pictures.values()) if collection else None
    told = {key: sentences(one) for one in collection.pictures.values() for key in keys_of(one)} if collection else {}
    judge = None if wishes.generator == "template" else open_generator(wishes)
    lexicon = LEXICON
    if wishes.lexicon:
        lexicon = frozenset(
            line.strip().lower() for line in Path(wishes.lexicon).read_text().split("\n") if line.strip()
        )
    out.mkdir(parents=True, exist_ok=True)
    return Helpers(
        facts=facts,
        encoder=load_encoder(wishes.encoder, wishes.recipe) if wishes.encoder else None,
        judge=judge,
        embed=EMBEDDINGS[wishes.embedding],
        lexicon=lexicon,
        describe=lambda sample: known(sample, told) or "",
        replies=judge and Replies(out / "replies.jsonl", repair=True),
    )


def run(wishes):
    """Measure a file: list of str, what to print."""
    path, out = Path(wishes.file), Path(wishes.out)
    settings = settings_of(wishes, wishes.size)
    root = Path(wishes.images) if wishes.images else path.parent
    indicators, found = measure(path, settings, root, helpers_of(wishes, out))
    return quality_report.write(out, path, settings, indicators, found)
