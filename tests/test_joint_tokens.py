"""Text is tokenised in one piece between special tokens and images, as LLaVA does it."""

import numpy as np
import pytest

from small_tokenizers import byte_level, llama
from sparsecut_jax.data.canonical import canonical
from sparsecut_jax.text.conversation import encode_prompt, encode_row
from sparsecut_jax.text.templates import TEMPLATES
from test_conversation import END_TOKENS, SMALL, row


def pieces(tokenizer, ids) -> list[str]:
    return [tokenizer.backend.id_to_token(i) for i in ids]


def test_what_people_and_the_template_say_is_one_text():
    """As sentencepiece has it: "▁" stands where a piece begins, and not where an answer does."""
    tokenizer = SMALL[llama]
    example = encode_row(row("is it?", "no", "why?", "so", image=None), tokenizer, TEMPLATES["mistral"], 1, 100)
    first, second = (tokenizer.encode(text) for text in ("[INST] is it? [/INST] no", "[INST] why? [/INST] so"))
    assert tuple(example.tokens) == (1, *first, 2, *second, 2)
    said = pieces(tokenizer, example.tokens[example.loss_mask == 1])
    assert "".join(said) == "▁no</s>▁so</s>"


def test_a_token_across_the_start_of_an_answer_is_cut():
    """Two line ends are one token here, but a prompt ends with the first of them."""
    tokenizer = byte_level("<|im_start|>", "<|im_end|>")
    tokenizer.backend.add_tokens(["\n\n"])
    assert pieces(tokenizer, tokenizer.encode("\n\n")) == ["\n\n"]
    example = encode_row(row("is it?", "\nno"), tokenizer, TEMPLATES["chatml"], 1, 100)
    assert pieces(tokenizer, example.tokens[-4:]) == ["Ċ", "Ċ", "no", "<|im_end|>"]
    assert example.loss_mask[-4:].tolist() == [0, 1, 1, 1]


# ----------------------------------------------------------------------------------------------------------------------
# LLaVA's own tokenisation, in a few words

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def chunks(tokenizer, text: str, images: bool, n: int) -> list[int]:
    """Ids of a text that starts a sequence: the pieces between images one by one, -1 at image positions."""
    parts = [tokenizer.encode(part) for part in (text.split("<image>") if images else [text])]
    ids = list(parts[0])
    for part in parts[1:]:
        ids += [-1] * n + list(part)
    return ids


def llava(turns: list[str], tokenizer, name: str, n: int) -> tuple[list[int], list[int]]:
    """Ids and mask as LLaVA counts them: a round at a time, its instruction up to "ASSISTANT: " less the last "▁"."""
    ids, mask = [tokenizer.bos], [0]
    questions = []
    for text in turns[::2]:
        if "<image>" in text:
            text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
        questions.append(text)
    if name == "plain":
        ids += [-1] * n * questions[0].count("<image>")
        mask = [0] * len(ids)
        caption = tokenizer.encode(turns[1] + "\n")
        return ids + list(caption), mask + [1] * len(caption)
    for i, (question, answer) in enumerate(zip(questions, turns[1::2], strict=True)):
        instruction = ("" if i else SYSTEM + " ") + "USER: " + question + " ASSISTANT: "
        marks = instruction.count("<image>")
        asked = chunks(tokenizer, instruction, True, n)
        last = instruction.split("<image>")[-1]
        whole = asked[: len(asked) - len(tokenizer.encode(last))] + list(tokenizer.encode(last + answer))
        assert marks == question.count("<image>")
        ids += [*whole, tokenizer.eos]
        mask += [0] * (len(asked) - 1) + [1] * (len(whole) + 1 - (len(asked) - 1))
    return ids, mask


WORDS = [
    "what", "is", "red", "the circle", "USER:", " ASSISTANT: ", "</s>", "<s>", "<|im_end|>", "<pad>", "é", "日本", "\n",
    "  ", "<image", "image>", "\0", "▁", "<0x0A>", "?", "[INST]",
]  # fmt: skip


@pytest.mark.parametrize("name", ["vicuna_v1", "plain"])
@pytest.mark.parametrize("seed", range(60))
def test_ids_and_mask_are_llavas(name, seed):
    rng, tokenizer = np.random.default_rng(seed), SMALL[llama]
    say = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 6))) + rng.choice(["", "\n"])
    turns = [say() for _ in range(2 * rng.integers(1, 4))]
    turns[1::2] = [text if text.strip() else "yes" for text in turns[1::2]]
    marked = rng.integers(0, 2)
    if marked:
        turns[0] = rng.choice(["<image>\n" + turns[0], turns[0] + "\n<image>", "<image>", turns[0] + "<image>?"])
    found = canonical(row(*map(str, turns), **({"image": "a.png"} if marked else {})), "r", 1)
    example = encode_row(found, tokenizer, TEMPLATES[name], 3, 10_000)
    ids, mask = llava([turn["value"] for turn in found["conversations"]], tokenizer, name, 3)
    assert [tokenizer.pad if i == -1 else i for i in ids] == example.tokens.tolist()
    assert mask == example.loss_mask.tolist()
    assert example.image_start == ([ids.index(-1)] if marked else [])


def test_llavas_mask_drawn():
    tokenizer = SMALL[llama]
    example = encode_row(
        row("is it?\n<image>", "no", "what?", "yes", image="a"), tokenizer, TEMPLATES["vicuna_v1"], 2, 999
    )
    opening = len(tokenizer.encode(SYSTEM + " USER: "))
    drawn = list(zip(pieces(tokenizer, example.tokens[opening:]), example.loss_mask[opening:].tolist(), strict=True))
    assert drawn[:2] == [("▁", 0), ("</s>", 0)]  # the space before the image, and its first position (padding's id)
    text = "".join(f"[{piece}]" if supervised else piece for piece, supervised in drawn[3:])
    assert text == "▁<0x0A>is▁it?▁ASSISTANT:[▁no][</s>]▁USER:▁what?▁ASSISTANT:[▁yes][</s>]"


@pytest.mark.parametrize(
    "text", ["</s>", "<|im_end|>", "a\ud800b", "\udc00", "\0", "x" * 100_000, "日" * 999, "\u200b", "▁"]
)
@pytest.mark.parametrize("kind", [byte_level, llama])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_odd_words(text, kind, name):
    """Nothing that anybody says becomes a special token, and the end of every answer is one."""
    tokenizer, template = SMALL[kind], TEMPLATES[name]
    example = encode_row(row(text, text, text, text), tokenizer, template, 1, 10**6)
    special = {tokenizer.backend.token_to_id(token) for token in ("<s>", "</s>", *END_TOKENS)}
    specials = [i for i in example.tokens.tolist() if i in special]
    quiet = encode_row(row("a", "a", "a", "a"), tokenizer, template, 1, 10**6).tokens.tolist()
    assert specials == [i for i in quiet if i in special]
    prompt = encode_prompt(text, 0, tokenizer, template, 1).tokens.tolist()
    assert prompt == example.tokens.tolist()[: len(prompt)]
