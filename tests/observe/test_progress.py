"""The line that a person watches."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from seer.observe.progress import Progress, duration


def shown(*, terminal: bool, width: int = 200, loss: float | None = 3.2149, bad_samples: int = 0) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, highlight=False, soft_wrap=not terminal)
    progress = Progress(2000, 4.1589, console)
    for step in (10, 20):
        progress.update(
            step,
            loss=loss,
            images_per_s=412.4,
            data_wait_share=0.031,
            seconds_left=185.0,
            knn_top1=0.6123 if step == 20 else None,
            bad_samples=bad_samples,
        )
    progress.close()
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    line = "step {}/2000  3 min 05 s left  loss 3.21 (chance 4.16){}  412 images/s  waiting for data 3%"
    assert shown(terminal=False).splitlines() == [line.format("  10", ""), line.format("  20", "  kNN 61.2%")]


def test_what_one_wants_most_fits_in_80_columns():
    text = shown(terminal=True, width=80)
    assert "3 min 05 s left" in text and "kNN 61.2%" in text and "412 images/s" in text and "━" not in text


def test_long_lines_are_not_broken_in_a_log():
    assert len(shown(terminal=False, width=20).splitlines()) == 2


def test_one_line_on_a_terminal_is_drawn_over():
    text = shown(terminal=True)
    assert "\x1b[2K" in text  # the first line is erased for the second
    assert text.count("\n") == 1
    assert "loss 3.21 (chance 4.16)" in text and "kNN 61.2%" in text
    assert text.endswith("\x1b[?25h")  # the cursor is shown again


def test_narrow_terminal_gets_one_line_too():
    assert shown(terminal=True, width=40).count("\n") == 1


def test_loss_that_is_not_finite_is_said():
    assert "loss not finite" in shown(terminal=False, loss=None)


def test_bad_images_are_counted_where_there_are_any():
    assert shown(terminal=False, bad_samples=1047).splitlines()[0].endswith("waiting for data 3%  1,047 bad")
    assert "bad" not in shown(terminal=False)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (3e5, "3 d 11 h")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_progress_imports_no_torch():
    code = "import seer.observe.progress, seer.observe.metrics, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
