"""The README says what is: its tables are those of the results and of the code, its commands and links work."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import figures, readme_tables as tables, results
from PIL import Image

import sample
import train
from nanovlm.data import __main__ as data_command
from nanovlm.data.datasets import command_line_sources
from nanovlm.evaluation import __main__ as evaluation_command
from nanovlm.recipes.nano_tests import exam_lines, exam_records
from nanovlm.bench.__main__ import make_parser as bench_parser
from nanovlm.recipes import __main__ as recipes_command
from nanovlm.recipes import RECIPES, find
from nanovlm.training import start
from nanovlm.vlit import __main__ as vlit_command

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in results.PAGES}
README, ALL = PAGES["README.md"], "\n".join(PAGES.values())
MAX_BYTES, MAX_README = 200_000, 16_000


# ---- the pages

@pytest.mark.parametrize("page", PAGES)
def test_tables_are_made_from_the_files(page):
    """To make them anew: python notebooks/support/results.py readme"""
    assert tables.fill(PAGES[page]) == PAGES[page]


def test_pages_have_every_block_folder_and_lesson_and_a_small_picture():
    assert set(re.findall(r"<!-- (\w+)[: ]", ALL)) == {*tables.BLOCKS, "end"}
    assert ALL.count("<!-- ") == 2 * ALL.count("<!-- end -->")
    assert len(README.encode()) <= MAX_README
    folders = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("nanovlm/*/__main__.py")} - {"nanovlm/bench"}
    assert {f"{folder}/README.md" for folder in folders} | {"nanovlm/training/README.md"} <= {*PAGES}
    assert all(f"]({page})" in README for page in PAGES if page != "README.md")
    listed = re.findall(r"^\| \[(\d\d)\]\((\S+)\) \| (.+?) \|", PAGES["notebooks/README.md"], re.MULTILINE)
    lessons = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
    assert [path for _, path, _ in listed] == [path.with_suffix(".ipynb").name for path in lessons]
    for (number, path, question), lesson in zip(listed, lessons):
        assert f"# {number} · {question}" in lesson.read_text()
    path = ROOT / re.search(r"!\[.{40,}\]\((\S+)\)", README)[1]
    assert path == figures.PICTURE
    assert path.stat().st_size < MAX_BYTES
    width, height = Image.open(path).size
    assert 900 < width < 1400 and 400 < height < 700


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https://|#)([^)#]+)", PAGES[page])
    assert links and [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def commands(program):
    """The arguments of every command of the pages that runs a program."""
    blocks = re.findall(r"```bash\n(.*?)```", ALL, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line[len(program) :] for line in lines if line[: len(program)] == program]


TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
SLURM = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--signal"}


def vlit_parser(name):
    """The parser of one command of python -m nanovlm.vlit."""
    parser = vlit_command.Parser(allow_abbrev=False)
    vlit_command.COMMANDS[name][1](parser)
    return parser


def trains(arguments):
    """Whether train.py understands, and each setting changes something."""
    wishes = train.make_parser().parse(arguments)
    recipe, settings = find(wishes.recipe), (wishes.set, wishes.without, wishes.stages, wishes.smoke, wishes.data)
    return not any(settings) or start.choose_stages(recipe, wishes) != start.choose_stages(recipe, train.make_parser().parse([]))


def asks(arguments):
    """Whether sample.py understands, and can draw what it is asked about."""
    wishes = sample.parse(arguments)
    drawn = not wishes.draw or sample.parse_scene(wishes.draw, sample.numpy.random.default_rng(0), 64)
    published = json.loads((ROOT / "tests/golden/hub_files.json").read_text())
    return wishes.folder in ("out/nano", "FOLDER", *published) and drawn


UNDERSTOOD = {  # program -> (fewest commands on the pages, whether it understands some arguments)
    "python train.py": (9, trains),
    "python sample.py": (5, asks),
    "python -m nanovlm.recipes": (1, lambda words: recipes_command.parser(words[0]).parse_args(words[1:])),
    "python -m nanovlm.data": (1, lambda words: data_command.make_parser().parse_args(words)),
    "python -m nanovlm.vlit": (3, lambda words: vlit_parser(words[0]).parse(words[1:])),
    "torchrun": (2, lambda words: words[0] in TORCHRUN and words[2] == "train.py" and
                 train.make_parser().parse(words[3:]).parallel in ("ddp", "fsdp")),
}  # fmt: skip


@pytest.mark.parametrize("program", UNDERSTOOD)
def test_its_commands_are_understood(program):
    (fewest, understands), found = UNDERSTOOD[program], commands(program.split())
    assert len(found) >= fewest and all(understands(arguments) for arguments in found)


def test_its_flags_exist():
    parsers = [evaluation_command.make_parser(), *map(recipes_command.parser, recipes_command.COMMANDS)]
    parsers += [*map(vlit_parser, vlit_command.COMMANDS), bench_parser()]
    parsers += data_command.make_parser()._subparsers._group_actions[0].choices.values()
    known = {word for parser in (train.make_parser(), *parsers) for word in parser._option_string_actions} | TORCHRUN | SLURM
    known |= set(re.findall(r'add\("(--[a-z-]+)"', Path(sample.__file__).read_text()))
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", re.sub(r"pip install .*", "", ALL)))
    assert len(named) > 15 and named <= known


def test_its_example_of_a_data_file_can_be_read(tmp_path):
    (tmp_path / "my.json").write_text(re.search(r"```json\n(.*?)```", README, re.DOTALL)[1])
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.jpg")
    records = command_line_sources(tmp_path / "my.json", tmp_path)[0]["data"]
    assert len(records) == 2
    assert {records.record(n).conversations[0][-1].text for n in (0, 1)} == {"a cat", "small"}


# ---- collecting

RESULTS = {
    "easy_vqa_test": 0.5, "scenes_new": 0.25, "blank_easy_vqa": 0.125,
    "kinds": {"easy_vqa_test": {"shape": 0.5, "yes_no": 0.75}, "scenes_new": {"shape": 0.25}, "blank_easy_vqa": {"shape": 0.125}},
    "majority": {"easy_vqa_test": {"all": 0.6, "shape": 0.1, "yes_no": 0.2}, "scenes_new": {"all": 0.3, "shape": 0.4}},
    "interval": {"easy_vqa_test": [0.4, 0.6], "scenes_new": [0.2, 0.3], "blank_easy_vqa": [0.1, 0.2]},
    "questions": {"easy_vqa_test": 9673, "scenes_new": 20, "blank_easy_vqa": 9673}, "parameters": 1234567, "seconds": 100.4,
}  # fmt: skip


def make_run(folder, *arguments, **changed):
    """An output folder as train.py leaves it, with the settings of a command line and made-up results."""
    wishes = train.make_parser().parse(list(arguments))
    recipe = find(wishes.recipe)
    stages = start.settle_precision(start.choose_stages(recipe, wishes), "cpu", None)
    wishes.threads = wishes.threads or 2
    settings = start.settle(wishes, start.choose_size(recipe, wishes.size), stages, None, {})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings | {"image_size": 64}))
    measures = {"color": 0.25, "shape": 0.5, "described": 0.125, "scenes_new": 0.5, "easy_vqa_test": 0.5, "scenes_reading": 0.0}
    log = [{"stage": "tower", "step": 1, "loss": 1.0}]
    for stage in stages:
        log.append({"stage": stage.name, "step": 0, "when": "before", "measures": measures})
        log.append({"stage": stage.name, "step": 9, "when": "after", "measures": measures | {"shape": 1.0}})
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (folder / "results.json").write_text(json.dumps(RESULTS | changed))
    noon = 1_699_963_200  # of 14 November 2023, UTC
    os.utime(folder / "results.json", (0, noon + 86400 * wishes.seed))
    return folder


@pytest.fixture
def three(tmp_path):
    """Runs of seeds 2, 0 and 1."""
    return [
        make_run(tmp_path / f"run{seed}", "--seed", str(seed), easy_vqa_test=share, seconds=seconds)
        for seed, share, seconds in ((2, 0.75, 120.6), (0, 0.5, 100.4), (1, 0.625, 110.0))
    ]  # fmt: skip


def test_a_results_file_says_what_was_found_and_how(three):
    found = results.collect(three)
    assert found["seeds"] == [0, 1, 2] and [run["seed"] for run in found["runs"]] == [0, 1, 2]
    assert found["shares"]["easy_vqa_test"] == {"seeds": [0.5, 0.625, 0.75], "min": 0.5, "mean": 0.625, "max": 0.75}
    assert list(found["shares"]) == ["easy_vqa_test", "scenes_new", "blank_easy_vqa"]
    assert found["runs"][0]["results"] == RESULTS
    assert found["date"] == found["runs"][2]["date"] == "2023-11-16" and found["runs"][0]["date"] == "2023-11-14"
    assert found["command"] == "python train.py" and found["threads"] == 2
    assert re.fullmatch(r".+, \d+ cores", found["hardware"]) and found["torch"].startswith("2.")
    tower = found["runs"][0]["stages"]["tower"]
    assert tower["before"]["shape"] == 0.5 and tower["after"]["shape"] == 1.0
    assert "50.0% → 100.0%" in tower["summary"] and "25.0% → 25.0%" in tower["summary"]


@pytest.mark.parametrize("spoil, message", [
    (lambda runs: (runs[1] / "results.json").unlink(), "run0 holds no results.json; give .* finished"),
    (lambda runs: (runs[1] / "log.jsonl").unlink(), "run0 holds no log.jsonl"),
    (lambda runs: runs.append(runs[0]), r"seeds \[2, 0, 1, 2\]: one comes twice"),
    (lambda runs: runs.append(make_run(runs[0].parent / "x", "--seed", "3", "--without", "tower")), "x and .*run2 differ in stage"),
    (lambda runs: runs.insert(0, make_run(runs[0].parent / "x", "--smoke")), "x is a smoke run"),
])  # fmt: skip
def test_runs_that_do_not_belong_together_are_refused(three, spoil, message):
    spoil(three)
    with pytest.raises((ValueError, OSError), match=message):
        results.collect(three)


@pytest.mark.parametrize("arguments", [
    ["--size", "tiny", "--threads", "1"],
    ["--data", "my own.json", "--images", "folder", "--init", "out/nano", "--without", "tower"],
    ["--set", "instruct.steps=777", "--set", "align.micro_batch_size=8", "--set", "align.clip=none"],
    ["--set", "tower.betas=0.8,0.9", "--set", "tower.learning_rates.vision=0.5", "--set", "align.learning_rates.bridge=none",
     "--set", "align.learning_rates.vision=0.125", "--set", "align.copy_vision_branch=False"],
], ids=" ".join)  # fmt: skip
def test_the_command_is_the_one_that_trained(tmp_path, arguments):
    config = json.loads((make_run(tmp_path / "run", *arguments) / "config.json").read_text())
    words = shlex.split(results.command(config))
    assert words[:2] == ["python", "train.py"]
    again = json.loads((make_run(tmp_path / "again", *words[2:]) / "config.json").read_text())
    assert again == config
    assert len(words) == 2 + len(arguments)  # nothing that goes without saying
    recipe = str(ROOT / "tests" / "tiny_recipe.py")
    config = json.loads((make_run(tmp_path / "mine", recipe) / "config.json").read_text())
    assert results.command(config, recipe) == f"python train.py {recipe}"


def test_collect_writes_a_file(three, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    assert results.main(["collect", "some_runs", *map(str, three)]) == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["some_runs.json"]
    assert json.loads((tmp_path / "results" / "some_runs.json").read_text()) == results.collect(three)
    (three[0] / "results.json").unlink()
    assert results.main(["collect", "some_runs", *map(str, three)]) == 1
    assert capsys.readouterr().err.startswith(f"results.py: {three[0]} holds no results.json")
    assert results.main(["collect", "some_runs"]) == results.main(["colect"]) == 2


# ---- the tables

@pytest.fixture
def collected(three, tmp_path, monkeypatch):
    """Results files "a" of three seeds and "b_c" of one."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    one = make_run(tmp_path / "one", "--without", "tower", "--threads", "1", easy_vqa_test=0.0625, cpu_seconds=77.7)
    for name, runs in (("a", three), ("b_c", [one])):
        (tmp_path / f"{name}.json").write_text(json.dumps(results.collect(runs)))


