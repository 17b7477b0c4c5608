"""The benchmarks: rows of one table, which says how each is read, put, and counted."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nanovlm.evaluation import protocols, readers, report
from nanovlm.evaluation.protocols import LETTERS, parse_letter, parse_science_qa
from nanovlm.evaluation.yes_no import parse as parse_mme
from nanovlm.evaluation.yes_no import parse_official, parse_strict

SHORT = "{question}\nAnswer the question using a single word or phrase."  # LLaVA-1.5, arXiv:2310.03744, Sec. 3.2
WITH_OCR = "{question}\nReference OCR token: {ocr}\nAnswer the question using a single word or phrase."
LETTER = "{hint}{question}\n{options}\nAnswer with the option's letter from the given choices directly."
PLAIN = "{question}"
SEED = "Question: {question}\nAnswer:"
MMLU = "{question}\n{options}\nAnswer:"  # arXiv:2009.03300, Sec. 4.1, without its sentence about the subject
DESCRIBE = "Provide a one-sentence caption for the provided image."  # LLaVA-1.5's for captions

VQA_PRESETS = ("vqa", "short", "mme", "default")
CAPTION_PRESETS = ("caption", "image_description", "default")


@dataclass(frozen=True)
class Task:
    """How one benchmark is measured.

    protocol: one of protocols.py. read: function (data, pictures, split) -> items.Reading.
    prompt: words of a question, with {question}, {options}, {hint} or {ocr}.
    summarise: function predictions -> {name: number or None}, see summaries.py.
    presets: names of decodings, the first that a model's recipe has is used.
    score, parse, way: what the protocol asks for. prepare: what is done to the items first.
    submission: function predictions -> {file name: text}, see submissions.py; None = the benchmark takes no file.
    """

    protocol: Callable
    read: Callable
    prompt: str
    summarise: Callable = report.mean_scores
    presets: tuple[str, ...] = VQA_PRESETS
    score: str = "exact"
    parse: Callable | None = None
    way: str = ""
    prepare: Callable = protocols.once
    submission: Callable | None = None
    border: int = 0  # pixels around every picture


def science_qa_place(text, options):
    """Place of the option that an answer in ScienceQA's form names, or None."""
    letter = parse_science_qa(text)
    return LETTERS.index(letter) if letter and letter in LETTERS[: len(options)] else None


short, likely = partial(Task, protocols.short_answer), partial(Task, protocols.choice, way="likelihood")
lettered = partial(Task, protocols.choice, prompt=LETTER, way="letter", parse=parse_letter)
yes_no, captioned = partial(Task, protocols.yes_no), partial(Task, protocols.caption, summarise=report.captions)
judged = partial(Task, protocols.judged, summarise=report.judged)
answer_file = report.records("question_id", "answer")

TASKS = {
    "vqav2": short(readers.vqa, SHORT, score="vqa", submission=answer_file),
    "vqav2_official": short(readers.vqa, SHORT, score="vqa_official", submission=answer_file),
    "ok_vqa": short(readers.vqa, SHORT, score="vqa", submission=answer_file),
    "textvqa": short(readers.vqa, SHORT, score="vqa", submission=answer_file),  # in VQA format
    "textvqa_own": short(readers.text_vqa, SHORT, score="vqa", submission=answer_file),
    "textvqa_ocr": short(readers.text_vqa, WITH_OCR, score="vqa", submission=answer_file),
    "vizwiz": short(readers.vqa, SHORT, score="vqa", submission=answer_file),  # in VQA format
    "vizwiz_own": short(readers.vizwiz, SHORT, score="vqa", submission=report.records("image", "answer")),
    "gqa": short(readers.gqa, SHORT, score="lower", submission=report.records("questionId", "prediction")),
    "video_qa": short(readers.video_qa, SHORT, score="lower"),
    "easy_vqa": short(readers.easy_vqa, PLAIN, presets=("default",)),
    "scenes": short(readers.scenes, PLAIN, presets=("default",)),
    "coco_caption": captioned(readers.captions, DESCRIBE, presets=CAPTION_PRESETS, submission=report.records("image_id", "caption")),
    "flickr30k": captioned(readers.captions, DESCRIBE, presets=CAPTION_PRESETS),
    "pope": yes_no(readers.pope, SHORT, report.pope, parse=parse_official, submission=report.pope_submission),
    "pope_strict": yes_no(readers.pope, SHORT, report.pope, parse=parse_strict, submission=report.pope_submission),
    "mme": yes_no(
        readers.mme, PLAIN, report.mme, parse=parse_mme, presets=("mme", *VQA_PRESETS), submission=report.mme_submission
    ),
    "seed_bench": likely(readers.seed_bench, SEED, submission=report.letter_lines),
    "seed_bench_mean": Task(protocols.choice, readers.seed_bench, SEED, way="likelihood_mean"),
    "mmbench": lettered(
        readers.mmbench, summarise=report.circular, prepare=protocols.rotated, submission=report.mmbench
    ),
    "science_qa": lettered(
        readers.science_qa, summarise=report.science_qa, parse=science_qa_place, submission=report.science_qa_submission
    ),
    "q_bench": lettered(readers.q_bench),
    "mmlu": Task(protocols.choice, readers.mmlu, MMLU, way="likelihood_letter"),
    "mmlu_text": likely(readers.mmlu, SEED),
    "arc": likely(readers.arc, SEED),
    "open_vqa": judged(readers.open_vqa, PLAIN, presets=("open_vqa_image", "default")),
    "open_vqa_video": judged(readers.open_vqa_video, PLAIN, presets=("open_vqa_video", "default")),
    "mm_vet": judged(
        readers.mm_vet, PLAIN, way="share", presets=("default",), summarise=report.mm_vet, submission=report.by_id
    ),
    "video_qa_score": judged(readers.video_qa, PLAIN, way="score", presets=("default",)),
    "owleval": judged(readers.owl_eval, PLAIN, presets=("owleval", "default"), border=8),
    "visit_bench": judged(readers.visit_bench, PLAIN, presets=("visit_bench", "default")),
}
