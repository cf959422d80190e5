"""What a rank of a training hears of changes to the cluster before they reach it."""

import time

_SOON_SECONDS = 60.0


class Notices:
    """Tells, when called, whether the ranks are likely to be stopped soon: a node of theirs is being drained, or one has joined.

    All ranks call it alike, because Ray has them agree on what is drained. A node that has joined concerns rank 0 alone, whose answer
    counts, and only for a minute: by then Ray has started all ranks again to make use of it, or will not.

    Args:
        may_grow: whether there may be more ranks.
    """

    def __init__(self, first: bool, may_grow: bool) -> None:
        self._watches = first and may_grow
        self._nodes, self._until = self._alive(), 0.0

    def __call__(self) -> bool:
        """Whether to be prepared."""
        import ray.train

        drained = ray.train.get_preemption_info() is not None
        nodes = self._alive()
        if nodes - self._nodes:
            self._until = time.monotonic() + _SOON_SECONDS
        self._nodes = nodes
        return drained or time.monotonic() < self._until

    def _alive(self) -> set[str]:
        import ray

        return {node["NodeID"] for node in ray.nodes() if node["Alive"]} if self._watches else set()
