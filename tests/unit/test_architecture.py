"""The layering rules and size budgets of ARCHITECTURE.md. Needs nothing but the standard library."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "kernels", "services", "deploy", "loadgen")

# who may import which of our packages; the longest prefix of a module decides
MAY_IMPORT = {
    "common": ("common",),
    "kernels": ("kernels",),
    "services": (),
    "services.gateway": ("common", "services.gateway"),
    "services.attention": ("common", "kernels", "services.attention"),
    "services.router": ("common", "kernels", "services.router"),
    "services.expert": ("common", "kernels", "services.expert"),
    "deploy": ("common", "deploy"),
    # trains the demo model with the same references that serve it
    "deploy.demo": ("common", "kernels", "deploy.demo"),
    "loadgen": ("loadgen",),
}
# deterministic modules: time, randomness and I/O come in as arguments
PURE = (
    "common.wire",
    "common.placement",
    "common.request",
    "common.transport.credits",
    "services.attention.gate_balance",
    "services.attention.scheduler",
    "services.attention.sequence",
    "services.attention.pages",
    "services.router.plan",
    "services.router.tables",
    "services.router.routes",
    "services.router.failover",
    "services.router.epochs",
    "services.router.load",
    "services.expert.batcher",
    "services.gateway.admission",
    "deploy.trace",
    "deploy.discover",
    "deploy.slurm.allocation",
    "deploy.render.description",
    "deploy.doctor.finding",
    "deploy.doctor.facts",
    "deploy.doctor.pci",
    "deploy.doctor.need",
    "deploy.doctor.judge_host",
    "deploy.doctor.judge_devices",
    "deploy.doctor.judge_cluster",
    "loadgen.stats",
)
IMPURE = {"asyncio", "time", "random", "os", "socket", "aiohttp", "ucxx", "torch", "logging"}
# heavy or replaceable third parties and the only places that may know them
ONLY_IN = {"ucxx": ("common.transport",), "triton": ("kernels",), "transformers": ()}
MAX_FILE, MAX_FUNCTION, MAX_KERNEL, MAX_TOTAL = 400, 60, 100, 37_110


def sources():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def under(name, prefixes):
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def imports(tree):
    for node in ast.walk(tree):  # into functions too: a lazy import is an edge as well
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level
            else:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(module, text):
    """Every broken rule of one module, as sentences."""
    tree = ast.parse(text)
    allowed = MAY_IMPORT[max((k for k in MAY_IMPORT if under(module, (k,))), key=len)]
    for name in imports(tree):
        top = name.split(".")[0]
        if not top:
            yield "has a relative import"
        if top in PACKAGES and not under(name, allowed):
            yield f"must not import {name}"
        if top in IMPURE and under(module, PURE):
            yield f"is pure and imports {name}"
        if top in ONLY_IN and not under(module, ONLY_IN[top]):
            yield f"must leave {top} to {ONLY_IN[top] or 'the tests'}"
    if text.count("\n") > MAX_FILE:
        yield f"has {text.count(chr(10))} lines"
    limit = MAX_KERNEL if under(module, ("kernels",)) else MAX_FUNCTION
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > limit:
                yield f"{node.name} has {length} lines"


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in sources()])
def test_module_keeps_the_rules(module, path):
    assert list(violations(module, path.read_text())) == []


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=m) for m, p in sources() if p.stem == "__init__"]
)
def test_package_exports_nothing(path):
    body = ast.parse(path.read_text()).body
    if path.parent.name != "kernels":  # carries __version__, see test_names.py
        assert all(isinstance(node, ast.Expr) for node in body), "only a docstring belongs here"


def test_total_size():
    compiled = [path for package in PACKAGES for path in (ROOT / package).rglob("*.[ch]")]
    files = [*compiled, *(path for _, path in sources())]
    assert sum(path.read_text().count("\n") for path in files) <= MAX_TOTAL


def test_what_is_written_in_c_is_installed():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    found = [path for package in PACKAGES for path in (ROOT / package).rglob("*.[ch]")]
    assert found
    for path in found:
        package = ".".join(path.parent.relative_to(ROOT).parts)
        patterns = data.get(package, [])
        assert any(map(path.match, patterns)), f"a wheel would lack {path.name}"


@pytest.mark.parametrize(
    ("module", "text", "sentence"),
    [
        (
            "services.gateway.app",
            "import services.router.plan",
            "must not import services.router.plan",
        ),
        ("services.gateway.app", "from kernels import gate", "must not import kernels.gate"),
        ("common.config", "def f():\n    import kernels", "must not import kernels"),
        ("common.wire.header", "import time", "is pure and imports time"),
        (
            "services.expert.batcher",
            "from asyncio import Event",
            "is pure and imports asyncio.Event",
        ),
        ("deploy.cli", "import services.expert.worker", "must not import services.expert.worker"),
        ("loadgen.client", "import common.config", "must not import common.config"),
        ("services.expert.worker", "import ucxx", "must leave ucxx to"),
        ("common.ids", "from . import errors", "has a relative import"),
        ("common.ids", "x = 1\n" * 401, "has 401 lines"),
        ("common.ids", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
    ],
)
def test_planted_violation_is_found(module, text, sentence):
    (found,) = violations(module, text)
    assert found.startswith(sentence)
