"""Log-likelihoods computed as decoding does: prefill, select neurons, score over the cache with the selected ones.

The context except for its last token is prefilled. `continuation_logits` then scores the last context token and the
continuation in one pass over the cache. With a fixed selection this equals step-by-step decoding up to rounding.
`decoded_logits` takes every step, and so rounds as decoding does, too. A context of one token is prefilled as well, and
its prediction comes from the prefill. Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from transformers import DynamicCache, PreTrainedModel

from transformers_patches.fast_pass.one_token import new_cache

Tokens = list[int]
Request = tuple[Tokens, list[Tokens]]  # a context of at least one token, and its possible continuations


def batches(requests: list[Request], batch_size: int) -> Iterator[list[int]]:
    """Indices of the requests to score together: similar in number of continuations, then in length."""
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][1]), -len(requests[i][0])))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.inference_mode()
def continuation_logits(model: PreTrainedModel, batch: list[Request]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (index in the batch, index of the continuation, logits [len(continuation), V]).

    Each context is prefilled once, however many continuations it has. Padding is masked, and each sequence has its own
    selection.
    """
    prompts = [context[:-1] or context for context, _ in batch]
    ids, mask = _left_pad(prompts, model.device)  # [B, T]
    cache = DynamicCache()  # without the config it has no sliding-window layers, so it can be cropped
    first = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]  # [B, V]
    for slot in range(max(len(continuations) for _, continuations in batch)):
        rows = [_pass_tokens(context, continuations[slot : slot + 1]) for context, continuations in batch]
        logits = _pass_logits(model, cache, rows, mask)
        for index, (context, continuations) in enumerate(batch):
            if slot < len(continuations):
                own = logits[index, : len(rows[index])]
                yield index, slot, own if len(context) > 1 else torch.cat([first[index : index + 1], own])


@torch.inference_mode()
def decoded_logits(model: PreTrainedModel, context: Tokens, continuation: Tokens) -> torch.Tensor:
    """Logits [len(continuation), V] of one sequence, each from a pass over one token, in the model's type.

    The passes are those that generation makes for the prompt context[:-1], on the same kind of cache. So where
    generation uses the native one-token pass, this does, too.
    """
    prompt, fed = context[:-1] or context, _pass_tokens(context, [continuation])
    ids = torch.tensor([prompt + fed], device=model.device)
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1], device=model.device)[None]
    cache = new_cache(model)
    logits = torch.empty(len(continuation), model.config.vocab_size, dtype=model.dtype, device=model.device)
    skipped = 1 + len(fed) - len(continuation)  # 1 to skip the prompt's prediction; 0 for a context of one token
    for number, (start, end) in enumerate(pairwise([0, *range(len(prompt), ids.shape[1] + 1)])):
        output = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if number >= skipped:
            logits[number - skipped] = output.logits[0, -1]
    return logits


def _pass_tokens(context: Tokens, continuation: list[Tokens]) -> Tokens:
    """The tokens to run over the cache: the last context token, unless prefilled, and all but the last that follow."""
    if not continuation:
        return []
    return (context[-1:] if len(context) > 1 else []) + continuation[0][:-1]


def _pass_logits(model: PreTrainedModel, cache: DynamicCache, rows: list[Tokens], mask: torch.Tensor) -> torch.Tensor:
    """Logits [B, width, V] of one pass over the cache, which is restored. Rows are padded on the right."""
    width = max(map(len, rows))
    if width == 0:
        return torch.empty(len(rows), 0, model.config.vocab_size, device=mask.device, dtype=model.dtype)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=mask.device)
    positions = mask.sum(1, keepdim=True) + torch.arange(width, device=mask.device)
    logits = model(
        input_ids=ids,
        attention_mask=torch.cat(
            [mask, torch.ones_like(ids)], dim=1
        ),  # no real token attends to the padding on the right
        position_ids=positions.clamp(max=model.config.max_position_embeddings - 1),
        past_key_values=cache,
        use_cache=True,
    ).logits
    cache.crop(-width)
    return logits


def _left_pad(prompts: list[Tokens], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, int64 [B, longest prompt]."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask
