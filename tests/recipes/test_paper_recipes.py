"""Lynx, mPLUG-Owl2 and LLaVA-Phi as the papers' tables have them: sizes, stages, what trains, how they answer."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train
from nanovlm import recipes
from nanovlm.published.tokenizers import load_tokenizer
from nanovlm.data.templates import LLAVA_PHI, LYNX, MPLUG_OWL2, PLAIN
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.training.optimizer import groups, lr_factor
from nanovlm.recipes import RECIPES
from nanovlm.recipes.lynx import DATASETS
from nanovlm.published.load import added_tokens
from nanovlm.published.language import complete, with_vocabulary
from nanovlm.recipes.papers import TINY_BATCH
from nanovlm.training.processes import Run

NAMES = ("lynx", "mplug_owl2", "llava_phi")
EVERY = pytest.mark.parametrize("name", NAMES)
TRAINED = {  # spec: counted on the official modules
    ("lynx", "align"): 688_430_224, ("lynx", "resolution"): 1_675_231_504, ("lynx", "instruct"): 688_430_224,
    ("mplug_owl2", "align"): 1_459_443_712, ("mplug_owl2", "instruct"): 8_197_859_328,
    ("llava_phi", "tune_phi"): 2_779_683_840, ("llava_phi", "align"): 9_180_160, ("llava_phi", "instruct"): 3_092_371_456,
}  # fmt: skip


@pytest.fixture(scope="module")
def full():
    """The models at full size, without memory."""
    with torch.device("meta"):
        return {name: RECIPES[name].build("full", 0) for name in NAMES}


def staged(name, stage, size="full", smoke=False):
    """One stage of a recipe."""
    return next(one for one in RECIPES[name].stages(size, smoke) if one.name == stage)


def test_every_stage_is_counted():
    assert {(name, stage.name) for name in NAMES for stage in RECIPES[name].stages("full", False)} == TRAINED.keys()


@pytest.mark.parametrize(("name", "stage"), TRAINED)
def test_parameters_that_a_stage_trains(full, name, stage):
    chosen = groups(full[name].parts(), staged(name, stage))
    assert sum(p.numel() for group in chosen for p in group["params"]) == TRAINED[name, stage]


QFORMER = 12 * (4 * (768**2 + 768) + 2 * 768 * 3072 + 3072 + 768 + 2 * 1536)  # attention to itself, feed-forward, norms
QFORMER += 6 * (2 * (768**2 + 768) + 2 * (1408 * 768 + 768) + 1536)  # attention to the picture, in every other layer
GATED = 2 * 2048 * 512 + 2 * 1024 * 512 + 2 * 2 * 2048 + 2 * 2048 * 8192 + 2  # OpenFlamingo's block: q, o, k, v, norms, gates
PERCEIVER = 6 * (4 * 1024 * 512 + 3 * 2 * 1024 + 2 * 1024 * 4096) + 64 * 1024 + 2 * 1024
BY_HAND = {
    ("llava", "full", "align"): 1024 * 4096 + 4096 + 4096**2 + 4096,
    ("llava", "linear", "align"): 1024 * 4096 + 4096,
    ("llava", "full", "instruct"): 6_738_415_616 + 2 * 64 * 4096 + 1024 * 4096 + 4096 + 4096**2 + 4096,  # LLaMA-7B, 64 words more
    ("blip2", "full", "align"): QFORMER + 1536 + 32 * 768 + 768 * 2560 + 2560,  # last norm, queries, projection
    ("open_flamingo", "full", "instruct"): 24 * GATED + PERCEIVER,
}  # fmt: skip


@pytest.mark.parametrize(("name", "size", "stage"), BY_HAND)
def test_parameters_that_train_by_hand(name, size, stage):
    """From the layers that the papers describe."""
    with torch.device("meta"):
        parts = RECIPES[name].build(size, 0).parts()
    chosen = next(one for one in RECIPES[name].stages(size, False) if one.name == stage)
    assert sum(p.numel() for group in groups(parts, chosen) for p in group["params"]) == BY_HAND[name, size, stage]


def test_where_the_papers_models_differ_from_their_parts(full):
    """Channels of a head, which no count of parameters shows: EVA 88, CLIP 64, LLaMA 128, Phi-2 80; bridges 64."""
    lynx, owl, phi = (full[name] for name in NAMES)
    assert [layer.adapter_width for layer in lynx.decoder.config.layers] == [2048, 0] * 16
    assert len(lynx.vision.blocks) == 39 and lynx.vision.blocks[0].attention.k.bias is None
    assert lynx.num_image_tokens(420) == lynx.num_image_tokens(420, 5) == len(lynx.bridge.latents) == 32
    assert not lynx.bridge.layers[0].attend_to_latents and len(lynx.bridge.frame_embedding) == 5
    assert all(layer.modality_adaptive for layer in owl.decoder.config.layers) and len(owl.decoder.config.layers) == 32
    assert owl.bridge.layers[0].ffn_norm.eps == 1e-6 and owl.bridge.layers[0].norm_ffn.eps == 1e-5
    assert len(phi.vision.blocks) == 24 and phi.vision.config.feature_layer == 23 and phi.decoder.config.num_rotary == 32
    towers, decoders = ([getattr(full[name], part).config for name in NAMES] for part in ("vision", "decoder"))
    assert [tower.width // tower.num_heads for tower in towers] == [88, 64, 64]
    assert [tower.activation for tower in towers] == ["gelu", "quick_gelu", "quick_gelu"]
    assert [one.norm_eps for one in (*towers, *decoders)] == [1e-6, 1e-6, 1e-5] * 2
    assert [decoder.head_width for decoder in decoders] == [128, 128, 80]
    assert all(one.num_kv_heads == one.num_heads and one.context_length == 2048 for one in decoders)
    assert all(one.rope_base == 10_000 and not one.tied_head for one in decoders)
    assert full["lynx"].bridge.layers[0].num_heads == 8 and len(full["lynx"].bridge.layers) == 3
    assert full["mplug_owl2"].bridge.layers[0].num_heads == 16 and len(full["mplug_owl2"].bridge.layers) == 6


def test_lynx_table_8():
    """Hyper-parameters as printed; 5% of warm-up from a tenth of the rate, linear decay to the same tenth."""
    rows = {"align": (100_000, 1536, 1e-4, 1e-5, 224), "resolution": (10_000, 448, 1e-5, 1e-6, 420), "instruct": (20_000, 480, 2e-5, 2e-6, 420)}
    for stage in RECIPES["lynx"].stages("full", False):
        steps, batch_size, rate, floor, image_size = rows[stage.name]
        assert (stage.steps, stage.batch_size, stage.image_size) == (steps, batch_size, image_size)
        assert set(stage.learning_rates.values()) == {rate} and stage.warmup_steps == 0.05 * steps
        assert rate * lr_factor(0, stage) == pytest.approx(floor) == pytest.approx(rate * lr_factor(steps - 1, stage), rel=1e-3)
        assert stage.schedule == "linear" and stage.betas == (0.9, 0.999) and stage.eps == 1e-8 and stage.weight_decay == 0.01
    parts = [set(stage.learning_rates) for stage in RECIPES["lynx"].stages("full", False)]
    assert parts == [{"bridge", "adapters"}, {"bridge", "adapters", "vision"}, {"bridge", "adapters"}]


def test_lynx_table_12():
    """Group totals that the paper's text states, in percent."""
    first, second, third = (stage.mixture for stage in RECIPES["lynx"].stages("full", False))
    assert sum(first.values()) == pytest.approx(100, abs=0.01) == sum(third.values())
    groups = {
        kind: sum(third.get(data["name"], 0) for data in DATASETS if data["kind"] == kind)
        for kind in {data["kind"] for data in DATASETS}
    }
    stated = {"image caption": 1.881, "vqa": 37.165, "classification": 10.953, "video vqa": 5, "video caption": 10,
              "dialog": 10, "text instructions": 25}  # fmt: skip
    for kind, share in stated.items():
        assert groups[kind] == pytest.approx(share, abs=0.01), kind
    assert first.keys() - second.keys() == {"BlipCapFilt", "CC12M", "CC3M"}, "the large noisy pairs"
    joined = {name: second[name] for name in second.keys() - first.keys()}
    assert joined.keys() == {"WebSRC", "TextVQA", "STVQA"}, "table reading and OCR, which the first stage does not have"
    assert all(second[name] == first[name] for name in second if name not in joined)
    sizes = {data["name"]: float(data["size"][:-1]) for data in DATASETS if data["name"] in (*joined, "VQAv2")}
    for name, share in joined.items():  # as many a record as VQAv2's 2.761% of 443.8 thousand
        assert share == pytest.approx(2.761 / 443.8 * sizes[name], abs=1e-3)


