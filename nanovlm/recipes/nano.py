"""nano: a vision-language model of a million parameters that two CPU cores teach from nothing in minutes.

The papers' whole chain in miniature. Two stages make what they take ready-made, a vision tower (a tiny CLIP) and a
language model; three more are Lynx's: align the two at a low resolution, raise the resolution, instruct. Before the
resolution rises, one more learns to look up one thing among several: asked everything at once, that comes far later.
What is a matter of words alone, such as "is there not a red shape?", the language model learns from texts, where a step
costs a third: a picture then only has to take the place of its description.

  vision   ViT with a convolutional stem, 64 pixels, 8 x 8 patches             Sec. 2.1 of each paper
           its tower stage matches every object's patch with its names         RegionCLIP, arXiv:2112.09106
           its first stages see pictures of 48 pixels, whose objects are as large, at half the cost
  bridge   MLP on every patch: 64 image tokens                                 LLaVA-Phi, Sec. 3.1
  decoder  LLaMA's layer with Lynx's adapters and mPLUG-Owl2's split norms, keys and values
  data     easy-VQA (5,000 pictures, questions by others) and drawn scenes
"""

from nanovlm.contrastive import ContrastiveModel, TextTower
from nanovlm.data.easy_vqa import EasyVQA
from nanovlm.data.scene_questions import Scenes, SceneTexts
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions
from nanovlm.projector import PixelShuffleProjector
from nanovlm.recipes import nano_tests
from nanovlm.recipes.recipe import Decoding, Expected, Recipe, Stage
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM

SIZES = {"full": (128, 2), "tiny": (32, 1)}  # width of vision and language, layers of each
HEAD_WIDTH = 32  # channels
VOCABULARY = 512  # tokens
QUESTIONS = {  # hard ones more often: a count or a relation needs several things at once
    "color": 0.9, "shape": 0.9, "count": 2.2, "existence": 1.0, "place": 1.0, "relation": 2.6, "size": 0.6, "reading": 2.7,
}  # fmt: skip
TEXTS = {
    "described": 2.5, "listed": 5, "described_relation": 3, "repeat": 2, "opposite": 0.1, "addition": 0.3, "spelling": 0.7,
    "next_letter": 0.1, "word_of_phrase": 0.5, "plain_caption": 0.3,
}  # fmt: skip
ATTRIBUTES = {"color": 1.0, "shape": 1.0, "size": 0.7, "place": 1.0}  # one thing looked up, one answer: what is learned first
LOOKUPS = ATTRIBUTES | {"existence": 0.5, "reading": 1.5}
FEW = dict(min_objects=2, max_objects=3)
BOTH = dict(kind="both", weights=ATTRIBUTES | {"caption": 1.0, "short_caption": 1.0}, **FEW)


def projector(width):
    """The bridge: every patch becomes one image token, which knows its place."""
    return PixelShuffleProjector(width, width, merge=1, positions=True)


