"""cuSPARSELt through ctypes, versions 0.7 to 0.10: 2:4 sparse matrix products.

:class:`CuSparseLt` has one checked method per C function.  On top of it, :class:`Handle`,
:class:`MatDescriptor`, :class:`MatmulDescriptor`, :class:`AlgSelection` and :class:`MatmulPlan` own
the opaque structures: each stays at its address, keeps alive what it was made from, and is
destroyed after everything that was made from it.

A handle belongs to the device that is current when it is made, and only one call at a time may use
it: take one per (device, thread) from :mod:`slidesparse_rt.ffi.handles`.  Pointers are integers;
device pointers must be 16-byte aligned.  Shapes, types and layouts that the library does not have
are refused by the library itself (status NOT_SUPPORTED or INVALID_VALUE), as LibraryError.

Source: cusparseLt.h of 0.7.1, 0.8.0, 0.8.1, 0.9.0 and 0.10.0, whose signatures and codes agree.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from contextlib import nullcontext
from ctypes import byref, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from enum import IntEnum
from typing import Any, ClassVar, Generic

from ..errors import OptionError
from .checked import Attribute, AttributeT, CLibrary, DataType, declare, functions
from .libraries import load
from .objects import Anchor, Around, Gate, Memory, Resource

__all__ = [
    "AlgAttribute",
    "AlgSelection",
    "Compute",
    "CuSparseLt",
    "DataType",
    "Handle",
    "MatAttribute",
    "MatDescriptor",
    "MatmulAlg",
    "MatmulAttribute",
    "MatmulDescriptor",
    "MatmulPlan",
    "Operation",
    "Order",
    "PruneAlg",
    "ScaleMode",
    "Sparsity",
    "SplitKMode",
    "Status",
    "library",
]

# --- codes ----------------------------------------------------------------------------------------


class Status(IntEnum):
    """``cusparseStatus_t``."""

    SUCCESS = 0
    NOT_INITIALIZED = 1
    ALLOC_FAILED = 2
    INVALID_VALUE = 3
    ARCH_MISMATCH = 4
    MAPPING_ERROR = 5
    EXECUTION_FAILED = 6
    INTERNAL_ERROR = 7
    MATRIX_TYPE_NOT_SUPPORTED = 8
    ZERO_PIVOT = 9
    NOT_SUPPORTED = 10
    INSUFFICIENT_RESOURCES = 11


class Compute(IntEnum):
    """``cusparseComputeType``: the type of the accumulator."""

    I32 = 0
    F16 = 1
    F32 = 2


class Order(IntEnum):
    """``cusparseOrder_t``."""

    COL = 1
    ROW = 2


class Operation(IntEnum):
    """``cusparseOperation_t``."""

    N = 0
    T = 1


class Sparsity(IntEnum):
    """``cusparseLtSparsity_t``."""

    HALF = 0


class PruneAlg(IntEnum):
    """``cusparseLtPruneAlg_t``."""

    TILE = 0
    STRIP = 1


class MatmulAlg(IntEnum):
    """``cusparseLtMatmulAlg_t``."""

    DEFAULT = 0


class SplitKMode(IntEnum):
    """``cusparseLtSplitKMode_t``."""

    INVALID = 0
    ONE_KERNEL = 1
    TWO_KERNELS = 2
    HEURISTIC = 3
    DATAPARALLEL = 4
    SPLITK = 5
    STREAMK = 6


class ScaleMode(IntEnum):
    """``cusparseLtMatmulMatrixScale_t``: how the scale of a matrix is laid out."""

    NONE = 0
    SCALAR_F32 = 1
    VEC32_UE4M3 = 2
    VEC64_UE8M0 = 3


class MatAttribute(Attribute):
    """``cusparseLtMatDescAttribute_t``."""

    NUM_BATCHES = 0, c_int32
    BATCH_STRIDE = 1, c_int64


class MatmulAttribute(Attribute):
    """``cusparseLtMatmulDescAttribute_t``; modes hold a :class:`ScaleMode`."""

    ACTIVATION_RELU = 0, c_int32
    ACTIVATION_RELU_UPPERBOUND = 1, c_float
    ACTIVATION_RELU_THRESHOLD = 2, c_float
    ACTIVATION_GELU = 3, c_int32
    ACTIVATION_GELU_SCALING = 4, c_float
    ALPHA_VECTOR_SCALING = 5, c_int32
    BETA_VECTOR_SCALING = 6, c_int32
    BIAS_STRIDE = 7, c_int64
    BIAS_POINTER = 8, c_void_p
    SPARSE_MAT_POINTER = 9, c_void_p
    A_SCALE_MODE = 10, c_int32
    B_SCALE_MODE = 11, c_int32
    C_SCALE_MODE = 12, c_int32
    D_SCALE_MODE = 13, c_int32
    D_OUT_SCALE_MODE = 14, c_int32
    A_SCALE_POINTER = 15, c_void_p
    B_SCALE_POINTER = 16, c_void_p
    C_SCALE_POINTER = 17, c_void_p
    D_SCALE_POINTER = 18, c_void_p
    D_OUT_SCALE_POINTER = 19, c_void_p


class AlgAttribute(Attribute):
    """``cusparseLtMatmulAlgAttribute_t``; config ids lie in [0, CONFIG_MAX_ID)."""

    CONFIG_ID = 0, c_int32
    CONFIG_MAX_ID = 1, c_int32
    SEARCH_ITERATIONS = 2, c_int32
    SPLIT_K = 3, c_int32
    SPLIT_K_MODE = 4, c_int32
    SPLIT_K_BUFFERS = 5, c_int32


# --- functions ------------------------------------------------------------------------------------

_ATTRIBUTE = "attribute:int data size:size"
_MATRIX = "handle matrix rows:i64 cols:i64 ld:i64 alignment:u32 value_type:int order:int"
_MATMUL = "handle matmul op_a:int op_b:int a b c d compute:int"
_COMPRESS = "handle matrix is_a:int operation:int source target buffer stream"
_PRODUCT = "handle plan alpha a b beta c d workspace streams stream_count:i32"


class CuSparseLt(CLibrary):
    """The C functions of one loaded cuSPARSELt."""

    STATUS = Status
    STATUS_PREFIX = "CUSPARSE_STATUS_"
    OUT_OF_MEMORY = Status.ALLOC_FAILED
    DESCRIBE = "cusparseLtGetErrorString"
    NOT_HERE = frozenset({Status.NOT_INITIALIZED, Status.ARCH_MISMATCH})
    NEEDS = "an NVIDIA GPU of compute capability 8.0 or newer"
    ADVICE: ClassVar[Mapping[int, str]] = {
        Status.NOT_INITIALIZED: "no usable GPU or driver, or an object that was not initialized",
        Status.ALLOC_FAILED: "free host or device memory and try again",
        Status.INVALID_VALUE: "an argument, a multiple or an alignment is outside what it takes",
        Status.ARCH_MISMATCH: "this GPU lacks what the call needs",
        Status.EXECUTION_FAILED: "the GPU reported an error, of this launch or of an earlier one",
        Status.NOT_SUPPORTED: "this version has no kernel for these types, layout and epilogue on "
        "this GPU",
        Status.INSUFFICIENT_RESOURCES: "the GPU has too little memory or shared memory left",
    }
    FUNCTIONS = functions(
        declare("cusparseLtInit", "handle"),
        declare("cusparseLtDestroy", "handle"),
        declare("cusparseLtGetVersion", "handle version"),
        declare("cusparseLtGetProperty", "which:int value"),
        declare("cusparseLtGetErrorName", "status:int", returns=c_char_p, since=(0, 8)),
        declare("cusparseLtGetErrorString", "status:int", returns=c_char_p, since=(0, 8)),
        declare("cusparseLtDenseDescriptorInit", _MATRIX),
        declare("cusparseLtStructuredDescriptorInit", _MATRIX + " sparsity:int"),
        declare("cusparseLtMatDescriptorDestroy", "matrix"),
        declare("cusparseLtMatDescSetAttribute", "handle matrix " + _ATTRIBUTE),
        declare("cusparseLtMatDescGetAttribute", "handle matrix " + _ATTRIBUTE),
        declare("cusparseLtMatmulDescriptorInit", _MATMUL),
        declare("cusparseLtMatmulDescSetAttribute", "handle matmul " + _ATTRIBUTE),
        declare("cusparseLtMatmulDescGetAttribute", "handle matmul " + _ATTRIBUTE),
        declare("cusparseLtMatmulAlgSelectionInit", "handle selection matmul algorithm:int"),
        declare("cusparseLtMatmulAlgSelectionDestroy", "selection", since=(0, 8)),
        declare("cusparseLtMatmulAlgSetAttribute", "handle selection " + _ATTRIBUTE),
        declare("cusparseLtMatmulAlgGetAttribute", "handle selection " + _ATTRIBUTE),
        declare("cusparseLtMatmulGetWorkspace", "handle plan size"),
        declare("cusparseLtMatmulPlanInit", "handle plan matmul selection"),
        declare("cusparseLtMatmulPlanDestroy", "plan"),
        declare("cusparseLtMatmul", _PRODUCT),
        declare("cusparseLtMatmulSearch", _PRODUCT),
        declare("cusparseLtSpMMAPrune", "handle matmul source target algorithm:int stream"),
        declare("cusparseLtSpMMAPruneCheck", "handle matmul source invalid stream"),
        declare("cusparseLtSpMMACompressedSize", "handle plan size buffer_size"),
        declare("cusparseLtSpMMACompress", "handle plan source target buffer stream"),
        declare("cusparseLtSpMMACompressedSize2", "handle matrix size buffer_size"),
        declare("cusparseLtSpMMACompress2", _COMPRESS),
    )


@functools.cache
def library() -> CuSparseLt:
    """Return this process's cuSPARSELt; BackendUnavailable if it is missing or older than 0.7."""
    return CuSparseLt(load("cusparseLt"))


