"""The display of a running demo: live lines on a terminal, plain lines elsewhere, none with JSON."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from farstep_service.demo.reports import Pace, Report


class Display(ABC):
    """Show how far the demo is."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Show a line that stays."""

    @abstractmethod
    def remote(self, report: Report, pace: Pace) -> None:
        """Show how far a worker is."""

    @abstractmethod
    def local(self, step: int, steps: int, loss: float) -> None:
        """Show how far the loop with `torch.optim` is."""


class Silent(Display):
    """Show nothing."""

    def say(self, text: str) -> None:
        pass

    def remote(self, report: Report, pace: Pace) -> None:
        pass

    def local(self, step: int, steps: int, loss: float) -> None:
        pass


class Plain(Display):
    """Print a line at the end of each epoch of one worker, and the notes of all."""

    def __init__(self) -> None:
        self._first = ""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def remote(self, report: Report, pace: Pace) -> None:
        self._first = self._first or report.worker
        if report.note or (report.worker == self._first and report.accuracy is not None and not report.fingerprint):
            self.say(f"{report}  {pace}" if pace.steps_per_s else str(report))

    def local(self, step: int, steps: int, loss: float) -> None:
        pass


class Live(Display):
    """Keep one line per run up to date.

    Args:
        progress: rich's, started.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._remote = progress.add_task("server", total=None, figures="workers are starting")
        self._local = progress.add_task("torch.optim", total=None, visible=False, figures="")
        self._accuracy = ""

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def remote(self, report: Report, pace: Pace) -> None:
        if report.note:
            self.say(str(report))
        if report.accuracy is not None:
            self._accuracy = f", accuracy {report.accuracy:.1%}"
        loss = "" if report.loss is None else f", loss {report.loss:.3f}"
        self._progress.update(
            self._remote,
            total=report.steps,
            completed=report.version,
            figures=f"{pace}{loss}{self._accuracy}",
        )

    def local(self, step: int, steps: int, loss: float) -> None:
        self._progress.update(self._local, visible=True, total=steps, completed=step, figures=f"loss {loss:.3f}")


@contextmanager
def display(*, silent: bool) -> Iterator[Display]:
    """Yield the display that fits the standard output."""
    if silent:
        yield Silent()
    elif not sys.stdout.isatty():
        yield Plain()
    else:
        name, figures = TextColumn("{task.description}"), TextColumn("{task.fields[figures]}")
        with Progress(name, BarColumn(10), MofNCompleteColumn(), figures, console=Console()) as progress:
            progress.console.show_cursor()  # rich hides it, and a killed demo could not bring it back
            yield Live(progress)
