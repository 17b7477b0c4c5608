"""lynx_mini: a frozen language model and a frozen tower, between which a bridge and adapters learn."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from nanovlm import recipes
from nanovlm.data import wordings
from nanovlm.data.batching import build_batch, pixels_of
from nanovlm.data.records import Record, Turn
from nanovlm.data.scene_questions import Scenes, place_of
from nanovlm.data.templates import CHATML, prompt, write
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.generation.sampler import Decoding
from nanovlm.projector import WordProjector
from nanovlm.published.language import LLAMA
from nanovlm.published.tokenizers import load_tokenizer
from nanovlm.published.weights import write_checkpoint
from nanovlm.recipes import RECIPES, lynx_mini, lynx_mini_tests, nano, nano_tests
from nanovlm.training.checkpoint import replace_tensors
from nanovlm.training.stages import freeze
from tests.random_models import randomise, text_batch

RECIPE = RECIPES["lynx_mini"]
WORDS = ["user what color is the star? red", "assistant how many objects are there? 1 yes no"] * 9


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a tiny language model as published and of a tiny nano as train.py wrote it, and the model of both."""
    folder, config = tmp_path_factory.mktemp("parts"), lynx_mini.CONFIGS["tiny"]
    torch.manual_seed(3)
    model = randomise(lynx_mini.build(config))
    (folder / "words").mkdir()
    words = {name: tensor for name, tensor in model.decoder.state_dict().items() if ".adapter." not in name}
    write_checkpoint(folder / "words", LLAMA, words)
    (folder / "words" / "config.json").write_text(json.dumps(config["llm"] | {"model_type": "llama"}))
    tokenizer = train_tokenizer(WORDS, 300).backend
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "words" / "tokenizer.json"))
    (folder / "nano").mkdir()
    whole = nano.build("tiny", 300).state_dict() | {f"vision.{name}": tensor for name, tensor in model.vision.state_dict().items()}
    replace_tensors(folder / "nano" / "model.safetensors", whole)
    (folder / "nano" / "config.json").write_text(json.dumps({"recipe": "nano", "size": "tiny", "image_size": 64}))
    return folder, model


def run(parts, out, *more, code=0):
    init = [f"language={parts[0] / 'words'}", f"vision={parts[0] / 'nano'}"]
    arguments = ["lynx_mini", "--size", "tiny", "--smoke", "--threads", "1", "--device", "cpu", "--out", str(out), "--init", *init, *more]
    assert train.main(arguments) == code


def test_sizes_of_the_real_one():
    with torch.device("meta"):
        model = RECIPE.build("full", 0)
    number = {part: sum(p.numel() for p in held.values()) for part, held in model.parts().items() if held}
    assert number["embedding"] + number["language_model"] == 134_515_008  # SmolLM2-135M's
    adapter = 2 * 576 + 2 * 576 * 64 + 64 + 576 + 1  # norm, down, up, scale
    assert number["adapters"] == 30 * adapter
    words = len(wordings.WORDS)
    assert number["bridge"] == 257 * 4 * words + (4 * 128 + 1) * 256 + words * 576 and model.num_image_tokens(64) == 64
    with torch.device("meta"):
        assert number["vision"] == sum(p.numel() for p in nano.build("full", 512).vision.parameters())


def test_words_alone_are_written_as_the_language_model_was_taught(parts):
    tokenizer, asked = load_tokenizer(parts[0] / "words"), [Turn("user", ("What is it?",))]
    alone = write(prompt(asked, RECIPE.template), tokenizer, []).ids
    assert alone == write(prompt(asked, CHATML), tokenizer, []).ids
    assert write(prompt([Turn("user", (0, "What is it?"))], RECIPE.template), tokenizer, [16]).ids == [-1] * 16 + alone


