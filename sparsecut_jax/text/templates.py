"""Prompt templates: the fixed texts around the turns of a conversation.

A tokenizer's own chat template is a Jinja program. It is rendered once with placeholders instead of messages and thereby
becomes fixed texts like the other templates; the messages themselves never pass through it.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from sparsecut_jax.text.tokenizer import Tokenizer
from sparsecut_jax.types import UserError, first_line

OWN = "tokenizer"  # the name that selects the tokenizer's own template
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
# The current date in a prompt would make runs differ by day; this date is the default of Llama 3's template.
NO_CLOCK = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"


@dataclasses.dataclass(frozen=True)
class Template:
    """The fixed texts of a conversation, which is rendered as

        start QUESTION answer space ANSWER end next QUESTION answer space ANSWER end

    The name of a special token in these texts is that token; in a message it is plain text.

    Attributes:
      start: before the first question, with the template's own system message if it has one.
      answer: between a question and its answer.
      space: between `answer` and the answer; a target like the answer.
      end: ends an answer; also a target. None: the tokenizer's end token.
      next: between the end of an answer and the next question.
      system: texts before and after a row's own system message, which replace `start`; None: the message and an empty
        line follow `start`.
      bos: whether the conversation starts with the tokenizer's bos token.
      strip: whether messages are stripped of surrounding white space.
      question: False omits the human's text and keeps only the image.
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
        """All of the template's texts."""
        return (self.start, self.answer, self.space, self.end or "", self.next, *(self.system or ()))

    def opening(self, system: str) -> tuple[str, str, str]:
        """(text of the template, system message or "", text of the template) before the first question."""
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
    # Qwen's, without its system message, which differs between releases.
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
    # The shortest one, for models trained from scratch.
    "qa": Template(),
}


@functools.lru_cache(maxsize=16)
def get_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template of that name: a key of TEMPLATES, or "tokenizer" for the tokenizer's own.

    Special tokens that the tokenizer does not have are treated as text, except the one that ends an answer.

    Raises:
      UserError: the tokenizer lacks the token that ends an answer, or its own template is missing or unusable.
    """
    template = _own_template(tokenizer) if name == OWN else TEMPLATES[name]
    end = (template.end or "").strip()
    if end and tokenizer.split_special(end) == (end,):
        raise UserError(
            f"template {name!r} ends an answer with {end}, which is not a special token of this tokenizer; choose another "
            "config.stages.*.template, such as 'vicuna_v1' or 'qa'"
        )
    if end and not tokenizer.split_special(f"{end} ")[-1]:  # the token absorbs the white space after it
        template = dataclasses.replace(template, next=template.next.lstrip())
    return template


def begins_with_bos(name: str) -> bool:
    """Whether a prompt in the template of that name begins with the bos token; a chat template writes its own."""
    return name != OWN and TEMPLATES[name].bos


def stop_ids(tokenizer: Tokenizer, template: Template) -> tuple[int, ...]:
    """The ids that end an answer: the tokenizer's end token, and the template's."""
    special = [piece for piece in tokenizer.split_special(template.end or "") if isinstance(piece, int)]
    ends = special[:1] or tokenizer.encode(template.end or "")[-1:]  # the last token of a text such as "\n"
    return tuple(dict.fromkeys((*ends, tokenizer.eos)))


# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer's own


def _own_template(tokenizer: Tokenizer) -> Template:
    """The tokenizer's chat template as fixed texts, from rendering one round and three.

    If it marks the absence of thinking, as Qwen3's does with an empty <think></think>, the mark precedes every answer, as
    in generation; the template itself omits it from earlier rounds.
    """
    if not tokenizer.chat_template:
        raise _refused("does not exist")
    around = functools.partial(_around, tokenizer)
    start, answer, tail = around(USER, ASSISTANT)
    asked = around(USER)
    if asked[0] != start or not answer.startswith(asked[1]):
        raise _refused(f"prompts with {asked[1]!r}, but writes {answer!r} before an answer")
    special = [piece for piece in tokenizer.split_special(tail) if isinstance(piece, int)]
    if not special:
        raise _refused(f"ends an answer with {tail!r}, without a special token")
    name = tokenizer.backend.id_to_token(special[0])
    end = tail[: tail.index(name) + len(name)]

    first, *between, last = around(*[USER, ASSISTANT] * 3)
    answers, following = between[::2], between[1::2]
    alike = (first, answers[-1], last) == (start, answer, tail) and following[0] == following[1]
    if not alike or not following[0].startswith(end) or not all(answer.startswith(text) for text in answers):
        raise _refused("renders the rounds of a conversation differently")

    try:
        *system, with_system, _ = around(SYSTEM, USER, ASSISTANT)
    except UserError:  # it has no system turn, or omits it
        system, with_system = (), ""
    space = answer[len(asked[1]) :]  # what the model generates before the message, unless it is a heading
    space = "" if space.strip() else space
    return Template(
        start=start,
        answer=answer.removesuffix(space),
        space=space,
        end=end,
        next=following[0].removeprefix(end),
        system=tuple(system) if with_system == answer else None,
        bos=False,  # if there is one, it is in `start`
        strip=around(USER, ASSISTANT, pad=" ") != [f"{start} ", f" {answer} ", f" {tail}"],
    )


def _around(tokenizer: Tokenizer, *roles: str, pad: str = "") -> list[str]:
    """The texts before, between and after messages of these roles, each message with `pad` on both sides."""
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
    except Exception as error:  # a third-party program may raise anything
        reason = first_line(error)
        raise _refused(f"fails: {reason}") from error
    cut = re.split("\ue000([0-9]+)\ue001", text)
    if cut[1::2] != [str(i) for i in range(len(roles))]:
        raise _refused("does not render each message once and in order")
    return cut[::2]


def _refused(reason: str) -> UserError:
    others = ", ".join(TEMPLATES)
    return UserError(
        f"the tokenizer's chat template {reason}; set the template (config.stages.*.template) to one of {others}"
    )