# --- objects --------------------------------------------------------------------------------------

#: Opaque structures take 1024 bytes in 0.7 and 512, aligned to 16, from 0.8 on.
OPAQUE_BYTES = 1024
OPAQUE_ALIGNMENT = 64


class Handle(Resource):
    """A cuSPARSELt handle on the device that is current while it is made.

    Parameters
    ----------
    device:
        Index of that device; the caller makes it current, or ``around`` does.
    lib:
        The library to use; ``None`` is this process's.
    around:
        Makes a context manager inside which ``device`` is current; the handle is made in it, and
        the handle and all that is made from it are destroyed in it.

    Raises
    ------
    BackendUnavailable
        The library is missing, there is no usable GPU, or the GPU lacks 2:4 sparse tensor cores.
    LibraryError
        Anything else that the library refuses.
    """

    def __init__(
        self, device: int, *, lib: CuSparseLt | None = None, around: Around = nullcontext
    ) -> None:
        lib = lib if lib is not None else library()
        gate, memory = Gate(around), _opaque()
        with gate.around():
            lib.start("cusparseLtInit", memory.address, device)
        self.device = device
        self.library = lib
        self.gate = gate
        super().__init__(memory, destroy=lib.cusparseLtDestroy, gate=gate)


class _Child(Resource):
    """An object made from a handle; ``parents[0]`` is the handle's anchor."""

    def __init__(
        self, handle: Handle, memory: Memory, destroyer: str, parents: tuple[Anchor, ...]
    ) -> None:
        self.handle = handle
        lib = handle.library
        destroy = getattr(lib, destroyer) if destroyer and lib.has(destroyer) else None
        super().__init__(memory, destroy=destroy, gate=handle.gate, parents=parents)

    def _call(self, name: str, *arguments: Any) -> None:
        """Call ``name(handle, this object, *arguments)``, in turn with other calls."""
        anchor = self.hold()
        with self.handle.gate:
            getattr(self.handle.library, name)(
                anchor.parents[0].memory.address, anchor.memory.address, *arguments
            )

    def _sizes(self, name: str) -> tuple[int, int]:
        size, buffer_size = c_size_t(), c_size_t()
        self._call(name, byref(size), byref(buffer_size))
        return size.value, buffer_size.value


