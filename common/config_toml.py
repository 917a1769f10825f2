"""Dataclasses from TOML and back: types, ranges and unknown keys, each failure naming file, line and key.

The dataclasses say what is legal: the annotation gives the type, `metadata["range"]` or `metadata["choices"]` the
values, a default makes a key optional. tomllib keeps no positions, so the line of a key is found by a scan of the text;
keys written in a way the scan does not follow (dotted, inline tables) are reported without a line.
"""

import difflib
import json
import re
import tomllib
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from common.errors import ConfigError

_TABLE = re.compile(r"^\s*\[\s*([A-Za-z0-9_-]+)\s*\]\s*(?:#.*)?$")
_ARRAY_TABLE = re.compile(r"^\s*\[\[\s*([A-Za-z0-9_-]+)\s*\]\]\s*(?:#.*)?$")
_KEY = re.compile(r"^\s*[\"']?([A-Za-z0-9_-]+)[\"']?\s*=")
_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed document, its text for line numbers and the directory that relative paths start from."""

    name: str
    document: dict[str, Any]
    text: str = ""
    directory: Path | None = None

    @classmethod
    def read(cls, path: Path) -> "Source":
        """Raises ConfigError when the file cannot be read or is no TOML."""
        try:
            text = path.read_text()
            return cls(str(path), tomllib.loads(text), text, path.absolute().parent)
        except OSError as exc:
            raise ConfigError(f"{path}: {exc.strerror}") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{path}: {exc}") from exc

    def error(self, where: str, sentence: str) -> ConfigError:
        """An error about the key `where` ("section.key", "nodes[1].key" or "" for the whole file)."""
        line = _line_of(self.text, where) if where else None
        place = self.name if line is None else f"{self.name}:{line}"
        return ConfigError(f"{place}: {where} {sentence}" if where else f"{place}: {sentence}")


def build(tree: type[Any], source: Source) -> Any:  # noqa: ANN401  -- an instance of `tree`
    """An instance of the dataclass `tree`: one field per section. Raises ConfigError."""
    hints = get_type_hints(tree)
    _reject_unknown(source.document, list(hints), source, "")
    sections: dict[str, Any] = {}
    for f in fields(tree):
        hint = hints[f.name]
        if f.name in source.document:
            sections[f.name] = _section_value(hint, source.document[f.name], source, f.name)
        elif f.default is MISSING and f.default_factory is MISSING:
            table = f"[[{f.name}]]" if get_args(hint) else f"[{f.name}]"
            raise source.error("", f"a {table} table is needed")
    return tree(**sections)


def check_values(tree: Any, source: Source) -> None:  # noqa: ANN401  -- any dataclass of sections
    """Apply ranges and choices to a tree that was built in code. Raises ConfigError."""
    for f in fields(tree):
        value = getattr(tree, f.name)
        many = value if isinstance(value, tuple) else (value,)
        for i, section in enumerate(many):
            where = f"{f.name}[{i}]" if isinstance(value, tuple) else f.name
            for inner in fields(section):
                _check(inner, getattr(section, inner.name), source, f"{where}.{inner.name}")


def render(tree: Any) -> str:  # noqa: ANN401  -- any dataclass of sections
    """The TOML of a tree; keys that are None are left out."""
    blocks: list[str] = []
    for f in fields(tree):
        value = getattr(tree, f.name)
        if isinstance(value, tuple):
            blocks.extend(_table(f"[[{f.name}]]", section) for section in value)
        else:
            blocks.append(_table(f"[{f.name}]", value))
    return "\n".join(blocks)


def _table(header: str, section: Any) -> str:  # noqa: ANN401
    lines = [header]
    for f in fields(section):
        value = getattr(section, f.name)
        if value is not None:
            lines.append(f"{f.name} = {_literal(value)}")
    return "\n".join(lines) + "\n"


def _literal(value: bool | float | str | Path | tuple[str, ...]) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    # JSON's escapes are TOML's, but TOML also wants DEL escaped
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _section_value(hint: Any, value: Any, source: Source, where: str) -> Any:  # noqa: ANN401
    if is_dataclass(hint):
        return _section(hint, value, source, where)
    if not isinstance(value, list):
        raise source.error(where, f"must be written as [[{where}]] tables")
    element = get_args(hint)[0]
    return tuple(_section(element, v, source, f"{where}[{i}]") for i, v in enumerate(value))


def _section(section_type: Any, table: Any, source: Source, where: str) -> Any:  # noqa: ANN401
    if not isinstance(table, dict):
        raise source.error(where, "must be a table")
    hints = get_type_hints(section_type)
    _reject_unknown(table, list(hints), source, where + ".")
    values: dict[str, Any] = {}
    for f in fields(section_type):
        if f.name in table:
            key = f"{where}.{f.name}"
            values[f.name] = _typed(hints[f.name], table[f.name], source, key)
            _check(f, values[f.name], source, key)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise source.error(where, f"needs a key {f.name!r}")
    return section_type(**values)


def _typed(hint: Any, value: Any, source: Source, where: str) -> Any:  # noqa: ANN401
    if hint is Path or Path in get_args(hint):
        if not isinstance(value, str) or not value or "\0" in value:
            raise source.error(where, f"must be a path, not {value!r}")
        try:
            path = Path(value).expanduser()
        except RuntimeError as exc:  # "~nobody" without such a user
            raise source.error(where, f"must be a path, not {value!r}: {exc}") from exc
        return source.directory / path if source.directory else path
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise source.error(where, f"must be a list of strings, not {value!r}")
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise source.error(where, f"must be {_WORDS[hint]}, not {value!r}")
    return value


def _check(f: "Field[Any]", value: Any, source: Source, where: str) -> None:  # noqa: ANN401
    if "range" in f.metadata:
        low, high = f.metadata["range"]
        if not low <= value <= high:  # also false for nan
            raise source.error(where, f"must be {low} to {high}, not {value}")
    if "choices" in f.metadata and value not in f.metadata["choices"]:
        choices = ", ".join(f.metadata["choices"])
        raise source.error(where, f"must be one of {choices}, not {value!r}")


def _reject_unknown(table: dict[str, Any], known: list[str], source: Source, prefix: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise source.error(prefix + key, f"is not a known key{hint}")


def _line_of(text: str, where: str) -> int | None:
    """The 1-based line of "section.key", "section[2].key" or a section itself; None when the scan does not find it.

    A key that is not there has its section's line.
    """
    section, _, key = where.partition(".")
    current, seen, header = "", dict[str, int](), None
    for number, line in enumerate(text.splitlines(), start=1):
        if (table := _ARRAY_TABLE.match(line)) is not None:
            name = table[1]
            seen[name] = seen.get(name, -1) + 1
            current = f"{name}[{seen[name]}]"
        elif (table := _TABLE.match(line)) is not None:
            current = table[1]
        elif (match := _KEY.match(line)) is not None:
            if (current, match[1]) == (section, key) or (not current and where == match[1]):
                return number
            continue
        else:
            continue
        if section in (current, current.partition("[")[0]):
            if not key:
                return number
            header = number
    return header
