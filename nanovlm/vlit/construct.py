"""Make instruction data from annotations: adapted ones, and conversations that a generator writes.

    python -m nanovlm.vlit construct --annotations captions.json instances.json --images val2014
    python -m nanovlm.vlit construct … --generator local --model out/smollm2
    python -m nanovlm.vlit construct … --generator endpoint --base-url http://localhost:8000/v1 --model NAME
    python -m nanovlm.vlit construct … --generator replay --replies other/replies.jsonl

The output folder holds samples.jsonl (LLaVA's form, for train.py --data), replies.jsonl (every answer as it came, with
which the same command goes on after an interruption), marked/ (pictures with boxes), failures.jsonl and report.json.
"""

import json
import os
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from nanovlm.vlit import adaption, annotation_files, planning
from nanovlm.vlit.asking import Request, ask
from nanovlm.vlit.descriptions import FORMS
from nanovlm.vlit.generator_flags import add_generator_flags, drawing, open_generator
from nanovlm.vlit.generators import Drawing, GeneratorError
from nanovlm.vlit.linting import defects, remarks
from nanovlm.vlit.parsing import Unparsed, parse
from nanovlm.vlit.replies import Replies, key_of
from nanovlm.vlit.samples import IMAGE, Sample, write_line
from nanovlm.vlit.self_instruct import PLANS, find_plan

METHODS = ("both", "adapt", "self-instruct")
UNUSABLE = ("turns", "placeholders")  # defects with which a sample cannot be trained on; others become flags
SHOWN = 10  # problems printed one by one; all are in failures.jsonl


