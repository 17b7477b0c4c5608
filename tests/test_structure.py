"""The package's shape: imports run one way and in no circle, and what training nano imports stays small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "nanovlm").rglob("*.py"))
ORDER = {"": 0, "data": 1, "generation": 2, "training": 3, "published": 4, "recipes": 5, "evaluation": 6, "vlit": 7, "bench": 7}
UPWARD = {"nanovlm/__init__.py"}  # hands `load` on
OPTIONAL = ("transformers", "triton", "sentencepiece", "torchvision", "av", "sklearn", "openai", "easy_vqa", "tiktoken")
LATE = ("matplotlib.figure", "matplotlib.font_manager", "nanovlm", "nanovlm.flash_attention", "nanovlm.routed_projection")  # slow to import, or with triton


def folder(path):
    """The folder of a file of the package: str, "" at the root."""
    return path.parent.name if path.parent.name != "nanovlm" else ""


def siblings(path, tree):
    """Files of the package that a file imports: set of Path."""
    names = [f"{node.module}.{one.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for one in node.names]
    names += [one.name for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names]
    found = set()
    for name in names:
        module = ROOT / name.replace(".", "/")
        candidates = [module.with_suffix(".py"), module / "__init__.py", module.parent.with_suffix(".py"), module.parent / "__init__.py"]
        found |= {one for one in candidates if one in FILES and one != path} if name.startswith("nanovlm.") else set()
    return {one for one in found if one.name != "__init__.py" or one.parent.name != "nanovlm"}


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
IMPORTS = {path: siblings(path, tree) for path, tree in TREES.items()}
NAMED = {path.relative_to(ROOT).as_posix(): path for path in FILES}


def reached(path):
    """All that a file imports, and what that imports: set of Path."""
    seen, todo = set(), [path]
    while todo:
        new = IMPORTS[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


@pytest.mark.parametrize("name", [name for name in NAMED if name not in UPWARD])
def test_imports_run_one_way_and_in_no_circle(name):
    path = NAMED[name]
    for one in IMPORTS[path]:
        assert folder(one) == folder(path) or ORDER[folder(one)] < ORDER[folder(path)], f"{name} imports {one.relative_to(ROOT)}"
    assert path not in reached(path)


def test_imports_in_functions_are_optional_packages():
    for path, tree in TREES.items():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inside = [node for one in functions for node in ast.walk(one) if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in inside:
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert module.split(".")[0] in OPTIONAL or module in LATE, f"{path}: {module}"


def test_training_nano_imports_little():
    assert sum(folder(path) == "" for path in FILES) <= 22
    code = ("import runpy, sys; sys.argv = ['train.py', 'nano', '--size', 'tiny', '--print']\n"
            "try: runpy.run_path('train.py', run_name='__main__')\nexcept SystemExit: pass\n"
            "print(*sorted(name for name in sys.modules if name.startswith('nanovlm.')))")
    names = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True).stdout.splitlines()[-1].split()
    files = {name.replace(".", "/") for name in names}
    assert len([name for name in files if f"{name}.py" in NAMED or f"{name}/__init__.py" in NAMED]) <= 62
    assert not [name for name in files if name.split("/")[1] in ("evaluation", "vlit", "published")]


@pytest.mark.parametrize(("command", "successor"), [
    (["evaluation", "ablate"], "notebooks/ablations/ablate.py"), (["vlit", "review"], "notebooks/ablations/review.py"),
    (["recipes", "compare", "x"], "tests/official/compare.py"), (["recipes", "coverage", "x"], "inspect"),
])  # fmt: skip
def test_a_command_that_went_elsewhere_names_its_successor(command, successor):
    run = subprocess.run([sys.executable, "-m", f"nanovlm.{command[0]}", *command[1:]], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and successor in run.stderr
