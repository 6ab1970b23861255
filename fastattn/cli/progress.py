"""Shows how far a long command is: a bar on a terminal, and a line now and then where output goes to a file."""

from __future__ import annotations

import sys
import threading
import time

INTERVAL = 10.0  # seconds between two lines


class Progress:
    """Call it with the steps done and the steps to do; between calls a thread shows that time goes on.

    Example:
        >>> with Progress("cpu kernels") as progress:
        ...     progress(1, 2)
    """

    def __init__(self, what: str):
        self.what, self.done, self.total = what, 0, 0
        self.start = time.monotonic()
        self.on_terminal = sys.stderr.isatty()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        if self.on_terminal:
            self._show()

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        if self.on_terminal and self.total:
            print(file=sys.stderr)

    def _tick(self) -> None:
        while not self._ended.wait(1.0 if self.on_terminal else INTERVAL):
            self._show()

    def _show(self) -> None:
        elapsed = time.monotonic() - self.start
        text = f"{self.what}: {self.done} of {self.total} steps, {elapsed:.0f} s"
        if 0 < self.done < self.total:
            text += f", about {elapsed / self.done * (self.total - self.done):.0f} s left"
        if self.on_terminal:
            filled = 30 * self.done // max(self.total, 1)
            text = f"\r{'█' * filled}{'░' * (30 - filled)} {text}\x1b[K"
        print(text, end="" if self.on_terminal else "\n", file=sys.stderr, flush=True)
