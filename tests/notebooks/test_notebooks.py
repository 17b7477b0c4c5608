"""Lessons: the executed notebooks show what sources and package say, and the exercises' checks judge rightly."""

import ast
import base64
import io
import json
import math
import os
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest
import torch
from ablations import ablation_04, ablation_07 as ablation, ablation_table
from PIL import Image, ImageChops, ImageStat
from support import build, chain_08, checks, solutions

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
MAX_BYTES = 200_000
MAX_SECONDS = 60  # CPU-seconds of one lesson, on one core

LESSONS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
every_lesson = pytest.mark.parametrize("source", LESSONS, ids=lambda path: path.stem)


def executed(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def outputs(source):
    return [output for cell in executed(source).cells for output in cell.get("outputs", [])]


def cells(source, kind):
    return [cell.source for cell in jupytext.read(source).cells if cell.cell_type == kind]


def imported(tree):
    """Files of the package that a syntax tree imports from, as "nanovlm/…"."""
    files = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "nanovlm":
            path = node.module.replace(".", "/")
            names = [alias.name for alias in node.names]
            inside = [f"{path}/{name}.py" for name in names if (ROOT / path / f"{name}.py").is_file()]
            files.update(inside or [f"{path}.py"])
    return files


def defined(nodes):
    """Names of the classes and functions among syntax nodes."""
    return {node.name for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


def png_outputs(notebook):
    """The pictures of a notebook, base64."""
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    return [data["image/png"] for data in shown if "image/png" in data]


# ---- what stands beside the sources


@every_lesson
def test_the_notebook_is_its_source_run_from_top_to_bottom_and_shows_the_code_of_today(source):
    wanted = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    found = [(cell.cell_type, cell.source) for cell in executed(source).cells]
    assert found == wanted, f"run: python notebooks/support/build.py {source.stem[:2]}"
    notebook = executed(source)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not [output for output in outputs(source) if output.output_type == "error"]
    assert source.with_suffix(".ipynb").stat().st_size < MAX_BYTES and 0 < notebook.metadata["cpu_seconds"] <= MAX_SECONDS
    sizes = [Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in png_outputs(notebook)]
    assert sizes and all(100 < width < 800 and 50 < height < 800 for width, height in sizes)
    shown = re.findall(r"^`([\w/.]+)`\n```python\n(.*?)\n```$", "\n".join(
        output["data"]["text/markdown"] for output in outputs(source) if "text/markdown" in output.get("data", {})
    ), re.DOTALL | re.MULTILINE)  # fmt: skip
    assert len(shown) >= 3
    for path, code in shown:
        text = (ROOT / path).read_text()
        assert code in text or textwrap.indent(code, "    ") in text, (
            f"{path} has changed; run: python notebooks/support/build.py {source.stem[:2]}"
        )


# ---- what every lesson is made of

@every_lesson
def test_it_has_a_question_modules_a_judged_exercise_and_redefines_nothing(source):
    opening, *_, last = cells(source, "markdown")
    assert re.match(rf"# {source.stem[:2]} · .+\?\n", opening)
    assert re.search(r"^\*\*Time\*\*: .*minutes to read", opening, re.MULTILINE)
    assert last.startswith("## What this lesson did not show\n")
    named = re.findall(r"`(nanovlm/[\w/]+\.py)`", opening.split("**Reads**")[1])
    assert len(named) == len(set(named))
    assert [path for path in named if not (ROOT / path).is_file()] == []
    assert set(named) == imported(ast.parse(source.read_text()))
    tree, owned = ast.parse(source.read_text()), set()
    read = {ROOT / path for path in imported(tree)}
    for path in (ROOT / "nanovlm").rglob("*.py"):
        body = ast.parse(path.read_text()).body
        owned |= defined(body if path in read else (node for node in body if isinstance(node, ast.ClassDef)))
    assert defined(ast.walk(tree)) & owned == set()
    code = "\n".join(cells(source, "code"))
    tried = re.findall(r"checks\.attempt\(checks\.(\w+), \w+\)", code)
    solved = re.findall(r"^checks\.(\w+)\(solutions\.\w+\)", code, re.MULTILINE)
    assert tried and tried == solved
    assert set(tried) <= EXERCISES.keys()


# ---- exercises: the solution passes, known wrong answers fail

def reordered(pixels, patch_size, *order):
    """Patches, but laid out in another order."""
    patches = pixels.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return patches.permute(*order).flatten(3).flatten(1, 2)


def starts_again_in_every_row(embeddings, is_image, image_tokens):
    placed = embeddings.clone()
    for row, where in zip(placed, is_image):
        row[where] = image_tokens[: int(where.sum())]
    return placed


def adds_instead_of_replacing(embeddings, is_image, image_tokens):
    placed = embeddings.clone()
    placed[is_image] += image_tokens
    return placed


def at_the_front(embeddings, is_image, image_tokens):
    placed = embeddings.clone().flatten(0, 1)
    placed[: len(image_tokens)] = image_tokens
    return placed.view_as(embeddings)


def overwrites_its_input(embeddings, is_image, image_tokens):
    embeddings[is_image] = image_tokens
    return embeddings


def takes_the_nearest_patch(q, k, v):
    best = (q @ k.transpose(-1, -2)).argmax(-1, keepdim=True)
    return v.gather(2, best.expand(*best.shape[:-1], v.shape[-1]))


def zeroes(*parameters):
    for parameter in parameters:
        torch.nn.init.zeros_(parameter)


def freezes_it(adapter):
    solutions.silence(adapter)
    adapter.requires_grad_(False)
    adapter.scale.requires_grad_(True)  # so that there is something to differentiate


def masks_before_the_layer(x, modality, text, vision):
    is_vision = modality[..., None].float()
    return vision(x * is_vision) + text(x * (1 - is_vision))


def leaves_out_the_word_that_crosses(probabilities, p):
    values, order = probabilities.sort(descending=True)
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(0, order, values.cumsum(0) < p)


def answers_in_sorted_order(probabilities, p):
    values = probabilities.sort(descending=True).values
    return values.cumsum(0) - values < p


def sorts_what_it_was_given(probabilities, p):
    kept = solutions.nucleus(probabilities, p)
    probabilities.copy_(probabilities.sort(descending=True).values)
    return kept


class ColumnBridge(solutions.RowBridge):
    def forward(self, patches, num_frames=1, out=None):
        side = math.isqrt(patches.shape[1] // num_frames)
        return self.linear(patches.unflatten(1, (num_frames, side, side)).mean(dim=2)).flatten(1, 2)


class OneTokenBridge(solutions.RowBridge):
    def num_image_tokens(self, num_patches, num_frames=1):
        return 1


class StillsOnlyBridge(solutions.RowBridge):
    def num_image_tokens(self, num_patches, num_frames=1):
        return super().num_image_tokens(num_patches)


class SumBridge(solutions.RowBridge):
    def forward(self, patches, num_frames=1, out=None):
        side = math.isqrt(patches.shape[1] // num_frames)
        return self.linear(patches.unflatten(1, (num_frames * side, side)).sum(dim=2))


def aligns_the_corners(table, side):
    old = math.isqrt(len(table) - 1)
    grid = table[1:].T.reshape(1, -1, old, old)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=True)
    return torch.cat([table[:1], grid[0].flatten(1).T])


def exchanges_rows_and_columns(table, side):
    found = solutions.stretch(table, side)
    return torch.cat([found[:1], found[1:].unflatten(0, (side, side)).transpose(0, 1).flatten(0, 1)])


def unfinished(*arguments):
    return None


def rescales_the_wrong_part(one, other):
    top = torch.maximum(one[0], other[0])
    a, b = (other[0] - top).exp(), (one[0] - top).exp()
    return top, one[1] * a + other[1] * b, one[2] * a[:, None] + other[2] * b[:, None]


def trusts_the_ends(first, stop, num_keys, size):
    """Looks at the first and the last query of a tile only, where a window may slide past the tile."""
    kinds = [[
        sum(any((a <= key) & (key < b) for key in range(begin, min(begin + size, num_keys)))
            for a, b in ((int(lo[0]), int(hi[0])), (int(lo[-1]), int(hi[-1]))))
        for begin in range(0, num_keys, size)] for lo, hi in zip(first.split(size), stop.split(size))]  # fmt: skip
    return torch.tensor(kinds)


def numbered(is_media):
    """1, 2, … of the pictures, to compare with a count of media tokens."""
    return torch.arange(1, int(is_media.sum()) + 1)


EXERCISES = {  # check: (the solution, {the hint that a known wrong answer gets, "" of any kind: the answer})
    "check_patchify": (solutions.patchify, {
        "another order; go along the rows": lambda pixels, size: reordered(pixels, size, 0, 4, 2, 1, 3, 5),
        "channel, row, column": lambda pixels, size: reordered(pixels, size, 0, 2, 4, 3, 5, 1),
        r"shape \(2, 48, 15\), expected \(2, 15, 48\)": lambda *given: solutions.patchify(*given).transpose(1, 2),
    }),
    "check_sees": (solutions.sees_latest, {
        "its own picture and that alone": lambda media: media.cumsum(0)[:, None] >= numbered(media),
        "counts up to and with the token": lambda media: (media.cumsum(0) - media.long())[:, None] == numbered(media),
        "before the first picture sees one": lambda media: media.cumsum(0).clamp(min=1)[:, None] == numbered(media),
    }),
    "check_place": (solutions.place, {
        "without starting again": starts_again_in_every_row, "": adds_instead_of_replacing,
        "a word's embedding changed": at_the_front, "return a new tensor": overwrites_its_input,
    }),
    "check_look": (solutions.look, {
        "square root of D": lambda q, k, v: solutions.look(q * q.shape[-1] ** 0.5, k, v),
        "the latents compete": lambda q, k, v: (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-2) @ v,
        "the mean of all patches": lambda q, k, v: v.mean(dim=2, keepdim=True).expand_as(q),
        "scores, softmax, weighted sum": takes_the_nearest_patch,
    }),
    "check_silence": (solutions.silence, {
        "biases add too": lambda adapter: zeroes(adapter.up.weight),
        "down.weight has not moved": lambda adapter: zeroes(*adapter.parameters()),
        "has not moved in four steps": lambda adapter: zeroes(*adapter.down.parameters(), *adapter.up.parameters()),
        "": freezes_it, "it still adds": unfinished,
    }),
    "check_gate_gradients": (solutions.gate_gradients, {
        "slope of tanh": lambda gate, update, dy: ((dy * update).sum(), gate.tanh() * dy),
        "every token and channel adds": lambda gate, update, dy: ((1 - gate.tanh() ** 2) * dy * update, gate.tanh() * dy),
        "the gate scales it": lambda gate, update, dy: (solutions.gate_gradients(gate, update, dy)[0], dy),
        "must return a pair": unfinished,
    }),
    "check_route": (solutions.route_by_hand, {
        "the paper counts the other way round": lambda x, kinds, *layers: solutions.route_by_hand(x, 1 - kinds, *layers),
        "two LayerNorms it differs": masks_before_the_layer,
        "two Linears it differs": lambda x, modality, text, vision: text(x), "returned None": unfinished,
    }),
    "check_stretch": (solutions.stretch, {
        "the first row is the class token's": lambda table, side: torch.nn.functional.interpolate(
            table.T[None], size=1 + side**2, mode="linear")[0].T + 1e-3,
        "rows and columns of the grid are exchanged": exchanges_rows_and_columns,
        "align_corners=False": aligns_the_corners,
    }),
    "check_merge": (solutions.merge, {
        "from which maximum": rescales_the_wrong_part,
        "acc is not that of all keys": lambda one, other: (*solutions.merge(one, other)[:2], one[2] + other[2]),
        r"must return \(top, total, acc\)": unfinished,
    }),
    "check_tile_kinds": (solutions.tile_kinds, {
        "for the mask of causal some tiles": lambda *given: (solutions.tile_kinds(*given) > 0).long() * 2,
        "": trusts_the_ends,
        "padding that sees nothing": lambda first, stop, *given: solutions.tile_kinds(first, stop.maximum(first + 1), *given),
    }),
    "check_blame": (solutions.blame_scores, {
        "takes from the others of its row": lambda shares, d_shares: shares * d_shares,
        "": lambda shares, d_shares: shares * (d_shares - (shares * d_shares).mean(-1, keepdim=True)),
    }),
    "check_nucleus": (solutions.nucleus, {
        "the one that crosses p belongs to the nucleus too": leaves_out_the_word_that_crosses,
        "stands in sorted order; put it back": answers_in_sorted_order,
        "words instead of": lambda probabilities, p: probabilities >= 1 - p,
        "changed the probabilities": sorts_what_it_was_given, "returned None": unfinished,
    }),
    "check_repair": (solutions.repair, {  # one token short, of those that end a description
        "4 of 8 rows are still cut to 22 tokens; 4 are lost": lambda stage: replace(stage, max_tokens=22),
        "steps is changed": lambda stage: replace(stage, steps=200),
        "more than the model's context of 64": lambda stage: replace(stage, max_tokens=128), "returned None": unfinished,
    }),
    "check_bridge": (solutions.RowBridge, {
        "these are the columns": ColumnBridge, "3 x 3 patches have 3 rows": OneTokenBridge,
        "forgets the frames": StillsOnlyBridge, "not the mean of its row": SumBridge, "no bridge yet": unfinished,
    }),
}  # fmt: skip
WRONG = [(check, hint) for check, (_, answers) in EXERCISES.items() for hint in answers]


def test_every_check_is_tested():
    assert EXERCISES.keys() == {name for name in vars(checks) if name.startswith("check_")}


@pytest.mark.parametrize("check", EXERCISES)
def test_the_solution_passes(check):
    getattr(checks, check)(EXERCISES[check][0])


@pytest.mark.parametrize("check, hint", WRONG)
def test_a_wrong_answer_fails_with_its_hint(check, hint):
    with pytest.raises(AssertionError, match=hint or None):
        getattr(checks, check)(EXERCISES[check][1][hint])


@pytest.mark.parametrize("check", EXERCISES)
def test_an_unfinished_answer_fails(check):
    with pytest.raises(AssertionError):
        getattr(checks, check)(unfinished)


def test_an_attempt_tells_and_goes_on(capsys):
    checks.attempt(checks.check_place, unfinished)
    checks.attempt(checks.check_place, solutions.place)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("Not yet: your function returned None") and second == "Right!"


# ---- the ablations of lessons 04 and 07

@pytest.mark.parametrize("one", [ablation, ablation_04])
def test_a_table_says_how_it_came_about_and_is_complete(one, tmp_path):
    note, results = one.read()
    assert note.startswith(f"python notebooks/{one.CSV_PATH.stem}.py, 20") and "CPU-seconds, seeds 0 to 2" in note
    assert [result.seed for result in results] == [seed for seed in (0, 1, 2) for _ in one.ARMS]
    for arm, result in zip(one.ARMS * 3, results):
        assert result.arm == arm.name if one is ablation else vars(arm).items() <= vars(result).items()
    rows = [*map(vars, results)]
    ablation_table.write(tmp_path / "table.csv", note, [*rows[0]], rows)
    assert one.read(tmp_path / "table.csv") == (note, results) and len([*tmp_path.iterdir()]) == 1


def test_the_table_bears_out_the_lesson():
    """What the lesson concludes holds in every seed; words never meet the image copies, which therefore change no answer about words."""
    by_arm = {arm.name: [result for result in ablation.read()[1] if result.arm == arm.name] for arm in ablation.ARMS}
    shared, separate, *whole = by_arm.values()
    assert all(result.text_right_after < result.text_right_before - 0.1 for result in shared)
    assert all(result.text_right_after < result.text_right_before / 2 for result in (*whole[0], *whole[1]))
    one, other = ([result.picture_right for result in results] for results in (shared, separate))
    assert max(min(one), min(other)) <= min(max(one), max(other))  # the ranges overlap
    results = ablation.read()[1]
    assert len({result.text_loss_before for result in results}) == 3  # one language model per seed, in all its arms
    for result in results:
        if result.arm == "separate, only K/V and norms train":
            assert result.text_loss_after == result.text_loss_before
            assert result.text_right_after == result.text_right_before


def test_the_arms_train_what_they_say():
    """Shared and separate train equally many numbers, so that neither has more room to learn."""
    settings = ablation.Settings(language_steps=1, picture_steps=2, batch_size=2, exam=2)
    model, tokenizer, found = ablation.learn_words(0, settings)
    trained = {}
    for arm in ablation.ARMS:
        seeing, result = ablation.learn_to_see(model, arm, tokenizer, found, settings, 0)
        trained[arm] = result.trained
        started = ablation.separate(model.decoder) if arm.separate else model.decoder
        now, then = seeing.decoder.state_dict(), started.state_dict()
        changed = {name for name in then if not torch.equal(now[name], then[name])}
        idle = {"layers.1.norm_2.vision.weight"} if arm.separate else set()  # no token reads what comes behind it
        meets = "" if arm.everything else r"\.vision\." if arm.separate else r"\.(norm_1|norm_2|k|v)\."
        assert changed == {name for name in then if re.search(meets, name)} - idle
    shared, separate, *_ = (trained[arm] for arm in ablation.ARMS)
    assert shared == separate > 0


SHORTEST = ablation_04.Settings(tower_steps=1, answer_steps=2, pictures=2, exam=4)


def test_the_table_bears_out_lesson_04():
    """What the lesson concludes from it holds in every seed."""
    results, blind = ablation_04.read()[1], ablation_04.blind(ablation_04.Settings())

    def right(arm, kind):
        fitting = [each for each in results if all(getattr(each, name) == value for name, value in vars(arm).items())]
        return [getattr(each, kind) for each in fitting]

    for arm in ablation_04.BRIDGE_ARMS:
        assert min(right(arm, "color")) > 0.9 and min(right(arm, "size")) > 0.8  # even through one token
    resampler, mlp, abstractor = (ablation_04.Arm(bridge, 4) for bridge in ("resampler", "MLP", "abstractor"))
    assert min(right(mlp, "place")) > max(right(resampler, "place") + right(abstractor, "place") + [blind["place"] + 0.1])
    for arm in ablation_04.START_ARMS:
        found = right(arm, "shape")
        if arm.longer:
            assert sum(share > blind["shape"] + 0.1 for share in found) == 1
        else:
            assert max(found) < min(right(resampler, "shape"))
            assert arm.tower or max(found) < blind["shape"] + 0.1


@pytest.mark.parametrize("arm", ablation_04.BRIDGE_ARMS, ids=lambda arm: f"{arm.bridge}-{arm.num_tokens}")
def test_every_bridge_makes_as_many_tokens_as_its_arm_says(arm):
    model = ablation_04.make_model(arm, ablation_04.make_vision(0), 0)
    pixels = torch.zeros(2, 3, ablation_04.IMAGE_SIZE, ablation_04.IMAGE_SIZE)
    tokens = model.encode(pixels, torch.tensor([1, 1]))
    assert [len(each) for each in tokens] == [arm.num_tokens] * 2
    assert model.num_image_tokens(ablation_04.IMAGE_SIZE) == arm.num_tokens


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_tower_stays_as_it_is_and_another_does_not(frozen):
    """The tower that an arm starts from never changes: the next arm starts from it too."""
    vision = ablation_04.learn_captions(0, SHORTEST)
    then = {name: tensor.clone() for name, tensor in vision.state_dict().items()}
    assert not all(torch.equal(then[name], tensor) for name, tensor in ablation_04.make_vision(0).state_dict().items())
    model, result = ablation_04.run_arm(ablation_04.Arm("resampler", 4, frozen=frozen), vision, 0, SHORTEST)
    assert all(torch.equal(then[name], tensor) for name, tensor in vision.state_dict().items())
    changed = {name for name, tensor in model.vision.state_dict().items() if not torch.equal(then[name], tensor)}
    assert bool(changed) != frozen
    assert result.bridge_parameters == sum(p.numel() for p in model.parts()["bridge"].values())


# ---- building

def test_build_finds_lessons_by_number():
    assert build.lessons() == LESSONS
    assert [path.stem[:2] for path in LESSONS] == [f"{number:02}" for number in range(1, 13)]
    assert [path.stem for path in build.lessons(["07", "01"])] == ["07_modality_adaptive", "01_image_to_tokens"]
    with pytest.raises(ValueError, match="no lesson '13'; lessons: 01, 02, 03, "):
        build.lessons(["13"])


def test_shrinking_keeps_a_picture_and_makes_it_small():
    picture = Image.effect_noise((60, 40), 40).convert("RGB")
    large = io.BytesIO()
    picture.save(large, "png")
    output = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(large.getvalue()).decode()})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[output])])
    build.shrink_pictures(notebook)
    small = base64.b64decode(notebook.cells[0].outputs[0]["data"]["image/png"])
    assert len(small) < len(large.getvalue())
    shrunk = Image.open(io.BytesIO(small)).convert("RGB")
    assert shrunk.size == (60, 40)
    assert ImageStat.Stat(ImageChops.difference(shrunk, picture)).mean < [3, 3, 3]


