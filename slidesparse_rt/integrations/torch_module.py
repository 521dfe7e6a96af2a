"""``SlideSparseLinear``: a linear layer of PyTorch whose weight fits a pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import NDArray, to_numpy, wrap_numpy
from ..backends import needs_gpu
from ..dtypes import Operand, array_type, operand
from ..errors import DeviceError, OptionError, ShapeError
from ..options import PlanOptions
from ..packing.weight import SparseWeight, refuse_length
from ..pattern import Pattern
from ..plan import SparseGemmPlan
from ..tuning.select import check_tuning
from ..weights import prune
from .require import require
from .torch_call import Shared, arguments, product
from .torch_op import encode_options, forget, plan_for, same_values

torch = require("torch", "torch", (2, 4))

__all__ = ["SlideSparseLinear", "packed_linear"]

#: Buffers whose types the operand format decides; ``.half()`` and the like leave them alone.
_FIXED = ("weight", "weight_scale", "input_scale")


class SlideSparseLinear(torch.nn.Module):  # type: ignore[misc,name-defined]  # seen as Any
    """``y = x @ weight.T + bias`` with a quantized weight that fits a pattern; inference only.

    Parameters
    ----------
    in_features, out_features:
        K and N.
    bias:
        Whether there is a bias.
    pattern:
        "2:4", "4:6", "6:8", ... or "dense"; see :class:`~slidesparse_rt.Pattern`.
    dtype:
        Operand format: "int8", "fp8_e4m3", "bf16" or "fp16".
    static_input:
        Whether one scale serves the activations of every token (``input_scale``), for "int8" and
        "fp8_e4m3"; else each token has its own, measured in every run.
    backend, tuning, options:
        As for :class:`~slidesparse_rt.SparseGemmPlan`.
    device:
        Where the buffers are made; "meta" makes none, for a state_dict that is loaded with
        ``assign=True``.
    bias_dtype:
        Type of the bias; ``None`` takes PyTorch's default.

    Attributes
    ----------
    weight:
        Buffer, shape (N, K), int8, float8_e4m3fn, bfloat16 or float16: the quantized values.
    weight_scale:
        Buffer, shape (N, 1), float32; ``None`` for "bf16" and "fp16".
    bias:
        Buffer, shape (N,), float32, float16 or bfloat16; or ``None``.
    input_scale:
        Buffer, one float32; or ``None``.

    Raises
    ------
    PatternError, DTypeError, OptionError, ShapeError
        For arguments that are not as described.

    Notes
    -----
    The buffers are the state_dict, under the names that ``slidesparse convert`` writes; they are
    the same whatever runs.  What a backend makes of them, the plan, is made when the layer first
    runs on a device (or by :meth:`plan`), and made anew once a buffer is written or moved.  A new
    layer has a weight of zeros.
    """

    weight: Any
    weight_scale: Any
    bias: Any
    input_scale: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: str | Pattern,
        dtype: str | Operand = "int8",
        static_input: bool = False,
        backend: str = "auto",
        tuning: str = "cached",
        options: PlanOptions | None = None,
        device: Any = None,
        bias_dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, extent in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(extent, bool) or not isinstance(extent, int) or extent < 1:
                raise ShapeError(f"{name} is {extent!r}; allowed are whole numbers from 1 on")
        self.in_features = in_features
        self.out_features = out_features
        self._pattern = Pattern.parse(pattern)
        self._operand = operand(dtype)
        refuse_length(in_features, self._operand)
        if static_input and not self._operand.scaled:
            raise OptionError(
                f"static_input is True, but dtype {self._operand.name!r} has no scales; use "
                f"'int8' or 'fp8_e4m3'"
            )
        kind = bias_dtype or torch.get_default_dtype()
        array_type(kind)
        self._shared: Shared | None = None
        self._place = 0
        #: The values in host memory while the device holds the packed form only.
        self._released: Any = None
        self._set_backend(backend, tuning, options)
        made = torch.empty if torch.device(device or "cpu").type == "meta" else torch.zeros
        values = getattr(torch, self._operand.dtype.name)
        shape = (out_features, in_features)
        self.register_buffer("weight", made(shape, dtype=values, device=device))
        scaled = self._operand.scaled
        ones = torch.ones((out_features, 1), dtype=torch.float32, device=device)
        self.register_buffer("weight_scale", ones if scaled else None)
        self.register_buffer(
            "bias", made((out_features,), dtype=kind, device=device) if bias else None
        )
        one = torch.ones((1,), dtype=torch.float32, device=device)
        self.register_buffer("input_scale", one if static_input else None)

    @classmethod
    def from_sparse_weight(
        cls, weight: SparseWeight, bias: Any = None, *, device: Any = None, **settings: Any
    ) -> SlideSparseLinear:
        """A layer with this weight.

        Parameters
        ----------
        weight:
            Brings pattern and dtype.
        bias:
            Tensor of shape (N,), float32, float16 or bfloat16; or ``None``.
        device:
            Where the buffers go; ``None``: the CPU.
        settings:
            ``backend``, ``tuning`` and ``options``.

        Raises ShapeError or DTypeError for a bias that does not fit.
        """
        _refuse_bias(bias, weight.n)
        made = cls(
            weight.k,
            weight.n,
            bias is not None,
            pattern=weight.pattern,
            dtype=weight.dtype,
            device="meta",
            bias_dtype=None if bias is None else bias.dtype,
            **settings,
        )
        where = torch.device(device or "cpu")
        made.weight = _tensor(weight.values).to(where)
        if weight.scales is not None:
            made.weight_scale = _tensor(weight.scales[:, None]).to(where)
        if bias is not None:
            made.bias = bias.detach().clone().to(where)
        return made

    @classmethod
    def from_linear(
        cls,
        layer: Any,
        pattern: str | Pattern,
        *,
        dtype: str | Operand = "int8",
        method: str = "magnitude",
        norms: Any = None,
        **settings: Any,
    ) -> SlideSparseLinear:
        """Prune and quantize a ``torch.nn.Linear``, which stays as it is.

        Parameters
        ----------
        layer:
            Its weight is (N, K), float32, float16 or bfloat16, on the CPU or a GPU.
        pattern, dtype:
            As for the class.
        method, norms:
            As for :func:`~slidesparse_rt.prune`; a weight that fits its pattern keeps its values.
        settings:
            ``backend``, ``tuning`` and ``options``.

        Returns
        -------
        SlideSparseLinear
            On the layer's device.

        Raises
        ------
        NonFiniteError
            If the weight holds a NaN or an infinity.
        OptionError, PatternError, ShapeError, DTypeError, DeviceError
            For arguments that are not as described.
        """
        packed, _ = packed_linear(layer, pattern, dtype, method, norms)
        bias = None if layer.bias is None else layer.bias.detach()
        return cls.from_sparse_weight(packed, bias, device=layer.weight.device, **settings)

    @property
    def pattern(self) -> Pattern:
        """The pattern that the weight fits."""
        return self._pattern

    @property
    def operand(self) -> Operand:
        """The operand format."""
        return self._operand

    def forward(self, x: Any) -> Any:
        """Shape (..., K) to (..., N), the type of ``x``: float32, float16 or bfloat16.

        Raises
        ------
        ArrayError
            Where a gradient is asked for: call it under ``torch.inference_mode()``.
        CaptureError
            If a CUDA graph is being captured and the layer was not prepared (see :func:`prepare`).
        ShapeError, DTypeError, DeviceError
            For an ``x`` that does not fit.
        PatternError, NonFiniteError
            If the buffers hold values that are no weight of this pattern and format.
        """
        if self._shared is not None:
            return self._shared.output(self._place, x)
        return product((self,), x)

    def plan(self) -> SparseGemmPlan:
        """The plan that runs on the present device, made if need be: see its ``explain()``.

        Of layers that were fused (:func:`fuse`) it is the one of them all.  It lives as long as the
        buffers that it was made of.  Raises what :class:`~slidesparse_rt.SparseGemmPlan` raises.
        """
        return plan_for(*arguments(self._members()))

    def sparse_weight(self) -> SparseWeight:
        """Values and scales as a :class:`~slidesparse_rt.SparseWeight`, on the host; checked."""
        scales = self.weight_scale
        return SparseWeight(
            _host(self._whole()),
            None if scales is None else _host(scales).reshape(-1),
            self._pattern,
            self._operand,
        )

    def to_linear(self, dtype: Any = None) -> Any:
        """A ``torch.nn.Linear`` on the same device with the weight ``values * scales``.

        ``dtype`` is its type; ``None`` takes the bias's, or PyTorch's default.
        """
        kind = dtype or (torch.get_default_dtype() if self.bias is None else self.bias.dtype)
        made = torch.nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=kind
        )
        where = self.weight.device
        wide = _tensor(self.sparse_weight().dequantize()).to(where, kind)
        made.weight = torch.nn.Parameter(wide, requires_grad=False)
        if self.bias is not None:
            made.bias = torch.nn.Parameter(self.bias.detach().to(kind), requires_grad=False)
        return made.train(self.training)

    def release_weight(self) -> None:
        """Keep the values in host memory only, once they are packed on the GPU.

        ``weight`` keeps its shape and has no memory, nor have tensors that shared it: reading it
        then is an illegal memory access, which PyTorch does not check.  ``state_dict()``, copies,
        moves and :meth:`sparse_weight` read the values from the host.  Nothing changes on the CPU,
        where the plan shares the buffer.
        """
        if self.weight.device.type != "cuda" or self._released is not None:
            return
        storage = self.weight.untyped_storage()
        if storage.nbytes() != self.weight.nbytes or not storage.resizable():
            self.weight = self.weight.clone()  # its memory was not this layer's alone
        self.plan()
        with same_values(*arguments(self._members())):
            self._released = self.weight.cpu()
            self.weight.untyped_storage().resize_(0)

    def restore_weight(self) -> None:
        """Undo :meth:`release_weight`."""
        if self._released is None:
            return
        with same_values(*arguments(self._members())):
            values, self._released = self._released, None
            self.weight.untyped_storage().resize_(values.nbytes)
            self.weight.copy_(values)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, pattern={self._pattern.name!r}, "
            f"dtype={self._operand.name!r}"
            + (", static_input=True" if self.input_scale is not None else "")
            + (f", backend={self.backend!r}" if self.backend != "auto" else "")
            + (", fused" if self._shared is not None else "")
        )

    def _set_backend(self, backend: str, tuning: str, options: PlanOptions | None) -> None:
        if options is not None and not isinstance(options, PlanOptions):
            raise OptionError(f"options is {options!r}; allowed is a PlanOptions or None")
        needs_gpu(backend)  # raises for a name that does not exist
        check_tuning(tuning, backend, options or PlanOptions())
        self.backend = backend
        self.tuning = tuning
        self.options = options
        self._settings = (self._pattern.name, backend, tuning, encode_options(options))

    def _forget(self) -> None:
        """Let go of the plans that the present buffers and settings have."""
        self.restore_weight()
        forget(*arguments((self,)))
        forget(*arguments(self._members()))

    def _members(self) -> tuple[SlideSparseLinear, ...]:
        return (self,) if self._shared is None else self._shared.layers

    def _whole(self) -> Any:
        """The values, wherever they are."""
        return self.weight if self._released is None else self._released

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        """Moves of devices; of types only for the bias, because the others' are the format."""
        self.restore_weight()
        fixed = {id(self._buffers[name]) for name in _FIXED}

        def moved(tensor: Any) -> Any:
            made = fn(tensor)
            if id(tensor) in fixed and made.dtype != tensor.dtype:
                return tensor.to(made.device)
            return made

        return super()._apply(moved, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._released is not None:
            destination[f"{prefix}weight"] = self._released

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, *rest: Any
    ) -> None:
        """Refuse values of another type, which copying would round to this one's in silence."""
        errors = rest[-1]
        for name in _FIXED:
            given, own = state_dict.get(prefix + name), self._buffers[name]
            if given is not None and own is not None and given.dtype != own.dtype:
                errors.append(
                    f"{prefix}{name} is {given.dtype} in the state_dict; the layer is "
                    f"{self._pattern.name} {self._operand.name} and takes {own.dtype}: make it "
                    f"with from_linear, or convert the checkpoint with 'slidesparse convert'"
                )
                return
        self.restore_weight()
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self._released is not None:
            state["_buffers"] = {**self._buffers, "weight": self._released.to(self.weight.device)}
            state["_released"] = None
        return state


