"""The log, the plain progress lines, the table and the picture of a run."""

import matplotlib.figure
import pytest

from nanovlm.training.checkpoint import CheckpointError
from nanovlm.training.progress import Bar, Log, plot_curves
from nanovlm.training.stages import Stage

STAGE = Stage("align", "language", {"bridge": 1e-3}, {"scenes": 1.0}, steps=40, batch_size=8)


def test_log(tmp_path, monkeypatch):
    log = Log(tmp_path / "log.jsonl")
    assert log.size() == 0
    forced = []
    monkeypatch.setattr("os.fsync", forced.append)
    log.write(step=1, loss=0.1)
    size = log.size()
    assert size == len('{"step": 1, "loss": 0.1}\n')
    log.write(step=2, loss=1 / 3)
    assert log.read() == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 1 / 3}]
    assert len(forced) == 1, "what a checkpoint remembers must be on the disk"
    log.cut(size)
    assert log.read() == [{"step": 1, "loss": 0.1}]
    log.cut(size)
    with pytest.raises(CheckpointError, match=f"has {size} bytes, but {size + 1} when the checkpoint was written"):
        log.cut(size + 1)


def test_without_a_terminal_a_stage_prints_about_ten_lines(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    bar = Bar(STAGE, done=0)
    for step in range(1, 41):
        clock[0] += 1
        bar.update(step, 1.23456, 3.2e-4, 1234.5, 0.03)
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"align {step}/40" for step in range(4, 41, 4)]
    assert lines[0] == "align 4/40: loss 1.2346, lr 0.00032, 1,234 tokens/s, 3% waiting for data, 00:36 left"  # 1 s a step


def test_with_a_terminal_there_is_a_bar_that_knows_where_it_began(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar = Bar(STAGE, done=20)
    bar.update(21, 1.5, 1e-3, 99.0, 0.5, 0.41)
    bar.bar.refresh()
    assert (bar.bar.n, bar.bar.total) == (21, 40)
    bar.close()
    shown = capsys.readouterr()
    assert "align" in shown.err and "21/40" in shown.err and "loss 1.5000, lr 0.001, 99 tokens/s, 41% of peak, 50% waiting for data" in shown.err and shown.out == ""


def test_a_function_is_told_every_entry(tmp_path):
    told = []
    log = Log(tmp_path / "log.jsonl", told.append)
    log.write(step=1, held_out={"a": 1.0})
    assert told == log.read() == [{"step": 1, "held_out": {"a": 1.0}}]
    other = Log(None, told.append)
    other.write(step=3)
    assert other.read() == [] and other.size() is None and len(told) == 1, "another process keeps it"


ENTRIES = [
    {"stage": "tower", "step": 0, "when": "before", "measures": {"shape": 0.4}},
    {"stage": "tower", "step": 1, "loss": 3.0}, {"stage": "tower", "step": 2, "loss": 2.0},
    {"stage": "tower", "step": 2, "when": "after", "measures": {"shape": 0.9}},
    {"stage": "align", "step": 2, "when": "before", "measures": {"scenes": 0.0, "words": 0.1}},
    {"stage": "align", "step": 3, "loss": 5.0}, {"stage": "align", "step": 3, "held_out": {"a": 4.0}}, {"stage": "align", "step": 3, "exam": ["a"]},
    {"stage": "align", "step": 3, "when": "after", "measures": {"scenes": 0.2, "words": 0.3}},
]


def test_curves(tmp_path, monkeypatch):
    figures = []
    savefig = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig",
                        lambda figure, *args, **options: (figures.append(figure), savefig(figure, *args, **options)))
    plot_curves(ENTRIES, tmp_path / "curves.tmp", seed=7)
    assert (tmp_path / "curves.tmp").read_bytes().startswith(b"\x89PNG")
    top, bottom = figures[0].axes
    def drawn(axes):
        return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert drawn(top) == {"tower": ([1, 2], [3.0, 2.0]), "align": ([3], [5.0]), "held out: a": ([3], [4.0])}
    assert drawn(bottom) == {"shape": ([0, 2], [0.4, 0.9]), "scenes": ([2, 3], [0.0, 0.2]), "words": ([2, 3], [0.1, 0.3])}
    assert "nats" in top.get_ylabel() and "seed 7" in top.get_title() and "share" in bottom.get_ylabel() and "step" in bottom.get_xlabel()
