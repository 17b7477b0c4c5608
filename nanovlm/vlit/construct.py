"""Make instruction data from annotations: adapted ones, and conversations that a generator writes.

    python -m nanovlm.vlit construct --annotations captions.json instances.json --images val2014
    python -m nanovlm.vlit construct … --generator local --model out/smollm2
    python -m nanovlm.vlit construct … --generator endpoint --base-url http://localhost:8000/v1 --model NAME
    python -m nanovlm.vlit construct … --generator replay --replies other/replies.jsonl

The output folder holds samples.jsonl (LLaVA's form, for train.py --data), replies.jsonl (every answer as it came, with
which the same command goes on after an interruption), marked/ (pictures with boxes), failures.jsonl and report.json.
"""

import dataclasses
import json
import os
import random
from collections import Counter
from pathlib import Path

from PIL import ImageDraw
from tqdm import tqdm

from nanovlm import files
from nanovlm.data.images import ImageError, load, opened
from nanovlm.evaluation.items import coco_picture
from nanovlm.evaluation.items import picture as picture_path
from nanovlm.vlit import adaption, annotations, self_instruct
from nanovlm.vlit.descriptions import FORMS
from nanovlm.vlit.generators import add_generator_flags, drawing, open_generator
from nanovlm.vlit.parsing import Unparsed, parse
from nanovlm.vlit.replies import GeneratorError, Replies, Request, ask, digest, key_of
from nanovlm.vlit.samples import IMAGE, Sample, defects, remarks

UNUSABLE = ("turns", "placeholders")  # defects with which a sample cannot be trained on; others become flags
SHOWN = 10  # problems printed one by one; all are in failures.jsonl
LEAST_AREA, LEAST_TEXT_AREA, MOST_AREA = 0.01, 0.001, 0.8  # of the picture, of an object or a text worth a box
COLOR = (255, 0, 0)  # of a box
LINE = 1 / 150  # of a box: share of the longer side, but at least 2 pixels


