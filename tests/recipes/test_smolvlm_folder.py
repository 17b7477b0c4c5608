"""A SmolVLM that transformers saved, with its processor: asked, tuned, exported and loaded there again."""

import dataclasses
import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import nanovlm
import sample
import train
from nanovlm.attention import causal_rows
from nanovlm.data.templates import SMOLVLM
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.generation.chat import Chat
from nanovlm.generation.sampler import Decoding
from nanovlm.recipes.__main__ import main
from parity import perturb
from tests.published_folders import write_talks

TEMPLATE = json.loads((Path(__file__).parents[1] / "golden/smolvlm_processor_cases.json").read_text())["template"]
S, QUESTION = 32, "What is in this image?"
SIZES = {"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What save_pretrained writes of a tiny model and of its processor."""
    transformers = pytest.importorskip("transformers")
    pil = pytest.importorskip("transformers.models.idefics3.image_processing_pil_idefics3")
    folder = tmp_path_factory.mktemp("smolvlm")
    backend = train_tokenizer([f"{QUESTION} Can you describe this? red green blue User: Assistant:"] * 9, 330).backend
    backend.add_special_tokens([*SMOLVLM.specials])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", pad_token="<pad>",
                                                     eos_token="<end_of_utterance>", unk_token="<s>")  # fmt: skip
    pictures = pil.Idefics3ImageProcessorPil(resample=1, image_mean=[0.5] * 3, image_std=[0.5] * 3,
                                             size={"longest_edge": 4 * S}, max_image_size={"longest_edge": S})  # fmt: skip
    processor = transformers.Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=TEMPLATE)
    text = SIZES | {"model_type": "llama", "vocab_size": len(tokenizer) + 7, "num_key_value_heads": 1,
                    "max_position_embeddings": 512, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    vision = SIZES | {"hidden_size": 32, "num_attention_heads": 4, "patch_size": 4, "image_size": S}
    torch.manual_seed(0)
    theirs = perturb(transformers.Idefics3ForConditionalGeneration(transformers.Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=4)))
    theirs.generation_config.eos_token_id = tokenizer.eos_token_id
    theirs.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two noisy pictures, one wide and one tall, as files."""
    generator, folder, paths = numpy.random.default_rng(0), tmp_path_factory.mktemp("photos"), []
    for name, size in (("wide", (40, 60)), ("tall", (100, 30))):
        paths.append(folder / f"{name}.png")
        Image.fromarray(generator.integers(0, 256, (*size, 3), numpy.uint8)).save(paths[-1])
    return paths


def theirs_of(folder):
    """transformers' processor and model of a folder, by the classes that it names itself."""
    transformers = pytest.importorskip("transformers")
    return (transformers.AutoProcessor.from_pretrained(folder),
            transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval())


def same_answer(theirs, assistant, paths, question=QUESTION, **options):
    """The same ids, pixels and greedy answer; options: of their image processor. Returns: what both read, and the answer."""
    processor, model = theirs
    content = [*[{"type": "image"}] * len(paths), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    shown = [[Image.open(path) for path in paths]] if paths else None
    inputs = processor(text=text, images=shown, return_tensors="pt", images_kwargs=options)
    chat = Chat(assistant, Decoding(max_new_tokens=10))
    chat.ask(question, paths)
    image = assistant.tokenizer.special_id("<image>")
    assert [image if id == -1 else id for id in chat.prompt.row.ids] == inputs["input_ids"][0].tolist()
    if paths:
        torch.testing.assert_close(torch.cat(chat.prompt.visual_inputs), inputs["pixel_values"][0], atol=1e-6, rtol=0)
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert chat.answer == [id for id in made if id != assistant.tokenizer.eos] and len(chat.answer) > 3
    return inputs, chat


def test_it_is_asked_as_transformers_asks(folder, photos):
    theirs, assistant = theirs_of(folder), nanovlm.load(folder)
    assert same_answer(theirs, assistant, photos[:1])[0]["pixel_values"].shape[1] == 13, "3 x 4 tiles and the whole"
    same_answer(theirs, assistant, photos)
    same_answer(theirs, assistant, [])
    fewer = same_answer(theirs, dataclasses.replace(assistant, tiles=2), photos, size={"longest_edge": 2 * S})[0]
    none = same_answer(theirs, dataclasses.replace(assistant, tiles=0), photos, do_image_splitting=False)[0]
    assert (fewer["pixel_values"].shape[1], none["pixel_values"].shape[1]) == (5 + 3, 2)


def test_the_picture_stays_in_a_chat_and_is_encoded_once(folder, photos):
    chat = nanovlm.load(folder).chat(Decoding(max_new_tokens=3))
    chat.ask(QUESTION, photos[:1])
    chat.ask("Can you describe this?")
    assert chat.workspace.num_images == 1 and chat.workspace.num_squares == 13 and chat.prompt.row.ids.count(-1) == 52


def test_sample_says_what_tiles_cost(folder, photos, capsys):
    for tiles, squares in (([], " in 13 squares"), (["--tiles", "0"], "")):
        flags = ["--image", str(photos[0]), "--max-new-tokens", "3", "--timing", "--device", "cpu", *tiles]
        assert sample.main([str(folder), QUESTION, *flags]) == 0
        images, prompt, _ = capsys.readouterr().err.splitlines()
        assert f"(1 encoded{squares})" in images and f"({97 if squares else 21} tokens)" in prompt
    with pytest.raises(SystemExit):
        sample.main([str(folder), QUESTION, "--tiles", "-1"])


def test_more_tiles_than_there_are_marks_for_are_refused_with_the_picture_and_the_number(folder, photos):
    with pytest.raises(ValueError, match=r"picture 1 .*tall.png.: cut into 7 x 3 tiles.*--tiles 6"):
        dataclasses.replace(nanovlm.load(folder), tiles=7).ask(QUESTION, [photos[1]])


def test_tuned_and_exported_it_loads_there(folder, photos, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    flags = ["--stages", "instruct", "--set", "instruct.batch_size=2", "--epochs", "2", "--threads", "1", "--device", "cpu"]
    assert train.main(["smolvlm", "--init", str(folder), "--data", str(write_talks(tmp_path, *photos)), "--out", str(out), *flags]) == 0
    assert main(["convert", "--to", "published", str(out), str(back)]) == 0
    capsys.readouterr()
    tuned, theirs = nanovlm.load(out), theirs_of(back)
    assert tuned.tiles == 4 and not torch.equal(tuned.model.bridge.mlp.weight, nanovlm.load(folder).model.bridge.mlp.weight)
    inputs, chat = same_answer(theirs, tuned, photos)
    with torch.no_grad():
        expected = theirs[1](**inputs).logits[0, -1]
    row = chat.prompt.row.ids
    embeddings = tuned.model.embed(torch.tensor([row]), tuned.model.encode(torch.cat(chat.prompt.visual_inputs), torch.tensor([13, 9])),
                                   [0, 1])
    positions = torch.arange(len(row))[None]
    hidden = tuned.model.decoder(embeddings, positions, causal_rows(1, len(row)), None)
    torch.testing.assert_close(tuned.model.decoder.logits(hidden[0, -1]), expected, atol=1e-5, rtol=1e-5)
