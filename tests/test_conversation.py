"""From a row to tokens and masks. Tokens are drawn as words: `I` is an image position."""

import re

import numpy as np
import pytest

from small_tokenizers import byte_level, llama
from sparsecut_jax.data.canonical import canonical
from sparsecut_jax.data.walk import RowEncoder
from sparsecut_jax.text.conversation import TooLong, alone, encode_prompt, encode_row, with_questions
from sparsecut_jax.text.templates import TEMPLATES, Template
from sparsecut_jax.types import BadSample, UserError

DRAWN = Template(start="USER : ", next="USER : ", space="")
END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|end|>")
SMALL = {kind: kind(*END_TOKENS) for kind in (byte_level, llama)}


class Words:
    """A tokenizer that cuts at spaces; ids are given in order of appearance."""

    def __init__(self):
        self.words = ["I", "<s>", "</s>"]
        self.pad, self.bos, self.eos = 0, 1, 2

    def encode(self, text: str) -> tuple[int, ...]:
        pieces = [f"'{word}'" if word in self.words[:3] else word for word in text.replace("\n", " \\n ").split()]
        self.words += [word for word in dict.fromkeys(pieces) if word not in self.words]
        return tuple(self.words.index(word) for word in pieces)

    def split_special(self, text: str) -> tuple[str | int, ...]:
        return tuple({"<s>": 1, "</s>": 2}.get(piece, piece) for piece in re.split("(</?s>)", text))


def draw(example, words) -> dict[str, str]:
    return {
        "tokens": " ".join(words.words[i] for i in example.tokens),
        "loss_mask": " ".join(map(str, example.loss_mask)),
        "branches": " ".join(map(str, example.branches)),
        "positions": " ".join(map(str, example.positions)),
    }


def table(text: str) -> dict[str, str]:
    """Rows of a drawing: name, then its values."""
    return {line.split()[0]: " ".join(line.split()[1:]) for line in text.strip().splitlines()}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def row(*texts, **more) -> dict:
    return {"id": "r", "conversations": [(human, gpt)[i % 2](text) for i, text in enumerate(texts)], **more}


QUESTIONS = row("<image>what color ?", "blue", "is it red ?", "no", image="a.png", independent=True)


@pytest.fixture(scope="module")
def bpe():
    return SMALL[byte_level]


# ----------------------------------------------------------------------------------------------------------------------
# what is written


def test_independent_questions():
    """The drawing in types.Batch."""
    words = Words()
    example = encode_row(QUESTIONS, words, DRAWN, image_tokens=4, seq_len=20)
    assert draw(example, words) == table("""
        tokens     <s> USER : I I I I what color ? blue </s> is it red ?  no </s>
        loss_mask    0    0 0 0 0 0 0    0     0 0    1    1  0  0   0 0   1    1
        branches     0    0 0 0 0 0 0    1     1 1    1    1  2  2   2 2   2    2
        positions    0    1 2 3 4 5 6    7     8 9   10   11  7  8   9 10 11   12
    """)
    assert example.image_start == [3]
    assert [example.tokens.dtype, example.loss_mask.dtype] == [np.int32, np.uint8]
    assert [example.branches.dtype, example.positions.dtype] == [np.int32, np.int32]


def test_conversation():
    words = Words()
    turns = row("look <image> here", "blue thing", "why ?", "because", image="a.png")
    template = Template(start="SYS Q ", answer=" A", space=" so ", next="Q ")
    example = encode_row(turns, words, template, image_tokens=2, seq_len=100)
    assert draw(example, words) == table("""
        tokens     <s> SYS Q I I \\n look here A so blue thing </s>  Q why  ?  A so because </s>
        loss_mask    0   0 0 0 0   0    0    0 0  1    1     1    1  0   0  0  0  1       1    1
        branches     0   0 0 0 0   0    0    0 0  0    0     0    0  0   0  0  0  0       0    0
        positions    0   1 2 3 4   5    6    7 8  9   10    11   12 13  14 15 16 17      18   19
    """)
    assert example.image_start == [3]


@pytest.mark.parametrize(
    ("question", "tokens"),
    [
        ("<image>", "I"),
        ("<image>\nwhat ?", "I \\n what ?"),
        (" what <image> ? ", "I \\n what ?"),
        ("what ?\n<image>", "I \\n what ?"),
        ("one <image> two <image>\n", "one I two I \\n"),
        ("<image><image> what ?", "I I what ?"),
        (" what\n", "what \\n"),
    ],
)
def test_a_single_image_stands_in_front_and_several_where_they_are(question, tokens):
    words, count = Words(), question.count("<image>")
    template = Template(start="Q ", answer=" A", space="")
    example = encode_row(row(question, "x", images=["a.png"] * count), words, template, 1, 100)
    assert draw(example, words)["tokens"] == f"<s> Q {tokens} A x </s>"
    assert draw(encode_prompt(question, count, words, template, 1), words)["tokens"] == f"<s> Q {tokens} A"


