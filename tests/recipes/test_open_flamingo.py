"""OpenFlamingo: its tower under open_clip's names, its sizes, and what is refused; official outputs: tests/official."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nanovlm import recipes
from nanovlm.architecture import architecture
from nanovlm.data.tokenizer import Tokenizer, train_tokenizer
from nanovlm.evaluation import runner
from nanovlm.evaluation.__main__ import parse
from nanovlm.generation import sampler
from nanovlm.published.language import mpt_layout
from nanovlm.published.load import PADDED_ROWS, ready
from nanovlm.published.parts import size_of
from nanovlm.published.vision import OPEN_CLIP_PAIR
from nanovlm.published.weights import plan, prefixed, shapes_of, to_ours, to_published, write_checkpoint
from nanovlm.recipes import open_flamingo
from nanovlm.recipes.__main__ import main
from parity import CLOSE, perturb
from tests.published_folders import tune, write_talks


def test_where_the_cross_attention_stands_and_full_size():
    """Before layers 1 and 3 of 4 for n = 2."""
    layers = open_flamingo.build(open_flamingo.CONFIGS["tiny"]).decoder.layers
    assert [layer.cross_attention is not None for layer in layers] == [False, True, False, True]
    with torch.device("meta"):
        model = open_flamingo.build(open_flamingo.CONFIGS["full"])
    assert sum(p.numel() for p in model.decoder.parameters()) == 1_315_758_080 - 5 * 2048 + sum(
        p.numel() for p in model.parts()["cross_attention"].values()
    )  # OPT-1.3B has 50272 rows, of which its tokenizer knows 50265; two are added to those
    assert model.bridge.num_image_tokens(256) == 64 and model.num_image_tokens(224) == 0
    assert all(layer.cross_attention is not None for layer in model.decoder.layers)  # Table 8: every layer
    with pytest.raises(ValueError, match="'gpt_neox'.*mosaic_gpt"):
        open_flamingo.build({"llm": {"model_type": "gpt_neox"}})


def test_the_tower_in_open_clips_names():
    """CLIP of transformers, spelled as open_clip spells it: its last hidden state without class token and last norm."""
    transformers = pytest.importorskip("transformers")
    config = open_flamingo.CONFIGS["tiny"]
    torch.manual_seed(0)
    theirs = perturb(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config["vision"])))
    model = perturb(open_flamingo.build(config))
    published = to_published(open_flamingo.LAYOUT(config), model.state_dict())
    state = {name.removeprefix("vision_model."): tensor for name, tensor in theirs.state_dict().items()}
    tower = {
        "class_embedding": state["embeddings.class_embedding"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "proj": torch.zeros(32, 16),
    }
    for p in ("weight", "bias"):
        tower |= {f"ln_pre.{p}": state[f"pre_layrnorm.{p}"], f"ln_post.{p}": state[f"post_layernorm.{p}"]}
        for i in range(2):
            ours, there = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            tower |= {
                f"{ours}.attn.in_proj_{p}": torch.cat([state[f"{there}.self_attn.{name}_proj.{p}"] for name in "qkv"]),
                f"{ours}.attn.out_proj.{p}": state[f"{there}.self_attn.out_proj.{p}"],
                f"{ours}.ln_1.{p}": state[f"{there}.layer_norm1.{p}"], f"{ours}.ln_2.{p}": state[f"{there}.layer_norm2.{p}"],
                f"{ours}.mlp.c_fc.{p}": state[f"{there}.mlp.fc1.{p}"], f"{ours}.mlp.c_proj.{p}": state[f"{there}.mlp.fc2.{p}"],
            }  # fmt: skip
    published |= {f"vision_encoder.{name}": tensor for name, tensor in tower.items()}
    model.load_state_dict(to_ours(open_flamingo.LAYOUT(config), published, model.state_dict()))
    pixels = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(model.vision(pixels), theirs(pixels).last_hidden_state[:, 1:], **CLOSE)


@pytest.mark.parametrize("kind, size", [("opt", "full"), ("mosaic_gpt", "mpt1b"), ("mpt", "mpt7b")])
def test_what_a_config_leaves_out_is_as_released(kind, size):
    with torch.device("meta"):
        found, whole = (open_flamingo.build(one) for one in ({"llm": {"model_type": kind}}, open_flamingo.CONFIGS[size]))
    assert found.decoder.config == whole.decoder.config and found.media_token == whole.media_token and found.vision is None


MANIFESTS = [Path(os.environ.get("NANOVLM_SHARED", "absent"), "manifests", f"openflamingo-{name}.json")
             for name in ("3b-vitl-mpt1b", "9b-vitl-mpt7b")]  # fmt: skip


@pytest.mark.skipif(not MANIFESTS[0].exists(), reason="the manifests are in the folder that NANOVLM_SHARED names")
@pytest.mark.parametrize("path", MANIFESTS)
def test_every_tensor_of_the_manifests_in_and_out(path):
    """Whole, in both places where a layer is listed, and as the three files that are published."""
    manifest = json.loads(path.read_text())
    shapes, (size, every) = manifest["tensors"], (("mpt1b", 1) if "mpt1b" in path.name else ("mpt7b", 4))
    with torch.device("meta"):
        model, table = open_flamingo.build(open_flamingo.CONFIGS[size]), open_flamingo.LAYOUT(manifest["config"])
    assert architecture(model, None) == architecture(open_flamingo.RECIPE.published.on_meta(manifest["config"])[0], None)
    ours, unused = shapes_of(model), set(manifest["unused"])
    found = plan(table, shapes, ours)
    found.check(path.name)
    assert found.skipped.keys() == unused
    written = {name: list(tensor.shape) for name, tensor in to_published(table, model.state_dict()).items()}
    assert written == {name: shape for name, shape in shapes.items() if name not in unused}
    assert [layer.cross_attention is not None for layer in model.decoder.layers] == [
        (i + 1) % every == 0 for i in range(len(model.decoder.layers))
    ]
    again = {re.sub(r"transformer.blocks.(\d+).decoder_layer", r"old_decoder_blocks.\1", name): shape for name, shape in shapes.items()}
    again = {re.sub(r"transformer.blocks.(\d+).gated_cross_attn_layer", r"gated_cross_attn_layers.\1", name): shape
             for name, shape in again.items()}
    assert len(again.keys() - shapes.keys()) in (manifest["second_places"]["num"], manifest["second_places"]["num"] - 1)
    head = {"lang_encoder.lm_head.weight": shapes["lang_encoder.transformer.wte.weight"]}  # transformers' MPT lists it
    for both in (again | head, shapes | again | head):
        plan(table, both, ours).check("second places")

    files, filled = manifest["files"], set()
    hub = {name: shape for name, shape in files["language_model"]["tensors"].items()}
    decoder = {name: shape for name, shape in ours.items() if name.startswith("decoder.")}
    language = plan(prefixed(mpt_layout({}), ours="decoder."), hub, decoder, ("decoder.embedding.weight",))
    vision = plan(prefixed(OPEN_CLIP_PAIR, ours="vision."), files["vision"]["tensors"],
                  {name: shape for name, shape in ours.items() if name.startswith("vision.")})
    trained = plan(table, files["trained"]["tensors"], ours)
    for one in (language, vision, trained):
        one.check(path.name, partly=True)
        filled |= one.filled().keys()
    assert filled == ours.keys() and "decoder.embedding.weight" in trained.filled()
    assert language.resized.keys() == {"decoder.embedding.weight"} and language.resized["decoder.embedding.weight"][1][0] == 50280


@pytest.mark.parametrize("wrap", [
    lambda tensors: tensors,
    lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    lambda tensors: {"model_state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}, "epoch": 3},
])  # fmt: skip
def test_the_three_published_files_become_one_model(tmp_path, wrap):
    state, trained, (vision, language, file) = three_files(tmp_path, wrap)
    bare = recipes.load(language).model.decoder  # MPT by itself
    assert bare.config.qk_norm and torch.equal(bare.layers[1].ffn.fc_2.weight, state["decoder.layers.1.ffn.fc_2.weight"])
    flags = ["--family", "open_flamingo", "--size", "tiny_mpt", "--vision", str(vision), "--language", str(language)]
    assert main(["convert", *flags, str(file), str(tmp_path / "out")]) == 0
    loaded = recipes.load(tmp_path / "out")
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.model.state_dict().items())
    assert loaded.model.media_token == loaded.tokenizer.special_id("<image>")
    assert loaded.tokenizer.special_id("<|endofchunk|>") == loaded.model.media_token - 1
    assert main(["convert", "--to", "published", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert trained.keys() < back.keys() and all(torch.equal(back[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize("size", [["--size", "tiny_mpt"], []])
def test_training_starts_from_the_three_files(tmp_path, size):
    """With the size named, or told by the language model's own config.json; what is frozen is what the files hold."""
    state, _, (vision, language, file) = three_files(tmp_path)
    Image.new("RGB", (28, 28), "red").save(tmp_path / "a.png")
    init = ["--init", f"vision={vision}", f"language={language}", f"trained={file}"]
    data = write_talks(tmp_path, "a.png")
    assert tune("open_flamingo", data, tmp_path / "out", *size, *init, "--set", "instruct.image_size=28") == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    moved = {name for name in found if not torch.equal(found[name], state[name])}
    assert found.keys() == state.keys() and moved
    assert all(name.startswith("bridge.") or ".cross_attention." in name for name in moved)
    assert max(float((found[name] - state[name]).abs().max()) for name in moved) < 0.01


