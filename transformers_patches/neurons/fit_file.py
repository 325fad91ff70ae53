"""FitFile: what `python -m profiler fit` found out about a set of loaded neurons, beside the neuron file.

One safetensors file, `<neuron file>.fit.safetensors`, with these tensors per sparse layer, named
`layers.<number>.<name>`:

neurons: int32 [L], those that are loaded.
bias_prefill, bias_decode: float [H], added to the outputs of prefilled and of decoded tokens.
gate_size: float [L], root of the mean act(gate)^2; gated FFNs only.
threshold: float [1], above which decoded tokens had as many scores on average as a token computes; selections per token
    only.
down: [L, H], the refitted rows.
down_left, down_right: [L, r] and [r, H], instead of `down`: their product is added to the checkpoint's rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from transformers_patches.errors import PartInferError
from transformers_patches.families import family_of
from transformers_patches.files import save_tensors_atomic
from transformers_patches.neurons.checks import (
    WHOLE_NUMBERS,
    check_floats,
    fraction,
    read_tensors,
    shown,
    whole_number,
)

FORMAT = "partinfer-fit"
VERSION = "1"
SUFFIX = ".fit.safetensors"
_REQUIRED = ("neurons", "bias_prefill", "bias_decode")


@dataclass
class LayerFit:
    """The fit of one layer; names and shapes as in the file. Absent tensors are None."""

    neurons: torch.Tensor  # int32 [L]: those that are loaded
    bias_prefill: torch.Tensor  # float [H]: added to the output of prefilled tokens
    bias_decode: torch.Tensor  # float [H]: added to the output of decoded tokens
    gate_size: torch.Tensor | None = None  # float [L]: root of the mean act(gate)^2
    threshold: torch.Tensor | None = None  # float [1]: of a token's scores
    down: torch.Tensor | None = None  # [L, H]: the refitted rows
    down_left: torch.Tensor | None = None  # [L, r]: with down_right, what to add to the checkpoint's rows
    down_right: torch.Tensor | None = None  # [r, H]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for item in fields(self) if (value := getattr(self, item.name)) is not None)

    @property
    def changes_rows(self) -> bool:
        """Whether it changes the down rows."""
        return self.down is not None or self.down_left is not None

    def without_rows(self) -> LayerFit:
        """The fit without its rows, for down rows that have been changed already."""
        return replace(self, down=None, down_left=None, down_right=None)

    def refitted(self, down: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """What replaces `down`, the checkpoint's own rows in the order of `neurons`, or some of them; in its type."""
        if self.down is not None:
            return self.down[rows].to(down)
        if self.down_left is not None:
            added = self.down_left[rows].float() @ self.down_right.float()
            return (down.float() + added.to(down.device)).to(down.dtype)
        return down


