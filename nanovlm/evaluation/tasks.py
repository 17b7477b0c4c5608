"""The benchmarks: rows of one table, which says how each is read, put, and counted."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nanovlm.evaluation import protocols, readers, report
from nanovlm.evaluation.protocols import parse_letter, parse_mme, parse_pope, parse_science_qa, parse_strict

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
    """How one benchmark is measured."""

    protocol: Callable  # one of the five of protocols.py
    read: Callable  # (data, pictures, split) -> items.Reading
    prompt: str  # words of a question, with {question}, {options}, {hint} or {ocr}
    summarise: Callable = report.mean_scores  # predictions -> {name: number or None}
    presets: tuple[str, ...] = VQA_PRESETS  # decodings; the first that a model's recipe has is used
    score: str = "exact"  # this and the next two: what the protocol asks for
    parse: Callable | None = None
    way: str = ""
    prepare: Callable = list  # what is done to the items first
    submission: Callable | None = None  # predictions -> {file name: text}; None = the benchmark takes no file
    border: int = 0  # pixels around every picture


short, likely = partial(Task, protocols.short_answer), partial(Task, protocols.choice, way="likelihood")
vqa = partial(short, score="vqa", submission=report.records("question_id", "answer"))
lettered = partial(Task, protocols.choice, prompt=LETTER, way="letter", parse=parse_letter, summarise=report.lettered)
yes_no = partial(Task, protocols.yes_no)
captioned = partial(Task, protocols.caption, readers.captions, DESCRIBE, report.captions, CAPTION_PRESETS)
pope = partial(yes_no, readers.pope, SHORT, report.pope, submission=report.pope_submission)
judged = partial(Task, protocols.judged, prompt=PLAIN, way="implies", summarise=report.judged)

TASKS = {
    "vqav2": vqa(readers.vqa, SHORT),
    "vqav2_official": vqa(readers.vqa, SHORT, score="vqa_official"),
    "ok_vqa": vqa(readers.vqa, SHORT),
    "textvqa": vqa(readers.vqa, SHORT),  # in VQA format
    "textvqa_own": vqa(readers.text_vqa, SHORT),
    "textvqa_ocr": vqa(readers.text_vqa, WITH_OCR),
    "vizwiz": vqa(readers.vqa, SHORT),  # in VQA format
    "vizwiz_own": vqa(readers.vizwiz, SHORT, submission=report.records("image", "answer")),
    "gqa": short(readers.gqa, SHORT, score="lower", submission=report.records("questionId", "prediction")),
    "video_qa": short(readers.video_qa, SHORT, score="lower"),
    "easy_vqa": short(readers.easy_vqa, PLAIN, presets=("default",)),
    "scenes": short(readers.scenes, PLAIN, presets=("default",)),
    "coco_caption": captioned(submission=report.records("image_id", "caption")),
    "flickr30k": captioned(),
    "pope": pope(parse=parse_pope),
    "pope_strict": pope(parse=parse_strict),
    "mme": yes_no(
        readers.mme, PLAIN, report.mme, parse=parse_mme, presets=("mme", *VQA_PRESETS), submission=report.mme_submission
    ),
    "seed_bench": likely(readers.seed_bench, SEED, submission=report.letter_lines),
    "seed_bench_mean": likely(readers.seed_bench, SEED, way="likelihood_mean"),
    "mmbench": lettered(
        readers.mmbench, summarise=report.circular, prepare=protocols.rotated, submission=report.mmbench
    ),
    "science_qa": lettered(
        readers.science_qa, summarise=report.science_qa, parse=parse_science_qa, submission=report.science_qa_submission
    ),
    "q_bench": lettered(readers.q_bench),
    "mmlu": likely(readers.mmlu, MMLU, way="likelihood_letter"),
    "mmlu_text": likely(readers.mmlu, SEED),
    "arc": likely(readers.arc, SEED),
    "open_vqa": judged(readers.open_vqa, presets=("open_vqa_image", "default")),
    "open_vqa_video": judged(readers.open_vqa_video, presets=("open_vqa_video", "default")),
    "mm_vet": judged(
        readers.mm_vet, way="share", presets=("default",), summarise=report.mm_vet, submission=report.by_id
    ),
    "video_qa_score": judged(readers.video_qa, way="score", presets=("default",)),
    "owleval": judged(readers.owl_eval, presets=("owleval", "default"), border=8),
    "visit_bench": judged(readers.visit_bench, presets=("visit_bench", "default")),
}
