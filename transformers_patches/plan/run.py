"""ResolvedRun: everything that is decided about a run before weights are read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from transformers_patches.config import PartInferConfig
from transformers_patches.families import Family, family_of
from transformers_patches.kernels import FORMATS, WeightFormat
from transformers_patches.neurons.byte_ladder import LayerChoice
from transformers_patches.neurons.fit_file import FitFile
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.plan.block_bytes import (
    decide_block_bytes,
    layer_choices,
    predicted_share,
    reading_blocks,
    why_not_by_input,
)
from transformers_patches.plan.decision import Decision
from transformers_patches.plan.load_plan import LoadPlan, build_load_plan
from transformers_patches.plan.machine import (
    decide_device,
    decide_dtype,
    decide_head_dtype,
    decide_kernels,
    decide_screening,
    types_of,
)
from transformers_patches.plan.max_loss import predicted_loss, within_max_loss
from transformers_patches.plan.on_demand import decide_on_demand
from transformers_patches.plan.resolve import RunFiles, resolve_by_files


@dataclass(frozen=True)
class ResolvedRun:
    """What is loaded and computed, and how. Loading takes it as it is and decides nothing itself."""

    config: PretrainedConfig  # the model's
    family: Family  # the model's
    settings: PartInferConfig  # without `auto`
    decisions: dict[str, Decision]  # by the name of the setting, for block_bytes and all settings that take `auto`
    files: RunFiles  # as given and found
    base: NeuronFile | None  # the one of `files` whose statistics are used
    fit: FitFile | None  # the one of `files`, if it is used
    plan: LoadPlan  # which neurons are loaded
    device: torch.device  # where the model runs
    dtype: torch.dtype  # of arithmetic and of weights that are not quantised
    weight_format: WeightFormat | None  # of quantised weights; None: none are quantised
    head_format: WeightFormat | None  # the same of embeddings and output projection
    predicted_loss: float | None  # nats per decoded token over dense; None: nothing near was measured
    resident: float | None = None  # share of the neurons in memory, if the others are read on demand
    layer_choices: list[LayerChoice] | None = None  # what tokens read of every layer; None: only FFNs are sparse
    packed: bool = False  # the weights come from a pack, or will be one

    @property
    def native(self) -> bool:
        """Whether the native kernels decode."""
        return self.settings.kernels == "native"

    @property
    def by_kernels(self) -> bool:
        """Whether kernels decode, the native ones or Triton's, and not PyTorch's own operations."""
        return self.settings.kernels in ("native", "triton")

    @property
    def screened(self) -> bool:
        """Whether the output projection is screened, if it is one that can be."""
        return self.settings.screen_head == "on"

    def without_files(self) -> ResolvedRun:
        """The same, once its files have been used, so that their memory can go."""
        return replace(self, files=RunFiles(), base=None, fit=None)

    @property
    def fit_bytes(self) -> int:
        """Bytes of the fit file in memory; loading frees its rows once they are in the model."""
        return 0 if self.fit is None else sum(layer.nbytes for layer in self.fit.layers.values())

    def describe(self) -> str:
        """What was decided, a line for each setting: name, value, reason."""
        names = max(map(len, self.decisions))
        values = max(len(decision.value) for decision in self.decisions.values())
        return "\n".join(f"{name:{names}}  {d.value:{values}}  {d.why}" for name, d in self.decisions.items())


def with_layer_choices(run: ResolvedRun, choices: list[LayerChoice]) -> ResolvedRun:
    """The same run with what tokens read of every layer; it must load everything and choose by up."""
    return replace(run, layer_choices=choices, plan=run.plan.in_order())


def resolve_run(
    settings: PartInferConfig,
    config: PretrainedConfig,
    files: RunFiles,
    *,
    packed: bool = False,
    whole_pack: bool = False,
) -> ResolvedRun:
    """Decide everything that the settings leave open.

    packed: the weights come from a pack, or will be one. whole_pack: that pack holds all neurons. Raises PartInferError
        for an unknown architecture, and for settings that model, files or machine can't meet.
    """
    family, layers = family_of(config), config.num_hidden_layers
    base = files.base(settings)
    dtype = decide_dtype(settings, config)
    arithmetic, weight_format = types_of(dtype.value)
    group = 1 if weight_format is None else weight_format.group
    has_ladder = base is not None and base.ladder is not None
    unfit = why_not_by_input(config, family, group, packed=packed) if has_ladder else None
    share, block_bytes = decide_block_bytes(settings, base, unfit)
    settings = within_max_loss(settings, base, layers) if share is None else reading_blocks(settings, layers, share)
    chosen_device = decide_device(settings)
    device = torch.device(chosen_device.value)
    chosen_kernels = decide_kernels(settings, device, dtype.value)
    native = chosen_kernels.value == "native"
    settings, on_demand, resident = decide_on_demand(settings, family, native=native, whole_pack=whole_pack)
    decisions, fit = resolve_by_files(settings, files, layers)
    decisions |= {"device": chosen_device, "dtype": dtype, "kernels": chosen_kernels, "on_demand": on_demand}
    head = decisions["head_dtype"] = decide_head_dtype(settings, dtype.value)
    decisions["screen_head"] = decide_screening(settings, native=native, head_dtype=head.value)
    resolved = replace(settings, **{name: decision.value for name, decision in decisions.items()})
    decisions["block_bytes"] = block_bytes
    ladder, curve = (None, None) if base is None else (base.ladder, base.loss)
    run = ResolvedRun(
        config=config,
        family=family,
        settings=resolved,
        decisions=decisions,
        files=files,
        base=base,
        fit=fit,
        plan=build_load_plan(resolved, config, files.dataset_neurons, files.model_neurons, fit),
        device=device,
        dtype=arithmetic,
        weight_format=weight_format,
        head_format=FORMATS.get(head.value),
        resident=resident,
        predicted_loss=predicted_loss(resolved, curve, layers) if share is None else predicted_share(share, ladder),
        packed=packed,
    )
    choices = layer_choices(share, ladder, layers)
    return run if choices is None else with_layer_choices(run, choices)
