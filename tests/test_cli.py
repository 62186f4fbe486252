"""How commands end. The commands themselves are run in test_train.py and test_convert.py."""

import os

import jax
import pytest
from absl import flags

from sparsecut_jax import cli
from sparsecut_jax.types import UserError


def fail(error: BaseException, monkeypatch, **how) -> int:
    monkeypatch.setattr(cli, "_parse", lambda: None)
    monkeypatch.setattr("sys.argv", ["command"])
    flags.FLAGS.mark_as_parsed()

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


# ----------------------------------------------------------------------------------------------------------------------
# what has been compiled; that a second start compiles nothing is in test_train.py


@pytest.fixture
def kept(monkeypatch):
    """Function of environment variables: (folder, least seconds of a compilation) that JAX is told."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)

    def read(**variables) -> tuple[str | None, float | None]:
        for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        cli._keep_compiled()
        least = found.get("jax_persistent_cache_min_compile_time_secs")
        return found["jax_compilation_cache_dir"], least

    return read


def test_compiled_programs_are_kept_in_the_users_cache(kept, tmp_path):
    assert kept(HOME=tmp_path) == (f"{tmp_path}/.cache/sparsecut_jax/xla", 0.0)
    assert kept(HOME=tmp_path, XDG_CACHE_HOME=tmp_path / "xdg") == (f"{tmp_path}/xdg/sparsecut_jax/xla", 0.0)
    assert os.path.isdir(tmp_path / "xdg" / "sparsecut_jax" / "xla")


def test_jax_variables_say_where_and_which(kept, tmp_path):
    given = {"JAX_COMPILATION_CACHE_DIR": tmp_path / "a", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 2}
    assert kept(**given) == (f"{tmp_path}/a", None)
    assert kept(JAX_COMPILATION_CACHE_DIR="gs://bucket/a")[0] == "gs://bucket/a"
    assert not os.path.exists("gs:")


def test_a_cache_that_cannot_be_written_to_is_left_alone(kept, tmp_path):
    (tmp_path / "file").write_text("")
    assert kept(JAX_COMPILATION_CACHE_DIR=tmp_path / "file" / "a")[0] is None
