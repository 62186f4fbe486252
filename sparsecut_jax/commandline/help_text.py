"""What --help prints: a command's flags and every setting, each with its value, allowed values and meaning."""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from absl import flags

from sparsecut_jax.config import Config
from sparsecut_jax.types import UserError, nearest

MANY = "NAME"  # stands for the names of a group that has none yet


@dataclasses.dataclass(frozen=True)
class Entry:
    """A flag or setting: its name, its value as typed (None: it has none), allowed values and meaning."""

    name: str
    value: str | None
    kind: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Group:
    """Entries below a heading."""

    heading: str
    entries: list[Entry]


def help_text(
    doc: str,
    own: Sequence[flags.Flag],
    words_of: Mapping[str, Sequence[str]],
    cfg: Config | None,
    file: str,
    search: str,
) -> str:
    """The command's docstring, its flags, and for a command with --config every setting.

    Args:
      own: the command's flags.
      words_of: for flags that only some words behind the command read: these words.
      cfg: settings whose values are shown; None for a command without them.
      file: --config as given; empty where `cfg` are the defaults.
      search: only flags and settings that contain it, in their name or meaning; "": all.

    Raises:
      UserError: nothing contains `search`.
    """
    values = f"the values of {file}" if file else "their defaults (with --config=FILE: the values of that file)"
    about = f"settings, with {values}; --help=WORD shows only what contains WORD, such as --help=config.llm"
    groups = [Group("flags", [of_flag(flag, words_of.get(flag.name, ())) for flag in own])]
    groups += settings(cfg, Config(), "config") if cfg else []
    if search:
        matching = [Group(g.heading, [e for e in g.entries if _contains(e, search)]) for g in groups]
        if not any(group.entries for group in matching):
            names = [part for g in groups for e in g.entries for part in (e.name, e.name.rsplit(".")[-1])]
            raise UserError(
                f"--help={search}: no flag or setting contains this{nearest(search, names)}; --help shows them all"
            )
        groups, doc = [group for group in matching if group.entries], ""
    width = min(120, max(80, shutil.get_terminal_size((100, 24)).columns))
    blocks = [doc.strip()] if doc else []
    for group in groups:
        if group.heading.startswith("config") and about:
            blocks, about = [*blocks, textwrap.fill(about, width)], ""
        blocks.append("\n".join([textwrap.fill(group.heading, width), *(_shown(e, width) for e in group.entries)]))
    return "\n\n".join(blocks)


def settings(values: Any, defaults: Any, path: str) -> Iterator[Group]:
    """The groups of a dataclass of settings/, itself first. `values` and `defaults` are of the same class."""
    hints, own, below = typing.get_type_hints(type(values)), [], []
    for field in dataclasses.fields(values):
        value, default, hint = getattr(values, field.name), getattr(defaults, field.name), hints[field.name]
        name = f"{path}.{field.name}"
        if dataclasses.is_dataclass(hint):
            below += settings(value, default, name)
        elif typing.get_origin(hint) is dict and dataclasses.is_dataclass(kind := typing.get_args(hint)[1]):
            for key, each in value.items() or {MANY: kind()}.items():
                below += settings(each, kind(), f"{name}.{key}")
        else:
            changed = "" if value == default else f"; default {typed(default)}"
            own.append(Entry(f"--{name}", typed(value), kind_of(hint) + changed, field.metadata["meaning"]))
    meaning = " ".join(type(values).__doc__.split())
    yield Group(f"{path}: {meaning}", own)
    yield from below


FLAG_KINDS = {
    "string": "str", "multi string": "str, may be repeated", "comma separated list of strings": "a,b,c",
    "config object": "FILE.py or FILE.py:ARGUMENTS",
}  # fmt: skip


def of_flag(flag: flags.Flag, words: Sequence[str]) -> Entry:
    """A flag of absl; `words`: the subcommands that read it, () for all."""
    # absl puts an enumeration's values in front, and after a multi flag that it may be repeated
    meaning = re.sub(r"^<[^>]*>: |;\s*repeat this option to specify a list of values$", "", flag.help)
    meaning = f"{', '.join(words)}: {meaning}" if words else meaning
    if flag.boolean:
        return Entry(f"--{flag.name}", None, "switch", meaning)
    values = getattr(flag.parser, "enum_values", None)
    kind = one_of(values) if values else FLAG_KINDS.get(flag.flag_type(), flag.flag_type())
    default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    return Entry(f"--{flag.name}", None if default in (None, "") else typed(default), kind, meaning)


def kind_of(hint: Any) -> str:
    """Allowed values of a setting: "clip, siglip or dinov2", "int", "tuple of str"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return one_of(args)
    if origin is tuple:
        return f"tuple of {args[0].__name__}"
    if origin is dict:
        return f"{args[1].__name__} by name, from the config file"
    return "True or False" if hint is bool else hint.__name__


def one_of(values: Sequence[str]) -> str:
    return f"{', '.join(values[:-1])} or {values[-1]}" if len(values) > 1 else values[0]


def typed(value: Any) -> str:
    """A value as typed in a shell."""
    text = value if isinstance(value, str) else repr(value)
    return text if re.fullmatch(r"[\w.,:/@%+-]+", text) else f'"{text}"'


def _contains(entry: Entry, search: str) -> bool:
    return search.lower() in f"{entry.name} {entry.meaning}".lower()


def _shown(entry: Entry, width: int) -> str:
    value = "" if entry.value is None else f"={entry.value}"
    head = textwrap.fill(
        f"{entry.name}{value}  ({entry.kind})", width, initial_indent="  ", subsequent_indent=" " * 10,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    indent = " " * 6
    meaning = textwrap.fill(
        entry.meaning, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return f"{head}\n{meaning}"
