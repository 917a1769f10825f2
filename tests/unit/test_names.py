"""Names that others look at: packages that share a name with somebody else's, and the version."""

import re
import tomllib
from pathlib import Path

from packaging.version import Version

import kernels

ROOT = Path(__file__).parents[2]


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_kernels_has_a_version_that_parses():
    """transformers 5.3 looks for a package `kernels` and raises InvalidVersion when it finds one without."""
    assert Version(kernels.__version__) == Version("0.0.0")


def test_changelog_starts_with_the_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == project()["version"]


def test_constraints_pin_releases_only():
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    assert "torch==2.13.0" in lines


def test_every_direct_dependency_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").split()
    pinned = {line.partition("==")[0] for line in lines}
    extras = project()["optional-dependencies"].values()
    wanted = [*project()["dependencies"], *(name for extra in extras for name in extra)]
    names = {re.match(r"[A-Za-z0-9-]+", name)[0].lower() for name in wanted}
    assert names - pinned == set()
