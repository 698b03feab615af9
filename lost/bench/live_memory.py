"""Counts the bytes of live tensor storages, so that a test of memory does not depend on the allocator."""

import gc
import weakref
from typing import Any

import torch
from lost_kernels.cross_entropy.op import linear_cross_entropy_op
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM


class LiveBytes(TorchDispatchMode):
    """Context: `peak_bytes` of the storages made inside it that were alive together, meta tensors left out.

    Made in C++ by one operation and freed inside it (workspaces) are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # What an operation reads and this context has not seen was there before: it counts nothing.
        for storage in _storages((args, kwargs)):
            self._see(storage, num_bytes=0)
        if func is torch.ops.lost.linear_cross_entropy.default:
            # Opaque like all operators of ours, but its chunks are worth seeing: its Python is run in their place.
            with self:
                result = linear_cross_entropy_op._init_fn(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        for storage in _storages(result):
            self._see(storage, storage.nbytes())
        return result

    def _see(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = num_bytes
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [leaf.untyped_storage() for leaf in leaves if leaf.device.type != "meta"]


def bytes_kept_by(net: LlamaForCausalLM, autocast: torch.autocast, num_rows: int, seq_len: int) -> float:
    """Bytes per token that the first block keeps alive after its forward pass, its input counted, its output not."""
    x = torch.randn(num_rows, seq_len, net.config.hidden_size, dtype=net.dtype, requires_grad=True)
    angles = net.model.rotary_emb(x, torch.arange(seq_len)[None])
    with LiveBytes() as live:
        with autocast:
            y = net.model.layers[0](x, position_embeddings=angles, attention_mask=None)
        gc.collect()
        assert y.requires_grad
        return (live.live_bytes - y.nbytes + x.nbytes) / (num_rows * seq_len)
