"""cuBLASLt through ctypes, versions 12 and 13: the part that a dense matrix product needs.

:class:`CublasLt` has one checked method per C function.  On top of it, :class:`Handle`,
:class:`MatrixLayout`, :class:`MatmulDescriptor` and :class:`Preference` own the library's objects,
:func:`heuristic` asks for algorithms, and :class:`Matmul` launches one.

Take one handle per (device, thread) from :mod:`slidesparse_rt.ffi.handles`.  Layouts, descriptors
and preferences belong to no device; share them between threads only if nobody changes them.
Pointers are integers.

Sources: cublasLt.h and cublas_api.h of 12.8.4, 12.9.1, 13.0.0 and 13.10.0, which agree in all that
is here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Generic, NamedTuple

from ..errors import FormatError, LibraryError
from .checked import Attribute, AttributeT, CLibrary, DataType, declare, functions
from .libraries import load
from .objects import Anchor, Around, Gate, Memory, Resource

__all__ = [
    "ALGORITHM_BYTES",
    "AlgorithmAttribute",
    "Candidate",
    "Compute",
    "CublasLt",
    "DataType",
    "Epilogue",
    "Handle",
    "LayoutAttribute",
    "Layouts",
    "Matmul",
    "MatmulAttribute",
    "MatmulDescriptor",
    "MatrixLayout",
    "Operation",
    "Order",
    "PointerMode",
    "Preference",
    "PreferenceAttribute",
    "ReductionScheme",
    "ScaleMode",
    "Status",
    "check",
    "describe",
    "heuristic",
    "library",
    "supports_outer_vector_scales",
]

# --- codes ----------------------------------------------------------------------------------------


class Status(IntEnum):
    """``cublasStatus_t``."""

    SUCCESS = 0
    NOT_INITIALIZED = 1
    ALLOC_FAILED = 3
    INVALID_VALUE = 7
    ARCH_MISMATCH = 8
    MAPPING_ERROR = 11
    EXECUTION_FAILED = 13
    INTERNAL_ERROR = 14
    NOT_SUPPORTED = 15
    LICENSE_ERROR = 16


class Compute(IntEnum):
    """``cublasComputeType_t``: the type of the accumulator (those that this package uses)."""

    F16 = 64
    F32 = 68
    I32 = 72


class Operation(IntEnum):
    """``cublasOperation_t``."""

    N = 0
    T = 1


class Order(IntEnum):
    """``cublasLtOrder_t``."""

    COL = 0
    ROW = 1


class PointerMode(IntEnum):
    """``cublasLtPointerMode_t``: where alpha and beta are; device vectors have a value per row."""

    HOST = 0
    DEVICE = 1
    DEVICE_VECTOR = 2
    ALPHA_DEVICE_VECTOR_BETA_ZERO = 3
    ALPHA_DEVICE_VECTOR_BETA_HOST = 4


class Epilogue(IntEnum):
    """``cublasLtEpilogue_t``; a bias has a value per row of D."""

    DEFAULT = 1
    RELU = 2
    BIAS = 4
    RELU_BIAS = 6
    GELU = 32
    GELU_BIAS = 36


class ScaleMode(IntEnum):
    """``cublasLtMatmulMatrixScale_t``: how the scale of a matrix is laid out.

    OUTER_VEC_F32 is one float32 per row of op(A), or per column of op(B); see
    :func:`supports_outer_vector_scales`, as a library without it takes the code without complaint.
    """

    SCALAR_F32 = 0
    VEC16_UE4M3 = 1
    VEC32_UE8M0 = 2
    OUTER_VEC_F32 = 3
    VEC128_F32 = 4
    BLK128X128_F32 = 5


class ReductionScheme(IntEnum):
    """``cublasLtReductionScheme_t``: how split K is summed; the members are bits of a mask."""

    NONE = 0
    INPLACE = 1
    COMPUTE_TYPE = 2
    OUTPUT_TYPE = 4
    MASK = 7


class LayoutAttribute(Attribute):
    """``cublasLtMatrixLayoutAttribute_t``."""

    TYPE = 0, ctypes.c_uint32
    ORDER = 1, ctypes.c_int32
    ROWS = 2, ctypes.c_uint64
    COLS = 3, ctypes.c_uint64
    LD = 4, ctypes.c_int64
    BATCH_COUNT = 5, ctypes.c_int32
    STRIDED_BATCH_OFFSET = 6, ctypes.c_int64


class MatmulAttribute(Attribute):
    """``cublasLtMatmulDescAttributes_t``; scale and bias pointers are device pointers."""

    COMPUTE_TYPE = 0, ctypes.c_int32
    SCALE_TYPE = 1, ctypes.c_int32
    POINTER_MODE = 2, ctypes.c_int32
    TRANSA = 3, ctypes.c_int32
    TRANSB = 4, ctypes.c_int32
    EPILOGUE = 7, ctypes.c_uint32
    BIAS_POINTER = 8, ctypes.c_void_p
    SM_COUNT_TARGET = 15, ctypes.c_int32
    A_SCALE_POINTER = 17, ctypes.c_void_p
    B_SCALE_POINTER = 18, ctypes.c_void_p
    C_SCALE_POINTER = 19, ctypes.c_void_p
    D_SCALE_POINTER = 20, ctypes.c_void_p
    FAST_ACCUM = 25, ctypes.c_int8
    BIAS_DATA_TYPE = 26, ctypes.c_int32
    A_SCALE_MODE = 31, ctypes.c_int32
    B_SCALE_MODE = 32, ctypes.c_int32
    C_SCALE_MODE = 33, ctypes.c_int32
    D_SCALE_MODE = 34, ctypes.c_int32


class PreferenceAttribute(Attribute):
    """``cublasLtMatmulPreferenceAttributes_t``; alignments are of the addresses, in bytes."""

    SEARCH_MODE = 0, ctypes.c_uint32
    MAX_WORKSPACE_BYTES = 1, ctypes.c_uint64
    REDUCTION_SCHEME_MASK = 3, ctypes.c_uint32
    MIN_ALIGNMENT_A_BYTES = 5, ctypes.c_uint32
    MIN_ALIGNMENT_B_BYTES = 6, ctypes.c_uint32
    MIN_ALIGNMENT_C_BYTES = 7, ctypes.c_uint32
    MIN_ALIGNMENT_D_BYTES = 8, ctypes.c_uint32
    MAX_WAVES_COUNT = 9, ctypes.c_float
    IMPL_MASK = 12, ctypes.c_uint64


class AlgorithmAttribute(Attribute):
    """``cublasLtMatmulAlgoConfigAttributes_t``."""

    ID = 0, ctypes.c_int32
    TILE_ID = 1, ctypes.c_uint32
    SPLITK_NUM = 2, ctypes.c_int32
    REDUCTION_SCHEME = 3, ctypes.c_uint32
    CTA_SWIZZLING = 4, ctypes.c_uint32
    CUSTOM_OPTION = 5, ctypes.c_uint32
    STAGES_ID = 6, ctypes.c_uint32
    INNER_SHAPE_ID = 7, ctypes.c_uint16
    CLUSTER_SHAPE_ID = 8, ctypes.c_uint16


#: ``sizeof(cublasLtMatmulAlgo_t)``.
ALGORITHM_BYTES = 64


class HeuristicResult(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``: 96 bytes, fields at 0, 64, 72, 76 and 80 (x86-64).

    A C compiler gives these offsets with the header of each version named above.
    """

    _fields_: ClassVar[Any] = [
        ("algorithm", ctypes.c_uint64 * (ALGORITHM_BYTES // 8)),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


def supports_outer_vector_scales(
    version: tuple[int, ...], compute_capability: tuple[int, int]
) -> bool:
    """Whether an FP8 product can take a scale per row of A and per column of B.

    cuBLAS 12.9 brought the mode, and it runs on compute capability 9.0 alone; D is float16,
    bfloat16 or float32 (cuBLAS documentation, "Scaling Mode Support Overview").  Older libraries
    take the attribute silently, so ask here before setting it.

    Parameters
    ----------
    version:
        The library's, such as ``(12, 9, 1)``.
    compute_capability:
        The GPU's, such as ``(9, 0)``.
    """
    return version[:2] >= (12, 9) and compute_capability == (9, 0)


# --- functions ------------------------------------------------------------------------------------

_SET = " attribute:int data size:size"
_GET = _SET + " written"
_FOUR = "handle matmul a b c d"
_MATMUL = (
    "handle matmul alpha a a_layout b b_layout beta c c_layout d d_layout algorithm workspace "
    "workspace_bytes:size stream"
)


class CublasLt(CLibrary):
    """The C functions of one loaded cuBLASLt."""

    STATUS = Status
    STATUS_PREFIX = "CUBLAS_STATUS_"
    OUT_OF_MEMORY = Status.ALLOC_FAILED
    DESCRIBE = "cublasLtGetStatusString"
    NOT_HERE = frozenset({Status.NOT_INITIALIZED, Status.ARCH_MISMATCH})
    NEEDS = "an NVIDIA GPU"
    ADVICE: ClassVar[Mapping[int, str]] = {
        Status.NOT_INITIALIZED: "no usable GPU or driver",
        Status.ALLOC_FAILED: "free host or device memory and try again",
        Status.EXECUTION_FAILED: "the error may stem from an earlier launch",
        Status.NOT_SUPPORTED: "this version has no kernel for these types, layouts, alignments and "
        "epilogue on this GPU",
    }
    FUNCTIONS = functions(
        declare("cublasLtCreate", "handle"),
        declare("cublasLtDestroy", "handle"),
        declare("cublasLtGetVersion", "", returns=ctypes.c_size_t),
        declare("cublasLtGetCudartVersion", "", returns=ctypes.c_size_t),
        declare("cublasLtGetProperty", "which:int value"),
        declare("cublasLtGetStatusName", "status:int", returns=ctypes.c_char_p),
        declare("cublasLtGetStatusString", "status:int", returns=ctypes.c_char_p),
        declare("cublasLtMatrixLayoutCreate", "layout value_type:int rows:u64 cols:u64 ld:i64"),
        declare("cublasLtMatrixLayoutDestroy", "layout"),
        declare("cublasLtMatrixLayoutSetAttribute", "layout" + _SET),
        declare("cublasLtMatrixLayoutGetAttribute", "layout" + _GET),
        declare("cublasLtMatmulDescCreate", "matmul compute:int scale_type:int"),
        declare("cublasLtMatmulDescDestroy", "matmul"),
        declare("cublasLtMatmulDescSetAttribute", "matmul" + _SET),
        declare("cublasLtMatmulDescGetAttribute", "matmul" + _GET),
        declare("cublasLtMatmulPreferenceCreate", "preference"),
        declare("cublasLtMatmulPreferenceDestroy", "preference"),
        declare("cublasLtMatmulPreferenceSetAttribute", "preference" + _SET),
        declare("cublasLtMatmulPreferenceGetAttribute", "preference" + _GET),
        declare("cublasLtMatmulAlgoGetHeuristic", _FOUR + " preference wanted:int results found"),
        declare("cublasLtMatmulAlgoCheck", _FOUR + " algorithm result"),
        declare("cublasLtMatmulAlgoConfigGetAttribute", "algorithm" + _GET),
        declare("cublasLtMatmul", _MATMUL),
    )


@functools.cache
def library() -> CublasLt:
    """Return this process's cuBLASLt; BackendUnavailable if it is missing or older than 12."""
    return CublasLt(load("cublasLt"))


# --- objects --------------------------------------------------------------------------------------


class Handle(Resource):
    """A cuBLASLt handle on the device that is current while it is made.

    Parameters
    ----------
    device:
        Index of that device; the caller makes it current, or ``around`` does.
    lib:
        The library to use; ``None`` is this process's.
    around:
        Makes a context manager inside which ``device`` is current; the handle is made and destroyed
        in it.

    Raises
    ------
    BackendUnavailable
        The library is missing, or there is no usable GPU.
    LibraryError
        Anything else that the library refuses.
    """

    def __init__(
        self, device: int, *, lib: CublasLt | None = None, around: Around = nullcontext
    ) -> None:
        lib = lib if lib is not None else library()
        gate, pointer = Gate(around), ctypes.c_void_p()
        with gate.around():
            lib.start("cublasLtCreate", ctypes.byref(pointer), device)
        self.device = device
        self.library = lib
        self.gate = gate
        super().__init__(_at(pointer), destroy=lib.cublasLtDestroy, gate=gate)


def _at(pointer: ctypes.c_void_p) -> Memory:
    """Return the place of an object whose memory the library holds."""
    return Memory(address=pointer.value or 0)


class _Described(Resource, Generic[AttributeT]):
    """An object of host memory with attributes, which belongs to no handle."""

    _PREFIX = ""

    def __init__(self, lib: CublasLt, *arguments: Any) -> None:
        pointer = ctypes.c_void_p()
        getattr(lib, f"{self._PREFIX}Create")(ctypes.byref(pointer), *arguments)
        self.library = lib
        self._setter = getattr(lib, f"{self._PREFIX}SetAttribute")
        super().__init__(_at(pointer), destroy=getattr(lib, f"{self._PREFIX}Destroy"))

    def set(self, attribute: AttributeT, value: float) -> None:
        """Set one attribute; a pointer is the address that the library shall read from."""
        held, cell = self.hold(), attribute.cell(value)
        self._setter(held.memory.address, attribute, ctypes.byref(cell), ctypes.sizeof(cell))

    def get(self, attribute: AttributeT) -> Any:
        """Return one attribute, an int or a float; a null pointer is 0."""
        held, getter = self.hold(), getattr(self.library, f"{self._PREFIX}GetAttribute")
        return _read(getter, held.memory.address, attribute)


def _read(getter: Any, address: int, attribute: Attribute) -> Any:
    cell, written = attribute.cell(), ctypes.c_size_t()
    getter(address, attribute, ctypes.byref(cell), ctypes.sizeof(cell), ctypes.byref(written))
    return cell.value or 0


class MatrixLayout(_Described[LayoutAttribute]):
    """Type, extents and leading dimension of one matrix, in elements; column-major unless set."""

    _PREFIX = "cublasLtMatrixLayout"

    def __init__(self, lib: CublasLt, value_type: DataType, rows: int, cols: int, ld: int) -> None:
        super().__init__(lib, value_type, rows, cols, ld)


class MatmulDescriptor(_Described[MatmulAttribute]):
    """The operation: accumulator, type of alpha and beta, transposes, scales, epilogue."""

    _PREFIX = "cublasLtMatmulDesc"

    def __init__(self, lib: CublasLt, compute: Compute, scale_type: DataType) -> None:
        self._pointers: dict[MatmulAttribute, int] = {}
        super().__init__(lib, compute, scale_type)

    def set(self, attribute: MatmulAttribute, value: float) -> None:
        """Set one attribute; a pointer is the address that the library shall read from."""
        self._pointers.pop(attribute, None)
        super().set(attribute, value)

    def point(self, attribute: MatmulAttribute, address: int) -> None:
        """Set a pointer unless it is set to ``address`` already; for use before each launch."""
        if self._pointers.get(attribute) != address:
            self.set(attribute, address)
            self._pointers[attribute] = address


class Preference(_Described[PreferenceAttribute]):
    """What an algorithm may need; by default no workspace, and addresses aligned to 256 bytes."""

    _PREFIX = "cublasLtMatmulPreference"


class Layouts(NamedTuple):
    """The layouts of A, B, C and D."""

    a: MatrixLayout
    b: MatrixLayout
    c: MatrixLayout
    d: MatrixLayout


@dataclass(frozen=True, slots=True)
class Candidate:
    """An algorithm that can run a product.

    Attributes
    ----------
    algorithm:
        The library's own description, ALGORITHM_BYTES long; it can be stored, and used again with
        the same version of the library (see :func:`check`).
    workspace_bytes:
        Device workspace that it needs.
    waves:
        How often it fills the GPU; 1.0 is once.
    """

    algorithm: bytes
    workspace_bytes: int
    waves: float


def _hold(*resources: Resource) -> tuple[Anchor, ...]:
    """Keep ``resources`` from being destroyed; PlanClosed if one is closed."""
    return tuple(resource.hold() for resource in resources)


def _addresses(held: tuple[Anchor, ...]) -> list[int]:
    return [anchor.memory.address for anchor in held]


def _candidate(result: HeuristicResult, algorithm: bytes | None = None) -> Candidate:
    own = bytes(result.algorithm) if algorithm is None else algorithm
    return Candidate(own, result.workspace_bytes, result.waves)


def heuristic(
    handle: Handle,
    matmul: MatmulDescriptor,
    layouts: Layouts,
    preference: Preference,
    *,
    count: int = 8,
) -> list[Candidate]:
    """Return up to ``count`` algorithms, the library's favourite first.

    The list is empty if the library has none for this product on this GPU.  Set the descriptor's
    pointers first (bias, scales): the library looks at their alignment, not at what is there.
    """
    results, found = (HeuristicResult * count)(), ctypes.c_int()
    held = _hold(handle, matmul, *layouts, preference)
    with handle.gate:
        try:
            handle.library.cublasLtMatmulAlgoGetHeuristic(
                *_addresses(held), count, ctypes.byref(results), ctypes.byref(found)
            )
        except LibraryError as error:
            if error.status != Status.NOT_SUPPORTED:
                raise
            return []
    return [_candidate(row) for row in results[: found.value] if row.state == Status.SUCCESS]


def check(
    handle: Handle, matmul: MatmulDescriptor, layouts: Layouts, algorithm: bytes
) -> Candidate:
    """Return the candidate for a stored ``algorithm``; LibraryError if it does not run here."""
    source, result = _algorithm(algorithm), HeuristicResult()
    held = _hold(handle, matmul, *layouts)
    with handle.gate:
        handle.library.cublasLtMatmulAlgoCheck(
            *_addresses(held), source.address, ctypes.byref(result)
        )
    return _candidate(result, algorithm)


def describe(lib: CublasLt, algorithm: bytes) -> dict[AlgorithmAttribute, int]:
    """Return the configuration inside ``algorithm``, for people to read."""
    source, getter = _algorithm(algorithm), lib.cublasLtMatmulAlgoConfigGetAttribute
    return {key: _read(getter, source.address, key) for key in AlgorithmAttribute}


def _algorithm(stored: bytes) -> Memory:
    """Return ``stored`` in memory that C can read."""
    if len(stored) != ALGORITHM_BYTES:
        raise FormatError(
            f"a cuBLASLt algorithm has {ALGORITHM_BYTES} bytes, this one has {len(stored)}; "
            "discard it and ask the heuristic again"
        )
    memory = Memory(ALGORITHM_BYTES, 16)
    ctypes.memmove(memory.address, stored, ALGORITHM_BYTES)
    return memory


class Matmul(Resource):
    """A product that is ready to run, with one algorithm.

    It keeps the handle, the descriptor and the layouts alive.  :meth:`run` launches and returns: it
    neither allocates nor synchronizes, and can be captured in a CUDA graph.
    """

    def __init__(
        self, handle: Handle, matmul: MatmulDescriptor, layouts: Layouts, candidate: Candidate
    ) -> None:
        memory = _algorithm(candidate.algorithm)
        parents = _hold(handle, matmul, *layouts)
        super().__init__(memory, destroy=None, gate=handle.gate, parents=parents)
        self.handle = handle
        self.matmul = matmul
        self.candidate = candidate
        # Everything that stays the same from launch to launch, converted once.
        self._lock = handle.gate.lock
        self._launch = handle.library.raw("cublasLtMatmul")
        self._at = tuple(map(ctypes.c_void_p, _addresses(parents)))
        self._algorithm = ctypes.c_void_p(memory.address)

    def run(
        self,
        alpha: int,
        a: int,
        b: int,
        beta: int,
        c: int,
        d: int,
        workspace: int,
        workspace_bytes: int,
        stream: int,
    ) -> None:
        """Launch D = alpha op(A) op(B) + beta C.

        Parameters
        ----------
        alpha, beta:
            Pointers to the descriptor's scale type, on the host unless its pointer mode says
            otherwise.
        a, b, c, d:
            Device pointers.
        workspace, workspace_bytes:
            Device pointer and size, at least the candidate's ``workspace_bytes``; 0 and 0 where
            none is needed.
        stream:
            The CUDA stream; 0 is the default stream.

        Raises
        ------
        LibraryError
            The library refused the launch.
        PlanClosed
            The product was closed.
        """
        handle, matmul, la, lb, lc, ld = self._at
        product = (handle, matmul, alpha, a, la, b, lb, beta, c, lc, d, ld, self._algorithm)
        with self._lock:
            if not self._memory.open:
                raise self.gone()
            status = self._launch(*product, workspace, workspace_bytes, stream)
        if status:
            arguments = (*product, workspace, workspace_bytes, stream)
            raise self.handle.library.error("cublasLtMatmul", status, arguments)
