"""The tokenizer: one from Hugging Face, or a byte-level BPE trained on the dataset.

A byte-level vocabulary has no unknown words, so a model trained on little text accepts any prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError, first_line

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SHORT = 500  # characters; longer texts rarely repeat and would fill the cache


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Converts text to ids and back. Text never becomes a special token, whatever it looks like.

    Attributes:
      backend: the `tokenizers` object.
      pad, bos, eos: ids; bos is -1 for a tokenizer without one.
      chat_template: Jinja program that renders a conversation (text/templates.py); "" for none.
    """

    backend: Backend
    pad: int
    bos: int
    eos: int
    chat_template: str = ""

    def __hash__(self) -> int:
        return id(self)

    def __reduce__(self):  # for worker processes; a pickled backend would lose `encode_special_tokens`
        return from_json, (self.to_json(),)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without special tokens."""
        return self._short(text) if len(text) <= SHORT else self._encode(text)

    @functools.lru_cache(maxsize=50_000)  # questions repeat, and a look-up is cheaper than the backend
    def _short(self, text: str) -> tuple[int, ...]:
        return self._encode(text)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.backend.encode(_whole(text), add_special_tokens=False).ids) if text else ()

    @functools.lru_cache(maxsize=100)
    def split_special(self, text: str) -> tuple[str | int, ...]:
        """Splits a template's text at the names of added tokens: pieces of text with ids between them; the last is text.

        All added tokens count, because some models have an end-of-turn token that is not marked as special. A token that
        is defined to absorb adjacent white space (as in Phi-3) absorbs that of the template.
        """
        named = {t.content: (i, t) for i, t in self.backend.get_added_tokens_decoder().items()}
        if not named:
            return (text,)
        pieces = re.split("(" + "|".join(map(re.escape, sorted(named, key=len, reverse=True))) + ")", text)
        for at in range(1, len(pieces), 2):
            pieces[at], token = named[pieces[at]]
            if token.lstrip:
                pieces[at - 1] = pieces[at - 1].rstrip()
            if token.rstrip:
                pieces[at + 1] = pieces[at + 1].lstrip()
        return tuple(pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @property
    def size(self) -> int:
        """1 + the largest id, added tokens included: the number of rows that an embedding needs."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def with_special(self, name: str) -> tuple[Tokenizer, int]:
        """A tokenizer with the additional special token `name` (if it is new), and the id of that token."""
        backend = Backend.from_str(self.backend.to_str())
        backend.add_special_tokens([name])
        return wrap(backend, self.pad, self.bos, self.eos, self.chat_template), backend.token_to_id(name)

    def to_json(self) -> str:
        """The tokenizer as JSON, for `from_json`."""
        special = {"pad": self.pad, "bos": self.bos, "eos": self.eos}
        own = {"chat_template": self.chat_template} if self.chat_template else {}
        return json.dumps({"special": special, "tokenizer": json.loads(self.backend.to_str()), **own})

    def save(self, folder: os.PathLike, bos: bool = False) -> None:
        """Writes `folder`/tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads.

        bos: make transformers prepend the bos token to every text, as prompts here do; False leaves the tokenizer as it
          was when it was loaded.
        """
        os.makedirs(folder, exist_ok=True)
        backend, name = Backend.from_str(self.backend.to_str()), self.backend.id_to_token
        if bos and self.bos >= 0 and self.bos not in backend.encode("").ids:
            first = name(self.bos)
            put = processors.TemplateProcessing([first, "$A"], [first, "$A", "$B:1"], [(first, self.bos)])
            own = backend.post_processor
            backend.post_processor = put if own is None else processors.Sequence([own, put])
        backend.save(os.path.join(folder, "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": name(self.pad),
            "eos_token": name(self.eos),
        }
        if self.bos >= 0:
            config["bos_token"] = name(self.bos)
        if self.chat_template:
            config["chat_template"] = self.chat_template
        with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
            json.dump(config, file, indent=2)


def with_vocabulary(cfg: Config, tokenizer: Tokenizer) -> Config:
    """The config with vocab_size filled in. Raises UserError if the tokenizer has more ids than the LLM."""
    padded = -(-tokenizer.size // 64) * 64
    size = cfg.llm.vocab_size or padded
    if tokenizer.size > size:
        if not cfg.init.grow_vocab:
            raise UserError(
                f"the tokenizer has {tokenizer.size} ids, but config.llm.vocab_size={size}; "
                "set config.init.grow_vocab=True to add rows to a pretrained LLM"
            )
        size = padded
    return dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, vocab_size=size))


def from_json(text: str) -> Tokenizer:
    """The tokenizer that `Tokenizer.to_json` wrote."""
    data = json.loads(text)
    backend = Backend.from_str(json.dumps(data["tokenizer"]))
    return wrap(backend, **data["special"], chat_template=data.get("chat_template", ""))


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with at most `vocab_size` ids; deterministic. Raises UserError below 259 ids."""
    smallest = 256 + len((PAD, BOS, EOS))
    if vocab_size < smallest:
        raise UserError(
            f"config.tokenizer.vocab_size={vocab_size}: expected at least {smallest}, for all bytes and special tokens"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(map(_whole, texts), trainer)
    return wrap(backend, pad=0, bos=1, eos=2)


def _whole(text: str) -> str:
    """The text with lone surrogates, which broken JSON may contain, replaced by "?"."""
    return text.encode("utf-8", "replace").decode()


def load(path: str) -> Tokenizer:
    """A Hugging Face tokenizer from a folder or the hub. Remote code is never run.

    Raises:
      UserError: the tokenizer cannot be read, or has no end-of-text token.
    """
    from transformers import AutoTokenizer  # imported here: it takes a second, and the default never needs it

    try:
        outer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False)
    except Exception as error:  # transformers raises different errors for different broken files
        reason = first_line(error)
        raise UserError(f"tokenizer.path={path!r}: no Hugging Face tokenizer could be read there: {reason}") from error
    if outer.eos_token_id is None:
        raise UserError(f"tokenizer.path={path!r} has no end-of-text token, so an answer could never end")
    pad = outer.pad_token_id if outer.pad_token_id is not None else outer.eos_token_id
    bos = outer.bos_token_id if outer.bos_token_id is not None else -1
    written = outer.chat_template  # a string, or a dict of several
    if isinstance(written, dict):
        written = written.get("default")
    return wrap(outer.backend_tokenizer, pad, bos, outer.eos_token_id, written or "")


def wrap(backend: Backend, pad: int, bos: int, eos: int, chat_template: str = "") -> Tokenizer:
    """Wraps a `tokenizers` object, without padding, truncation and special tokens in text; bos is -1 if it has none."""
    backend.encode_special_tokens = True  # "</s>" in a user's text stays four characters
    backend.no_padding()
    backend.no_truncation()
    return Tokenizer(backend, pad, bos, eos, chat_template)