class _Described(_Child, Generic[AttributeT]):
    """A child with attributes."""

    _PREFIX = ""

    def set(self, attribute: AttributeT, value: float) -> None:
        """Set one attribute; a pointer is the address that the library shall read from."""
        cell = attribute.cell(value)
        size = ctypes.sizeof(cell)
        self._call(f"{self._PREFIX}SetAttribute", attribute, byref(cell), size)

    def get(self, attribute: AttributeT) -> Any:
        """Return one attribute, an int or a float; a null pointer is 0."""
        cell = attribute.cell()
        size = ctypes.sizeof(cell)
        self._call(f"{self._PREFIX}GetAttribute", attribute, byref(cell), size)
        return cell.value or 0


def _opaque() -> Memory:
    return Memory(OPAQUE_BYTES, OPAQUE_ALIGNMENT)


class MatDescriptor(_Described[MatAttribute]):
    """Shape, type and order of one matrix.

    Parameters
    ----------
    handle:
        The handle to make it with.
    rows, cols, ld:
        Extents and leading dimension in elements.
    value_type:
        Type of the elements.
    order:
        Whether columns or rows are contiguous.
    structured:
        Whether this is the 2:4 sparse operand.
    alignment:
        Bytes that the matrix's address will be a multiple of.
    """

    _PREFIX = "cusparseLtMatDesc"

    def __init__(
        self,
        handle: Handle,
        rows: int,
        cols: int,
        ld: int,
        value_type: DataType,
        order: Order = Order.COL,
        *,
        structured: bool = False,
        alignment: int = 16,
    ) -> None:
        parents = (handle.hold(),)
        memory, lib = _opaque(), handle.library
        arguments = (parents[0].memory.address, memory.address, rows, cols, ld)
        with handle.gate:
            if structured:
                lib.cusparseLtStructuredDescriptorInit(
                    *arguments, alignment, value_type, order, Sparsity.HALF
                )
            else:
                lib.cusparseLtDenseDescriptorInit(*arguments, alignment, value_type, order)
        super().__init__(handle, memory, "cusparseLtMatDescriptorDestroy", parents)

    def compressed_size(self) -> tuple[int, int]:
        """Return (bytes of the compressed matrix, bytes of scratch to compress it)."""
        return self._sizes("cusparseLtSpMMACompressedSize2")

    def compress(
        self,
        source: int,
        target: int,
        buffer: int,
        stream: int,
        *,
        is_a: bool = True,
        operation: Operation = Operation.N,
    ) -> None:
        """Compress the 2:4 sparse matrix at ``source`` into ``target`` (device pointers)."""
        self._call("cusparseLtSpMMACompress2", int(is_a), operation, source, target, buffer, stream)


