"""Other data sets in the two forms that training reads: every schema, every trap, and what is reported."""

import base64
import json

import pytest

from nanovlm.data import images
from nanovlm.data.__main__ import main
from nanovlm.data.datasets import LlavaJson
from nanovlm.data.tar_shards import TarShards
from vlit_data import asked, lines, png


def encoded(shade):
    return base64.b64encode(png(shade)).decode()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def convert(tmp_path, kind, source, *flags, out="out.jsonl"):
    """Items and report of a conversion: a list of dict; of (end of the place, "skipped" or "changed", reason)."""
    main(["convert", kind, str(source), str(tmp_path / out), *map(str, flags)])
    return lines(tmp_path / out), report(tmp_path, out)


def report(tmp_path, out):
    entries = lines((tmp_path / out).with_suffix(".report.jsonl"))
    return [(entry["where"].rpartition(", ")[2], *list(entry.items())[1]) for entry in entries]


def told(said, *facts):
    """Whether a report says this: (end of the place, what happened, words of the reason), one by one."""
    found = [(where, kind, fact if fact in reason else reason) for (where, kind, reason), (*_, fact) in zip(said, facts)]
    return len(said) == len(facts) and found == list(facts)


def turns(*said):
    return [{"from": speaker, "value": value} for speaker, value in said]


def test_sharegpt(tmp_path):
    rounds = asked("one?", "1") + asked("two?", "2")
    given = [
        ("whole", rounds), ("starts", turns(("bing", "hello")) + rounds), ("ends", rounds + turns(("user", "three?"))),
        ("empty", rounds + turns(("human", "three?"), ("gpt", " ")) + rounds), ("twice", rounds[:2] + rounds[1:]),
        ("system", turns(("system", "Be brief.")) + rounds), ("none", turns(("gpt", "hello"))),
        ("odd", turns(("narrator", "once"), ("gpt", "a"))), ("u2028", asked("a\u2028b", "c")),
        ("names", turns(("user", "one?"), ("chatgpt", "1"), ("human", "two?"), ("assistant", "2"))),
    ]  # fmt: skip
    source = write(tmp_path / "in.json", "\n".join(json.dumps({"id": id, "conversations": said}, ensure_ascii=False)
                                                   for id, said in given))
    items, said = convert(tmp_path, "sharegpt", source)
    same = dict.fromkeys(("whole", "starts", "ends", "empty", "names"), rounds)
    system = [{"from": "human", "value": "Be brief.\n\none?"}, *rounds[1:]]
    assert {item["id"]: item["conversations"] for item in items} == same | {
        "twice": rounds[:2], "u2028": asked("a\u2028b", "c"), "system": system}
    assert told(
        said, ("line 2", "changed", "begins with the assistant"), ("line 3", "changed", "ends with a question"),
        ("line 4", "changed", "before turn 6"), ("line 5", "changed", "before turn 3"), ("line 6", "changed", "system"),
        ("line 7", "changed", "begins with the assistant"), ("line 7", "skipped", "no question with an answer"),
        ("line 8", "skipped", "turn 1: unknown speaker 'narrator'"))  # fmt: skip


def test_llava_and_its_traps(tmp_path):
    write(tmp_path / "pictures" / "sub" / "a.png", "x")
    given = [
        {"id": 1, "image": "sub/a.png", "conversations": asked("<image>\nwhat?", "a")},
        {"id": "2", "image": "sub/a.png", "conversations": asked("what?\n<image>", "a"), "kind": "colour"},
        {"id": 3, "conversations": asked("hi", "hello")},
        {"id": 4, "image": "sub/a.png", "conversations": asked("<image><image>", "a")},
        {"id": 5, "image": "a.png", "conversations": asked("<image>", "a")},
        {"conversations": asked("no id", "a")},
        {"id": 7, "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"id": 8, "messages": [{"role": "user", "content": [{"type": "image", "image": "sub/a.png"}, {"type": "text", "text": "hi"}]},
                               {"role": "assistant", "content": "hello"}]},
    ]
    source = write(tmp_path / "in.json", json.dumps(given, indent=2))
    items, said = convert(tmp_path, "llava", source, "--images", tmp_path / "pictures")
    assert items[:3] == given[:3] and items[3]["conversations"] == given[5]["conversations"]
    assert items[4:] == [{"id": 7, "conversations": asked("hi", "hello")},
                         {"id": 8, "image": ["sub/a.png"], "conversations": asked("<image>hi", "hello")}]
    assert items[3]["id"].startswith(f"{source}, line ") and items[3]["id"].endswith("item 6")
    assert told(said, ("item 4", "skipped", "2 placeholder(s) <image> in the human turns but 1 image(s)"),
                ("item 5", "skipped", f"picture {tmp_path / 'pictures' / 'a.png'} is missing"))
    assert len(LlavaJson(tmp_path / "out.jsonl", tmp_path / "pictures")) == 6