def words(text):
    """Words with commas between them, as a list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text):
    """Whole numbers with commas between them, as a tuple."""
    return tuple(map(int, words(text)))


def add_flags(parser):
    """The flags of `construct`."""
    add = parser.add_argument
    add("--annotations", nargs="+", required=True, metavar="FILE", help="COCO captions and instances, VQA questions and "
        "annotations, COCO-Text, COCO Attributes as JSON, LLaVA's captions and boxes; known by their contents")  # fmt: skip
    add("--images", metavar="FOLDER", help="where the pictures lie; without it nothing is drawn, and nothing is looked for")
    add("--out", default="out/vlit", metavar="FOLDER")
    add("--method", choices=("both", "adapt", "self-instruct"), default="both", help="annotation adaption, self-instruct, or both")
    plans = self_instruct.PLANS
    add("--plans", type=words, default=list(plans), metavar="NAME,…", help=f"of {', '.join(plans)} (default: all)")
    add("--lines", type=numbers, metavar="1,3,…", help="which of the nine requirements the prompt states, for every plan")
    add("--description", choices=FORMS, default="sentences", help="how annotations become text (default: sentences)")
    add("--regions", type=int, default=1, metavar="N", help="marked regions of each picture at most")
    add("--answers", choices=("short", "sentences"), default="short", help="short answers ask for one, or are written out")
    add("--more-instructions", action="store_true", help="lengthen the instruction pools through the meta prompt")
    add("--limit", type=int, metavar="N", help="pictures at most")
    add("--seed", type=int, default=0)
    add_generator_flags(parser)


def run(args):
    """Run `construct`: list of str, what to print."""
    plans, draw, generator = list(map(self_instruct.find_plan, args.plans)), drawing(args), open_generator(args)
    if args.images is not None and not Path(args.images).is_dir():
        raise FileNotFoundError(f"{args.images}: no such folder of pictures")
    if args.generator == "template" and (args.answers == "sentences" or args.more_instructions):
        raise ValueError("--answers sentences and --more-instructions need a language model; choose another --generator")
    collection = annotations.read(args.annotations)
    pictures, failed = find_pictures(collection, args.images, args.limit)
    if not pictures:
        why = f"no picture has an annotation in {', '.join(args.annotations)}"
        if failed:
            why = f"none of {len(failed)} pictures in {args.images} can be used; the first: {failed[0][1]}"
        elif collection.problems:
            why += f"; the first of {len(collection.problems)} problems: {collection.problems[0]}"
        raise ValueError(why)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    work = Work(args, generator, draw, Replies(out / "replies.jsonl"))
    for kind, said in [*(("unreadable record", problem) for problem in collection.problems), *failed]:
        work.fail(kind, said)

    def write(path):
        with open(path, "w", encoding="utf-8") as file:
            for sample in work.samples(pictures, plans):
                if sample := work.checked(sample):
                    file.write(json.dumps(sample.item(), ensure_ascii=False) + "\n")

    try:
        files.replace(out / "samples.jsonl", write)
    except GeneratorError as error:
        told = f"{len(work.replies)} answers are in {work.replies.path}, the same command goes on behind them"
        raise GeneratorError(f"{error}; {told}") from error
    return work.report(out, pictures, collection.skipped)


# Pictures and the boxes on them


def find_pictures(collection, folder, limit=None):
    """The pictures that have annotations.

    Args:
      collection: annotations.Collection. folder: where the files lie, or None = they are not looked for.
      limit: int, pictures at most; None = all.
    Returns: (list of (Picture, path str or ""), list of (kind, words) of those that are missing or no pictures). Only
      headers are read here; what is damaged behind them, `lint` and `filter` find.
    """
    found, failed = [], []
    for one in collection.pictures.values():
        if limit is not None and len(found) == limit:
            break
        if not one.annotations:
            continue
        path = "" if folder is None else str(_path(one, folder))
        try:
            if path:
                with opened(path):
                    pass
        except FileNotFoundError as error:
            failed.append(("missing picture", str(error)))
        except ImageError as error:
            failed.append(("unreadable picture", str(error)))
        else:
            found.append((one, path))
    return found, failed


def _path(picture, folder):
    """Where a picture lies: Path. COCO's numbers are found under the names of 2014 and 2017."""
    places = [picture_path(folder, picture.file_name)] if picture.file_name else []
    places += [coco_picture(folder, picture.id, split) for split in ("train", "val") if picture.id.isdigit()]
    default = Path(folder) / (picture.file_name or f"{picture.id}.jpg")
    return next((path for path in places if path.is_file()), default)


def regions(picture, number, seed):
    """Annotations of a picture that are worth a box, drawn at random: list of Annotation, `number` at most."""

    def fits(one, least):
        left, top, right, bottom = one.box
        return not one.is_crowd and least <= (right - left) * (bottom - top) <= MOST_AREA

    fitting = [one for kind, least in (("object", LEAST_AREA), ("ocr", LEAST_TEXT_AREA))
               for one in picture.of_kind(kind) if fits(one, least)]  # fmt: skip
    return random.Random(digest([seed, picture.id, "regions"])).sample(fitting, min(number, len(fitting)))


def marked(picture, box):
    """A picture with a box around something, so that a question can be about "the object in the square box".

    Args:
      picture: path or PIL image. box: left, top, right, bottom as shares of the picture.
    Returns: PIL.Image.Image of mode RGB, as large as the picture; the line lies outside the box where there is room.
    Raises: images.ImageError, FileNotFoundError.
    """
    image = load(picture).copy()
    line = max(2, round(max(image.size) * LINE))
    sides = [share * size for share, size in zip(box, image.size * 2)]
    left, top = (max(0, round(side) - line) for side in sides[:2])
    right, bottom = (min(size - 1, round(side) + line - 1) for side, size in zip(sides[2:], image.size))
    ImageDraw.Draw(image).rectangle((left, top, right, bottom), outline=COLOR, width=line)
    return image


@dataclasses.dataclass(frozen=True)
class View:
    """A picture as a sample shows it.

    image: as it stands in the samples' file. path: where it lies, "" if pictures are not looked at. region: what is
    marked on it, or None.
    """

    picture: annotations.Picture
    image: str
    path: str = ""
    region: annotations.Annotation | None = None