def tower(size):
    """The vision tower: vit.ViT."""
    width, num_layers = SIZES[size]
    return ViT(ViTConfig(64, 8, width, num_layers, width // HEAD_WIDTH, 4 * width, conv_stem=True, class_token=False))


def build(size, vocab_size, bridge=projector):
    """The vision-language model: vlm.VLM. bridge: width -> the bridge between vision and language of this width."""
    width, num_layers = SIZES[size]
    heads, vision = width // HEAD_WIDTH, tower(size)  # the order in which parts are drawn is part of a seed's numbers
    layers = (LayerOptions(adapter_width=32, modality_adaptive=True),) * num_layers
    decoder = Decoder(
        DecoderConfig(
            vocab_size, width, heads, heads, ffn_width=width * 5 // 2, context_length=256, layers=layers, tied_head=True,
            rope_base=100.0,  # rows of a hundred tokens: most of LLaMA's slow channels would hardly turn
            qkv_bias="qkv",  # as Qwen2: looking one word back, whatever the words, needs a constant
        )
    )  # fmt: skip
    return VLM(vision, bridge(width), decoder)


def contrastive(size, model):
    """The ViT beside a text tower of one layer, which only the first stage needs."""
    width, _ = SIZES[size]
    text = TextTower(model.decoder.config.vocab_size, width, 1, width // HEAD_WIDTH, 4 * width, context_length=128)
    return ContrastiveModel(model.vision, width, text, width, joint_width=width)


def sources():
    """Name in a mixture -> (seed) -> data source.

    Kinds are those of Scenes and EasyVQA. Seeds differ so that no two sources of scenes draw the same pictures.
    """
    return {
        "scenes_names": lambda seed: Scenes(kind="names", seed=seed, string_share=0.5, canvas=48),
        "easy_vqa_names": lambda seed: EasyVQA(kind="names", seed=seed),
        "easy_vqa_texts": lambda seed: EasyVQA(kind="texts", seed=seed, questions_per_picture=4),
        "texts": lambda seed: SceneTexts(seed=seed, max_objects=4, string_share=0.5, weights=TEXTS, questions_per_text=10),
        "scenes_small": lambda seed: Scenes(seed=seed + 2, questions_per_picture=4, canvas=48, **BOTH),
        "scenes_both": lambda seed: Scenes(seed=seed + 3, questions_per_picture=5, **BOTH),
        "scenes_few": lambda seed: Scenes(
            seed=seed + 4, questions_per_picture=8, string_share=0.3, canvas=48, weights=LOOKUPS, **FEW
        ),
        "scenes": lambda seed: Scenes(  # a picture costs as much as ten questions about it
            seed=seed + 5, max_objects=4, questions_per_picture=12, string_share=0.5, weights=QUESTIONS
        ),
        "easy_vqa": lambda seed: EasyVQA(seed=seed + 1),
        "easy_vqa_denials": lambda seed: EasyVQA(kind="denials", seed=seed + 2),
    }


def rates(rate, *parts, **others):
    """{part: peak learning rate}: one for all named parts, and others by name."""
    return dict.fromkeys(parts, rate) | others


def stages(size, smoke):
    """The six stages; `smoke`: a dozen steps of each, which proves the machinery and teaches nothing."""
    steps = dict(tower=260, language=270, align=60, look=210, resolution=30, instruct=345)
    common = dict(optimizer="muon", warmup_steps=20, precision="auto", max_tokens=128)
    if smoke:
        steps, common = dict.fromkeys(steps, 12), common | dict(warmup_steps=2)
    connectors, words = ("bridge", "adapters", "vision_branch"), ("embedding", "language_model")
    return (
        Stage(
            "tower", "contrastive", rates(2e-3, "vision", "text_tower"), {"scenes_names": 7, "easy_vqa_names": 3},
            steps["tower"], batch_size=64, image_size=48, decay_share=0.5,
            summary="tower: of the easy-VQA test, shapes told apart {shape}, colours {color}", **common,
        ),
        Stage(
            "language", "language", rates(2e-3, "language_model", embedding=4e-3),
            {"easy_vqa_texts": 4, "texts": 8}, steps["language"], batch_size=64, image_size=48, packing=True,
            summary="language: questions about described scenes {described}", **common,
        ),
        Stage(
            "align", "language", rates(2e-3, *connectors), {"scenes_small": 7, "easy_vqa": 3},
            steps["align"], batch_size=32, image_size=48, copy_vision_branch=True,
            summary="align: scenes {scenes_new}, easy-VQA {easy_vqa_test}", **common,
        ),
        Stage(
            "look", "language", rates(2e-3, *connectors, *words),
            {"scenes_few": 8, "scenes_small": 1, "easy_vqa": 2.4, "easy_vqa_denials": 0.4, "texts": 1.6, "easy_vqa_texts": 0.6},
            steps["look"], batch_size=48, image_size=48, schedule="constant",
            summary="look: scenes {scenes_new}, easy-VQA {easy_vqa_test}", **common,
        ),
        Stage(
            "resolution", "language", rates(2e-3, *connectors, vision=2e-4), {"scenes_both": 8, "easy_vqa": 2},
            steps["resolution"], batch_size=32,
            summary="resolution: scenes {scenes_new}, easy-VQA {easy_vqa_test}", **common,
        ),
        Stage(
            "instruct", "language", rates(2e-3, *connectors, *words, vision=3e-4),
            {"scenes": 7.2, "scenes_both": 1, "easy_vqa": 2.5, "easy_vqa_denials": 0.4, "texts": 1.4, "easy_vqa_texts": 0.5},
            steps["instruct"], batch_size=36, decay_share=0.7,
            summary="instruct: scenes {scenes_new}, easy-VQA {easy_vqa_test}, reading {scenes_reading}", **common,
        ),
    )  # fmt: skip


def tokenizer():
    """A byte-level BPE trained on the words of the training data: always the same."""
    made = {name: make(0) for name, make in sources().items() if name in ("texts", "scenes_both", "easy_vqa")}
    words = (
        turn.text for source in made.values() for n in range(1000) for talk in source.record(n).conversations for turn in talk
    )
    prompts = "user: \nbot: \nuser: "
    return train_tokenizer([*words, *[prompts] * 1000], VOCABULARY)


RECIPE = Recipe(
    name="nano",
    sizes=tuple(SIZES),
    build=build,
    contrastive=contrastive,
    stages=stages,
    sources=sources(),
    tokenizer=tokenizer,
    decodings={
        "default": Decoding(max_new_tokens=40),
        "describe": Decoding(max_new_tokens=60),
        "sample": Decoding(max_new_tokens=40, do_sample=True, top_p=0.9, temperature=0.7),
        "beams": Decoding(max_new_tokens=40, num_beams=5),
    },
    expected={"language": Expected(text_tokens=69, num_frames=0, num_gpus=1)},  # tokens: counted
    evaluate=nano_tests.evaluate,
    measures=nano_tests.measures,
    exam=nano_tests.exam,
    finish=nano_tests.finish,
    report=nano_tests.report,
    remark="this model has only ever seen drawings of coloured shapes",
)
