"""Documents drift: every path and module that they name must exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [name for name in ("ARCHITECTURE.md", "README.md") if (ROOT / name).exists()]
TOP = ("common", "kernels", "services", "deploy", "loadgen", "tests", ".ci")
SUFFIXES = ("", ".py", "/__init__.py")


def mentions(text):
    """`code/like/this` and `code.like.this` under one of our top folders, braces expanded."""
    for word in re.findall(r"`([A-Za-z0-9_./{},]+)`", text):
        head, brace, rest = word.partition("{")
        tails = rest.rstrip("}").split(",") if brace else [""]
        for tail in tails:
            name = head + tail
            if name.endswith(".X"):  # any of them
                continue
            if re.split(r"[./]", name.lstrip("."))[0] in [top.lstrip(".") for top in TOP]:
                yield name


def exists(name):
    paths = {name, name.replace(".", "/")}
    module = ROOT / (name.rpartition(".")[0].replace(".", "/") + ".py")  # of `module.attribute`
    found = any((ROOT / f"{path}{suffix}").exists() for path in paths for suffix in SUFFIXES)
    return found or module.is_file() or name == "kernels.__version__"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_paths_exist(document):
    names = set(mentions((ROOT / document).read_text()))
    assert {name for name in names if not exists(name)} == set()


def test_a_missing_path_would_be_found():
    text = (
        "see `common/none.py`, `services.router.{plan,none}` and `common/config.py`, `other.thing`"
    )
    assert sorted(mentions(text)) == [
        "common/config.py",
        "common/none.py",
        "services.router.none",
        "services.router.plan",
    ]
    assert not exists("common/none.py")
    assert exists("common/config.py")
    assert exists("common.config.load")
