"""NeuronFile: the contract between the profiler, which writes it, and the runner, which reads it.

The project's format is one safetensors file with string metadata and these tensors, of which only the first is
required:

ranking: int32 [layers, N].
scores: float32 [layers, N].
statistics.<name>: float32 [layers, N], see STATISTICS.
input_squares.<name>: float32, see INPUT_SQUARES.
loss.<name>: a loss curve, with `loss_points` in the metadata.
ladder.<name>: a byte ladder, with `ladder_rungs` in the metadata.
clusters.<name>: clusters of texts.
experts.<name>: statistics of experts, with `expert_layers` in the metadata. N is 0 if there is nothing but experts.

The legacy format of the original is JSON, `{"neurons": [[N indices] * layers]}`, best neuron first. Both are validated
before anything is done with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from transformers_patches.errors import PartInferError
from transformers_patches.families import Family, family_of
from transformers_patches.files import save_tensors_atomic, write_text_atomic
from transformers_patches.neurons.byte_ladder import ByteLadder
from transformers_patches.neurons.checks import WHOLE_NUMBERS, check_floats, read_tensors, shown, whole_number
from transformers_patches.neurons.clusters import Clusters
from transformers_patches.neurons.expert_neurons import ExpertNeurons
from transformers_patches.neurons.lookup import NEURON_FILE_MISSING
from transformers_patches.neurons.loss_curve import LossCurve

FORMAT = "partinfer-neurons"
VERSION = "1"
LOSS_POINTS, LADDER_RUNGS, EXPERT_LAYERS = "loss_points", "ladder_rungs", "expert_layers"
# Per-token means over all counted tokens of h, the activation that enters the down projection, and of
# h / ||h||_2 (the norm over the neurons of one token).
ACTIVATION_STATISTICS = ("mean_abs", "mean", "mean_sq", "normalized_mean_abs", "normalized_mean", "normalized_mean_sq")
# And a property of the weights, ||W_down[:, i]||_2, so that a ranking can be weighted with it without the model.
STATISTICS = (*ACTIVATION_STATISTICS, "down_norm")
# Per-token means of x_j^2, x being the input of the linear layers other than down: q, k and v; o; gate and up; the
# output projection. [layers, width], of the output projection [1, width].
INPUT_SQUARES = ("attention", "attention_output", "ffn", "head")


@dataclass
class NeuronFile:
    """A ranking of the FFN neurons of every layer, best first, with what it was made from.

    ranking: int32 [layers, N], each row a permutation of 0…N-1.
    scores: float32 [layers, N] by neuron index, or None.
    statistics: float32 [layers, N] by neuron index, for names in STATISTICS.
    metadata: strings, among them `model_name`, `model_type`, `fingerprint`, `dataset`, `task_type`, `score`, `tokens`
        and `texts`.
    source: where the file was read from, for messages.
    input_squares: float32, for names in INPUT_SQUARES.
    loss: what decoding with fewer FFN bytes costs; None if that was not measured.
    ladder: settings that read fewer bytes of all decoder layers; None if there are none.
    clusters: groups of texts and their neurons; None if there are none.
    experts: statistics of experts; None if there are none.
    """

    ranking: torch.Tensor
    scores: torch.Tensor | None = None
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    source: str = "(in memory)"
    input_squares: dict[str, torch.Tensor] = field(default_factory=dict)
    loss: LossCurve | None = None
    ladder: ByteLadder | None = None
    clusters: Clusters | None = None
    experts: ExpertNeurons | None = None

    def __post_init__(self) -> None:
        if self.experts is None or self.ranking.ndim != 2 or self.ranking.shape[1]:
            validate_ranking(self.ranking, self.source)
        if self.experts is not None:
            self.experts.check(self.num_layers, self.source)
        for name, values in {"scores": self.scores, **self.statistics}.items():
            if values is not None and values.shape != self.ranking.shape:
                raise PartInferError(
                    f"{self.source}: {name} has shape {list(values.shape)}, the ranking {list(self.ranking.shape)}: "
                    "the file is damaged, make it again"
                )
            if values is not None:
                check_floats(values, name, self.source)
        for name, values in self.input_squares.items():
            check_floats(values, f"input_squares.{name}", self.source)
            rows = 1 if name == "head" else self.num_layers
            if values.ndim != 2 or len(values) != rows or not bool((values >= 0).all()):
                raise PartInferError(
                    f"{self.source}: input_squares.{name} has shape {list(values.shape)}, expected {rows} rows of "
                    "numbers of at least 0: the file is damaged, make it again"
                )
        if self.loss is not None:
            self._check_loss(self.loss)
        if self.clusters is not None:
            self.clusters.check(tuple(self.ranking.shape), self.source)
        if self.ladder is not None and self.ladder.num_layers != self.num_layers:
            raise PartInferError(f"{self.source}: its byte ladder is of another model: make the file again")

    def _check_loss(self, loss: LossCurve) -> None:
        sizes = [loss.thresholds.shape[1:] == (self.num_layers,)]
        if loss.gate_size is not None:
            sizes.append(loss.gate_size.shape == self.ranking.shape)
        if not all(sizes):
            raise PartInferError(f"{self.source}: its loss curve is of another model: make the file again")

    @property
    def num_layers(self) -> int:
        return self.ranking.shape[0]

    @property
    def intermediate_size(self) -> int:
        return self.ranking.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens that were counted, 0 if the file does not say."""
        return int(self.metadata.get("tokens", 0))

    @property
    def has_spread(self) -> bool:
        """Whether `spread` can be computed."""
        return {"mean", "mean_sq", "down_norm"} <= self.statistics.keys()

    def check_ffns(self) -> None:
        """Raise PartInferError if it ranks no FFN."""
        if not self.intermediate_size:
            raise PartInferError(f"{self.source} has nothing but experts, and this is about FFNs")

    def spread(self) -> torch.Tensor:
        """float32 [layers, N]: std(h_i) ||W_down[:, i]||, what a neuron writes beyond its mean."""
        variance = self.statistics["mean_sq"].double() - self.statistics["mean"].double().square()
        return (variance.clamp(min=0).sqrt() * self.statistics["down_norm"].double()).float()

    def check_fits(self, config: PretrainedConfig, fingerprint: str | None, model_name: str) -> None:
        """Raise PartInferError, naming both sides, unless this file belongs to the model.

        fingerprint: of the model (see `fingerprint`); files without one (legacy) are checked by shape only.
        """
        family = family_of(config)
        size = family.intermediate_size(config) if self.experts is None else family.ffn_neurons(config)
        if (self.num_layers, self.intermediate_size) != (config.num_hidden_layers, size):
            raise PartInferError(
                f"{self.source} ranks {self.num_layers} layers of {self.intermediate_size} neurons, but {model_name} "
                f"has {config.num_hidden_layers} layers of {size}: use a neuron file made from this model"
            )
        self._check_experts(family, config.num_hidden_layers, model_name)
        inputs = {f"input_squares.{name}": values for name, values in self.input_squares.items()}
        if self.ladder is not None:
            inputs |= {f"ladder.mean.{name}": values for name, values in self.ladder.mean.items()}
        for name, values in inputs.items():
            width = config.hidden_size
            if name.endswith(".attention_output"):
                width = (getattr(config, "head_dim", None) or 0) * config.num_attention_heads or width
            if values.shape[1] != width:
                raise PartInferError(
                    f"{self.source} has {name} of {values.shape[1]} columns, but {model_name} has {width}: "
                    "use a neuron file made from this model"
                )
        ours = self.metadata.get("fingerprint")
        if ours and fingerprint and ours != fingerprint:
            made_from = self.metadata.get("model_name", "another model")[:100]
            raise PartInferError(
                f"{self.source} was made from {made_from} (fingerprint {ours[:16]}), not from {model_name} "
                f"(fingerprint {fingerprint}): profile this model, see python -m profiler run --help"
            )

    def _check_experts(self, family: Family, num_layers: int, model_name: str) -> None:
        layout = family.experts
        if self.experts is None:
            return
        theirs = () if layout is None else tuple(family.expert_layers(num_layers))
        size = (0, 0) if layout is None else (layout.count, layout.size)
        if (self.experts.layers, self.experts.shape[1:]) != (theirs, size):
            _, count, neurons = self.experts.shape
            raise PartInferError(
                f"{self.source} has {len(self.experts.layers)} layers of {count} experts with {neurons} neurons, but "
                f"{model_name} has {len(theirs)} of {size[0]} with {size[1]}: use a neuron file made from this model"
            )

    def save(self, path: str | Path) -> None:
        """Write the project's format; a path that ends in .json gets the legacy format (the ranking only)."""
        path = Path(path)
        if path.suffix == ".json":
            self.check_ffns()
            write_text_atomic(path, json.dumps({"neurons": self.ranking.tolist()}))
            return
        tensors = {"ranking": self.ranking.to(torch.int32).contiguous()}
        if self.scores is not None:
            tensors["scores"] = self.scores.float().contiguous()
        tensors.update({f"statistics.{name}": v.float().contiguous() for name, v in self.statistics.items()})
        tensors.update({f"input_squares.{name}": v.float().contiguous() for name, v in self.input_squares.items()})
        metadata = {**self.metadata, "format": FORMAT, "version": VERSION}
        if self.loss is not None:
            tensors.update({f"loss.{name}": v.float().contiguous() for name, v in self.loss.tensors().items()})
            metadata[LOSS_POINTS] = self.loss.described()
        if self.ladder is not None:  # in the types that it has, most of them of 16 bits
            tensors.update({f"ladder.{name}": v.contiguous() for name, v in self.ladder.tensors().items()})
            metadata[LADDER_RUNGS] = self.ladder.described()
        if self.experts is not None:
            tensors.update({f"experts.{name}": v.contiguous() for name, v in self.experts.tensors().items()})
            metadata[EXPERT_LAYERS] = self.experts.described()
        if self.clusters is not None:
            tensors.update({f"clusters.{name}": v.contiguous() for name, v in self.clusters.tensors().items()})
        save_tensors_atomic(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> NeuronFile:
        """Read and validate a neuron file of either format; raises PartInferError that says what is wrong."""
        path = Path(path)
        if not path.is_file():
            raise PartInferError(NEURON_FILE_MISSING.format(path))
        return _load_legacy(path) if path.suffix == ".json" else _load_safetensors(path)


def has_loss_curve(path: str | Path) -> bool:
    """Whether a neuron file has one, or a byte ladder; only the head of the file is read. False for what can't be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return not {LOSS_POINTS, LADDER_RUNGS}.isdisjoint(file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def has_nothing_but_experts(path: str | Path) -> bool:
    """Whether a neuron file ranks no FFN; only the head of the file is read. False for what can't be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return EXPERT_LAYERS in (file.metadata() or {}) and file.get_slice("ranking").get_shape()[-1] == 0
    except (SafetensorError, OSError, IndexError):
        return False


def ranking_from_scores(scores: torch.Tensor) -> torch.Tensor:
    """int32 [layers, N] ranking from float [layers, N] scores, descending; equal scores keep index order."""
    return torch.argsort(scores, dim=-1, descending=True, stable=True).to(torch.int32)


def validate_ranking(ranking: torch.Tensor, source: str) -> None:
    """Raise PartInferError unless ranking is [layers, N] and each row is a permutation of 0…N-1."""
    if ranking.ndim != 2 or 0 in ranking.shape or ranking.dtype not in WHOLE_NUMBERS:
        raise PartInferError(
            f"{source}: expected whole numbers of shape [layers, neurons], got {ranking.dtype} {list(ranking.shape)}"
        )
    size = ranking.shape[1]
    for layer, row in enumerate(ranking.long()):
        low, high = int(row.min()), int(row.max())
        if low < 0 or high >= size:
            wrong = low if low < 0 else high
            raise PartInferError(f"{source}: layer {layer} has neuron {wrong}, expected 0 to {size - 1}")
        counts = torch.bincount(row, minlength=size)
        if int(counts.max()) > 1:
            twice, never = int(counts.argmax()), int(counts.argmin())
            raise PartInferError(
                f"{source}: layer {layer} is not a permutation: neuron {twice} is there {int(counts.max())} times, "
                f"neuron {never} is missing; make the file again"
            )


def _load_legacy(path: Path) -> NeuronFile:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # damaged, nested deep, numbers of thousands of digits
        raise PartInferError(
            f"{path} is not valid JSON (truncated?): {str(error)[:200]}; fetch or make it again"
        ) from None
    rows = content.get("neurons") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise PartInferError(f'{path}: expected {{"neurons": [[indices, best first], one list per layer]}}')
    size = max(len(row) for row in rows)
    for layer, row in enumerate(rows):
        if len(row) != size:
            raise PartInferError(f"{path}: layer {layer} has {len(row)} neurons, other layers have {size}")
        wrong = [value for value in row if type(value) is not int]  # null, true and 1.0 too
        if wrong:
            raise PartInferError(f"{path}: layer {layer} has {shown(wrong[0])}, expected whole numbers 0 to {size - 1}")
        outside = next((value for value in row if not 0 <= value < size), None)
        if outside is not None:
            raise PartInferError(f"{path}: layer {layer} has neuron {shown(outside)}, expected 0 to {size - 1}")
    if size == 0:
        raise PartInferError(f"{path}: the layers are empty, expected a ranking of every neuron")
    return NeuronFile(torch.tensor(rows, dtype=torch.int32), source=str(path))


def _load_safetensors(path: Path) -> NeuronFile:
    tensors, metadata = read_tensors(path, "neuron file")
    if metadata.pop("format", None) != FORMAT or "ranking" not in tensors:
        raise PartInferError(
            f"{path} is a safetensors file but not a neuron file: make one with python -m profiler run"
        )
    version = metadata.pop("version", "")
    if version != VERSION:
        raise PartInferError(
            f"{path} has format version {shown(version)}, this program reads {VERSION!r}: make it again"
        )
    for key in ("tokens", "texts", "datasets"):
        whole_number(metadata, key, str(path), 0)
    statistics, squares, losses, rungs, clusters, experts = (
        {name.removeprefix(prefix): values for name, values in tensors.items() if name.startswith(prefix)}
        for prefix in ("statistics.", "input_squares.", "loss.", "ladder.", "clusters.", "experts.")
    )
    described_experts = metadata.pop(EXPERT_LAYERS, None)
    described = metadata.pop(LOSS_POINTS, None)
    loss = None if described is None else LossCurve.read(described, losses, str(path))
    described = metadata.pop(LADDER_RUNGS, None)
    ladder = None if described is None else ByteLadder.read(described, rungs, str(path))
    return NeuronFile(
        tensors["ranking"],
        tensors.get("scores"),
        statistics,
        metadata,
        str(path),
        squares,
        loss,
        ladder,
        Clusters.read(clusters, str(path)),
        None if described_experts is None else ExpertNeurons.read(described_experts, experts, str(path)),
    )
