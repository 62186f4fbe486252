"""How commands end. The commands themselves are run in test_train.py and test_convert.py."""

import pytest

from sparsecut_jax import cli
from sparsecut_jax.types import UserError


def fail(error: BaseException, monkeypatch, **how) -> int:
    monkeypatch.setattr(cli, "_parse", lambda: None)
    monkeypatch.setattr("sys.argv", ["command"])

    def command():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(command, "A command.", **how)
    return ended.value.code


def test_names_from_files_are_shown_and_not_obeyed(monkeypatch, capsys):
    """Line ends and escape codes in a tensor's name: still one line, and the terminal keeps its colours."""
    assert fail(UserError("tensor a\nb\x1b[31m is missing"), monkeypatch) == 2
    assert capsys.readouterr().err == "error: tensor a\\nb\\x1b[31m is missing\n"


def test_only_what_resumes_says_so(monkeypatch, capsys):
    assert fail(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert fail(KeyboardInterrupt(), monkeypatch, resumes=True) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from the last checkpoint\n"
