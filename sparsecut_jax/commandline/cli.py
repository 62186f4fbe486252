"""How every command starts and ends: flags in, exit codes out.

Exit codes: 0 done, 2 bad input (one sentence on stderr says what to fix), 3 stopped by SIGTERM after saving, 4 training
diverged, 5 another process of the run died.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import shlex
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import absl.logging
import jax
from absl import flags
from ml_collections import config_flags

from sparsecut_jax import config as config_lib
from sparsecut_jax.commandline import help_text, parsing
from sparsecut_jax.config import Config
from sparsecut_jax.runtime import hosts, platforms, watch
from sparsecut_jax.settings import DataConfig
from sparsecut_jax.types import Exit, UserError, shown

HELP = ("--help", "-help", "-h", "--helpfull", "--helpshort")
DEBUG = flags.DEFINE_boolean("debug", False, "Print the traceback of an error.")
_word = ""  # the subcommand, such as "check" in "data check"
PLATFORM = flags.DEFINE_enum("require_platform", None, ["tpu", "gpu", "cpu"], "Refuse to run on other devices.")


def define_config(workdir: bool = True) -> None:
    """Defines --config, a file that can be overridden key by key, and --print_config.

    workdir: also --workdir, for commands that have no flag of that name with another meaning.
    """
    config_flags.DEFINE_config_file(
        "config", None, "Config file, optionally with arguments after a colon.", lock_config=True
    )
    flags.DEFINE_boolean("print_config", False, "Print the resolved config as JSON and exit.")
    if workdir:
        flags.DEFINE_string("workdir", None, "Short for --config.workdir.")


def command_word() -> str:
    """The subcommand, which is removed from sys.argv; "" if there is none."""
    global _word
    _word = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    return _word


def shell_line(*args: str) -> str:
    """The shell line that runs this command with other arguments."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"python -m {module.name.removesuffix('.__main__')}" if module else os.path.basename(sys.argv[0])
    return f"{name} {shlex.join(args)}"


def need(*examples: str) -> None:
    """Raises UserError, which says what to type, if a flag is missing. examples: the flags, each with an example value."""
    lacking = [each for each in examples if not flags.FLAGS[each.partition("=")[0].lstrip("-")].value]
    if lacking:
        names = " and ".join(each.partition("=")[0] for each in lacking)
        empty = {each.partition("=")[0] + "=" for each in lacking}
        typed = [arg for arg in sys.argv[1:] if arg not in empty]
        line = shell_line(*([_word] if _word else []), *typed, *lacking)
        raise UserError(f"{names} {'is' if len(lacking) == 1 else 'are'} missing; for example: {line}")


def run(
    command: Callable[..., None],
    doc: str,
    resumes: bool = False,
    arguments: bool = False,
    words_of: Mapping[str, Sequence[str]] = types.MappingProxyType({}),
) -> None:
    """Parses the flags, runs the command, and turns its errors into a sentence and an exit code.

    Args:
      command: the command, called without arguments, or with the positional ones if `arguments`.
      doc: its help text.
      resumes: whether running the same command again resumes the work.
      arguments: whether the command takes positional arguments.
      words_of: {flag: the subcommands that read it}, for flags that only some of them read.
    """
    helps = [arg for arg in sys.argv[1:] if arg.partition("=")[0] in HELP]
    debug = "--debug" in sys.argv
    _quiet(debug)
    try:
        if helps:
            sys.argv = [arg for arg in sys.argv if arg not in helps]
            print(_help(command, doc, helps[0].partition("=")[2], words_of), flush=True)
            return
        given = _parse(arguments)
        _check_words(words_of)
        if not debug:  # parsing the flags has set absl's own level
            absl.logging.set_verbosity(absl.logging.FATAL)
        _keep_compiled()
        only_prints = "print_config" in flags.FLAGS and flags.FLAGS.print_config
        if "coordinator" in flags.FLAGS and not only_prints:
            hosts.start(resumes, debug)
        platforms.require(PLATFORM.value)
        with hosts.together():
            command(*given)
    except UserError as error:
        _fail(2, str(error), debug)
    except Exit as error:
        _fail(error.code, str(error), debug)
    except KeyboardInterrupt:
        again = "; run the same command to resume from the last checkpoint" if resumes else ""
        _fail(130, f"interrupted{again}", debug)
    except BrokenPipeError:  # the reader of the output (`head`, for example) has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        _fail(2, f"{error.filename or 'file system'}: {error.strerror or error}", debug)
    except MemoryError as error:
        _fail(2, f"out of memory: {error}; lower batch_size, seq_len or the sizes of the model", debug)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        what = str(error).splitlines()[0]
        _fail(2, f"out of device memory: {what}; lower batch_size, seq_len or the sizes of the model", debug)
    except (RuntimeError, AssertionError) as error:
        reason = platforms.missing(error)
        if reason is None:
            raise
        _fail(2, reason, debug)


