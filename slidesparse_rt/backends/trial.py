"""Products on operands of their own, launched as runs launch them, to be timed against each other.

Where tokens are few a product begins while the quantize kernel before it still runs, and finds its
tokens in the cache and its weight not.  Which product is fastest alone, with everything else over,
says little there: of the Hopper kernel's configurations another one is up to 5 % faster.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from ..dtypes import array_type, operand
from .cold import COLD_TOKENS, cold_cache, is_cold
from .gpu_gemm import GpuPrepared, round_up
from .gpu_step import Product
from .workspace import COUNTER_BYTES

__all__ = ["trial"]

#: Inputs that are quantized: what models compute in.
_INPUTS = "bfloat16"
#: Standard deviations of the inputs that the largest quantized value stands for, where one scale
#: serves all tokens: the plan's own is for other inputs, and could make zeros of these.
_SPREAD = 4.0


@contextlib.contextmanager
def trial(
    prepared: GpuPrepared, products: Sequence[Product], tokens: int, width: int, stream: int
) -> Iterator[tuple[list[Callable[[int], None]], Callable[[int], None] | None]]:
    """Operands for products of one weight.

    Parameters
    ----------
    tokens:
        How many each product is for.  Up to :data:`.cold.COLD_TOKENS` bfloat16 inputs are quantized
        before each.
    width:
        Bytes of a result.
    stream:
        Address of the stream on which the operands are made.

    Yields
    ------
    list
        What launches each of ``products`` on a stream.
    callable or None
        What has to be called with a stream before each, where runs find their weight out of the
        cache.

    Raises DeviceMemoryError, or as :func:`.cold.cold_cache` and :meth:`.GpuPrepared.quantizer`.
    """
    device, weight = prepared.device, prepared.weight
    padded = round_up(tokens, prepared.token_multiple)
    rows = max(padded, *(product.rows_read for product in products))
    row_bytes = prepared.row_length * weight.operand.bits // 8
    with (
        device.filled(rows * row_bytes, weight.operand, stream) as x,
        device.upload(np.ones(padded, np.float32), stream) as scales,
        device.allocate(padded * prepared.padded_n * width) as target,
        device.allocate(max(product.scratch_bytes for product in products)) as scratch,
        device.upload(np.zeros(COUNTER_BYTES // 4, np.int32), stream) as counters,
        _quantizing(prepared, tokens, padded, x.pointer, scales.pointer, stream) as quantize,
        cold_cache(device) if is_cold(weight, tokens) else contextlib.nullcontext() as empty,
    ):

        def run(product: Product, stream: int) -> None:
            if quantize is not None:
                quantize(stream)
            product.launch(
                x.pointer,
                scales.pointer,
                target.pointer,
                prepared.padded_n,
                scratch.pointer,
                counters.pointer,
                stream,
            )

        yield [partial(run, product) for product in products], empty


@contextlib.contextmanager
def _quantizing(
    prepared: GpuPrepared, tokens: int, padded: int, x: int, scales: int, stream: int
) -> Iterator[Callable[[int], None] | None]:
    """What quantizes inputs into ``x`` and ``scales``; ``None`` where tokens are many."""
    if tokens > COLD_TOKENS:
        yield None
        return
    device, weight, kind = prepared.device, prepared.weight, array_type(_INPUTS)
    quantize = prepared.quantizer(kind, stream)
    nbytes = tokens * weight.k * kind.bits // 8
    with contextlib.ExitStack() as held:
        inputs = held.enter_context(device.filled(nbytes, operand("bf16"), stream)).pointer
        given = 0
        if weight.x_scale:
            assert weight.operand.q_max is not None  # others have no scales
            scale = np.full(1, _SPREAD / weight.operand.q_max, np.float32)
            given = held.enter_context(device.upload(scale, stream)).pointer
        yield lambda stream: quantize(inputs, weight.k, x, scales, tokens, padded, stream, given)
