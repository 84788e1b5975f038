from __future__ import annotations

import json
from typing import Any

import pytest

from smlp_deploy.exporters.kernels import (
    UNKNOWN,
    Kernel,
    KernelSummary,
    KernelTensor,
    kernels_from_inspector,
    kernels_from_log,
    summarize,
)
from tests.support.tensorrt_binding import INSPECTOR, KERNEL, inspected

FORMS = sorted(path.stem for path in INSPECTOR.glob("*.json"))


def layer(kind: str = "gemm", name: str = "k", **fields: Any) -> Kernel:
    """A kernel from one layer of an inspector's JSON."""
    (found,) = kernels_from_inspector(json.dumps({"Layers": [{"Name": name, "LayerType": kind, **fields}]}))
    return found


def summary_of(form: str) -> KernelSummary:
    return summarize(kernels_from_inspector(inspected(form)), batch=4)


def kernel(kind: str, element: str, *, reads: str | None = None) -> Kernel:
    return Kernel(
        name="k",
        kind=kind,
        inputs=(KernelTensor(shape=(8, 10), element=reads or element),),
        outputs=(KernelTensor(shape=(8, 10), element=element),),
        nodes=(),
    )


def test_a_line_of_the_log_is_a_kernel() -> None:
    (found,) = kernels_from_log(["other", f"Layers:\n{KERNEL}\nmore"])
    assert (found.name, found.kind, found.nodes) == ("conv_myl0_1", "correlation", ("blocks.0/conv",))
    assert found.inputs == (KernelTensor(shape=(4, 3, 8, 8), element="Half"),)
    assert found.nbytes == 2 * (4 * 3 * 64 + 4 * 16 * 64)
    assert found.computes
    assert found.precision == "Half"


def test_a_line_of_a_dynamic_build_has_unknown_bytes() -> None:
    for size in ("-1", "-7", "N"):
        (found,) = kernels_from_log([KERNEL.replace("[4,", f"[{size},")])
        assert found.inputs == (KernelTensor(shape=(-1, 3, 8, 8), element="Half"),)
        assert found.nbytes is None
        assert found.precision == "Half"


class TestInspectors:
    """Every form in which engine inspectors print."""

    def test_layers_of_tensorrt_10(self) -> None:
        reformat, convolution, pointwise = kernels_from_inspector(inspected("tensorrt-10-static"))
        images, logits = 4 * 3 * 64, 4 * 16 * 64
        assert (reformat.nbytes, reformat.computes) == (4 * images + 2 * images, False)
        assert (convolution.nbytes, convolution.computes) == (2 * images + 2 * logits, True)
        assert (pointwise.nbytes, pointwise.computes) == (2 * logits + 4 * logits, False)
        assert convolution.precision == "Half"
        assert convolution.nodes == ("embeddings.0/conv2d", "blocks.0/gelu")
        summary = summary_of("tensorrt-10-static")
        assert summary.compute_by_precision == {"Half": 1}
        assert summary.bytes_unknown == 0

    def test_dynamic_shapes_have_unknown_bytes_and_the_type_of_the_weights(self) -> None:
        kernels = kernels_from_inspector(inspected("tensorrt-10-dynamic"))
        assert [kernel.nbytes for kernel in kernels] == [None, None, None]
        assert [kernel.precision for kernel in kernels] == [UNKNOWN, "Half", UNKNOWN]
        assert kernels[0].outputs[0].written_out("x") == "?x3x8x8"
        summary = summary_of("tensorrt-10-dynamic")
        assert (summary.bytes_per_image, summary.bytes_unknown) == (0, 3)
        assert summary.compute_by_precision == {"Half": 1}

    def test_kernels_of_myelin(self) -> None:
        shapes, cast, gemm, product, other = kernels_from_inspector(inspected("tensorrt-10-myelin"))
        assert (shapes.nbytes, shapes.precision) == (0, "none")
        assert [kernel.computes for kernel in (shapes, cast, gemm, product, other)] == [False, False, True, True, False]
        summary = summary_of("tensorrt-10-myelin")
        assert summary.compute_by_precision == {"Half": 2, UNKNOWN: 1}
        assert summary.compute == "2 in Half, 1 unknown"
        assert summary.bytes_unknown == 0

    def test_a_network_in_one_node_tells_nothing_about_its_arithmetic(self) -> None:
        summary = summary_of("tensorrt-10-foreign-node")
        assert summary.by_kind == {"Myelin": 1}
        assert summary.compute_by_precision == {UNKNOWN: 1}
        assert (summary.bytes_per_image, summary.bytes_unknown) == (0, 1)

    def test_fields_of_tensorrt_11(self) -> None:
        for form, unknown in (("tensorrt-11-static", 0), ("tensorrt-11-dynamic", 2)):
            cast, convolution = kernels_from_inspector(inspected(form))
            assert [tensor.element for tensor in (*cast.inputs, *cast.outputs)] == ["Float", "Half"]
            assert (convolution.computes, convolution.precision) == (True, "Half")
            assert summary_of(form).bytes_unknown == unknown
        assert summary_of("tensorrt-11-static").bytes_per_image == 4 * 192 + 2 * 192 + 2 * 192 + 2 * 1024

    def test_names_alone(self) -> None:
        summary = summary_of("names-only")
        assert summary.by_kind == {UNKNOWN: 3}
        assert summary.compute_by_precision == {UNKNOWN: 3}
        assert (summary.bytes_per_image, summary.bytes_unknown) == (0, 3)

    @pytest.mark.parametrize("form", FORMS)
    def test_keys_match_in_any_case(self, form: str) -> None:
        def shouted(value: object) -> object:
            if isinstance(value, dict):
                return {key.upper(): shouted(item) for key, item in value.items()}
            return [shouted(item) for item in value] if isinstance(value, list) else value

        text = json.dumps(shouted(json.loads(inspected(form))))
        assert kernels_from_inspector(text) == kernels_from_inspector(inspected(form))

    @pytest.mark.parametrize("form", FORMS)
    def test_no_bytes_are_negative(self, form: str) -> None:
        kernels = kernels_from_inspector(inspected(form))
        assert kernels
        assert all(kernel.nbytes is None or kernel.nbytes >= 0 for kernel in kernels)

    @pytest.mark.parametrize("text", ['{"Layers": []}', "{}", '{"Layers": null, "Bindings": []}'])
    def test_no_layers(self, text: str) -> None:
        assert kernels_from_inspector(text) == ()

    @pytest.mark.parametrize("text", ["", "Layers:", "[]", "null", '{"Layers": [{"Name"'])
    def test_what_is_no_json_object(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"Expecting|not a JSON object"):
            kernels_from_inspector(text)

    def test_a_separator_that_is_not_escaped(self) -> None:
        (found,) = kernels_from_inspector(
            '{"Layers": [{"Name": "k", "LayerType": "kgen", "Metadata": "[ONNX Layer: a]\x1e[ONNX Layer: b]"}]}'
        )
        assert found.nodes == ("a", "b")


