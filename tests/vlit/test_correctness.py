"""Rules, votes, matching degree and grounding, by hand and on COCO pictures that GPT-4 was asked about."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
import torch
from PIL import Image
from safetensors.torch import save_file
from vlit_data import Says, item, lines, write_lines

from nanovlm.contrastive import ContrastiveModel, TextTower
from nanovlm.data.images import to_pixels
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.recipes.recipe import from_file
from nanovlm.training.start import build_models
from nanovlm.training.stages import text_side
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlit import annotations
from nanovlm.vlit.correctness import Facts, Thing, facts_of, known, verify
from nanovlm.vlit.indicators import Helpers, Settings, grounding_precision, judge_pairs, majority
from nanovlm.vlit.matching import BEGIN, END, load_encoder, own_encoder
from nanovlm.vlit.replies import Recorded
from nanovlm.vlit.samples import sample

TINY = Path(__file__).parents[1] / "tiny_recipe.py"
SHARED = os.environ.get("NANOVLM_SHARED")


def thing(words, box=None):
    return Thing(words, frozenset(words.split()), box)


BOXES = {"small red star": (0.0, 0.1, 0.2, 0.3), "big blue circle": (0.6, 0.5, 0.9, 0.8),
         "small blue star": (0.4, 0.7, 0.5, 0.9)}  # fmt: skip
SCENE = Facts(tuple(thing(name, box) for name, box in BOXES.items()), frozenset((*BOXES, "big red square")))
KITCHEN = Facts(
    (thing("person"), thing("person"), thing("cup"), Thing("car", frozenset(("car", "red")))),
    frozenset(("person", "cup", "dog", "car", "wine glass", "cell phone")), crowds=frozenset(("bottle",)),
)  # fmt: skip
FRUIT = Facts((thing("orange"), thing("cup")), frozenset(("orange", "cup")))
CROWD = Facts((thing("person"),), frozenset(("person", "dog")), crowds=frozenset(("person", "dog")))


RULES = {  # what is known -> (question, answer, verdict)
    "kitchen": (KITCHEN, (
        ("Are there any people in the image?", "Yes, there are two.", True), ("Is there a dog?", "Yes, asleep.", False),
        ("Is there a dog?", "No, there is no dog.", True), ("Is there a dog on the table?", "Yes.", False),
        ("Is there a dog on the table?", "No.", True),
        ("Is there a cup on the table?", "Yes.", None),  # a cup is there, the table is not noted
        ("Is there a unicorn?", "Yes.", None),  # nobody looked for it
        ("Do you see any wine glasses?", "No.", True), ("Is there a cup?", "It is on the table.", None),
        ("Are there two people?", "Yes.", True), ("Are there three people?", "No, there are two people.", True),
        ("Is there one person?", "No.", None),  # one of the two is one, and is not all
        ("How many people are there?", "There are two people.", True), ("How many dogs are there?", "None.", True),
        ("How many people are visible in the image?", "Three of them.", False), ("How many cups?", "1", True),
        ("How many people are there?", "Several.", None), ("What color is the car?", "The car is red.", True),
        ("What colour is the car?", "Blue.", False), ("Describe it.", "A red car.", True),
        ("Describe it.", "A green car.", False),
        ("What color is the cup?", "White.", None), ("Describe it.", "A brown cup.", None),  # no colour was noted
        ("Is it raining?", "Yes, but there is no rain.", False),  # contradicts itself
    )),
    "scene": (SCENE, (
        ("how many objects are there?", "3", True), ("how many red objects are there?", "2", False),
        ("is there a red circle?", "yes", False), ("is there not a red circle?", "yes", None),
        ("is there no blue star?", "no", None), ("what color is the circle?", "blue", True),
        ("what shape is the red object?", "star", True), ("what is the red shape?", "circle", False),
        ("where is the circle?", "bottom right", True), ("where is the circle?", "top right", False),
        ("where is the star?", "left", None),  # there are two
        ("is the red star left of the blue circle?", "yes", True),
        ("is the red star right of the blue circle?", "no", True),
        ("what is left of the blue circle?", "red star", True), ("what is above the red star?", "blue circle", False),
        ("what is above the red star?", "red square", False),  # there is none
        ("is the circle big or small?", "small", False), ("describe the image.", "a nice drawing", None),
        ("list the objects.", "red star, blue circle, blue star", True),
        ("list the objects.", "red star, red circle", False),
    )),
    "fruit": (FRUIT, [("What color is the orange?", "Green.", None)]),
    "crowd": (CROWD, (
        ("How many dogs are there?", "None.", None), ("Are there two people?", "No.", None),
        ("How many people are there?", "One.", None), ("Are there people?", "Yes.", True),
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    facts, cases = RULES[name]
    for question, answer, verdict in cases:
        assert verify(question, answer, facts) is verdict, (question, answer)


def about(image, id="1", question="Is there a dog?", answer="Yes."):
    return sample(item(id, f"<image>{question}", answer, image=image))


def test_facts_from_files(tmp_path):
    boxes = [{"id": id, "image": image, "captions": [], "instances": [{"category": name, "bbox": [0, 0, 1, 1]}]}
             for id, image, name in (("000000000042", "000000000042.jpg", "dog"), ("7", "x/7.jpg", "cup"))]  # fmt: skip
    facts = facts_of(annotations.read([write_lines(tmp_path / "boxes.jsonl", boxes)]).pictures.values())
    dog = known(about("train2014/COCO_train2014_000000000042.jpg"), facts)
    assert verify("Is there a dog?", "Yes.", dog) is True
    assert verify("Is there a zebra?", "Yes.", dog) is False  # COCO's annotators looked for all of its 80 categories
    assert known(about("7.jpg"), facts).things[0].name == "cup"
    assert known(about("8.jpg"), facts) is known(about(["7.jpg", "42.jpg"]), facts) is None


@pytest.mark.skipif(not SHARED, reason="the COCO annotations are in the folder that NANOVLM_SHARED names")
def test_real_counts_against_cocos_boxes():
    """Of five "how many" answers by GPT-4, four agree with the boxes and one does not: three people, seven boxes."""
    folder = Path(SHARED, "data", "llava_eval")
    facts = facts_of(annotations.read([folder / "table" / "caps_boxes_coco2014_val_80.jsonl"]).pictures.values())
    found = {one["image"]: verify(one["instruction"], one["output"], known(about(one["image"]), facts))
             for one in lines(folder / "playground/coco2014_val_gpt4_qa_30x3.jsonl") if "ow many" in str(one)}  # fmt: skip
    assert len(found) == 5 and list(found.values()).count(True) == 4
    assert found["COCO_val2014_000000515716.jpg"] is False


def test_votes_and_grounding(tmp_path):
    replies = iter([["Yes", "yes.", "No"], ["Yes", "No", "hm"], ["?", "", "maybe"], ["No!", "no", "No"]])
    says = Says(lambda chat, n: next(replies))
    helpers = Helpers(judge=Recorded(says, tmp_path / "replies.jsonl"), describe=lambda sample: "a red car")
    votes = judge_pairs([(about("a.png"), "q", answer) for answer in "abcd"], helpers, ".", Settings(votes=3))
    assert votes == [[True, True, False], [True, False, None], [None] * 3, [False] * 3]
    assert list(map(majority, votes)) == [True, None, None, False]
    assert "About the picture: a red car" in says.asked[0].messages[-1][1]
    assert grounding_precision("Two people, a dog and a unicorn with wine glasses.", KITCHEN) == 1 / 3
    assert grounding_precision("A nice day.", KITCHEN) is None
    assert grounding_precision("A bottle.", Facts((), frozenset(("bottle",)), frozenset(("bottle",)))) == 1.0


@pytest.fixture(scope="module")
def encoder():
    tokenizer = train_tokenizer(["a red star. a blue circle. yes no"] * 5, 280)
    text = TextTower(tokenizer.vocab_size, 16, 1, 2, 32, context_length=12)
    return own_encoder(ContrastiveModel(ViT(ViTConfig(16, 8, 16, 1, 2, 32)), 16, text, 16, 8).eval(), tokenizer, 16)


def test_matching_degree_by_its_definition(encoder, tmp_path):
    pictures = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    texts = ["a red star", "a blue circle"]
    images, words = encoder.images(pictures), encoder.texts(texts)
    # of several pictures the closest
    closest = [100 * (images[:1] @ words[0]).max().item(), 100 * (images[1:] @ words[1]).max().item()]
    assert encoder.match([pictures[:1], pictures[1:]], texts) == pytest.approx(closest, abs=1e-4)
    # batches and padding change nothing
    assert torch.allclose(encoder.texts(["yes"])[0], encoder.texts(["yes", texts[1]])[0], atol=1e-6)
    # what is too long is cut into sentences, whose cosines are averaged
    sentences = ["a red star.", "a blue circle.", "yes no."]
    mean = 100 * (images[0] @ encoder.texts(sentences).T).amax(0).mean().item()
    assert encoder.match([pictures[:1]], [" ".join(sentences)])[0] == pytest.approx(mean, abs=1e-4)
    assert encoder.texts(["a red star " * 30]).shape == (1, 8)  # one sentence: cut behind, end kept


TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "hidden_act": "quick_gelu"}  # fmt: skip
CLIP_CONFIG = {
    "model_type": "clip", "projection_dim": 8,
    "vision_config": TOWER | {"image_size": 16, "patch_size": 8},
    "text_config": TOWER | {"vocab_size": 300, "max_position_embeddings": 12, "eos_token_id": 299, "bos_token_id": 298,
                            "pad_token_id": 299},
}  # fmt: skip


def clip_tokenizer(path):
    """A byte-level BPE with CLIP's two special tokens at the end of its 300 rows."""
    words, levels = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel
    words.pre_tokenizer = levels()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=257, initial_alphabet=levels.alphabet(), show_progress=False)
    words.train_from_iterator(["the red star"], trainer)
    words.add_tokens([f"<{n}>" for n in range(words.get_vocab_size(), 298)])
    words.add_special_tokens([BEGIN, END])
    words.save(str(path))


