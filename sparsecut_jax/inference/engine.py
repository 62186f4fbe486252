"""From prompts about pictures to texts: the one road to an answer, for one question and for a whole test alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from sparsecut_jax.data.batches import write_items
from sparsecut_jax.inference.decoding import encode_images, generate, pad_prompts, until
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runtime import placing, sharding
from sparsecut_jax.text.conversation import Example, Request, encode_prompt, with_questions
from sparsecut_jax.text.templates import get_template, stop_ids
from sparsecut_jax.types import NO_TOKEN


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, and whether it was cut at the maximum length."""

    text: str
    cut: bool


class Engine:
    """Answers prompts with the model of a run, on its mesh. All processes must ask the same; all get all answers.

    Attributes:
      rows: rows of pictures that are encoded together.
      size: prompts that are answered together.
      here: int64[n], those of the rows whose pictures are encoded on the devices of this process.
    """

    def __init__(self, run: Run, template: str = "", rows: int = 1, size: int = 1):
        """
        Args:
          template: name of the prompts' template; "": that of the run.
          rows, size: as the attributes, which are rounded up so that all devices have equally many.

        Raises:
          UserError: the tokenizer does not support the template.
        """
        self.run, self.template = run, get_template(template or run.template, run.tokenizer)
        self.stop = stop_ids(run.tokenizer, self.template)
        self.placed, shards = sharding.batch_sharding(run.mesh), sharding.data_parallel(run.mesh)
        self.rows, self.size = (-(-n // shards) * shards for n in (rows, size))
        self.here, self.asking = (placing.rows_here(self.placed, n) for n in (self.rows, self.size))

    def prompt(self, text: str, images: int, system: str = "") -> Example:
        """The tokens of a question about `images` pictures, without its answer. Raises UserError; see `encode_prompt`."""
        wiring, tokenizer = self.run.model.wiring, self.run.tokenizer
        prompt = encode_prompt(text, images, tokenizer, self.template, wiring.positions, system)
        return with_questions(prompt, tokenizer, wiring.question) if wiring.question else prompt

    def no_pictures(self) -> np.ndarray:
        """uint8[n, M, V, S, S, 3], zeros: room for the pictures of the rows `here`, or for their stored features."""
        pictures = self.run.pictures
        return np.zeros((len(self.here), self.run.config.data.max_images, *pictures.shape), pictures.dtype)

    def answers(
        self,
        views: np.ndarray,
        requests: Sequence[Request],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Answer]:
        """The answers to requests, in their order.

        Pictures are encoded once, however many prompts are about them; once for every prompt, if their encoding depends on
        the question.

        Args:
          views: uint8[n, M, V, S, S, 3], pictures of the rows `here`.
          temperature: 0 takes the most likely token; above 0, tokens are sampled with `seed`.
        """
        run, slots, answered = self.run, self.run.config.data.max_images, []
        with jax.set_mesh(run.mesh):
            views = placing.place(views, self.placed, self.here, self.rows)
            once = None if run.model.wiring.question else encode_images(run.model, run.params, views)
            for first in range(0, len(requests), self.size):
                batch = requests[first : first + self.size]  # the last one is filled up with empty prompts
                row = np.zeros(self.size, np.int32)
                row[: len(batch)] = [request.row for request in batch]
                examples = [request.prompt for request in batch]
                questions = np.full((self.size, slots, run.model.wiring.question), NO_TOKEN, np.int32)
                for place, prompt in enumerate(examples):
                    write_items(questions[place], prompt.extras.get("question", ()))
                arrays = (*pad_prompts(examples, self.size, slots), questions, row)
                own = tuple(x[self.asking] for x in arrays)
                *prompts, questions, row = placing.place(own, self.placed, self.asking, self.size)
                encoded = (
                    once.rows(row) if once is not None else encode_images(run.model, run.params, views[row], questions)
                )
                how = (
                    max_new_tokens,
                    np.array(self.stop),
                    temperature,
                    self._key(seed, first) if temperature else None,
                )
                ids, _ = generate(run.model, run.params, *prompts, encoded, *how, chunk=run.config.eval.prefill_chunk)
                answered += [self._answer(each, max_new_tokens) for each in placing.fetch(ids)[: len(batch)]]
        return answered

    @staticmethod
    def _key(seed: int, first: int) -> jax.Array:
        """The random key of the batch that begins with request `first`."""
        return jax.random.fold_in(jax.random.key(seed), first) if first else jax.random.key(seed)

    def _answer(self, ids: np.ndarray, max_new_tokens: int) -> Answer:
        said = until(ids, self.stop)
        return Answer(self.run.tokenizer.decode(said).strip(), cut=len(said) == max_new_tokens)
