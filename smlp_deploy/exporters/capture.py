"""A PyTorch network to an ONNX graph, by running it on tensors without values and recording every operation.

`torch.onnx.export` traces any network, twice, and then decomposes and optimizes what it found: 30 to 43 s for
smlpnet_tiny on two busy cores, where this took 1.3 to 5 s. It can, because a deployed network has a dozen kinds of
operations, each of which is one function below.

Rules:

1. A node is named after the module that it is computed in and its operator, `blocks.0.fuse/conv`, numbered from the
   second on. What it computes has the same name.
2. A weight keeps its name in the network. Any other constant is named after its values, and stored once.
3. Where something is reshaped, the first dimension is left to be inferred. A network for any batch size runs at two
   of them: the graphs are the same, and a dimension in which they differ is the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_BATCH = "batch"
_IR_VERSION = 10
"""The oldest version that allows every opset of `exporters/onnx.py`."""
_FIRST_WITH_GELU = 20


def capture(network: nn.Module, *, image_size: int, batch: int | None, opset: int, ends: tuple[str, str]) -> ModelProto:
    """The graph of a network from images N, 3, S, S to logits N, classes, both float32.

    Args:
        network: in evaluation mode, float32.
        image_size: S.
        batch: N; None for any number.
        opset: version of ONNX's default operator set, at least 18.
        ends: names of the graph's input and its output.

    Raises:
        NotImplementedError: the network has an operation that is not among those below, or depends on its batch size.
    """
    run = _record(network, (batch or 2, 3, image_size, image_size), opset, ends)
    other = run if batch else _record(network, (3, 3, image_size, image_size), opset, ends)
    if run.nodes != other.nodes:
        raise NotImplementedError("what the network computes depends on the batch size")
    values = {name: _value(name, shape, other.shapes[name]) for name, shape in run.shapes.items()}
    first, last = (values.pop(name) for name in ends)
    weights = network.state_dict()
    model = helper.make_model(
        helper.make_graph(run.nodes, "smlpnet", [first], [last]),
        ir_version=_IR_VERSION,
        opset_imports=[helper.make_opsetid("", opset)],
    )
    graph = model.graph
    for name in run.read:  # one by one: `make_graph` and `make_model` would each copy all of them
        constant = run.constants[name] if name in run.constants else weights[name].numpy()
        graph.initializer.append(numpy_helper.from_array(constant, name))
    # First those of the constants, as onnx_ir writes them, so that its passes leave the rest of a graph as it is.
    for tensor in graph.initializer:
        graph.value_info.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    graph.value_info.extend(values.values())
    return model


def _value(name: str, shape: Sequence[int], other: Sequence[int]) -> ValueInfoProto:
    """A float32 value by its shapes at two batch sizes (rule 3)."""
    dims = [
        size if size == other_size else _BATCH if axis == 0 else None
        for axis, (size, other_size) in enumerate(zip(shape, other, strict=True))
    ]
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)


def _record(network: nn.Module, images: tuple[int, ...], opset: int, ends: tuple[str, str]) -> _Recorder:
    """What a network computes from images of a shape."""
    weights = {name: tensor.to("meta") for name, tensor in network.state_dict().items()}
    recorder = _Recorder(opset, weights)
    batch = recorder.take(torch.empty(images, device="meta"), ends[0])
    with ExitStack() as stack:
        for name, module in network.named_modules():
            stack.enter_context(module.register_forward_pre_hook(recorder.entering(name)))
            stack.enter_context(module.register_forward_hook(recorder.leave))
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        logits = torch.func.functional_call(network, weights, (batch,), strict=True)
    recorder.finish(logits, ends[1])
    return recorder


class _Recorder(TorchFunctionMode):
    """Records the operations of PyTorch while it is active.

    Args:
        opset: see `capture`.
        weights: of the network, by name.

    Attributes:
        nodes: what was computed, in order.
        shapes: of the input and of every value that is computed.
        constants: those that are not weights.
        read: the names of all constants, weights too, in the order of their first readers.
    """

    def __init__(self, opset: int, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.constants: dict[str, NDArray[Any]] = {}
        self.read: dict[str, None] = {}
        # By id. All are kept until the end, because the next tensor may get the id of one that is gone.
        self._known = {id(tensor): (tensor, name) for name, tensor in weights.items()}
        self._shape: tuple[int, ...] = ()
        self._scopes: list[str] = []
        self._used: Counter[str] = Counter()

    def take(self, tensor: Tensor, name: str) -> Tensor:
        """Make a tensor the value of this name."""
        self._known[id(tensor)] = (tensor, name)
        self.shapes[name] = tuple(tensor.shape)
        return tensor

    def finish(self, tensor: Tensor, name: str) -> None:
        """Give the last value the name of the graph's output."""
        last = self.nodes[-1]
        if last.output[0] != self._known[id(tensor)][1]:
            raise NotImplementedError("the network's last operation does not give its output")
        self.shapes[name] = self.shapes.pop(last.output[0])
        last.output[0] = name

    def entering(self, scope: str) -> Callable[..., None]:
        """A hook for the module of this name."""
        return lambda *_: self._scopes.append(scope)

    def leave(self, *_: object) -> None:
        self._scopes.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = _run(func, args, kwargs)
        several = isinstance(result, tuple | list) and any(isinstance(item, Tensor) for item in result)
        if several or isinstance(result, Tensor):
            operation = _OPERATIONS.get(func.__name__)
            if id(result) in self._known:  # its own argument: a conversion to the type that it has, for example
                return result
            if several or operation is None or result.dtype != torch.float32:
                raise NotImplementedError(f"ONNX export of {func.__name__}")
            self._shape = tuple(result.shape)
            self.take(result, operation(self, result, *args, **kwargs))
        return result

    def integers(self, what: str, values: Sequence[int]) -> str:
        """The name of a constant of integers, of which `what` says what they are (rule 2)."""
        name = "_".join(map(str, (what, *values)))
        self.constants[name] = np.array(values, np.int64)
        return name

    def node(self, operator: str, *operands: Tensor | float | str, **attributes: Any) -> str:
        """Add a node of the result's shape; the name of its value (rule 1).

        Args:
            operator: of ONNX.
            operands: tensors, numbers, or names of values or constants.
            attributes: of the operator.
        """
        names = [self._name(operand) for operand in operands]
        self.read.update(dict.fromkeys(name for name in names if name not in self.shapes))
        base = f"{self._scopes[-1]}/{operator.lower()}".removeprefix("/")
        name = f"{base}_{self._used[base]}" if self._used[base] else base
        self._used[base] += 1
        self.nodes.append(helper.make_node(operator, names, [name], name, **attributes))
        self.shapes[name] = self._shape
        return name

    def _name(self, operand: Tensor | float | str) -> str:
        if isinstance(operand, Tensor):
            return self._known[id(operand)][1]
        if isinstance(operand, str):
            return operand
        name = f"number_{operand}"
        self.constants[name] = np.array(operand, np.float32)
        return name


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function of PyTorch returns; see `_SHAPES`."""
    shape_of = _SHAPES.get(func.__name__)
    operands = [*args, *args[0]] if args and isinstance(args[0], tuple | list) else args
    if shape_of is None or any(isinstance(value, Tensor) and value.dtype != torch.float32 for value in operands):
        return func(*args, **kwargs)
    return torch.empty(shape_of(*args, **kwargs), device="meta")


def _elementwise_shape(*operands: object, **_: object) -> tuple[int, ...]:
    return np.broadcast_shapes(*(value.shape for value in operands if isinstance(value, Tensor)))


def _mean_shape(x: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> tuple[int, ...]:
    axes = _axes(x, dim)
    return tuple(1 if axis in axes else size for axis, size in enumerate(x.shape) if keepdim or axis not in axes)


def _cat_shape(tensors: Sequence[Tensor], dim: int = 0) -> tuple[int, ...]:
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return tuple(shape)


_SHAPES: dict[str, Callable[..., tuple[int, ...]]] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "rsqrt", "gelu"), _elementwise_shape),
    "mean": _mean_shape,
    "cat": _cat_shape,
    "linear": lambda x, weight, *_: (*x.shape[:-1], len(weight)),
}
"""The shape of a float32 result, by the name of PyTorch's function, for those that PyTorch itself computes in Python:
its module for that takes 2 s to import."""


def _axes(x: Tensor, dim: int | Sequence[int]) -> list[int]:
    return [axis % x.ndim for axis in ([dim] if isinstance(dim, int) else dim)]


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _binary(operator: str) -> Callable[..., str]:
    return lambda recorder, _, left, right: recorder.node(operator, left, right)


def _reshape(recorder: _Recorder, result: Tensor, x: Tensor, *_: object) -> str:
    return recorder.node("Reshape", x, recorder.integers("shape", [-1, *result.shape[1:]]))  # rule 3


def _permute(recorder: _Recorder, _: Tensor, x: Tensor, *dims: Any) -> str:
    order = dims[0] if isinstance(dims[0], Sequence) else dims
    return recorder.node("Transpose", x, perm=[dim % x.ndim for dim in order])


def _transpose(recorder: _Recorder, _: Tensor, x: Tensor, one: int, other: int) -> str:
    order = list(range(x.ndim))
    order[one], order[other] = order[other], order[one]
    return recorder.node("Transpose", x, perm=order)


def _mean(recorder: _Recorder, _: Tensor, x: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> str:
    return recorder.node("ReduceMean", x, recorder.integers("axes", _axes(x, dim)), keepdims=int(keepdim))


def _rsqrt(recorder: _Recorder, _: Tensor, x: Tensor) -> str:
    return recorder.node("Reciprocal", recorder.node("Sqrt", x))


def _gelu(recorder: _Recorder, _: Tensor, x: Tensor, approximate: str = "none") -> str:
    if recorder.opset >= _FIRST_WITH_GELU:
        return recorder.node("Gelu", x, approximate=approximate)
    if approximate != "none":
        raise NotImplementedError(f"ONNX export of GELU by {approximate} at opset {recorder.opset}")
    # The form that ONNX Runtime recognizes.
    twice = recorder.node("Add", recorder.node("Erf", recorder.node("Div", x, 2**0.5)), 1.0)
    return recorder.node("Mul", recorder.node("Mul", x, twice), 0.5)


def _cat(recorder: _Recorder, _: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> str:
    return recorder.node("Concat", *tensors, axis=dim % tensors[0].ndim)


def _conv2d(
    recorder: _Recorder,
    _: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> str:
    return recorder.node(
        "Conv",
        *(x, weight) if bias is None else (x, weight, bias),
        kernel_shape=list(weight.shape[2:]),
        strides=_pair(stride),
        pads=2 * _pair(padding),
        dilations=_pair(dilation),
        group=groups,
    )


def _linear(recorder: _Recorder, _: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> str:
    if x.ndim != 2:
        raise NotImplementedError("ONNX export of a linear layer over more than two dimensions")
    return recorder.node("Gemm", x, weight, bias, transB=1)


_OPERATIONS: dict[str, Callable[..., str]] = {
    "add": _binary("Add"),
    "sub": _binary("Sub"),
    "mul": _binary("Mul"),
    "div": _binary("Div"),
    "matmul": _binary("MatMul"),
    "__matmul__": _binary("MatMul"),
    "reshape": _reshape,
    "flatten": _reshape,
    "unflatten": _reshape,
    "unsqueeze": _reshape,
    "permute": _permute,
    "transpose": _transpose,
    "mean": _mean,
    "rsqrt": _rsqrt,
    "gelu": _gelu,
    "cat": _cat,
    "conv2d": _conv2d,
    "linear": _linear,
}
"""By the name of PyTorch's function: from the recorder, the result and the arguments to the name of the last node."""
