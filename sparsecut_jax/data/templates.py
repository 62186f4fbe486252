"""How a conversation is written: the texts that a template puts around what people say.

A tokenizer's own chat template is a program in Jinja. It is asked once, with marks in place of words, and becomes texts
like any other: what people say never passes through it.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from sparsecut_jax.data.tokenizer import Tokenizer
from sparsecut_jax.types import UserError

OWN = "tokenizer"  # name of the template that the tokenizer brings along
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
# A date in a text would make a run depend on its day; this is the one that Llama 3's template falls back to.
NO_CLOCK = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"


@dataclasses.dataclass(frozen=True)
class Template:
    """The texts around the words of a conversation, which is written as

        start QUESTION answer space ANSWER end next QUESTION answer space ANSWER end

    A special token's name in these texts is that token; in anybody's words it is text.

    Attributes:
      start: before the first question, with the template's own system message if it has one.
      answer: between a question and its answer.
      space: between `answer` and the answer, predicted with it.
      end: what ends an answer, predicted too; None for the tokenizer's end token.
      next: between the end of an answer and the next question.
      system: around a row's own system message, in place of `start`; None: the message and an empty line follow `start`.
      bos: whether the tokenizer's beginning token comes first.
      strip: whether words lose the white space around them.
      question: False leaves out what the human says and keeps the image alone.
    """

    start: str = ""
    answer: str = ""
    space: str = " "
    end: str | None = None
    next: str = ""
    system: tuple[str, str] | None = None
    bos: bool = True
    strip: bool = False
    question: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """All of its texts."""
        return (self.start, self.answer, self.space, self.end or "", self.next, *(self.system or ()))

    def opening(self, system: str) -> tuple[str, str, str]:
        """What stands before the first question: the template's text, a system message (""), the template's text."""
        if not system or not self.question:
            return self.start, "", ""
        before, after = self.system or (self.start, "\n\n")
        return before, self.said(system), after

    def said(self, words: str) -> str:
        return words.strip() if self.strip else words


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATML = Template(
    start="<|im_start|>user\n",
    answer="<|im_end|>\n<|im_start|>assistant\n",
    space="",
    end="<|im_end|>",
    next="\n<|im_start|>user\n",
    system=("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"),
    bos=False,
)
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
TEMPLATES = {
    # LLaVA's stage 1: the image, then its caption.
    "plain": Template(space="", end="\n", question=False),
    "vicuna_v1": Template(start=f"{VICUNA} USER: ", answer=" ASSISTANT:", next="USER: ", system=("", " USER: ")),
    "llama3": Template(
        start=LLAMA3.format(USER),
        answer="<|eot_id|>" + LLAMA3.format(ASSISTANT),
        space="",
        end="<|eot_id|>",
        next=LLAMA3.format(USER),
        system=(LLAMA3.format(SYSTEM), "<|eot_id|>" + LLAMA3.format(USER)),
        strip=True,
    ),
    # As Qwen has it, without a system message: its releases have different ones.
    "chatml": CHATML,
    "smollm2": dataclasses.replace(CHATML, start=CHATML.system[0] + SMOLLM + CHATML.system[1]),
    "mistral": Template(start="[INST] ", answer=" [/INST]", next="[INST] "),
    "phi3": Template(
        start="<|user|>\n",
        answer="<|end|>\n<|assistant|>\n",
        space="",
        end="<|end|>",
        next="\n<|user|>\n",
        system=("<|system|>\n", "<|end|>\n<|user|>\n"),
        bos=False,
    ),
    # The shortest one: for models trained from nothing.
    "qa": Template(),
}


@functools.lru_cache(maxsize=16)
def get_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template of that name: a key of TEMPLATES, or "tokenizer" for the tokenizer's own.

    Names of special tokens that a tokenizer does not have are text to it, but not where an answer would never end.

    Raises:
      UserError: the tokenizer lacks the token that ends an answer, or has no template of its own that can be used.
    """
    template = _own_template(tokenizer) if name == OWN else TEMPLATES[name]
    end = (template.end or "").strip()
    if end and tokenizer.split_special(end) == (end,):
        raise UserError(
            f"template {name!r} ends an answer with {end}, which is no special token of this tokenizer; choose another "
            "one for config.stages.*.template, such as 'vicuna_v1' or 'qa'"
        )
    if end and not tokenizer.split_special(f"{end} ")[-1]:  # a token that swallows the white space behind it
        template = dataclasses.replace(template, next=template.next.lstrip())
    return template


