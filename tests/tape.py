"""Stand-ins for a GPU on a CPU: attention by rows in one, and graphs as operations that are done again in place."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def attend_in_one(plain, module, query_1HND, key_1KND, value_1KND, bounds_S1, **kwargs):
    """Attention by rows as operations that do not depend on the lengths of rows."""
    row_of_N = torch.searchsorted(bounds_S1, torch.arange(query_1HND.shape[2]), right=True)
    seen_NN = (row_of_N[:, None] == row_of_N) & torch.ones(len(row_of_N), len(row_of_N), dtype=torch.bool).tril()
    if (window := kwargs.get("sliding_window")) is not None:
        seen_NN = seen_NN.triu(1 - window)
    attend, scale = torch.nn.functional.scaled_dot_product_attention, kwargs.get("scaling")
    return attend(query_1HND, key_1KND, value_1KND, seen_NN, scale=scale, enable_gqa=True).transpose(1, 2)


REPLAYS = [0]  # of all recorders


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.work = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        fresh = [tensor.untyped_storage().data_ptr() not in given for tensor in _tensors(returned)]
        if func._schema.is_mutable or any(fresh):  # a view needs no work
            self.work.append((func, args, kwargs, returned, fresh))
        return returned

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, returned, fresh in self.work:
            again = func(*args, **kwargs)
            for old, new, is_fresh in zip(_tensors(returned), _tensors(again), fresh, strict=True):
                if is_fresh:
                    old.copy_(new)


class TapeRecorder:
    """Like a graph, a replay sees the values that its memory has then, and nothing else of the program."""

    def __init__(self, device):
        pass

    def warm_up(self, run):
        return run()

    def record(self, run):
        with _Tape() as tape:
            returned = run()

        def replay():
            REPLAYS[0] += 1
            tape.replay()

        return returned, replay