class MatmulDescriptor(_Described[MatmulAttribute]):
    """A product D = alpha op(A) op(B) + beta C with its epilogue.

    Parameters
    ----------
    operations:
        Whether A and whether B is transposed.
    matrices:
        A, B, C and D, all made with one handle; A or B is the structured one.
    compute:
        Type of the accumulator.
    """

    _PREFIX = "cusparseLtMatmulDesc"

    def __init__(
        self,
        operations: tuple[Operation, Operation],
        matrices: tuple[MatDescriptor, MatDescriptor, MatDescriptor, MatDescriptor],
        compute: Compute,
    ) -> None:
        handle = matrices[0].handle
        if any(matrix.handle is not handle for matrix in matrices):
            raise OptionError("the matrices of one product must be made with one handle")
        parents = (handle.hold(), *(matrix.hold() for matrix in matrices))
        at, *abcd = (parent.memory.address for parent in parents)
        memory = _opaque()
        with handle.gate:
            handle.library.cusparseLtMatmulDescriptorInit(
                at, memory.address, *operations, *abcd, compute
            )
        # The library has no function to destroy it.
        super().__init__(handle, memory, "", parents)

    def prune(
        self, source: int, target: int, stream: int, *, algorithm: PruneAlg = PruneAlg.STRIP
    ) -> None:
        """Prune the structured operand at ``source`` to 2:4, into ``target`` (device pointers)."""
        self._call("cusparseLtSpMMAPrune", source, target, algorithm, stream)

    def prune_check(self, source: int, invalid: int, stream: int) -> None:
        """Write a nonzero int32 to ``invalid`` (device pointer) if ``source`` is not 2:4 sparse."""
        self._call("cusparseLtSpMMAPruneCheck", source, invalid, stream)


