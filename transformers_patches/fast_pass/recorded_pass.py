"""RecordedPass: decoding on a GPU by recorded steps, one for each kind of choices and size of cache.

For one sequence over a GrowingCache, and for models whose layers attend to all tokens. Anything else goes through
transformers' own forward.
"""

from __future__ import annotations

import sys
import weakref

import torch
from transformers import PreTrainedModel

from transformers_patches.fast_pass.hooks import HookWatch
from transformers_patches.fast_pass.kv_cache import GrowingCache, GrowingLayer
from transformers_patches.fast_pass.recording import Recorder, Recording, cuda_graph, has_plain_attention
from transformers_patches.kernels import SOFTMAX, Needed
from transformers_patches.sparse.request import RequestState
from transformers_patches.sparse.static_choice import StaticChoice

ROOM = 256  # tokens that a recording has room for at least, beyond those that there are
MOST_KEPT = 4  # recordings; each has memory for keys and values
# How far the logits of a new recording may be from those of the model's own forward, in the norm. Types of 16 bits
# round; a wrong step is off by the size of the logits.
TOLERANCE, TOLERANCE_16_BITS = 1e-3, 5e-2


def record_steps(model: PreTrainedModel, state: RequestState, recorder: Recorder = cuda_graph) -> bool:
    """Let a model's decode steps be recorded from now on. False if its layers can't be."""
    if not has_plain_attention(model) or state.experts:
        return False
    model.recorded_pass = RecordedPass(model, state, recorder)
    return True


def recorded_pass(model: PreTrainedModel) -> RecordedPass | None:
    """What `record_steps` has given a model, or None."""
    return getattr(model, "recorded_pass", None)


class RecordedPass:
    """Takes tokens through a model by recordings. A cache in use has its keys and values in the recording's memory."""

    def __init__(self, model: PreTrainedModel, state: RequestState, recorder: Recorder) -> None:
        self.model, self.state, self.recorder = model, state, recorder
        self._watch = HookWatch(module for module in model.modules() if module is not model)
        self._recordings: dict[tuple, Recording] = {}  # by kind of choices and capacity; the last used one last
        self._owners: dict[int, weakref.ref[GrowingCache]] = {}  # by id of the recording
        self._current: Recording | None = None
        self._followed: list[object] | None = None  # the choices that the current recording computes
        self._tokens = 0  # that it has decoded since its counts were last taken
        self.why_not = ""  # why nothing is recorded any more

    def ready(self, cache: GrowingCache) -> bool:
        """Whether `logits` can take a token that follows those of the cache."""
        if self.why_not or not isinstance(cache, GrowingCache) or self._watch.any():
            return False
        stores = cache.layers
        if not stores or not all(type(store) is GrowingLayer and store.length for store in stores):
            return False
        if self._follows(cache):
            return True
        like = stores[0].keys
        actives = [
            layer.selection.active_neurons(like.new_empty(1, 1, layer.rows.hidden_size)) for layer in self.state.layers
        ]
        x = like.new_empty(1, 1, 1)
        return all(StaticChoice.fits(active, x) for active in actives)

    def logits(self, ids: torch.Tensor, cache: GrowingCache, needed: Needed = SOFTMAX) -> torch.Tensor:
        """As the model's forward over one token, ids [1, 1], which is appended to the cache: logits [1, 1, V].

        They hold until the next call. needed: not used; all logits are exact.
        """
        if not self._follows(cache):
            checked = self._begin(ids, cache)
            if checked is not None:
                return checked
        logits = self._current.run(ids, cache.layers[0].length)
        self._tokens += 1
        for store in cache.layers:
            store.length += 1
        return logits

    def finish(self) -> None:
        """Count what the layers have computed. Waits for the device."""
        if self._current is None or not self._tokens:
            return
        for layer, computed in zip(self.state.layers, self._current.take_counts(), strict=True):
            rows = layer.selection.rows_read(computed) + (self._tokens - 1) * layer.selection.rows_read(0)
            layer.counters.add(self._tokens, computed, rows)
        self._tokens = 0

    def _follows(self, cache: GrowingCache) -> bool:
        """Whether the current recording computes the layers' choices over this cache, and has room for a token."""
        current = self._current
        return (
            current is not None
            and self._owners[id(current)]() is cache
            and cache.layers[0].length < current.capacity
            and all(store._keys is own.keys for store, own in zip(cache.layers, current.stores, strict=True))
            and all(layer.choice is known for layer, known in zip(self.state.layers, self._followed, strict=True))
        )

    def _begin(self, ids: torch.Tensor, cache: GrowingCache) -> torch.Tensor | None:
        """Have a recording for the choices and the cache. Returns logits if it is new, or if there can't be one."""
        self.finish()
        layers, length, x = self.state.layers, cache.layers[0].length, cache.layers[0].keys
        actives = [layer.selection.active_neurons(x.new_empty(1, 1, layer.rows.hidden_size)) for layer in layers]
        kind = tuple(StaticChoice.kind(active) for active in actives)
        fitting = [key for key in self._recordings if key[0] == kind and key[1] > length]
        new = not fitting
        key = min(fitting) if fitting else (kind, _capacity(length))
        if new:
            recording = Recording(self.model, layers, actives, cache.layers, key[1])
        else:
            recording = self._recordings.pop(key)
            for choice, active in zip(recording.choices, actives, strict=True):
                choice.take(active)
        self._recordings[key] = recording
        self._give(recording, cache)
        self._current, self._followed = recording, [layer.choice for layer in layers]
        while len(self._recordings) > MOST_KEPT:
            self._owners.pop(id(self._recordings.pop(next(iter(self._recordings)))))
        return self._recorded(recording, ids, cache) if new else None

    def _give(self, recording: Recording, cache: GrowingCache) -> None:
        """Move a cache's keys and values into the recording's memory; the cache that was there gets memory of its own."""
        before = self._owners.get(id(recording), lambda: None)()
        if before is not None and before is not cache:
            for store, own in zip(before.layers, recording.stores, strict=True):
                if store._keys is own.keys:
                    store._keys, store._values = store._keys.clone(), store._values.clone()
        for store, own in zip(cache.layers, recording.stores, strict=True):
            if store._keys is not own.keys:
                own.keys[:, :, : store.length] = store.keys
                own.values[:, :, : store.length] = store.values
                store._keys, store._values = own.keys, own.values
        self._owners[id(recording)] = weakref.ref(cache)

    def _recorded(self, recording: Recording, ids: torch.Tensor, cache: GrowingCache) -> torch.Tensor:
        """Record the step, and compare it with the model's own forward, whose logits are returned."""
        length, problem = cache.layers[0].length, ""
        try:
            recording.record(self.recorder, ids, length)
            ours = recording.run(ids, length).float().clone()
        except RuntimeError as error:
            problem = f"a step can't be recorded: {str(error).splitlines()[0]}"
        expected = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        if not problem:
            recording.take_counts()
            tolerance = TOLERANCE if expected.dtype == torch.float32 else TOLERANCE_16_BITS
            apart = float((ours - expected.float()).norm() / expected.float().norm())
            if not apart < tolerance:
                problem = f"a recorded step's logits are {apart:.2g} from the model's own"
        if problem:
            self._give_up(problem)
        return expected

    def _give_up(self, problem: str) -> None:
        self.why_not, self._current, self._recordings = problem, None, {}
        print(f"partinfer: no recorded steps: {problem}; every operation is started by itself, slower", file=sys.stderr)


def _capacity(length: int) -> int:
    """Room for some more tokens than there are: a power of two."""
    return 1 << (length + ROOM - 1).bit_length()
