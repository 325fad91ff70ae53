"""FitFile: what `python -m profiler fit` found out about a set of loaded neurons, beside the neuron file.

One safetensors file, `<neuron file>.fit.safetensors`. Per sparse layer, as `layers.<number>.<name>`: `neurons` (int32
[L], those that are loaded), `gate_size` (float [L], root of the mean act(gate)^2; gated FFNs only), `threshold` (float
[1], above which decoded tokens had as many scores on average as one computes; selections per token only),
`bias_prefill`, `bias_decode` (float [H]), and the refitted rows: `down` [L, H] (whole), or `down_left` [L, r] and `down_right`
[r, H] (what to add to the checkpoint's, as a product).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from transformers_patches.errors import PartInferError
from transformers_patches.files import save_tensors_atomic

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
        """Whether it has something for the down rows."""
        return self.down is not None or self.down_left is not None

    def without_rows(self) -> LayerFit:
        """What is left of it for down rows that have been changed already."""
        return replace(self, down=None, down_left=None, down_right=None)

    def refitted(self, down: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """What takes the place of `down`, the checkpoint's own rows in the order of `neurons`, or some of them; its type."""
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
        """What the fit was made for, of N."""
        return float(self.metadata["loaded_neurons_percent"])

    @property
    def sparsity(self) -> float:
        """phi that the fit was made for, or, spread by layers, their budget's."""
        return float(self.metadata["sparsity"])

    @property
    def layer_sparsity(self) -> dict[int, float]:
        """phi of every layer if the budget was spread by layers, else empty."""
        return {int(layer): float(phi) for layer, phi in json.loads(self.metadata.get("layer_sparsity", "{}")).items()}

    def has_thresholds(self, selection: str, sparsity: float) -> bool:
        """Whether it has every layer's threshold for such a choice of neurons per token."""
        same = abs(self.sparsity - sparsity) < 1e-6
        made = all(layer.threshold is not None for layer in self.layers.values())
        return same and made and self.metadata.get("selection") == selection

    def check_fits(self, num_layers: int, intermediate_size: int, fingerprint: str | None, model_name: str) -> None:
        """Raise PartInferError, naming both sides, unless this file was made from the model."""
        theirs = self.metadata.get("fingerprint")
        if (
            self.intermediate_size != intermediate_size
            or max(self.layers) >= num_layers
            or (theirs and fingerprint and theirs != fingerprint)
        ):
            raise PartInferError(
                f"{self.source} was made from {self.metadata.get('model_name', 'another model')} (fingerprint {theirs}), "
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
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                # clone: a view would keep the whole file mapped
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise PartInferError(f"{path} is not a readable fit file (truncated?): {error}; make it again") from None
        if metadata.pop("format", None) != FORMAT:
            raise PartInferError(f"{path} is not a fit file: make one with python -m profiler fit")
        version = metadata.pop("version", "")
        if version != VERSION:
            raise PartInferError(
                f"{path} has format version {version!r}, this program reads {VERSION!r}: make it again"
            )
        if "lowrank" in metadata.get("compensation", ""):
            raise PartInferError(
                f"{path} was made for compensation {metadata['compensation']}, of which low-rank maps are no longer "
                "computed: make it again with python -m profiler fit, or give --compensation mean"
            )
        size = int(metadata.pop("intermediate_size", 0))
        return cls(_layers(tensors, size, path), size, metadata, str(path))


def fit_path(neuron_file: str | Path) -> Path:
    """Where the fit file of a neuron file is: qa.safetensors -> qa.fit.safetensors."""
    path = Path(neuron_file)
    return path.with_name(path.stem + SUFFIX)


def _layers(tensors: dict[str, torch.Tensor], size: int, path: Path) -> dict[int, LayerFit]:
    known = {item.name for item in fields(LayerFit)}
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, number, name = ([*key.split("."), "", ""])[:3]
        if kind != "layers" or not number.isdigit() or name not in known:
            raise PartInferError(f"{path}: unknown entry {key!r}: the file is damaged, make it again")
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