def test_two_images_in_two_turns():
    words = Words()
    turns = row("<image> a", "b", "c <image>", "d", images=["a.png", "b.png"])
    example = encode_row(turns, words, DRAWN, image_tokens=2, seq_len=100)
    assert draw(example, words)["tokens"] == "<s> USER : I I \\n a b </s> USER : I I \\n c d </s>"
    assert example.image_start == [3, 11]


def test_plain_template_keeps_the_image_and_the_first_answer():
    words = Words()
    turns = row("describe <image> this", "a red circle", "more ?", "no", image="a.png")
    example = encode_row(turns, words, TEMPLATES["plain"], image_tokens=3, seq_len=100)
    assert draw(example, words) == table("""
        tokens     <s> I I I a red circle \\n
        loss_mask    0 0 0 0 1   1      1   1
        branches     0 0 0 0 0   0      0   0
        positions    0 1 2 3 4   5      6   7
    """)
    same = encode_row({**turns, "independent": True}, words, TEMPLATES["plain"], 3, 100, np.array([1, 0]))
    assert draw(same, words) == draw(example, words)


def test_vicuna_template():
    words = Words()
    example = encode_row(row("<image>\nwhat ?", "red", image="a.png"), words, TEMPLATES["vicuna_v1"], 1, 100)
    assert draw(example, words)["tokens"] == (
        "<s> A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: I \\n what ? ASSISTANT: red </s>"
    )
    assert example.loss_mask.sum() == 2


def test_a_system_message_of_the_row():
    words = Words()
    turns = row("<image> q", "a", image="a.png", system="Look at </s> <image> .")
    own = Template(start="<s>S d </s>U ", system=("<s>S ", "</s>U "), space="", bos=False)
    assert draw(encode_row(turns, words, own, 1, 30), words)["tokens"] == (
        "<s> S Look at '</s>' <image> . </s> U I \\n q a </s>"
    )
    prompt = encode_prompt("q", 1, words, own, 1, turns["system"])
    assert draw(prompt, words)["tokens"] == "<s> S Look at '</s>' <image> . </s> U I \\n q"
    assert draw(encode_row(turns, words, DRAWN, 1, 30), words)["tokens"] == (
        "<s> USER : Look at '</s>' <image> . \\n \\n I \\n q a </s>"
    )
    assert draw(encode_row(turns, words, TEMPLATES["plain"], 1, 30), words)["tokens"] == "<s> I a \\n"


def test_space_before_an_answer_is_predicted_with_it(bpe):
    example = encode_row(row("what?", "red"), bpe, TEMPLATES["vicuna_v1"], 1, 300)
    answer = bpe.encode(" red")
    assert tuple(example.tokens[example.loss_mask == 1]) == (*answer, bpe.eos)
    assert tuple(example.tokens[-len(answer) - 1 :]) == (*answer, bpe.eos)


def test_tokenizer_without_bos():
    words = Words()
    words.bos = -1
    assert draw(encode_row(row("a", "b"), words, DRAWN, 1, 10), words)["tokens"] == "USER : a b </s>"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("text", ["</s>", "<image>", "<s> no <pad>", "see <image> and </s>"])
def test_what_looks_special_in_an_answer_stays_text(bpe, name, text):
    template = TEMPLATES[name]
    turns = row("<image>\nwhat?", text, image="a.png")
    canonical(turns, "r", max_images=1)
    example = encode_row(turns, bpe, template, image_tokens=4, seq_len=300)
    answer = example.tokens[example.loss_mask == 1].tolist()
    assert len(example.image_start) == 1
    assert bpe.decode(answer) == template.space + text + (template.end if name == "plain" else "")
    assert answer.count(bpe.eos) == (template.end is None)
    assert bpe.pad not in answer and bpe.bos not in answer


def test_what_looks_special_in_a_question_stays_text(bpe):
    tokens = encode_row(row("</s> <s><pad>", "no"), bpe, TEMPLATES["qa"], 1, 100).tokens.tolist()
    assert (tokens.count(bpe.bos), tokens.count(bpe.eos), tokens.count(bpe.pad)) == (1, 1, 0)


# ----------------------------------------------------------------------------------------------------------------------
# independent questions are rows of their own


