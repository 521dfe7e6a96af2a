"""Products for the tests of the Hopper kernel: operands, guarded results, exact arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
from kernel_checks import POISON

from slidesparse_rt.dtypes import operand
from slidesparse_rt.kernels.hopper import HopperGemm, pack_weights
from slidesparse_rt.kernels.hopper_layout import packed_bytes
from slidesparse_rt.kernels.hopper_tiles import HopperConfig, tiling
from slidesparse_rt.kernels.loader import kernels_of

from .kernel_machine import Memory

#: Rows that there is memory for after the tokens.
MORE_ROWS = 207
#: Largest magnitude of the whole numbers that are multiplied: E4M3 sums are kept in fewer bits.
_LARGEST = {"int8": 127, "fp8_e4m3": 3, "bf16": 7, "fp16": 7}


def torch_type(name: str) -> Any:
    import torch

    names = {"fp8_e4m3": "float8_e4m3fn", "bf16": "bfloat16", "fp16": "float16"}
    return getattr(torch, names.get(name, name))


def whole(draw: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Whole numbers of a format that even its sums hold exactly."""
    import torch

    most = _LARGEST[dtype]
    found = torch.randint(-most, most + 1, shape, device="cuda", generator=draw)
    return found.float().to(torch_type(dtype))


def real(draw: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Numbers whose sums are rounded."""
    import torch

    found = torch.randn(shape, device="cuda", generator=draw)
    return (found * 40).round().to(torch.int8) if dtype == "int8" else found.to(torch_type(dtype))


def sparse(draw: Any, values: Any) -> Any:
    """``values`` with two of every four along the rows set to zero."""
    import torch

    rows, columns = values.shape
    order = torch.rand((rows, columns // 4, 4), device="cuda", generator=draw).argsort(dim=2)
    windows = values.float().view(rows, columns // 4, 4).scatter(2, order[:, :, :2], 0.0)
    return windows.view(rows, columns).to(values.dtype)


def words(tensor: Any) -> Any:
    """A tensor's bits as integers, so that equal means equal to the bit."""
    import torch

    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


class Operands:
    """A packed weight (n, columns) and m tokens, with scales and bias.

    Parameters
    ----------
    draw:
        torch's generator of random numbers.
    dtype:
        Operand format.
    n, row_bytes, m:
        Channels, bytes of a row of tokens (a multiple of 16), tokens.
    bias:
        Whether there is one.
    make:
        :func:`whole` or :func:`real`.
    """

    def __init__(
        self,
        draw: Any,
        dtype: str,
        n: int,
        row_bytes: int,
        m: int,
        *,
        bias: bool,
        make: Any = whole,
    ) -> None:
        import torch

        self.dtype, self.n, self.m, self.row_bytes = dtype, n, m, row_bytes
        size = operand(dtype).bits // 8
        columns = row_bytes // size
        rows, self.slid_bytes = -(-n // 128) * 128, -(-row_bytes // 256) * 256
        self.slid = torch.zeros(
            (rows, self.slid_bytes // size), dtype=torch_type(dtype), device="cuda"
        )
        self.slid[:n, :columns] = sparse(draw, make(draw, (n, columns), dtype))
        # What is read after them must not matter: 127s, NaNs, numbers that overflow.
        held = torch.full((m + MORE_ROWS, row_bytes), 0x7F, dtype=torch.uint8, device="cuda")
        self.tokens = held.view(torch_type(dtype))[:m]
        self.tokens.copy_(make(draw, (m, columns), dtype))
        self.packed = Memory(packed_bytes(rows, self.slid_bytes, size), 0)
        pack_weights(
            kernels_of(0),
            dtype,
            self.slid.data_ptr(),
            rows,
            self.slid_bytes,
            self.packed.address,
            torch.cuda.current_stream().cuda_stream,
        )
        # Scales that keep every result within float16.
        self.token_scales = self.channel_scales = self.bias = None
        if operand(dtype).scaled:
            unit = 1.0 / (row_bytes * _LARGEST[dtype])
            self.token_scales = (torch.rand(m, device="cuda", generator=draw) + 0.5) * unit
            self.channel_scales = torch.rand(n, device="cuda", generator=draw) + 0.5
        if bias:
            self.bias = torch.randn(n, device="cuda", generator=draw)

    def exact(self, out_type: str) -> Any:
        """The result for operands whose sums are exact, by docs/numerics.md."""
        columns = self.tokens.shape[1]
        y = (self.tokens.double() @ self.slid[: self.n, :columns].double().T).float()
        if self.token_scales is not None:
            y = y * self.token_scales[:, None]
            y = y * self.channel_scales
        if self.bias is not None:
            y = y + self.bias
        return y.to(torch_type(out_type))


class Result:
    """Memory for one result, its partial sums and its counters, guarded all around.

    ``stride`` and ``offset`` (elements) say how rows lie; everything between them is poisoned too.
    """

    def __init__(
        self, operands: Operands, config: HopperConfig, out_type: str, stride: int, offset: int
    ) -> None:
        import torch

        self.operands, self.config = operands, config
        n, m = operands.n, operands.m
        kind = torch_type(out_type)
        size = kind.itemsize
        self.stride = stride
        self.memory = Memory(((m - 1) * stride + n) * size, offset * size)
        flat = self.memory.bytes.view(torch.int32 if size == 4 else torch.int16)
        self._flat = flat
        #: The result's bits, shape (m, n).
        self.words = flat.as_strided((m, n), (stride, 1))
        sm_count = kernels_of(0).limits.sm_count
        cut = tiling(config, n, operands.slid_bytes, m, sm_count)
        self.partials = Memory(cut.partial_bytes, 0)
        self.counters = Memory(4 * cut.counters, 0)
        self.counters.bytes.zero_()
        self.gemm = HopperGemm(
            kernels_of(0),
            operands.dtype,
            out_type,
            n,
            operands.slid_bytes,
            operands.row_bytes,
            m,
            config,
            readable=m + MORE_ROWS,
        )

    def launch(self, stream: int) -> None:
        """Launch the product."""
        given = self.operands

        def address(tensor: Any) -> int:
            return 0 if tensor is None else int(tensor.data_ptr())

        self.gemm(
            given.packed.address,
            given.tokens.data_ptr(),
            address(given.token_scales),
            address(given.channel_scales),
            address(given.bias),
            self.memory.address,
            self.stride,
            self.partials.address,
            self.counters.address,
            stream,
        )

    def check(self, expected: Any) -> None:
        """The result has the bits of ``expected``, nothing else was written, counters are zero."""
        wanted = words(expected)
        wrong = self.words != wanted
        count = int(wrong.sum())
        if count:
            places = wrong.nonzero()
            raise AssertionError(
                f"{count} of {wrong.numel()} differ, first {places[0].tolist()}, last "
                f"{places[-1].tolist()}: bits {self.words[wrong][:4].tolist()} instead of "
                f"{wanted[wrong][:4].tolist()}"
            )
        self.memory.check()
        self.partials.check()
        self.counters.check()
        assert not self.counters.bytes.any(), "counters are left over"
        poison = int(np.full(4, POISON, np.uint8).view(f"i{self._flat.element_size()}")[0])
        gaps = self._flat.clone()
        gaps.as_strided(self.words.shape, self.words.stride()).fill_(poison)
        assert bool((gaps == poison).all()), "written between the rows"
