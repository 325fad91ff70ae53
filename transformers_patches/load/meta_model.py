"""A model without memory for its weights, with the modules that a run needs in place of transformers' own."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from transformers_patches.load.cut_swap import swap_cut_ffns
from transformers_patches.load.experts_swap import swap_experts
from transformers_patches.load.ffn_swap import swap_ffns
from transformers_patches.load.input_swap import swap_attention_inputs
from transformers_patches.modules.quantized import quantize_modules
from transformers_patches.modules.screened_head import can_be_screened
from transformers_patches.plan.run import ResolvedRun
from transformers_patches.sparse.request import RequestState
from transformers_patches.structure.empty_model import built
from transformers_patches.structure.model_structure import cant_be_built
from transformers_patches.weights.source import Source


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model of a config, its parameters without memory, its buffers real.

    Raises PartInferError for values from which transformers can't build one.
    """
    try:
        model = built(lambda: AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False))
    except Exception as error:  # whatever the values lead to
        raise cant_be_built(config, error) from None
    return model.eval()


def build_model(run: ResolvedRun, state: RequestState) -> tuple[PreTrainedModel, dict[str, Source]]:
    """The model of a run, still without memory: SparseFFNs in its planned layers, quantised modules if it has any.

    state: where the SparseFFNs find the request. Also returns, by parameter, where weights come from that are not
    simply the checkpoint's under the same name.
    """
    model = build_on_meta(run.config, run.dtype)
    sources = swap_ffns(model, run, state) | swap_experts(model, run, state) | swap_cut_ffns(model, run)
    if run.layer_choices is not None:
        sources |= swap_attention_inputs(model, run, state)
    if run.weight_format is not None:
        in_planes = run.screened and can_be_screened(model.get_output_embeddings())
        quantize_modules(
            model, run.weight_format, run.head_format, run.dtype, native=run.by_kernels, head_in_planes=in_planes
        )
    return model, sources
