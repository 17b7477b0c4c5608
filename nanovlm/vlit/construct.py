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
from nanovlm.evaluation.items import coco_picture, write_json
from nanovlm.names import check_known
from nanovlm.vlit import adaption, annotations, self_instruct
from nanovlm.vlit.generators import add_generator_flags, drawing, open_generator
from nanovlm.vlit.parsing import Unparsed, parse
from nanovlm.vlit.replies import GeneratorError, Recorded, digest
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
    add("--description", choices=self_instruct.FORMS, default="sentences", help="how annotations become text")
    add("--regions", type=int, default=1, help="marked regions of each picture at most")
    add("--answers", choices=("short", "sentences"), default="short", help="short ones ask for one, or are written out")
    add("--more-instructions", action="store_true", help="lengthen the instruction pools through the meta prompt")
    add("--limit", type=int, help="pictures at most")
    add("--seed", type=int, default=0)
    add_generator_flags(parser)


def run(args):
    """Run `construct`: list of str, what to print."""
    for name in args.plans:
        check_known("unknown plan", name, self_instruct.PLANS)
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
    work = Work(args, plans, draw, Recorded(generator, out / "replies.jsonl"), pictures, failed)
    try:
        files.replace(out / "samples.jsonl", work.write)
    except GeneratorError as error:
        number, file = len(work.recorded.replies.places), out / "replies.jsonl"
        told = f"{number} answers are in {file}, the same command goes on behind them"
        raise GeneratorError(f"{error}; {told}") from error
    return work.report(out, collection.skipped)


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
        if folder is None:
            found.append((one, ""))
            continue
        places = [Path(folder, one.file_name or f"{one.id}.jpg")]
        places += [coco_picture(folder, one.id, split) for split in ("train", "val") if one.id.isdigit()]
        path = str(next(filter(Path.is_file, places), places[0]))
        try:
            with opened(path):
                found.append((one, path))
        except FileNotFoundError as error:
            failed.append(("missing picture", str(error)))
        except ImageError as error:
            failed.append(("unreadable picture", str(error)))
    return found, failed