def begins_with_bos(name: str) -> bool:
    """Whether a prompt in the template of that name begins with the bos token; a chat template writes its own."""
    return name != OWN and TEMPLATES[name].bos


def stop_ids(tokenizer: Tokenizer, template: Template) -> tuple[int, ...]:
    """The ids that end an answer: the tokenizer's end token, and what the template ends an answer with."""
    special = [piece for piece in tokenizer.split_special(template.end or "") if isinstance(piece, int)]
    ends = special[:1] or tokenizer.encode(template.end or "")[-1:]  # of the text "\n", the line's end
    return tuple(dict.fromkeys((*ends, tokenizer.eos)))


# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer's own


def _own_template(tokenizer: Tokenizer) -> Template:
    """What the tokenizer's chat template writes around the words of one round and of three.

    Where it writes no thoughts, as Qwen3's does with an empty <think></think>, those stand before every answer, as
    they do when the model is asked; the template itself leaves them out of earlier rounds.
    """
    if not tokenizer.chat_template:
        raise _refused("is not there")
    around = functools.partial(_around, tokenizer)
    start, answer, tail = around(USER, ASSISTANT)
    asked = around(USER)
    if asked[0] != start or not answer.startswith(asked[1]):
        raise _refused(f"asks with {asked[1]!r}, but writes {answer!r} before an answer")
    special = [piece for piece in tokenizer.split_special(tail) if isinstance(piece, int)]
    if not special:
        raise _refused(f"ends an answer with {tail!r}, without a special token")
    name = tokenizer.backend.id_to_token(special[0])
    end = tail[: tail.index(name) + len(name)]

    first, *between, last = around(*[USER, ASSISTANT] * 3)
    answers, following = between[::2], between[1::2]
    alike = (first, answers[-1], last) == (start, answer, tail) and following[0] == following[1]
    if not alike or not following[0].startswith(end) or not all(answer.startswith(text) for text in answers):
        raise _refused("writes the rounds of a conversation in different ways")

    try:
        *system, with_system, _ = around(SYSTEM, USER, ASSISTANT)
    except UserError:  # it knows no such turn, or leaves it out
        system, with_system = (), ""
    space = answer[len(asked[1]) :]  # what the model is to write before the words, unless it is a heading
    space = "" if space.strip() else space
    return Template(
        start=start,
        answer=answer.removesuffix(space),
        space=space,
        end=end,
        next=following[0].removeprefix(end),
        system=tuple(system) if with_system == answer else None,
        bos=False,  # it is in `start` where there is one
        strip=around(USER, ASSISTANT, pad=" ") != [f"{start} ", f" {answer} ", f" {tail}"],
    )


def _around(tokenizer: Tokenizer, *roles: str, pad: str = "") -> list[str]:
    """The texts before, between and after the words of turns of these roles, each with `pad` on both sides."""
    from transformers.utils.chat_template_utils import render_jinja_template  # here: it takes a second

    name = lambda i: tokenizer.backend.id_to_token(i) if i >= 0 else ""
    try:
        [text], _ = render_jinja_template(  # in a sandbox
            [[{"role": role, "content": f"{pad}\ue000{i}\ue001{pad}"} for i, role in enumerate(roles)]],
            chat_template=NO_CLOCK + tokenizer.chat_template,
            add_generation_prompt=roles[-1] == USER,
            enable_thinking=False,
            bos_token=name(tokenizer.bos),
            eos_token=name(tokenizer.eos),
            pad_token=name(tokenizer.pad),
        )
    except Exception as error:  # a program of somebody else's: anything can happen in it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _refused(f"fails: {reason}") from error
    cut = re.split("\ue000([0-9]+)\ue001", text)
    if cut[1::2] != [str(i) for i in range(len(roles))]:
        raise _refused("does not write what is said, once and in order")
    return cut[::2]


def _refused(reason: str) -> UserError:
    others = ", ".join(TEMPLATES)
    return UserError(
        f"the tokenizer's chat template {reason}; choose another one for config.stages.*.template: {others}"
    )
