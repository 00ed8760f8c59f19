"""What a person sees while it measures: a line that changes in a terminal, lines on standard error elsewhere."""

import sys
import time

from rich.console import Console
from rich.status import Status


class Progress:
    """Called with what is being done, e.g. `selective_scan, T 512`."""

    def __init__(self) -> None:
        self.console, self.started = Console(stderr=True), time.monotonic()
        self.status: Status | None = None

    def __call__(self, text: str) -> None:
        seconds = f"{time.monotonic() - self.started:.0f} s"
        if not self.console.is_terminal:
            print(f"{seconds:>6}  {text}", file=sys.stderr, flush=True)
        elif self.status is None:
            self.status = self.console.status(f"{text} ({seconds})")
            self.status.start()
        else:
            self.status.update(f"{text} ({seconds})")

    def pause(self) -> None:
        """Take the line away, so that something else can be printed."""
        if self.status is not None:
            self.status.stop()
            self.status = None
