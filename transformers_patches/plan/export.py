"""What an export holds: the settings whose neurons it keeps, changed to what the architecture can say."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.families import Family, family_of
from transformers_patches.plan.resolve import RunFiles
from transformers_patches.plan.run import ResolvedRun, resolve_run

ROUND = 32  # of a size that is chosen here: what quantised types of llama.cpp and of this project go into
_SIZE_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


@dataclass(frozen=True)
class ExportPlan:
    """What is exported.

    settings: of method dense, so that `load_model` gives the same model.
    size: how many neurons each layer keeps.
    size_field: where the config says that.
    notes: what differs from what was asked for.
    """

    settings: PartInferConfig
    size: int
    size_field: str
    notes: tuple[str, ...]


def plan_export(settings: PartInferConfig, config: PretrainedConfig, *, holds_bias: bool) -> ExportPlan:
    """Plan an export of the neurons that settings load.

    holds_bias: whether the output projections of the FFNs have biases, or can have some, in what is written.

    One size goes for all layers. If the settings mean different ones (first and last layers are usually whole), every
    layer keeps as many neurons as they have on average, rounded to ROUND. Raises PartInferError if everything is loaded,
    for architectures of which some layers can't be computed by neurons, and for a compensation that can't be kept.
    """
    family, layers = family_of(config), config.num_hidden_layers
    if family.whole_layers or family.expert_layers(layers) or _cuts(family):
        raise PartInferError(f"{config.model_type} can't be exported: not all of its layers can be computed by neurons")
    size = family.intermediate_size(config)
    field = _size_field(family, config, size)
    asked = replace(settings, device="cpu", kernels="torch", memory_limit=False)
    run = resolve_run(asked, config, RunFiles.of(asked))
    counts = [run.plan.layers[n].loaded_count if n in run.plan.layers else size for n in range(layers)]
    if min(counts) == size:
        raise PartInferError(
            "these settings load every neuron, so there is nothing to leave out: give --loaded_neurons_percent, such as 0.7"
        )
    kept, uniform = counts[0], len(set(counts)) == 1
    notes = []
    if not uniform:
        kept = min(size, max(ROUND, round(sum(counts) / layers / ROUND) * ROUND))
        notes.append(
            f"{config.model_type} models have one size for all layers: {kept} of {size} neurons in each of the {layers} "
            f"layers, instead of {min(counts)} in layers {min(run.plan.layers)} to {max(run.plan.layers)}"
        )
    compensation, more = _compensation(settings, run, uniform=uniform, holds_bias=holds_bias)
    share = kept / size
    final = replace(
        asked,
        method="dense",
        use_partial_loading=True,
        loaded_neurons_percent=share,
        base_neurons_percent=min(settings.base_neurons_percent, share),
        start_num=0,
        end_num=layers - 1,
        selection="auto",
        token_count="auto",
        budget="uniform",
        max_loss=None,
        block_bytes=None,
        compensation=compensation,
        fit_filepath=run.files.fit.source if compensation == "refit" else None,
        screen_head="off",
    )
    return ExportPlan(final, kept, field, (*notes, *more))


def _compensation(
    settings: PartInferConfig, run: ResolvedRun, *, uniform: bool, holds_bias: bool
) -> tuple[str, tuple[str, ...]]:
    """The compensation that is kept, and what is said about it."""
    decided = run.settings.compensation
    given = settings.compensation != "auto"
    if decided == "none":
        return decided, ()
    if not holds_bias:
        why = f"{run.config.model_type} models have no bias that could hold the compensation {decided}"
        if given:
            raise PartInferError(f"{why}: use --compensation none")
        return "none", (f"{why}: nothing stands in for the neurons that are left out",)
    if decided == "refit" and not uniform:
        why = f"{run.files.fit.source} was made for other layers or sizes than an export has"
        if given or run.base is None or not run.base.has_spread:
            raise PartInferError(
                f"{why}: make one for all layers with python -m profiler fit, or use another --compensation"
            )
        return "mean", (f"{why}: compensation mean instead",)
    return decided, ()


def _cuts(family: Family) -> bool:
    layout = None if family.found is None else family.found.layout
    return layout is not None and layout.cut > 0


def _size_field(family: Family, config: PretrainedConfig, size: int) -> str:
    names = (family.size_field, *_SIZE_FIELDS)
    field = next((name for name in names if getattr(config, name, None) == size), None)
    if field is None:
        raise PartInferError(
            f"{config.model_type} can't be exported: its config has no size of FFNs that could be changed"
        )
    return field
