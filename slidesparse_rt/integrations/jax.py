"""JAX: sparse products on JAX arrays, eagerly and within ``jax.jit``.

Public as ``slidesparse_rt.jax``.  Eagerly, arrays pass through DLPack, where they lie.  Traced,
the product is a custom call through XLA's foreign function interface: XLA hands over its own
buffers and its stream, so nothing is copied and nothing waits.  ``jax.pure_callback`` is the other
route; it copies through host memory, so it serves plans on the CPU only.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ..dtypes import array_type
from ..errors import ArrayError, DeviceError, OptionError, ShapeError
from ..pattern import Pattern
from ..plan import SparseGemmPlan
from ..plan import sparse_matmul as _sparse_matmul
from .jax_ffi import TARGET, handle_of, register, supported
from .require import require

jax = require("jax", "jax", (0, 5))

__all__ = ["ROUTES", "sparse_matmul"]

#: How a traced product reaches its plan.
ROUTES = ("auto", "ffi", "callback")


def sparse_matmul(
    x: Any,
    weight: Any,
    pattern: str | Pattern | None = None,
    *,
    route: str = "auto",
    **settings: Any,
) -> Any:
    """Multiply: ``x @ weight.T + bias``, eagerly or within ``jax.jit``.

    Parameters
    ----------
    x:
        JAX array or tracer, shape (..., K), float32, float16 or bfloat16.
    weight:
        A :class:`~slidesparse_rt.SparseGemmPlan`, which a traced function must be given; or,
        eagerly, what :func:`slidesparse_rt.sparse_matmul` takes, packed for this one product.
    pattern, settings:
        As for :func:`slidesparse_rt.sparse_matmul`; none with a plan, which has its own.
    route:
        How a traced product runs.  "ffi": a custom call on XLA's own buffers and stream.
        "callback": ``jax.pure_callback``, through host memory, for plans on the CPU.  "auto": "ffi"
        where this jaxlib's interface is a known version, else "callback".

    Returns
    -------
    jax.Array
        Shape (..., N); x's type, or the plan's ``out_dtype``.

    Raises
    ------
    ArrayError
        For a traced weight, and where a derivative is asked for.
    DeviceError
        For "callback" with a plan on a GPU.
    OptionError, ShapeError, DTypeError, PlanClosed
        For arguments that are not as described.

    Notes
    -----
    ``jax.vmap`` maps over x: the mapped axis becomes tokens, in one product.  A compiled program
    does not keep its plan alive; running it once the plan is gone or closed raises JAX's own error
    with this package's message.  Errors while a program runs are JAX's.
    """
    if route not in ROUTES:
        raise OptionError(f"route {route!r} is unknown; allowed are {', '.join(map(repr, ROUTES))}")
    plan = weight if isinstance(weight, SparseGemmPlan) else None
    if plan is not None and (pattern is not None or settings):
        given = ", ".join([*(["pattern"] if pattern is not None else []), *settings])
        raise OptionError(f"{given} given with a plan, which has its own; leave them out")
    if not isinstance(x, jax.core.Tracer):
        return plan.run(x) if plan else _sparse_matmul(x, weight, pattern, **settings)
    if plan is None:
        raise ArrayError(
            "x is traced, and weight is no SparseGemmPlan; packing a weight is no traceable work: "
            "make plan = SparseGemmPlan(weight, ...) outside the traced function, and pass it"
        )
    return _traced(x, plan, _route(route, plan))


def _route(asked: str, plan: SparseGemmPlan) -> str:
    able, why = _interface()
    if asked == "ffi" and not able:
        raise OptionError(f"route 'ffi' cannot be taken: {why}; leave route out")
    if asked != "callback" and able:
        return "ffi"
    if plan.device != "cpu":
        raise DeviceError(
            f"route 'callback' goes through host memory, and the plan is on {plan.device}"
            + (f"; {why}" if why else "; leave route out")
        )
    return "callback"


@functools.cache
def _interface() -> tuple[bool, str]:
    return supported()


def _result_type(plan: SparseGemmPlan, x: Any) -> Any:
    """Type of the plan's result for an ``x``; DTypeError for one that it does not take."""
    given = array_type(x.dtype)
    return (plan._out_type or given).dtype


def _traced(x: Any, plan: SparseGemmPlan, route: str) -> Any:
    n, k = plan.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}; allowed is (..., {k}): the last extent is the "
            f"weight's K"
        )
    out = jax.ShapeDtypeStruct((*x.shape[:-1], n), _result_type(plan, x))

    @jax.custom_jvp  # type: ignore[untyped-decorator]  # seen as Any
    def product(x: Any) -> Any:
        if route == "ffi":
            register()
            call = jax.ffi.ffi_call(TARGET, out, vmap_method="expand_dims")
            return call(x, plan=np.int64(handle_of(plan)))
        return jax.pure_callback(
            lambda x: plan.run(np.asarray(x)), out, x, vmap_method="expand_dims"
        )

    @product.defjvp  # type: ignore[untyped-decorator]
    def refuse(primals: Any, tangents: Any) -> Any:
        del primals, tangents
        raise ArrayError(
            "a derivative of a sparse product is asked for, and it has none; pass "
            "jax.lax.stop_gradient(x)"
        )

    return product(x)
