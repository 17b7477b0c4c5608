"""What the lessons share. The package nanovlm lies beside notebooks/, which a notebook's Python does not search."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