def test_lynx_table_9():
    rows = {  # max new tokens, beams, top-p, top-k, length penalty, no repeat n-gram, do sample
        "image_description": (64, 5, 1.0, 1, -2.0, 2, False), "open_vqa_image": (64, 5, 1.0, 1, -2.0, 2, False),
        "video_description": (128, 1, 0.9, 3, 1.0, 3, True), "open_vqa_video": (128, 3, 1.0, 1, -1.0, 3, False),
        "owleval_description": (128, 1, 0.9, 3, 1.0, 3, True), "owleval": (256, 3, 0.9, 3, 1.0, 3, True),
        "visit_bench_description": (128, 1, 0.9, 3, 1.0, 3, True), "visit_bench": (256, 3, 0.9, 3, 1.0, 3, True),
        "mme": (64, 5, 1.0, 1, -2.0, 2, False), "demo": (256, 3, 0.9, 3, 1.0, 3, True),
    }  # fmt: skip
    found = RECIPES["lynx"].decodings
    for name, row in rows.items():
        one = found[name]
        assert (one.max_new_tokens, one.num_beams, one.top_p, one.top_k, one.length_penalty, one.no_repeat_ngram_size,
                one.do_sample) == row  # fmt: skip
        assert one.counts_dummy_token and one.min_new_tokens == 1
    assert found["default"] == found["demo"]


