"""Runs each model in its own process on request, so that models are measured in turn and do not affect each other."""

from __future__ import annotations

import multiprocessing
import signal
import sys

from evaluation.speed.job import Engine, Job, Timing
from transformers_patches.cli import explained
from transformers_patches.errors import PartInferError
from transformers_patches.flags import IGNORED_GGUF_KEYS


class Worker:
    """The parent's side of a process with an engine. Raises PartInferError for errors in that process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")  # a fork would share the threads' state
        self._process = context.Process(target=_serve, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()
        self.variants: list[str] = self._answer()

    def run(self, variant: str, prompts: list[list[int]], new_tokens: int) -> Timing:
        self._pipe.send(("run", variant, prompts, new_tokens))
        return self._answer()

    def facts(self, variant: str) -> dict:
        """The engine's facts, and load_s and peak_memory_bytes of the process."""
        self._pipe.send(("facts", variant))
        return self._answer()

    def close(self) -> None:
        """End the process and wait until its memory is free."""
        self._pipe.close()
        self._process.join()

    def _answer(self):
        try:
            succeeded, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise PartInferError(
                f"the process of {self.job.label} ended with code {code} (killed for memory?): measure fewer at a time"
            ) from None
        if not succeeded:
            raise PartInferError(f"{self.job.label}: {answer}")
        return answer


def _serve(pipe, job: Job) -> None:
    """The process: load, then answer until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    IGNORED_GGUF_KEYS.update(job.ignored_gguf_keys)
    try:
        engine = _engine(job)
        pipe.send((True, engine.variants))
        while True:
            command, *arguments = pipe.recv()
            pipe.send((True, _do(engine, command, arguments)))
    except EOFError:
        sys.exit(0)
    except Exception as error:  # of any library: the parent says it in one line
        pipe.send((False, explained(error)))


def _engine(job: Job) -> Engine:
    if job.engine == "llama.cpp":
        from evaluation.speed.llama_cpp_engine import LlamaCppEngine

        return LlamaCppEngine(job)
    import transformers

    from evaluation.speed.engines import PartInferEngine, TransformersEngine

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return PartInferEngine(job) if job.engine == "partinfer" else TransformersEngine(job)


def _do(engine: Engine, command: str, arguments: list):
    if command == "run":
        return engine.run(*arguments)
    from transformers_patches.cli import peak_memory_bytes

    return {"load_s": engine.load_s, "peak_memory_bytes": peak_memory_bytes(), **engine.facts(*arguments)}
