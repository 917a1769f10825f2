"""deploy/README.md's "A UCX with verbs": another UCX than the wheel's is loaded, named by the doctor and carries bytes.

The other one is a copy of the wheel's in a directory like that of a system's: what is tried is where it comes from.
"""

import asyncio
import os
import re
import shutil
import sys
from pathlib import Path

import libucx
import pytest

from common.transport.carriers import LinkClass
from deploy.doctor import judge_host, transfers
from deploy.doctor.judge_host import ucx as judge
from deploy.doctor.transfers import PROBE
from tests.doctor_facts import CPU_NEED

WHEEL = Path(libucx.__file__).parent
ROOT = Path(__file__).parents[2]
README = ROOT / "deploy/README.md"


@pytest.fixture
def system(tmp_path):
    """The copy, with names as `make install` of UCX leaves them."""
    library = tmp_path / "lib"
    (library / "ucx").mkdir(parents=True)
    for source in [*WHEEL.glob("lib/*.so*"), *WHEEL.glob("lib/ucx/*.so*")]:
        shutil.copy(source, library / source.relative_to(WHEEL / "lib"))
    return library


@pytest.fixture
def settings(system):
    """The variables that the README gives, for this place."""
    (line,) = re.findall(
        r"^Environment=(RAPIDS\S+ LD_LIBRARY_PATH=\S+)$", README.read_text(), re.MULTILINE
    )
    pairs = dict(word.split("=") for word in line.split())
    assert pairs["LD_LIBRARY_PATH"] == "/opt/ucx/lib"
    return {**pairs, "LD_LIBRARY_PATH": str(system)}


def about(monkeypatch, settings):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return asyncio.run(transfers.about())


def test_it_is_loaded_and_the_doctor_says_so(monkeypatch, system, settings):
    found = about(monkeypatch, settings)
    assert (found.problem, Path(found.library).parent, found.is_wheel) == ("", system, False)
    (line,) = judge(found, CPU_NEED, has_rdma=False)
    assert f"of {system}/libucp.so" in line.text
    assert "(not the pip wheel)" in line.text


def test_it_carries_bytes(system, settings):
    python = (sys.executable, "-m", PROBE)
    environment = {**transfers.environment_of(LinkClass.TCP, devices="lo"), **settings}
    ends = transfers.Ends(
        LinkClass.TCP, "", (*python, "sender"), (*python, "receiver"), environment
    )
    (found,) = asyncio.run(transfers.measure_all([ends]))
    assert (found.problem, found.carriers) == ("", ("tcp/lo",))
    assert found.gb_per_s > 0


@pytest.mark.parametrize("lacking", ["RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY", "LD_LIBRARY_PATH"])
def test_without_either_variable_it_is_the_wheels(monkeypatch, settings, lacking):
    del settings[lacking]
    monkeypatch.delenv(lacking, raising=False)
    assert about(monkeypatch, settings).is_wheel


def test_without_the_names_of_a_development_package_it_is_the_wheels(monkeypatch, system, settings):
    """The trap of distributions, whose libucx0 has libucp.so.0 alone: ucxx takes the wheel's and says nothing."""
    for path in system.glob("lib*.so"):
        path.unlink()
    found = about(monkeypatch, settings)
    assert found.is_wheel
    (line,) = judge(found, CPU_NEED, has_rdma=False)
    assert "(the pip wheel)" in line.text
    assert os.listdir(system)


def test_the_doctor_points_at_a_chapter_that_is_there():
    file, chapter = judge_host._SYSTEM_UCX.split(", ")
    assert (ROOT / file).read_text().count(f"\n## {chapter.strip(chr(34))}\n") == 1