def test_mplug_owl2_settings(full):
    align, instruct = RECIPES["mplug_owl2"].stages("full", False)
    for stage in (align, instruct):
        assert stage.betas == (0.9, 0.98) and stage.eps == 1e-6 and stage.schedule == "cosine" and "vision" in stage.learning_rates
    assert (align.steps, align.batch_size, align.warmup_steps, align.image_size) == (42_500, 8192, 1000, 224)
    assert (instruct.batch_size, instruct.image_size) == (256, 448)
    assert (align.weight_decay, instruct.weight_decay) == (0.05, 0) and align.augmentation == "crop_flip"
    assert set(align.learning_rates) == {"vision", "bridge", "vision_branch"} and align.copy_vision_branch
    rates = {name: group["lr"] for group in groups(full["mplug_owl2"].parts(), align) for name in group["param_names"]}
    for name, depth in (("vision.post_norm.weight", 0), ("vision.blocks.23.fc_1.weight", 1), ("vision.blocks.0.fc_1.weight", 24),
                        ("vision.positions", 25), ("bridge.queries", 0)):  # fmt: skip
        assert rates[name] == pytest.approx(1e-4 * 0.9**depth), name


def test_llava_phi_settings():
    tune, align, instruct = RECIPES["llava_phi"].stages("full", False)
    for stage in (tune, align, instruct):
        assert stage.betas == (0.9, 0.98) and stage.eps == 1e-7 and stage.weight_decay == 0
    assert tune.learning_rates.keys() == {"embedding", "language_model", "lm_head"} and tune.schedule == "linear"
    assert align.learning_rates == {"bridge": 1e-3} and align.batch_size == 256 and align.image_fit == "crop"
    assert set(instruct.learning_rates.values()) == {2e-5} and instruct.batch_size == 128 and instruct.image_fit == "pad"
    assert align.steps * 256 >= 558_128 > (align.steps - 1) * 256 and instruct.steps * 128 >= 665_298 > (instruct.steps - 1) * 128
    found = RECIPES["llava_phi"].decodings
    assert not found["default"].do_sample and not any(one.eos_ids for one in found.values())  # the tokenizer's
    assert [RECIPES[name].template for name in NAMES] == [LYNX, MPLUG_OWL2, LLAVA_PHI]
    assert RECIPES["llava_phi"].stage_templates == {"align": PLAIN}
    run = Run(RECIPES["llava_phi"], *[None] * 10)
    assert run.template_of(staged("llava_phi", "align")) is PLAIN and run.template_of(staged("llava_phi", "instruct")) is LLAVA_PHI