MIMIC = {
    "LA_1": {"instruction": "first?", "answer": "1", "image_ids": ["p1"], "rel_ins_ids": ["LA_2", "LA_3"]},
    "LA_2": {"instruction": "second?", "answer": "2", "image_ids": ["p1"], "rel_ins_ids": ["LA_1"]},
    "LA_3": {"instruction": "other?", "answer": "3", "image_ids": ["p2", "p1"], "rel_ins_ids": []},
    "DC_1": {"instruction": "film?", "answer": "4", "image_ids": ["p1", "p2"], "rel_ins_ids": []},
    "LA_4": {"instruction": "lost?", "answer": "5", "image_ids": ["p9"], "rel_ins_ids": []},
    "LA_5": {"instruction": "lost?", "answer": "6", "image_ids": ["p1"], "rel_ins_ids": ["LA_9"]},
    "LA_6": {"instruction": " ", "answer": "7", "image_ids": ["p1"], "rel_ins_ids": []},
}


def mimic(tmp_path, **changes):
    source = write(tmp_path / "LA_instructions.json", {"meta": {"version": "1"}, "data": MIMIC})
    pictures = {"p1": f"data:image/png;base64,{encoded(1)}", "p2": encoded(2), "bad": "!!", "cut": encoded(3)[:60], "odd": 3}
    return source, write(tmp_path / "LA.json", pictures | changes)


def test_mimic_it_with_and_without_examples_in_front_and_after_a_kill(tmp_path):
    source, pictures = mimic(tmp_path)
    items, said = convert(tmp_path, "mimic-it", source, "--images", pictures)
    assert [item["id"] for item in items] == ["LA_1", "LA_3", "DC_1"]
    first, second = items[0]["image"][0], items[1]["image"][0]
    assert items[0]["conversations"] == asked("<image>\nfirst?", "1") + asked("second?", "2")
    assert items[1]["conversations"] == asked("<image>\n<image>\nother?", "3") and items[1]["image"] == [second, first]
    assert items[2]["conversations"] == asked("<video>\nfilm?", "4") and items[2]["video"] == [[first, second]]
    assert "image" not in items[2]
    made = LlavaJson(tmp_path / "out.jsonl", tmp_path / "out_images", num_frames=2)
    for record in map(made.record, range(3)):
        shades = [image.getpixel((0, 0))[0] for visual in record.visuals for image in map(images.load, visual.frames)]
        assert shades == {"LA_1": [1], "LA_3": [2, 1], "DC_1": [1, 2]}[record.id]
    assert told(
        said, ("key 'bad'", "changed", "no base64"), ("key 'cut'", "changed", "damaged or cut short"),
        ("key 'odd'", "changed", "found 3"), ("key 'LA_1'", "changed", "other pictures are left out"),
        ("key 'LA_4'", "skipped", f"picture 'p9' is not in {pictures}"), ("key 'LA_5'", "skipped", "record 'LA_9' is not"),
        ("key 'LA_6'", "skipped", "field 'instruction' is empty"))  # fmt: skip
    items, said = convert(tmp_path, "mimic-it", source, "--images", pictures, "--in-context", 1, out="b.jsonl")
    assert items[0]["conversations"] == [
        *asked("<image>\n<image>\nother?", "3"), *asked("<image>\nfirst?", "1"), *asked("second?", "2")]
    assert items[0]["image"] == [*items[1]["image"], items[1]["image"][1]]
    assert not any("left out" in reason for *_, reason in said)
    write(tmp_path / "c.jsonl.tmp", "half")  # what a kill left
    write(tmp_path / "c_images.tmp" / "ab" / "half.png", "half")
    items, _ = convert(tmp_path, "mimic-it", source, "--images", pictures, out="c.jsonl")
    assert len(items) == 3 and not list(tmp_path.glob("*.tmp"))
    assert len(list((tmp_path / "c_images").rglob("*.png"))) == 2


