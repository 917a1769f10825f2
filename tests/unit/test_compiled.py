"""The compiled port: built once, and done without where it cannot be built."""

import stat

import pytest

from common.transport import compiled


@pytest.fixture(autouse=True)
def anew(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "_CACHE", tmp_path / "compiled")
    monkeypatch.delenv("ATOLL_COMPILED", raising=False)
    compiled.compiled_port.cache_clear()
    yield
    compiled.compiled_port.cache_clear()


def test_it_is_built_once_and_only_for_its_owner(tmp_path, monkeypatch):
    assert compiled.compiled_port().Port is not None
    (library,) = (tmp_path / "compiled").iterdir()
    assert stat.S_IMODE((tmp_path / "compiled").stat().st_mode) == 0o700
    compiled.compiled_port.cache_clear()
    monkeypatch.setattr("shutil.which", lambda name: None)  # nothing is left to compile
    assert compiled.compiled_port() is not None
    assert [library] == list((tmp_path / "compiled").iterdir())


@pytest.mark.parametrize(
    ("target", "value", "reason"),
    [
        ("shutil.which", lambda name: None, "there is no C compiler"),
        ("sysconfig.get_paths", lambda: {"include": "/nowhere"}, "cannot compile port.c"),
        ("importlib.util.find_spec", lambda name: None, "UCX's headers are not installed"),
    ],
)
def test_without_it_messages_go_on(monkeypatch, caplog, target, value, reason):
    monkeypatch.setattr(target, value)
    assert compiled.compiled_port() is None
    assert reason in caplog.text
    assert "UCXX's Python API" in caplog.text


def test_a_directory_that_cannot_be_written(monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compiled, "_CACHE", tmp_path / "file" / "compiled")
    assert compiled.compiled_port() is None
    assert "UCXX's Python API" in caplog.text


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("ATOLL_COMPILED", "0")
    assert compiled.compiled_port() is None


def test_wrong_arguments_are_refused():
    module = compiled.compiled_port()
    with pytest.raises(OSError, match=r"/nowhere\.so is not loaded"):
        module.use_library("/nowhere.so")
