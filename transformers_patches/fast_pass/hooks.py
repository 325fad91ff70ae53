"""Whether somebody watches modules: what skips a module's forward must not skip its hooks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.utils.hooks import RemovableHandle


class HookWatch:
    """Says whether any of some modules has a hook. Looks again only after one was registered somewhere in PyTorch."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._unwatched_until = -1  # PyTorch's next hook number when the modules last had no hook

    def any(self) -> bool:
        """Whether a module has a hook."""
        if self._unwatched_until != RemovableHandle.next_id:
            if any(self._hooks):
                return True
            self._unwatched_until = RemovableHandle.next_id
        return False
