"""The wrapper of the CUDA runtime, on the bench."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from smlp_deploy.errors import GpuError, GpuMemoryError
from smlp_deploy.runners.cuda import Cuda, use_gpu
from tests.support.cuda_names import cudaError_t
from tests.support.cuda_runtime import CudaBench
from tests.support.gpu import L4


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaBench]:
    with CudaBench(devices=2, memory=1000) as bench:
        bench.install(monkeypatch)
        yield bench


class TestAnErrorIsReportedOnce:
    """CUDA keeps it until it is asked."""

    def test_memory_that_ran_out(self, bench: CudaBench) -> None:
        cuda = Cuda()
        with pytest.raises(GpuMemoryError, match="the GPU's memory is full"):
            cuda.device(2000)
        cuda.check("execute_async_v3")
        cuda.close()

    def test_a_capture_that_failed(self, bench: CudaBench) -> None:
        cuda = Cuda()
        stream = cuda.stream()
        with pytest.raises(GpuError, match=r"\(cudaStreamEndCapture\)"):
            cuda.capture(stream, lambda: bench.runtime.cudaStreamSynchronize(stream))
        cuda.check("execute_async_v3")
        cuda.close()
        assert len(bench.faults) == 1  # a capture cannot wait, as this one does on purpose
        bench.faults.clear()

    def test_a_release_that_failed(self, bench: CudaBench) -> None:
        cuda = Cuda()
        bench.fail("cudaStreamSynchronize", cudaError_t.cudaErrorUnknown)
        stream = cuda.stream()
        cuda.release("cudaStreamSynchronize", stream)
        cuda.check("execute_async_v3")
        cuda.close()

    def test_one_that_somebody_else_made_is_found(self, bench: CudaBench) -> None:
        cuda = Cuda()
        bench.runtime.cudaMalloc(2000)
        with pytest.raises(GpuMemoryError, match="the GPU's memory is full"):
            cuda.check("execute_async_v3")
        cuda.check("execute_async_v3")
        cuda.close()


class TestTheGpuOfAThread:
    def test_it_is_the_one_that_was_chosen(self, bench: CudaBench) -> None:
        cuda = Cuda(1)
        assert bench.device == 1
        cuda.device(600)
        Cuda(0).device(300)
        assert bench.device == 0
        cuda.use()
        assert bench.device == 1
        with pytest.raises(GpuMemoryError):
            cuda.device(600)  # the 300 are on the other
        cuda.close()
        bench.release(bench._memory[1])

    def test_another_thread_chooses_it_too(self, bench: CudaBench) -> None:
        cuda = Cuda(1)
        seen: list[int] = []

        def work() -> None:
            seen.append(bench.device)
            cuda.use()
            seen.append(bench.device)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [0, 1]

    def test_one_that_is_not_there(self, bench: CudaBench) -> None:
        with pytest.raises(GpuError, match=r"invalid device ordinal \(cudaSetDevice\)"):
            Cuda(2)
        assert bench.faults == ["cudaSetDevice: there is no device 2 (cudaErrorInvalidDevice)"]
        bench.faults.clear()

    def test_none_changes_nothing(self, bench: CudaBench) -> None:
        use_gpu(None)
        assert not bench.calls
        use_gpu(L4)
        assert bench.calls["cudaSetDevice"] == 1