class AlgSelection(_Described[AlgAttribute]):
    """The algorithm that a product runs with: a config id and how it splits K.

    Attributes count in plans made afterwards; after a search they are what the search chose.
    """

    _PREFIX = "cusparseLtMatmulAlg"

    def __init__(self, matmul: MatmulDescriptor, algorithm: MatmulAlg = MatmulAlg.DEFAULT) -> None:
        handle = matmul.handle
        parents = (handle.hold(), matmul.hold())
        memory = _opaque()
        with handle.gate:
            handle.library.cusparseLtMatmulAlgSelectionInit(
                parents[0].memory.address, memory.address, parents[1].memory.address, algorithm
            )
        self.matmul = matmul
        super().__init__(handle, memory, "cusparseLtMatmulAlgSelectionDestroy", parents)


class MatmulPlan(_Child):
    """A product that is ready to run.

    :meth:`matmul` launches and returns: it neither allocates nor synchronizes, and can be captured
    in a CUDA graph.
    """

    def __init__(self, selection: AlgSelection) -> None:
        handle = selection.handle
        parents = (handle.hold(), selection.hold(), selection.matmul.hold())
        memory, lib = _opaque(), handle.library
        with handle.gate:
            lib.cusparseLtMatmulPlanInit(
                parents[0].memory.address,
                memory.address,
                parents[2].memory.address,
                parents[1].memory.address,
            )
        super().__init__(handle, memory, "cusparseLtMatmulPlanDestroy", parents)
        # Everything that stays the same from launch to launch, converted once.
        self._lock = handle.gate.lock
        self._launch = lib.raw("cusparseLtMatmul")
        self._at = (c_void_p(parents[0].memory.address), c_void_p(memory.address))
        self._stream = c_void_p()
        self._streams = byref(self._stream)

    def workspace_bytes(self) -> int:
        """Return the bytes of device workspace that a launch needs; ask again after a search."""
        size = c_size_t()
        self._call("cusparseLtMatmulGetWorkspace", byref(size))
        return size.value

    def compressed_size(self) -> tuple[int, int]:
        """Return (bytes of the compressed operand, bytes of scratch to compress it)."""
        return self._sizes("cusparseLtSpMMACompressedSize")

    def compress(self, source: int, target: int, buffer: int, stream: int) -> None:
        """Compress the structured operand at ``source`` into ``target`` (device pointers)."""
        self._call("cusparseLtSpMMACompress", source, target, buffer, stream)

    def matmul(
        self, alpha: int, a: int, b: int, beta: int, c: int, d: int, workspace: int, stream: int
    ) -> None:
        """Launch D = alpha op(A) op(B) + beta C.

        Parameters
        ----------
        alpha, beta:
            Host pointers to float32 (device vectors where the descriptor scales by vectors).
        a, b, c, d:
            Device pointers, 16-byte aligned; the structured operand compressed.  ``c`` must not be
            null even where beta is zero.
        workspace:
            Device pointer to at least :meth:`workspace_bytes`; 0 where none is needed.
        stream:
            The CUDA stream; 0 is the default stream.

        Raises
        ------
        LibraryError
            The library refused the launch.
        PlanClosed
            The plan was closed.
        """
        handle, plan = self._at
        with self._lock:
            if not self._memory.open:
                raise self.gone()
            self._stream.value = stream
            status = self._launch(
                handle, plan, alpha, a, b, beta, c, d, workspace, self._streams, 1
            )
        if status:
            arguments = (handle, plan, alpha, a, b, beta, c, d, workspace, c_void_p(stream), 1)
            raise self.handle.library.error("cusparseLtMatmul", status, arguments)

    def search(
        self, alpha: int, a: int, b: int, beta: int, c: int, d: int, workspace: int, stream: int
    ) -> None:
        """Time the library's algorithms on these operands and keep the fastest in the plan.

        It overwrites D and synchronizes.  Afterwards the selection holds what was chosen, and
        :meth:`workspace_bytes` may answer differently.  Arguments are those of :meth:`matmul`.
        """
        streams = c_void_p(stream)
        self._call("cusparseLtMatmulSearch", alpha, a, b, beta, c, d, workspace, byref(streams), 1)
