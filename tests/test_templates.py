"""The texts around what people say, and the tokenizer's own chat template made into such texts."""

import dataclasses
import typing

import jinja2
import pytest

from small_tokenizers import byte_level, llama
from sparsecut_jax.settings import StageConfig
from sparsecut_jax.text.conversation import encode_prompt, encode_row
from sparsecut_jax.text.templates import OWN, TEMPLATES, Template, get_template, stop_ids
from sparsecut_jax.types import UserError

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
END = "(end)"  # the tokenizer's end token


def written(template: Template, *turns: str, system: str = "") -> str:
    """The text of a conversation, up to the end of its last answer."""
    text = "".join(template.opening(system))
    for i in range(0, len(turns), 2):
        text += (template.next if i else "") + template.said(turns[i]) + template.answer + template.space
        text += template.said(turns[i + 1]) + (END if template.end is None else template.end)
    return text


def test_the_setting_knows_all_names():
    known = typing.get_args(typing.get_type_hints(StageConfig)["template"])
    assert set(known) == {*TEMPLATES, OWN}


# ----------------------------------------------------------------------------------------------------------------------
# the fixed ones, written out


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qa", "Hi(space)Hello(end)Bye(space)Ciao(end)"),
        ("vicuna_v1", f"{VICUNA} USER: Hi ASSISTANT:(space)Hello(end)USER: Bye ASSISTANT:(space)Ciao(end)"),
        ("mistral", "[INST] Hi [/INST](space)Hello(end)[INST] Bye [/INST](space)Ciao(end)"),
        (
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nCiao<|eot_id|>",
        ),
        (
            "chatml",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|im_end|>",
        ),
        (
            "smollm2",
            f"<|im_start|>system\n{SMOLLM}<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|im_end|>",
        ),
        (
            "phi3",
            "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\nCiao<|end|>",
        ),
    ],
)
def test_two_rounds(name, expected):
    template = TEMPLATES[name]
    assert template.space in ("", " ")
    marked = dataclasses.replace(template, space="(space)" if template.space else "")
    assert written(marked, "Hi", "Hello", "Bye", "Ciao") == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", ""),
        ("qa", "Be brief.\n\n"),
        ("vicuna_v1", "Be brief. USER: "),
        ("mistral", "[INST] Be brief.\n\n"),
        (
            "llama3",
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n",
        ),
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"),
        ("smollm2", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"),
        ("phi3", "<|system|>\nBe brief.<|end|>\n<|user|>\n"),
    ],
)
def test_the_system_message_of_a_row(name, expected):
    assert "".join(TEMPLATES[name].opening("Be brief.")) == expected
    assert "".join(TEMPLATES[name].opening("")) == TEMPLATES[name].start


def test_which_start_with_the_beginning_token():
    assert [name for name, template in TEMPLATES.items() if not template.bos] == ["chatml", "smollm2", "phi3"]


