"""write_export(): the planned neurons as a plain transformers checkpoint, or as a GGUF file.

What is written needs nothing of this project: a model of the same architecture with fewer FFN neurons. Refitted rows of
`down` are part of it, and what a compensation adds is the bias of `down`, where the architecture has one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from transformers_patches.config import QUANTIZED_DTYPES, PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.families import family_of
from transformers_patches.files import atomic_folder, atomic_path
from transformers_patches.load.ffn_swap import swap_ffns
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.load.loader import load_model
from transformers_patches.load.meta_model import build_on_meta
from transformers_patches.load.pack_writer import copy_rest
from transformers_patches.locks import exclusive
from transformers_patches.modules.quantized import weight_bytes
from transformers_patches.plan.export import ExportPlan, plan_export
from transformers_patches.sparse.request import RequestState
from transformers_patches.weights.file_kinds import is_pack
from transformers_patches.weights.gguf_vocabulary_writer import vocabulary_metadata
from transformers_patches.weights.gguf_writer import check_can_be_written, write_gguf
from transformers_patches.weights.gguf_written import can_hold_ffn_bias
from transformers_patches.weights.model_files import load_tokenizer, read_config
from transformers_patches.weights.parts import rows_of_part, whole_name

SHARD_BYTES = 2**30
RECORD = "partinfer_download.json"  # of what download.py fetched, which an export is not
CHECKED_TOKENS = 16
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # relative, of a layer's output


@dataclass(frozen=True)
class Export:
    """What was written."""

    plan: ExportPlan
    bytes: int  # of its weights
    bytes_dense: int  # of the model that it was made from, in the same type


def write_export(model: str | Path, output: str | Path, settings: PartInferConfig) -> Export:
    """Write a model without the neurons that the settings leave out. It is written whole or not at all.

    output: a new folder, or a file whose name ends in .gguf.

    Before it is written, its FFNs are compared with those that `load_model` gives for the same settings. Raises PartInferError
    for what load_model refuses, packs, quantised types, architectures that can't be written, and an output that exists.
    """
    source, output = Path(model), Path(output)
    _check(source, output, settings)
    with exclusive(output):
        _check(source, output, settings)  # again: another process may just have written it
        config = read_config(source)
        if to_gguf(output):
            check_can_be_written(config)
        switch = _bias_switch(config, output)
        plan = plan_export(settings, config, holds_bias=switch is not None or _down_is_biased(config))
        loaded = load_model(source, plan.settings)
        plain = _plain_model(loaded, plan, switch)
        _check_same(loaded, plain)
        if to_gguf(output):
            _write_gguf(plain, source, output)
        else:
            _write_folder(plain, source, output)
    whole = weight_bytes(build_on_meta(config, loaded.run.dtype))
    return Export(plan, weight_bytes(plain), whole)


def to_gguf(output: Path) -> bool:
    """Whether a GGUF file is asked for."""
    return output.suffix.lower() == ".gguf"


def _check(source: Path, output: Path, settings: PartInferConfig) -> None:
    if output.exists():
        raise PartInferError(f"{output} is there already: remove it, or give another --output")
    if is_pack(source):
        raise PartInferError(f"{source} is a pack: give the model that it was made from")
    if settings.dtype in QUANTIZED_DTYPES:
        raise PartInferError(f"--function export writes floats, got --dtype {settings.dtype}: leave it out")


def _down_is_biased(config: PretrainedConfig) -> bool:
    family = family_of(config)
    if not family.has_neurons(0):
        return False  # it can't be exported, and planning says so
    return family.down_projection(build_on_meta(config, torch.float32), 0).bias is not None


def _bias_switch(config: PretrainedConfig, output: Path) -> str | None:
    """The field of the config that gives FFNs biases; None if there is none, or what is written can't have them."""
    held = not to_gguf(output) or can_hold_ffn_bias(config.model_type)
    return "mlp_bias" if held and isinstance(getattr(config, "mlp_bias", None), bool) else None


def _plain_model(loaded: LoadedModel, plan: ExportPlan, switch: str | None) -> PreTrainedModel:
    """The model of the smaller config, with the loaded weights. switch: the field that gives FFNs biases, if there is one."""
    config = copy.deepcopy(loaded.model.config)
    setattr(config, plan.size_field, plan.size)
    if plan.settings.compensation != "none" and switch is not None:
        setattr(config, switch, True)
    plain = build_on_meta(config, loaded.run.dtype)
    weights = _plain_weights(loaded, plain)
    try:
        plain.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise PartInferError(
            f"{config.model_type} can't be exported, its layers do not follow the config: {reason}"
        ) from None
    plain.tie_weights()
    plain.generation_config = loaded.model.generation_config
    return plain