def typed_config(required: bool = True, also: Mapping[str, Any] | None = None) -> Config:
    """The checked config of --config and its overrides; all defaults where none is given and none `required`.

    With --print_config it is printed, and the command ends.

    also: settings that flags of the command's own give, {"init.llm": "DIR"}.
    """
    raw = flags.FLAGS.config
    if raw is None and parsing.config_file():
        raise UserError(f"config file {parsing.config_file()!r}: get_config() returned None; it must return the config")
    if required:
        need("--config=configs/base.py")
    given = list(also or ()) + ([] if raw is None else list(config_flags.get_override_values(flags.FLAGS["config"])))
    raw = (config_lib.default() if raw is None else raw).to_dict()
    for name, value in (also or {}).items():
        group, _, key = name.partition(".")
        raw.setdefault(group, {})[key] = value
    cfg = config_lib.asked(raw, given)
    if flags.FLAGS.print_config:
        _print_config(cfg)
        sys.exit(0)
    return cfg


def _print_config(cfg: Config) -> None:
    """Prints the config as JSON on stdout and, on stderr, whether its sizes come from the weights in config.init."""
    from sparsecut_jax.weights.claims import adopt_here  # here: it imports transformers

    cfg, _, here, away = adopt_here(cfg)
    print(config_lib.to_json(cfg), flush=True)
    for note, paths in {
        "sizes are those of": here, "not on this machine, so the config's sizes are used": away
    }.items():  # fmt: skip
        if paths:
            print(f"{note}: {', '.join(paths)}", file=sys.stderr)


def _parse(arguments: bool = False) -> list[str]:
    """Sets the flags from the command line; returns what is no flag, where the command takes such `arguments`."""
    rest = parsing.parse(arguments)
    if flags.FLAGS.find_module_defining_flag("workdir") == __name__:
        _set_workdir()
    return rest


def _set_workdir() -> None:
    """--workdir into the config. Raises UserError where --config.workdir says something else."""
    given, raw = flags.FLAGS.workdir, flags.FLAGS.config
    if given is None or raw is None:
        return
    other = config_flags.get_override_values(flags.FLAGS["config"]).get("workdir", given)
    if other != given:
        raise UserError(f"--workdir={given} and --config.workdir={other} are different folders; give only one")
    raw.workdir = given


def _check_words(words_of: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError for a given flag that the subcommand does not read."""
    known = set(itertools.chain(*words_of.values()))
    for flag, words in words_of.items():
        if _word in known and _word not in words and flags.FLAGS[flag].present:
            of_data = flag in {field.name for field in dataclasses.fields(DataConfig)}
            instead = f"{_word} reads --config.data.{flag}" if of_data else f"--help lists the flags of {_word}"
            raise UserError(f"--{flag} is a flag of {' and '.join(words)}, not of {_word}; {instead}")


def _help(command: Callable[[], None], doc: str, search: str, words_of: Mapping[str, Sequence[str]]) -> str:
    """What --help or --help=SEARCH prints."""
    modules = flags.FLAGS.flags_by_module_dict()  # absl calls a module that is run as a program by its file
    module = sys.argv[0] if command.__module__ == "__main__" else command.__module__
    own = [f for name in (module, __name__, hosts.__name__) for f in modules.get(name, [])]
    words = set(itertools.chain(*words_of.values()))
    own = [f for f in own if _word not in words or _word in words_of.get(f.name, words)]
    cfg, file = None, ""
    if any(flag.name == "config" for flag in own):
        cfg, file = Config(), parsing.config_file() or ""
        if file:
            _parse()
            cfg, file = config_lib.check(flags.FLAGS.config), flags.FLAGS["config"].config_filename
    readers = {} if _word in words else words_of
    return help_text.help_text(doc, own, readers, cfg, file, search)


def _quiet(debug: bool) -> None:
    """Hides library logs that a user cannot act on."""
    if debug:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that there is no PyTorch
    warnings.filterwarnings("ignore")
    for name in ("absl", "jax", "orbax", "grain", "matplotlib", "transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _keep_compiled() -> None:
    """Caches compiled programs for later starts; JAX_ENABLE_COMPILATION_CACHE=0 turns this off."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(cache, "sparsecut_jax", "xla")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if "://" not in folder:  # JAX can also keep it in a bucket
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            folder = None
    jax.config.update("jax_compilation_cache_dir", folder)


def _fail(code: int, sentence: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    sys.stdout.flush()
    if hosts.first() or code not in watch.ALIKE:
        who = f"{hosts.name()}: " if hosts.several() else ""
        print(f"{who}{'error: ' if code == 2 else ''}{shown(sentence)}", file=sys.stderr, flush=True)
    hosts.leave(code, sentence)
    sys.exit(code)
