"""The Python interface: load a model by its name, and ask it for text, whole or in pieces.

It does what partinfer.py does with the same settings, and prints nothing.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from transformers_patches import cli
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.generation.generate import GenerationOptions, GenerationResult
from transformers_patches.generation.generate import generate as generate_from_ids
from transformers_patches.generation.prompts import TEMPLATES, chat_ids, task_prompt_ids, uses_chat_template
from transformers_patches.load import loader
from transformers_patches.plan.neuron_files import settings_for, with_neuron_files
from transformers_patches.weights.lookup import find_model
from transformers_patches.weights.model_files import load_tokenizer

Prompt = str | list[dict[str, str]]


@dataclass
class TextModel:
    """A loaded model with its tokenizer, for `generate` and `stream`. One answer at a time.

    loaded: the transformers model and what is known about it.
    tokenizer: the model's.
    task_type: whose templates prompts go through, and whose neuron files were looked up.
    """

    loaded: loader.LoadedModel
    tokenizer: PreTrainedTokenizerBase
    task_type: str = "QA"
    _answering: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a text in the task's template for this model, or of messages (`role`, `content`) as they are.

        Raises PartInferError for messages to a model without a chat template.
        """
        if isinstance(prompt, str):
            return task_prompt_ids(self.tokenizer, self.task_type, prompt, num_fewshot=None)
        if not uses_chat_template(self.tokenizer, no_chat_template=False):
            raise PartInferError("messages need a model with a chat template: give base models a text")
        return chat_ids(self.tokenizer, prompt)

    def options(self, given: dict) -> GenerationOptions:
        """GenerationOptions. Unless told otherwise, a base model stops where it would begin an example of its own."""
        options = GenerationOptions(**given)
        if options.stop or uses_chat_template(self.tokenizer, no_chat_template=False):
            return options
        return dataclasses.replace(options, stop=(TEMPLATES[self.task_type].stop,))

    def begin(self) -> None:
        """Take the model for one answer, until `end`; PartInferError while it is giving another."""
        if not self._answering.acquire(blocking=False):
            raise PartInferError("the model is giving another answer: read that stream to its end, or close() it")
        self.loaded.reset_counters()

    def end(self) -> None:
        """The answer that `begin` took the model for is over."""
        self._answering.release()


def load_model(model: str | Path, settings: PartInferConfig | None = None, task_type: str = "QA") -> TextModel:
    """Load a model: a path, or a short name or hub id that was downloaded.

    settings: what to load and compute; None for the defaults, or for what a pack was made with. Neuron files that it
    needs and does not name are looked up by the model's name and the task. Raises PartInferError for anything missing,
    damaged or contradictory.
    """
    if task_type not in TEMPLATES:
        raise PartInferError(f"task_type must be one of {', '.join(TEMPLATES)}, got {task_type!r}")
    cli.limit_primitives()
    path = find_model(model)
    settings = settings_for(path, {}, task_type) if settings is None else with_neuron_files(settings, path, task_type)
    return TextModel(loader.load_model(path, settings), load_tokenizer(path), task_type)


def generate(model: TextModel, prompt: Prompt, **options) -> GenerationResult:
    """Answer a prompt.

    prompt: a text, or a chat's messages.
    options: fields of GenerationOptions (max_new_tokens, sampling, …).

    Ctrl-C ends the generation and keeps the text. Raises PartInferError for options out of range and prompts that are
    empty or too long.
    """
    ids, chosen = model.prompt_ids(prompt), model.options(options)
    model.begin()
    try:
        return generate_from_ids(model.loaded, model.tokenizer, ids, chosen)
    finally:
        model.end()


def stream(model: TextModel, prompt: Prompt, **options) -> Generator[str, None, GenerationResult]:
    """Answer a prompt in pieces of text, each as soon as it is certain; the generator's value is the result.

    Closing the generator, or Ctrl-C while waiting for a piece, ends the generation after the current token; the next
    prompt starts from a clean state. Arguments and errors are those of `generate`.
    """
    return _pieces(model, model.prompt_ids(prompt), model.options(options))


def _pieces(model: TextModel, ids: list[int], options: GenerationOptions) -> Generator[str, None, GenerationResult]:
    """The generation runs in a thread of its own, which ends when `closed` is set."""
    pieces: queue.SimpleQueue[str | _Ended] = queue.SimpleQueue()
    closed = threading.Event()

    def answer() -> None:
        try:
            result = generate_from_ids(model.loaded, model.tokenizer, ids, options, pieces.put, stopped=closed.is_set)
            pieces.put(_Ended(lambda: result))
        except BaseException as error:
            pieces.put(_Ended(_raising(error)))
        finally:
            model.end()  # here: a second Ctrl-C may end the waiting below, but not the generation

    model.begin()
    thread = threading.Thread(target=answer, name="partinfer stream", daemon=True)
    thread.start()
    try:
        while not isinstance(piece := pieces.get(), _Ended):
            yield piece
        return piece.outcome()
    finally:
        closed.set()
        thread.join()


@dataclass
class _Ended:
    """The last thing in the queue."""

    outcome: Callable[[], GenerationResult]  # returns the result, or raises what ended the generation


def _raising(error: BaseException) -> Callable[[], GenerationResult]:
    def outcome() -> GenerationResult:
        raise error

    return outcome