@pytest.mark.parametrize("name", ["qa", "vicuna_v1", "chatml", "llama3"])
@pytest.mark.parametrize("image", [True, False])
def test_a_branch_with_the_shared_prefix_is_the_row_alone(bpe, name, image):
    pairs = [("what color is the circle?", "red"), ("is it red?", "yes"), ("what is this?", "a circle")]
    more = {"image": "a.png"} if image else {}
    before = "<image>\n" if image else ""
    texts = [text for question, answer in pairs for text in (question, answer)]
    if image:
        texts[::2] = [before + texts[0], *("\n" + text for text in texts[2::2])]
    together = encode_row(row(*texts, independent=True, **more), bpe, TEMPLATES[name], 4, 1000)
    for i, (question, answer) in enumerate(pairs):
        alone = encode_row(row(before + question, answer, **more), bpe, TEMPLATES[name], 4, 1000)
        seen = (together.branches == 0) | (together.branches == i + 1)
        for field in ("tokens", "positions", "loss_mask"):
            np.testing.assert_array_equal(getattr(together, field)[seen], getattr(alone, field), err_msg=field)
        assert together.image_start == alone.image_start


def test_order():
    words = Words()
    turns = row("<image>", "a", "q2", "b b", "q3", "c", image="a.png", independent=True)
    example = encode_row(turns, words, Template(space=""), 2, 100, order=np.array([2, 0, 1]))
    assert draw(example, words) == table("""
        tokens     <s> I I q3 c </s> a </s> q2 b b </s>
        loss_mask    0 0 0  0 1    1 1    1  0 1 1    1
        branches     0 0 0  1 1    1 2    2  3 3 3    3
        positions    0 1 2  3 4    5 3    4  3 4 5    6
    """)
    assert example.image_start == [1]


def test_order_means_nothing_to_an_ordinary_conversation():
    words = Words()
    turns = row("q1", "a", "q2", "b")
    example = encode_row(turns, words, DRAWN, 1, 100, order=np.array([1, 0]))
    assert draw(example, words)["tokens"] == "<s> USER : q1 a </s> USER : q2 b </s>"


# ----------------------------------------------------------------------------------------------------------------------
# too long


@pytest.mark.parametrize(
    ("seq_len", "tokens"),
    [
        (11, "<s> USER : q1 a </s> USER : q2 b </s>"),
        (10, "<s> USER : q1 a </s>"),
        (6, "<s> USER : q1 a </s>"),
    ],
)
def test_cut_after_the_last_whole_turn(seq_len, tokens):
    words = Words()
    example = encode_row(row("q1", "a", "q2", "b"), words, DRAWN, 1, seq_len)
    assert draw(example, words)["tokens"] == tokens
    assert len(example.tokens) == len(example.loss_mask) == len(example.branches) == len(example.positions)


def test_nothing_follows_what_was_cut():
    """A short third turn does not stand in for a long second one."""
    words = Words()
    example = encode_row(row("q1", "a", "q2", "b " * 50, "q3", "c"), words, DRAWN, 1, 20)
    assert draw(example, words)["tokens"] == "<s> USER : q1 a </s>"


def test_the_image_of_a_cut_turn_is_cut_with_it():
    words = Words()
    turns = row("q1 <image>", "a", "q2 <image>", "b", image=["a.png", "b.png"])
    assert encode_row(turns, words, DRAWN, 4, 21).image_start == [3, 13]
    assert encode_row(turns, words, DRAWN, 4, 20).image_start == [3]


def test_a_shorter_question_takes_the_place_of_one_that_does_not_fit():
    words = Words()
    turns = row("<image>", "a " * 9, "q2", "b", "q3", "c", image="a.png", independent=True)
    example = encode_row(turns, words, Template(space=""), 2, 9)
    assert draw(example, words) == table("""
        tokens     <s> I I q2 b </s> q3 c </s>
        loss_mask    0 0 0  0 1    1  0 1    1
        branches     0 0 0  1 1    1  2 2    2
        positions    0 1 2  3 4    5  3 4    5
    """)


def test_first_answer_does_not_fit():
    with pytest.raises(TooLong) as caught:
        encode_row(row("q1", "a", "q2", "b"), Words(), DRAWN, 1, 5)
    assert str(caught.value) == "its first answer ends at position 6, but seq_len=5"
    assert isinstance(caught.value, BadSample) and caught.value.cause == "too_long"


def test_an_image_does_not_fit():
    with pytest.raises(TooLong, match="^its first answer ends at position 106, but seq_len=100$"):
        encode_row(row("<image>", "a", image="a.png"), Words(), DRAWN, 101, 100)


