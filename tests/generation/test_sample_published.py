"""sample.py on published models' own files: layout, shards, half precision and presets as they are, only the sizes small."""

import io
import json
import re
import sys

import pytest
import torch
from PIL import Image

import nanovlm
import sample
from nanovlm import recipes
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.generation.chat import Chat
from nanovlm.generation.sampler import Decoding, generate
from nanovlm.recipes.__main__ import main
from parity import perturb
from published_folders import WORDS, language, lynx_file  # noqa: F401  a fixture

VOCABULARY, IMAGE, PAD = 512, 320, 321
CHATML_TEXT = "{% for one in messages %}<|im_start|>{{ one.role }}\n{{ one.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}…"


@pytest.fixture
def files(tmp_path):
    """A picture and a clip of three frames: (path, path)."""
    shown = [Image.effect_mandelbrot((90, 70), (-2, -1.5, 1 + shift, 1.5), 100).convert("RGB") for shift in (0, 1, 2)]
    shown[0].save(tmp_path / "photo.png")
    shown[0].save(tmp_path / "clip.gif", save_all=True, append_images=shown[1:])
    return str(tmp_path / "photo.png"), str(tmp_path / "clip.gif")


@pytest.fixture
def llava(tmp_path):
    """A folder as transformers writes it, in float16 and several shards, and transformers' own model from it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, patch_size=14, image_size=42)
    text = dict(vocab_size=VOCABULARY, hidden_size=96, intermediate_size=160, num_hidden_layers=4, num_attention_heads=6,
                max_position_embeddings=512, pad_token_id=PAD)  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision | {"model_type": "clip_vision_model"},
                                      text_config=text | {"model_type": "llama"}, image_token_index=IMAGE)  # fmt: skip
    perturb(transformers.LlavaForConditionalGeneration(config)).half().save_pretrained(tmp_path / "llava", max_shard_size="300KB")
    train_tokenizer(WORDS, 320).save(tmp_path / "llava" / "tokenizer.json")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", dtype=torch.float32)
    theirs.generation_config = transformers.GenerationConfig()
    return tmp_path / "llava", theirs.eval()


def run(capsys, *arguments, code=0):
    """sample.py's (stdout, stderr)."""
    assert sample.main([*map(str, arguments)]) == code
    return capsys.readouterr()


