"""Models by name, from a hub on this machine: what is fetched, what is not, and what is said without one."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch

from nanovlm import recipes
from nanovlm.published import hub
from nanovlm.published.language import LLAMA
from nanovlm.published.weights import find_file, to_published
from nanovlm.recipes.__main__ import main
from tests.loopback import COMMIT, Hub, serving
from tests.published_folders import language  # noqa: F401

FILES = json.loads((Path(__file__).parents[1] / "golden" / "hub_files.json").read_text())
NOT_BY_NAME = "not fetched by name"


@pytest.fixture
def at_hub(tmp_path, monkeypatch):
    """A hub and an empty cache."""
    monkeypatch.chdir(tmp_path)
    with serving({}, Hub) as server:
        for where in (huggingface_hub.constants, huggingface_hub._snapshot_download, huggingface_hub.file_download):
            for name, value in (("ENDPOINT", server.url), ("HF_HUB_CACHE", str(tmp_path / "cache"))):
                if hasattr(where, name):
                    monkeypatch.setattr(where, name, value)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        yield server


def held(folder):
    """{name: bytes} of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_model_is_loaded_by_its_name(at_hub, language, monkeypatch):
    files = held(language[0])
    at_hub.models["lab/words"] = files | {"pytorch_model.bin": b"unasked", "onnx/model.safetensors": b"x", "paper.pdf": b"x"}
    loaded = recipes.load("lab/words")
    assert all(torch.equal(tensor, loaded.model.decoder.state_dict()[name]) for name, tensor in language[1].state_dict().items())
    fetched = {path.rsplit("/", 1)[1] for path in at_hub.asked if "/resolve/" in path}
    assert fetched == files.keys()
    assert main(["inspect", "lab/words@main"]) == 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(at_hub.asked)
    assert recipes.load("lab/words").tokenizer.vocab_size == 320 and len(at_hub.asked) == asked


def test_bin_files_where_there_are_no_others(at_hub, language):
    torch.save(to_published(LLAMA, language[1].state_dict()), language[0] / "pytorch_model.bin")
    files = {name: content for name, content in held(language[0]).items() if not name.startswith("model")}
    at_hub.models["lab/old"] = files | {"tf_model.h5": b"x"}
    loaded = recipes.load("lab/old").model.decoder.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in language[1].state_dict().items())
    assert (hub.find("lab/old") / "pytorch_model.bin").exists() and not (hub.find("lab/old") / "tf_model.h5").exists()


def test_a_folder_goes_before_a_name_and_one_file_of_a_revision_is_fetched(at_hub):
    Path("lab/words").mkdir(parents=True)
    assert hub.find("lab/words") == Path("lab/words") and hub.find("words") == Path("words") and not at_hub.asked
    at_hub.models["lab/towers"] = {"small.pt": b"1", "large.pt": b"22"}
    path = hub.find("lab/towers@v2:small.pt")
    assert path.read_bytes() == b"1" and not path.with_name("large.pt").exists()
    assert "/api/models/lab/towers/revision/v2" in at_hub.asked and path.parent.name == COMMIT


@pytest.mark.parametrize("place", ["lab/none", "lab/towers:none.pt", "lab/..", "/lab/none", "a/b/c"])
def test_what_is_nowhere_is_one_line(at_hub, place, capsys):
    at_hub.models["lab/towers"] = {"small.pt": b"1"}
    assert main(["inspect", place]) == 1
    assert place in capsys.readouterr().err.splitlines()[-1]


def test_no_hub_is_one_line(at_hub, monkeypatch, capsys):
    at_hub.shutdown()
    at_hub.server_close()
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        assert main(["inspect", "lab/words"]) == 1
        said = capsys.readouterr().err.strip()
        assert "no folder lab/words here" in said and at_hub.url in said and "\n" not in said


LINES = [line for recipe in recipes.RECIPES.values() for line in recipe.weights]


@pytest.mark.parametrize("line", LINES)
def test_every_line_of_weights_is_a_part_and_a_name(at_hub, line):
    """Against the files that these models have; what no name fetches says so."""
    (part, _, name), said = line.split()[0].partition("="), line
    assert part in ("vision", "bridge", "language", "trained")
    if NOT_BY_NAME in said:
        assert hub.find(name) == Path(name) and not at_hub.asked
        return
    model = name.partition(":")[0]
    at_hub.models[model] = {file: b"{}" for file in FILES[model]}
    found = hub.find(name)
    assert (found if found.is_file() else find_file(found)).read_bytes() == b"{}"
    if part == "language":
        tokenizer = ("tokenizer.json", "tokenizer.model", "vocab.json")
        assert any((found / file).exists() for file in tokenizer) and (found / "config.json").exists()