def test_the_size_is_told_by_the_language_model(tmp_path):
    hub = {"vocab_size": 50368, "no_bias": True, "max_seq_len": 2048}
    for size, sizes in {"mpt1b": {"model_type": "mosaic_gpt", "d_model": 2048, "n_heads": 16, "n_layers": 24},
                        "mpt7b": {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32},
                        "full": {"model_type": "mpt", "d_model": 1024, "n_heads": 32, "n_layers": 32}}.items():  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(hub | sizes))
        assert size_of(open_flamingo.CONFIGS, {"language": tmp_path}, "full") == size
    assert open_flamingo.RECIPE.stages("full", False) == open_flamingo.RECIPE.stages("mpt1b", False)
    (stage,) = open_flamingo.RECIPE.stages("mpt1b", False)
    assert set(stage.learning_rates) == {"bridge", "cross_attention"}  # freeze_lm_embeddings is True
    assert stage.steps * stage.batch_size == 158_000 * 6 and stage.warmup_steps == 1000


def test_inspect_finds_the_size_of_a_trained_file(tmp_path, capsys):
    """Without config.json, by what fits: the embedding's and the cross-attention's widths."""
    with torch.device("meta"):
        model = open_flamingo.build(open_flamingo.CONFIGS["tiny_mpt"])
    trained = {name: torch.zeros(tensor.shape) for name, tensor in to_published(
        open_flamingo.LAYOUT(open_flamingo.CONFIGS["tiny_mpt"]), model.state_dict()).items() if "decoder_layer" not in name}  # fmt: skip
    torch.save(trained, tmp_path / "checkpoint.pt")
    assert main(["inspect", str(tmp_path / "checkpoint.pt")]) == 0
    told = capsys.readouterr().out
    assert "family   open_flamingo" in told and "d_model 48" in told and "no place" not in told and "missing  language_model" in told


