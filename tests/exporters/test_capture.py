from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from smlp_deploy.exporters.capture import capture
from smlp_deploy.exporters.onnx import OPSETS


class Made(nn.Module):
    """A network of one function of its images and a weight of 2, 3."""

    weight: Tensor

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("weight", torch.randn(2, 3, generator=torch.Generator().manual_seed(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images, self.weight)


def captured(network: nn.Module, *, batch: int | None = None, opset: int = 20) -> onnx.ModelProto:
    model = capture(network, image_size=4, batch=batch, opset=opset, ends=("images", "logits"))
    onnx.checker.check_model(model, full_check=True)
    return model


CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "numbers on both sides": lambda x, _: (2 * x + 0.25) / 4 - x,
    "a product with the constant on the left": lambda x, w: w @ x.reshape(-1, 3, 16),
    "negative dimensions": lambda x, _: x.permute(0, -1, 1, 2).mean(dim=-1, keepdim=True).transpose(-1, -2),
    "a mean over several": lambda x, _: x.mean((2, 3)),
    "gelu": lambda x, _: functional.gelu(x) - functional.gelu(x * 3),
    "a root": lambda x, _: torch.rsqrt(x * x + 1e-5),
    "a concatenation": lambda x, _: torch.cat([x, x.unsqueeze(1).flatten(1, 2) * 2], dim=-3),
    "a convolution with all its options": lambda x, w: functional.conv2d(
        x, w.mean(0).reshape(3, 1, 1, 1), w.mean(0), stride=(2, 1), padding=(1, 0), dilation=1, groups=3
    ),
    "a linear layer": lambda x, w: functional.linear(x.mean((2, 3)), w, w.mean(1)),
    "what changes nothing": lambda x, _: functional.dropout(x.float().to(torch.float32), training=False) + 1.0,
}


@pytest.mark.parametrize("opset", [min(OPSETS), max(OPSETS)])
@pytest.mark.parametrize("case", CASES)
def test_the_graph_computes_what_pytorch_computes(case: str, opset: int) -> None:
    network = Made(CASES[case])
    session = onnxruntime.InferenceSession(captured(network, opset=opset).SerializeToString())
    for batch in (1, 5):
        images = np.random.default_rng(batch).standard_normal((batch, 3, 4, 4), dtype=np.float32)
        found = session.run(["logits"], {"images": images})[0]
        np.testing.assert_allclose(found, network(torch.from_numpy(images)).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, _: torch.softmax(x, 1), "softmax"),
        (lambda x, _: x.chunk(3, dim=1)[0] + 1, "chunk"),
        (lambda x, _: x.double() + 1, "double"),
        (lambda x, _: functional.gelu(x, approximate="tanh"), "GELU by tanh"),
        (lambda x, _: x * x.shape[0], "depends on the batch size"),
        (lambda x, _: x.reshape(3, -1, 16) + 1, "depends on the batch size"),
        (lambda x, _: (x + 1, x + 2)[0], "last operation does not give its output"),
    ],
)
def test_what_has_no_graph_is_an_error(function: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        captured(Made(function), opset=min(OPSETS))


def test_reading_and_writing_by_onnx_ir_changes_nothing() -> None:
    model = captured(nn.Sequential(nn.Conv2d(3, 3, 1), Made(lambda x, _: x + 1)))
    again = ir.to_proto(ir.from_proto(model))
    assert again.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_names_say_where_and_constants_are_there_once() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU(), nn.Conv2d(3, 3, 1), Made(lambda x, _: (x + 1) * (x + 1)))
    model = captured(network)
    assert [node.name for node in model.graph.node] == ["0/conv", "1/gelu", "2/conv", "3/add", "3/add_1", "3/mul"]
    assert [list(node.output) for node in model.graph.node][-2:] == [["3/add_1"], ["logits"]]
    names = ["0.weight", "0.bias", "2.weight", "2.bias", "number_1"]
    assert [tensor.name for tensor in model.graph.initializer] == names
    assert [value.name for value in model.graph.value_info][len(names) :] == [
        "0/conv",
        "1/gelu",
        "2/conv",
        "3/add",
        "3/add_1",
    ]


@pytest.mark.parametrize("batch", [None, 7])
def test_only_the_batch_is_left_open(batch: int | None) -> None:
    model = captured(Made(lambda x, _: x.reshape(-1, 12, 4) * 2), batch=batch)
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        if value.name in constants:
            continue
        first, *others = value.type.tensor_type.shape.dim
        assert (first.dim_param, first.dim_value) == (("batch", 0) if batch is None else ("", 7))
        assert all(dim.dim_value > 0 for dim in others)


def test_the_network_is_as_it_was() -> None:
    network = Made(lambda x, w: w @ x.reshape(-1, 3, 16))
    weight = network.weight
    captured(network)
    assert network.weight is weight
    assert not network._forward_hooks
    assert not network._forward_pre_hooks
