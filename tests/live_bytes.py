"""A measuring instrument of the tests: how many bytes of tensors live at the same time."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context that follows every storage from its birth to its death; `peak` bytes lived at once.

    Args: already: tensors that live before, and count.
    """

    def __init__(self, already):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        for tensor in already:
            self.born(tensor)

    def born(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.died, storage._cdata)

    def died(self, storage):
        self.now -= self.sizes.pop(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.born(tensor)
        return out
