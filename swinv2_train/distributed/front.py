"""How far the ranks may go within a step, so that all of them stop before the same micro-batch."""

from __future__ import annotations

import torch.distributed as dist
from torch._C._distributed_c10d import Store

_CLOSED = "closed "


class Front:
    """The last micro-batch that any rank has begun; a rank that is to stop closes it, and no rank goes beyond.

    Asked before each micro-batch, and nothing waits for another rank or for the device: the number lies in the store
    at which the ranks met, and one exchange with it (0.1 ms) compares and moves it.  A collective would make the host
    wait for the device, and a flag alone would meet the ranks at different micro-batches, of which one then waits in a
    collective that the other never enters.  The collectives of what was begun are entered by all, so nothing hangs.
    """

    def __init__(self) -> None:
        """All ranks make one at the same place."""
        alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
        self._store = None if alone else dist.distributed_c10d._get_default_store()
        self._begun, self._lost = 0, False
        if self._store is not None:
            self._key = f"front_{self._store.add(f'fronts_of_rank_{dist.get_rank()}', 1)}"
            self._store.compare_set(self._key, "", "0")

    def may_begin(self, stop: bool) -> bool:
        """Whether the next micro-batch may begin, the same on every rank for each.  stop: this rank is to stop.

        After a False nothing may be asked any more.  Where the store is gone (torchrun was killed, which holds it) all
        go on to the end of the step, where they agree by a collective.
        """
        if self._store is None:
            return not stop
        if self._lost:
            return True
        try:
            return self._ask(self._store, stop)
        except dist.DistError:
            self._lost = True
            return True

    def _ask(self, store: Store, stop: bool) -> bool:
        before, self._begun = str(self._begun), self._begun + 1
        now = store.compare_set(self._key, before, f"{_CLOSED}{before}" if stop else str(self._begun)).decode()
        while stop and not now.startswith(_CLOSED):  # others are further
            now = store.compare_set(self._key, now, _CLOSED + now).decode()
        return self._begun <= int(now.removeprefix(_CLOSED))