def test_a_llava_folder_answers_as_transformers_does(llava, files, capsys, monkeypatch):
    folder, theirs = llava
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").exists()
    asked = []
    stream = Chat.stream
    monkeypatch.setattr(Chat, "stream", lambda chat, *args: asked.append(chat) or stream(chat, *args))
    out, err = run(capsys, folder, "what is in the picture?", "--image", files[0], "--greedy", "--max-new-tokens", "12", "--timing")
    chat = asked[0]
    ids = torch.tensor([[IMAGE if token == -1 else token for token in chat.prompt.row.ids]])
    assert (ids == IMAGE).sum() == 9
    with torch.no_grad():
        made = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=chat.prompt.visual_inputs[0],
                               max_new_tokens=12, do_sample=False, pad_token_id=PAD)  # fmt: skip
    want = made[0, ids.shape[1] :].tolist()
    assert chat.answer == want[: len(chat.answer)] and len(chat.answer) >= 11, "an end token at most is left out"
    assert out.strip() == asked[0].assistant.tokenizer.decode(chat.answer).strip()
    images, prompt, decoding = err.splitlines()
    assert "(1 encoded)" in images and f"({ids.shape[1]} tokens)" in prompt
    assert re.fullmatch(r"decoding +\d+\.\d+ s  \(12 tokens, \d+\.\d tokens/s\)", decoding)
    for more in (("--fast",), ("--dtype", "bfloat16"), ("--dtype", "float16"), ("--preset", "demo", "--seed", "3")):
        flags = ("--image", files[0], "--max-new-tokens", "4", *more)
        assert run(capsys, folder, "what is in the picture?", *flags)[0].strip()
    assert {asked[n].assistant.model.decoder.embedding.weight.dtype for n in (1, 2, 3)} == {torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.slow
def test_a_lynx_answers_by_every_preset_of_table_9(files, language, tmp_path, capsys, monkeypatch):  # noqa: F811
    path, _ = lynx_file(tmp_path)
    folder = tmp_path / "lynx"
    assert main(["convert", "--family", "lynx", "--size", "tiny", str(path), str(folder)]) == 0
    train_tokenizer(WORDS, 320).save(folder / "tokenizer.json")
    capsys.readouterr()
    presets = recipes.RECIPES["lynx"].decodings
    assert {"open_vqa_image", "video_description", "mme", "owleval", "visit_bench", "demo", "released"} <= set(presets)
    seen = []
    choose = sample.choose_decoding
    monkeypatch.setattr(sample, "choose_decoding", lambda *args: seen.append(choose(*args)) or seen[-1])
    for name, preset in presets.items():
        show = ("--video", files[1], "--frames", "3") if "video" in name else ("--image", files[0])
        _, err = run(capsys, folder, "what is it?", *show, "--preset", name, "--max-new-tokens", "3", "--timing")
        assert ("(1 encoded in 3 squares)" if "video" in name else "(1 encoded)") in err and "tokens/s" in err
        assert vars(seen[-1]) == vars(preset) | {"max_new_tokens": 3}
    out, _ = run(capsys, folder, "what is it?", "--image", files[0], "--describe-first", "--max-new-tokens", "3")
    assert out.startswith("(description: ")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hello\n/image {files[0]}\nwhat?\n/video {files[1]}\nand this?\n/exit\n"))
    _, err = run(capsys, folder, "--max-new-tokens", "2", "--num-beams", "2", "--timing")
    assert "(2 encoded in " in err, "pictures come at any turn, and each is encoded once"


@pytest.mark.parametrize("template", ["", CHATML_TEXT])
def test_a_language_model_alone_answers_in_words(files, tmp_path, capsys, template):
    """A LLaMA that transformers saved: it goes on with the text, or answers in its own chat form if that is one of ours."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                                      bos_token_id=0, eos_token_id=2)  # fmt: skip
    theirs = perturb(transformers.LlamaForCausalLM(config)).eval()
    theirs.save_pretrained(tmp_path / "llama")
    tokenizer = train_tokenizer(WORDS, 320).backend
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    loaded, question = nanovlm.load(tmp_path / "llama"), "what is in the picture?"
    chat = loaded.chat()
    text = chat.ask(question)
    start, end = loaded.tokenizer.special_id("<|im_start|>"), loaded.tokenizer.special_id("<|im_end|>")
    words = [loaded.tokenizer.encode(text) for text in (f"user\n{question}", "\n", "assistant\n")]
    ids = [start, *words[0], end, *words[1], start, *words[2]] if template else chat.prompt.row.ids
    assert chat.prompt.row.ids == ids and loaded.tokenizer.decode(ids).endswith("assistant\n" if template else question)
    made = theirs.generate(input_ids=torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0,
                           eos_token_id=[loaded.tokenizer.eos, *[end] * bool(template)])[0, len(ids):].tolist()  # fmt: skip
    assert chat.answer == made[: len(chat.answer)] and len(chat.answer) >= len(made) - 1 > 0
    assert generate(loaded.model, [ids], Decoding(max_new_tokens=len(chat.answer))) == [chat.answer]
    assert loaded.ask([question, question]) == [text, text] and chat.ask("and now?") is not None
    assert run(capsys, tmp_path / "llama", question)[0] == text + "\n"
    with pytest.raises(ValueError, match="no vision tower"):
        loaded.ask(question, images=[files[0]])
    assert "no vision tower" in run(capsys, tmp_path / "llama", question, "--image", files[0], code=2)[1]
    with pytest.raises(ValueError, match="no vision tower"):
        generate(loaded.model, [ids], Decoding(), [[torch.zeros(1, 3, 8, 8)]])
