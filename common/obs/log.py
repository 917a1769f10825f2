"""Logging: one line per record on stderr, the same everywhere, so that a launcher or journald can file it."""

import logging
import sys

FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"
LEVELS = ("debug", "info", "warning", "error")


def setup(level: str = "info") -> None:
    """Send records of `level` and above to stderr. Raises ValueError on an unknown level."""
    if level not in LEVELS:
        raise ValueError(f"log level must be one of {', '.join(LEVELS)}, not {level!r}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)


def is_routine(line: str, *, stopping: bool = False) -> bool:
    """True for a line of ours that a terminal need not show: INFO and below, while stopping also WARNING.

    A process that stops in its turn loses its peers one by one and says so; that is no news then.
    """
    fields = line.split(maxsplit=2)
    levels = ("DEBUG", "INFO", "WARNING") if stopping else ("DEBUG", "INFO")
    return len(fields) == 3 and fields[1] in levels and fields[0].count(":") == 2