# ----------------------------------------------------------------------------------------------------------------------
# the same as the models' public templates, in short

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
JINJA = {
    "chatml": CHATML,
    "smollm2": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + SMOLLM
    + "<|im_end|>\n' }}{% endif %}"
    + CHATML,
    "llama3": """
        {%- for m in messages %}
            {%- set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}
            {%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
            {{- content }}
        {%- endfor %}
        {%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "mistral": """
        {{- bos_token }}
        {%- for m in messages %}
            {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
            {%- if m['role'] == 'user' %}{{- '[INST] ' + m['content'] + ' [/INST]' }}
            {%- else %}{{- ' ' + m['content'] + eos_token }}{% endif %}
        {%- endfor %}""",
    "phi3": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
}
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>",
    "<|assistant|>", "<|system|>", "<|end|>",
]  # fmt: skip


def tokenizer_of(jinja: str, kind=byte_level):
    return kind(*SPECIAL, chat_template=jinja)


def rendered(
    jinja: str, *turns: str, system: str = "", prompt: bool = False, bos: str = "<s>", eos: str = "</s>"
) -> str:
    """What Jinja itself makes of a conversation."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    messages = [{"role": "system", "content": system}] * bool(system) + messages
    options = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": prompt, "enable_thinking": False}
    return environment.from_string(jinja).render(messages=messages, raise_exception=None, **options)


def row(*turns: str, **more) -> dict:
    named = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": "r", "conversations": named, **more}


@pytest.mark.parametrize("kind", [byte_level, llama])
@pytest.mark.parametrize("name", sorted(JINJA))
@pytest.mark.parametrize(
    "turns", [("Hi", "Hello"), ("Hi", "Hello", "Bye", "Ciao"), ("a b?", "yes", "why?", "so", "  is\nit ", " é\n")]
)
def test_a_fixed_template_is_the_models_own(name, kind, turns):
    """Text and ids, of all rounds, whichever of the two is chosen."""
    tokenizer = tokenizer_of(JINJA[name], kind)
    fixed, own = get_template(name, tokenizer), get_template(OWN, tokenizer)
    for system in ("", "Be brief.") if own.system else ("",):
        text = rendered(JINJA[name], *turns, system=system)
        ours = written(own, *turns, system=system)
        assert text.startswith(ours) and text.removeprefix(ours) in ("", "\n", "\n</s>")
        assert (END, "<s>" * fixed.bos + written(fixed, *turns, system=system).replace(END, "</s>")) == (END, ours)
        one = encode_row(row(*turns, system=system), tokenizer, fixed, 1, 1000)
        other = encode_row(row(*turns, system=system), tokenizer, own, 1, 1000)
        assert (one.tokens.tolist(), one.loss_mask.tolist()) == (other.tokens.tolist(), other.loss_mask.tolist())
    assert stop_ids(tokenizer, fixed) == stop_ids(tokenizer, own)


@pytest.mark.parametrize("name", sorted(JINJA))
def test_ids_are_those_of_the_rendered_text(name):
    """As transformers' apply_chat_template tokenises it, special tokens and all."""
    tokenizer = tokenizer_of(JINJA[name])
    turns = ("what color is the circle?", "it is red", "is it red?", "yes")
    example = encode_row(row(*turns), tokenizer, get_template(name, tokenizer), 1, 1000)
    tokenizer.backend.encode_special_tokens = False
    expected = tokenizer.backend.encode(rendered(JINJA[name], *turns), add_special_tokens=False).ids
    assert example.tokens.tolist() == expected[: len(example.tokens)]
    prompt = encode_prompt(turns[0], 0, tokenizer, get_template(OWN, tokenizer), 1)
    text = rendered(JINJA[name], turns[0], prompt=True)
    assert prompt.tokens.tolist() == tokenizer.backend.encode(text, add_special_tokens=False).ids


def test_mistral_has_no_system_turn_so_the_message_goes_in_front_of_the_question():
    own = get_template(OWN, tokenizer_of(JINJA["mistral"]))
    assert own.system is None
    assert written(own, "Hi", "Hello", system="Be brief.") == "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>"


LLAMA2 = """
    {%- if messages[0]['role'] == 'system' %}{% set said = messages[1:] %}{% set system = messages[0]['content'] %}
    {%- else %}{% set said = messages %}{% set system = false %}{% endif %}
    {%- for m in said %}
        {%- if loop.first and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}
        {%- else %}{% set content = m['content'] %}{% endif %}
        {%- if m['role'] == 'user' %}{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
        {%- else %}{{- ' ' + content.strip() + ' ' + eos_token }}{% endif %}
    {%- endfor %}"""


def test_a_template_whose_rounds_begin_anew_and_whose_system_message_stands_in_the_question():
    own = get_template(OWN, tokenizer_of(LLAMA2, llama))
    assert own == Template(
        start="<s>[INST] ", answer=" [/INST]", space=" ", end=" </s>", next="<s>[INST] ",
        system=("<s>[INST] <<SYS>>\n", "\n<</SYS>>\n\n"), bos=False, strip=True,
    )  # fmt: skip
    assert written(own, "Hi ", "Hello ", " Bye", "Ciao", system="Be brief.") == rendered(
        LLAMA2, "Hi ", "Hello ", " Bye", "Ciao", system="Be brief."
    )


QWEN3 = """
    {%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
    {%- set ns = namespace(last_query_index=-1) %}
    {%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_query_index = loop.index0 %}{% endif %}{% endfor %}
    {%- for m in messages %}
        {%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
        {%- elif m.role == 'assistant' %}
            {%- set content = m.content.split('</think>')[-1].lstrip('\n') %}
            {%- if loop.index0 > ns.last_query_index %}
                {{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content }}
            {%- else %}{{- '<|im_start|>assistant\n' + content }}{% endif %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endfor %}
    {%- if add_generation_prompt %}
        {{- '<|im_start|>assistant\n' }}
        {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
    {%- endif %}"""


@pytest.mark.parametrize("asks", [QWEN3, QWEN3.replace("enable_thinking is defined and", "false and")])
def test_an_empty_thought_stands_before_every_answer(asks):
    """Qwen3 leaves it out of earlier rounds; here every answer is learnt after what the model is asked with."""
    tokenizer = tokenizer_of(asks)
    own = get_template(OWN, tokenizer)
    assert written(own, "Hi", "Hello", "Bye", "Ciao") == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nCiao<|im_end|>"
    )
    assert rendered(asks, "Hi", "Hello", system="S") == written(own, "Hi", "Hello", system="S") + "\n"
    example = encode_row(row("Hi", "Hello", "Bye", "Ciao"), tokenizer, own, 1, 1000)
    said = [tokenizer.backend.id_to_token(i) for i in example.tokens[example.loss_mask == 1]]
    assert "".join(said) == "Hello<|im_end|>Ciao<|im_end|>"


def test_a_default_system_message_belongs_to_the_start():
    own = get_template(OWN, tokenizer_of(JINJA["smollm2"]))
    assert own.start == f"<|im_start|>system\n{SMOLLM}<|im_end|>\n<|im_start|>user\n"
    assert own.opening("Be brief.")[0] == "<|im_start|>system\n"


def test_no_text_depends_on_the_day():
    jinja = "\n{{ strftime_now('%d %b %Y') if strftime_now is defined }}\n" + CHATML
    assert get_template(OWN, tokenizer_of(jinja)).start == "\n26 Jul 2024\n<|im_start|>user\n"


def test_blocks_that_transformers_knows():
    jinja = CHATML.replace("{{ '<|im_start|>' +", "{% generation %}{{ '<|im_start|>' +", 1).replace(
        "'\n' }}{% endfor", "'\n' }}{% endgeneration %}{% endfor", 1
    )
    assert get_template(OWN, tokenizer_of(jinja)) == get_template(OWN, tokenizer_of(CHATML))


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("", "does not exist"),
        ("{% for %}", "fails: Expected an expression"),
        ("{{ raise_exception('no chat') }}", "fails: no chat"),
        ("{{ messages.append(1) }}", "fails: access to attribute 'append' of 'list' object is unsafe."),
        ("{{ ''.__class__.__mro__ }}", "fails: access to attribute '__class__' of 'str' object is unsafe."),
        ("{% include '/etc/passwd' %}", "fails: no loader for this environment specified"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("User: ", "does not render each message once and in order"),
        (
            CHATML.replace("m['content']", "(m['content'] | upper | replace('1', '2'))"),
            "does not render each message once",
        ),
        (CHATML.replace("m['content']", "m['content'] + m['content']"), "does not render each message once"),
        (CHATML.replace("m['content']", "m['content'][0].text"), "fails: 'str object' has no attribute 'text'"),
        (CHATML.replace("in messages", "in messages | reverse"), "does not render each message once"),
        (CHATML.replace("in messages", "in messages[:2]"), "does not render each message once"),
        (CHATML.replace("im_end", "done"), "ends an answer with '<|done|>\\n', without a special token"),
        (
            CHATML.replace("'<|im_end|>'", "''") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
            "renders the rounds of a conversation differently",
        ),
        (CHATML.replace("m['role']", "(m['role'] ~ loop.index)"), "prompts with "),
        (
            CHATML.replace("m['role']", "((m['role'] ~ loop.index) if loop.index > 2 else m['role'])"),
            "renders the rounds of a conversation differently",
        ),
        (
            CHATML.replace("assistant\n", "assistant\n<think>\n"),
            "prompts with '<|im_end|>\\n<|im_start|>assistant\\n<think>\\n', but writes '<|im_end|>\\n<|im_start|>assistant\\n' "
            "before an answer",
        ),
    ],
)
def test_a_template_that_cannot_be_used(jinja, reason):
    with pytest.raises(UserError) as caught:
        get_template(OWN, tokenizer_of(jinja))
    sentence = str(caught.value)
    assert sentence.startswith(f"the tokenizer's chat template {reason}")
    assert sentence.endswith("; set the template (config.stages.*.template) to one of " + ", ".join(TEMPLATES))
    assert "\n" not in sentence