def test_no_gradient_where_nothing_trains(parts):
    """The tower's features need no graph, and no frozen weight gets a gradient."""
    model, stage = lynx_mini.build(lynx_mini.CONFIGS["tiny"]), RECIPE.stages("tiny", True)[-1]
    tokenizer, source = load_tokenizer(parts[0] / "words"), RECIPE.sources["scenes"](0)
    freeze(model, None, stage)
    batch = build_batch([source.record(n) for n in range(2)], RECIPE.template, tokenizer, model.num_image_tokens, 64, "crop", 256)
    assert not model.vision(batch.pixels).requires_grad and model.encode(batch.pixels, batch.frames)[0].requires_grad
    loss, _ = model.loss(batch)
    loss.backward()
    for part, held in model.parts().items():
        for name, parameter in held.items():
            assert (parameter.grad is not None) == (part in ("bridge", "adapters")), name
            assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


def test_all_stages_from_parts_resumed_and_asked(parts, tmp_path):
    """Stopped and resumed it ends as if in one go; what is frozen is what the files held; the folder opens and answers."""
    folder, model = parts
    run(parts, tmp_path / "whole")
    run(parts, tmp_path / "cut", "--max-minutes", "0.00001", code=0)
    run(parts, tmp_path / "cut", "--resume")
    found, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert found.keys() == again.keys() and all(torch.equal(tensor, again[name]) for name, tensor in found.items())
    frozen = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("vision.")}
    frozen |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith("decoder.") and ".adapter." not in name}
    assert all(torch.equal(found[name], tensor) for name, tensor in frozen.items())
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["held_out_wordings"].keys() == {"easy_vqa_test", "scenes_new"}
    assert results["majority"].keys() == {"easy_vqa_test", "scenes_new", "scenes_unseen_pairs"} <= results.keys()
    assert results["knowledge"].keys() == {"before", "after", "beside a picture"}
    assert (tmp_path / "whole" / "samples.png").exists()
    loaded = recipes.load(tmp_path / "whole")
    assert loaded.template.image_place == "row" and loaded.image_size == 64
    assert isinstance(loaded.ask("Which hue?", [Image.new("RGB", (64, 64), "red")], Decoding(max_new_tokens=3)), str)


def test_beside_a_language_model_the_tower_that_comes_along_is_taken(parts, monkeypatch):
    monkeypatch.setattr(lynx_mini, "folder_of", lambda name: parts[0] / name)
    made = RECIPE.open_init(RECIPE, [f"language={parts[0] / 'words'}"], "tiny", 0).load()
    assert all(torch.equal(tensor, made.vision.state_dict()[name]) for name, tensor in parts[1].vision.state_dict().items())


def test_the_bridge_begins_with_the_words_of_what_stands_in_a_square(monkeypatch):
    """With a word's own channel for embedding, the channels of an image token say which word it is."""
    monkeypatch.setattr(lynx_mini, "PICTURES", 1500)
    monkeypatch.setattr(lynx_mini, "STEPS", 250)
    torch.manual_seed(0)
    words, vision = wordings.WORDS, recipes.load("nano").model.vision
    model = SimpleNamespace(vision=vision, bridge=WordProjector(128, len(words), 2, 4, len(words)),
                            decoder=SimpleNamespace(embedding=torch.nn.Embedding.from_pretrained(torch.eye(len(words)))))
    tokenizer = SimpleNamespace(encode=lambda text: [words.index(text.strip())])
    lynx_mini.begin_with_words(model, tokenizer)
    assert torch.equal(model.bridge.words, torch.eye(len(words)))
    right = {"size": [], "color": [], "shape": [], "place": [], "nothing": []}
    for n in range(60):
        scenes = Scenes("new", seed=3, string_share=0.0)
        record, scene = scenes.record(n), scenes.scene(n)
        with torch.no_grad():
            said = model.bridge(vision(pixels_of(record.visuals, 64, "crop")))[0].unflatten(0, (16, 4)).argmax(-1)
        things = {4 * int(thing.y / 16) + int(thing.x / 16): thing for thing in scene.objects}
        for square, told in enumerate(said):
            told = [words[word] for word in told]
            if square not in things:
                right["nothing"] += [word == "" for word in told]
            elif len(things) == len(scene.objects):
                thing = things[square]
                for kind, word in zip(right, told):
                    right[kind].append(word == (place_of(thing, 64) if kind == "place" else getattr(thing, kind)))
    shares = {kind: sum(found) / len(found) for kind, found in right.items()}
    assert all(share > (0.6 if kind == "place" else 0.75) for kind, share in shares.items()), shares