# ---- running: slow

OFFLINE = '''
import socket

connect, LOCAL = socket.socket.connect, ("127.0.0.1", "::1", "localhost")

def guarded(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
        raise OSError(f"the network is off; {address} was asked for")
    return connect(self, address)

def resolve(host, *arguments, resolve=socket.getaddrinfo, **options):
    if host not in LOCAL:
        raise OSError(f"the network is off; {host} was asked for")
    return resolve(host, *arguments, **options)

socket.socket.connect, socket.getaddrinfo = guarded, resolve
'''


@pytest.fixture
def offline(tmp_path):
    """Environment of a Python whose sockets reach this machine only."""
    (tmp_path / "sitecustomize.py").write_text(OFFLINE)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


@pytest.mark.slow
@pytest.mark.parametrize("call", [
    "urllib.request.urlopen('http://192.0.2.1/', timeout=1)",
    "socket.create_connection(('example.org', 80))",
])  # fmt: skip
def test_offline_means_offline(offline, tmp_path, call):
    source = tmp_path / "99_online.py"
    source.write_text(f"# %%\nimport socket\nimport urllib.request\n{call}\n")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="the network is off"):
        build.execute(source, offline)


@pytest.mark.slow
@every_lesson
def test_it_runs_offline(source, offline):
    notebook, cpu_seconds = build.execute(source, offline)
    assert cpu_seconds > 0
    assert len(png_outputs(notebook)) == len(png_outputs(executed(source)))