def test_words_never_pass_through_jinja():
    tokenizer = tokenizer_of(CHATML)
    own = get_template(OWN, tokenizer)
    tokens = encode_row(row("{{ 7 * 7 }}", "{% endfor %}"), tokenizer, own, 1, 1000).tokens
    assert tokenizer.decode(tokens) == "user\n{{ 7 * 7 }}\nassistant\n{% endfor %}"


# ----------------------------------------------------------------------------------------------------------------------
# what the tokenizer lacks, and where an answer ends


@pytest.mark.parametrize("name", ["chatml", "smollm2", "llama3", "phi3"])
def test_a_tokenizer_without_the_end_token(name):
    with pytest.raises(UserError) as caught:
        get_template(name, llama())
    assert str(caught.value) == (
        f"template {name!r} ends an answer with {TEMPLATES[name].end}, which is not a special token of this tokenizer; "
        "choose another config.stages.*.template, such as 'vicuna_v1' or 'qa'"
    )


def test_a_tokenizer_without_the_other_tokens_reads_them_as_text():
    tokenizer = byte_level("<|im_end|>")
    tokens = encode_row(row("Hi", "Hello"), tokenizer, get_template("chatml", tokenizer), 1, 1000).tokens
    assert tokenizer.decode(tokens) == "<|im_start|>user\nHi\n<|im_start|>assistant\nHello"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qa", ["<|endoftext|>"]),
        ("vicuna_v1", ["<|endoftext|>"]),
        ("plain", ["Ċ", "<|endoftext|>"]),
        ("chatml", ["<|im_end|>", "<|endoftext|>"]),
        ("llama3", ["<|eot_id|>", "<|endoftext|>"]),
        ("phi3", ["<|end|>", "<|endoftext|>"]),
    ],
)
def test_what_stops_an_answer(name, expected):
    tokenizer = byte_level(*SPECIAL, eos="<|endoftext|>")
    stop = stop_ids(tokenizer, get_template(name, tokenizer))
    assert [tokenizer.backend.id_to_token(i) for i in stop] == expected
    example = encode_row(row("Hi", "Hello"), tokenizer, get_template(name, tokenizer), 1, 1000)
    assert example.tokens[-1] == stop[0] and example.loss_mask[-1] == 1


