"""An update recorded once as a CUDA graph, and replayed: launching its hundred small kernels takes longer than they do.

Not run on a GPU yet: what there is to it without one, the copies of what it is given, is tested with a recording that is none.
"""

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from metadiff.learners import Support

Update = Callable[[Tensor, Support, Tensor, Tensor], Tensor]
Call = Callable[[], Tensor]


def warm_up(call: Call) -> Tensor:
    """Call it on a stream of its own, as is asked for before a recording: libraries set themselves up then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = call()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def record(call: Call) -> Call:
    """What does the same as `call`, on the same memory; `call` itself is only recorded, not done."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class Recorded:
    """`update(w_0, support, t, eps)`: called the first time, which sets up the optimizer; recorded the second, and replayed from then on.

    A recording reads the memory that it was made with, so every batch is copied there, and all must have one shape. What is the very same
    tensor in the first two, as the bank that support sets are rows of, is taken to stay so, and not copied.
    """

    def __init__(self, update: Update, warm_up: Callable[[Call], Tensor] = warm_up, record: Callable[[Call], Call] = record) -> None:
        self._update, self._warm_up, self._record = update, warm_up, record
        self._first: Support | None = None
        self._replay: Call | None = None

    def __call__(self, w_0: Tensor, support: Support, t: Tensor, eps: Tensor) -> Tensor:
        """What `update` returns."""
        if self._first is None:
            self._first = copy(support)
            return self._warm_up(lambda: self._update(w_0, support, t, eps))
        if self._replay is None:
            self._batch, self._parts = [x.clone() for x in (w_0, t, eps)], parts(support, self._first)
            (w, s, e), own = self._batch, copy(support)
            vars(own).update(self._parts)
            self._replay = self._record(lambda: self._update(w, own, s, e))
        places = [*self._batch, *self._parts.values()]
        for place, given in zip(places, (w_0, t, eps, *(vars(support)[name] for name in self._parts)), strict=True):
            assert place.shape == given.shape, f"recorded for {tuple(place.shape)}, given {tuple(given.shape)}"
            place.copy_(given)
        return self._replay().clone()


def parts(support: Support, before: Support) -> dict[str, Tensor]:
    """Copies of the tensors of a support set, but for those that are the same as in the one `before`."""
    same = [id(value) for value in vars(before).values()]
    return {name: x.clone() for name, x in vars(support).items() if isinstance(x, Tensor) and id(x) not in same}