@dataclass
class FitFile:
    """Fits by layer, and what they were made from and for.

    layers: the fits, by layer number.
    intermediate_size: N, the FFN neurons of one layer.
    metadata: strings, among them `compensation` (refit), `loaded_neurons_percent`, `sparsity`, `model_name`,
        `fingerprint`, `dataset`, `tokens`, and, if every layer has its own share of one budget, `layer_sparsity` (JSON,
        layer -> phi of that layer).
    source: where the file was read from, for messages.
    """

    layers: dict[int, LayerFit]
    intermediate_size: int
    metadata: dict[str, str] = field(default_factory=dict)
    source: str = "(in memory)"

    @property
    def loaded_neurons_percent(self) -> float:
        """The loaded fraction of N that the fit was made for."""
        return float(self.metadata["loaded_neurons_percent"])

    @property
    def sparsity(self) -> float:
        """The phi that the fit was made for; if it was spread by layers, that of the budget."""
        return float(self.metadata["sparsity"])

    @property
    def layer_sparsity(self) -> dict[int, float]:
        """phi of every layer if the budget was spread by layers, else empty."""
        return {int(layer): float(phi) for layer, phi in json.loads(self.metadata.get("layer_sparsity", "{}")).items()}

    def has_thresholds(self, selection: str, sparsity: float) -> bool:
        """Whether it has a threshold for every layer, made for this selection per token and sparsity."""
        same = abs(self.sparsity - sparsity) < 1e-6
        made = all(layer.threshold is not None for layer in self.layers.values())
        return same and made and self.metadata.get("selection") == selection

    def check_fits(self, config: PretrainedConfig, fingerprint: str | None, model_name: str) -> None:
        """Raise PartInferError, naming both sides, unless this file was made from the model."""
        theirs = self.metadata.get("fingerprint")
        if (
            self.intermediate_size != family_of(config).intermediate_size(config)
            or max(self.layers) >= config.num_hidden_layers
            or any(len(layer.bias_prefill) != config.hidden_size for layer in self.layers.values())
            or (theirs and fingerprint and theirs != fingerprint)
        ):
            raise PartInferError(
                f"{self.source} was made from {self.metadata.get('model_name', 'another model')[:100]} (fingerprint "
                f"{(theirs or 'unknown')[:16]}), "
                f"not from {model_name} (fingerprint {fingerprint}): make one with python -m profiler fit"
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All layers' tensors under their names in the file."""
        tensors = {}
        for number, layer in self.layers.items():
            for item in fields(LayerFit):
                value = getattr(layer, item.name)
                if value is not None:
                    tensors[f"layers.{number}.{item.name}"] = value.contiguous()
        return tensors

    def save(self, path: str | Path) -> None:
        metadata = {**self.metadata, "intermediate_size": str(self.intermediate_size)}
        save_tensors_atomic(Path(path), self.tensors(), {**metadata, "format": FORMAT, "version": VERSION})

    @classmethod
    def load(cls, path: str | Path) -> FitFile:
        """Read and validate; PartInferError says what is wrong."""
        path = Path(path)
        if not path.is_file():
            raise PartInferError(f"no fit file at {path}: make one with python -m profiler fit")
        tensors, metadata = read_tensors(path, "fit file")
        if metadata.pop("format", None) != FORMAT:
            raise PartInferError(f"{path} is not a fit file: make one with python -m profiler fit")
        version = metadata.pop("version", "")
        if version != VERSION:
            raise PartInferError(
                f"{path} has format version {shown(version)}, this program reads {VERSION!r}: make it again"
            )
        if "lowrank" in metadata.get("compensation", ""):
            raise PartInferError(
                f"{path} was made for compensation {shown(metadata['compensation'])}, of which low-rank maps are no longer "
                "computed: make it again with python -m profiler fit, or give --compensation mean"
            )
        size = whole_number(metadata, "intermediate_size", str(path))
        del metadata["intermediate_size"]
        _check_metadata(metadata, str(path))
        return cls(_layers(tensors, size, path), size, metadata, str(path))


def fit_path(neuron_file: str | Path) -> Path:
    """Where the fit file of a neuron file is: qa.safetensors -> qa.fit.safetensors."""
    path = Path(neuron_file)
    return path.with_name(path.stem + SUFFIX)


def _check_metadata(metadata: dict[str, str], source: str) -> None:
    """What the properties of a FitFile read."""
    for key in ("loaded_neurons_percent", "sparsity"):
        fraction(metadata.get(key), key, source)
    try:
        shares = json.loads(metadata.get("layer_sparsity", "{}"))
    except (ValueError, RecursionError):
        shares = None
    if not isinstance(shares, dict):
        raise PartInferError(f"{source}: layer_sparsity is no JSON object of shares by layer: make the file again")
    for layer, share in shares.items():
        if not _is_number(layer):
            raise PartInferError(f"{source}: layer_sparsity has {shown(layer)}, expected numbers of layers")
        fraction(share, f"layer_sparsity of layer {layer}", source)


def _is_number(text: str) -> bool:
    """Whether text is the number of a layer."""
    return text.isascii() and text.isdecimal() and len(text) <= 6


def _layers(tensors: dict[str, torch.Tensor], size: int, path: Path) -> dict[int, LayerFit]:
    known = {item.name for item in fields(LayerFit)}
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, _, place = key.partition(".")
        number, _, name = place.partition(".")
        if kind != "layers" or not _is_number(number) or name not in known:
            raise PartInferError(f"{path}: unknown entry {shown(key)}: the file is damaged, make it again")
        found.setdefault(int(number), {})[name] = value
    if not found:
        raise PartInferError(f"{path} has no layers: make it again")
    for number, values in sorted(found.items()):
        _check_layer(number, values, size, path)
    return {number: LayerFit(**values) for number, values in sorted(found.items())}


def _check_layer(number: int, values: dict[str, torch.Tensor], size: int, path: Path) -> None:
    for name in _REQUIRED:
        if name not in values:
            raise PartInferError(f"{path}: layer {number} lacks {name}: the file is damaged, make it again")
    for name, tensor in values.items():
        if tensor.ndim != (2 if name.startswith("down") else 1):
            raise PartInferError(f"{path}: layer {number}: {name} has {tensor.ndim} dimensions: make the file again")
        if name != "neurons":
            check_floats(tensor, f"layer {number}: {name}", str(path))
    if values["neurons"].dtype not in WHOLE_NUMBERS:
        raise PartInferError(f"{path}: layer {number}: neurons are {values['neurons'].dtype}, expected int32")
    neurons, hidden = values["neurons"].long(), len(values["bias_prefill"])
    loaded = len(neurons)
    if not loaded or int(neurons.min()) < 0 or int(neurons.max()) >= size or len(neurons.unique()) != loaded:
        raise PartInferError(f"{path}: layer {number}: expected different neurons 0 to {size - 1}, make the file again")
    rank = len(values.get("down_right", ()))
    shapes = {
        "bias_decode": (hidden,),
        "gate_size": (loaded,),
        "threshold": (1,),
        "down": (loaded, hidden),
        "down_left": (loaded, rank),
        "down_right": (rank, hidden),
    }
    for name, shape in shapes.items():
        if name in values and tuple(values[name].shape) != shape:
            raise PartInferError(
                f"{path}: layer {number}: {name} has shape {list(values[name].shape)}, expected {list(shape)}: make it again"
            )
    if ("down_left" in values) != ("down_right" in values):
        raise PartInferError(f"{path}: layer {number} has only one of down_left and down_right: make the file again")