def test_an_end_token_that_is_not_called_special():
    tokenizer = byte_level("<|im_start|>")
    tokenizer.backend.add_tokens(["<|im_end|>"])
    template = get_template("chatml", tokenizer)
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert stop_ids(tokenizer, template) == (end, tokenizer.eos)
    assert encode_row(row("Hi", "Hello"), tokenizer, template, 1, 100).tokens.tolist().count(end) == 2


def test_the_end_token_is_one_stop():
    tokenizer = byte_level("<|im_end|>", eos="<|im_end|>")
    assert stop_ids(tokenizer, get_template("chatml", tokenizer)) == (tokenizer.eos,)
    assert stop_ids(llama(), TEMPLATES["plain"]) == (llama().backend.token_to_id("<0x0A>"), 2)


@pytest.mark.parametrize("name", ["phi3", OWN])
def test_tokens_that_swallow_the_white_space_behind_them(name):
    """Phi-3's do: no line's end stands behind <|user|>."""
    tokenizer = byte_level(*SPECIAL, rstrip=True, chat_template=JINJA["phi3"])
    example = encode_row(row("yes", "no", "yes", "no"), tokenizer, get_template(name, tokenizer), 1, 1000)
    pieces = [tokenizer.backend.id_to_token(i) for i in example.tokens]
    one = ["<|user|>", "yes", "<|end|>", "<|assistant|>", "no", "<|end|>"]
    assert pieces == one * 2
    assert example.loss_mask.tolist() == [0, 0, 0, 0, 1, 1] * 2