def packed_linear(
    layer: Any, pattern: str | Pattern, dtype: str | Operand, method: str, norms: Any
) -> tuple[SparseWeight, Any]:
    """The quantized weight of a ``torch.nn.Linear``, and the pruned one on the host.

    See :meth:`SlideSparseLinear.from_linear`.
    """
    if not isinstance(layer, torch.nn.Linear):
        raise OptionError(f"layer is a {type(layer).__name__}; allowed is a torch.nn.Linear")
    weight = layer.weight.detach()
    if weight.device.type == "meta":
        raise DeviceError("the layer's weight is on the meta device; load its values first")
    pruned = prune(weight, pattern, method=method, norms=norms).cpu()
    return SparseWeight.from_array(pruned, pattern, dtype=dtype), pruned


def _refuse_bias(bias: Any, n: int) -> None:
    if bias is None:
        return
    array_type(bias.dtype)
    if tuple(bias.shape) != (n,):
        raise ShapeError(
            f"bias has shape {tuple(bias.shape)}; allowed is ({n},), one for each output"
        )


def _tensor(values: NDArray) -> Any:
    """A tensor with memory of its own."""
    return wrap_numpy(np.array(values), torch.empty(0))


def _host(tensor: Any) -> NDArray:
    return to_numpy(tensor.detach().cpu(), "weight", quantized=True)
