"""LLaVA and BLIP-2 as transformers saves them: asked, tuned, exported, and loaded there again by the Auto classes."""

import json

import numpy
import pytest
import torch
from PIL import Image

import nanovlm
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


def save(folder, model, processor):
    """Random weights and all files, with a setting of generation that is nobody's default."""
    perturb(model)
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            parameter.data[32:64] = 0  # as published: the keys of EVA have no bias
    model.generation_config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2, max_new_tokens=9)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module", params=["llava", "blip2"])
def source(request, tmp_path_factory):
    """A folder of transformers' (name, Path), and a photograph that is no square."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param) / "source"
    {"llava": save_llava, "blip2": save_blip2}[request.param](folder)
    photo = folder.parent / "photo.png"
    Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (45, 60, 3), numpy.uint8)).save(photo)
    return request.param, folder, photo


def same_answer(name, folder, photo, assistant):
    """transformers, by the classes that the folder names, has our ids, pixels, logits and greedy answer."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model, told = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    if name == "llava":
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        text = f"Question: {QUESTION} Answer:"
    inputs = processor(images=Image.open(photo), text=text, return_tensors="pt")
    chat = Chat(assistant, Decoding(max_new_tokens=8))
    chat.ask(QUESTION, [photo])
    image = model.config.image_token_id
    assert [image if id < 0 else id for id in chat.prompt.row.ids] == inputs["input_ids"][0].tolist()
    torch.testing.assert_close(chat.prompt.visual_inputs[0], inputs["pixel_values"], atol=1e-6, rtol=0)
    with torch.no_grad():
        made = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    new = made.sequences[0].tolist()[-len(made.logits):]
    assert chat.answer == [id for id in new if id != 1] and len(chat.answer) > 3
    return made.logits[0][0]


def values(folder):
    """What the JSON files of a folder say, but for the version that wrote them."""
    names = ("config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json")
    return {name: json.loads((folder / name).read_text()) | {"transformers_version": 0} for name in names}


@pytest.mark.parametrize("through", ["train", "lora", "convert", "bfloat16"])
def test_asked_tuned_exported_and_loaded(source, through, tmp_path, capsys):
    name, folder, photo = source
    before = same_answer(name, folder, photo, nanovlm.load(folder))
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
    after = same_answer(name, exported, photo, nanovlm.load(exported if through == "bfloat16" else out))
    assert torch.allclose(before, after, atol=1e-5) == (through == "convert")


def test_another_picture_size_goes_into_sizes_and_processor(source, tmp_path, capsys):
    """As BLIP-2 is tuned at 364 pixels."""
    name, folder, photo = source
    data = write_talks(tmp_path, photo)
    assert tune(name, data, tmp_path / "out", "--init", folder, "--set", "instruct.image_size=42") == 0, capsys.readouterr().err
    assert main(["convert", "--to", "published", str(tmp_path / "out"), str(tmp_path / "exported")]) == 0
    same_answer(name, tmp_path / "exported", photo, nanovlm.load(tmp_path / "out"))
    assert nanovlm.load(tmp_path / "exported").image_size == 42
