"""Products that find their weights out of the level-2 cache, as those of a model do.

In a model the other layers' weights have gone through the cache before a layer runs again.  Where
tokens are few, reading the weight is most of a product, so products are compared with the cache
emptied; not those of the smallest weights, which are parts of models that stay in it as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from ..kernels import catalog
from ..kernels.launch import Launch
from ..kernels.loader import kernels_of
from .gpu_device import GpuDevice
from .gpu_weight import GpuWeight

__all__ = ["COLD_BYTES", "COLD_TOKENS", "cold_cache", "is_cold"]

#: Most tokens of which a product's time depends on where its weight lies.
COLD_TOKENS = 512
#: Bytes of a dense weight from which on its model is too large for the cache: a few dozen layers of
#: such a size are.
COLD_BYTES = 1 << 20
#: How much is read to empty the cache, in parts of its size: it does not forget in order.
_TIMES = 2
_THREADS, _BLOCKS_PER_SM = 256, 8
#: Arguments of the kernel as codes of struct: address, pieces of 16 bytes.
_ARGUMENTS = "Qq"


def is_cold(weight: GpuWeight, tokens: int, cold_tokens: int = COLD_TOKENS) -> bool:
    """Whether a product of so many tokens finds its weight in memory, not in the cache."""
    dense_bytes = weight.n * weight.k * weight.operand.bits // 8
    return tokens <= cold_tokens and dense_bytes >= COLD_BYTES


@contextlib.contextmanager
def cold_cache(device: GpuDevice) -> Iterator[Callable[[int], None]]:
    """What empties the level-2 cache of a device on a stream: it reads memory that it holds.

    It reads and does not write: what is written stays in the cache as well, and has to be written
    back while what comes next is timed (up to 8 us on an H200).

    Raises DeviceMemoryError, or BackendUnavailable, CompileError and LibraryError as
    :func:`~slidesparse_rt.kernels.loader.kernels_of` and
    :meth:`~slidesparse_rt.kernels.loader.KernelCache.load`.
    """
    kernels = kernels_of(device.index)
    launch = Launch(kernels.cuda, kernels.load(catalog.evict()), _ARGUMENTS)
    blocks = _BLOCKS_PER_SM * device.sm_count
    with device.allocate(_TIMES * device.l2_bytes) as memory:
        pieces = memory.nbytes // 16
        yield lambda stream: launch(blocks, _THREADS, 1, 0, stream, memory.pointer, pieces)