def filled(block):
    return tables.fill(f"before\n<!-- {block} -->\nold\n<!-- end -->\nafter <!-- end -->").splitlines()


def test_a_block_replaces_what_stood_there(collected):
    lines = filled("results:a")
    assert lines[:2] == ["before", "<!-- results:a -->"] and lines[-2:] == ["<!-- end -->", "after <!-- end -->"]
    assert lines[2:6] == [
        "| held-out test | questions | seed 0 | seed 1 | seed 2 | mean | majority |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| easy-VQA, official test | 9,673 | 50.0% | 62.5% | 75.0% | 62.5% | 60.0% |",
        "| scenes, new pictures | 20 | 25.0% | 25.0% | 25.0% | 25.0% | 30.0% |",
    ]
    assert lines[6].startswith("| easy-VQA over grey pictures |") and lines[6].endswith("| 12.5% | |")
    assert lines[8].startswith("`python train.py --seed N`, N = 0, 1, 2; 1,234,567 parameters; 100 to 121 s on 2 threads of ")
    assert lines[8].endswith(", 2023-11-16.") and "old" not in lines
    text = "<!-- results:a -->\n<!-- end -->\nbetween\n<!-- kinds:a -->\n<!-- end -->"
    assert "\nbetween\n" in tables.fill(text) and tables.fill(tables.fill(text)) == tables.fill(text)
    assert filled("kinds:a")[2:-2] == [
        "| question | easy-VQA, official test | scenes, new pictures |",
        "| --- | ---: | ---: |",
        "| shape | 50.0% (10.0%) | 25.0% (40.0%) |",
        "| yes no | 75.0% (20.0%) | |",
    ]