def regions(picture, number, seed):
    """Annotations of a picture that are worth a box, drawn at random: list of Annotation, `number` at most."""
    fitting = []
    for one in picture.of_kind("object") + picture.of_kind("ocr"):
        left, top, right, bottom = one.box
        if not one.is_crowd and LEAST_AREA[one.kind] <= (right - left) * (bottom - top) <= MOST_AREA:
            fitting.append(one)
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

    shown: list of (Picture, views). A view is (image as it stands in the file, path or "" if none is looked at, marked
    Annotation or None): the picture as it is, then with each of some boxes. failures: list of (kind, words). counts:
    Counter of samples by (type, plan). notes: Counter of what the parser and the linter had to say.
    """

    def __init__(self, args, plans, draw, recorded, pictures, failures):
        self.args, self.plans, self.draw, self.recorded, self.failures = args, plans, draw, recorded, failures
        self.counts, self.notes = Counter(), Counter()
        self.shown = [(picture, self.views(picture, path)) for picture, path in pictures]

    def views(self, picture, path):
        """The views of a picture; its boxes are drawn into marked/."""
        image, drawn = os.path.relpath(path, self.args.out) if path else picture.file_name or f"{picture.id}.jpg", []
        wanted = self.args.method != "self-instruct" or any(plan.granularity == "region" for plan in self.plans)
        try:
            for region in regions(picture, self.args.regions * wanted, self.args.seed):
                name = f"marked/{picture.id}_{region.id.replace('/', '_')}.png"
                place = Path(self.args.out, name)
                if path and not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    files.replace(place, lambda part, box=region.box: marked(path, box).save(part, format="PNG"))
                drawn.append((name, str(place) if path else "", region))
        except (ValueError, OSError) as error:
            self.failures.append(("unreadable picture", str(error)))
            drawn = []
        return [(image, path, None), *drawn]

    def write(self, path):
        """Make, check and write every sample."""
        with open(path, "w", encoding="utf-8") as file:
            for method, make in (("adapt", self.adapted), ("self-instruct", self.conversations)):
                for item in make() if self.args.method in (method, "both") else ():
                    one = sample(item)
                    broken = defects(one)
                    if unusable := [f"{rule}: {words}" for rule, words in broken if rule in UNUSABLE]:
                        self.failures.append(("unusable", f"{one.id}: {'; '.join(unusable)}"))
                        continue
                    broken += remarks(one) if method == "self-instruct" else []
                    if flags := list(dict.fromkeys(rule for rule, _ in broken)):
                        item["flags"] = flags
                    self.notes.update(f"flagged {rule}" for rule in flags)
                    self.counts[item["type"], one.plan] += 1
                    file.write(json.dumps(item, ensure_ascii=False) + "\n")

    def ask(self, requests, draw, total=None):
        """(request, list of str) for each request, (Chat, id, …); what is refused becomes a failure."""
        for request, texts in self.recorded.stream(requests, draw, total):
            if isinstance(texts, Exception):
                self.failures.append(("refused", f"{request[1]}: {texts}"))
            else:
                yield request, texts

    def adaptions(self):
        """(sample id, adaption.responses' tuple, image) of everything that can be adapted."""
        for picture, ((image, *_), *drawn) in self.shown:
            for place, told in enumerate(adaption.responses(picture)):
                yield f"{picture.id}/AA/{told[0]}/{place}", told, image
            for image, _, region in drawn:
                ids = [note.id for note in (region, *picture.attributes(region))]
                told = "region", "", self_instruct.named_region(picture, region), ids
                yield f"{picture.id}/AA/region/{region.id}", told, image

    def adapted(self):
        """Annotation adaption of every picture: iterator of items."""
        once, pools, written = replace(self.draw, n=1), adaption.POOLS, {}
        if self.args.more_instructions:
            told = self.ask(((adaption.meta_chat(kind), kind) for kind in pools), once)
            new = {kind: adaption.more_instructions(kind, "".join(texts)) for (_, kind), texts in told}
            self.notes["instructions added"] = sum(map(len, new.values()))
            pools = {kind: seeds + new.get(kind, []) for kind, seeds in pools.items()}
        if self.args.answers == "sentences":
            short = ((adaption.sentence_chat(*told), id) for id, told, _ in self.adaptions()
                     if told[0] in adaption.SHORT_KINDS)  # fmt: skip
            written = {id: "".join(texts).strip() for (_, id), texts in self.ask(short, once)}
        for id, told, image in tqdm(self.adaptions(), desc="adapting", unit="sample", disable=None):
            yield adaption.adapt(*told, id, image, pools, self.args.seed, written.get(id) or None)

    def requests(self):
        """(Chat, id, image) for every plan about every picture or marked region."""
        args = self.args
        for picture, (whole, *drawn) in self.shown:
            for plan in self.plans:
                for image, seen, region in drawn if plan.granularity == "region" else [whole]:
                    chat = self_instruct.chat(picture, plan, region, args.description, args.lines, args.seed, seen)
                    yield chat, f"{picture.id}/SI/{plan.name}{f'/{region.id}' if region else ''}", image

    def conversations(self):
        """Self-instruct: iterator of items."""
        total = len(self.shown) * len(self.plans)  # about
        for (chat, id, image), texts in self.ask(self.requests(), self.draw, total):
            plan, picture, region = chat.material
            origin = {
                "generator": self.recorded.name, "plan": plan.name, "prompt_sha": chat.sha, "seed": self.draw.seed,
                "temperature": self.draw.temperature, "index": 0, "region": region and list(region.box),
                "annotation_ids": [one.id for one in picture.annotations],
            }  # fmt: skip
            for index, text in enumerate(texts):
                if text in texts[:index]:
                    self.notes["answers drawn twice"] += 1
                    continue
                try:
                    parsed = parse(text)
                except Unparsed as error:
                    self.failures.append((f"unparsed: {error}", f"{id}/{index}: {text[:200]!r}"))
                    continue
                self.notes.update(f"parsed although {note}" for note in parsed.notes)
                said, its = [words for _, words in parsed.turns], origin | {"index": index}
                yield make_item(f"{id}/{index}", image, said, plan.task, "SI", plan.granularity, its)

    def report(self, out, skipped):
        """Write failures.jsonl and report.json: list of str, what to print."""
        lines = [json.dumps({"kind": kind, "what": words}, ensure_ascii=False) for kind, words in self.failures]
        files.replace_text(out / "failures.jsonl", "".join(f"{line}\n" for line in lines))
        asked = {f"requests {name}": number for name, number in self.recorded.counts.items()}
        counts = {
            "annotations": Counter(one.kind for picture, _ in self.shown for one in picture.annotations),
            "samples": {f"{method} {plan}": number for (method, plan), number in sorted(self.counts.items())},
            "failures": Counter(kind for kind, _ in self.failures), "notes": self.notes | asked, "skipped": skipped,
            "usage": dict(getattr(self.recorded.generator, "usage", {})),
        }  # fmt: skip
        report = {"pictures": len(self.shown)} | counts | {"settings": vars(self.args)}
        write_json(out / "report.json", report)
        told = [f"{kind}: {words}" for kind, words in self.failures[:SHOWN]]
        told += [f"… and {len(lines) - SHOWN} more in {out / 'failures.jsonl'}"] if len(lines) > SHOWN else []
        told += [f"{name}: " + ", ".join(f"{key} {number}" for key, number in counted.items())
                 for name, counted in counts.items() if counted]  # fmt: skip
        return [*told, f"{self.counts.total()} samples of {len(self.shown)} pictures in {out / 'samples.jsonl'}"]
