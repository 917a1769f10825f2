"""What workers write and what the user sees of it: all goes to a file per worker, the unusual to the terminal."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common.obs.log import is_routine

if TYPE_CHECKING:
    from rich.status import Status

MAX_LINE_NBYTES = 1 << 16


class LinePipe:
    """A pipe whose write end becomes a worker's stdout and stderr; complete lines go to `on_line` and to a file."""

    def __init__(self, file: Path, on_line: Callable[[str], None]) -> None:
        read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(read_fd, False)
        self._read_fd = read_fd
        self._file = file.open("ab", buffering=0)
        self._on_line = on_line
        self._rest = b""
        asyncio.get_running_loop().add_reader(read_fd, self.pump)

    @property
    def is_open(self) -> bool:
        """Whether somebody may still write: the worker, or whoever was forked to become it."""
        return self._read_fd >= 0

    def handed_over(self) -> None:
        """Close our copy of the write end, so that the end of the worker is the end of the file."""
        os.close(self.write_fd)
        self.write_fd = -1

    def pump(self) -> None:
        """Read what there is; at the end of the file close."""
        while self._read_fd >= 0:
            try:
                data = os.read(self._read_fd, MAX_LINE_NBYTES)
            except BlockingIOError:
                return
            if not data:
                self.close()
                return
            self._file.write(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > MAX_LINE_NBYTES:
                lines, self._rest = [*lines, self._rest], b""
            for line in lines:
                self._on_line(line.decode(errors="replace").rstrip())

    def close(self) -> None:
        """Idempotent; an unfinished last line is passed on."""
        if self._read_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._read_fd)
            os.close(self._read_fd)
            self._read_fd = -1
            self._file.close()
            if self._rest:
                self._on_line(self._rest.decode(errors="replace"))
        if self.write_fd >= 0:
            self.handed_over()


class Display:
    """The terminal: a spinner with counts on a tty, plain lines otherwise. Errors are the caller's, on stderr."""

    def __init__(self, *, verbose: bool, quiet: bool = False) -> None:
        self._verbose = verbose
        self._quiet = quiet
        self._status: Status | None = None
        if sys.stdout.isatty() and not quiet:
            from rich.console import Console  # 70 ms that only a terminal needs

            self._status = Console().status("starting")
            self._status.start()

    def worker_line(self, name: str, line: str, *, stopping: bool) -> None:
        """One line of a worker; the routine ones are only in its log file unless `verbose`."""
        if self._verbose or not is_routine(line, stopping=stopping):
            print(f"{name:>12} | {line}", flush=True)

    def note(self, text: str) -> None:
        """Something that happened to the cluster."""
        if not self._quiet:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Something that the user should change."""
        print(f"atoll: warning: {text}", file=sys.stderr, flush=True)

    def progress(self, text: str) -> None:
        """Replace what the spinner says; nothing without a terminal."""
        if self._status is not None:
            self._status.update(text)

    def settled(self) -> None:
        """The spinner is no longer needed; idempotent."""
        if self._status is not None:
            self._status.stop()
            self._status = None
