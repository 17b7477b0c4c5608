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
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

from PIL import ImageDraw
from tqdm import tqdm

from nanovlm import files
from nanovlm.data.images import ImageError, load, opened
from nanovlm.evaluation.items import coco_picture
from nanovlm.evaluation.items import picture as picture_path
from nanovlm.names import nearest
from nanovlm.vlit import adaption, annotations, self_instruct
from nanovlm.vlit.generators import add_generator_flags, drawing, open_generator
from nanovlm.vlit.parsing import Unparsed, parse
from nanovlm.vlit.replies import GeneratorError, Replies, Request, ask, digest
from nanovlm.vlit.samples import defects, make_item, remarks, sample

UNUSABLE = ("turns", "placeholders")  # defects with which a sample cannot be trained on; others become flags
SHOWN = 10  # problems printed one by one; all are in failures.jsonl
LEAST_AREA, MOST_AREA = {"object": 0.01, "ocr": 0.001}, 0.8  # of the picture, of what is worth a box
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
    add, plans = parser.add_argument, list(self_instruct.PLANS)
    add("--annotations", nargs="+", required=True, metavar="FILE", help="COCO captions and instances, VQA questions "
        "and answers, COCO-Text, COCO Attributes as JSON, LLaVA's captions and boxes; known by contents")  # fmt: skip
    add("--images", metavar="FOLDER", help="where the pictures lie; without it nothing is drawn or looked for")
    add("--out", default="out/vlit", metavar="FOLDER")
    add("--method", choices=("both", "adapt", "self-instruct"), default="both", help="of the two")
    add("--plans", type=words, default=plans, metavar="NAME,…", help=f"of {', '.join(plans)} (default: all)")
    add("--lines", type=numbers, metavar="1,3,…", help="of the nine requirements of the prompt, for every plan")
    add("--description", choices=self_instruct.FORMS, default="sentences", help="how annotations become text (default: sentences)")
    add("--regions", type=int, default=1, help="marked regions of each picture at most")
    add("--answers", choices=("short", "sentences"), default="short", help="short ones ask for one, or are written out")
    add("--more-instructions", action="store_true", help="lengthen the instruction pools through the meta prompt")
    add("--limit", type=int, help="pictures at most")
    add("--seed", type=int, default=0)
    add_generator_flags(parser)


