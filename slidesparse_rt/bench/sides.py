"""The two sides of a product: plans for all layers of a model, ready to be captured and timed."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..backends.workspace import COUNTER_BYTES
from ..dtypes import Operand, array_type
from ..options import PlanOptions
from ..pattern import Pattern
from .shapes import Layer
from .timing import Gpu, Memory

__all__ = [
    "AUTO",
    "BF16",
    "DENSE",
    "SPARSE",
    "WORKSPACE",
    "GpuSide",
    "Output",
    "Side",
    "Work",
    "make_weights",
]

#: A plan that chooses among the backends by the number of tokens.
AUTO = "auto"
#: The backend that every other is compared with, and those that skip zeros, the fastest first.
DENSE = "dense"
SPARSE = ("hopper", "cusparselt")

#: Type of activations, weights and results.
BF16 = "bfloat16"
#: Workspace of a plan, large enough that up to 32,768 tokens no side is done in several launches.
WORKSPACE = 8 << 30


class Output(NamedTuple):
    """Where a launch leaves its output: rows (tokens) of ``columns`` elements, ``stride`` apart.

    ``scaled`` says whether scales are applied already.
    """

    pointer: int
    kind: str
    columns: int
    stride: int
    scaled: bool


class Work(NamedTuple):
    """One layer of one stage, ready to launch."""

    launch: Callable[[], None]
    output: Output
    kernels: str
    #: How each product is done, where that is known.
    how: str = ""


class _Lead(NamedTuple):
    """Everything for the product of a layer but the product."""

    prepared: Any
    product: Any
    layout: Any
    buffer: Memory
    quantize: Callable[[], None]


class Side(Protocol):
    """One backend with the plans of all layers in one format and pattern."""

    #: Type in which the library returns sums.
    sums_type: str

    @property
    def tuned(self) -> Mapping[str, str]:
        """Layer -> how it was chosen what runs; empty where a backend was named."""
        ...

    def prepare(self, tokens: Sequence[int]) -> None:
        """Compile, search and allocate for these numbers of tokens, ahead of what is timed."""
        ...

    def gemm(self, index: int, tokens: int, x: int, y: int) -> Work:
        """The product alone; quantizes x (tokens, K) at once, may write its result to ``y``."""
        ...

    def quantize(self, index: int, tokens: int, x: int, y: int) -> Callable[[], None]:
        """What the operator does ahead of its product: quantize and lift x (tokens, K)."""
        ...

    def op(self, index: int, tokens: int, x: int, y: int) -> Work:
        """The operator: bf16 x (tokens, K) to bf16 y (tokens, N)."""
        ...

    def release(self) -> None:
        """Give back what :meth:`gemm` took; its graphs must not run again."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class GpuSide:
    """A side made of :class:`~slidesparse_rt.SparseGemmPlan`.

    Parameters
    ----------
    gpu, backend, layers, weights, pattern, row:
        Where, the plans' ``backend=``, the layers with their pruned weights, and the format.
    tuning:
        ``tuning=`` of the plans where ``backend`` is "auto".
    since:
        When the benchmark began (:func:`utc_now`): what is measured later was measured by it.
    workspace_limit:
        Of the plans, in bytes.
    """

    def __init__(
        self,
        gpu: Gpu,
        backend: str,
        layers: Sequence[Layer],
        weights: Sequence[Memory],
        pattern: Pattern,
        row: Operand,
        *,
        tuning: str = "cached",
        since: str = "",
        workspace_limit: int = WORKSPACE,
    ) -> None:
        from ..plan import SparseGemmPlan

        self._gpu = gpu
        self._auto = backend == AUTO
        self._layers = layers
        chosen: dict[str, Any] = {"tuning": tuning} if self._auto else {}
        self._buffers: list[Memory] = []
        self._plans: list[Any] = []
        try:
            for layer, weight in zip(layers, weights, strict=True):
                self._plans.append(
                    SparseGemmPlan(
                        gpu.array(weight.pointer, (layer.n, layer.k), BF16),
                        pattern,
                        dtype=row,
                        backend=backend,
                        device=f"cuda:{gpu.index}",
                        options=PlanOptions(workspace_limit=workspace_limit),
                        **chosen,
                    )
                )
        except BaseException:
            self.close()
            raise
        self.tuned: dict[str, str] = {
            layer.name: _how_tuned(plan, since)
            for layer, plan in zip(layers, self._plans, strict=True)
            if self._auto
        }
        self.sums_type = _sums_type([plan._prepared for plan in self._plans])

    def prepare(self, tokens: Sequence[int]) -> None:
        """See :class:`Side`."""
        for plan in self._plans:
            plan.prepare(tokens, x_dtype=BF16, stream=self._gpu.stream)

    def gemm(self, index: int, tokens: int, x: int, y: int) -> Work:
        """See :class:`Side`.  Everything lies as in a plan's own workspace."""
        gpu, layer = self._gpu, self._layers[index]
        lead = self._lead(index, tokens, x, y)
        lead.quantize()
        prepared, product, layout, buffer = lead.prepared, lead.product, lead.layout, lead.buffer
        base = buffer.pointer + COUNTER_BYTES
        scales, scratch = base + layout.scales, base + layout.scratch
        if product.direct:
            scaled = prepared.weight.operand.scaled
            output = Output(y, BF16, layer.n, layer.n, scaled)
            words = "bfloat16 results, both scale vectors fused" if scaled else "bfloat16 results"
        else:
            sums, width = base + layout.sums, prepared.padded_n
            output = Output(sums, prepared.sums_type, layer.n, width, False)
            words = f"{prepared.sums_type} sums"

        def launch() -> None:
            product.launch(
                base, scales, output.pointer, output.stride, scratch, buffer.pointer, gpu.stream
            )

        return Work(launch, output, words, product.how)

    def quantize(self, index: int, tokens: int, x: int, y: int) -> Callable[[], None]:
        """See :class:`Side`."""
        return self._lead(index, tokens, x, y).quantize

    def _lead(self, index: int, tokens: int, x: int, y: int) -> _Lead:
        """What leads up to the product of a layer, in memory of its own."""
        gpu, layer, plan = self._gpu, self._layers[index], self._plans[index]
        # The plan offers no product without its pipeline, and should not.
        prepared = plan._prepared
        if isinstance(prepared, Mapping):
            prepared = prepared[plan.backend_for(tokens)]
        kind = array_type(BF16)
        able = prepared.can_write(kind, y, layer.n, tokens)
        product = prepared.product(tokens, kind if able else None, gpu.stream)
        layout = prepared.layout(product, tokens)
        buffer = gpu.allocate(COUNTER_BYTES + layout.nbytes)
        self._buffers.append(buffer)
        gpu.set_bytes(buffer.pointer, 0, COUNTER_BYTES)
        base = buffer.pointer + COUNTER_BYTES
        run = prepared.quantizer(kind, gpu.stream)

        def quantize() -> None:
            run(x, layer.k, base, base + layout.scales, tokens, layout.padded_tokens, gpu.stream)

        return _Lead(prepared, product, layout, buffer, quantize)

    def op(self, index: int, tokens: int, x: int, y: int) -> Work:
        """See :class:`Side`."""
        gpu, layer, plan = self._gpu, self._layers[index], self._plans[index]
        x_array = gpu.array(x, (tokens, layer.k), BF16)
        y_array = gpu.array(y, (tokens, layer.n), BF16)
        plan.prepare([tokens], x_dtype=BF16, stream=gpu.stream)

        def launch() -> None:
            plan.run(x_array, out=y_array, stream=gpu.stream)

        how = plan.backend_for(tokens) if self._auto else ""
        return Work(launch, Output(y, BF16, layer.n, layer.n, True), "SparseGemmPlan.run", how)

    def release(self) -> None:
        """See :class:`Side`."""
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()

    def close(self) -> None:
        """See :class:`Side`."""
        self.release()
        for plan in self._plans:
            plan.close()
        self._plans.clear()


