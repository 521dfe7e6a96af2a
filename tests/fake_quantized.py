"""Linear layers in plain torch arithmetic: quantize, multiply exactly in float64, scale.

Written from docs/numerics.md, with nothing of the package's own arithmetic in it.
"""

from __future__ import annotations

from typing import Any

import torch

Q = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class FakeQuantizedLinear(torch.nn.Module):
    """``values`` (N, K), int8 or float8_e4m3fn, and ``scales`` (N, 1) or (N,)."""

    def __init__(self, values: Any, scales: Any, bias: Any = None) -> None:
        super().__init__()
        self.kind = values.dtype
        self.register_buffer("values", values.double())
        self.register_buffer("scales", scales.reshape(-1).float())
        self.register_buffer("bias", bias)

    def forward(self, x: Any) -> Any:
        # A tensor: torch takes `number / tensor` for the number times a rounded reciprocal.
        q_max = torch.tensor(Q[self.kind], dtype=torch.float32)
        wide = x.float()
        peak = wide.abs().amax(dim=-1, keepdim=True)
        floor = q_max * 2.0**-126
        peak = torch.where(peak == 0, q_max, torch.maximum(peak, floor))  # a zero row: scale 1
        scaled = wide * (q_max / peak)
        rounded = scaled.round() if self.kind == torch.int8 else scaled.to(self.kind).double()
        sums = rounded.double() @ self.values.T
        y = sums.float() * (peak / q_max) * self.scales
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype)


def fake_quantized(layer: Any) -> FakeQuantizedLinear:
    """The same as a ``SlideSparseLinear``, in plain torch."""
    return FakeQuantizedLinear(layer.weight, layer.weight_scale, layer.bias)