@pytest.mark.parametrize(
    ("dimensions", "shape", "nbytes"),
    [
        ([4, 3], (4, 3), 24),
        ([], (), 2),
        ([0, 3], (0, 3), 0),
        ([-1, 3], (-1, 3), None),
        ([-8, -10, 19], (-1, -1, 19), None),
        (["E0", 3], (-1, 3), None),
        (["(* 2 E0)", "3"], (-1, 3), None),
        ([None, 3], (-1, 3), None),
        ("N/A due to dynamic shapes", (-1,), None),
        (None, (-1,), None),
    ],
)
def test_sizes(dimensions: object, shape: tuple[int, ...], nbytes: int | None) -> None:
    found = layer(Outputs=[{"Name": "y", "Dimensions": dimensions, "Datatype": "Half"}])
    assert found.outputs[0].shape == shape
    assert found.nbytes == nbytes
    assert layer(Outputs=[{"Name": "y", "Datatype": "Half"}]).nbytes is None


@pytest.mark.parametrize(
    ("text", "element"),
    [
        ("Row major linear FP32", "Float"),
        ("Row major linear FP32 format (kLINEAR)", "Float"),
        ("Row major linear BOOL", "Bool"),
        ("Row major linear Int32", "Int32"),
        ("Row major linear BFloat16 format", "BFloat16"),
        ("Channel major INT8 format where channel == 4 and column stride % 32 == 0", "Int8"),
        ("Thirty-two wide channel vectorized row major Int8 format.", "Int8"),
        ("Channel major FP16 format where channel % 8 == 0", "Half"),
        ("BFloat16", "BFloat16"),
        ("Int64", "Int64"),
        ("FP8", "FP8"),
        ("N/A due to dynamic shapes", UNKNOWN),
        ("Unknown format", UNKNOWN),
        ("None", UNKNOWN),
        ("", UNKNOWN),
    ],
)
def test_element_types(text: str, element: str) -> None:
    for key in ("Format/Datatype", "Datatype", "DataType", "Format"):
        (tensor,) = layer(Outputs=[{"Name": "y", "Dimensions": [2], key: text}]).outputs
        assert tensor.element == element
        assert (tensor.nbytes is None) is (element == UNKNOWN)


def test_a_type_without_a_known_size_has_unknown_bytes() -> None:
    found = layer(Outputs=[{"Name": "y", "Dimensions": [2], "Datatype": "Int4"}])
    assert (found.precision, found.nbytes) == ("Int4", None)


@pytest.mark.parametrize(
    ("tactic", "element"),
    [
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw", "Int8"),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_nn_n_tilesize32x32x64", "Half"),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n", "Float"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "BFloat16"),
        ("sm90_xmma_gemm_e4m3e4m3_e4m3f32_f32_tn_n", "FP8"),
        ("ampere_h16816gemm_256x128_ldg8_nn_v1", "Half"),
        ("turing_int8_i8816gemm_int8_128x128_ldg16_relu_nt_v0", "Int8"),
        ("turing_fp16_s1688cudnn_fp16_128x128_ldg8_relu", "Half"),
        ("volta_scudnn_128x64_relu_medium_nn_v1", "Float"),
        ("__myl_FcMulAdd_0xf16c8bf32e7fa6", UNKNOWN),
        ("__myelin_CASK_STUB", UNKNOWN),
        ("", UNKNOWN),
    ],
)
def test_types_in_the_names_of_tactics(tactic: str, element: str) -> None:
    found = layer("CaskConvolution", TacticName=tactic, Outputs=[{"Name": "y", "Dimensions": [-1, 3]}])
    assert found.precision == element
    assert found.computes


