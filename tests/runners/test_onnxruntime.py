from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

from smlp_deploy import dependencies, files
from smlp_deploy.errors import ArtifactError, ConfigError, MissingDependencyError, UsageError
from smlp_deploy.files import BUNDLED_CHECKPOINT
from smlp_deploy.images.batches import FloatArray, ImageArray
from smlp_deploy.metadata import METADATA_KEY
from smlp_deploy.pipeline.export import Export
from smlp_deploy.pipeline.precision import to_input
from smlp_deploy.runners import onnxruntime as module
from smlp_deploy.runners import open_runner
from smlp_deploy.runners.base import arithmetic_of
from smlp_deploy.runners.onnxruntime import PROVIDERS, OnnxRuntimeRunner
from tests.support.fakes import Exported
from tests.support.gpu import L4


def test_a_fixed_batch_takes_any_number_of_images(exported: Exported, digits_export: Export) -> None:
    fixed = exported(batch=4).path
    batch = np.random.default_rng(0).standard_normal((6, 3, 32, 32), dtype=np.float32)
    with OnnxRuntimeRunner.open(fixed) as of_four, OnnxRuntimeRunner.open(digits_export.path) as of_any:
        assert np.abs(of_four.infer(batch) - of_any.infer(batch)).max() < 1e-4


