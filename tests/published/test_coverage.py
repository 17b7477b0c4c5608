"""Every tensor of 24 published checkpoints has its place; a manifest that is spoiled in any way is refused by name."""

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanovlm import recipes
from nanovlm.recipes.__main__ import main
from nanovlm.published.inspect import recognise
from nanovlm.published.weights import to_published

MANIFESTS = json.loads(gzip.decompress((Path(__file__).parents[1] / "golden/manifests/manifests.json.gz").read_bytes()))
TOTALS = {"lynx": 8_413_647_120, "mplug-owl2-llama2-7b": 8_197_859_328, "llava-phi": 3_092_371_456,
          "llava-1.5-7b-hf": 7_063_427_072, "blip2-opt-2.7b": 3_744_761_856, "llama-2-7b": 6_738_415_616,
          "smolvlm-256m-instruct": 256_484_928, "smolvlm-500m-instruct": 507_482_304}  # fmt: skip


def run(tmp_path, manifest, capsys):
    """Exit code and what was printed."""
    path = tmp_path / "manifest.json"
    path.write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    code = main(["inspect", str(path)])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def numbers_of(printed, words):
    """The first whole number behind some words."""
    return int(re.search(rf"{words}\s+([\d,]+)", printed)[1].replace(",", ""))


@pytest.mark.parametrize("name", MANIFESTS)
def test_published_checkpoints_are_recognised_and_covered(tmp_path, capsys, name):
    manifest = MANIFESTS[name]
    code, printed = run(tmp_path, manifest, capsys)
    assert code == 0, printed
    total = sum(math.prod(shape) for shape in manifest["tensors"].values())
    assert total == manifest["total_params"] == TOTALS.get(name, total)
    assert numbers_of(printed, "parameters of the file") == numbers_of(printed, "parameters of the model") == total
    assert "note" not in printed
    skipped = sum(map(int, re.findall(r"not read (\d+) tensors", printed)))
    assert skipped == len(manifest["computed_or_extra_tensors"])
    assert f"{len(manifest['tensors']) + skipped:,} tensors" in printed
    assert recognise(MANIFESTS[name]["tensors"]) == MANIFESTS[name]["family"]


def one_of_each(manifest):
    """One name of every kind of tensor: of names that differ in their numbers alone, the last."""
    return {re.sub(r"\d+", "#", name): name for name in manifest["tensors"]}.values()


SPOILS = {
    "renamed": lambda tensors, name: tensors.update({f"{name}_": tensors.pop(name)}),
    "missing": lambda tensors, name: tensors.pop(name),
    "extra": lambda tensors, name: tensors.update({f"{name}.extra": [1]}),
    "longer": lambda tensors, name: tensors.update({name: [n + 1 for n in tensors[name]] or [2]}),
    "deeper": lambda tensors, name: tensors.update({name: [1, *tensors[name]]}),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("name", ["smollm2-135m", "siglip-base-patch16-224-vision", "clip-vit-large-patch14-full", "lynx"])
def test_every_kind_of_tensor_is_watched(tmp_path, capsys, name, spoil):
    for tensor in list(one_of_each(MANIFESTS[name]))[:: 6 if name != "lynx" else 24]:
        tensors = dict(MANIFESTS[name]["tensors"])
        SPOILS[spoil](tensors, tensor)
        code, printed = run(tmp_path, MANIFESTS[name] | {"tensors": tensors}, capsys)
        assert code == 1 and "likely cause" in printed and re.sub(r"\d+", "@", tensor).split("@")[-1] in printed


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda m: m | {"family": "llame"}, "Did you mean 'llama'"),
    (lambda m: m | {"family": 3}, "unknown family '3'"),
    (lambda m: m | {"config": m["config"] | {"hidden_size": 577}}, "multiple"),
    (lambda m: m | {"config": m["config"] | {"num_hidden_layers": 31}}, "missing"),
    (lambda m: m | {"config": m["config"] | {"vocab_size": None}}, "embed_tokens"),
    (lambda m: m | {"config": m["config"] | {"num_hidden_layers": "30"}}, "num_hidden_layers is '30'"),
    (lambda m: m | {"config": []}, "config"),
    (lambda m: m | {"tensors": list(m["tensors"])}, "tensors"),
    (lambda m: m | {"tensors": m["tensors"] | {"model.norm.weight": [576.0]}}, "model.norm.weight"),
    (lambda m: m | {"tensors": {}}, "another family"),
    (lambda m: m | {"computed_or_extra_tensors": {"surprise": [3]}}, "surprise"),
    (lambda m: [m], "no JSON object"),
    (lambda m: "", "not JSON"),
    (lambda m: "[" * 100_000, "not JSON"),
])  # fmt: skip
def test_bad_manifests_are_refused_in_words(tmp_path, capsys, spoil, words):
    code, printed = run(tmp_path, spoil(MANIFESTS["smollm2-135m"]), capsys)
    assert code == 1 and words in printed and "Traceback" not in printed