class Work:
    """One run: asks, parses, checks and counts.

    Attributes: failures: (kind, words) in order, keys of a dict, since some are met twice. counts: Counter of samples by
    (type, plan). notes: Counter of what the parser, the linter and the generator had to say.
    """

    def __init__(self, args, generator, draw, replies):
        self.args, self.generator, self.draw, self.replies = args, generator, draw, replies
        self.failures, self.counts, self.notes = {}, Counter(), Counter()

    def fail(self, kind, said):
        """Note a failure, once."""
        self.failures[kind, said] = None

    def ask(self, requests, draw, total=None):
        """Have requests answered; what is refused becomes a failure. requests: function that gives them anew."""
        counts, refused = ask(requests(), self.generator, draw, self.replies, total)
        self.notes.update({f"requests {name}": number for name, number in counts.items()})
        for id, why in refused:
            self.fail("refused", f"{id}: {why}")

    def answers(self, request, draw):
        """The recorded texts of a request: list of str, empty if it was refused."""
        return self.replies.get(key_of(request.chat, self.generator, draw))

    def samples(self, pictures, plans):
        """Every sample that can be made, before it is checked: iterator of Sample. pictures: as of `find_pictures`."""
        if self.args.method != "self-instruct":
            yield from self.adapted(pictures)
        if self.args.method != "adapt":
            yield from self.conversations(pictures, plans)

    def whole(self, picture, path):
        """A picture without a box: View."""
        image = os.path.relpath(path, self.args.out) if path else picture.file_name or f"{picture.id}.jpg"
        return View(picture, image, path)

    def marked(self, picture, path):
        """The marked views of a picture, drawn into marked/: list of View; a picture that cannot be read is a failure."""
        found = []
        for region in regions(picture, self.args.regions, self.args.seed):
            name = f"marked/{picture.id}_{region.id.replace('/', '_')}.png"
            place = Path(self.args.out) / name
            try:
                if path and not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    image = marked(path, region.box)
                    files.replace(place, lambda unfinished, image=image: image.save(unfinished, format="PNG"))
            except (ValueError, OSError) as error:
                self.fail("unreadable picture", str(error))
                return []
            found.append(View(picture, name, str(place) if path else "", region))
        return found

    def adaptions(self, pictures):
        """(sample id, adaption.responses' tuple, image) of everything that can be adapted."""
        for picture, path in pictures:
            image = self.whole(picture, path).image
            for place, told in enumerate(adaption.responses(picture)):
                yield f"{picture.id}/AA/{told[0]}/{place}", told, image
            for view in self.marked(picture, path):
                yield f"{picture.id}/AA/region/{view.region.id}", adaption.region_response(picture, view.region), view.image

    def adapted(self, pictures):
        """Annotation adaption of every picture."""
        once = dataclasses.replace(self.draw, n=1)
        pools = self.pools(once)

        def sentences():
            for id, (kind, slot, response, _), _ in self.adaptions(pictures):
                if kind in adaption.SHORT_KINDS:
                    asked = slot if kind == "vqa" else adaption.POOLS[kind][0].replace("[OBJECT]", slot)
                    yield Request(id, adaption.write_out_chat(asked, response))

        written = {}
        if self.args.answers == "sentences":
            self.ask(sentences, once)
            written = {one.id: text.strip() for one in sentences() for text in self.answers(one, once) if text.strip()}
        for id, told, image in tqdm(self.adaptions(pictures), desc="adapting", unit="sample", disable=None):
            yield adaption.adapt(*told, id, image, pools, self.args.seed, written.get(id))

    def pools(self, draw):
        """The instructions of each kind: dict kind -> list of str."""
        if not self.args.more_instructions:
            return adaption.POOLS
        requests = [Request(f"instructions/{kind}", adaption.meta_chat(kind), kind) for kind in adaption.POOLS]
        self.ask(lambda: requests, draw, len(requests))
        new = {one.what: [words for text in self.answers(one, draw) for words in adaption.more_instructions(one.what, text)]
               for one in requests}  # fmt: skip
        self.notes["instructions added"] = sum(map(len, new.values()))
        return {kind: seeds + new[kind] for kind, seeds in adaption.POOLS.items()}

    def conversations(self, pictures, plans):
        """Self-instruct: every plan for every picture."""
        about_regions = sum(plan.granularity == "region" for plan in plans)

        def requests():
            for picture, path in pictures:
                marked, whole = self.marked(picture, path) if about_regions else [], [self.whole(picture, path)]
                for plan in plans:
                    for view in marked if plan.granularity == "region" else whole:
                        chat = self_instruct.chat(picture, plan, view.region, self.args.description, self.args.lines,
                                                  self.args.seed, view.path)  # fmt: skip
                        place = f"/{view.region.id}" if view.region else ""
                        yield Request(f"{picture.id}/SI/{plan.name}{place}", chat, (plan, view))

        numbers = [len(regions(picture, self.args.regions, self.args.seed)) for picture, _ in pictures]
        total = sum(len(plans) - about_regions + about_regions * number for number in numbers)
        self.ask(requests, self.draw, total)
        for request in tqdm(requests(), desc="writing", total=total, unit="request", disable=None):
            texts = self.answers(request, self.draw)
            for index, text in enumerate(texts):
                if text in texts[:index]:
                    self.notes["answers drawn twice"] += 1
                elif sample := self.conversation(request, index, text):
                    yield sample

    def conversation(self, request, index, text):
        """One drawn answer as a Sample, or None if no conversation is found in it."""
        (plan, view), id = request.what, f"{request.id}/{index}"
        try:
            parsed = parse(text)
        except Unparsed as error:
            return self.fail(f"unparsed: {error.reason}", f"{id}: {text[:200]!r}")
        self.notes.update(f"parsed although {note}" for note in parsed.notes)
        (_, first), *rest = parsed.turns
        origin = {
            "generator": self.generator.name, "plan": plan.name, "prompt_sha": request.chat.sha, "seed": self.draw.seed,
            "temperature": self.draw.temperature, "index": index,
            "annotation_ids": [one.id for one in view.picture.annotations], "region": view.region and list(view.region.box),
        }  # fmt: skip
        return Sample(id, (view.image,), (("user", f"{IMAGE}\n{first}"), *rest), plan.task, "SI", plan.granularity, origin)

    def checked(self, sample):
        """A sample with flags for what it breaks; None, and a failure, if it cannot be trained on."""
        broken = defects(sample)
        if unusable := [f"{rule}: {said}" for rule, said in broken if rule in UNUSABLE]:
            return self.fail("unusable", f"{sample.id}: {'; '.join(unusable)}")
        plan = sample.provenance["plan"]
        softer = remarks(sample, sample.granularity, plan) if sample.type == "SI" else []
        flags = tuple(dict.fromkeys(rule for rule, _ in broken + softer))
        self.notes.update(f"flagged {rule}" for rule in flags)
        self.counts[sample.type, plan] += 1
        return dataclasses.replace(sample, flags=flags)

    def report(self, out, pictures, skipped):
        """Write failures.jsonl and report.json: list of str, what to print."""
        failures = [{"kind": kind, "what": said} for kind, said in self.failures]
        files.replace_text(out / "failures.jsonl", "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in failures))
        counts = {
            "annotations": Counter(one.kind for picture, _ in pictures for one in picture.annotations),
            "samples": {f"{method} {plan}": number for (method, plan), number in sorted(self.counts.items())},
            "failures": Counter(kind for kind, _ in self.failures),
            "notes": self.notes,
            "skipped": skipped,
            "usage": dict(getattr(self.generator, "usage", {})),
        }
        report = {"pictures": len(pictures)} | counts | {"settings": vars(self.args)}
        files.replace_text(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        lines = [f"{kind}: {said}" for kind, said in self.failures][:SHOWN]
        if len(self.failures) > SHOWN:
            lines.append(f"… and {len(self.failures) - SHOWN} more in {out / 'failures.jsonl'}")
        lines += [f"{name}: " + ", ".join(f"{key} {number}" for key, number in counted.items())
                  for name, counted in counts.items() if counted]  # fmt: skip
        return [*lines, f"{sum(self.counts.values())} samples of {len(pictures)} pictures in {out / 'samples.jsonl'}"]