def utc_now() -> str:
    """The time as tables of measured times have it: UTC in ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _how_tuned(plan: Any, since: str) -> str:
    """What a plan with backend="auto" went by: times of its own or kept ones, or the rule."""
    table = plan._selected.table
    if table is None:
        return "by the rule: nothing is measured"
    # The same format, so text sorts like time.
    when = "in this run" if table.taken >= since else f"before it, {table.taken or 'undated'}"
    return f"by times measured {when}"


def _sums_type(weights: Sequence[Any]) -> str:
    """The type of sums of prepared weights; of several, the one that rounds the most."""
    forms: list[Any] = []
    for prepared in weights:
        forms += prepared.values() if isinstance(prepared, Mapping) else [prepared]
    exact = ("int32", "float32")
    return min((str(form.sums_type) for form in forms), key=lambda name: (name in exact, name))


def make_weights(gpu: Gpu, layers: Sequence[Layer], pattern: Pattern) -> list[Memory]:
    """Random bf16 weights (N, K) on the GPU, pruned there by magnitude."""
    from ..kernels.weight_launch import weight_kernels

    kernels = weight_kernels(gpu.device, BF16, pattern)
    made: list[Memory] = []
    try:
        for layer in layers:
            memory = gpu.random(layer.n * layer.k * 2, BF16)
            made.append(memory)
            at, pitch = memory.pointer, layer.k * 2
            kernels.prune_magnitude(at, pitch, at, pitch, layer.n, layer.k, gpu.stream)
        gpu.synchronize()
    except BaseException:
        for memory in made:
            memory.close()
        raise
    return made