def _plain_weights(loaded: LoadedModel, plain: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights by their names in the plain model: those of sparse FFNs put together again, the others as they are."""
    run = loaded.run
    sources = swap_ffns(build_on_meta(run.config, run.dtype), run, RequestState())
    places = tuple(f"{run.family.layers}.{layer}.{run.family.ffn_children[0]}." for layer in run.plan.layers)
    stored = loaded.model.state_dict()
    weights = {name: value for name, value in stored.items() if not name.startswith(places)}
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, source in sources.items():
        rows = rows_of_part(source.name)
        value = stored[name].t().contiguous() if source.how == "columns" else stored[name]
        parts.setdefault(whole_name(source.name), []).append((0 if rows is None else rows.start, value))
    for name, values in parts.items():
        values.sort(key=lambda part: part[0])
        weights[name] = values[0][1] if len(values) == 1 else torch.cat([value for _, value in values])
    _add_biases(weights, loaded, plain)
    return weights


def _add_biases(weights: dict[str, torch.Tensor], loaded: LoadedModel, plain: PreTrainedModel) -> None:
    """Put what compensations add into the biases of down; those of other projections that are new are 0."""
    family = loaded.run.family
    for layer, ffn in zip(loaded.plan.layers, loaded.state.layers, strict=True):
        for projection in family.ffn_inputs:
            name = f"{family.projection(layer, projection)}.bias"
            new = getattr(family.ffn_module(plain, layer), projection).bias
            if new is not None and name not in weights:
                weights[name] = torch.zeros(new.shape, dtype=new.dtype)
        name = f"{family.projection(layer, family.down)}.bias"
        if ffn.compensation is not None:
            added = ffn.compensation.bias_prefill
            weights[name] = added if name not in weights else weights[name] + added


def _check_same(loaded: LoadedModel, plain: PreTrainedModel) -> None:
    """Raise PartInferError unless the FFNs of both models turn the same hidden states into the same outputs.

    Everything else is the same by its names. Logits would not tell: 16 bits round them apart, layer by layer.
    """
    family, plans = loaded.run.family, loaded.plan.layers
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [ffn.register_forward_hook(lambda _, x, y: seen.append((x[0], y))) for ffn in loaded.state.layers]
    ids = torch.arange(CHECKED_TOKENS)[None] * 31 % plain.config.vocab_size
    with torch.inference_mode():
        loaded.model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        for layer, (x, expected) in zip(plans, seen, strict=True):
            found = x
            for child in family.ffn_children:
                found = family.decoder_layers(plain)[layer].get_submodule(child)(found)
            if not (found - expected).float().norm() <= TOLERANCES[loaded.run.dtype] * expected.float().norm():
                raise PartInferError(
                    f"{plain.config.model_type} can't be exported: layer {layer} gives something else as a plain one"
                )


def _write_folder(plain: PreTrainedModel, source: Path, output: Path) -> None:
    with atomic_folder(output) as folder:
        plain.save_pretrained(folder, max_shard_size=SHARD_BYTES)
        for path in folder.glob("*.safetensors"):  # readable for nobody else, whatever the umask says
            path.chmod((folder / "config.json").stat().st_mode)
        copy_rest(source, folder, skip=("config.json", RECORD))


def _write_gguf(plain: PreTrainedModel, source: Path, output: Path) -> None:
    ends = plain.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    vocabulary = vocabulary_metadata(source, load_tokenizer(source), plain.config.vocab_size, ends)
    dtype = str(plain.dtype).removeprefix("torch.")
    with atomic_path(output) as path:
        write_gguf(path, _InMemory(plain), plain.config, dtype, vocabulary)


class _InMemory:
    """The weights of a model that is loaded, for the writer of GGUF files."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._weights = model.state_dict()
        if model.config.tie_word_embeddings:
            self._weights.pop("lm_head.weight", None)

    def names(self) -> set[str]:
        return set(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights[name].shape)

    def read_into(self, name: str, out: torch.Tensor) -> None:
        out.copy_(self._weights[name])
