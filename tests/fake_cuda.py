"""A CUDA driver that only remembers."""

from __future__ import annotations

import ctypes
import struct
from functools import partial
from types import SimpleNamespace
from typing import Any

from slidesparse_rt.ffi.libraries import load
from slidesparse_rt.kernels.catalog import KernelSpec
from slidesparse_rt.kernels.compiler import Nvrtc, Resources
from slidesparse_rt.kernels.hopper import _GEMM_ARGUMENTS
from slidesparse_rt.kernels.hopper_tiles import HOPPER_SHARED_BYTES
from slidesparse_rt.kernels.loader import Cuda, DeviceLimits, Kernel


class FakeCuda(Cuda):
    """A driver without a GPU: counts what is loaded and which context is current."""

    def __init__(self) -> None:
        super().__init__(
            SimpleNamespace(
                library=SimpleNamespace(title="a driver"), path="", version=(13, 0), handle=None
            )
        )
        self.pushed: list[int] = []
        self.modules: dict[int, bytes] = {}
        self.retained = 0
        self.shared: dict[int, int] = {}
        self.refuse: dict[str, int] = {}
        self.driver_version = 13000
        self.mode = 0  # CU_STREAM_CAPTURE_MODE_GLOBAL
        self.streams: dict[int, int] = {}

    def __getattr__(self, name):
        action = getattr(type(self), f"_{name.lower()}", None)
        if action is None:
            raise AttributeError(name)

        def call(*arguments):
            if name in self.refuse:
                raise self.error(name, self.refuse[name], arguments)
            action(self, *arguments)

        return call

    def raw(self, name):
        if name == "cuGetErrorName":

            def named(status, text):
                text._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY" if status == 2 else None
                return 0 if status == 2 else 1

            return named
        return lambda *arguments: 0

    def repeated(self, name, *arguments):
        return partial(self.raw(name), *arguments)

    def _cuinit(self, flags):
        pass

    def _cudeviceget(self, device, ordinal):
        device._obj.value = ordinal

    def _cudrivergetversion(self, version):
        version._obj.value = self.driver_version

    def _cudevicegetattribute(self, value, attribute, device):
        value._obj.value = {16: 132, 75: 9, 76: 0, 97: 232448}[attribute]

    def _cudeviceprimaryctxretain(self, context, device):
        assert self.mode == 2
        self.retained += 1
        context._obj.value = 1000 + device

    def _cudeviceprimaryctxrelease_v2(self, device):
        self.retained -= 1

    def _cuctxpushcurrent_v2(self, context):
        self.pushed.append(context)

    def _cuctxpopcurrent_v2(self, context):
        self.pushed.pop()

    def _cuthreadexchangestreamcapturemode(self, mode):
        self.mode, mode._obj.value = mode._obj.value, self.mode

    def _custreamgetctx(self, stream, context):
        context._obj.value = self.streams[stream]

    def _cuctxgetdevice(self, device):
        device._obj.value = self.pushed[-1] % 1000

    def _cumoduleloaddata(self, module, image):
        assert self.pushed == [1003]
        assert self.mode == 2
        module._obj.value = 7000 + len(self.modules)
        self.modules[module._obj.value] = image

    def _cumoduleunload(self, module):
        assert self.pushed == [1003]
        assert self.mode == 2
        del self.modules[module]

    def _cumodulegetfunction(self, function, module, name):
        function._obj.value = module * 10

    def _cufuncsetattribute(self, function, attribute, value):
        assert attribute == 8
        self.shared[function] = value

    def _cuoccupancymaxactiveblockspermultiprocessor(self, blocks, function, threads, shared):
        assert self.pushed == [1003]
        blocks._obj.value = 5