def test_m3it_in_all_its_spellings(tmp_path):
    given = [
        {"instruction": "Answer.", "inputs": "what?", "outputs": "a", "image_base64_str": [encoded(1), encoded(2)]},
        {"instruction": "Describe.", "inputs": "", "outputs": "b", "image": f"data:image/png;base64,\n{encoded(1)}\n"},
        {"instruction": "Old.", "input": "x", "output": "c", "img_str": encoded(1), "id": "old"},
        {"instruction": "Text.", "inputs": "x", "outputs": "d", "image_base64_str": []},
        {"instruction": "No.", "inputs": "x", "image_base64_str": []},
        {"instruction": "No.", "inputs": "x", "outputs": "e", "image_base64_str": ["@"]},
    ]
    text = "\n".join(map(json.dumps, given)) + '\n{"instruction": "a", "instruction": "b"}\n{"cut": '
    source = write(tmp_path / "train.jsonl", text)
    items, said = convert(tmp_path, "m3it", source)
    one, two = items[0]["image"]
    assert [item["conversations"] for item in items] == [
        asked("<image>\n<image>\nAnswer.\nwhat?", "a"), asked("<image>\nDescribe.", "b"), asked("<image>\nOld.\nx", "c"),
        asked("Text.\nx", "d")]
    assert [item.get("image") for item in items] == [[one, two], [one], [one], None] and items[2]["id"] == "old"
    assert images.load(tmp_path / "out_images" / two).getpixel((0, 0)) == (2, 0, 0)
    assert len(list((tmp_path / "out_images").rglob("*.png"))) == 2, "each once"
    assert told(
        said, ("line 5", "skipped", "'outputs' or 'output' is missing; found 'instruction', 'inputs'"),
        ("line 6", "skipped", "no base64"), ("line 7", "skipped", "key 'instruction' stands twice in one object"),
        ("line 8", "skipped", "malformed JSON: Expecting value: line 1 column 8"))  # fmt: skip
    assert not list(tmp_path.glob("*.tmp"))


def test_minigpt4(tmp_path):
    source = write(tmp_path / "filter_cap.json", {"annotations": [{"image_id": n, "caption": f"c{n}"} for n in "123456789"]})
    items, _ = convert(tmp_path, "minigpt4", source)
    assert items[0] == {"id": "1", "image": "image/1.jpg", "conversations": asked("<image>\nDescribe the image in detail.", "c1")}
    prompts = write(tmp_path / "alignment.txt", "###Human: <Img><ImageHere></Img> Say it. ###Assistant: \n\n"
                                                "###Human: <Img><ImageHere></Img> Tell me. ###Assistant: ")
    drawn = [convert(tmp_path, "minigpt4", source, "--prompts", prompts, out=f"{n}.jsonl")[0] for n in range(2)]
    assert drawn[0] == drawn[1]
    assert {item["conversations"][0]["value"] for item in drawn[0]} == {"<image>\nSay it.", "<image>\nTell me."}


COCO = {"images": [{"id": 7, "file_name": "7.jpg", "width": 200, "height": 100}, {"id": 8, "file_name": "8.jpg"}]}


