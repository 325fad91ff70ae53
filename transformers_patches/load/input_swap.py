"""Layers stored by input in place of the attention's projections, for models whose tokens choose what they read."""

from __future__ import annotations

from transformers import PreTrainedModel

from transformers_patches.families import Family
from transformers_patches.fast_pass.one_token import one_token_pass
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.neurons.byte_ladder import LayerChoice
from transformers_patches.plan.run import ResolvedRun
from transformers_patches.sparse.by_input_linear import ByInputLinear, Joined
from transformers_patches.sparse.request import RequestState
from transformers_patches.structure.empty_model import without_memory
from transformers_patches.weights.source import Source


def swap_attention_inputs(model: PreTrainedModel, run: ResolvedRun, state: RequestState) -> dict[str, Source]:
    """Put ByInputLinears in place of q, k, v and o of all layers; where their weights come from."""
    family, sources = run.family, {}
    for number, layer in enumerate(family.decoder_layers(model)):
        attention = layer.get_submodule(family.attention)
        place = f"{family.layers}.{number}.{family.attention}"
        outputs = tuple(getattr(attention, name).out_features for name in family.attention_inputs)
        joined = {name: Joined(place, outputs, i) for i, name in enumerate(family.attention_inputs)}
        for name in (*family.attention_inputs, family.attention_output):
            linear = getattr(attention, name)
            with without_memory():
                new = ByInputLinear(linear, run.weight_format, state, native=run.by_kernels, joined=joined.get(name))
            setattr(attention, name, new)
            sources[f"{place}.{name}.weight"] = Source.by_input(f"{place}.{name}.weight", linear.in_features)
    return sources


def choose_inputs(model: PreTrainedModel, state: RequestState, family: Family, choices: list[LayerChoice]) -> None:
    """Tell the layers of a model what decoded tokens read from now on. The weights must be there."""
    for ffn, layer, choice in zip(state.layers, family.decoder_layers(model), choices, strict=True):
        attention = layer.get_submodule(family.attention)
        for name in family.attention_inputs:
            getattr(attention, name).choose(choice.inputs["attention"])
        getattr(attention, family.attention_output).choose(choice.inputs["attention_output"])
        ffn.selection.set_choice(choice)
        ffn.choice = object()


def set_layer_choices(loaded: LoadedModel, choices: list[LayerChoice]) -> None:
    """The same for a model that was loaded with other choices."""
    choose_inputs(loaded.model, loaded.state, loaded.run.family, choices)
    step = one_token_pass(loaded.model)
    if step is not None:
        step.renew()
