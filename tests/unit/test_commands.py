"""Every command and every option, found in the parsers themselves: help with an example, a mistake is one sentence and
exit code 2, and completion that works in bash and zsh.
"""

import argparse
import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from deploy import cli
from loadgen import cli as load_cli

ATOLL = cli.build_parser()
(SUBPARSERS,) = [a for a in ATOLL._actions if isinstance(a, argparse._SubParsersAction)]
# a parser's words -> (parser, entry point); what has to be given for the rest to be looked at
PARSERS = {(): ATOLL, **{(name,): parser for name, parser in SUBPARSERS.choices.items()}}
NEEDED = {
    "run": ["expert", "--cluster", "{wrong}", "--index", "0"],
    "render": ["systemd", "--cluster", "{wrong}", "--out", "{fresh}"],
    "plan": ["--cluster", "{wrong}", "--trace", "{wrong}", "--out", "{fresh}"],
    "slurm": ["step", "--role", "expert", "--job-dir", "{wrong}"],
}


FREE = {
    "prompt",
    "host",
    "program",
    "salt",
    "model",
    "print_completion",
}  # of these any text will do here


def nested():
    """Every parser below atoll's, however deep, and atoll-load's."""
    todo = [((), ATOLL)]
    while todo:
        words, parser = todo.pop()
        yield "atoll", words, parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                todo += [((*words, name), child) for name, child in action.choices.items()]
    yield "atoll-load", (), load_cli._parser()


ALL = [
    pytest.param(program, words, parser, id=" ".join((program, *words)))
    for program, words, parser in nested()
]
ENTRY = {"atoll": cli.main, "atoll-load": load_cli.main}


def call(program, arguments, capsys):
    """Exit code, stdout and stderr."""
    try:
        code = ENTRY[program]([str(a) for a in arguments])
    except SystemExit as exc:
        code = exc.code
    told = capsys.readouterr()
    return code, told.out, told.err


def is_one_sentence(text, program):
    return (
        text.count("\n") == 1
        and re.match(rf"{program}( \S+)?: ", text)
        and len(text) > len(program) + 12
    )


@pytest.mark.parametrize(("program", "words", "parser"), ALL)
def test_help_has_an_example_and_explains_every_option(program, words, parser, capsys):
    code, out, _ = call(program, [*words, "--help"], capsys)
    assert code == 0
    example = out[out.index("example") :]
    name = " ".join((program, *words))
    assert re.search(rf"^ *(example: )?{name}\b", example, re.MULTILINE), example
    for action in parser._actions:
        assert action.help, f"{name} does not explain {action.option_strings or action.dest}"


@pytest.mark.parametrize(("program", "words", "parser"), ALL)
def test_an_unknown_option_or_nothing_at_all(program, words, parser, capsys):
    code, out, err = call(program, [*words, "--no-such-option"], capsys)
    assert (code, out) == (2, "")
    assert is_one_sentence(err, program), err


def options():
    """Those whose value can be wrong, in its form or because it names nothing."""
    for program, words, parser in nested():
        for action in parser._actions:
            free = action.type is None and not action.choices and action.dest in FREE
            if action.option_strings and action.nargs != 0 and not free:
                yield pytest.param(
                    program, words, action, id=f"{' '.join(words)} {action.option_strings[-1]}"
                )


@pytest.mark.parametrize(("program", "words", "action"), list(options()))
def test_a_wrong_value_is_one_sentence(program, words, action, capsys, tmp_path):
    """A path below a file cannot be; "nonsense" is no number, no address and none of any choice."""
    (tmp_path / "file").write_text("")
    wrong = tmp_path / "file/nowhere"
    given = [
        a.format(wrong=wrong, fresh=tmp_path / "fresh") for a in NEEDED.get("".join(words[:1]), [])
    ]
    value = wrong if action.type is Path else "nonsense"
    url = ["http://127.0.0.1:9"] if program == "atoll-load" else []
    code, out, err = call(program, [*words, *url, *given, action.option_strings[-1], value], capsys)
    assert (code, out) == (2, ""), (out, err)
    assert is_one_sentence(err, program), err
    assert str(value) in err, "the sentence does not name what is wrong"


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_what_is_required_is_asked_for(name, capsys):
    code, _, err = call("atoll", [name], capsys)
    assert code == 2
    assert is_one_sentence(err, "atoll")
    assert "required" in err


def script(program, shell, capsys):
    code, out, _ = call(program, ["--print-completion", shell], capsys)
    assert code == 0
    return out


BASH = """\
source {file}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMP_LINE="{words}"; COMP_POINT=${{#COMP_LINE}}
complete=$(complete -p {program} | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
$complete {program} "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
WANTED = [
    ("atoll", "atoll d", {"doctor", "demo"}),
    ("atoll", "atoll up --wi", {"--wire"}),
    ("atoll", "atoll up --wire f", {"fp8", "fp32"}),
    ("atoll", "atoll render s", {"systemd", "slurm"}),
    ("atoll-load", "atoll-load --conc", {"--concurrency"}),
]


@pytest.mark.parametrize(("program", "words", "wanted"), WANTED)
def test_completion_in_bash(program, words, wanted, capsys, tmp_path):
    (tmp_path / "completion").write_text(script(program, "bash", capsys))
    text = BASH.format(file=tmp_path / "completion", words=words, program=program)
    done = subprocess.run(
        ["bash", "--norc", "-c", text], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == wanted, done.stderr


def test_completion_of_files_in_bash(capsys, tmp_path):
    (tmp_path / "completion").write_text(script("atoll", "bash", capsys))
    (tmp_path / "cluster.toml").touch()
    words = f"atoll up --cluster {tmp_path}/clu"
    text = BASH.format(file=tmp_path / "completion", words=words, program="atoll")
    done = subprocess.run(
        ["bash", "--norc", "-c", text], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [f"{tmp_path}/cluster.toml"]


def plain(shown):
    """Without what moves the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\x07", "", shown.decode(errors="replace"))


def zsh_shows(keys, file, directory, until):
    """What an interactive zsh shows after the keys, until it has shown `until`, for 20 s at most."""
    pid, fd = pty.fork()
    if pid == 0:
        environment = {"HOME": str(directory), "PATH": os.environ["PATH"], "TERM": "dumb"}
        os.execve(shutil.which("zsh"), ["zsh", "-f", "-i"], environment)
    shown = b""
    setup = f"PS1='$ '; fpath=({file.parent} $fpath); autoload -U compinit; compinit -u -D; echo re''ady\n"
    try:
        os.write(fd, setup.encode())
        sent, deadline = False, time.monotonic() + 20
        while time.monotonic() < deadline and not (sent and until in plain(shown)):
            if select.select([fd], [], [], 0.1)[0]:
                shown += os.read(fd, 4096)
            if not sent and b"ready" in shown:
                sent, shown = True, b""
                os.write(fd, keys.encode())
        return plain(shown)
    finally:
        os.close(fd)
        os.waitpid(pid, 0)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(
    ("program", "keys", "whole"),
    [
        ("atoll", "atoll doc\t", "atoll doctor"),
        ("atoll", "atoll up --experts-p\t", "atoll up --experts-per-gpu"),
        ("atoll", "atoll up --wire b\t", "atoll up --wire bf16"),
        ("atoll-load", "atoll-load http://x --conc\t", "atoll-load http://x --concurrency"),
    ],
)
def test_completion_in_zsh(program, keys, whole, capsys, tmp_path):
    file = tmp_path / f"_{program}"
    file.write_text(script(program, "zsh", capsys))
    assert whole in zsh_shows(keys, file, tmp_path, whole)
