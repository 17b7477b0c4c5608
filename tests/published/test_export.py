"""LLaVA, BLIP-2 and SmolVLM as transformers saves them: asked, tuned, exported, and loaded there again by the Auto classes."""

import dataclasses
import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import nanovlm
import sample
from nanovlm.data.templates import SMOLVLM
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.generation.chat import Chat
from nanovlm.generation.sampler import Decoding
from nanovlm.recipes.__main__ import main
from parity import perturb
from tests.published_folders import tune, write_talks

transformers = pytest.importorskip("transformers")
S, QUESTION = 28, "what is in the picture?"
WORDS = [f"{QUESTION} a red circle and a blue star. USER: ASSISTANT: Question: Answer:"] * 9
VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14, "image_size": S}
CHAT = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for content in message['content'] %}{% if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_tokenizer():
    """A tokenizer whose last word is the token of a picture, with BOS before every text."""
    from tokenizers.processors import TemplateProcessing

    backend = train_tokenizer(WORDS, 310).backend
    backend.post_processor = TemplateProcessing("<s> $A", None, [("<s>", backend.token_to_id("<s>"))])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def save_llava(folder):
    tokenizer = make_tokenizer()
    text = {"vocab_size": len(tokenizer) + 5, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 6,
            "max_position_embeddings": 128, "model_type": "llama", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = transformers.LlavaConfig(vision_config=VISION | {"model_type": "clip_vision_model"}, text_config=text,
                                      image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=4)
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": S}, crop_size={"height": S, "width": S}, image_std=[0.3] * 3)
    processor = transformers.LlavaProcessor(pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                                            num_additional_image_tokens=1, chat_template=CHAT)
    save(folder, transformers.LlavaForConditionalGeneration(config), processor)


def save_blip2(folder):
    tokenizer = make_tokenizer()
    former = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 3, "encoder_hidden_size": 32,
              "vocab_size": 20, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = {"model_type": "opt", "vocab_size": len(tokenizer) + 5, "hidden_size": 36, "ffn_dim": 56, "num_hidden_layers": 2,
            "num_attention_heads": 4, "word_embed_proj_dim": 36, "max_position_embeddings": 128, "dropout": 0.0, "bos_token_id": 0,
            "eos_token_id": 1, "pad_token_id": 2}
    config = transformers.Blip2Config(vision_config=VISION, qformer_config=former, text_config=text, num_query_tokens=5,
                                      image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    pictures = transformers.BlipImageProcessorPil(size={"height": S, "width": S}, image_mean=[0.4] * 3)
    save(folder, transformers.Blip2ForConditionalGeneration(config), transformers.Blip2Processor(pictures, tokenizer, num_query_tokens=5))


def save_smolvlm(folder):
    pil = pytest.importorskip("transformers.models.idefics3.image_processing_pil_idefics3")
    backend = train_tokenizer([f"{QUESTION} Can you describe this? red green blue User: Assistant:"] * 9, 330).backend
    backend.add_special_tokens([*SMOLVLM.specials])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", pad_token="<pad>",
                                                     eos_token="<end_of_utterance>", unk_token="<s>")  # fmt: skip
    pictures = pil.Idefics3ImageProcessorPil(resample=1, image_mean=[0.5] * 3, image_std=[0.5] * 3,
                                             size={"longest_edge": 4 * S}, max_image_size={"longest_edge": S})  # fmt: skip
    template = json.loads((Path(__file__).parents[1] / "golden/smolvlm_processor_cases.json").read_text())["template"]
    processor = transformers.Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=template)
    text = {"model_type": "llama", "vocab_size": len(tokenizer) + 7, "hidden_size": 40, "intermediate_size": 56,
            "num_hidden_layers": 2, "num_attention_heads": 5, "num_key_value_heads": 1, "max_position_embeddings": 512,
            "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 2}
    config = transformers.Idefics3Config(vision_config=VISION | {"patch_size": 7}, text_config=text, scale_factor=2,
                                         image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    save(folder, transformers.Idefics3ForConditionalGeneration(config), processor, tokenizer.eos_token_id)


def save(folder, model, processor, end=1):
    """Random weights and all files, with a setting of generation that is nobody's default."""
    perturb(model)
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            parameter.data[32:64] = 0  # as published: the keys of EVA have no bias
    model.generation_config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=end, pad_token_id=2, max_new_tokens=9)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


SAVE = {"llava": save_llava, "blip2": save_blip2, "smolvlm": save_smolvlm}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two noisy pictures, one wide and one tall, as files."""
    generator, folder, paths = numpy.random.default_rng(0), tmp_path_factory.mktemp("photos"), []
    for name, size in (("wide", (45, 60)), ("tall", (100, 30))):
        paths.append(folder / f"{name}.png")
        Image.fromarray(generator.integers(0, 256, (*size, 3), numpy.uint8)).save(paths[-1])
    return paths


def saved(name, folder):
    torch.manual_seed(0)
    SAVE[name](folder / "source")
    return folder / "source"


@pytest.fixture(scope="module", params=SAVE)
def source(request, tmp_path_factory):
    """A folder of transformers' (name, Path)."""
    return request.param, saved(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    return saved("smolvlm", tmp_path_factory.mktemp("tiles"))


def same_answer(folder, paths, assistant, **options):
    """transformers, by the classes that the folder names, has our ids, pixels and greedy answer.

    options: of its image processor. Returns: (what it reads, scores of the first new token).
    """
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model, told = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    text, shown = f"Question: {QUESTION} Answer:", [Image.open(path) for path in paths]
    if processor.chat_template:
        content = [*[{"type": "image"}] * len(paths), {"type": "text", "text": QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if shown and model.config.model_type == "idefics3":
        shown = [shown]
    inputs = processor(images=shown or None, text=text, return_tensors="pt", images_kwargs=options)
    chat = Chat(assistant, Decoding(max_new_tokens=8))
    chat.ask(QUESTION, paths)
    image = model.config.image_token_id
    assert [image if id < 0 else id for id in chat.prompt.row.ids] == inputs["input_ids"][0].tolist()
    if paths:
        seen = torch.cat(chat.prompt.visual_inputs)
        torch.testing.assert_close(seen, inputs["pixel_values"].flatten(0, -4), atol=1e-6, rtol=0)
    with torch.no_grad():
        made = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    new = made.sequences[0].tolist()[-len(made.logits):]
    assert chat.answer == [id for id in new if id != assistant.tokenizer.eos] and len(chat.answer) > 3
    return inputs, made.logits[0][0]


def values(folder):
    """What the JSON files of a folder say, but for the version that wrote them."""
    names = ("config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json")
    return {name: json.loads((folder / name).read_text()) | {"transformers_version": 0} for name in names}


@pytest.mark.parametrize("through", ["train", "lora", "convert", "bfloat16"])
def test_asked_tuned_exported_and_loaded(source, photos, through, tmp_path, capsys):
    (name, folder), photo = source, photos[0]
    _, before = same_answer(folder, [photo], nanovlm.load(folder))
    out, exported = tmp_path / "out", tmp_path / "exported"
    if through == "convert":
        assert main(["convert", str(folder), str(out)]) == 0
    else:
        flags = ["--lora", "4", "--set", "instruct.learning_rates.lora=1e-3"] if through == "lora" else []
        assert tune(name, write_talks(tmp_path, photo), out, "--init", folder, *flags,
                    "--set", "instruct.learning_rates.bridge=1e-3") == 0, capsys.readouterr().err
    flags = ["--dtype", "bfloat16"] if through == "bfloat16" else []
    assert main(["convert", "--to", "published", str(out), str(exported), *flags]) == 0
    kept, wanted = values(exported), values(folder)
    wanted["config.json"]["dtype"] = "bfloat16" if through == "bfloat16" else "float32"
    assert kept == wanted
    for other in ("tokenizer.json", "chat_template.jinja"):
        assert not (folder / other).exists() or (exported / other).read_bytes() == (folder / other).read_bytes()
    _, after = same_answer(exported, [photo], nanovlm.load(exported if through == "bfloat16" else out))
    assert torch.allclose(before, after, atol=1e-5) == (through == "convert")


@pytest.mark.parametrize("source", ["llava", "blip2"], indirect=True)
def test_another_picture_size_goes_into_sizes_and_processor(source, photos, tmp_path, capsys):
    """As BLIP-2 is tuned at 364 pixels."""
    (name, folder), data, out = source, write_talks(tmp_path, photos[0]), tmp_path / "out"
    assert tune(name, data, out, "--init", folder, "--set", "instruct.image_size=42") == 0, capsys.readouterr().err
    assert main(["convert", "--to", "published", str(out), str(tmp_path / "exported")]) == 0
    same_answer(tmp_path / "exported", photos[:1], nanovlm.load(out))
    assert nanovlm.load(tmp_path / "exported").image_size == 42


def test_tiles_of_several_pictures_or_none_stay_in_a_chat_and_have_a_cost(smolvlm, photos, capsys):
    assistant = nanovlm.load(smolvlm)
    assert same_answer(smolvlm, photos[:1], assistant)[0]["pixel_values"].shape[1] == 13, "3 x 4 tiles and the whole"
    same_answer(smolvlm, photos, assistant)
    same_answer(smolvlm, [], assistant)
    fewer, _ = same_answer(smolvlm, photos, dataclasses.replace(assistant, tiles=2), size={"longest_edge": 2 * S})
    none, _ = same_answer(smolvlm, photos, dataclasses.replace(assistant, tiles=0), do_image_splitting=False)
    assert (fewer["pixel_values"].shape[1], none["pixel_values"].shape[1]) == (5 + 3, 2)
    with pytest.raises(ValueError, match=r"picture 1 .*tall.png.: cut into 7 x 3 tiles.*--tiles 6"):
        dataclasses.replace(assistant, tiles=7).ask(QUESTION, [photos[1]])
    chat = nanovlm.load(smolvlm).chat(Decoding(max_new_tokens=3))
    chat.ask(QUESTION, photos[:1])
    chat.ask("Can you describe this?")
    assert chat.workspace.num_images == 1 and chat.workspace.num_squares == 13 and chat.prompt.row.ids.count(-1) == 52
    capsys.readouterr()
    for tiles, squares in (([], " in 13 squares"), (["--tiles", "0"], "")):
        flags = ["--image", str(photos[0]), "--max-new-tokens", "3", "--timing", "--device", "cpu", *tiles]
        assert sample.main([str(smolvlm), QUESTION, *flags]) == 0
        images, *_ = capsys.readouterr().err.splitlines()
        assert f"(1 encoded{squares})" in images
    with pytest.raises(SystemExit):
        sample.main([str(smolvlm), QUESTION, "--tiles", "-1"])