def test_a_comparison_and_what_is_printed(collected):
    lines = filled("compare:a,b_c")
    assert lines[2] == "| held-out test | a | b c |"
    assert lines[4] == "| easy-VQA, official test | 62.5% (50.0 – 75.0) | 6.2% (6.2 – 6.2) |"
    assert lines[6] == "| easy-VQA over grey pictures | 12.5% (12.5 – 12.5) | 12.5% (12.5 – 12.5) |"
    assert lines[8].startswith("- a: `python train.py --seed N`, N = 0, 1, 2; ")
    assert lines[9].startswith("- b c: `python train.py --threads 1 --without tower --seed N`, N = 0; 1,234,567 parameters; 100 s (78 CPU-seconds at most) on 1 thread of ")
    lines = filled("printed:b_c")
    assert lines[2] == "```text" and lines[-3] == "```"
    assert lines[3].startswith("language: ") and "12.5% → 12.5%" in lines[3] and "align: " in lines[4]
    assert lines[10].split() == ["easy-VQA,", "official", "test", "9,673", "6.2%", "40.0", "-", "60.0%", "60.0%"]
    assert lines[-4] == "1,234,567 parameters, 100 seconds" and not any(line.startswith(" ") for line in lines)


def test_a_recipe_as_a_table():
    lines, stages = filled("recipe:nano"), find("nano").stages("full", False)
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[4 : 4 + len(stages)]] == [stage.name for stage in stages]
    tower, language = stages[:2]
    assert lines[4] == f"| tower | pictures against captions | {tower.image_size} | {tower.steps:,} × {tower.batch_size} | vision, text tower |"
    assert lines[5].startswith(f"| language | the next token |  | {language.steps:,} × ")
    total, *sizes = (int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", lines[-3]))
    assert total == sum(sizes) and "lm head" not in lines[-3]


def test_what_a_paper_adds():
    """Its own parts are those that not every model has; lines are those of the files."""
    lines = [line.split("|") for line in filled("adds") if line.startswith("| ")]
    rows = {cells[1].strip(): cells[2:5] for cells in lines[2:]}
    assert list(rows) == [*RECIPES]
    for name, own in (("lynx", ("adapter", "resampler")), ("llava", ("projector",)), ("blip2", ("qformer",)),
                      ("mplug_owl2", ("abstractor", "modality_adaptive"))):  # fmt: skip
        files = [f"{part}.py" for part in own] + [f"recipes/{name}.py"]
        lines = [(ROOT / "nanovlm" / file).read_text().count("\n") for file in files]
        assert re.findall(r"\(\.\./(\S+)\) (\d+)", " ".join(rows[name])) == [*zip(files, map(str, lines))]
        assert int(rows[name][2]) == sum(lines)


def test_pages_are_rewritten_unless_something_is_missing(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="unknown block 'result'. Did you mean 'results'"):
        filled("result:a")
    with pytest.raises(FileNotFoundError, match=r"no_such\.json: no such results; .* collect no_such FOLDER"):
        filled("results:no_such")
    monkeypatch.setattr(results, "PAGES", [tmp_path / "README.md"])
    (tmp_path / "README.md").write_text("<!-- results:no_such -->\n<!-- end -->")
    assert results.main(["readme"]) == 1
    assert (tmp_path / "README.md").read_text() == "<!-- results:no_such -->\n<!-- end -->"
    assert "no_such.json" in capsys.readouterr().err
    (tmp_path / "README.md").write_text("words\n<!-- recipe:nano -->\n<!-- end -->\n")
    assert results.main(["readme"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| tower | pictures" in text and text.startswith("words\n") and not list(tmp_path.glob("*.tmp"))


# ---- the picture

def exam_log(folder, change=lambda line: line):
    """An output folder whose exam was wrong at step 50 and right at step 100."""
    truths = [turns[-1].text for record in exam_records() for turns in record.conversations]
    folder.mkdir()
    (folder / "config.json").write_text('{"seed": 5}')
    entries = [{"stage": "align", "step": 1, "loss": 2.0}] + [
        {"stage": "align", "step": step, "exam": [change(line) for line in exam_lines(exam_records(), answers)]}
        for step, answers in ((50, ["none"] * len(truths)), (100, truths))
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def test_the_picture_is_drawn_from_a_log(tmp_path, monkeypatch, capsys):
    drawn = []
    original = figures.answers_over_time
    monkeypatch.setattr(figures, "answers_over_time", lambda *given: drawn.append(given) or original(*given))
    monkeypatch.setattr(figures, "PICTURE", tmp_path / "figures" / "picture.png")
    assert figures.main([str(exam_log(tmp_path / "run"))]) == 0
    (asked, moments, _, title), = drawn
    truths = [truth for _, _, truth in figures.exam_questions(exam_records())]
    assert [label for label, _ in moments] == ["align\nstep 50", "align\nstep 100"]
    assert moments[1][1] == truths == [truth for _, _, truth in asked] and set(moments[0][1]) == {"none"}
    assert "(seed 5)" in title
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["picture.png"]
    picture = Image.open(tmp_path / "figures" / "picture.png")
    colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
    assert picture.mode == "P" and {(217, 240, 211), (253, 224, 220)} <= colors  # right and wrong
    assert "picture.png, " in capsys.readouterr().out


@pytest.mark.parametrize("change, message", [
    (lambda line: line.replace("what is the", "which is the"), "its exam asks something else"),
    (lambda line: "exam 1  what is this?  a star ✗", "its exam asks something else"),
    (lambda line: line[:-1], "is no line of an exam"),
])  # fmt: skip
def test_the_log_of_another_exam_is_refused(tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.setattr(figures, "PICTURE", tmp_path / "figures" / "picture.png")
    assert figures.main([str(exam_log(tmp_path / "run", change))]) == 1
    assert message in capsys.readouterr().err
    assert figures.main([str(tmp_path / "nowhere")]) == 1 and "nowhere" in capsys.readouterr().err and figures.main([]) == 2


# ---- the snippet

def test_its_recipe_trains_and_its_python_answers(tmp_path, monkeypatch, capsys):
    """Bridge, attention, tower, stage and recipe stand in five blocks of one file."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    talk, mine = blocks[0], blocks[2:]
    assert len(mine) == 5
    monkeypatch.chdir(tmp_path)
    Path("my_recipe.py").write_text("\n\n".join(mine))
    flags = ["--size", "tiny", "--smoke", "--stages", "align,more", "--set", "align.steps=1", "--set", "more.steps=1",
             "--threads", "1", "--device", "cpu", "--out", "out/nano"]
    assert train.main(["my_recipe.py", *flags]) == 0
    names = load_file("out/nano/model.safetensors").keys()
    assert {"bridge.linear.weight", "decoder.layers.0.attention.gate.weight"} <= names
    Image.new("RGB", (70, 80), "red").save("photo.jpg")
    capsys.readouterr()
    exec(talk.replace('"out/nano"', '"out/nano", recipe="my_recipe.py"'), {})
    assert len(capsys.readouterr().out.splitlines()) >= 2