class LaunchingCuda(FakeCuda):
    """Remembers tensor maps and launches, with the values that their pointers lead to.

    ``layout`` are the arguments behind the maps as codes of struct, ``status`` is what a launch
    returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[dict[str, Any]] = []
        self.launches: list[dict[str, Any]] = []
        self.layout = _GEMM_ARGUMENTS
        self.status = 0
        #: What streams that are captured have recorded, and graphs: number -> launches.
        self.captured: dict[int, list[dict[str, Any]]] = {}
        self.graphs: dict[int, list[dict[str, Any]]] = {}
        #: Streams that were made and are not destroyed.
        self.alive: set[int] = set()
        self.made = 0

    def _new(self, place: Any) -> int:
        self.made += 1
        place._obj.value = 0x9000 + self.made
        return place._obj.value

    def _custreamcreate(self, stream: Any, flags: int) -> None:
        assert (flags, self.mode) == (1, 2)
        self.alive.add(self._new(stream))

    def _custreamdestroy_v2(self, stream: int) -> None:
        assert stream not in self.captured or "cuStreamEndCapture" in self.refuse
        self.alive.remove(stream)

    def _custreambegincapture_v2(self, stream: int, mode: int) -> None:
        assert mode == 2
        self.captured[stream] = []

    def _custreamendcapture(self, stream: int, graph: Any) -> None:
        self.graphs[self._new(graph)] = self.captured.pop(stream)

    def _cugraphinstantiatewithflags(self, executable: Any, graph: int, flags: int) -> None:
        assert flags == 0
        self.graphs[self._new(executable)] = self.graphs[graph]

    def _cugraphdestroy(self, graph: int) -> None:
        del self.graphs[graph]

    def _cugraphexecdestroy(self, executable: int) -> None:
        assert self.mode == 2
        del self.graphs[executable]

    def _repeat(self, executable: int, stream: int) -> int:
        """Launch a graph."""
        if not self.status:
            self.launches += [launch | {"stream": stream} for launch in self.graphs[executable]]
        return self.status

    def _cutensormapencodetiled(self, location: int, *rest: Any) -> None:
        kind, rank, address, extents, strides, box, steps, *modes = rest
        assert location % 64 == 0
        self.maps.append(
            {
                "kind": kind,
                "address": address,
                "extents": tuple(extents),
                "stride": tuple(strides),
                "box": tuple(box),
            }
        )
        # Two dimensions, elements side by side; not interleaved, swizzled over 64 or 128 bytes,
        # promoted to 256 in L2, zeros outside.
        row = box[0] * {0: 1, 6: 2, 7: 4, 9: 2}[kind]
        swizzle = {64: 2, 128: 3}[row]
        assert (rank, tuple(steps), modes) == (2, (1, 1), [0, swizzle, 3, 0])
        ctypes.memmove(location, struct.pack("<16q", len(self.maps), *[-1] * 15), 128)

    def raw(self, name: str) -> Any:
        mine = {
            "cuLaunchKernel": self._launch,
            "cuLaunchKernelEx": self._launch_with_settings,
            "cuGraphLaunch": self._repeat,
        }
        return mine[name] if name in mine else super().raw(name)

    def _launch_with_settings(self, settings: int, function: int, pointers: Any, extra: Any) -> int:
        """Reads CUlaunchConfig as cuda.h lays it out."""
        words = struct.unpack("<7I4xQQI", ctypes.string_at(settings, 52))
        *shape, stream, attributes, count = words
        status = self._launch(function, *shape, stream, pointers, extra)
        kinds = [
            struct.unpack("<i4xi", ctypes.string_at(attributes + 72 * i, 12)) for i in range(count)
        ]
        self.captured.get(stream, self.launches)[-1]["attributes"] = kinds
        return status

    def _launch(self, function: int, *rest: Any) -> int:
        gx, gy, gz, bx, by, bz, shared, stream, pointers, extra = rest
        assert (gy, gz, by, bz, extra) == (1, 1, 1, 1, None)
        addresses = list(pointers)
        maps = addresses[: len(addresses) - len(self.layout)]
        values = [
            struct.unpack(code, ctypes.string_at(address, struct.calcsize(code)))[0]
            for code, address in zip(self.layout, addresses[len(maps) :], strict=True)
        ]
        self.captured.get(stream, self.launches).append(
            {
                "function": function,
                "blocks": gx,
                "threads": bx,
                "shared": shared,
                "stream": stream,
                "maps": [ctypes.c_int64.from_address(address).value for address in maps],
                "values": values,
            }
        )
        return self.status


class FakeKernels:
    """Stands for a device's KernelCache."""

    def __init__(self, sm_count: int = 132) -> None:
        self.cuda = LaunchingCuda()
        self.limits = DeviceLimits((9, 0), sm_count, HOPPER_SHARED_BYTES)
        self.loaded: list[tuple[KernelSpec, int]] = []
        #: What was compiled ahead, and how much was loaded before.
        self.ahead: list[tuple[set[KernelSpec], int]] = []

    def compile_ahead(self, specs: Any) -> None:
        self.ahead.append((set(specs), len(self.loaded)))

    def load(self, spec: KernelSpec, *, shared_bytes: int = 0) -> Kernel:
        self.loaded.append((spec, shared_bytes))
        return Kernel(spec, 700 + len(self.loaded), Resources(168, 0, 0, 0))


class CountingNvrtc(Nvrtc):
    """The real compiler, which counts what it compiles."""

    def __init__(self) -> None:
        super().__init__(load("nvrtc"))
        self.compiled = 0

    def raw(self, name):
        if name == "nvrtcCompileProgram":
            self.compiled += 1
        return super().raw(name)
