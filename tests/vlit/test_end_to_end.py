"""From photographs and annotations to a trained stage: construct, quality, filter, train.py, each by its command."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from vlit_data import GOLDEN, PHOTOS, lines, vlit

import train
from nanovlm.vlit.annotations import read

TESTS = Path(__file__).parents[1]
ANNOTATIONS = [*PHOTOS, GOLDEN / "caps_boxes.jsonl"]


def stand_ins(folder):
    """The photographs, and for COCO's pictures, which are not here, their boxes: a colour for each category."""
    shutil.copytree(GOLDEN / "photos", folder)
    for picture in read([GOLDEN / "caps_boxes.jsonl"]).pictures.values():
        image = Image.new("RGB", (96, 72), (200, 200, 200))
        for one in picture.of_kind("object"):
            color = tuple(sum(map(ord, one.value)) * prime % 256 for prime in (7, 31, 101))
            ImageDraw.Draw(image).rectangle([side * size for side, size in zip(one.box, image.size * 2)], fill=color)
        image.save(folder / picture.file_name)


@pytest.mark.slow
def test_photographs_and_annotations_become_a_trained_stage(tmp_path, capsys):
    images, made, kept, out = (tmp_path / name for name in ("images", "vlit", "filtered", "trained"))
    stand_ins(images)
    vlit("construct", "--annotations", *ANNOTATIONS, "--images", images, "--out", made, "-n", 2)
    samples = lines(made / "samples.jsonl")
    assert len(samples) > 250 and {item["image"].split("/")[0] for item in samples} == {"..", "marked"}

    with open(made / "samples.jsonl", "a") as file:
        file.writelines([json.dumps(samples[0] | {"id": "again"}) + "\n", '{"id": "broken", \n'])
    vlit("quality", made / "samples.jsonl", "--annotations", *ANNOTATIONS, "--out", tmp_path / "quality")
    assert f"{len(samples) + 1} samples" in capsys.readouterr().out
    flags = ("--annotations", *ANNOTATIONS, "--without-report", "--exact-only")
    vlit("filter", made / "samples.jsonl", "--out", kept, *flags)
    good = lines(kept / "kept.jsonl")
    reasons = [one["reasons"][0].split(":")[0] for one in lines(kept / "dropped.jsonl")]
    assert sorted(reasons) == ["duplicate", "unreadable"] and len(good) == len(samples)

    arguments = (TESTS / "vlit_recipe.py", "--data", kept / "kept.jsonl", "--images", made, "--out", out, "--threads", 1)
    assert train.main(list(map(str, arguments))) == 0
    losses = [entry["loss"] for entry in lines(out / "log.jsonl") if "loss" in entry]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert (out / "model.safetensors").is_file()