def test_coco_captions_and_boxes_as_text(tmp_path):
    listed = [{"id": n, "image_id": image, "caption": "A dog. "} for n, image in enumerate((7, 9))]
    items, said = convert(tmp_path, "coco-captions", write(tmp_path / "in.json", COCO | {"annotations": listed}), out="c.jsonl")
    assert items == [{"id": "7-0", "image": "7.jpg", "conversations": asked("<image>", "A dog.")}]
    assert told(said, ("item 2", "skipped", "image_id 9 is none of the 2 pictures"))
    boxes = [(7, 1, [50, 25, 100, 50], 0), (7, 1, [190, 0, 20, 100], 0), (7, 1, [0, 0, 9, 9], 1), (8, 1, [0, 0, 9, 9], 0),
             (7, 5, [0, 0, 9, 9], 0), (7, 1, [0, 0, -1, 9], 0), (7, 1, ["0", 0, 1, 9], 0)]
    listed = [{"id": n, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
              for n, (image, category, box, crowd) in enumerate(boxes)]
    content = COCO | {"annotations": listed, "categories": [{"id": 1, "name": "dog"}]}
    items, said = convert(tmp_path, "coco-boxes", write(tmp_path / "in.json", content))
    assert [item["conversations"] for item in items] == [
        asked("<image>\nWhat is in the region [0.250, 0.250, 0.750, 0.750]?", "dog"),
        asked("<image>\nWhat is in the region [0.950, 0.000, 1.000, 1.000]?", "dog")]  # it reached beyond the picture
    facts = ["a crowd", "how large picture 8 is", "category_id 5", "bbox", "bbox"]
    assert len(said) == 5 and all(fact in reason for fact, (*_, reason) in zip(facts, said))
    items, _ = convert(tmp_path, "coco-boxes", tmp_path / "in.json", "--question", "{box}: name it.", out="b.jsonl")
    assert items[0]["conversations"][0]["value"] == "<image>\n[0.250, 0.250, 0.750, 0.750]: name it."


def test_vqa(tmp_path):
    wordings = ["What is it", "Is it?", "Name it.", "who", "lost?", "whose?"]
    pictures = [262148, "abc", "b.png", 5, 6, 7]
    given = [{"question_id": n, "image_id": image, "question": words} for n, (image, words) in enumerate(zip(pictures, wordings))]
    said = [["cat", "dog", "dog"], ["no", "yes"], ["a"], ["", " "]]
    answers = [{"question_id": n, "answers": [{"answer": answer} for answer in words]} for n, words in enumerate(said)]
    answers[2]["multiple_choice_answer"] = "agreed"
    answers.append({"question_id": 5, "answers": ["a"], "image_id": 8})
    questions = write(tmp_path / "q.json", {"questions": given})
    annotations = write(tmp_path / "a.json", {"annotations": answers})
    items, report = convert(tmp_path, "vqa", questions, "--annotations", annotations)
    assert items == [
        {"id": 0, "image": "COCO_train2014_000000262148.jpg", "conversations": asked("<image>\nWhat is it?", "dog")},
        {"id": 1, "image": "abc.jpg", "conversations": asked("<image>\nIs it?", "no")},
        {"id": 2, "image": "b.png", "conversations": asked("<image>\nName it?", "agreed")},
    ]
    assert told(
        report, ("item 4", "skipped", "no answer"), ("item 5", "skipped", f"question_id 4 has no annotation in {annotations}"),
        ("item 6", "skipped", "the question is about picture 7, its annotation about 8"))  # fmt: skip
    items, _ = convert(tmp_path, "vqa", questions, "--annotations", annotations, "--image-name", "x/{id}.png", out="b.jsonl")
    assert items[0]["image"] == "x/262148.png"


def test_lines_of_questions(tmp_path):
    given = [{"index": 3, "image": "a.jpg", "question": "what", "answer": ["x", "y", "y"]},
             {"question_id": 4, "image": "b.jpg", "text": "is there a dog?", "label": "yes"},
             {"id": "o", "image": "b.jpg", "question": "Tell me a story", "category": ["x"]}]
    pretty = "\n".join(json.dumps(one, indent=4) for one in given)
    items, said = convert(tmp_path, "qa-lines", write(tmp_path / "in.json", pretty))
    assert items == [{"id": 3, "image": "a.jpg", "conversations": asked("<image>\nwhat?", "y")},
                     {"id": 4, "image": "b.jpg", "conversations": asked("<image>\nis there a dog?", "yes")}]
    assert len(said) == 1 and "'answer' or 'answers' or 'label' is missing" in said[0][2]


def test_folders_of_pictures(tmp_path):
    for name in ("n01/a.png", "n01/b.PNG", "n02/a.png", "n03/a.png", "top.png"):
        write(tmp_path / "set" / name, "")
    write(tmp_path / "set" / "n01" / "b.txt", " its caption\n")
    write(tmp_path / "set" / "n01" / "notes.md", "no picture")
    write(tmp_path / "set" / "n02" / "._a.png", "what a Mac puts beside it")
    items, said = convert(tmp_path, "folder", tmp_path / "set", "--question", "What is it?")
    assert {item["image"]: item["conversations"][1]["value"] for item in items} == {
        "n01/a.png": "n01", "n01/b.PNG": "its caption", "n02/a.png": "n02", "n03/a.png": "n03"}
    assert items[0]["conversations"][0]["value"] == "<image>\nWhat is it?"
    assert len(said) == 1 and "no caption of top.png" in said[0][2]
    names = write(tmp_path / "names.txt", "n01 tench, Tinca tinca\nn02 great white shark, man-eater\n")
    items, skipped = convert(tmp_path, "folder", tmp_path / "set", "--names", names, out="b.jsonl")
    assert {item["image"]: item["conversations"][1]["value"] for item in items} == {
        "n01/a.png": "tench", "n01/b.PNG": "its caption", "n02/a.png": "great white shark"}
    assert [reason for *_, reason in skipped] == [f"{names} has no name for 'n03'", f"{names} has no name for ''"]


def test_shards(tmp_path, capsys):
    source, pictures = mimic(tmp_path)
    main(["convert", "mimic-it", str(source), str(tmp_path / "out"), "--images", str(pictures), "--shards", "1"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.json", "out-000000.tar", "out-000001.tar"]
    assert not (tmp_path / "out_images").exists() and not list(tmp_path.glob("*.tmp"))
    assert "2 items in" in capsys.readouterr().out
    assert report(tmp_path, "out")[-4][2] == "a video, which shards do not hold"
    records = {record.id: record for record in map(TarShards(tmp_path / "out").record, range(2))}
    shades = [images.load(visual.frames[0]).getpixel((0, 0))[0] for visual in records["LA_3"].visuals]
    assert shades == [2, 1] and records["LA_1"].conversations[0][2].text == "second?"
    before = (tmp_path / "out" / "index.json").read_text()
    (tmp_path / "out" / "index.json").unlink()
    main(["index", str(tmp_path / "out")])
    assert "2 samples in 2 shards" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "index.json").read_text()) == json.loads(before)


@pytest.mark.parametrize("flags, message", [
    (["lava", "in.json", "out.jsonl"], "unknown format 'lava'. Did you mean 'llava'?"),
    (["llava", "none.json", "out.jsonl"], "none.json: no such file or folder"),
    (["llava", "in.json", "out.json"], "the name of an output ends with .jsonl"),
    (["llava", "in.json", "there.jsonl"], "there.jsonl is there already"),
    (["mimic-it", "in.json", "out.jsonl"], "MIMIC-IT's pictures stand in a second file"),
    (["mimic-it", "in.json", "out.jsonl", "--images", "LA.parquet"], "not the .parquet"),
    (["vqa", "in.json", "out.jsonl"], "VQA's answers stand in a second file"),
    (["llava", "in.json", "out.jsonl"], "no item could be made of it as llava"),
    (["minigpt4", "in.json", "out.jsonl"], "in.json: one key 'annotations' was expected"),
    (["folder", "in.json", "out.jsonl"], "in.json: no such folder of pictures"),
])
def test_what_cannot_be_converted(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.json", [{"id": 1, "conversations": []}])
    write(tmp_path / "there.jsonl", "old")
    with pytest.raises(SystemExit) as caught:
        main(["convert", *flags])
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists() and (tmp_path / "there.jsonl").read_text() == "old"