def run(args):
    """Run `construct`: list of str, what to print."""
    for name in args.plans:
        if name not in self_instruct.PLANS:
            raise ValueError(f"unknown plan {name!r}.{nearest(name, self_instruct.PLANS)}")
    plans, draw, generator = [self_instruct.PLANS[name] for name in args.plans], drawing(args), open_generator(args)
    if args.images is not None and not Path(args.images).is_dir():
        raise FileNotFoundError(f"{args.images}: no such folder of pictures")
    if args.generator == "template" and (args.answers == "sentences" or args.more_instructions):
        raise ValueError("--answers sentences and --more-instructions need a language model as --generator")
    collection = annotations.read(args.annotations)
    pictures, failed = find_pictures(collection, args.images, args.limit)
    failed = [("unreadable record", problem) for problem in collection.problems] + failed
    if not pictures:
        first = f"; the last of {len(failed)} problems: {failed[-1][1]}" if failed else ""
        raise ValueError(f"no picture has an annotation in {', '.join(args.annotations)} and can be read{first}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    work = Work(args, generator, draw, Replies(out / "replies.jsonl"), failed)
    try:
        files.replace(out / "samples.jsonl", lambda path: work.write(path, pictures, plans))
    except GeneratorError as error:
        told = f"{len(work.replies)} answers are in {out / 'replies.jsonl'}, the same command goes on behind them"
        raise GeneratorError(f"{error}; {told}") from error
    return work.report(out, pictures, collection.skipped)


# Pictures and the boxes on them


def find_pictures(collection, folder, limit=None):
    """The pictures of a Collection that have annotations, at most `limit`; folder: None = they are not looked for.

    Returns: (list of (Picture, path str or ""), list of (kind, words) of those that are missing or no pictures). Only
      headers are read here; what is damaged behind them, `lint` and `filter` find.
    """
    found, failed = [], []
    for one in collection.pictures.values():
        if not one.annotations or len(found) == limit:
            continue
        path = "" if folder is None else str(_path(one, folder))
        try:
            if path:
                with opened(path):
                    pass
            found.append((one, path))
        except (FileNotFoundError, ImageError) as error:
            failed.append((f"{'unreadable' if isinstance(error, ImageError) else 'missing'} picture", str(error)))
    return found, failed


def _path(picture, folder):
    """Where a picture lies: Path. COCO's numbers are found under the names of 2014 and 2017."""
    first = picture_path(folder, picture.file_name or f"{picture.id}.jpg")
    numbered = [coco_picture(folder, picture.id, split) for split in ("train", "val") if picture.id.isdigit()]
    return next((path for path in (first, *numbered) if path.is_file()), first)


def regions(picture, number, seed):
    """Annotations of a picture that are worth a box, drawn at random: list of Annotation, `number` at most."""
    def area(left, top, right, bottom):
        return (right - left) * (bottom - top)

    fitting = [one for kind, least in LEAST_AREA.items() for one in picture.of_kind(kind)
               if not one.is_crowd and least <= area(*one.box) <= MOST_AREA]  # fmt: skip
    return random.Random(digest([seed, picture.id, "regions"])).sample(fitting, min(number, len(fitting)))


def marked(picture, box):
    """A picture (path or PIL image) with a box around something, so that questions can be about "the square box".

    box: left, top, right, bottom as shares of the picture; the line lies outside where there is room.
    Raises: images.ImageError, FileNotFoundError.
    """
    image = load(picture).copy()
    line = max(2, round(max(image.size) * LINE))
    sides = [share * size for share, size in zip(box, image.size * 2)]
    left, top = (max(0, round(side) - line) for side in sides[:2])
    right, bottom = (min(size - 1, round(side) + line - 1) for side, size in zip(sides[2:], image.size))
    ImageDraw.Draw(image).rectangle((left, top, right, bottom), outline=COLOR, width=line)
    return image


class Work:
    """One run: asks, parses, checks and counts.

    failures: (kind, words) in order, keys of a dict, since some are met twice. counts: Counter of samples by (type,
    plan). notes: Counter of what the parser, the linter and the generator had to say.
    """

    def __init__(self, args, generator, draw, replies, failed):
        self.args, self.generator, self.draw, self.replies = args, generator, draw, replies
        self.failures, self.counts, self.notes = dict.fromkeys(failed), Counter(), Counter()

    def write(self, path, pictures, plans):
        """Make, check and write every sample. pictures: as of `find_pictures`."""
        with open(path, "w", encoding="utf-8") as file:
            for method, make in (("adapt", self.adapted), ("self-instruct", self.conversations)):
                for item in make(pictures, plans) if self.args.method in (method, "both") else ():
                    if self.check(item):
                        file.write(json.dumps(item, ensure_ascii=False) + "\n")

    def ask(self, requests, draw, total=None):
        """Requests with their texts: iterator of (Request, list of str); what is refused becomes a failure."""
        counts = Counter()
        for request, texts in ask(requests, self.generator, draw, self.replies, counts, total):
            if isinstance(texts, Exception):
                self.failures["refused", f"{request.id}: {texts}"] = None
            else:
                yield request, texts
        self.notes.update({f"requests {name}": number for name, number in counts.items()})

    def views(self, picture, path, number):
        """A picture as it is, then with each of at most `number` boxes, drawn into marked/.

        Returns: list of (image as it stands in the file, path or "" if none is looked at, marked Annotation or None).
        """
        image, drawn = os.path.relpath(path, self.args.out) if path else picture.file_name or f"{picture.id}.jpg", []
        try:
            for region in regions(picture, number, self.args.seed):
                name = f"marked/{picture.id}_{region.id.replace('/', '_')}.png"
                place = Path(self.args.out, name)
                if path and not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    files.replace(place, lambda part, box=region.box: marked(path, box).save(part, format="PNG"))
                drawn.append((name, str(place) if path else "", region))
        except (ValueError, OSError) as error:
            self.failures["unreadable picture", str(error)], drawn = None, []
        return [(image, path, None), *drawn]

    def adaptions(self, pictures):
        """(sample id, adaption.responses' tuple, image) of everything that can be adapted."""
        for picture, path in pictures:
            (image, *_), *drawn = self.views(picture, path, self.args.regions)
            for place, told in enumerate(adaption.responses(picture)):
                yield f"{picture.id}/AA/{told[0]}/{place}", told, image
            for image, _, region in drawn:
                yield f"{picture.id}/AA/region/{region.id}", adaption.region_response(picture, region), image

    def adapted(self, pictures, plans):
        """Annotation adaption of every picture: iterator of items."""
        once, pools, written = replace(self.draw, n=1), adaption.POOLS, {}
        if self.args.more_instructions:
            requests = [Request(f"instructions/{kind}", adaption.meta_chat(kind), kind) for kind in pools]
            told = ((one.what, "".join(texts)) for one, texts in self.ask(requests, once))
            new = {kind: adaption.more_instructions(kind, text) for kind, text in told}
            self.notes["instructions added"] = sum(map(len, new.values()))
            pools = {kind: seeds + new.get(kind, []) for kind, seeds in pools.items()}
        if self.args.answers == "sentences":
            short = (one for one in self.adaptions(pictures) if one[1][0] in adaption.SHORT_KINDS)
            requests = (Request(id, adaption.sentence_chat(*told)) for id, told, _ in short)
            written = {one.id: "".join(texts).strip() for one, texts in self.ask(requests, once)}
        for id, told, image in tqdm(self.adaptions(pictures), desc="adapting", unit="sample", disable=None):
            yield adaption.adapt(*told, id, image, pools, self.args.seed, written.get(id) or None)

    def requests(self, pictures, plans):
        """The request for every plan about every picture or marked region: iterator of Request."""
        args = self.args
        number = args.regions * any(plan.granularity == "region" for plan in plans)
        for picture, path in pictures:
            views = self.views(picture, path, number)
            for plan in plans:
                for image, seen, region in views[1:] if plan.granularity == "region" else views[:1]:
                    chat = self_instruct.chat(picture, plan, region, args.description, args.lines, args.seed, seen)
                    place = f"/{region.id}" if region else ""
                    yield Request(f"{picture.id}/SI/{plan.name}{place}", chat, image)

    def conversations(self, pictures, plans):
        """Self-instruct: iterator of items."""
        total = len(pictures) * len(plans)  # about
        for request, texts in self.ask(self.requests(pictures, plans), self.draw, total):
            for index, text in enumerate(texts):
                if text in texts[:index]:
                    self.notes["answers drawn twice"] += 1
                elif item := self.conversation(request, index, text):
                    yield item

    def conversation(self, request, index, text):
        """One drawn answer as an item, or None if no conversation is found in it."""
        (plan, picture, region), id = request.chat.material, f"{request.id}/{index}"
        try:
            parsed = parse(text)
        except Unparsed as error:
            self.failures[f"unparsed: {error.reason}", f"{id}: {text[:200]!r}"] = None
            return None
        self.notes.update(f"parsed although {note}" for note in parsed.notes)
        origin = {
            "generator": self.generator.name, "plan": plan.name, "prompt_sha": request.chat.sha, "seed": self.draw.seed,
            "temperature": self.draw.temperature, "index": index, "annotation_ids": [one.id for one in picture.annotations],
            "region": region and list(region.box),
        }  # fmt: skip
        texts = [words for _, words in parsed.turns]
        return make_item(id, request.what, texts, plan.task, "SI", plan.granularity, origin)

    def check(self, item):
        """Flag what an item breaks. Returns: whether it can be trained on; if not, that is a failure."""
        one = sample(item)
        broken = defects(one)
        if unusable := [f"{rule}: {words}" for rule, words in broken if rule in UNUSABLE]:
            self.failures["unusable", f"{one.id}: {'; '.join(unusable)}"] = None
            return False
        softer = remarks(one) if item["type"] == "SI" else []
        if flags := list(dict.fromkeys(rule for rule, _ in broken + softer)):
            item["flags"] = flags
        self.notes.update(f"flagged {rule}" for rule in flags)
        self.counts[item["type"], one.plan] += 1
        return True

    def report(self, out, pictures, skipped):
        """Write failures.jsonl and report.json: list of str, what to print."""
        lines = [json.dumps({"kind": kind, "what": words}, ensure_ascii=False) for kind, words in self.failures]
        files.replace_text(out / "failures.jsonl", "".join(f"{line}\n" for line in lines))
        counts = {
            "annotations": Counter(one.kind for picture, _ in pictures for one in picture.annotations),
            "samples": {f"{method} {plan}": number for (method, plan), number in sorted(self.counts.items())},
            "failures": Counter(kind for kind, _ in self.failures), "notes": self.notes, "skipped": skipped,
            "usage": dict(getattr(self.generator, "usage", {})),
        }  # fmt: skip
        report = {"pictures": len(pictures)} | counts | {"settings": vars(self.args)}
        files.replace_text(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        told = [f"{kind}: {words}" for kind, words in self.failures][:SHOWN]
        told += [f"… and {len(lines) - SHOWN} more in {out / 'failures.jsonl'}"] if len(lines) > SHOWN else []
        told += [f"{name}: " + ", ".join(f"{key} {number}" for key, number in counted.items())
                 for name, counted in counts.items() if counted]  # fmt: skip
        return [*told, f"{self.counts.total()} samples of {len(pictures)} pictures in {out / 'samples.jsonl'}"]
