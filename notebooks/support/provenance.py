"""Where a number comes from: commit, machine, day. What is published without them cannot be checked."""

import os
import platform
import re
import subprocess
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def commit():
    """The commit that is checked out: str, with "+" behind it if the code has been changed since; "unknown" without git."""
    def git(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "train.py", "nanovlm")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + "+" * bool(changed)


def machine():
    """Processor and cores that this process may use: str."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    cpu = found[1] if found else platform.processor() or platform.machine()
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores"


def stamp():
    """Commit, machine, torch and day in one line: str."""
    return f"commit {commit()}; {machine()}; torch {torch.__version__}; {date.today()}"
