"""A key-value cache with room to grow: a new token is written in place, without copying those before it."""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 256  # tokens that a full buffer grows by at least


class GrowingLayer(DynamicLayer):
    """transformers' DynamicLayer over buffers [B, heads, capacity, head size], of which `length` tokens are filled.

    `keys` and `values` are views of the filled part; what is assigned to them becomes the buffer.
    """

    def __init__(self, *args, **options) -> None:
        self.length = 0
        super().__init__(*args, **options)

    @property
    def keys(self) -> torch.Tensor | None:
        return self._filled(self._keys)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._keys, self.length = value, self._length_of(value)

    @property
    def values(self) -> torch.Tensor | None:
        return self._filled(self._values)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._values, self.length = value, self._length_of(value)

    def _filled(self, buffer: torch.Tensor | None) -> torch.Tensor | None:
        return buffer if buffer is None or buffer.ndim < 4 else buffer[:, :, : self.length]

    @staticmethod
    def _length_of(value: torch.Tensor | None) -> int:
        return 0 if value is None or value.ndim < 4 else value.shape[-2]

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number is negative, as in transformers' layers."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append [B, heads, T, head size]; returns views of all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        keys, values = self.buffers(tokens, key_states, value_states)
        keys[:, :, self.length : self.length + tokens] = key_states
        values[:, :, self.length : self.length + tokens] = value_states
        self.length += tokens
        return self.keys, self.values

    def buffers(self, tokens: int, keys_like: torch.Tensor, values_like: torch.Tensor):
        """The contiguous buffers, with room for `tokens` more. The caller fills them and adds to `length`."""
        needed = self.length + tokens
        if self._keys.ndim < 4 or self._keys.shape[-2] < needed or not self._keys.is_contiguous():
            length, capacity = self.length, needed + max(ROOM, needed // 4)
            keys, values = (
                _grown(self._keys, keys_like, length, capacity),
                _grown(self._values, values_like, length, capacity),
            )
            self._keys, self._values = keys, values
        return self._keys, self._values

    def room_for_one(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`buffers` for one more token, in a layer that has some already."""
        return self.buffers(1, self._keys, self._values)


def _grown(old: torch.Tensor, like: torch.Tensor, length: int, capacity: int) -> torch.Tensor:
    new = like.new_empty(*like.shape[:2], capacity, like.shape[3])
    if length:
        new[:, :, :length] = old[:, :, :length]
    return new


class GrowingCache(DynamicCache):
    """A cache of GrowingLayers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer
        self._room: dict[range, _Room] = {}

    def room_for_one(self, layers: range) -> _Room:
        """Buffers of layers of equal length, each with room for one more token."""
        stores, room = self.layers[layers.start : layers.stop], self._room.get(layers)
        if room is None or not room.fits(stores):
            buffers = [store.room_for_one() for store in stores]
            room = _Room([keys for keys, _ in buffers], [values for _, values in buffers])
            # entries that share layers with this one may hold buffers that have been replaced
            apart = [other for other in self._room if other.stop <= layers.start or layers.stop <= other.start]
            self._room = {other: self._room[other] for other in apart} | {layers: room}
        return room


class _Room:
    """Buffers of several layers. They are kept because looking them up takes 1 % of a small model's time per token."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        self.keys, self.values = keys, values
        self.capacity = min(buffer.shape[-2] for buffer in (*keys, *values))

    def fits(self, stores: list[GrowingLayer]) -> bool:
        return stores[0].length < self.capacity and all(
            store._keys is keys and store._values is values
            for store, keys, values in zip(stores, self.keys, self.values, strict=True)
        )
