"""Which bits of the metadata describe which row and chunk (16-bit types), found by flipping them."""
import numpy as np, torch
from slidesparse_rt.kernels.hopper import HopperConfig, HopperGemm
from slidesparse_rt.kernels.hopper_layout import unit_bytes
from slidesparse_rt.kernels.loader import kernels_of
k = kernels_of(0)
config = HopperConfig(64, 1, 2)
unit = unit_bytes(2)
packed = np.zeros((1, 2, 2, unit), np.uint8)
one = np.frombuffer(np.array([1.0], np.float32).tobytes()[2:4], np.uint8)
packed[:, 0, :, :4096] = np.tile(one, 2048)
packed[:, :, :, 4096:] = 0x44
tokens = torch.zeros((64, 128), dtype=torch.bfloat16, device="cuda")
tokens[:, :64] = torch.eye(64)
gemm = HopperGemm(k, "bf16", "float32", 128, 256, 256, 64, config)
y = torch.zeros((64, 128), device="cuda")
s = torch.cuda.current_stream().cuda_stream
def run(p):
    d = torch.from_numpy(p.copy()).cuda()
    gemm(d.data_ptr(), tokens.data_ptr(), 0, 0, 0, y.data_ptr(), 128, 0, 0, s)
    torch.cuda.synchronize()
    return y.T.cpu().numpy().copy()  # channel, k
base = run(packed)
print("base ones per row", base.sum(1)[:4], "row 0:", base[0].astype(int).tolist())
channel_row = {}
for t in range(128):
    for m in range(1):
        warp, g = t // 32, t % 32 // 4
for t in [0, 1, 2, 3, 4, 5, 6, 7, 31, 32]:
    for j in range(8):
        p = packed.copy()
        byte = 4096 + t * 4 + j // 2
        v = p[0, 0, 0, byte]
        p[0, 0, 0, byte] = (v & 0xF0 | 0xE) if j % 2 == 0 else (v & 0x0F | 0xE0)
        d = run(p) - base
        where = np.argwhere(d != 0)
        print(t, j, "channels", sorted(set(where[:, 0].tolist())), "k", sorted(set(where[:, 1].tolist())), flush=True)
