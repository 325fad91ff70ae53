"""What the rungs of a byte ladder cost, measured as decoding computes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from profiler.loss_measurement import Scored, ScoredText, difference
from transformers_patches.config import PartInferConfig
from transformers_patches.load.input_swap import set_layer_choices
from transformers_patches.load.loader import load_model
from transformers_patches.neurons.byte_ladder import ByteLadder
from transformers_patches.neurons.neuron_file import NeuronFile


@torch.inference_mode()
def measured(
    neurons: NeuronFile,
    folder: Path,
    settings: dict,
    texts: list[ScoredText],
    *,
    quiet: bool = False,
) -> ByteLadder:
    """The ladder of a neuron file with measured losses. The model is loaded once; a prompt is prefilled once.

    settings: fields of PartInferConfig, such as dtype and device. Dense is the same model with choices that read
    everything.
    """
    ladder = neurons.ladder
    loaded = load_model(folder, PartInferConfig(**settings, block_bytes=ladder.least), neurons)
    shares = [1.0, *(rung.block_bytes for rung in ladder.rungs)]
    choices = [[ladder.layer(share, number) for number in range(ladder.num_layers)] for share in shares]
    sums, tokens = torch.zeros(len(ladder.rungs), 2, dtype=torch.float64), 0
    for text in tqdm(texts, "measuring the ladder", unit=" texts", disable=quiet):
        set_layer_choices(loaded, choices[0])
        scored = Scored(loaded.model, text)
        dense, target = scored.logits().clone(), torch.tensor(text.target, device=loaded.device)
        for number, choice in enumerate(choices[1:]):
            set_layer_choices(loaded, choice)
            sums[number] += torch.tensor(difference(scored.logits(), dense, target), dtype=torch.float64)
        tokens += len(target)
    means = (sums / tokens).tolist()
    return replace(ladder, rungs=[replace(r, nll=n, kl=k) for r, (n, k) in zip(ladder.rungs, means, strict=True)])
