"""What a person sees while something takes longer than two seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any


class Progress(ABC):
    """Stages with a known number of items, shown on stderr."""

    def __enter__(self) -> Progress:
        """Start showing."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing."""
        return None

    @abstractmethod
    def stage(self, name: str, total: int) -> None:
        """Begin a stage of ``total`` items; the one before is complete."""

    @abstractmethod
    def item(self, detail: str) -> None:
        """Begin the next item of the stage."""

    def detail(self, text: str) -> None:
        """Say more of the item at work."""
        return None

    @abstractmethod
    def note(self, text: str) -> None:
        """Say something that should stay readable."""


class Silent(Progress):
    """Shows nothing."""

    def stage(self, name: str, total: int) -> None:
        """See `Progress.stage`."""

    def item(self, detail: str) -> None:
        """See `Progress.item`."""

    def note(self, text: str) -> None:
        """See `Progress.note`."""


class Plain(Progress):
    """A line per stage, and one every ten seconds with the time left: for logs and pipes."""

    def __init__(self) -> None:
        """Print to stderr."""
        self._name, self._total, self._done, self._printed, self._began = "", 0, 0, 0.0, 0.0

    def stage(self, name: str, total: int) -> None:
        """See `Progress.stage`."""
        self._name, self._total, self._done = name, total, 0
        self._began = self._printed = time.monotonic()
        print(f"{name} ({total})", file=sys.stderr, flush=True)

    def item(self, detail: str) -> None:
        """See `Progress.item`."""
        self._done += 1
        self.detail(detail)

    def detail(self, text: str) -> None:
        """See `Progress.detail`."""
        now = time.monotonic()
        if now - self._printed > 10:
            self._printed = now
            finished = self._done - 1
            left = (now - self._began) / finished * (self._total - finished) if finished > 0 else 0
            about = f", about {left:.0f} s left" if left > 0 else ""
            print(f"{self._name}: {self._done}/{self._total}{about} {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        print(text, file=sys.stderr, flush=True)


class Live(Progress):
    """A bar for each stage, with the item at work and the time left; no colours where NO_COLOR is set."""

    def __init__(self) -> None:
        """Draw on stderr."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description:<10}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=Console(stderr=True),
        )
        self._task: Any = None
        self._total = 0
        self._started = False

    def __enter__(self) -> Live:
        """See `Progress.__enter__`."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See `Progress.__exit__`."""
        if error is None:
            self._complete()
        self._bars.stop()

    def stage(self, name: str, total: int) -> None:
        """See `Progress.stage`."""
        self._complete()
        self._task = self._bars.add_task(name, total=total, detail="")
        self._total, self._started = total, False

    def item(self, detail: str) -> None:
        """See `Progress.item`."""
        self._bars.update(self._task, advance=1 if self._started else 0, detail=detail)
        self._started = True

    def detail(self, text: str) -> None:
        """See `Progress.detail`."""
        self._bars.update(self._task, detail=text)

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        self._bars.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _complete(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=self._total, detail="")


def batches(progress: Progress, name: str) -> Callable[[int, int], None]:
    """Return what shows a stage of batches when called before each with the number before it and of all."""

    def begin(before: int, total: int) -> None:
        if before == 0:
            progress.stage(name, total)
        progress.item("batches")

    return begin


def progress_for_terminal() -> Progress:
    """Return bars on stderr where that and stdout are terminals, plain lines elsewhere."""
    return Live() if _on_a_terminal() else Plain()


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show on a terminal that something is at work which has no items to count, e.g. importing torch."""
    if not _on_a_terminal():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def _on_a_terminal() -> bool:
    return sys.stderr.isatty() and sys.stdout.isatty()
