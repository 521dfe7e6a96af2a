"""Runs the CUDA kernels on the CPU: compiled by the host's C++ compiler against an emulated GPU.

Slow and sequential, but it is the kernels' own source, with every barrier, index and rounding.
"""

from __future__ import annotations

import ctypes
import functools
import getpass
import hashlib
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from kernel_checks import POISON

from slidesparse_rt.kernels.catalog import KernelSpec
from slidesparse_rt.kernels.compiler import Resources, read_source
from slidesparse_rt.kernels.hopper import _GEMM_ARGUMENTS, HOPPER_PACK_ARGUMENTS
from slidesparse_rt.kernels.launch import (
    DEQUANTIZE_ARGUMENTS,
    QUANTIZE_ARGUMENTS,
)
from slidesparse_rt.kernels.loader import DeviceLimits, Kernel
from slidesparse_rt.kernels.weight_launch import WEIGHT_ARGUMENTS

COMPILER = shutil.which("c++") or shutil.which("g++")
_FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-fno-gnu-unique", "-w")
_EMULATOR = Path(__file__).with_name("emulator")
#: Arguments that the emulator passes; a kernel takes as many of them as it has.
_ARGUMENTS = 24


@functools.cache
def _library(spec: KernelSpec) -> ctypes.CDLL:
    source = read_source(spec.source)
    files = {**source.headers, spec.source: source.text}
    # What asks something of the hardware.
    files.update({path.name: path.read_text() for path in _EMULATOR.glob("*.cuh")})
    digest = hashlib.sha256(repr((sorted(files.items()), spec.options)).encode()).hexdigest()
    # Shared by all test processes; a library appears under its name only when it is complete.
    target = Path(tempfile.gettempdir()) / f"slidesparse-emulated-{getpass.getuser()}" / digest
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            for name, text in files.items():
                Path(folder, name).write_text(text)
            built = Path(folder, "built.so")
            command = [COMPILER or "c++", *_FLAGS, *spec.options]
            command += ["-x", "c++", str(Path(folder, spec.source)), "-o", str(built)]
            subprocess.run(command, check=True)
            built.replace(target)
    return ctypes.CDLL(str(target))


def run(
    spec: KernelSpec,
    blocks: int,
    width: int,
    height: int,
    shared: int,
    *arguments: int,
    order: int = 0,
    together: int = 0,
    linger: int = 0,
    cluster: int = 1,
) -> None:
    """Launch as slidesparse_rt.kernels.launch.Launch does; addresses are host addresses.

    ``order`` of the threads, ``together``, ``linger`` and ``cluster``: see
    tests/emulator/primitives.cuh.
    """
    library = _library(spec)
    values = (ctypes.c_uint64 * _ARGUMENTS)(*(value & (2**64 - 1) for value in arguments))
    emulate = library.emulate
    emulate.restype = ctypes.c_char_p
    trouble = emulate(
        ctypes.cast(library[spec.entry], ctypes.c_void_p),
        values,
        blocks,
        width,
        height,
        shared,
        order,
        together,
        linger,
        cluster,
    )
    assert trouble == b"", trouble.decode()


class Memory:
    """Host memory at a chosen offset from a 256-byte boundary, with guards around it."""

    def __init__(self, nbytes: int, offset: int = 0) -> None:
        self._all = np.full(nbytes + 1024, POISON, np.uint8)
        start = -self._all.ctypes.data % 256 + 256 + offset
        self._guards = self._all[:start], self._all[start + nbytes :]
        self._bytes = self._all[start : start + nbytes]
        self.address = self._all.ctypes.data + start

    def write(self, values: np.ndarray) -> None:
        self._bytes[:] = np.ascontiguousarray(values).view(np.uint8).reshape(-1)

    def read(self) -> np.ndarray:
        return self._bytes.copy()

    def check(self) -> None:
        assert all((guard == POISON).all() for guard in self._guards), "written outside"