def three_files(tmp_path, wrap=lambda tensors: tensors):
    """MPT as on the hub, with spare rows; open_clip's file with its text side; and what was trained.

    Returns: (our tensors, the trained ones under their published names, the files' paths).
    """
    config = open_flamingo.CONFIGS["tiny_mpt"]
    torch.manual_seed(0)
    model, words = perturb(open_flamingo.build(config)), {}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if name.startswith("decoder.") and "cross_attention" not in name:
            words[name.removeprefix("decoder.")] = tensor
    words["embedding.weight"] = torch.randn(530, 48)
    language, tower = tmp_path / "mpt-1b", tmp_path / "open_clip.pt"
    language.mkdir()
    write_checkpoint(language, mpt_layout(config["llm"]), words)
    assert "transformer.blocks.0.ln_1.weight" in load_file(language / "model.safetensors")  # MPT-1B's names
    train_tokenizer(["a red circle and a blue star"] * 9, 300).save(language / "tokenizer.json")
    clip = {n.removeprefix("vision."): t for n, t in state.items() if n.startswith("vision.")}
    torch.save(to_published(OPEN_CLIP_PAIR, clip) | {"visual.proj": torch.zeros(32, 8), "logit_scale": torch.ones(()),
               "transformer.resblocks.0.ln_1.weight": torch.ones(8), "token_embedding.weight": torch.ones(3, 8)}, tower)  # fmt: skip
    trained = {name: tensor for name, tensor in to_published(open_flamingo.LAYOUT(config), state).items()
               if name.startswith("perceiver.") or "gated_cross_attn_layer." in name or "wte" in name}
    (language / "config.json").write_text(json.dumps(config["llm"] | {"vocab_size": 530}))
    torch.save(wrap(trained), tmp_path / "checkpoint.pt")
    return state, trained, (tower, language, tmp_path / "checkpoint.pt")