@pytest.mark.parametrize("config", [{"vision": 3}, {"llm": [1]}, {"vision_config": {"image_size": "x"}, "llm": {"hidden_size": -1}}])
def test_nonsense_configs_end_without_a_traceback(tmp_path, capsys, config):
    for family in recipes.FAMILIES:
        code, printed = run(tmp_path, {"family": family, "config": config, "tensors": {"x": [1]}}, capsys)
        assert code == 1 and "Traceback" not in printed


def test_unknown_commands_get_a_suggestion(capsys):
    assert main(["inspekt"]) == 2 and "Did you mean 'inspect'" in capsys.readouterr().err
    assert main(["--help"]) == 0 and "convert" in capsys.readouterr().out


def test_computed_tensors_may_be_among_the_tensors(tmp_path, capsys):
    manifest = MANIFESTS["llama-2-7b"]
    tensors = manifest["tensors"] | manifest["computed_or_extra_tensors"]
    code, printed = run(tmp_path, manifest | {"tensors": tensors, "computed_or_extra_tensors": {}}, capsys)
    assert code == 0 and "not read 32 tensors: rotary angles" in printed


def test_inspect_tells_what_a_file_holds_and_lacks(tmp_path, capsys):
    published = recipes.FAMILIES["lynx"]
    config = published.configs["full"] | {"llm": dict(published.configs["tiny"]["llm"]), "vision": published.configs["tiny"]["vision"]}
    model = published.build(published.configs["tiny"])
    tensors = to_published(published.layout(config), model.state_dict())
    tensors = {name: tensor.half() for name, tensor in tensors.items() if "bridge" in name or "adapter" in name}
    save_file(tensors, tmp_path / "finetune_lynx.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(published.configs["tiny"] | {"model_type": "lynx"}))
    assert main(["inspect", str(tmp_path / "finetune_lynx.safetensors")]) == 0
    printed = capsys.readouterr().out
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".adapter." in name)
    assert "family   lynx" in printed and f"float16 ({len(tensors)})" in printed
    assert re.search(rf"part     adapters +{adapters:,} parameters", printed)
    assert re.search(r"missing  vision", printed) and re.search(r"missing  language_model", printed)
    assert "EVA" in printed and "no place" not in printed


@pytest.mark.parametrize(("tensors", "words"), [
    ({name: [1] for name in MANIFESTS["phi-2"]["tensors"]}, ("family   phi", "unknown without config.json")),
    ({"something": [1]}, ("family   unknown",)),
])  # fmt: skip
def test_inspect_without_config_reads_the_names(tmp_path, capsys, tensors, words):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)


def test_the_model_that_comes_along_is_found_by_its_name(tmp_path, capsys):
    assert main(["inspect", "nano"]) == 0
    printed = capsys.readouterr().out
    assert "family   nano" in printed and "no published model" in printed and "missing" not in printed
    assert main(["convert", "nano", str(tmp_path / "out")]) == 1 and "our layout already" in capsys.readouterr().err
    assert main(["convert", "--to", "published", "nano", str(tmp_path / "out")]) == 1 and not (tmp_path / "out").exists()
    assert "nobody's published model" in capsys.readouterr().err
