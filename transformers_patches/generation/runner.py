"""Runner: what partinfer.py does with its settings. Text goes to standard output, all else to standard error."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

from transformers_patches import cli
from transformers_patches.cli import peak_memory_bytes
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.flags import STANDARD_OUTPUT
from transformers_patches.generation.answer_view import AnswerView, PlainView, view_for_chat
from transformers_patches.generation.chat import take_turns
from transformers_patches.generation.chat_commands import Chat
from transformers_patches.generation.chat_input import decoded, standard_input
from transformers_patches.generation.comparison import MEGABYTE, Comparison, table
from transformers_patches.generation.generate import Conversation, GenerationResult, generate
from transformers_patches.generation.layer_table import layer_table
from transformers_patches.generation.options import GenerationOptions
from transformers_patches.generation.prompts import (
    TEMPLATES,
    chat_ids,
    predefined_prompts,
    task_prompt_ids,
    uses_chat_template,
)
from transformers_patches.kernels import FetchCounts
from transformers_patches.load.loader import load_model
from transformers_patches.load.paths import in_words, layer_paths
from transformers_patches.plan.max_loss import DEFAULT_MAX_LOSS, SPOILS
from transformers_patches.weights.model_files import load_tokenizer


class Runner:
    """Loads a model once and answers with it. `report` says what that took, as counted.

    normal, chat and predefined_prompts return the exit code: 130 if Ctrl-C ended the last answer.
    """

    def __init__(
        self, folder: Path, settings: PartInferConfig, options: GenerationOptions, arguments: argparse.Namespace
    ) -> None:
        self.arguments, self.folder = arguments, folder
        self.comparison: Comparison | None = None
        self.view: AnswerView = PlainView()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.manual_seed(arguments.seed)
        self.tokenizer = load_tokenizer(folder)
        self.loaded = load_model(folder, settings, progress=cli.bar("loading"))
        self._warn()
        self.options = self._with_task_stop(options)
        self.results: list[tuple[str, GenerationResult]] = []
        self.failed: list[tuple[str, str]] = []  # prompts and what was wrong
        self.fetched: list[FetchCounts] = []  # what each answer has read on demand

    def _warn(self) -> None:
        """Warn if the settings spoil the answers, and name the flag that helps."""
        loss = self.loaded.run.predicted_loss
        if loss is not None and loss > SPOILS and not self.arguments.quiet:
            print(
                f"these settings are predicted to cost {loss:.2f} nats per token, and answers may break: "
                f"--max_loss {DEFAULT_MAX_LOSS} keeps them",
                file=sys.stderr,
            )

    def _with_task_stop(self, options: GenerationOptions) -> GenerationOptions:
        """A base model would go on with an example of its own: stop it there unless the user says otherwise."""
        if options.stop or self._uses_chat_template():
            return options
        return dataclasses.replace(options, stop=(TEMPLATES[self.arguments.task_type].stop,))

    def _uses_chat_template(self) -> bool:
        return uses_chat_template(self.tokenizer, self.arguments.no_chat_template)

    def normal(self) -> int:
        """Answer one prompt: --prompt, standard input, or the first predefined prompt of the task type."""
        text = self.arguments.prompt
        if text is None:
            text = predefined_prompts(self.arguments.task_type)[0]
            self._show_prompt(text)
        text = self._text(text)
        return self._answer(text, self._task_ids(text))

    @staticmethod
    def _text(given: str) -> str:
        """A text, or standard input for -."""
        return decoded(standard_input().read()).strip() if given == "-" else given

    def predefined_prompts(self) -> int:
        """Answer the project's own prompts of the task type, one after the other; Ctrl-C goes on to the next one.

        A prompt that fails is said to have failed, and the next one is answered; the exit code is then 1.
        """
        code = cli.DONE
        for text in predefined_prompts(self.arguments.task_type):
            self._show_prompt(text)
            with self._noting_failure(text):
                code = self._answer(text, self._task_ids(text))
        return cli.FAILED if self.failed else code

    @contextmanager
    def _noting_failure(self, text: str) -> Iterator[None]:
        """Say what fails in the block, and keep it for the report: the answers before and after it count."""
        try:
            yield
        except OSError:  # nobody can read the next answer either
            raise
        except Exception as error:
            cli.show_error(error)
            self.failed.append((text, cli.explained(error)))

    def compare(self) -> int:
        """Answer --prompt, or the predefined prompts, dense and by the settings, and end with a table of both."""
        given = self.arguments.prompt
        texts = predefined_prompts(self.arguments.task_type) if given is None else [self._text(given)]
        settings = dataclasses.replace(
            self.loaded.settings,
            method="dense",
            use_partial_loading=False,
            max_loss=None,
            block_bytes=None,
            memory_limit=False,
        )
        self.comparison = Comparison(load_model(self.folder, settings), self.loaded, self.options)
        show = self.view.piece if self.arguments.json != STANDARD_OUTPUT else None
        answered, interrupted = self.comparison.sides[-1].results, False
        for text in texts:
            self._show_prompt(text)
            with self._noting_failure(text):
                interrupted = self.comparison.answer(self.tokenizer, self._task_ids(text), show)
            if len(answered) > len(self.results):
                self.results.append((text, answered[-1]))
            if interrupted:
                break
        if show is not None and self.results:
            print(f"\n{table(self.comparison.rows())}", flush=True)
        if interrupted:
            return cli.INTERRUPTED
        return cli.FAILED if self.failed else cli.DONE

    def chat(self) -> int:
        """Take turns with the user until the input ends or says /exit (see `take_turns`)."""
        if not self._uses_chat_template():
            raise PartInferError("chat needs a model with a chat template: use --function normal with base models")
        chat = Chat(self.arguments.system_prompt)
        if self.arguments.json != STANDARD_OUTPUT:
            self.view = view_for_chat()

        def answer(turn: str) -> int:
            code = self._answer(turn, chat_ids(self.tokenizer, chat.asked(turn)), chat.conversation)
            chat.answered(turn, self.results[-1][1])
            return code

        return take_turns(chat, answer, quiet=self.arguments.quiet)

    def _task_ids(self, text: str) -> list[int]:
        arguments = self.arguments
        try:
            return task_prompt_ids(
                self.tokenizer,
                arguments.task_type,
                text,
                arguments.num_fewshot,
                arguments.system_prompt,
                arguments.no_chat_template,
            )
        except ValueError as error:
            raise PartInferError(str(error)) from None

    def _answer(self, text: str, prompt_ids: list[int], conversation: Conversation | None = None) -> int:
        self.loaded.reset_counters()
        shown = self.arguments.json != STANDARD_OUTPUT
        sink = self.view.piece if shown else None
        try:
            result = generate(self.loaded, self.tokenizer, prompt_ids, self.options, sink, conversation)
        except BaseException:
            self.view.fail()
            raise
        self.results.append((text, result))
        if shown:
            self.view.end()
        summary = self._summary(result)
        if not self.arguments.quiet:
            print(summary, file=sys.stderr)
        if self.arguments.verbose:
            print(layer_table(self.loaded), file=sys.stderr)
        return cli.INTERRUPTED if result.finish_reason == "interrupted" else cli.DONE

    def _show_prompt(self, text: str) -> None:
        if not self.arguments.quiet:
            print(f"\n> {text}", file=sys.stderr)

    def _summary(self, result: GenerationResult) -> str:
        """One line: tokens, times, neurons as counted, bytes, memory."""
        report, plan = self.loaded.report, self.loaded.plan
        parts = [f"{result.prompt_tokens} prompt tokens, {result.generated_tokens} generated ({result.finish_reason})"]
        if result.time_to_first_token_s is not None:
            parts.append(f"first token {result.time_to_first_token_s:.2f} s")
        if result.decode_tokens_per_second is not None:
            parts.append(f"{result.decode_tokens_per_second:.1f} tokens/s")
        whole, computed = self.loaded.computed_fraction(), self.loaded.bytes_fraction()
        per_token = "" if whole == computed else f" ({whole:.1%} whole, chosen per token)"
        parts.append(
            f"neurons loaded {plan.loaded_fraction:.1%}, computed {computed:.1%}{per_token} "
            f"in {len(plan.layers) + len(plan.experts)} of {plan.num_layers} layers"
        )
        if self.loaded.settings.block_bytes is not None:
            parts.append(f"block bytes {self.loaded.settings.block_bytes:.0%}")
        parts.append(in_words(layer_paths(self.loaded.model, native=self.loaded.run.native)))
        if self.loaded.run.predicted_loss is not None:
            parts.append(f"predicted loss {self.loaded.run.predicted_loss:.3f} nats per token")
        parts.append(
            f"weights read {report.bytes_read / MEGABYTE:.0f} of {report.bytes_dense / MEGABYTE:.0f} MB, "
            f"held {report.bytes_resident / MEGABYTE:.0f} MB"
        )
        if self.loaded.rows_on_disk is not None:
            counts = self.loaded.rows_on_disk.take_counts()
            self.fetched.append(counts)
            found = counts.found / counts.chosen if counts.chosen else 1.0
            parts.append(
                f"{self.loaded.run.resident:.1%} of gate and down in memory, where {found:.1%} of the chosen rows were found, "
                f"{counts.bytes_read / MEGABYTE:.0f} MB read for prompt and answer"
            )
        parts.append(f"peak memory {peak_memory_bytes() / MEGABYTE:.0f} MB")
        return f"[{' · '.join(parts)}]"

    def report(self) -> dict:
        """The run as one JSON object; several prompts are summed up, and listed under `results`."""
        results = [result for _, result in self.results]
        loaded = self.loaded
        total = {
            "text": "\n\n".join(r.text for r in results),
            "prompt_tokens": sum(r.prompt_tokens for r in results),
            "generated_tokens": sum(r.generated_tokens for r in results),
            "finish_reason": results[-1].finish_reason if results else None,
            "time_to_first_token_s": results[0].time_to_first_token_s if results else None,
            "decode_tokens_per_second": _mean([r.decode_tokens_per_second for r in results]),
            "method": loaded.settings.method,
            "loaded_neurons_percent": loaded.plan.loaded_fraction,
            # a candidate that was not chosen has one of its three rows computed, and counts as a third of a neuron
            "computed_neurons_percent": loaded.bytes_fraction(),
            "wholly_computed_neurons_percent": loaded.computed_fraction(),
            "block_bytes": loaded.settings.block_bytes,  # share of all decoder layers' bytes; null: FFNs alone are sparse
            "predicted_loss": loaded.run.predicted_loss,
            "sparse_layers": sorted({*loaded.plan.layers, *loaded.plan.experts}),
            "layer_paths": layer_paths(loaded.model, native=loaded.run.native),
            "whole_layers": dict(loaded.run.family.whole_layers),  # that can't be computed by neurons, and why
            "weight_bytes_read": loaded.report.bytes_read,
            "weight_bytes_dense": loaded.report.bytes_dense,
            "weight_bytes_resident": loaded.report.bytes_resident,
            "resident_neurons_percent": loaded.run.resident,  # of gate and down; null: nothing is read on demand
            "fetched": [dataclasses.asdict(counts) for counts in self.fetched],
            "load_s": loaded.report.seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "settings": loaded.settings.to_dict(),
            "reasons": {
                name: decision.why for name, decision in loaded.run.decisions.items()
            },  # of settings left to auto
        }
        if self.comparison is not None:
            total["comparison"] = self.comparison.rows()
        if self.failed:
            total["failed"] = [{"prompt": text, "error": error} for text, error in self.failed]
        if len(results) != 1 or self.failed:
            total["results"] = [{"prompt": text, **dataclasses.asdict(result)} for text, result in self.results]
        return total


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