@EVERY
def test_tiny_and_smoke_keep_parts_rates_and_mixtures(name):
    whole, tiny, smoke = (RECIPES[name].stages(*wish) for wish in (("full", False), ("tiny", False), ("tiny", True)))
    for one, small, short in zip(whole, tiny, smoke, strict=True):
        for other in (small, short):
            assert (one.learning_rates, one.mixture, one.layer_decay) == (other.learning_rates, other.mixture, other.layer_decay)
        assert short.steps < small.steps < one.steps and small.image_size < one.image_size
        assert short.batch_size == small.batch_size == TINY_BATCH
    assert all(stage.image_size == one.image_size for stage, one in zip(RECIPES[name].stages("full", True), whole))


def test_released_config_files_mean_the_same_model():
    """mPLUG-Owl2's and LLaVA-Phi's config.json nest the vision side and lay out the language model."""
    for name, vision in (
        ("mplug_owl2", lambda c: {"visual_config": {"visual_model": c["vision"], "visual_abstractor": c["abstractor"]}}),
        ("llava_phi", lambda c: {"vision_config": {"vision_tower": c["vision"], "mm_projector": {"mm_projector_type": "mlp2x_gelu"}}}),
    ):  # fmt: skip
        published = RECIPES[name].published
        config = published.configs["tiny"]
        one, other = published.build(config), published.build(config["llm"] | vision(config))
        assert one.decoder.config == other.decoder.config and one.vision.config == other.vision.config
    with pytest.raises(ValueError, match="mm_projector_type is 'linear'.*only 'mlp2x_gelu'"):
        published.build({"vision_config": {"vision_tower": {}, "mm_projector": {"mm_projector_type": "linear"}}})


@pytest.mark.parametrize(("name", "change", "words"), [
    ("lynx", {"llm": {"hidden_size": 33}}, "33"),
    ("mplug_owl2", {"abstractor": {"grid_size": 9}}, "grid_size is 9"),
    ("mplug_owl2", {"vision": {"hidden_act": "swish"}}, "hidden_act is 'swish'"),
    ("llava_phi", {"vision": {"mm_vision_select_feature": "cls"}}, "'cls' of layer -2.*patch or full or cls_patch"),
    ("llava_phi", {"vision": {"mm_vision_select_layer": [-2]}}, "one layer, like -2"),
    ("llava_phi", {"vision": {"mm_vision_select_layer": -25}}, "feature_layer 0"),
    ("llava_phi", {"llm": {"qk_layernorm": True}}, "qk_layernorm"),
])  # fmt: skip
def test_configs_that_make_no_sense(name, change, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        RECIPES[name].published.build(change)


def test_phi_class_default_is_not_phi_2s():
    """A config that is silent about partial_rotary_factor means half of a head, as PhiConfig has it."""
    published = RECIPES["llava_phi"].published
    sizes = published.configs["tiny"]["llm"]
    with torch.device("meta"):
        assert "partial_rotary_factor" not in sizes and published.build({"llm": sizes}).decoder.config.num_rotary == 8
    assert published.configs["full"]["llm"]["partial_rotary_factor"] == 0.4
    assert complete({"a": {"b": 1}, "c": None, "x": 5}, {"a": {"b": 2, "d": 3}, "c": 4}) == {"a": {"b": 1, "d": 3}, "c": 4, "x": 5}
    assert with_vocabulary({"llm": {"vocab_size": 5}}, 7) == {"llm": {"vocab_size": 7}}
    assert with_vocabulary({"text_config": {"vocab_size": 5}}, 3) == {"text_config": {"vocab_size": 5}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with three pictures, a LLaVA-style file about them, and a tokenizer of its words."""
    folder = tmp_path_factory.mktemp("data")
    items = []
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), color).save(folder / f"{color}.png")
        talk = [{"from": "human", "value": "<image>\nWhich color?"}, {"from": "gpt", "value": color}]
        items.append({"id": f"{number}", "image": f"{color}.png", "conversations": talk})
    items.append({"id": "text", "conversations": [{"from": "human", "value": "Say red."}, {"from": "gpt", "value": "red"}]})
    (folder / "data.json").write_text(json.dumps(items))
    train_tokenizer(["Which color? red green blue Say red. USER: ASSISTANT:"] * 9, 300).save(folder / "tokenizer.json")
    return folder


def init_folder(folder, data, name, image_size):
    """A folder to start from: the tiny model at random, at this picture size."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
    model = RECIPES[name].build("tiny", load_tokenizer(folder, added_tokens(RECIPES[name])).vocab_size)
    model.vision.resize(image_size)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"image_size": image_size}))
    return model


