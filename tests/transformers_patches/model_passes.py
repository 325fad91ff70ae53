"""Prompts, passes over a cache, and what a model computed in them."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import HIDDEN, VOCABULARY, random_neuron_file
from tests.transformers_patches.made_up_files import made_up_clusters
from tests.transformers_patches.masked_reference import MaskedReference, NaiveMethod, positions
from transformers_patches.families import family_of
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.sparse.sparse_ffn import SparseFFN

SPARSE = range(1, 5)
PROMPT = torch.arange(3, 15)[None]
DATASET, MODEL = random_neuron_file(1), random_neuron_file(2)
DATASET.clusters = made_up_clusters()
METHODS = {
    "partinfer": {"method": "partinfer"},
    "coreinfer": {"method": "coreinfer"},
    "coreinfer+partial": {"method": "coreinfer", "use_partial_loading": True},
    "dense+partial": {"method": "dense", "use_partial_loading": True},
}


def naive(method: str, **settings) -> NaiveMethod:
    options = METHODS[method]
    partial = method != "coreinfer"
    return NaiveMethod(options["method"], partial, DATASET.ranking.tolist(), MODEL.ranking.tolist(), SPARSE, **settings)


def logits(loaded: LoadedModel) -> torch.Tensor:
    """[T + 1, vocabulary] of PROMPT and of one token after it."""
    with torch.inference_mode():
        output = loaded.model(PROMPT, use_cache=True)
        step = loaded.model(torch.tensor([[7]]), past_key_values=output.past_key_values)
    return torch.cat([output.logits[0], step.logits[0]])


def padded_prompts(lengths: list[int], side: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] random ids and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    input_ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        input_ids[row, place] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        attention_mask[row, place] = 1
    return input_ids, attention_mask


def passes(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, sizes: list[int], seed: int = 1
) -> list[tuple[torch.Tensor, dict]]:
    """The prompt's pass, then passes of `sizes` more random tokens over the cache, as model arguments."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(input_ids)
    result = [(input_ids, {"attention_mask": attention_mask, "position_ids": positions(attention_mask)})]
    for size in sizes:
        attention_mask = torch.cat([attention_mask, torch.ones(batch, size, dtype=torch.int64)], dim=1)
        more = torch.randint(3, VOCABULARY, (batch, size), generator=generator)
        result.append((more, {"attention_mask": attention_mask, "position_ids": positions(attention_mask)[:, -size:]}))
    return result


@torch.no_grad()
def run(model, all_passes: list[tuple[torch.Tensor, dict]]) -> list[torch.Tensor]:
    """The logits of every pass."""
    past, logits = None, []
    for input_ids, kwargs in all_passes:
        output = model(input_ids=input_ids, past_key_values=past, use_cache=True, **kwargs)
        past = output.past_key_values
        logits.append(output.logits)
    return logits


def run_reference(reference: MaskedReference, method: NaiveMethod, all_passes) -> list[torch.Tensor]:
    with reference.fresh():
        output = method.prefill(reference, all_passes[:1])
        logits, past = [output.logits], output.past_key_values
        for input_ids, kwargs in all_passes[1:]:
            output = reference(input_ids, past_key_values=past, **kwargs)
            logits.append(output.logits)
            past = output.past_key_values
        return logits


def assert_equal_where_real(ours: list[torch.Tensor], expected: list[torch.Tensor], prompt_mask: torch.Tensor) -> None:
    """Max abs difference under 1e-5 at every token that is not padding."""
    for number, (a, b) in enumerate(zip(ours, expected, strict=True)):
        difference = (a - b).abs()
        if number == 0:
            difference = difference[prompt_mask.bool()]
        assert difference.max() < 1e-5


def selection_of(ours: LoadedModel, layer: int, batch: int) -> list[set[int]]:
    """The model's neuron indices that decoding computes, per sequence."""
    module = sparse_layers(ours)[layer]
    plan = ours.plan.layers[layer]
    base = set(plan.neurons[: plan.base_count].tolist())
    chosen = module.selection.selected if module.selection.selects else [torch.empty(0, dtype=torch.int64)] * batch
    return [base | set(plan.neurons[index].tolist()) for index in chosen]


def sparse_layers(ours: LoadedModel) -> dict[int, SparseFFN]:
    return dict(zip(ours.plan.layers, ours.state.layers, strict=True))


def computed_rows(ours, all_passes) -> list[dict[int, float]]:
    """Per pass and sparse layer, neurons computed per token, from the floating-point operations torch counted."""
    family = family_of(ours.model.config)
    matrices = 3 if family.gated else 2
    past, result = None, []
    for input_ids, kwargs in all_passes:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            past = ours.model(input_ids=input_ids, past_key_values=past, use_cache=True, **kwargs).past_key_values
        root = type(ours.model).__name__
        rows = {}
        for layer in ours.plan.layers:
            name = f"{root}.{family.layers}.{layer}.{family.ffn or family.up}"
            operations = sum(counter.get_flop_counts()[name].values())
            rows[layer] = operations / (2 * HIDDEN * matrices * input_ids.numel())
        result.append(rows)
    return result
