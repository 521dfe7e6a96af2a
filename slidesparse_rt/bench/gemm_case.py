"""One number of tokens of ``slidesparse bench gemm``: all sides, both stages, all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from ..arrays import NDArray
from ..dtypes import Operand, array_type
from ..errors import DeviceMemoryError
from .checks import Exact, check_alike, check_poison, check_result, check_sums, exact, sample
from .clocks import Clocks
from .gemm_settings import GemmSettings
from .record import FAILURES
from .shapes import Layer
from .sides import BF16, DENSE, Output, Side, Work
from .timing import Gpu, Graph, Memory, Times, burst, sustained

__all__ = ["GemmCase", "sparse_sides"]

#: Tokens and channels that are checked.
_TOKENS, _CHANNELS = 8, 64
#: Tokens at most of which all results of an operator are compared from side to side, and their
#: bytes for each layer: reading them back takes a while.
_MOST_ALIKE, _ALIKE_BYTES = 256, 8 << 20


def sparse_sides(sides: Mapping[str, Any]) -> list[str]:
    """The sparse ones among the keys of ``sides``."""
    return [name for name in sides if name != DENSE]


class GemmCase:
    """Checks and times sides against each other for one number of tokens.

    Parameters
    ----------
    gpu, clocks:
        Where it runs.
    settings:
        Which stages, how often and how long.
    layers, weights:
        The layers and their pruned bf16 weights.
    sides:
        By name: dense and at least one sparse one.
    row:
        The operand format.
    tokens:
        M.

    Attributes
    ----------
    failed:
        Sparse sides that broke while others went on, and how.
    """

    def __init__(
        self,
        gpu: Gpu,
        settings: GemmSettings,
        layers: Sequence[Layer],
        weights: Sequence[Memory],
        sides: dict[str, Side],
        row: Operand,
        tokens: int,
        clocks: Clocks,
    ) -> None:
        self._gpu = gpu
        self._settings = settings
        self._layers = layers
        self._weights = weights
        self._sides = dict(sides)
        self._operand = row
        self._tokens = tokens
        self._clocks = clocks
        self.failed: dict[str, Exception] = {}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Check and time; raises WrongOutput before there is a number.

        A sparse side that fails is out of the case, in :attr:`failed`.  Raises its error where no
        other one is left, and the dense side's always.
        """
        gpu, tokens = self._gpu, self._tokens
        with ExitStack() as held:
            inputs, outputs = [], []
            for layer in self._layers:
                inputs.append(gpu.random(tokens * layer.k * 2, BF16))
                held.callback(inputs[-1].close)
                outputs.append(gpu.allocate(tokens * layer.n * 2))
                held.callback(outputs[-1].close)
            # Waits before anything is given back, whatever went wrong.
            held.callback(gpu.synchronize)
            wanted = [self._exact(index, inputs[index]) for index in range(len(inputs))]
            for stage in self._settings.stages:
                try:
                    yield from self._stage(stage, inputs, outputs, wanted)
                finally:
                    gpu.synchronize()
                    for side in self._sides.values():
                        side.release()

    def _stage(
        self,
        stage: str,
        inputs: Sequence[Memory],
        outputs: Sequence[Memory],
        wanted: list[Exact],
    ) -> Iterator[dict[str, Any]]:
        gpu, settings = self._gpu, self._settings
        works: dict[str, list[Work]] = {}
        whole: dict[str, Graph] = {}
        worst: dict[str, float] = {}
        first: tuple[str, list[NDArray]] | None = None
        # Dense is compared with nothing: where another side differs, it is not dense that goes.
        for name in sorted(self._sides, key=DENSE.__ne__):
            try:
                made = self._works(name, stage, inputs, outputs)
                graph = gpu.capture(_together([work.launch for work in made]))
                worst[name] = self._check(name, graph, made, wanted)
                if stage == "op":
                    found = self._alike(name, made, first)
                    first = first or (name, found)
            except FAILURES as error:
                self._drop(name, error)
            else:
                works[name], whole[name] = made, graph
        works = {name: works[name] for name in self._sides}
        whole = {name: whole[name] for name in self._sides}
        common: dict[str, Any] = {
            "stage": stage,
            "checked": {
                "tokens": len(self._token_rows()),
                "channels": _CHANNELS,
                "error_over_bound": worst,
            },
            "kernels": {name: row[0].kernels for name, row in works.items()},
            "layer_how": {
                name: {layer.name: work.how for layer, work in zip(self._layers, row, strict=True)}
                for name, row in works.items()
                if any(work.how for work in row)
            },
        }
        times = burst(gpu, whole, rounds=settings.rounds, clocks=self._clocks)
        alone: dict[str, Any] = {}
        if settings.layer_times:
            alone["layer_us"] = self._by_layer(works)
        if stage == "op":
            alone["quantize_us"] = self._quantize_us(list(works), inputs, outputs)
        yield self._row(times, "burst") | alone | common
        if settings.sustained:
            times = sustained(
                gpu,
                whole,
                seconds=settings.seconds,
                rounds=settings.sustained_rounds,
                clocks=self._clocks,
            )
            yield self._row(times, "sustained") | common

    def _works(
        self, name: str, stage: str, inputs: Sequence[Memory], outputs: Sequence[Memory]
    ) -> list[Work]:
        """Every layer of a side, ready to launch."""
        side = self._sides[name]
        make = side.gemm if stage == "gemm" else side.op
        made = [
            make(index, self._tokens, x.pointer, y.pointer)
            for index, (x, y) in enumerate(zip(inputs, outputs, strict=True))
        ]
        self._gpu.synchronize()
        return made

    def _drop(self, name: str, error: Exception) -> None:
        """Go on without a side; raises ``error`` where there is nothing left to compare."""
        if name == DENSE or sparse_sides(self._sides) == [name]:
            raise error
        self.failed[name] = error
        self._gpu.synchronize()
        self._sides.pop(name).release()

    def _by_layer(self, works: dict[str, list[Work]]) -> dict[str, dict[str, float]]:
        """Microseconds of every layer alone, by side."""
        gpu = self._gpu
        found: dict[str, dict[str, float]] = {name: {} for name in works}
        for index, layer in enumerate(self._layers):
            graphs = {name: gpu.capture(row[index].launch) for name, row in works.items()}
            times = burst(
                gpu,
                graphs,
                rounds=self._settings.rounds,
                clocks=self._clocks,
                least_warm_us=2000.0,
            )
            for name, row in times.items():
                found[name][layer.name] = row.us
        return found

    def _quantize_us(
        self, names: Sequence[str], inputs: Sequence[Memory], outputs: Sequence[Memory]
    ) -> dict[str, float]:
        """Microseconds of quantizing and lifting the inputs of all layers, by side.

        What it computes was checked with the operator.  One side after the other: each needs memory
        of its own, and one for which there is none is left out.
        """
        gpu = self._gpu
        found: dict[str, float] = {}
        for name in names:
            side = self._sides[name]
            try:
                launches = [
                    side.quantize(index, self._tokens, x.pointer, y.pointer)
                    for index, (x, y) in enumerate(zip(inputs, outputs, strict=True))
                ]
                graphs = {name: gpu.capture(_together(launches))}
                times = burst(
                    gpu,
                    graphs,
                    rounds=self._settings.rounds,
                    clocks=self._clocks,
                    least_warm_us=2000.0,
                )
                found[name] = times[name].us
            except DeviceMemoryError:
                continue
            finally:
                gpu.synchronize()
                side.release()
        return found

    def _row(self, found: dict[str, Times], mode: str) -> dict[str, Any]:
        flops = sum(layer.flops(self._tokens) for layer in self._layers)
        us = {name: row.us for name, row in found.items()}
        return {
            "mode": mode,
            "us": us,
            "times": {name: row.to_json() for name, row in found.items()},
            "dense_equivalent_tflops": {name: flops / value / 1e6 for name, value in us.items()},
            "ratio": {name: us[DENSE] / us[name] for name in sparse_sides(us)},
        }

    def _token_rows(self) -> list[int]:
        return sample(self._tokens, _TOKENS, seed=1)

    def _exact(self, index: int, x: Memory) -> Exact:
        """What the sampled tokens and channels of a layer must give."""
        gpu, layer, weight = self._gpu, self._layers[index], self._weights[index]
        dtype = array_type(BF16).dtype
        tokens = [gpu.read(x.pointer + t * layer.k * 2, dtype, layer.k) for t in self._token_rows()]
        channels = [
            gpu.read(weight.pointer + c * layer.k * 2, dtype, layer.k)
            for c in sample(layer.n, _CHANNELS, seed=2)
        ]
        return exact(np.stack(tokens), np.stack(channels), self._operand)

    def _check(self, name: str, graph: Graph, works: list[Work], wanted: list[Exact]) -> float:
        """Poison all outputs, replay the graph once, and compare; the largest error over bound."""
        gpu, worst = self._gpu, 0.0
        for work in works:
            output = work.output
            size = _numpy_type(output.kind).itemsize
            gpu.poison(output.pointer, self._tokens * output.stride * size)
        graph.launch()
        for layer, work, goal in zip(self._layers, works, wanted, strict=True):
            what = f"{name} {layer.name} {layer.n} x {layer.k}, {work.kernels}"
            found = self._read(work.output, what, layer)
            if work.output.scaled:
                sums = self._sides[name].sums_type
                worst = max(worst, check_result(found, goal, what, sums_type=sums))
            else:
                worst = max(worst, check_sums(found, goal, what))
        return worst

    def _alike(
        self, name: str, works: Sequence[Work], first: tuple[str, list[NDArray]] | None
    ) -> list[NDArray]:
        """The results of operators, of many tokens; checked against those of the first side."""
        found = []
        for output in (work.output for work in works):
            row_bytes = output.stride * _numpy_type(output.kind).itemsize
            most = max(2, min(_MOST_ALIKE, _ALIKE_BYTES // row_bytes))
            tokens = sample(self._tokens, most, seed=3)
            found.append(np.stack([self._of_token(output, token) for token in tokens]))
        if first is not None:
            other, wanted = first
            for layer, mine, theirs in zip(self._layers, found, wanted, strict=True):
                what = f"{name} beside {other}, {layer.name} {layer.n} x {layer.k}"
                check_alike(mine, theirs, self._operand, what)
        return found

    def _of_token(self, output: Output, token: int) -> NDArray:
        """A row of an output."""
        dtype = _numpy_type(output.kind)
        at = output.pointer + token * output.stride * dtype.itemsize
        return self._gpu.read(at, dtype, output.columns)

    def _read(self, output: Output, what: str, layer: Layer) -> NDArray:
        """The sampled tokens and channels of an output; its rows are looked through for poison."""
        rows = []
        for token in self._token_rows():
            row = self._of_token(output, token)
            check_poison(row, f"{what}, token {token}")
            rows.append(row[sample(layer.n, _CHANNELS, seed=2)])
        return np.stack(rows)


def _numpy_type(kind: str) -> np.dtype[Any]:
    return np.dtype(np.int32) if kind == "int32" else array_type(kind).dtype


def _together(launches: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """One after the other."""

    def launch() -> None:
        for one in launches:
            one()

    return launch
