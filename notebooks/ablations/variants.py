"""The papers' ablations at nano scale, as data: what is compared, and what the paper found.

    python notebooks/ablations/ablate.py                    all of them, in order of interest
    python notebooks/ablations/ablate.py queries tower --seeds 0,1,2

Every variant is an ordinary `train.py` run of ablation_recipe.py, from a tower and a decoder that all variants of a seed
share; ablation_runs.py trains them, ablation_report.py makes tables and pictures. Variants that stand in several ablations
are trained once.
"""

from dataclasses import dataclass

FORGETTING = ("pictures", "text before", "text", "text beside a picture")


@dataclass(frozen=True)
class Variant:
    """One way to train.

    name: what the table calls it. size: how the model is built, a size of ablation_recipe.py. start: "instructed" = the
    decoder has learned to answer questions about texts; "raw" = it only continues texts. flags: of train.py.
    """

    name: str
    size: str = "mam"
    start: str = "instructed"
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ablation:
    """What is compared. columns: measures of ablation_exam.MEASURES, and "text before", the start's "text"."""

    question: str
    source: str  # the paper's table
    found: str  # what the paper says
    variants: tuple[Variant, ...]
    columns: tuple[str, ...] = FORGETTING


def sets(*settings):
    """Flags `--set` of train.py, one for each setting "stage.field=value"."""
    return tuple(word for setting in settings for word in ("--set", setting))


def data_variants(name, size):
    """Text, multi-modal and joint instructions, each data set read once: three Variant."""
    return (
        Variant(f"{name}, text", size, flags=sets("instruct.steps=40", "instruct.mixture.questions=none")),
        Variant(f"{name}, multi-modal", size, flags=PICTURES_ALONE),
        Variant(f"{name}, joint", size),
    )


PICTURES_ALONE = sets("instruct.steps=80", "instruct.mixture.texts=none")
FROZEN_TOWER = sets("instruct.learning_rates.vision=none")
FROZEN_LANGUAGE = sets("instruct.learning_rates.language_model=none", "instruct.learning_rates.embedding=none")
OWL2, LYNX = "mPLUG-Owl2, arXiv:2311.04257", "Lynx, arXiv:2307.02469"

ABLATIONS = {
    "mam_and_data": Ablation(
        "Do modality-adaptive parts protect the words, and which instructions should be mixed?", f"{OWL2}, Table 5",
        "pictures alone cost 6 points of text; joint data win them back; with MAM both rise a little more",
        (*data_variants("shared", "plain"), *data_variants("MAM", "mam")),
    ),
    "what_to_tune": Ablation(
        "What should learn from pictures, and what does it forget?", f"{LYNX}, Sec. 2.3, and LLaVA-Phi's two stages",
        "no table: Lynx trains bridge and adapters, mPLUG-Owl2 everything",
        (
            Variant("bridge", "plain", flags=PICTURES_ALONE + FROZEN_TOWER + FROZEN_LANGUAGE),
            Variant(
                "bridge and LoRA of rank 8", "plain",
                flags=("--lora", "8", *PICTURES_ALONE, *FROZEN_TOWER, *FROZEN_LANGUAGE, *sets("instruct.learning_rates.lora=4e-3")),
            ),
            Variant("bridge and language model", "plain", flags=PICTURES_ALONE + FROZEN_TOWER),
            Variant("everything", "plain", flags=PICTURES_ALONE),
        ),
    ),
    "tower": Ablation(
        "Should the vision tower learn from instructions, and its lower blocks less?", f"{OWL2}, Table 6",
        "frozen 74.8 of VQAv2, trained 76.2, with a decay of 0.9 a block 76.8",
        (
            Variant("frozen", flags=FROZEN_TOWER), Variant("trained"),
            # over two blocks what 0.9 is over 24
            Variant("trained, decay 0.3 a block", flags=sets("instruct.layer_decay.vision=0.3")),
        ),
    ),
    "resolution": Ablation(
        "How large should the pictures be?", f"{OWL2}, Table 8; {LYNX}, Table 5",
        "224 to 448 pixels: 76.8 to 79.4 of VQAv2",
        tuple(
            Variant(f"{side} pixels", flags=() if side == 48 else sets(f"align.image_size={side}", f"instruct.image_size={side}"))
            for side in (32, 48, 64)
        ),
    ),
    "queries": Ablation(
        "How many queries should the abstractor have?", f"{OWL2}, Table 7",
        "8 to 64 queries: 58.3 to 76.8 of VQAv2, 128 no better",
        tuple(Variant(f"{number} quer{'y' if number == 1 else 'ies'}", f"queries_{number}") for number in (1, 4, 16)),
    ),
    "prompts_and_noise": Ablation(
        "Do diversified prompts and cleaner captions help?", f"{LYNX}, Table 5",
        "diversified prompts balance abilities; a much larger, noisy set of captions is no better than a small clean one",
        (
            Variant("one wording"),
            Variant("six wordings", flags=sets("instruct.mixture.questions=none", "instruct.mixture.reworded=2")),
            Variant(
                "four times the captions, half of them wrong",
                flags=sets("align.steps=120", "align.mixture.captions=none", "align.mixture.noisy_captions=1"),
            ),
            Variant("four times the captions", flags=sets("align.steps=120")),
        ),
        ("pictures", "other wordings", "described first", "text"),
    ),
    "language_start": Ablation(
        "Should the language model have learned to follow instructions first?", f"{LYNX}, Table 5, LLaMA against Vicuna",
        "the instructed one is better in accuracy, the raw one in people's eyes",
        (Variant("instructed"), Variant("raw", start="raw")),
        ("pictures", "other wordings", "text before", "text"),
    ),
    "describe_first": Ablation(
        "Does it help to describe the picture first?", f"{LYNX}, Sec. 3.2, plug-and-play",
        "no table: the description helps to follow instructions that were not trained",
        (Variant("joint data"), Variant("pictures alone", flags=PICTURES_ALONE), Variant("raw language model", start="raw")),
        ("pictures", "described first"),
    ),
}  # fmt: skip