class EmulatedCuda:
    """Stands for the driver where a launcher asks it to launch."""

    def __init__(self, machine: EmulatedMachine) -> None:
        self._machine = machine

    def raw(self, name: str) -> Any:
        return {"cuLaunchKernel": self._launch, "cuLaunchKernelEx": self._launch_with_settings}[
            name
        ]

    def repeated(self, name: str, *arguments: Any) -> Any:
        return functools.partial(self.raw(name), *arguments)

    def cuDriverGetVersion(self, version: Any) -> None:  # noqa: N802
        version._obj.value = 13000

    def _launch_with_settings(
        self, settings: int, function: int, addresses: Any, extra: Any
    ) -> int:
        # CUlaunchConfig of cuda.h: grid, block, bytes, stream, attributes and how many there are.
        *words, attributes, count = struct.unpack("<7I4x8xQI", ctypes.string_at(settings, 52))
        cluster = 1
        for index in range(count):
            kind, value = struct.unpack("<i4xI", ctypes.string_at(attributes + 72 * index, 12))
            if kind == 4:  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
                cluster = value
        return self._launch(function, *words, None, addresses, extra, cluster=cluster)

    def cuTensorMapEncodeTiled(self, location: int, *rest: Any) -> None:  # noqa: N802
        """What tests/emulator/hopper.cuh reads of a tensor map."""
        kind, _, address, extents, strides, box, _, _, swizzle, *_ = rest
        size = {0: 1, 6: 2, 7: 4, 9: 2}[kind]
        assert address % 16 == strides[0] % 16 == 0
        assert 0 < strides[0] < 1 << 40
        # tests/emulator/hopper.cuh swizzles by the length of rows.
        assert swizzle == {64: 2, 128: 3}[box[0] * size]
        assert box[1] <= 256
        words = (address, *extents, strides[0], *box, size)
        ctypes.memmove(location, struct.pack("<7q", *words), 56)

    def _launch(self, function: int, *rest: Any, cluster: int = 1) -> int:
        blocks, _, _, width, height, _, shared, _, addresses, _ = rest
        spec = self._machine.specs[function]
        layout = {
            "quantize_lift": QUANTIZE_ARGUMENTS,
            "dequantize": DEQUANTIZE_ARGUMENTS,
            **WEIGHT_ARGUMENTS,
            "hopper_pack": HOPPER_PACK_ARGUMENTS,
            "hopper_gemm": _GEMM_ARGUMENTS,
        }[spec.entry]
        addresses = list(addresses)
        maps = addresses[: len(addresses) - len(layout)]  # passed by their addresses
        values = maps + [
            struct.unpack(code, ctypes.string_at(address, struct.calcsize(code)))[0]
            for code, address in zip(layout, addresses[len(maps) :], strict=True)
        ]
        self._machine.launches.append((spec, blocks, width, height, shared))
        assert blocks % cluster == 0
        machine = self._machine
        extra = {"together": machine.together, "linger": machine.linger, "cluster": cluster}
        run(spec, blocks, width, height, shared, *values, order=machine.order, **extra)
        return 0


class EmulatedMachine:
    """Looks like a device's KernelCache to launchers.

    ``backwards`` reverses threads and blocks; ``uneven``, a number above 1, lets warpgroups sleep;
    ``together`` lets blocks run at a time, and ``linger`` warpgroups be late, each for that many
    turns.
    """

    stream = 0

    def __init__(
        self,
        *,
        backwards: bool = False,
        uneven: int = 0,
        together: int = 0,
        linger: int = 0,
        shared_bytes: int = 99 * 1024,
        sm_count: int = 2,
    ) -> None:
        self.cuda = EmulatedCuda(self)
        self.kernels: Any = self
        self.limits = DeviceLimits((8, 6), sm_count, shared_bytes)
        self.order = uneven or int(backwards)
        self.together, self.linger = together, linger
        self.specs: dict[int, KernelSpec] = {}
        self.launches: list[tuple[KernelSpec, int, int, int, int]] = []

    def memory(self, nbytes: int, offset: int = 0) -> Memory:
        return Memory(nbytes, offset)

    def load(self, spec: KernelSpec, *, shared_bytes: int = 0) -> Kernel:
        assert shared_bytes <= self.limits.shared_bytes
        number = len(self.specs) + 1
        self.specs[number] = spec
        return Kernel(spec, number, Resources(32, 0, 0, 0))

    def occupancy(self, kernel: Kernel, threads: int, shared_bytes: int) -> int:
        assert threads <= kernel.spec.max_threads
        return 1
