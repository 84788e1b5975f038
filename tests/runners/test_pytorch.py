from __future__ import annotations

import shutil
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from smlp_deploy.errors import GpuError, GpuMemoryError, MissingDependencyError
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.models import lowering
from smlp_deploy.models.checkpoint import Checkpoint, load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.runners import open_runner, pytorch
from smlp_deploy.runners.base import GpuTimer
from smlp_deploy.runners.placement import Placement
from smlp_deploy.runners.pytorch import (
    CompiledRunner,
    HalfRunner,
    PyTorchRunner,
    RecordingRunner,
    TracingPyTorchRunner,
    _Float32Sums,
    device_of,
)
from tests.support.gpu import L4


@pytest.fixture
def batch() -> FloatArray:
    return np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)


def test_a_large_batch_runs_in_pieces_on_the_cpu(
    digits: Checkpoint, batch: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    run = PyTorchRunner._run

    def seen(runner: PyTorchRunner, images: Tensor) -> Tensor:
        sizes.append(len(images))
        return run(runner, images)

    monkeypatch.setattr(PyTorchRunner, "_run", seen)
    monkeypatch.setattr(pytorch, "available_cores", lambda: 1)
    many = np.tile(batch, (100 // len(batch) + 1, 1, 1, 1))[:100]
    with PyTorchRunner(digits, describe(digits)) as runner:
        found, expected = runner.infer(many), runner.infer(batch)
    assert sizes[:2] == [98, 2], "as many pixels as two images of 224 x 224"
    assert np.abs(found[: len(batch)] - expected).max() < 1e-4


def test_true_half_arithmetic_is_near_but_not_equal(digits: Checkpoint, batch: FloatArray) -> None:
    metadata = describe(digits)
    with PyTorchRunner(digits, metadata) as trained, HalfRunner(digits, metadata) as half:
        expected, found = trained.infer(batch), half.infer(batch)
    assert found.dtype == np.float32
    assert 1e-5 < np.abs(found - expected).max() / expected.std() < 1e-2


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, weight: x @ weight,
        lambda x, weight: functional.linear(x, weight.T),
        lambda x, weight: functional.conv2d(x.T[None, ..., None], weight.T[..., None, None]),
    ],
    ids=["product", "linear", "convolution"],
)
def test_half_results_are_those_of_pytorchs_own_kernels(compute: Callable[[Tensor, Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).half() for shape in ((64, 96), (96, 32)))
    x[0] *= 20_000  # whose sums exceed the range
    expected = compute(x, weight)
    with _Float32Sums():
        found = compute(x, weight)
    assert found.dtype == torch.float16
    assert found.isinf().any()
    assert torch.equal(found.isinf(), expected.isinf())
    # A sum halfway between two fp16 numbers may be rounded to either, because its terms are added in another order.
    assert (found == expected).float().mean() > 0.99
    finite = expected.isfinite()
    assert torch.allclose(found[finite], expected[finite], rtol=2**-10, atol=2**-14)


def test_the_recorder_computes_the_same_and_remembers_the_largest(digits: Checkpoint, batch: FloatArray) -> None:
    metadata = describe(digits)
    with PyTorchRunner(digits, metadata) as trained, RecordingRunner(digits, metadata) as recorder:
        assert np.abs(recorder.infer(batch) - trained.infer(batch)).max() < 1e-4
        name, largest = recorder.largest()
        recorder.infer(batch * 1000)
        assert recorder.largest()[1] > largest > 1
        recorder.infer(batch)
        assert recorder.largest()[1] > largest
    assert name.split(".")[0] in ("blocks", "embeddings")


@pytest.mark.parametrize("largest_dense_grid", [0, 14])
def test_inspection_runs_the_form_of_the_artifact(
    digits: Checkpoint, batch: FloatArray, largest_dense_grid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "LARGEST_DENSE_GRID", largest_dense_grid)
    metadata = replace(describe(digits), form="gpu")
    with (
        PyTorchRunner(digits, metadata) as trained,
        HalfRunner(digits, metadata) as half,
        RecordingRunner(digits, metadata) as recorder,
    ):
        expected = trained.infer(batch)
        assert 1e-5 < np.abs(half.infer(batch) - expected).max() / expected.std() < 1e-2
        assert np.abs(recorder.infer(batch) - expected).max() < 1e-4
        products = {"width", "height", "fuse_width", "fuse_height"} if largest_dense_grid == 0 else {"tokens", "fuse"}
        assert {f"blocks.5.mixing.{name}" for name in products} | {"blocks.5.mixing"} <= recorder._largest.keys()
    with (
        TracingPyTorchRunner(digits, metadata) as trained_values,
        TracingPyTorchRunner(digits, metadata, lowered=True) as lowered_values,
    ):
        found = lowered_values.trace(batch)
        for name, values in trained_values.trace(batch).items():
            assert np.abs(found[name] - values).max() < 1e-4 * np.abs(values).max(), name


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile uses it itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_computes_the_same(one_block: Path, batch: FloatArray) -> None:
    checkpoint = load_checkpoint(one_block)
    metadata = describe(checkpoint)
    with PyTorchRunner(checkpoint, metadata) as trained, CompiledRunner(checkpoint, metadata) as compiled:
        expected, found = trained.infer(batch), compiled.infer(batch)
    assert compiled.name == "torch.compile (CPU) one_block.pth"
    assert np.abs(found - expected).max() < 1e-4


class Event:
    """A CUDA event that records at once."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        assert self._at

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end._at - self._at)


class TestOnAGpu:
    """With the CPU in place of the GPU: which one is asked for, timed, and what its errors become."""

    @pytest.fixture
    def current(self, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
        """The devices that were made the current one."""
        current: list[torch.device] = []

        def select(device: torch.device) -> AbstractContextManager[None]:
            current.append(device)
            return nullcontext()

        monkeypatch.setattr(pytorch, "device_of", lambda gpu: torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "device", select)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        return current

    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (PyTorchRunner, "pytorch (CUDA)"),
            (CompiledRunner, "torch.compile (CUDA)"),
            (HalfRunner, "pytorch (CUDA, lowered, fp16)"),
            (RecordingRunner, "pytorch (CUDA, lowered)"),
            (TracingPyTorchRunner, "pytorch (CUDA)"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile uses it itself
    def test_its_name_says_so(
        self, digits: Checkpoint, current: list[torch.device], make: Callable[..., PyTorchRunner], name: str
    ) -> None:
        metadata = describe(digits)
        assert make(digits, metadata, gpu=L4).name == f"{name} smlpnet_digits.safetensors"
        second = make(digits, metadata, gpu=replace(L4, index=1)).name
        assert second == f"{name.replace('CUDA', 'CUDA:1')} smlpnet_digits.safetensors"

    def test_it_is_timed_there_by_events(
        self, digits: Checkpoint, batch: FloatArray, current: list[torch.device]
    ) -> None:
        metadata = describe(digits)
        with PyTorchRunner(digits, metadata) as on_cpu, PyTorchRunner(digits, metadata, gpu=L4) as runner:
            np.testing.assert_array_equal(runner.infer(batch), on_cpu.infer(batch))
            assert len(current) == 1
            assert isinstance(runner, GpuTimer)
            seconds = runner.gpu_seconds(batch, runs=3)
            assert len(seconds) == 3
            assert all(0 < second < 10 for second in seconds)
            assert len(current) == 2
            assert on_cpu.gpu_seconds(batch, runs=3) == []

    @pytest.mark.parametrize(
        ("raised", "expected", "message"),
        [
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), GpuMemoryError, "memory is full"),
            (torch.AcceleratorError("CUDA error: out of memory"), GpuMemoryError, "the GPU's memory is full"),
            (
                torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors"),
                GpuError,
                r"^the GPU failed: CUDA error: an illegal memory access was encountered · nvidia-smi",
            ),
            (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), GpuError, "the GPU failed: cuDNN error"),
            (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"), GpuError, "the GPU failed: CUBLAS"),
            (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError, "^mat1 and mat2"),
        ],
    )
    def test_errors(
        self,
        digits: Checkpoint,
        batch: FloatArray,
        monkeypatch: pytest.MonkeyPatch,
        raised: Exception,
        expected: type[Exception],
        message: str,
    ) -> None:
        with PyTorchRunner(digits, describe(digits)) as runner:

            def run(images: torch.Tensor) -> None:
                raise raised

            monkeypatch.setattr(runner, "_run", run)
            with pytest.raises(expected, match=message) as caught:
                runner.infer(batch)
        assert type(caught.value) is expected

    def test_memory_that_ran_out_is_free_again_while_the_error_is_handled(
        self, digits: Checkpoint, batch: FloatArray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held: list[weakref.ref[torch.Tensor]] = []

        def run(images: torch.Tensor) -> None:
            activation = images + 1
            held.append(weakref.ref(activation))
            raise torch.OutOfMemoryError("CUDA out of memory")

        with PyTorchRunner(digits, describe(digits)) as runner:
            monkeypatch.setattr(runner, "_run", run)
            try:
                runner.infer(batch)
            except GpuMemoryError:
                assert held[0]() is None
        assert held

    def test_memory_that_runs_out_while_it_is_loaded(self, digits: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(torch.nn.Module, "to", full)
        with pytest.raises(GpuMemoryError, match="the GPU's memory is full"):
            PyTorchRunner(digits, describe(digits))

    def test_a_gpu_computes_in_true_fp32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.allow_tf32, products.allow_tf32
        try:
            cudnn.allow_tf32 = products.allow_tf32 = True
            assert device_of(None) == torch.device("cpu")
            assert cudnn.allow_tf32
            assert device_of(replace(L4, index=1)) == torch.device("cuda:1")
            assert (cudnn.allow_tf32, products.allow_tf32) == (False, False)
        finally:
            cudnn.allow_tf32, products.allow_tf32 = before

    @pytest.mark.parametrize(
        ("built_for", "message"),
        [
            (
                None,
                r"^the installed PyTorch \S+ is for the CPU only · install PyTorch for CUDA, or leave out --device$",
            ),
            ("13.0", r"^the installed PyTorch \S+ does not see the GPU · update the NVIDIA driver, or install"),
        ],
    )
    def test_a_pytorch_that_cannot_is_one_clear_line(
        self, micro_pth: Path, monkeypatch: pytest.MonkeyPatch, built_for: str | None, message: str
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", built_for)
        with pytest.raises(MissingDependencyError, match=message):
            open_runner(micro_pth, placement=Placement(gpu=L4))