@pytest.mark.slow
def test_matching_degree_is_what_transformers_computes(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    reference = transformers.CLIPModel(transformers.CLIPConfig(**CLIP_CONFIG)).eval()
    for parameter in reference.parameters():  # as they come, all similarities are alike
        torch.nn.init.normal_(parameter, std=0.3)
    reference.save_pretrained(tmp_path)
    clip_tokenizer(tmp_path / "tokenizer.json")
    encoder, picture, text = load_encoder(tmp_path), Image.new("RGB", (16, 16), (200, 40, 90)), "a star"
    with torch.no_grad():
        told = reference(input_ids=torch.tensor([encoder.ids(text)]), pixel_values=to_pixels(picture, 16)[None])
    expected = 100 * (told.image_embeds @ told.text_embeds.T).item()
    assert encoder.name == "MD" and encoder.match([[picture]], [text])[0] == pytest.approx(expected, abs=1e-3)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace(BEGIN, "<s>"))
    with pytest.raises(ValueError, match="not CLIP's"):
        load_encoder(tmp_path)


def test_the_towers_of_a_model_trained_here(tmp_path):
    """The folder as train.py leaves it: the ViT in the model's file, the text tower beside it."""
    recipe = from_file(TINY)
    size, tokenizer = recipe.sizes[0], recipe.tokenizer()
    model, towers = build_models(recipe, size, tokenizer.vocab_size, 3)
    model.vision.resize(16)
    config = {"recipe": str(TINY), "size": size, "image_size": 16, "stages": {"align": {"image_fit": "pad"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer.save(tmp_path / "tokenizer.json")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no text tower"):
        load_encoder(tmp_path, TINY)
    save_file(text_side(towers), tmp_path / "text_tower.safetensors")
    encoder, picture = load_encoder(tmp_path, TINY), Image.new("RGB", (20, 10), (220, 30, 30))
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode("red"), tokenizer.eos]])
    with torch.no_grad():
        words = towers.embed_texts(ids, torch.tensor([ids.shape[1]]))
        expected = 100 * (towers.views(to_pixels(picture, 16, "pad")[None])[0] @ words.T).max().item()
    assert encoder.name == "MD (own encoder)"
    assert encoder.match([[picture]], ["red"])[0] == pytest.approx(expected, abs=1e-4)