def test_a_large_batch_runs_in_pieces_on_the_cpu(digits_export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = np.random.default_rng(0).standard_normal((200, 3, 32, 32), dtype=np.float32)
    sizes: list[int] = []
    run = OnnxRuntimeRunner._outputs

    def seen(runner: OnnxRuntimeRunner, images: ImageArray) -> list[FloatArray]:
        sizes.append(len(images))
        return run(runner, images)

    monkeypatch.setattr(OnnxRuntimeRunner, "_outputs", seen)
    with OnnxRuntimeRunner.open(digits_export.path, cores=1) as one, OnnxRuntimeRunner.open(digits_export.path) as all_:
        found, expected = one.infer(batch), np.concatenate([all_.infer(batch[at : at + 8]) for at in range(0, 200, 8)])
    assert sizes[:2] == [196, 4], "as many pixels as four images of 224 x 224"
    assert np.abs(found - expected).max() < 1e-4


def test_a_file_without_metadata_is_refused(digits_export: Export, tmp_path: Path) -> None:
    model = onnx.load(digits_export.path)
    model.ClearField("metadata_props")
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(ArtifactError, match=r"no labels and preprocessing inside.*smlp export"):
        OnnxRuntimeRunner.open(tmp_path / "bare.onnx")


def test_damaged_metadata_are_refused(digits_export: Export, tmp_path: Path) -> None:
    model = onnx.load(digits_export.path)
    onnx.helper.set_model_props(model, {METADATA_KEY: '{"schema": 99}'})
    onnx.save(model, tmp_path / "newer.onnx")
    with pytest.raises(ConfigError, match="metadata schema 99 is not 1"):
        OnnxRuntimeRunner.open(tmp_path / "newer.onnx")


@pytest.mark.parametrize("keep", [0, 10, 100_000])
def test_a_truncated_file_is_one_clear_error(digits_export: Export, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(digits_export.path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"^not an ONNX file"):
        OnnxRuntimeRunner.open(path)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_is_an_error(digits_export: Export, provider: str) -> None:
    if PROVIDERS[provider] in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {provider}")
    with pytest.raises(MissingDependencyError, match=r"has no (CUDA|Tensorrt)ExecutionProvider.*smlp-deploy\[gpu\]"):
        OnnxRuntimeRunner.open(digits_export.path, provider=provider)


def test_a_provider_that_falls_back_is_an_error(digits_export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    # What onnxruntime-gpu does without a GPU: it lists CUDA, and gives a session on the CPU.
    real = onnxruntime.InferenceSession

    def falls_back(source: Path, options: onnxruntime.SessionOptions, providers: list[str], **settings: int) -> object:
        return real(source, options, providers=["CPUExecutionProvider"], **settings)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "InferenceSession", falls_back)
    with pytest.raises(MissingDependencyError, match="CUDAExecutionProvider does not start here, only CPU"):
        OnnxRuntimeRunner.open(digits_export.path, provider="cuda")


def test_a_provider_is_for_onnx_files(digits_export: Export) -> None:
    with open_runner(digits_export.path, provider="cpu") as runner:
        assert runner.name == "onnxruntime (CPU) digits-fp32.onnx"
    with pytest.raises(UsageError, match="only ONNX files take a provider"):
        open_runner(BUNDLED_CHECKPOINT, provider="cpu")


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        OnnxRuntimeRunner.open(tmp_path / "absent.onnx")


ON_ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pathlib import Path
import numpy as np
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner
with OnnxRuntimeRunner.open(Path(sys.argv[1])) as runner:
    runner.infer(np.zeros((2, 3, 32, 32), np.float32))
    cores = set().union(*(os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")))
print(len(cores))
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux with two cores"
)
def test_its_threads_stay_on_the_cores_of_the_process(digits_export: Export) -> None:
    command = [sys.executable, "-c", ON_ONE_CORE, str(digits_export.path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"


class DeadGpu:
    """The session in ONNX Runtime's own language, on a GPU that fails in every run."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *arguments: Any) -> None:
        raise EPFail("CUDA failure 700: an illegal memory access was encountered")


@dataclass
class Machine:
    """An ONNX Runtime with GPU providers; it computes on the CPU.

    Attributes:
        dies: the GPU fails in every run.
        driver_too_old: no session can be created on the GPU.
        sessions: provider and options of each session of the bundled model.
        batches: the sizes that it ran.
        events: what happened, in order.
    """

    dies: bool = False
    driver_too_old: bool = False
    sessions: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def preload(self, *, directory: str) -> None:
        self.events.append(f"preload {directory!r}")
        sys.stdout.write("Failed to load libcudnn.so.9\n")

    def session(self) -> type:
        machine = self

        class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
            _sess: Any

            def __init__(self, content: bytes, options: Any, *, providers: list[Any], **settings: Any) -> None:
                first = providers[0]
                self._first, given = first if isinstance(first, tuple) else (first, {})
                machine.events.append(f"session {self._first}")
                if (
                    machine.driver_too_old
                    and self._first != PROVIDERS["cpu"]
                    and not settings.get("enable_fallback", 1)
                ):
                    raise RuntimeError("CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version")
                super().__init__(content, options, providers=[PROVIDERS["cpu"]], **settings)
                if len(content) > 10_000:  # not the session of one node
                    machine.sessions.append((self._first, given))
                    if machine.dies:
                        self._sess = DeadGpu(self._sess)

            def run(self, outputs: Any, inputs: dict[str, Any], *arguments: Any) -> Any:
                machine.batches += [len(batch) for batch in inputs.values()]
                return super().run(outputs, inputs, *arguments)

            def get_providers(self) -> list[str]:
                return [self._first, PROVIDERS["cpu"]]

        return Session


@pytest.fixture
def machine(exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    for precision, batch in (("fp32", None), ("fp16", None), ("fp32", 4)):
        exported(precision, batch)  # before sessions are recorded: an export has one, too
    machine = Machine()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "InferenceSession", machine.session())
    monkeypatch.setattr(onnxruntime, "preload_dlls", machine.preload, raising=False)
    monkeypatch.setattr(files, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return machine


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Installs a package `tensorrt` with this code."""

    def install(code: str) -> None:
        (tmp_path / "tensorrt.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)

    yield install
    sys.modules.pop("tensorrt", None)


def images(number: int) -> Any:
    return np.random.default_rng(0).standard_normal((number, 3, 32, 32), dtype=np.float32)


class TestGpuProviders:
    def test_with_cuda_a_last_short_batch_runs_at_a_size_that_ran_before(
        self, digits_export: Export, machine: Machine
    ) -> None:
        with OnnxRuntimeRunner.open(digits_export.path) as on_cpu:
            expected = on_cpu.infer(images(16))
        machine.batches.clear()
        with OnnxRuntimeRunner.open(digits_export.path, provider="cuda") as runner:
            for number in (16, 7, 4, 3, 7, 16):
                np.testing.assert_allclose(runner.infer(images(16)[:number]), expected[:number], rtol=1e-4, atol=1e-5)
        assert machine.batches[-6:] == [16, 16, 16, 3, 16, 16]

    def test_libraries_are_loaded_first_and_what_that_prints_is_not_on_stdout(
        self, digits_export: Export, machine: Machine, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with OnnxRuntimeRunner.open(digits_export.path, provider="cuda") as runner:
            assert runner.infer(images(2)).shape == (2, 10)
        assert machine.events == ["preload ''", "session CUDAExecutionProvider"]
        assert capsys.readouterr().out == ""

    def test_fp32_is_true_fp32_and_half_prefers_nhwc(self, exported: Exported, machine: Machine) -> None:
        for precision in ("fp32", "fp16"):
            with OnnxRuntimeRunner.open(exported(precision).path, provider="cuda") as runner:
                assert runner.arithmetic == precision
        assert [options for provider, options in machine.sessions if provider == PROVIDERS["cuda"]] == [
            {"device_id": "0", "use_tf32": "0"},
            {"device_id": "0", "use_tf32": "0", "prefer_nhwc": "1"},
        ]

    def test_tensorrt_multiplies_fp32_in_tf32_and_says_so(self, exported: Exported, machine: Machine) -> None:
        for precision, name in (("fp32", "onnxruntime (TENSORRT, TF32) "), ("fp16", "onnxruntime (TENSORRT) ")):
            with OnnxRuntimeRunner.open(exported(precision).path, provider="tensorrt") as runner:
                assert arithmetic_of(runner) == {"fp32": "tf32"}.get(precision, precision)
                assert runner.name.startswith(name)

    @pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
    def test_the_second_gpu(self, digits_export: Export, machine: Machine, provider: str) -> None:
        gpu = replace(L4, index=1)
        with OnnxRuntimeRunner.open(digits_export.path, provider=provider, gpu=gpu) as runner:
            runner.infer(images(2))
            assert runner.name.startswith(f"onnxruntime ({provider.upper()}:1")
        ((_, options),) = machine.sessions
        assert options["device_id"] == "1"
        if provider == "tensorrt":
            assert "NVIDIA-L4-12080" in options["trt_engine_cache_path"]

    def test_the_device_chooses_the_provider(
        self, digits_export: Export, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dependencies, "list_gpus", lambda: (L4,))
        with open_runner(digits_export.path, device="cuda") as runner:
            assert runner.name == "onnxruntime (CUDA) digits-fp32.onnx"
        with open_runner(digits_export.path, device="cpu") as runner:
            assert runner.name == "onnxruntime (CPU) digits-fp32.onnx"

    def test_onnxruntime_is_silent_where_the_gpu_fails(self) -> None:
        # Its default logger writes to the file descriptor of stderr, so a process of its own.
        script = (
            "import onnxruntime, sys\n"
            "from smlp_deploy.runners import onnxruntime as module\n"
            "onnxruntime.set_default_logger_severity(0)\n"
            "module._starts('CPUExecutionProvider')\n"
            "print('--- silenced', file=sys.stderr, flush=True)\n"
            "module._load_libraries('cuda')\n"
            "module._starts('CPUExecutionProvider')\n"
        )
        run = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=True)
        before, after = run.stderr.split("--- silenced\n")
        assert "onnxruntime:Default" in before
        assert after == ""

    def test_nothing_is_loaded_for_the_cpu(self, digits_export: Export, machine: Machine) -> None:
        with OnnxRuntimeRunner.open(digits_export.path):
            assert machine.events == ["session CPUExecutionProvider"]

    def test_an_onnxruntime_that_cannot_load_libraries_itself(
        self, digits_export: Export, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(onnxruntime, "preload_dlls")
        with OnnxRuntimeRunner.open(digits_export.path, provider="cuda") as runner:
            assert runner.name == "onnxruntime (CUDA) digits-fp32.onnx"

    @pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
    def test_a_gpu_that_dies_in_mid_run_is_an_error(
        self, digits_export: Export, machine: Machine, provider: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        machine.dies = True
        with (
            OnnxRuntimeRunner.open(digits_export.path, provider=provider) as runner,
            pytest.raises(ArtifactError, match="CUDA failure 700"),
        ):
            runner.infer(images(1))
        assert capsys.readouterr().out == ""

    def test_the_fake_falls_back_as_onnxruntime_does(
        self, digits_export: Export, machine: Machine, capsys: pytest.CaptureFixture[str]
    ) -> None:
        machine.dies = True
        settings = onnxruntime.SessionOptions()
        session = onnxruntime.InferenceSession(digits_export.path.read_bytes(), settings, providers=[PROVIDERS["cuda"]])
        assert session.run(None, {"images": images(1)})[0].shape == (1, 10)
        assert "EP Error" in capsys.readouterr().out

    @pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
    def test_a_driver_that_is_too_old(
        self, digits_export: Export, machine: Machine, provider: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        machine.driver_too_old = True
        with pytest.raises(MissingDependencyError, match=r"ExecutionProvider does not start here, .*smlp doctor"):
            OnnxRuntimeRunner.open(digits_export.path, provider=provider)
        assert capsys.readouterr().out == ""


class TestTensorRTProvider:
    def test_without_tensorrt_it_says_which_to_install(
        self, digits_export: Export, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "find_gpu", lambda: replace(L4, driver=13000))
        monkeypatch.setattr(dependencies, "installed_version", lambda name: None)
        machine.driver_too_old = True
        with pytest.raises(MissingDependencyError) as raised:
            OnnxRuntimeRunner.open(digits_export.path, provider="tensorrt")
        assert str(raised.value) == (
            "TensorrtExecutionProvider does not start here: it needs TensorRT 10, but none is installed · "
            'pip install "tensorrt-cu13>=10.13.2,<11"'
        )

    def test_tensorrt_is_imported_before_the_session(
        self, digits_export: Export, machine: Machine, tensorrt: Callable[[str], None], tmp_path: Path
    ) -> None:
        tensorrt(f"import pathlib; pathlib.Path({str(tmp_path / 'imported')!r}).touch(); __version__ = '10.16.1.11'")
        machine.driver_too_old = True
        with pytest.raises(MissingDependencyError, match="does not start"):
            OnnxRuntimeRunner.open(digits_export.path, provider="tensorrt")
        assert (tmp_path / "imported").exists()

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("__version__ = '11.4.0.106'", "needs TensorRT 10, but 11.4.0.106 is installed"),
            ("raise OSError('libnvinfer.so.10: cannot open')", "cannot be imported: libnvinfer.so.10: cannot open"),
            ("import no_such_bindings", "cannot be imported: No module named 'no_such_bindings'"),
        ],
    )
    def test_another_tensorrt_is_refused_before_a_session(
        self, digits_export: Export, machine: Machine, tensorrt: Callable[[str], None], code: str, message: str
    ) -> None:
        tensorrt(code)
        with pytest.raises(MissingDependencyError, match=message):
            OnnxRuntimeRunner.open(digits_export.path, provider="tensorrt")
        assert machine.events == ["preload ''"]

    def test_one_engine_serves_all_batches_up_to_a_power_of_two(
        self, digits_export: Export, machine: Machine, tmp_path: Path
    ) -> None:
        with OnnxRuntimeRunner.open(digits_export.path, provider="tensorrt") as runner:
            assert machine.sessions == []
            expected = [runner.infer(images(number)) for number in (5, 8, 1, 9, 3)]
        assert [len(logits) for logits in expected] == [5, 8, 1, 9, 3]
        (first, options), (_, larger) = machine.sessions
        assert first == PROVIDERS["tensorrt"]
        profile = {name: options[f"trt_profile_{name}_shapes"] for name in ("min", "opt", "max")}
        assert profile == {"min": "images:1x3x32x32", "opt": "images:8x3x32x32", "max": "images:8x3x32x32"}
        assert larger["trt_profile_max_shapes"] == "images:16x3x32x32"
        assert options["trt_engine_cache_enable"] is True
        assert options["trt_timing_cache_enable"] is True
        engines = Path(options["trt_engine_cache_path"])
        assert engines.is_dir()
        assert engines.is_relative_to(tmp_path / "cache" / "smlp-deploy" / "runtime")
        assert engines.parent == Path(options["trt_timing_cache_path"])
        assert larger["trt_engine_cache_path"] != options["trt_engine_cache_path"]

    def test_the_profile_of_pixels_has_their_shape(self, digits_export: Export, machine: Machine) -> None:
        with OnnxRuntimeRunner(to_input(digits_export.graph, "uint8"), provider="tensorrt") as runner:
            assert runner.infer(np.zeros((5, 32, 32, 3), np.uint8)).shape == (5, 10)
        ((_, options),) = machine.sessions
        profile = {name: options[f"trt_profile_{name}_shapes"] for name in ("min", "opt", "max")}
        assert profile == {"min": "images:1x32x32x3", "opt": "images:8x32x32x3", "max": "images:8x32x32x3"}

    def test_a_fixed_batch_has_no_profile(self, exported: Exported, machine: Machine) -> None:
        with OnnxRuntimeRunner.open(exported(batch=4).path, provider="tensorrt") as runner:
            assert runner.infer(images(6)).shape == (6, 10)
        ((_, options),) = machine.sessions
        assert not [name for name in options if "profile" in name]
        assert options["trt_engine_cache_enable"] is True

    def test_engines_of_other_weights_are_not_taken(self, machine: Machine) -> None:
        folders = {module.tensorrt_options(content)["trt_engine_cache_path"] for content in (b"a", b"b")}
        assert len(folders) == 2

    def test_a_cache_that_cannot_be_written_is_a_warning(
        self, machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "cache").write_text("a file")
        assert module.tensorrt_options(b"a") == {}
        assert "engines are not kept" in caplog.text

    def test_a_closed_runner_runs_nothing(self, digits_export: Export, machine: Machine) -> None:
        with OnnxRuntimeRunner.open(digits_export.path, provider="tensorrt") as runner:
            runner.infer(images(1))
        with pytest.raises(AssertionError, match="closed"):
            runner.infer(images(2))


WRITES_NOTHING = """
import sys
from pathlib import Path
import numpy as np
from smlp_deploy.runners import open_runner
with open_runner(Path(sys.argv[1]), runtime="onnxruntime") as runner:
    print(runner.infer(np.zeros((1, 3, 32, 32), np.float32)).shape)
"""


def test_no_telemetry(digits_export: Export, tmp_path: Path) -> None:
    # ONNX Runtime's begins with an identifier of the machine in the user's cache directory.
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))}
    done = subprocess.run(
        [sys.executable, "-c", WRITES_NOTHING, digits_export.path],
        env=variables | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "(1, 10)\n"), done.stderr
    assert list(tmp_path.rglob("*")) == []
