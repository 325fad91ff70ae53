"""PartInferLM: lm-eval's HFLM over a partially loaded, partially computed model, registered as "partinfer".

Every field of PartInferConfig is a model argument. Plain lm-eval use, with all of its options:

    python -m evaluation.partinfer_lm run --model partinfer --tasks piqa \\
        --model_args pretrained=models/NAME,method=partinfer,sparsity=0.4,task_type=QA

(lm-eval finds a model class only if its module is imported first, which this module does when it is run.)
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from evaluation.answer_log import GENERATED, SCORED, AnswerLog
from evaluation.models import attach_published, find_rankings
from evaluation.published.settings import PublishedSettings
from evaluation.scoring import Request, batches, continuation_logits
from evaluation.weights import weight_counts
from evaluation.windows import PREFILL_TOKENS, SCORED_TOKENS
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.load.loader import load_model
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.plan.machine import resolve_device
from transformers_patches.token_ids import NOT_FINITE, check_token_ids
from transformers_patches.weights.file_kinds import is_gguf
from transformers_patches.weights.lookup import find_model
from transformers_patches.weights.model_files import load_tokenizer, read_config

logger = logging.getLogger(__name__)
AUTO_BATCH_ON_CPU = 8  # memory does not run out there, and larger batches are no faster
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("partinfer")
class PartInferLM(HFLM):
    """An lm-eval model whose log-likelihoods and generations use the neurons that decoding would use.

    pretrained: a checkpoint folder, or the name of one in models/.
    task_type: whose neuron file is looked up.
    rankings: neuron files in memory instead.
    published: a baseline that the dense model computes, with calibration texts drawn by calibration_seed.
    prefill_tokens, scored_tokens: windows of rolling log-likelihoods; if not given, 256 and 128 for sparse methods and
        lm-eval's own windows for dense ones.

    Other arguments are those of PartInferConfig and of HFLM. Raises PartInferError for bad settings, and for HFLM
    options that would replace the model (peft, quantization, parallelize).
    """

    def __init__(
        self,
        pretrained: str,
        *,
        task_type: str | None = None,
        rankings: dict[str, NeuronFile] | None = None,
        prefill_tokens: int | None = None,
        scored_tokens: int | None = None,
        published: PublishedSettings | None = None,
        calibration_seed: int = 0,
        **options,
    ) -> None:
        names = {item.name for item in fields(PartInferConfig)}
        settings = PartInferConfig(**{key: value for key, value in options.items() if key in names})
        others = {key: value for key, value in options.items() if key not in names}
        folder = find_model(str(pretrained))
        self.settings = settings
        self.rankings = find_rankings(settings, folder, task_type) if rankings is None else rankings
        self.windows = (prefill_tokens, scored_tokens)
        self.published, self.calibration_seed = published, calibration_seed
        self.answer_log: AnswerLog | None = None  # of the running task; None: answers are not kept
        if None in self.windows and self._decodes_otherwise:
            self.windows = (prefill_tokens or PREFILL_TOKENS, scored_tokens or SCORED_TOKENS)
        device = str(resolve_device(settings.device))
        if is_gguf(folder):
            others.setdefault("tokenizer", load_tokenizer(folder))
        super().__init__(pretrained=str(folder), device=device, **others)
        if getattr(self, "accelerator", None) is not None:  # HFLM shares work among processes on GPUs only
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> PartInferLM:
        """From lm-eval's `name=value,name=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> PartInferLM:
        """From model arguments and lm-eval's own options.

        Among those is always a device, cuda:0 where --device is not given: a device in the model arguments wins, and
        without CUDA it is dropped, as HFLM does.
        """
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if "device" in arg_dict or (str(options.get("device")).startswith("cuda") and not torch.cuda.is_available()):
            options.pop("device", None)
        return super().create_from_arg_obj(arg_dict, options)

    def _get_config(self, pretrained: str, **_options) -> None:
        if is_gguf(pretrained):
            self._config = read_config(pretrained)
        else:
            super()._get_config(pretrained)

    def _create_model(self, pretrained: str, **options) -> None:
        for name in ("peft", "delta", "autogptq", "gptqmodel", "gguf_file", "parallelize", "tp_plan"):
            if options.get(name):
                raise PartInferError(f"the partinfer model does not take {name}: use lm-eval's own model hf with it")
        self.loaded: LoadedModel = load_model(pretrained, self.settings, **self.rankings)
        attach_published(self.loaded, self.published, Path(pretrained), self.calibration_seed)
        self._model = self.loaded.model

    @property
    def _decodes_otherwise(self) -> bool:
        """Whether decoding computes less than prefill."""
        return self.settings.computes_sparsely or self.published is not None

    def get_model_info(self) -> dict:
        """What lm-eval writes into its result file: the settings, the weights, and the neurons that were counted."""
        return {
            "model_num_parameters": self._model.num_parameters(),
            "model_dtype": str(self._model.dtype),
            "partinfer": {"settings": self.settings.to_dict(), **weight_counts(self.loaded)},
        }

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Answers; those that `answer_log` holds are not generated again."""
        several = any((request.repeats or 1) > 1 for request in requests)  # different answers to one prompt
        if self.answer_log is None or several:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        return self._through_log(GENERATED, requests, partial(super().generate_until, disable_tqdm=disable_tqdm))

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Scores; those that `answer_log` holds are not computed again."""
        if self.answer_log is None:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return self._through_log(SCORED, requests, partial(super().loglikelihood, disable_tqdm=disable_tqdm))

    def _through_log(self, kind: str, requests: list, compute: Callable[[list], list]) -> list:
        """The answers of lm-eval's requests, of which only those that the log lacks are computed."""
        missing = [request for request in requests if self.answer_log.get(kind, request.args) is None]
        self.cache_hook = self.answer_log
        compute(missing)
        return [self.answer_log.get(kind, request.args) for request in requests]

    def _detect_batch_size(self, requests: Sequence | None = None, pos: int = 0) -> int:
        if self.device.type == "cpu":
            return AUTO_BATCH_ON_CPU
        return super()._detect_batch_size(requests, pos)

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding gives it) of each request.

        The whole model computes the same neurons in prefill and decoding, so it takes HFLM's own single pass.
        """
        for _, context, continuation in requests:
            check_token_ids(context + continuation, self.config.vocab_size, "a request")
        if self._decodes_otherwise or self.settings.use_partial_loading:
            results = self._scores_over_cache(requests, disable_tqdm, override_bs)
        else:
            results = super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        self.loaded.check_weights()
        if any(math.isnan(score) for score, _ in results):
            raise PartInferError(NOT_FINITE)
        return results

    def _scores_over_cache(
        self, requests: list[TokenRequest], disable_tqdm: bool, override_bs: int | None
    ) -> list[tuple[float, bool]]:
        grouped, places = self._group_by_context(requests)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        size = override_bs or (self.batch_size if self.batch_size != "auto" else self._detect_batch_size())
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring over the cache")
        for indices in batches(grouped, size):
            batch = [grouped[i] for i in indices]
            for row, slot, logits in continuation_logits(self.model, batch):
                answer = self._score(logits, batch[row][1][slot])
                for place in places[indices[row]][slot]:
                    results[place] = answer
                    if requests[place][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
                progress.update(len(places[indices[row]][slot]))
        progress.close()
        return results

    def _model_generate(self, context: torch.Tensor, *arguments, **options) -> torch.Tensor:
        check_token_ids(context.flatten().tolist(), self.config.vocab_size, "a request")
        answers = super()._model_generate(context, *arguments, **options)
        self.loaded.check_weights()
        return answers

    def _score(self, logits: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
        log_probs = torch.log_softmax(logits.float(), dim=-1)  # [T, V]
        target = torch.tensor(continuation, device=logits.device)
        total = log_probs.gather(1, target[:, None]).sum()
        return float(total), bool((log_probs.argmax(-1) == target).all())

    def _group_by_context(self, requests: list[TokenRequest]) -> tuple[list[Request], list[list[list[int]]]]:
        """Requests with one context become one, and for each continuation the places it came from.

        What exceeds the model's length is cut from the left, as HFLM does.
        """
        contexts: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        cut = 0
        for place, (_, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]
            scored = min(len(continuation), len(whole) - 1)
            cut += len(whole) < len(context) + len(continuation)
            split = len(whole) - scored
            contexts.setdefault(tuple(whole[:split]), {}).setdefault(tuple(whole[split:]), []).append(place)
        if cut:
            logger.warning("%d requests were cut from the left to the model's %d tokens", cut, self.max_length)
        grouped = [(list(context), [list(c) for c in conts]) for context, conts in contexts.items()]
        return grouped, [list(conts.values()) for conts in contexts.values()]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts; every token is scored once.

        With windows, blocks of scored tokens follow up to prefill_tokens of context; the first block follows the
        prefix token only.
        """
        if None in self.windows:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        scored = min(self.windows[1], self.max_length)
        prefilled = max(1, min(self.windows[0], self.max_length + 1 - scored))
        windows, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            for context, continuation in rolling_windows(
                self.tok_encode(text), self.prefix_token_id, prefilled, scored
            ):
                windows.append((_window_key(context, continuation), context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._scored_windows(windows, disable_tqdm), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _scored_windows(self, windows: list[TokenRequest], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Scores of windows, which are kept in `answer_log` like other scores."""
        log = self.answer_log
        if log is None:
            return self._loglikelihood_tokens(windows, disable_tqdm)
        self.cache_hook = log
        self._loglikelihood_tokens([w for w in windows if log.get(SCORED, w[0]) is None], disable_tqdm)
        return [log.get(SCORED, window[0]) for window in windows]


def _window_key(context: list[int], continuation: list[int]) -> tuple[str, str]:
    """What a window is known by in the answer log, where other requests have their texts."""
    return tuple(f"tokens {' '.join(map(str, part))}" for part in (context, continuation))


def rolling_windows(tokens: list[int], prefix: int, prefilled: int, scored: int) -> list[tuple[list[int], list[int]]]:
    """Cut a text into (context, continuation) so that each token is in exactly one continuation."""
    return [
        (tokens[max(0, start - prefilled) : start] or [prefix], tokens[start : start + scored])
        for start in range(0, len(tokens), scored)
    ]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
