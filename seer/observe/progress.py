"""How far the run is: one live line on a terminal, one plain line a log step elsewhere. No torch here."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.text import Text


def duration(seconds: float) -> str:
    """Seconds in words: ``42 s``, ``3 min 05 s``, ``2 h 07 min``, ``4 d 03 h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


class Progress:
    """The line that a person watches.

    Args:
        total_steps: steps of the run.
        chance: loss of a network that tells nothing apart, shown beside the loss.
        console: where to; default: standard output.
    """

    def __init__(self, total_steps: int, chance: float, console: Console | None = None) -> None:
        self._total_steps = total_steps
        self._chance = chance
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._live: Live | None = None
        self._on_terminal = self._console.is_terminal and not self._console.is_dumb_terminal

    def update(
        self,
        step: int,
        *,
        loss: float | None,
        images_per_s: float,
        data_wait_share: float,
        seconds_left: float,
        knn_top1: float | None = None,
        bad_samples: int = 0,
    ) -> None:
        """Show where the run is.

        Args:
            step: steps taken.
            loss: None where the step was not finite.
            images_per_s: of the last steps.
            data_wait_share: share of the last steps' time spent waiting for data, in [0, 1].
            seconds_left: to the last step.
            knn_top1: of the newest evaluation, in [0, 1]; None before the first.
            bad_samples: images so far that were replaced.
        """
        words = [
            f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}",
            f"{duration(seconds_left)} left",
            f"loss {'not finite' if loss is None else f'{loss:.2f}'} (chance {self._chance:.2f})",
        ]
        if knn_top1 is not None:
            words.append(f"kNN {knn_top1:.1%}")
        words += [
            f"{images_per_s:.0f} images/s" if images_per_s >= 10 else f"{images_per_s:.1f} images/s",
            f"waiting for data {data_wait_share:.0%}",
        ]
        if bad_samples:
            words.append(f"{bad_samples:,} bad")
        self._show("  ".join(words), share=step / self._total_steps if self._total_steps else 1.0)

    def close(self) -> None:
        """Leave the last line standing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, line: str, share: float) -> None:
        if not self._on_terminal:
            self._console.print(line, markup=False)
            self._console.file.flush()  # a log file is watched too
            return
        if self._live is None:
            # It is drawn when there is news and not by a thread of its own, which would cost the training time.
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=True, redirect_stderr=True)
            self._live.start()
        if self._console.width < 110:  # what stands at the end of the line is worth more than the bar
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        bar = Text("━" * round(12 * share), style="green") + Text("━" * (12 - round(12 * share)), style="bright_black")
        text = bar + Text("  " + line)
        text.no_wrap, text.overflow = True, "ellipsis"
        self._live.update(text, refresh=True)
