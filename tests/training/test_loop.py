"""The loop can be read: one short function holds a step, and a step passes through few files."""

import ast
import sys
from pathlib import Path

import pytest

import nanovlm
import train
from nanovlm.training import optimizer, trainer
from nanovlm.training.progress import StopRequests

PACKAGE = Path(nanovlm.__file__).parent
SOURCE = Path(trainer.__file__).read_text()
STEP = ["next_records", "loss", "backward", "clip", "step", "log_step", "exam", "save"]


def test_one_function_holds_the_steps_of_a_stage_in_their_order():
    (loop,) = (node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef) and node.name == "train_stage")
    assert loop.end_lineno - loop.lineno < 60 and len(SOURCE.splitlines()) <= 300
    calls = [node.func for node in ast.walk(loop) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    found = [call.attr for call in sorted(calls, key=lambda call: (call.end_lineno, call.end_col_offset)) if call.attr in STEP]
    assert found == STEP
    assert not any(isinstance(node, ast.Attribute) and node.attr == "size" for node in ast.walk(loop)), "how many train is not asked"


@pytest.mark.parametrize("stage", ["tower", "language", "instruct"])
def test_a_step_passes_through_few_files(tmp_path, stage):
    """From its records to optimizer.step(), in the smoke run; the model's own files are not counted."""
    short = [f"{stage}.{value}" for value in ("steps=1", "warmup_steps=0", "batch_size=12")]
    flags = ["nano", "--smoke", "--size", "tiny", "--out", str(tmp_path / "run"), "--threads", "1", "--device", "cpu", "--stages", stage]
    args = train.make_parser().parse([*flags, *(word for value in short for word in ("--set", value))])
    one = trainer.Trainer(train.prepare(train.make_parser(), args, train.join("none", "cpu")[0]), StopRequests())
    one.begin(0, None)
    files, first, last = set(), trainer.Trainer.next_records.__code__, optimizer.Together.step.__code__

    def look(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and (files or frame.f_code is first) and PACKAGE in path.parents and path.parent != PACKAGE:
            files.add(str(path.relative_to(PACKAGE)))
        if frame.f_code is last:
            sys.setprofile(None)

    sys.setprofile(look)
    try:
        one.train_stage()
    finally:
        sys.setprofile(None)
    assert {"training/trainer.py", "training/optimizer.py"} <= files and len(files) <= 14, " ".join(sorted(files))