def test_no_question_fits():
    with pytest.raises(TooLong, match=r"^its first answer ends at position \d+, but seq_len=11$"):
        encode_row(QUESTIONS, Words(), DRAWN, 4, 11)
    assert encode_row(QUESTIONS, Words(), DRAWN, 4, 12).branches.max() == 1


@pytest.mark.parametrize(("seq_len", "cut"), [(16, 0), (15, 1), (11, 1), (10, 2), (6, 2)])
def test_answers_that_are_cut_are_counted(seq_len, cut):
    assert encode_row(row("q1", "a", "q2", "b", "q3", "c"), Words(), DRAWN, 1, seq_len).cut == cut


@pytest.mark.parametrize(("seq_len", "kept", "cut"), [(30, 3, 0), (12, 2, 0), (11, 2, 1), (6, 1, 1)])
def test_independent_questions_that_wait_are_not_cut(seq_len, kept, cut):
    """Of <s> and 3 + 3 + 9 positions: those that would fit alone may be drawn in another epoch."""
    turns = row("q1", "a", "q2", "b", "q3", "c " * 9, independent=True)
    example = encode_row(turns, Words(), Template(space=""), 1, seq_len)
    assert (example.branches.max(), example.cut) == (kept, cut)


def test_the_second_answer_of_a_caption_is_not_cut():
    assert encode_row(row("<image>", "a", "q", "b" * 99, image="x"), Words(), TEMPLATES["plain"], 1, 9).cut == 0


# ----------------------------------------------------------------------------------------------------------------------
# what is not trained on

SKIPPED = {"from": "gpt", "value": "b", "loss": False}


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain"}))
def test_an_answer_that_is_not_trained_on_is_read_all_the_same(bpe, name):
    """In every template: tokens and all else are those of the same row without the mark, and the mask of one answer is 0."""
    said = [human("<image>q"), gpt("a"), human("r"), gpt("b"), human("s"), gpt("c")]
    whole, others = ({"image": "x", "conversations": turns} for turns in (said, [*said[:3], SKIPPED, *said[4:]]))
    expected, found = (encode_row(one, bpe, TEMPLATES[name], 4, 1000) for one in (whole, others))
    for field in ("tokens", "branches", "positions", "image_start"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), err_msg=field)
    first, second = (np.flatnonzero(np.diff(example.loss_mask, prepend=0, append=0)) for example in (expected, found))
    assert len(first) == 6 and second.tolist() == [*first[:2], *first[4:]]  # where answers begin and end


def test_an_independent_question_that_is_not_trained_on_is_left_out():
    turns = {**QUESTIONS, "conversations": [*QUESTIONS["conversations"], human("q"), SKIPPED]}
    for order, same in ((None, None), (np.array([1, 2, 0]), np.array([1, 0]))):
        one, other = (encode_row(r, Words(), DRAWN, 4, 20, o) for r, o in ((turns, order), (QUESTIONS, same)))
        for field in ("tokens", "loss_mask", "branches", "positions"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)


def test_nothing_that_fits_is_trained_on():
    turns = {"conversations": [human("q1"), SKIPPED, human("q2"), gpt("c c c")]}
    assert encode_row(turns, Words(), DRAWN, 1, 13).loss_mask.tolist() == [0] * 9 + [1] * 4
    with pytest.raises(TooLong, match="^all answers that fit into seq_len=12 have loss=false$"):
        encode_row(turns, Words(), DRAWN, 1, 12)
    with pytest.raises(BadSample, match="^the template keeps only the first answer, which has loss=false$") as caught:
        encode_row(turns, Words(), TEMPLATES["plain"], 1, 99)
    assert caught.value.cause == "no_loss"


# ----------------------------------------------------------------------------------------------------------------------
# prompts


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("question", ["<image>\nis it red?", "is <image> red? ", "is it red?\n<image>"])
@pytest.mark.parametrize("answer", ["yes", " yes", "\n\nno\n", "?", "é", "</s>"])
@pytest.mark.parametrize("kind", [byte_level, llama])
def test_prompt_is_the_row_up_to_its_answer(kind, name, question, answer):
    tokenizer = SMALL[kind]
    example = encode_row(row(question, answer, image="a.png"), tokenizer, TEMPLATES[name], 4, 1000)
    prompt = encode_prompt(question, 1, tokenizer, TEMPLATES[name], 4)
    n = len(prompt.tokens)
    assert n == list(example.loss_mask).index(1)
    for field in ("tokens", "loss_mask", "branches", "positions"):
        np.testing.assert_array_equal(getattr(example, field)[:n], getattr(prompt, field), err_msg=field)
    assert prompt.image_start == example.image_start


