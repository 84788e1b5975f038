"""Activation ranges, measured by ONNX Runtime's calibrators on real images, and the table that stores them."""

from __future__ import annotations

import io
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.quantization import calibrate as calibrators

from smlp_deploy import strictjson
from smlp_deploy.errors import ArtifactError, SmlpError, UsageError
from smlp_deploy.files import read_text
from smlp_deploy.graphs.file import INPUT_NAME
from smlp_deploy.images.batches import FloatArray

METHODS = ("minmax", "entropy", "percentile")
TABLE_SCHEMA = 1

_ENTROPY_BINS = 512


@dataclass(frozen=True, kw_only=True)
class CalibrationTable:
    """The result of a calibration, from which a graph is quantized without images.

    Attributes:
        ranges: the largest absolute value to represent in each tensor.
        method: how it was chosen, one of `METHODS`.
        images: number of images used.
        checkpoint_sha256: of the weights in the calibrated graph.

    Raises:
        ValueError: a value is out of range.
    """

    ranges: Mapping[str, float]
    method: str
    images: int
    checkpoint_sha256: str

    def __post_init__(self) -> None:
        for name, value in self.ranges.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"the range of {name!r} is {value!r}")
        if self.method not in METHODS:
            raise ValueError(f"the method is {self.method!r}")
        if self.images < 1:
            raise ValueError(f"the number of images is {self.images!r}")

    def to_json(self) -> str:
        return json.dumps({"schema": TABLE_SCHEMA, **asdict(self)}, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: object) -> CalibrationTable:
        """Read the JSON form, which came from the file `where`.

        Raises:
            ArtifactError: the JSON has another form or schema.
        """
        try:
            return strictjson.read(text, cls, schema=TABLE_SCHEMA)
        except strictjson.SchemaError as error:
            fix = "upgrade smlp-deploy, or calibrate again"
            raise ArtifactError(f"calibration table {error}", where=where, fix=fix) from None
        except ValueError as error:
            raise ArtifactError(
                f"the calibration table is damaged: {error}", where=where, fix="calibrate again"
            ) from None


def read_table(path: Path) -> CalibrationTable:
    """The calibration table in a file.

    Raises:
        ArtifactError: it cannot be read, or is damaged.
    """
    text = read_text(path, error=ArtifactError, fix="an int8 export writes one beside its file: x.calibration.json")
    return CalibrationTable.from_json(text, where=path)


def measure_ranges(
    model: ModelProto,
    tensors: Collection[str],
    batches: Iterable[FloatArray],
    *,
    method: str,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, float], int]:
    """Run `model` on real images; return the range of each tensor by name, and the number of images.

    Only the activations of one batch are in memory.

    Args:
        model: the fp32 graph.
        tensors: names of float32 values in it.
        batches: preprocessed images N, 3, S, S.
        method: one of `METHODS`.
        progress: called with the number of images done, after each batch.

    Raises:
        UsageError: an unknown method, no images, or batches of a size that the graph does not accept.
        ArtifactError: an activation is not finite.
    """
    if method not in METHODS:
        raise UsageError(f"calibration method {method!r} is unknown", fix=f"use one of {', '.join(METHODS)}")
    names = sorted(tensors)
    size = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    images = 0
    # ONNX Runtime's calibrators work on files, and print.
    with _work_folder() as folder, redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NaN, which `_range` refuses
        calibrator = _calibrator(model, names, method=method, folder=folder)
        for batch in batches:
            if size and len(batch) != size:
                raise UsageError(f"a calibration batch of {len(batch)} images; the graph takes exactly {size}")
            calibrator.collect_data(_OneBatch(batch))
            images += len(batch)
            if progress is not None:
                progress(images)
        if not images:
            raise UsageError("there are no calibration images", fix="give at least one, preferably 128 or more")
        found = calibrator.compute_data()
    return {name: _range(name, found[name].range_value) for name in names}, images


@contextmanager
def _work_folder() -> Iterator[Path]:
    """A temporary folder.

    Raises:
        SmlpError: there is none that can be written to, or it is full.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    except OSError as error:
        raise SmlpError(
            f"cannot write temporary files: {error.strerror}",
            fix="set TMPDIR to a folder with room for two copies of the graph",
        ) from None


class _OneBatch:
    """The data reader that ONNX Runtime's calibrators expect."""

    def __init__(self, batch: FloatArray) -> None:
        self._inputs: list[dict[str, FloatArray]] = [{INPUT_NAME: batch}]

    def get_next(self) -> dict[str, FloatArray] | None:
        return self._inputs.pop() if self._inputs else None


def _calibrator(model: ModelProto, tensors: list[str], *, method: str, folder: Path) -> Any:
    """An ONNX Runtime calibrator for exactly these tensors, instead of all those of given operator types."""
    source, augmented = folder / "graph.onnx", str(folder / "augmented.onnx")
    onnx.save(model, source)
    if method == "minmax":
        calibrator = calibrators.MinMaxCalibrater(source, augmented_model_path=augmented, symmetric=True)
    elif method == "entropy":
        calibrator = calibrators.EntropyCalibrater(
            source, augmented_model_path=augmented, symmetric=True, num_bins=_ENTROPY_BINS
        )
    else:
        calibrator = calibrators.PercentileCalibrater(source, augmented_model_path=augmented, symmetric=True)
    values = {value.name: value for value in (*calibrator.model.graph.input, *calibrator.model.graph.value_info)}
    calibrator.select_tensors_to_calibrate = lambda _: (tensors, values)
    calibrator.augment_graph()
    calibrator.create_inference_session()
    return calibrator


def _range(name: str, bounds: Iterable[NDArray[np.float32]]) -> float:
    largest = float(np.max(np.abs(np.array([np.ravel(bound)[0] for bound in bounds], np.float64))))
    if not math.isfinite(largest):
        raise ArtifactError(f"tensor {name!r} is not finite on the calibration images", fix="check the checkpoint")
    return largest
