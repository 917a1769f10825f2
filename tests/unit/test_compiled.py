"""The compiled port: built once, and done without where it cannot be built."""

import stat
from pathlib import Path

import pytest

import common.transport.port
from common import compiled

PORT = Path(common.transport.port.__file__).with_name("port.c")


def port():
    return compiled.compiled(PORT, needs=("libucx",))


@pytest.fixture(autouse=True)
def anew(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))  # as under systemd
    monkeypatch.delenv("ATOLL_COMPILED", raising=False)
    compiled.compiled.cache_clear()
    yield
    compiled.compiled.cache_clear()


def test_it_is_built_once_and_only_for_its_owner(tmp_path, monkeypatch):
    assert port().Port is not None
    (library,) = (tmp_path / "compiled").iterdir()
    assert stat.S_IMODE((tmp_path / "compiled").stat().st_mode) == 0o700
    compiled.compiled.cache_clear()
    monkeypatch.setattr("shutil.which", lambda name: None)  # nothing is left to compile
    assert port() is not None
    assert [library] == list((tmp_path / "compiled").iterdir())


@pytest.mark.parametrize(
    ("target", "value", "reason"),
    [
        ("shutil.which", lambda name: None, "there is no C compiler"),
        ("sysconfig.get_paths", lambda: {"include": "/nowhere"}, "cannot compile port.c"),
        ("importlib.util.find_spec", lambda name: None, "the headers of libucx are not installed"),
    ],
)
def test_without_it_messages_go_on(monkeypatch, caplog, target, value, reason):
    monkeypatch.setattr(target, value)
    assert port() is None
    assert reason in caplog.text
    assert "its slower form in Python goes on" in caplog.text


def test_a_directory_that_cannot_be_written(monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "file"))
    assert port() is None
    assert "its slower form in Python goes on" in caplog.text


def test_what_others_may_write_is_not_executed(caplog, tmp_path):
    port()
    (tmp_path / "compiled").chmod(0o777)
    compiled.compiled.cache_clear()
    assert port() is None
    assert "is not ours alone to write" in caplog.text


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("ATOLL_COMPILED", "0")
    assert port() is None


def test_wrong_arguments_are_refused():
    module = port()
    with pytest.raises(OSError, match=r"/nowhere\.so is not loaded"):
        module.use_library("/nowhere.so")