def test_a_square_says_the_longest_place_and_nothing_of_what_it_is_not_told():
    turns = lambda text: (Turn("user", ("?",)), Turn("assistant", (text,)))
    record = Record("r", (), tuple(map(turns, ("blue ring", "ring", "small ring", "ring at the top right", "brown"))),
                    regions=(*[(0.9, 0.1)] * 4, (0.1, 0.6)))
    said = {square: [wordings.WORDS[word] if word >= 0 else None for word in words]
            for square, words in wordings.said_of(record, 4).items()}
    assert said == {3: ["small", "blue", "ring", "top right"], 8: [None, "brown", None, None]}


def test_no_picture_of_its_tests_has_a_string():
    scenes = [record for name, records in lynx_mini_tests.tests(12).items() if name != "easy_vqa_test" for record in records]
    assert len(scenes) == 24 and all(record.visuals[0].key.split("/")[-2] == "0.0" for record in scenes)
    assert "reading" not in {kind for record in scenes for kind in record.kinds}


def test_a_part_may_be_a_model_that_comes_along():
    language, vision = train.make_parser().parse(["lynx_mini", "--init", "language=elsewhere", "vision=nano"]).init
    assert language == "language=elsewhere" and (Path(vision.removeprefix("vision=")) / "config.json").exists()


def test_a_bridge_that_was_trained_stays_as_it_is(parts, tmp_path):
    run(parts, tmp_path)
    init = [f"language={parts[0] / 'words'}", f"vision={parts[0] / 'nano'}", f"bridge={tmp_path}"]
    made, before = RECIPE.open_init(RECIPE, init, "tiny", 0).load(), load_file(tmp_path / "model.safetensors")
    assert torch.equal(made.bridge.words, before["bridge.words"])
    fresh = RECIPE.open_init(RECIPE, init[:2], "tiny", 0).load()
    assert not torch.equal(fresh.bridge.words, made.bridge.words)


def test_rehearsal_asks_with_and_without_a_picture_and_nothing_of_the_test():
    records = [RECIPE.sources["rehearsal"](0).record(n) for n in range(2 * len(wordings.REHEARSAL))]
    assert [len(record.visuals) for record in records[:4]] == [0, 1, 0, 1]
    asked = {record.conversations[0][0].text for record in records}
    assert len(asked) == len(wordings.REHEARSAL)
    assert not any(question in one for one in asked for question, *_ in lynx_mini_tests.KNOWLEDGE)


@pytest.mark.parametrize("pictures", [0, 3])
def test_an_answer_counts_where_it_stands_as_words(pictures, monkeypatch):
    monkeypatch.setattr(lynx_mini_tests, "KNOWLEDGE", [["Where?", "Paris"], ["How many?", "8", "eight"], ["Who?", "da Vinci"], ["?", "O"]])
    said = ["The capital is PARIS.", "There are 18.", "It was Leonardo da Vinci!", "So it is"]
    shown = []

    def ask(assistant, records, max_new_tokens):
        shown.extend(len(record.visuals) for record in records)
        return [nano_tests.Answer("", 0, "", "", "", text) for text in said]

    monkeypatch.setattr(nano_tests, "ask", ask)
    beside = [RECIPE.sources["scenes"](0).record(n) for n in range(pictures)]
    assert lynx_mini_tests.knows(None, beside) == 0.5 and shown == [int(pictures > 0)] * 4


def test_adapters_scaled_to_nothing_leave_the_language_model_as_it_was(parts):
    model, batch = copy.deepcopy(parts[1]), text_batch([[5, 2, 9, 4]])
    before = model.hidden(batch)
    with lynx_mini_tests.scaled(model, 0):
        without = model.hidden(batch)
    assert torch.equal(model.hidden(batch), before) and not torch.allclose(before, without)
    for layer in model.decoder.layers:
        layer.adapter = torch.nn.Identity()
    assert torch.equal(model.hidden(batch), without)