@pytest.mark.slow
def test_building_writes_the_notebook_whole(tmp_path, monkeypatch, capsys):
    (tmp_path / "42_answer.py").write_text("# %% [markdown]\n# # Hello\n\n# %%\n6 * 7\n")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    build.main(["42"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["42_answer.ipynb", "42_answer.py"]
    notebook = json.loads((tmp_path / "42_answer.ipynb").read_text())
    assert notebook["cells"][1]["outputs"][0]["data"]["text/plain"] in ("42", ["42"])
    assert notebook["metadata"]["cpu_seconds"] > 0
    assert [cell["id"] for cell in notebook["cells"]] == ["cell-0", "cell-1"]
    assert capsys.readouterr().out.startswith("42_answer: ")


# ---- lesson 08's chain

def test_a_chain_without_a_stage_is_as_long_as_the_whole():
    whole = sum(stage.steps for stage in chain_08.STAGES)
    for name in ("tower", "words", "align", "resolution"):
        stages = chain_08.chain(name)
        assert [stage.name for stage in stages] == [stage.name for stage in chain_08.STAGES if stage.name != name]
        assert sum(stage.steps for stage in stages) == whole
    assert chain_08.chain(None) == chain_08.STAGES


def test_the_chains_stages_move_what_they_name_and_nothing_else():
    short = tuple(replace(stage, steps=2, warmup_steps=1, batch_size=4) for stage in chain_08.STAGES)
    told, model, towers, tokenizer, sources = {}, *chain_08.begin(0)
    before = {}

    def watch(stage, moved):
        told[stage.name] = {part for part, far in moved.items() if far > 0}
        for part in ("vision", "bridge", "embedding", "language_model"):
            now = torch.cat([p.detach().flatten() for p in model.parts()[part].values()])
            assert part not in before or len(now) != len(before[part]) or torch.equal(now, before[part]) == (part not in stage.learning_rates)
            before[part] = now

    chain_08.run(short, model, towers, tokenizer, sources, watch)
    assert told == {stage.name: set(stage.learning_rates) - {"text_tower"} for stage in chain_08.STAGES}
    assert len(model.vision.positions) == 36 and set(chain_08.examine(model, tokenizer, sources["exam"], 40)) == set(chain_08.KINDS)