@pytest.fixture(scope="module")
def assistant():
    tokenizer = train_tokenizer(["Question:what? Short answer:a red one Output:a blue one"] * 9, 300)
    tokenizer.backend.add_special_tokens(["<|endofchunk|>", "<image>"])
    tokenizer, recipe = Tokenizer(tokenizer.backend), open_flamingo.RECIPE
    return ready(recipe.build("tiny_mpt", tokenizer.vocab_size), tokenizer, recipe, recipe.template, (), PADDED_ROWS)


ASKED = {  # benchmark: its files, what an answer is cut from, what is left
    "textvqa_own": ({"TextVQA_0.5.1_val.json": {"data": [
        {"question_id": n, "image_id": "i", "question": f"what {n}?", "answers": ["red"] * 10} for n in range(4)
    ]}}, "blue, or green Question: x", "blue"),
    "coco_caption": ({"captions_val2014.json": {
        "images": [{"id": n, "file_name": "i.jpg"} for n in range(4)],
        "annotations": [{"image_id": n, "caption": f"a red {n}"} for n in range(4)],
    }}, "a cat, asleepOutput: a dog", "a cat, asleep"),
}  # fmt: skip
ROWS = {  # (benchmark, shots): the first prompt
    ("textvqa_own", 2): "<image>Question:what 0? Short answer:red<|endofchunk|>\n<image>Question:what 1? Short answer:red<|endofchunk|>\n"
                        "<image>Question:what 2? Short answer:",
    ("textvqa_own", 0): "Question:what 0? Short answer:red<|endofchunk|>\nQuestion:what 1? Short answer:red<|endofchunk|>\n"
                        "<image>Question:what 2? Short answer:",
    ("coco_caption", 1): "<image>Output:a red 0<|endofchunk|>\n<image>Output:",
    ("coco_caption", 0): "Output:a red 0<|endofchunk|>\nOutput:a red 1<|endofchunk|>\n<image>Output:",
}  # fmt: skip


@pytest.mark.parametrize("task, shots", ROWS)
def test_prompts_shots_and_beams_of_its_evaluation_script(assistant, task, shots, tmp_path, monkeypatch):
    """As open_flamingo/eval writes them: shots with their pictures; without any, two examples whose pictures are gone."""
    files, said, left = ASKED[task]
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    Image.new("RGB", (28, 28), "red").save(tmp_path / "i.jpg")
    seen, generate = [], sampler.generate

    def spy(model, prompts, decoding, inputs, *rest):
        seen.append((prompts, decoding, inputs))
        generate(model, prompts, decoding, inputs, *rest)
        return [assistant.tokenizer.encode(said)] * len(prompts)

    monkeypatch.setattr(sampler, "generate", spy)
    flags = ["--model", "x", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--shots", str(shots)]
    runner.run(parse([task, *flags]), assistant)
    (prompts, decoding, inputs), *_ = seen
    names = {assistant.tokenizer.special_id(name): name for name in ("<image>", "<|endofchunk|>")}
    pieces = [names.get(id) or assistant.tokenizer.decode([id]) for id in prompts[0]]
    assert prompts[0][0] == assistant.tokenizer.bos and "".join(pieces[1:]) == ROWS[task, shots]  # this tokenizer adds BOS
    assert len(inputs[0]) == shots + 1 and assistant.tokenizer.special_id("<|endofchunk|>") in decoding.eos_ids
    assert (decoding.num_beams, decoding.length_penalty) == (3, 0.0)
    assert decoding.max_new_tokens == {"textvqa_own": 5, "coco_caption": 20}[task]
    answers = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[1:]]
    assert {one["prediction"] for one in answers} == {left} and len(answers) == 4 - (shots or 2)
