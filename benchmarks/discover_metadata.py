"""Which rows and columns each nibble of the metadata describes, found by flipping it.

    python benchmarks/discover_metadata.py > benchmarks/results/hopper-metadata-<gpu>.txt

The PTX ISA has this as figures only.  The weight is all ones with metadata (0, 1) everywhere, the
tokens are unit vectors: a result is 1 where an input is kept, and changing a nibble to (2, 3) shows
which channels and inputs it is about.  For 16-bit types; needs a Hopper GPU.
"""

from __future__ import annotations

import numpy as np
import torch

from slidesparse_rt.kernels.hopper import HopperGemm
from slidesparse_rt.kernels.hopper_layout import unit_bytes
from slidesparse_rt.kernels.hopper_tiles import HopperConfig
from slidesparse_rt.kernels.loader import kernels_of

CHANNELS, INPUTS, VALUES = 128, 64, 4096
THREADS = (0, 1, 2, 3, 4, 5, 6, 7, 31, 32)


def main() -> None:
    packed = np.zeros((1, 2, 2, unit_bytes(2)), np.uint8)
    packed[:, 0, :, :VALUES].view(np.uint16)[:] = 0x3F80  # bfloat16 1.0
    packed[:, :, :, VALUES:] = 0x44
    tokens = torch.zeros((INPUTS, 128), dtype=torch.bfloat16, device="cuda")
    tokens[:, :INPUTS] = torch.eye(INPUTS)
    y = torch.zeros((INPUTS, CHANNELS), device="cuda")
    config = HopperConfig(64, 1, 2)
    gemm = HopperGemm(kernels_of(0), "bf16", "float32", CHANNELS, 256, 256, INPUTS, config)
    stream = torch.cuda.current_stream().cuda_stream

    def kept(weights: np.ndarray) -> np.ndarray:
        there = torch.from_numpy(weights).cuda()
        gemm(there.data_ptr(), tokens.data_ptr(), 0, 0, 0, y.data_ptr(), CHANNELS, 0, 0, stream)
        torch.cuda.synchronize()
        found: np.ndarray = y.T.cpu().numpy().copy()
        return found

    plain = kept(packed)
    print("kept inputs of channel 0:", plain[0].astype(int).tolist())
    for thread in THREADS:
        for nibble in range(8):
            changed = packed.copy()
            byte = VALUES + thread * 4 + nibble // 2
            changed[0, 0, 0, byte] ^= 0xA << (4 * (nibble % 2))  # (0, 1) to (2, 3): 0x4 to 0xE
            channels, inputs = np.nonzero(kept(changed) != plain)
            print(thread, nibble, "channels", sorted(set(channels)), "k", sorted(set(inputs)))


if __name__ == "__main__":
    main()
