"""Clusters of similar texts, and the core neurons of each: the similarity-guided way of CoreInfer.

CoreInfer (arXiv 2410.18311) groups calibration texts by a sentence embedding; a group's neurons are those that are core
neurons of most of its texts, and a prompt takes those of the group that it is most similar to. Here the embedding is the
model's own: the mean of its last hidden states. A prompt's group is found, in each layer, by its activations.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from transformers_patches import kernels
from transformers_patches.config import neuron_count
from transformers_patches.errors import PartInferError
from transformers_patches.families import family_of
from transformers_patches.neurons.clusters import Clusters
from transformers_patches.neurons.neuron_file import NeuronFile

TOKEN_SHARE = 0.2  # of a token's positive activations, which are its core neurons
TEXT_SHARE = 0.4  # of the neurons, which are a text's core neurons
ROUNDS = 50  # of moving the centers


class TextActivations:
    """What clusters are made of, for each text.

    embeddings: float32 [H] each, of length 1.
    directions: float32 [layers, N] each, the mean of h / ||h||_2 over the tokens.
    core: bool [layers, N] each.
    """

    def __init__(self, model: PreTrainedModel, neurons: NeuronFile) -> None:
        self.model, self._family = model, family_of(model.config)
        self._priority = neurons.ranking.long().argsort(dim=1)  # the place of each neuron
        self.embeddings: list[torch.Tensor] = []
        self.directions: list[torch.Tensor] = []
        self.core: list[torch.Tensor] = []

    @torch.no_grad()
    def observe(self, ids: list[int]) -> None:
        """Take in a text."""
        shape = self._priority.shape
        directions, core = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)

        def watch(layer: int):
            def take(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
                h = args[0].reshape(-1, shape[1])
                directions[layer] = F.normalize(h.float(), dim=1).mean(0).cpu()
                counts = kernels.core_counts(h, TOKEN_SHARE).cpu()
                wanted = neuron_count(TEXT_SHARE, shape[1])
                core[layer, kernels.most_marked(counts, self._priority[layer], 0, wanted).long()] = True

            return take

        able = [layer for layer in range(shape[0]) if self._family.has_neurons(layer)]
        downs = [(layer, self._family.down_projection(self.model, layer)) for layer in able]
        handles = [down.register_forward_pre_hook(watch(layer)) for layer, down in downs]
        try:
            inputs = torch.tensor([ids], device=self.model.device)
            states = self.model.base_model(input_ids=inputs, use_cache=False).last_hidden_state[0]
        finally:
            for handle in handles:
                handle.remove()
        self.embeddings.append(F.normalize(states.float().mean(0), dim=0).cpu())
        self.directions.append(directions)
        self.core.append(core)


def make_clusters(
    model: PreTrainedModel, neurons: NeuronFile, texts: list[list[int]], count: int, *, seed: int, quiet: bool
) -> tuple[Clusters, list[int]]:
    """Clusters of texts, given by their token ids, and how many texts each has.

    PartInferError if there are fewer texts than clusters.
    """
    if len(texts) < count:
        raise PartInferError(f"{count} clusters need at least as many texts, there are {len(texts)}: give more")
    activations = TextActivations(model, neurons)
    for ids in tqdm(texts, desc="texts", disable=quiet):
        activations.observe(ids)
    groups = k_means(torch.stack(activations.embeddings), count, seed)
    members = [[place for place, group in enumerate(groups.tolist()) if group == number] for number in range(count)]
    members = [places for places in members if places]
    centers = [torch.stack([activations.directions[place] for place in places]).mean(0) for places in members]
    counts = [sum(activations.core[place].int() for place in places) for places in members]
    return Clusters(torch.stack(centers).half(), torch.stack(counts).int()), [len(places) for places in members]


def k_means(points: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """int64 [n]: the group of each point [n, H] of length 1, by the cosine (spherical k-means; Dhillon and Modha, 2001).

    The first centers are drawn as k-means++ draws them (Arthur and Vassilvitskii, 2007).
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    while len(chosen) < count:
        far = (1 - (points @ points[chosen].T).amax(dim=1)).clamp(min=0) + 1e-9
        far[chosen] = 0
        chosen.append(int(torch.multinomial(far, 1, generator=generator)))
    centers, groups = points[chosen].clone(), None
    for _ in range(ROUNDS):
        before, groups = groups, (points @ centers.T).argmax(dim=1)
        if before is not None and torch.equal(before, groups):
            break
        for number in groups.unique().tolist():
            centers[number] = F.normalize(points[groups == number].mean(0), dim=0)
    return groups
