"""What decoding with fewer bytes costs a model: dense's predictions of some texts against those of several settings.

All settings over the same loaded neurons are measured in one pass over the texts: a prompt is prefilled once, since
prefill computes all that is loaded, and what follows it is scored with the neurons of each setting over the same cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from profiler.loss_selections import Everything, InTurn, selection_at
from transformers_patches.config import PartInferConfig, default_layers
from transformers_patches.families import family_of
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.load.loader import load_model
from transformers_patches.neurons.loss_curve import ALL, DEFAULT, LossCurve, LossPoint
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.sparse.sparse_ffn import SparseFFN
from transformers_patches.token_ids import check_finite

WHOLE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # shares of the FFN bytes of all layers, everything loaded
SOME_LAYERS = (0.7, 0.55, 0.4)  # the same for the default layers, everything loaded or PARTIAL of it
PARTIAL = 0.7  # of the neurons; what the documented defaults load
PROMPT_SHARE = 2 / 3  # of a text without a continuation, what is prefilled
SCORED_TOKENS = 512  # of all texts together: with fewer, a mean loss is too uncertain to choose by
MOST_SCORED, MOST_PREFILLED = 64, 256  # tokens of one text


@dataclass(frozen=True)
class ScoredText:
    """Token ids of a text."""

    prompt: list[int]  # at least two; prefilled but for the last
    target: list[int]  # at least one; scored


def scored_texts(sequences: Iterable[tuple[list[int], int]], wanted: int = SCORED_TOKENS) -> list[ScoredText]:
    """Texts with `wanted` scored tokens together, or as many as there are.

    sequences: token ids, and how many of them are the prompt: all but a continuation, or all of a text that has none.
    """
    texts, tokens = [], 0
    for ids, prompt in sequences:
        cut = prompt if prompt < len(ids) else round(PROMPT_SHARE * len(ids))
        before, after = ids[max(0, cut - MOST_PREFILLED) : cut], ids[cut : cut + MOST_SCORED]
        if len(before) < 2 or not after:
            continue
        texts.append(ScoredText(before, after))
        tokens += len(after)
        if tokens >= wanted:
            break
    return texts


class Thresholds:
    """What a selection per token needs, over all texts: thresholds of every layer, and typical sizes of its neurons."""

    def __init__(self, layers: list[SparseFFN]) -> None:
        """layers: whose selections are InTurn over selections per token."""
        self._layers = layers
        self._logs: list[torch.Tensor] = []  # per text [settings, layers]
        self._squares: list[torch.Tensor | None] = [None] * len(layers)
        self._tokens = 0

    def observe(self) -> None:
        """Take in the text that was prefilled."""
        chosen = [layer.selection.selections for layer in self._layers]
        found = [[selection.thresholds[0] or 0.0 for selection in of_layer] for of_layer in chosen]
        self._logs.append(torch.tensor(found).T.clamp(min=0).log())
        sizes = [of_layer[0].sizes[0] for of_layer in chosen]
        if sizes[0].sums is None:  # a plain FFN chooses by its activations
            return
        for number, size in enumerate(sizes):
            known = self._squares[number]
            self._squares[number] = size.sums.clone() if known is None else known + size.sums
        self._tokens += sizes[0].tokens

    def thresholds(self) -> torch.Tensor:
        """float32 [settings, layers]: geometric means over the texts; 0 where one has none, or needs none."""
        return torch.stack(self._logs).mean(0).exp()

    def gate_size(self) -> torch.Tensor | None:
        """float32 [layers, N], by neuron index; None for plain FFNs."""
        if self._squares[0] is None:
            return None
        sizes = torch.empty(len(self._layers), len(self._squares[0]))
        for row, layer, squares in zip(sizes, self._layers, self._squares, strict=True):
            row[layer.selection.selections[0].plan.neurons] = (squares / self._tokens).sqrt().cpu()
        return sizes


class LossMeasurement:
    """Measures a model's loss curve, loading the model once for each set of neurons."""

    def __init__(self, folder: Path, settings: dict, neurons: NeuronFile, texts: list[ScoredText]) -> None:
        """settings: fields of PartInferConfig, such as dtype and device.
        neurons: the model's neuron file.
        """
        self.folder, self.settings, self.neurons, self.texts = folder, settings, neurons, texts
        self._dense: list[torch.Tensor] = []  # per text [T, V], in the model's type

    @torch.inference_mode()
    def curve(self, *, quiet: bool = False) -> LossCurve:
        with tqdm(total=3 * len(self.texts), desc="measuring losses", unit=" texts", disable=quiet) as bar:
            points, thresholds, gate_size = self._everything_loaded(bar)
            if default_layers(self.neurons.num_layers):
                points += self._partly_loaded(bar)
                points += self._original(bar)
        return LossCurve(points, thresholds, gate_size)

    def _load(self, **settings) -> LoadedModel:
        return load_model(self.folder, PartInferConfig(**self.settings, **settings), self.neurons)

    def _everything_loaded(self, bar: tqdm) -> tuple[list[LossPoint], torch.Tensor, torch.Tensor | None]:
        """Points, thresholds [len(WHOLE), layers], and typical sizes [layers, N], by neuron index."""
        last = self.neurons.num_layers - 1
        everything = {"loaded_neurons_percent": 1.0, "sparsity": 1.0, "base_neurons_percent": 0.0}
        loaded = self._load(**everything, selection="up", compensation="none", start_num=0, end_num=last)
        default, size = default_layers(last + 1), loaded.plan.intermediate_size
        own = [ffn.selection for ffn in loaded.state.layers]
        known = self._thresholds(loaded, size)
        thresholds, sizes = known.thresholds(), known.gate_size()
        for place, (number, ffn, selection) in enumerate(
            zip(loaded.plan.layers, loaded.state.layers, own, strict=True)
        ):
            ffn.selection = selection
            gate_size = None if sizes is None else sizes[place][selection.plan.neurons]
            priors = [selection.prior.choosing(gate_size, float(of_layers[place])) for of_layers in thresholds]
            choices = [Everything(ffn.rows)]
            choices += [selection_at(ffn, size, *one, average=True) for one in zip(WHOLE, priors, strict=True)]
            some = [selection_at(ffn, size, share, average=False) for share in SOME_LAYERS]
            choices += some if number in default else [Everything(ffn.rows)] * len(some)
            ffn.selection = InTurn(ffn.rows, choices)
        losses = self._losses(loaded, 1 + len(WHOLE) + len(SOME_LAYERS), bar)[1:]
        settings = [(ALL, share) for share in WHOLE]
        settings += [(DEFAULT, share) for share in SOME_LAYERS] if default else []
        points = [
            LossPoint("up", layers, 1.0, share, *loss)
            for (layers, share), loss in zip(settings, losses, strict=False)  # without default layers fewer settings
        ]
        return (
            points,
            self._of_all_layers(loaded, thresholds.T).T,
            None if sizes is None else self._of_all_layers(loaded, sizes),
        )

    def _of_all_layers(self, loaded: LoadedModel, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the sparse layers, and 0 for those that can't be computed by neurons."""
        every = torch.zeros(self.neurons.num_layers, rows.shape[1])
        every[list(loaded.plan.layers)] = rows
        return every

    def _partly_loaded(self, bar: tqdm) -> list[LossPoint]:
        loaded = self._load(
            loaded_neurons_percent=PARTIAL, sparsity=PARTIAL, selection="up", compensation="mean", budget="uniform"
        )
        size = loaded.plan.intermediate_size
        for ffn in loaded.state.layers:
            ffn.selection = InTurn(ffn.rows, [selection_at(ffn, size, share, average=False) for share in SOME_LAYERS])
        losses = self._losses(loaded, len(SOME_LAYERS), bar)
        return [
            LossPoint("up", DEFAULT, PARTIAL, share, *loss) for share, loss in zip(SOME_LAYERS, losses, strict=True)
        ]

    def _original(self, bar: tqdm) -> list[LossPoint]:
        loaded = self._load(selection="core", compensation="none", budget="uniform")
        settings = loaded.settings
        (loss,) = self._losses(loaded, 1, bar)
        return [LossPoint("core", DEFAULT, settings.loaded_neurons_percent, settings.sparsity, *loss)]

    def _thresholds(self, loaded: LoadedModel, size: int) -> Thresholds:
        """What a selection per token needs, from the texts as a whole."""
        for ffn in loaded.state.layers:
            ffn.selection = InTurn(ffn.rows, [selection_at(ffn, size, share, average=True) for share in WHOLE])
        thresholds = Thresholds(loaded.state.layers)
        for text in self.texts:
            Scored(loaded.model, ScoredText(text.prompt + text.target, text.target))
            thresholds.observe()
        return thresholds

    def _losses(self, loaded: LoadedModel, settings: int, bar: tqdm) -> list[tuple[float, float]]:
        """Mean excess NLL and KL divergence of each setting. The first of the first model are dense's predictions."""
        nll, kl, tokens = torch.zeros(settings, dtype=torch.float64), torch.zeros(settings, dtype=torch.float64), 0
        is_first = not self._dense
        for number, text in enumerate(self.texts):
            scored = Scored(loaded.model, text)
            target = torch.tensor(text.target, device=loaded.device)
            for setting in range(settings):
                _choose(loaded.state.layers, setting)
                logits = scored.logits()
                if is_first and setting == 0:
                    self._dense.append(logits.clone())
                more_nll, divergence = difference(logits, self._dense[number], target)
                nll[setting] += more_nll
                kl[setting] += divergence
            tokens += len(target)
            bar.update()
        loaded.check_weights()
        return list(zip((nll / tokens).tolist(), (kl / tokens).tolist(), strict=True))


def _choose(layers: list[SparseFFN], setting: int) -> None:
    for layer in layers:
        if isinstance(layer.selection, InTurn):
            layer.selection.current = setting


class Scored:
    """A text whose prompt is prefilled, and whose target can be scored several times over the same cache."""

    def __init__(self, model: PreTrainedModel, text: ScoredText) -> None:
        # without windows that would forget, so it can be cropped; other layers may need caches of other kinds
        self.crops = family_of(model.config).found is None
        self.model, self.cache = model, DynamicCache() if self.crops else DynamicCache(config=model.config)
        self._prefilled = len(text.prompt) - 1
        self._pass(text.prompt[:-1], 0, kept=1)
        self._fed = text.prompt[-1:] + text.target[:-1]

    def logits(self) -> torch.Tensor:
        """[T, V], the predictions of the target's tokens."""
        if not self.crops:
            kept = copy.deepcopy(self.cache)
            logits = self._pass(self._fed, self._prefilled)
            self.cache = kept
            return logits
        logits = self._pass(self._fed, self._prefilled)
        self.cache.crop(-len(self._fed))
        return logits

    def _pass(self, ids: list[int], start: int, kept: int = 0) -> torch.Tensor:
        """Logits [T, V], of the last `kept` tokens, 0 for all."""
        positions = torch.arange(start, start + len(ids), device=self.model.device)[None]
        output = self.model(
            input_ids=torch.tensor([ids], device=self.model.device),
            attention_mask=torch.ones(1, start + len(ids), dtype=torch.int64, device=self.model.device),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=kept,
        )
        return output.logits[0]


def difference(logits: torch.Tensor, dense: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """Excess NLL and KL(dense || logits), sums over tokens. logits, dense: [T, V]; target: int64 [T]."""
    check_finite(logits)
    ours, theirs = logits.float().log_softmax(-1), dense.float().log_softmax(-1)
    more = F.nll_loss(ours, target, reduction="sum") - F.nll_loss(theirs, target, reduction="sum")
    divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return float(more), float(divergence)
