"""Parses the command line into absl's flags; every error in it or in the config file is one sentence."""

from __future__ import annotations

import itertools
import os
import sys
import traceback

from absl import flags

from sparsecut_jax import config as config_lib
from sparsecut_jax.commandline import config_files
from sparsecut_jax.types import UserError, nearest


def parse(arguments: bool) -> list[str]:
    """Sets the flags from the command line, and returns its `arguments`, where the command takes any.

    Raises UserError in one sentence for whatever absl or the config file says.
    """
    file = config_file()
    for arg in sys.argv[1:]:
        name, given, value = arg.lstrip("-").partition("=")
        if arg.startswith("-") and name.startswith("config."):
            config_lib.check_override(name, value if given else None)
            if "config" in flags.FLAGS and not file:
                raise UserError(
                    f"--{name} changes a setting of a config file; name one, such as --config=configs/base.py"
                )
    argv = [*sys.argv[:1], *map(_with_underscores, sys.argv[1:])]
    if file:
        ((at, value),) = _config_arguments()
        path = value.split(":", 1)[0]
        if file != path:
            print(f"{path} is not in this folder; using the one that comes with sparsecut_jax, {file}", file=sys.stderr)
        argv[at] = argv[at].removesuffix(value) + file + value.removeprefix(path)
        config_files.provide_siblings(file)
    try:
        rest = flags.FLAGS(argv)
    except UserError:
        raise
    except flags.UnrecognizedFlagError as error:
        near = nearest(error.flagname, list(flags.FLAGS))
        raise UserError(f"unknown flag --{error.flagname}{near} (--help lists the flags)") from error
    except flags.Error as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, Exception) and "parsing config file" in str(error):
            raise UserError(f"config file {file!r}: {_cause(cause, file)}") from error
        raise UserError(str(error).strip().splitlines()[0]) from error
    except KeyError as error:
        for arg in sys.argv[1:]:
            name = arg.lstrip("-").partition("=")[0].split(".")
            if name[:2] == ["config", "stages"] and len(name) > 2 and repr(name[2]) in str(error.args[0]):
                raise UserError(f"config.stages.{name[2]} is not a stage in {file!r}: {_cause(error, file)}") from error
            if name[:3] == ["config", "data", "mix"] and len(name) > 3 and repr(name[3]) in str(error.args[0]):
                raise UserError(
                    f"config.data.mix.{name[3]} is not a source in {file!r}; add sources in that file"
                ) from error
        raise UserError(f"config file {file!r}: {_cause(error, file)}") from error
    except Exception as error:  # a config file may raise anything, and the user has to fix it
        for name in (arg.lstrip("-").partition("=")[0] for arg in sys.argv[1:]):
            given = name.startswith("config.data.mix.") or ".lr_of." in name
            if given and repr(name.split(".")[-1]) in str(error):
                raise UserError(f"{name}: {file!r} has no such key; add it there") from error
        raise UserError(f"config file {file!r}: {_cause(error, file)}") from error
    if len(rest) > 1 and not arguments:
        how = "settings are written --config.KEY=VALUE" if "config" in flags.FLAGS else "flags are written --NAME=VALUE"
        raise UserError(f"unexpected argument {rest[1]!r}; {how} (--help lists them)")
    return rest[1:]


def _with_underscores(arg: str) -> str:
    """--skip-bad as --skip_bad: absl's names have underscores, and people type both."""
    name, given, value = arg.partition("=")
    flag = name.lstrip("-").replace("-", "_")
    return f"--{flag}{given}{value}" if name.startswith("-") and flag in flags.FLAGS else arg


def config_file() -> str | None:
    """The file that --config names, which may be a shipped one. Raises UserError if it is not there."""
    given = _config_arguments()
    if len(given) > 1:
        raise UserError(f"--config is given {len(given)} times: {', '.join(v for _, v in given)}; expected once")
    return config_files.find(given[0][1].split(":", 1)[0]) if given else None


def _config_arguments() -> list[tuple[int, str]]:
    """Values of --config in sys.argv, each with the index of the argument that holds it."""
    found = [(i, a.partition("=")[2]) for i, a in enumerate(sys.argv) if a.lstrip("-").startswith("config=")]
    pairs = enumerate(itertools.pairwise(sys.argv), start=1)
    return found + [(i, value) for i, (flag, value) in pairs if flag in ("--config", "-config")]


def _cause(error: Exception, file: str | None) -> str:
    """What a config file raised, and on which of its lines."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if os.path.abspath(f.filename) == os.path.abspath(file or "")
    ]
    where = f" (line {frames[-1].lineno})" if frames else ""
    if isinstance(error, AttributeError) and error.name == "get_config":
        return "it does not define get_config()"
    if isinstance(error, KeyError) and error.args:
        return " ".join(str(error.args[0]).split()) + where  # a name that is not there, and the nearest one
    said, kind = (str(error).strip().splitlines() or [""])[-1], type(error).__name__
    return f"{kind}: {said.removeprefix(f'{kind}: ')}{where}"
