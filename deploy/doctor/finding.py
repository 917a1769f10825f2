"""What the doctor says: one line per thing looked at. Pure."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """WARNING: it runs, but slower or less safely than it should. FAILURE: it will not run, or not correctly."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """`fix` is a command, or a sentence where no command can do it; empty when all is well."""

    check: str
    level: Level
    text: str
    fix: str = ""


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check, Level.OK, text)


def warning(check: str, text: str, fix: str) -> Finding:
    """Slower or less safe than it should be."""
    return Finding(check, Level.WARNING, text, fix)


def failure(check: str, text: str, fix: str) -> Finding:
    """It will not run, or not correctly."""
    return Finding(check, Level.FAILURE, text, fix)
