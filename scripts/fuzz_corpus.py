"""The real files that the fuzzer's inputs are made from."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import torch
from PIL import Image, ImageCms
from torch import Tensor

from smlp_deploy.exporters.calibration import CalibrationTable
from smlp_deploy.exporters.onnx import export_onnx
from smlp_deploy.files import DATA_FOLDER, sha256_of
from smlp_deploy.metadata import (
    METADATA_KEY,
    BatchProfile,
    CheckpointMetadata,
    EngineManifest,
    ModelMetadata,
    Preprocessing,
    SMLPNetConfig,
)
from smlp_deploy.models.checkpoint import load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.models.smlpnet import SMLPNet
from smlp_deploy.pipeline.precision import to_input, to_precision

IMAGES = ("jpeg", "png", "webp", "gif", "tiff", "bmp")
FAKE_ENGINE = b"not really an engine"
CONFIG = SMLPNetConfig(dim=8, depths=(1, 1), expansion=2, patch_size=4, image_size=16, num_classes=4)
LABELS = ("cat", "dog", "größe", "line one")


def build_corpus(folder: Path, kinds: Sequence[str]) -> None:
    """Write the files that the kinds' inputs are made from, as folder/KIND/NN, and the ones they stand beside.

    The same libraries write the same files each time.
    """
    torch.manual_seed(0)
    network = SMLPNet(CONFIG).eval()
    beside = folder / "beside"
    beside.mkdir(parents=True)
    (beside / "good.pth").write_bytes(torch_bytes({"model": network.state_dict()}))
    (beside / "good.png").write_bytes(_encoded("PNG", "RGB"))
    (beside / "x.engine").write_bytes(FAKE_ENGINE)
    facts = describe(
        load_checkpoint(beside / "good.pth"), labels=LABELS, preprocessing=asdict(Preprocessing(image_size=16))
    )
    sidecar = CheckpointMetadata(
        labels=LABELS, preprocessing=Preprocessing(image_size=16), training={"epochs": 3, "loss": 0.5}
    )
    graphs = cache(lambda: _graphs(network, facts))
    makers: dict[str, Callable[[], list[bytes]]] = {
        **{kind: partial(_images, kind) for kind in IMAGES},
        "pth": lambda: _pths(network.state_dict()),
        "safetensors": lambda: _safetensors(network.state_dict(), sidecar),
        "sidecar": lambda: [sidecar.to_json().encode()],
        "onnx": graphs,
        "metadata": lambda: graphs()[:1],
        "engine": lambda: [_manifest(facts, sha256_of(beside / "x.engine"))],
        "table": lambda: [_table()],
    }
    for kind in kinds:
        (folder / kind).mkdir()
        for number, content in enumerate(makers[kind]()):
            (folder / kind / f"{number:02}").write_bytes(content)


def read_corpus(folder: Path, kinds: Sequence[str]) -> dict[str, list[bytes]]:
    """The files that `build_corpus` wrote."""
    return {kind: [path.read_bytes() for path in sorted((folder / kind).iterdir())] for kind in kinds}


@cache
def _photo() -> Image.Image:
    with Image.open(DATA_FOLDER / "parity" / "chelsea.jpg") as image:
        return image.convert("RGB").resize((24, 16))


def _encoded(form: str, mode: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    _photo().convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def _images(kind: str) -> list[bytes]:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)  # the time of day
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif.get_ifd(0x8769)[0x9003] = "2022:09:04 12:00:00"
    facts = {"exif": exif, "icc_profile": bytes(profile)}
    frames = {"save_all": True, "append_images": [_photo().rotate(90)]}
    made: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
        "jpeg": (
            *((mode, {}) for mode in ("RGB", "L", "CMYK")),
            ("RGB", {"progressive": True, **facts}),
            ("RGB", {"restart_marker_blocks": 2, "subsampling": 0, "exif": exif, "comment": b"a comment"}),
        ),
        "png": (
            *((mode, {}) for mode in ("RGB", "L", "P", "1", "RGBA", "LA", "I;16")),
            *(("P", {"transparency": 3, "bits": 8}), ("RGB", {**facts, "dpi": (72, 72)}), ("RGB", frames)),
        ),
        "webp": (("RGB", {}), ("RGB", {"lossless": True}), ("RGBA", facts), ("RGB", frames)),
        "gif": (("P", {}), ("P", {"transparency": 3, "interlace": 0}), ("P", {**frames, "comment": b"a comment"})),
        "tiff": (
            *(("RGB", {"compression": codec}) for codec in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
            *((mode, {}) for mode in ("RGB", "L", "P", "1", "RGBA", "CMYK", "I;16", "F")),
            *(("1", {"compression": "group4"}), ("RGB", {**frames, "icc_profile": bytes(profile)})),
        ),
        "bmp": tuple((mode, {}) for mode in ("RGB", "L", "P", "1", "RGBA")),
    }
    files = [_encoded(kind.upper(), mode, **options) for mode, options in made[kind]]
    real = sorted((DATA_FOLDER / "parity").glob("*.jpg"))[-1:] if kind == "jpeg" else []
    return files + [path.read_bytes() for path in real]


def _pths(state: dict[str, Tensor]) -> list[bytes]:
    arguments = argparse.Namespace(lr=0.1, model="nano", crop=None)
    training = {"model": state, "model_ema": state, "epoch": 3, "args": arguments, "lrs": [0.1, 1e-4]}
    halves = {f"module.{key}": value.half() for key, value in state.items()}
    inside = {f"model.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(3)}
    lightning = {"state_dict": inside, "hyper_parameters": {"root": PurePosixPath("data")}, "callbacks": {"x": {}}}
    return [torch_bytes(content) for content in (state, training, halves, lightning)]


def torch_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _safetensors(state: dict[str, Tensor], sidecar: CheckpointMetadata) -> list[bytes]:
    tensors = {key: value for key, value in state.items() if value.ndim}
    halves = {key: value.half() for key, value in tensors.items()}
    return [safetensors.torch.save(each, {METADATA_KEY: sidecar.to_json()}) for each in (tensors, halves)]


def _graphs(network: SMLPNet, facts: ModelMetadata) -> list[bytes]:
    """The network's graph in fp32, for any batch size, in fp16 and in bf16; and in fp16 of uint8 input."""
    graph = export_onnx(network, facts, path=Path("graph.onnx"))
    graphs = [to_precision(graph, precision) for precision in ("fp32", "fp16", "bf16")]
    return [each.content for each in (*graphs, to_input(graphs[1], "uint8"))]


def _table() -> bytes:
    ranges = {"images": 2.64, "gelu": 3.5, "mul_4": 0.25, "bytes": 0.0}
    return CalibrationTable(ranges=ranges, method="minmax", images=12, checkpoint_sha256="0" * 64).to_json().encode()


def _manifest(facts: ModelMetadata, sha256: str) -> bytes:
    manifest = EngineManifest(
        engine_sha256=sha256,
        metadata=facts,
        onnx_file="nano-fp16.onnx",
        onnx_sha256="1" * 64,
        backend="tensorrt-rtx",
        version="1.5.0.97",
        profile=BatchProfile(),
        architectures=("sm90",),
        ran_here=True,
        options={"strongly_typed": True, "workspace": 0},
        memory=("12 MiB of weights",),
        kernels={"compute_by_precision": {"fp16": 12}},
    )
    return manifest.to_json().encode()
