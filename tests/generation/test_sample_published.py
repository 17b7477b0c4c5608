"""sample.py on published models' own files: layout, shards, half precision and presets as they are, only the sizes small."""

import io
import re
import sys

import pytest
import torch
from PIL import Image

import sample
from nanovlm import recipes
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.recipes.__main__ import main
from parity import perturb
from published_folders import WORDS, language, lynx_file  # noqa: F401  a fixture

VOCABULARY, IMAGE, PAD = 512, 320, 321


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
    stream = sample.Chat.ask
    monkeypatch.setattr(sample.Chat, "ask", lambda chat, *args: asked.append(chat) or stream(chat, *args))
    out, err = run(capsys, folder, "what is in the picture?", "--image", files[0], "--greedy", "--max-new-tokens", "12", "--timing")
    last = asked[0].last
    ids = torch.tensor([[IMAGE if token == -1 else token for token in last.row.ids]])
    assert (ids == IMAGE).sum() == 9
    with torch.no_grad():
        made = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=last.visual_inputs[0],
                               max_new_tokens=12, do_sample=False, pad_token_id=PAD)  # fmt: skip
    want = made[0, ids.shape[1] :].tolist()
    assert last.answer == want[: len(last.answer)] and len(last.answer) >= 11, "an end token at most is left out"
    assert out.strip() == asked[0].assistant.tokenizer.decode(last.answer).strip()
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
        assert "(1 encoded)" in err and "tokens/s" in err
        assert vars(seen[-1]) == vars(preset) | {"max_new_tokens": 3}
    out, _ = run(capsys, folder, "what is it?", "--image", files[0], "--describe-first", "--max-new-tokens", "3")
    assert out.startswith("(description: ")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hello\n/image {files[0]}\nwhat?\n/video {files[1]}\nand this?\n/exit\n"))
    _, err = run(capsys, folder, "--max-new-tokens", "2", "--num-beams", "2", "--timing")
    assert "(2 encoded)" in err, "pictures come at any turn, and each is encoded once"