def test_the_tensors_type_comes_before_that_of_the_weights_and_that_before_the_tactics() -> None:
    tactic = "sm80_xmma_gemm_bf16bf16_bf16f32_f32"
    reads, writes = ([{"Name": "t", "Dimensions": [2], "Datatype": element}] for element in ("FP8", "Half"))
    hidden = [{"Name": "t", "Dimensions": [-1], "Format/Datatype": "N/A due to dynamic shapes"}]
    weights = {"Type": "Float", "Count": 3}
    assert layer(Inputs=reads, Outputs=writes, Weights=weights, TacticName=tactic).precision == "Half"
    assert layer(Inputs=reads, Outputs=hidden, Weights=weights, TacticName=tactic).precision == "FP8"
    assert layer(Inputs=hidden, Outputs=hidden, Weights=weights, TacticName=tactic).precision == "Float"
    assert layer(Inputs=hidden, Outputs=hidden, ConvWeights=weights, TacticName=tactic).precision == "Float"
    assert layer(Inputs=hidden, Outputs=hidden, Weights={}, TacticName=tactic).precision == "BFloat16"
    assert layer(Inputs=hidden, Outputs=hidden, Weights=[0.5]).precision == UNKNOWN


@pytest.mark.parametrize(
    ("kind", "name", "nodes", "computes", "opaque"),
    [
        ("fusion", "__myl_FcMulAdd_myl0_25", "", True, True),
        ("fusion", "__myl_AddMul_myl0_2", "[ONNX Layer: blocks.0.out/MatMul]", True, True),
        ("fusion", "__myl_AddMul_myl0_2", "[ONNX Layer: blocks.0/add]", False, True),
        ("Myelin", "{ForeignNode[blocks.0/mul.../head/matmul]}", "", True, True),
        ("Myelin", "{ForeignNode[cast/images.../cast/logits]}", "[ONNX Layer: a][ONNX Layer: b/Conv]", True, True),
        ("Myelin", "{ForeignNode[cast/images.../cast/logits]}", "", False, True),
        ("Reformat", "Reformatting CopyNode for Output Tensor 0 to {ForeignNode[a/Conv...b]}", "", False, False),
        ("NoOp", "Reformatting CopyNode for Input Tensor 0 to a/Conv", "", False, False),
        ("PointWiseV2", "PWN(a.conv/gelu)", "", False, False),
        ("CaskConvActPool", "a", "", True, False),
        ("MatrixMultiply", "a", "", True, False),
        ("kgen", "__myl_CastRepl_myl0_1", "[ONNX Layer: a/Conv]", False, False),
        ("kgen", "_gemm_mha_v2_myl0_4", "", True, False),
        ("runtime_fusion", "__myl_CorrMulAdd_myl0_3", "", True, False),
    ],
)
def test_what_computes(kind: str, name: str, nodes: str, computes: bool, opaque: bool) -> None:
    found = layer(kind, name, Metadata=nodes)
    assert (found.computes, found.opaque) == (computes, opaque)


@pytest.mark.parametrize(("border", "expected"), [("Half", "Half"), ("BFloat16", "BFloat16"), ("Float", UNKNOWN)])
def test_only_narrow_borders_tell_of_a_region(border: str, expected: str) -> None:
    tensors = [{"Name": "t", "Dimensions": [2], "Datatype": border}]
    found = layer("Myelin", "{ForeignNode[a/Conv...b]}", Inputs=tensors, Outputs=tensors)
    assert summarize([found], batch=1).compute_by_precision == {expected: 1}


def test_totals() -> None:
    summary = summarize(
        [kernel("gemm", "Half"), kernel("gemm", "Half", reads="Int8"), kernel("gemm", "Float"), kernel("kgen", "Half")],
        batch=8,
    )
    assert summary.count == 4
    assert summary.by_kind == {"gemm": 3, "kgen": 1}
    assert summary.compute_by_precision == {"Half": 1, "Int8": 1, "Float": 1}
    assert summary.share("fp16") == summary.share("int8") == 1 / 3
    assert summary.share("bf16") == 0
    # 80 elements read and 80 written: Half 320 bytes, Int8 to Half 240, Float 640, and Half again.
    assert summary.bytes_per_image == (320 + 240 + 640 + 320) / 8


def test_only_known_bytes_are_counted() -> None:
    unknown = Kernel(name="k", kind="kgen", inputs=(KernelTensor(shape=(-1, 9), element="Half"),), outputs=(), nodes=())
    summary = summarize([kernel("gemm", "Half"), unknown], batch=8)
    assert (summary.bytes_per_image, summary.bytes_unknown) == (320 / 8, 1)


def test_no_kernels_share_nothing() -> None:
    assert summarize([], batch=8).share("fp16") == 0