def words(text):
    """Words with commas between them, as a list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text):
    """Whole numbers with commas between them, as a tuple."""
    return tuple(int(word) for word in words(text))


def add_flags(parser):
    """The flags of `construct`."""
    add = parser.add_argument
    add("--annotations", nargs="+", required=True, metavar="FILE", help="COCO captions and instances, VQA questions and "
        "annotations, COCO-Text, COCO Attributes as JSON, LLaVA's captions and boxes; known by their contents")  # fmt: skip
    add(
        "--images",
        metavar="FOLDER",
        help="where the pictures lie; without it nothing is drawn, and nothing is looked for",
    )
    add("--out", default="out/vlit", metavar="FOLDER")
    add("--method", choices=METHODS, default="both", help="annotation adaption, self-instruct, or both")
    add("--plans", type=words, default=list(PLANS), metavar="NAME,…", help=f"of {', '.join(PLANS)} (default: all)")
    add(
        "--lines",
        type=numbers,
        metavar="1,3,…",
        help="which of the nine requirements the prompt states, for every plan",
    )
    add("--description", choices=FORMS, default="sentences", help="how annotations become text (default: sentences)")
    add("--regions", type=int, default=1, metavar="N", help="marked regions of each picture at most")
    add(
        "--answers",
        choices=("short", "sentences"),
        default="short",
        help="short answers ask for one, or are written out",
    )
    add("--more-instructions", action="store_true", help="lengthen the instruction pools through the meta prompt")
    add("--limit", type=int, metavar="N", help="pictures at most")
    add("--seed", type=int, default=0)
    add_generator_flags(parser)


def run(wishes):
    """Run `construct`: list of str, what to print."""
    plans, drawn, generator = [find_plan(name) for name in wishes.plans], drawing(wishes), open_generator(wishes)
    if wishes.images is not None and not Path(wishes.images).is_dir():
        raise FileNotFoundError(f"{wishes.images}: no such folder of pictures")
    if wishes.generator == "template" and (wishes.answers == "sentences" or wishes.more_instructions):
        raise ValueError(
            "--answers sentences and --more-instructions need a language model; choose another --generator"
        )
    collection = annotation_files.read(wishes.annotations)
    pictures, failed = planning.find_pictures(collection, wishes.images, wishes.limit)
    if not pictures:
        raise ValueError(nothing_found(wishes, collection, failed))
    out = Path(wishes.out)
    out.mkdir(parents=True, exist_ok=True)
    work = Work(wishes, generator, drawn, Replies(out / "replies.jsonl", repair=True))
    work.fail("unreadable record", *collection.problems)
    for kind, said in failed:
        work.fail(kind, said)
    with open(out / "samples.jsonl.unfinished", "w", encoding="utf-8") as file:
        try:
            if wishes.method != "self-instruct":
                work.adapt(pictures, file)
            if wishes.method != "adapt":
                work.converse(pictures, plans, file)
        except GeneratorError as error:
            told = f"{len(work.replies)} answers are in {work.replies.path}, the same command goes on behind them"
            raise GeneratorError(f"{error}; {told}") from error
        file.flush()
        os.fsync(file.fileno())
    os.replace(out / "samples.jsonl.unfinished", out / "samples.jsonl")
    return work.report(out, pictures, collection.skipped)


def nothing_found(wishes, collection, failed):
    """Why there is nothing to work on: str."""
    if failed:
        return f"none of {len(failed)} pictures in {wishes.images} can be used; the first: {failed[0][1]}"
    first = (
        f"; the first of {len(collection.problems)} problems: {collection.problems[0]}" if collection.problems else ""
    )
    return f"no picture has an annotation in {', '.join(wishes.annotations)}{first}"


class Work:
    """One run: asks, parses, checks, writes and counts.

    Attributes: failures: (kind, words) in order, keys of a dict, since some are met twice. samples: Counter by (type,
    plan). notes: Counter of what the parser, the linter and the generator had to say.
    """

    def __init__(self, wishes, generator, drawn, replies):
        self.wishes, self.generator, self.drawn, self.replies = wishes, generator, drawn, replies
        self.failures, self.samples, self.notes = {}, Counter(), Counter()

    def ask(self, requests, drawn, total=None):
        """Have requests answered; what is refused becomes a failure. requests: function that gives them anew."""
        counts, refused = ask(requests(), self.generator, drawn, self.replies, total)
        self.notes.update({f"requests {name}": number for name, number in counts.items()})
        self.fail("refused", *(f"{id}: {why}" for id, why in refused))

    def answer(self, request, drawn):
        """The recorded texts of a request: list of str, empty if it was refused."""
        key = key_of(request.chat, self.generator, drawn)
        return self.replies[key] if key in self.replies else []

    def adapt(self, pictures, file):
        """Annotation adaption of every picture."""
        once = Drawing(1, self.wishes.temperature, self.wishes.max_tokens, self.wishes.seed)
        pools = self.pools(once)

        def sentences():
            for id, (kind, slot, response, _), _ in self.adaptions(pictures):
                if kind in adaption.SHORT_KINDS:
                    asked = slot if kind == "vqa" else adaption.POOLS[kind][0].replace("[OBJECT]", slot)
                    yield Request(id, adaption.write_out_chat(asked, response))

        written = {}
        if self.wishes.answers == "sentences":
            self.ask(sentences, once)
            written = {one.id: text.strip() for one in sentences() for text in self.answer(one, once) if text.strip()}
        for id, told, image in tqdm(self.adaptions(pictures), desc="adapting", unit="sample", disable=None):
            self.write(adaption.adapt(*told, id, image, pools, self.wishes.seed, written.get(id)), file)

    def pools(self, drawn):
        """The instructions of each kind: dict kind -> list of str."""
        if not self.wishes.more_instructions:
            return adaption.POOLS
        requests = [Request(f"instructions/{kind}", adaption.meta_chat(kind), kind) for kind in adaption.POOLS]
        self.ask(lambda: requests, drawn, len(requests))
        pools = {kind: list(seeds) for kind, seeds in adaption.POOLS.items()}
        for one in requests:
            for text in self.answer(one, drawn):
                pools[one.what] += adaption.more_instructions(one.what, text)
        self.notes["instructions added"] = sum(len(pools[kind]) - len(seeds) for kind, seeds in adaption.POOLS.items())
        return pools

    def adaptions(self, pictures):
        """(sample id, adaption.responses' tuple, image) of everything that can be adapted."""
        for picture, path in pictures:
            whole = planning.shown(picture, path, self.wishes.out)
            for place, told in enumerate(adaption.responses(picture)):
                yield f"{picture.id}/AA/{told[0]}/{place}", told, whole.image
            for region in self.regions(picture, path):
                yield (
                    f"{picture.id}/AA/region/{region.region.id}",
                    adaption.region_response(picture, region.region),
                    region.image,
                )

    def regions(self, picture, path):
        """The marked pictures of a picture: list of planning.Shown; a picture that cannot be read is a failure."""
        chosen = planning.regions(picture, self.wishes.regions, self.wishes.seed)
        try:
            return [planning.marked(picture, path, region, self.wishes.out) for region in chosen]
        except (ValueError, OSError) as error:
            self.fail("unreadable picture", str(error))
            return []

    def converse(self, pictures, plans, file):
        """Self-instruct: every plan for every picture."""

        def requests():
            for picture, path in pictures:
                marked = self.regions(picture, path) if any(plan.granularity == "region" for plan in plans) else []
                yield from planning.conversations(picture, path, plans, marked, self.wishes)

        marking = sum(plan.granularity == "region" for plan in plans)
        places = (len(planning.regions(picture, self.wishes.regions, self.wishes.seed)) for picture, _ in pictures)
        total = sum(len(plans) - marking + marking * number for number in places)
        self.ask(requests, self.drawn, total)
        for one in tqdm(requests(), desc="writing", total=total, unit="request", disable=None):
            seen = set()
            for index, text in enumerate(self.answer(one, self.drawn)):
                if text in seen:
                    self.notes["answers drawn twice"] += 1
                    continue
                seen.add(text)
                self.conversation(one, index, text, file)

    def conversation(self, request, index, text, file):
        """One drawn answer as a sample."""
        plan, about = request.what
        try:
            parsed = parse(text)
        except Unparsed as error:
            self.fail(f"unparsed: {error.reason}", f"{request.id}/{index}: {text[:200]!r}")
            return
        self.notes.update(f"parsed although {note}" for note in parsed.notes)
        (_, first), *rest = parsed.turns
        turns = (("user", f"{IMAGE}\n{first}"), *rest)
        origin = {
            "generator": self.generator.name, "plan": plan.name, "prompt_sha": request.chat.sha, "seed": self.drawn.seed,
            "temperature": self.drawn.temperature, "index": index,
            "annotation_ids": [one.id for one in about.picture.annotations], "region": about.region and list(about.region.box),
        }  # fmt: skip
        id = f"{request.id}/{index}"
        self.write(Sample(id, (about.image,), turns, plan.task, "SI", plan.granularity, origin), file)

    def write(self, sample, file):
        """Check a sample and write it down; what it breaks is flagged, or makes it a failure."""
        broken = defects(sample)
        unusable = [f"{rule}: {said}" for rule, said in broken if rule in UNUSABLE]
        if unusable:
            self.fail("unusable", f"{sample.id}: {'; '.join(unusable)}")
            return
        plan = sample.provenance["plan"]
        softer = remarks(sample, sample.granularity, plan) if sample.type == "SI" else []
        flags = tuple(dict.fromkeys(rule for rule, _ in broken + softer))
        self.notes.update(f"flagged {rule}" for rule in flags)
        self.samples[sample.type, plan] += 1
        write_line(file, Sample(**(vars(sample) | {"flags": flags})))

    def fail(self, kind, *said):
        """Note failures, each once."""
        self.failures |= {(kind, one): None for one in said}

    def report(self, out, pictures, skipped):
        """Write failures.jsonl and report.json: list of str, what to print."""
        with open(out / "failures.jsonl", "w", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"kind": kind, "what": said}, ensure_ascii=False) + "\n" for kind, said in self.failures
            )
        counts = {
            "annotations": Counter(one.kind for picture, _ in pictures for one in picture.annotations),
            "samples": {f"{method} {plan}": number for (method, plan), number in sorted(self.samples.items())},
            "failures": Counter(kind for kind, _ in self.failures),
            "notes": self.notes,
            "skipped": skipped,
            "usage": dict(getattr(self.generator, "usage", {})),
        }
        report = {"pictures": len(pictures)} | counts | {"settings": vars(self.wishes)}
        (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        lines = [f"{kind}: {said}" for kind, said in list(self.failures)[:SHOWN]]
        more = len(self.failures) - SHOWN
        lines += [f"… and {more} more in {out / 'failures.jsonl'}"] if more > 0 else []
        for name, counted in counts.items():
            if counted:
                lines.append(f"{name}: " + ", ".join(f"{key} {number}" for key, number in counted.items()))
        total = sum(self.samples.values())
        return [*lines, f"{total} samples of {len(pictures)} pictures in {out / 'samples.jsonl'}"]