def datasets_file(path, data, name):
    """Every data set that the stages name, all of them the same file, whose questions stay as they are."""
    names = {source for stage in RECIPES[name].stages("tiny", True) for source in stage.mixture}
    entry = {"reader": "llava", "path": str(data / "data.json"), "prompts": ["{question}"]}
    path.write_text(json.dumps(dict.fromkeys(sorted(names), entry)))
    return path


# what no gradient reaches: a clip's frames (the data have none), what the last layer makes of a picture's own place once
# its keys and values are read, and what lies behind the features of LLaVA's tower
UNREACHED = {
    "lynx": ("bridge.frame_embedding",),
    "mplug_owl2": ("decoder.layers.1.norm_2.vision.",),
    "llava_phi": ("vision.blocks.2.", "vision.post_norm."),
}
EVERY_STAGE = [(name, stage.name) for name, recipe in RECIPES.items() if recipe.published for stage in recipe.stages("tiny", True)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), EVERY_STAGE)
def test_a_stage_moves_the_parts_that_it_names_and_no_other(name, stage, data, tmp_path, capsys):
    chosen = staged(name, stage, "tiny", True)
    model = init_folder(tmp_path / "init", data, name, chosen.image_size)
    datasets = datasets_file(tmp_path / "datasets.json", data, name)
    arguments = [name, "--size", "tiny", "--smoke", "--threads", "1", "--stages", stage, "--datasets", str(datasets)]
    assert train.main([*arguments, "--init", str(tmp_path / "init"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    before, after = load_file(tmp_path / "init" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    if chosen.copy_vision_branch:
        model.copy_vision_branch()
        before = model.state_dict()
    for part, parameters in model.parts().items():
        for tensor in parameters:
            moved = not torch.equal(before[tensor], after[tensor])
            if part not in chosen.learning_rates or tensor.startswith(UNREACHED.get(name, ())):
                assert not moved, tensor
            elif not tensor.endswith("k.bias"):  # a softmax hardly feels it, or not at all
                assert moved, tensor
    losses = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in losses) == chosen.steps


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.published])
def test_all_stages_train_and_the_folder_is_asked_about_a_picture(name, data, tmp_path, capsys):
    recipe, stages = RECIPES[name], RECIPES[name].stages("tiny", True)
    init_folder(tmp_path / "init", data, name, stages[0].image_size)
    datasets = datasets_file(tmp_path / "datasets.json", data, name)
    arguments = [name, "--size", "tiny", "--smoke", "--threads", "1", "--device", "cpu", "--datasets", str(datasets)]
    assert train.main([*arguments, "--init", str(tmp_path / "init"), "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    loaded = recipes.load(tmp_path / "out")
    assert loaded.image_size == stages[-1].image_size and loaded.template == recipe.template
    assert loaded.preprocessing == recipe.preprocessing
    question = [str(tmp_path / "out"), "Which color?", "--image", str(data / "red.png"), "--max-new-tokens", "3"]
    assert sample.main(question) == 0, capsys.readouterr().err


@EVERY
def test_what_the_stages_miss_is_listed_at_once(name, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        train.main([name, "--size", "tiny", "--smoke", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().err
    assert left.value.code == 2
    for stage in RECIPES[name].stages("tiny", True):
        assert all(source in printed for source in stage.mixture)
    datasets = datasets_file(tmp_path / "datasets.json", data, name)
    with pytest.raises(SystemExit):
        train.main([name, "--size", "tiny", "--smoke", "--datasets", str(datasets), "--out", str(tmp_path / "out")])
    assert "no tokenizer of its own: give --init FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@EVERY
def test_print_shows_the_full_model_without_making_it(name, full, capsys):
    with pytest.raises(SystemExit) as left:
        train.main([name, "--print", "--stages", "instruct"])
    printed, total = capsys.readouterr().out, sum(p.numel() for p in full[name].parameters())
    assert left.value.code == 0 and f"{total:,}" in printed and f"{TRAINED[name, 'instruct']:,} trained" in printed
    hours = {"lynx": "16.0 hours on 24 A100 by the paper (Table 8)", "llava_phi": "8.0 hours on 8 A100 by the paper (Sec. 3.2",
             "mplug_owl2": "on 64 A100 at 40% of their peak"}[name]  # fmt: skip
    assert hours in printed and all(f"{kind} x" in printed for kind in ("none", "ddp", "fsdp"))
    assert "files   weights and tokenizer" in printed and "language=" in printed