@pytest.mark.parametrize(
    ("prompt", "images", "tokens"),
    [
        ("why ?", 0, "<s> USER : why ?"),
        ("why ?", 1, "<s> USER : I I \\n why ?"),
        ("why ?", 2, "<s> USER : I I I I \\n why ?"),
        ("why <image> ?", 1, "<s> USER : I I \\n why ?"),
        ("why <image> or <image> ?", 2, "<s> USER : why I I or I I ?"),
        ("", 1, "<s> USER : I I"),
    ],
)
def test_images_go_in_front_of_a_prompt_that_names_none(prompt, images, tokens):
    words = Words()
    assert draw(encode_prompt(prompt, images, words, DRAWN, 2), words)["tokens"] == tokens


@pytest.mark.parametrize(("prompt", "images"), [("<image> a", 0), ("<image> a", 2), ("<image><image>", 1)])
def test_prompt_with_another_number_of_images(prompt, images):
    with pytest.raises(UserError) as caught:
        encode_prompt(prompt, images, Words(), DRAWN, 2)
    assert str(caught.value) == f"the prompt has {prompt.count('<image>')} <image>, but {images} images are given"


def test_special_tokens_of_a_template_and_their_look_alikes():
    """A template's `<s>` is the token, a user's is text; `next` stands in front of the second question."""
    words = Words()
    template = Template(start="<s>sys <s>U ", answer="</s>A ", space="", next="| <s>U ")
    example = encode_row(row("<image>why <s> ?", "so", "and ?", "no", image="a"), words, template, 2, 40)
    assert draw(example, words) | {"branches": "", "positions": ""} == {
        "tokens": "<s> <s> sys <s> U I I \\n why '<s>' ? </s> A so </s> | <s> U and ? </s> A no </s>",
        "loss_mask": "0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 0 0 0 0 0 0 0 1 1",
        "branches": "",
        "positions": "",
    }


# ----------------------------------------------------------------------------------------------------------------------
# the question about an image


def said(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_an_image_is_asked_about_by_the_turn_that_shows_it():
    """Not by later ones, and no answer is part of it."""
    words, template = byte_level(), TEMPLATES["qa"]
    row = {"images": ["a", "b"], "conversations": said("<image>\nred?", "yes", "and <image>?", "no")}
    example = with_questions(encode_row(row, words, template, 2, 100), words, 3)
    assert example.asked == ["red?", "and ?"]
    assert [ids.tolist() for ids in example.extras["question"]] == [
        list(words.encode(text)[:3]) for text in example.asked
    ]
    assert encode_row(row, words, TEMPLATES["plain"], 2, 100).asked == [""]
    short = encode_row(row, words, template, 2, len(example.tokens) - 1)  # the second turn does not fit
    assert short.asked == ["red?"] and len(short.image_start) == 1
    assert encode_prompt("red?", 1, words, template, 2).asked == ["red?"]


def test_independent_questions_one_by_one():
    row = {"image": "a", "conversations": said("<image>\nred?", "yes", "\nbig?", "no"), "independent": True}
    assert [each["conversations"] for each in alone(row)] == [said("<image>\nred?", "yes"), said("<image>\nbig?", "no")]
    assert not any(each["independent"] for each in alone(row))
    row["conversations"][1]["loss"] = False
    assert [each["conversations"] for each in alone(row)] == [said("<image>\nbig?", "no")]
    assert alone({"conversations": said("red?", "yes", "big?", "no")}) == [
        {"conversations": said("red?", "yes", "big?", "no")}
    ]


def test_a_row_encoder_takes_one_question_at_a_time():
    """The next one in order that fits; the length of the row is that of the longest."""
    words = byte_level()
    row = {
        "image": "a",
        "conversations": said("<image>\nred?", "yes", "\nbig? " * 5, "no", "\nx?", "y"),
        "independent": True,
    }
    encoder = lambda seq_len: RowEncoder(words, "qa", 2, seq_len, question=4)
    first, second, third = (encoder(100)(row, order) for order in ([0, 1, 2], [1, 0, 2], [2, 0, 1]))
    assert first.asked == ["red?"] and third.asked == ["x?"] and second.asked[0].startswith("big?")
    assert len(second.extras["question"][0]) == 4 and not second.branches.any()
    assert encoder(100).length(row) == (len(second.tokens), 1, False, 0)
    tight = len(first.tokens)
    assert encoder(tight)(row, [1, 0, 2]).asked == ["red?"]
    assert encoder(tight).length(row) == (tight, 1, False, 1)
    assert encoder(100).fingerprint() != RowEncoder(words, "qa", 2, 100).fingerprint()
