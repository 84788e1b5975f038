"""The real OpenVINO on this machine's CPU; a fake core stands for CPUs that compute in other precisions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from smlp_deploy import dependencies, files
from smlp_deploy.errors import ArtifactError, MissingDependencyError, SmlpError, UsageError
from smlp_deploy.evaluation.parity import GATES, prove
from smlp_deploy.exporters.onnx import export_onnx
from smlp_deploy.graphs.file import Graph
from smlp_deploy.images.defaults import default_images
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.pipeline.export import Export
from smlp_deploy.pipeline.precision import Int8Options, plan_quantization, to_input, to_precision
from smlp_deploy.pipeline.verify import verify_artifact, verify_layers
from smlp_deploy.runners import open_runner, placement
from smlp_deploy.runners import openvino as module
from smlp_deploy.runners.base import arithmetic_of
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner
from smlp_deploy.runners.openvino import OpenVinoRunner, cpu_facts, load_openvino
from smlp_deploy.runners.placement import Placement
from tests.support.fakes import Exported
from tests.support.recipe import CASES, recipe_input, recipe_network

CORE = module._start()
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
GraphOf = Callable[[str, int], Graph]


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of the test's own; the folder does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(files, "user_cache_path", lambda name: folder / name)
    return folder / "smlp-deploy" / "openvino"


@pytest.fixture(scope="module")
def graph_of(digits: Checkpoint) -> GraphOf:
    """The bundled model in a precision and an opset."""

    @cache
    def made(precision: str, opset: int) -> Graph:
        path = Path(f"digits-{precision}.onnx")
        if precision == "fp32":
            return export_onnx(digits.network(), describe(digits), path=path, opset=opset)
        fp32 = made("fp32", opset)
        quantization = plan_quantization(fp32, Int8Options()) if precision == "int8" else None
        return to_precision(fp32, precision, quantization=quantization, path=path)

    return made


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of cores that runners use."""
    return lambda number: monkeypatch.setattr(module, "available_cores", lambda: number)


def images(number: int) -> Any:
    return np.random.default_rng(0).standard_normal((number, 3, 32, 32), dtype=np.float32)


def blobs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*/*"))


@pytest.mark.parametrize(("opset", "taken"), [(18, "float32"), (20, "float32"), (20, "uint8"), (23, "uint8")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_file_passes_its_gates(graph_of: GraphOf, precision: str, opset: int, taken: str) -> None:
    reference = OnnxRuntimeRunner(graph_of("fp32", opset))
    with reference, OpenVinoRunner(to_input(graph_of(precision, opset), taken)) as runner:
        assert arithmetic_of(runner) == precision
        report = prove(reference, runner, default_images(runner.metadata))
        assert report.passed, report.failures


def test_golden_logits(digits: Checkpoint) -> None:
    network = recipe_network("micro")
    graph = export_onnx(network, replace(describe(digits), config=network.config), path=Path("micro.onnx"))
    expected = np.array(CASES["micro"]["logits"])
    with OpenVinoRunner(graph) as runner:
        logits = runner.infer(recipe_input("micro").numpy())
    assert np.abs(logits - expected).max() < GATES["fp32"].difference * expected.std()


def test_int8_computes_what_onnx_runtime_does(graph_of: GraphOf) -> None:
    graph = graph_of("int8", 20)
    with OnnxRuntimeRunner(graph) as expected, OpenVinoRunner(graph) as runner:
        a, b = expected.infer(images(8)), runner.infer(images(8))
        in_int8 = [operation for operation in _operations(runner) if operation == "u8"]
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() > GATES["int8"].cosine
    assert len(in_int8) > 20


def _operations(runner: OpenVinoRunner) -> list[str]:
    """The precision of each operation in the network that ran last, apart from constants."""
    request = next(iter(runner._networks.values()))._requests[0]
    operations = request.get_compiled_model().get_runtime_model().get_ops()
    facts = [operation.get_rt_info() for operation in operations]
    return [str(fact["runtimePrecision"].value) for fact in facts if fact["layerType"].value != "Const"]


class TestBatches:
    def test_logits_do_not_depend_on_the_batch(self, digits_export: Export, cores: Callable[[int], None]) -> None:
        cores(2)
        with OpenVinoRunner.open(digits_export.path) as runner:
            whole = runner.infer(images(9))
            alone = np.concatenate([runner.infer(image[None]) for image in images(9)])
            np.testing.assert_array_equal(runner.infer(images(9)[:7]), whole[:7])
        np.testing.assert_array_equal(alone, whole)

    def test_the_logits_are_the_callers(self, digits_export: Export) -> None:
        with OpenVinoRunner.open(digits_export.path) as runner:
            first = runner.infer(images(3))
            kept = first.copy()
            runner.infer(-images(3))
        np.testing.assert_array_equal(first, kept)

    def test_a_batch_that_cannot_be_shared_is_copied(self, digits_export: Export) -> None:
        locked, turned = images(3), images(3)[:, :, :, ::-1]
        locked.flags.writeable = False
        with OpenVinoRunner.open(digits_export.path) as runner:
            np.testing.assert_array_equal(runner.infer(locked), runner.infer(images(3)))
            np.testing.assert_array_equal(runner.infer(turned), runner.infer(turned.copy()))

    def test_a_fixed_batch_takes_any_number_of_images(
        self, exported: Exported, digits_export: Export, cores: Callable[[int], None]
    ) -> None:
        cores(2)
        with OpenVinoRunner.open(exported(batch=4).path) as of_four, OpenVinoRunner.open(digits_export.path) as of_any:
            for number in (1, 4, 6, 13):
                assert np.abs(of_four.infer(images(number)) - of_any.infer(images(number))).max() < 1e-4

    @pytest.mark.parametrize(
        ("batch", "number", "fixed", "split"),
        [
            (1, 2, None, (1, 1)),
            (2, 2, None, (2, 1)),
            (7, 2, None, (2, 2)),
            (8, 2, None, (2, 4)),
            (32, 2, None, (2, 8)),
            (256, 2, None, (2, 8)),
            (32, 16, None, (16, 2)),
            (3, 16, None, (3, 1)),
            (32, 1, None, (1, 8)),
            (6, 16, 4, (2, 4)),
            (4, 16, 4, (1, 4)),
        ],
    )
    def test_how_a_batch_is_spread(self, batch: int, number: int, fixed: int | None, split: tuple[int, int]) -> None:
        assert module._Split.of(batch, cores=number, fixed=fixed) == split

    def test_two_networks_are_kept_and_a_last_short_batch_takes_one_that_it_keeps_busy(
        self, digits_export: Export, cores: Callable[[int], None]
    ) -> None:
        cores(2)
        with OpenVinoRunner.open(digits_export.path) as runner:
            seen = []
            for number in (32, 9, 8, 1, 8, 16):
                runner.infer(images(number))
                seen.append([tuple(split) for split in runner._networks])
        assert seen == [
            [(2, 8)],
            [(2, 8)],
            [(2, 8), (2, 4)],
            [(2, 4), (1, 1)],
            [(1, 1), (2, 4)],
            [(2, 4), (2, 8)],
        ]

    def test_a_single_image_has_all_cores(self, digits_export: Export, cores: Callable[[int], None]) -> None:
        cores(2)
        with OpenVinoRunner.open(digits_export.path) as runner:
            runner.infer(images(1))
            compiled = runner._networks[module._Split(1, 1)]._requests[0].get_compiled_model()
            # OpenVINO takes no more than the process may use, which is one core in a parallel run of the tests.
            assert compiled.get_property("INFERENCE_NUM_THREADS") == min(2, len(os.sched_getaffinity(0)))
            assert compiled.get_property("NUM_STREAMS") == 1

    @pytest.mark.parametrize(
        "batch",
        [np.zeros((2, 3, 32, 31), np.float32), np.zeros((2, 32, 32, 3), np.uint8), np.zeros((2, 3), np.float32)],
    )
    def test_a_wrong_batch_is_one_clear_line_and_the_next_one_runs(self, digits_export: Export, batch: Any) -> None:
        with OpenVinoRunner.open(digits_export.path) as runner:
            with pytest.raises(ArtifactError, match=r"^OpenVINO cannot run it: [^\n]+ · .*digits-fp32\.onnx$"):
                runner.infer(batch)
            assert runner.infer(images(2)).shape == (2, 10)


class Core:
    """OpenVINO's core on a CPU with other capabilities, which compiles for this one.

    Args:
        capabilities: what the CPU is said to compute in.
        given: the precision that compiled networks are said to have; by default the one asked for.
    """

    def __init__(self, capabilities: list[str], given: str | None = None) -> None:
        self._real = CORE
        self._capabilities, self._given = capabilities, given
        self.asked: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_property(self, device: str, name: str) -> Any:
        return self._capabilities if name == "OPTIMIZATION_CAPABILITIES" else self._real.get_property(device, name)

    def compile_model(self, model: Any, device: str, properties: dict[str, Any]) -> Any:
        self.asked.append(properties)
        given = self._given or properties["INFERENCE_PRECISION_HINT"]
        real = self._real.compile_model(model, device, properties | {"INFERENCE_PRECISION_HINT": "f32"})
        return _Compiled(real, getattr(load_openvino().Type, given))


class _Compiled:
    def __init__(self, real: Any, given: Any) -> None:
        self._real, self._given = real, given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_property(self, name: str) -> Any:
        return self._given if name == "INFERENCE_PRECISION_HINT" else self._real.get_property(name)


class TestPrecision:
    def test_a_compiled_network_computes_in_fp32(self, digits_export: Export) -> None:
        with OpenVinoRunner.open(digits_export.path) as runner:
            assert runner.name == "openvino (CPU) digits-fp32.onnx"
            runner.infer(images(1))
            compiled = runner._networks[module._Split(1, 1)]._requests[0].get_compiled_model()
            assert compiled.get_property("INFERENCE_PRECISION_HINT") == load_openvino().Type.f32
            assert set(_operations(runner)) == {"f32"}

    @pytest.mark.parametrize(
        ("precision", "capabilities", "asked", "remark"),
        [
            ("fp32", ["FP32", "BF16", "FP16"], "f32", ""),
            ("bf16", ["FP32", "BF16"], "bf16", ", bf16"),
            ("bf16", ["FP32", "FP16"], "f32", ", bf16 computed in fp32"),
            ("fp16", ["FP32", "FP16"], "f16", ", fp16"),
            ("fp16", ["FP32", "BF16"], "f32", ", fp16 computed in fp32"),
            ("int8", ["FP32", "BF16", "FP16", "INT8"], "f32", ", int8 and fp32"),
        ],
    )
    def test_the_name_says_what_a_cpu_computes_in(
        self,
        graph_of: GraphOf,
        monkeypatch: pytest.MonkeyPatch,
        precision: str,
        capabilities: list[str],
        asked: str,
        remark: str,
    ) -> None:
        core = Core(capabilities)
        monkeypatch.setattr(module, "_start", lambda: core)
        with OpenVinoRunner(graph_of(precision, 20)) as runner:
            assert runner.name == f"openvino (CPU{remark}) digits-{precision}.onnx"
            assert runner.infer(images(1)).shape == (1, 10)
        assert [properties["INFERENCE_PRECISION_HINT"] for properties in core.asked] == [asked]

    def test_another_precision_than_the_one_asked_for_is_refused(
        self, digits_export: Export, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_start", lambda: Core(["FP32", "BF16"], given="bf16"))
        with (
            OpenVinoRunner.open(digits_export.path) as runner,
            pytest.raises(SmlpError, match=r"computes it in bf16 in place of f32 .* --runtime onnxruntime"),
        ):
            runner.infer(images(1))

    def test_what_this_cpu_computes_in(self) -> None:
        facts = cpu_facts()
        assert set(facts.native) <= {"fp16", "bf16"}
        assert facts.version.startswith("20")


class TestCache:
    def test_the_second_start_compiles_nothing(
        self, digits_export: Export, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with OpenVinoRunner.open(digits_export.path) as runner:
            expected = runner.infer(images(1))
        assert len(blobs(cache_folder)) == 1
        monkeypatch.setattr(OpenVinoRunner, "_compile", None)
        monkeypatch.setattr(OpenVinoRunner, "_read", None)
        with OpenVinoRunner.open(digits_export.path) as runner:
            np.testing.assert_array_equal(runner.infer(images(1)), expected)
            compiled = runner._networks[module._Split(1, 1)]._requests[0].get_compiled_model()
            assert compiled.get_property("INFERENCE_PRECISION_HINT") == load_openvino().Type.f32

    @pytest.mark.parametrize("content", [b"", b"damaged", None])
    def test_a_damaged_network_is_compiled_again(
        self, digits_export: Export, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
    ) -> None:
        with OpenVinoRunner.open(digits_export.path) as runner:
            expected = runner.infer(images(1))
        (blob,) = cache_folder.glob("*/*")
        whole = blob.read_bytes()
        blob.write_bytes(whole[: len(whole) // 2] if content is None else content)
        with OpenVinoRunner.open(digits_export.path) as runner:
            np.testing.assert_array_equal(runner.infer(images(1)), expected)
        monkeypatch.setattr(OpenVinoRunner, "_compile", None)
        with OpenVinoRunner.open(digits_export.path) as runner:
            np.testing.assert_array_equal(runner.infer(images(1)), expected)

    def test_a_cache_that_cannot_be_written_changes_nothing(
        self, digits_export: Export, cache_folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache_folder.parent.parent.write_text("a file where the folder would be")
        with OpenVinoRunner.open(digits_export.path) as runner:
            assert runner.infer(images(1)).shape == (1, 10)
        assert "is not kept, so the next start is slower" in caplog.text

    def test_without_a_home_nothing_is_kept(
        self, digits_export: Export, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(files, "user_cache_path", lambda name: Path("~/.cache") / name)
        with OpenVinoRunner.open(digits_export.path) as runner:
            assert runner.infer(images(1)).shape == (1, 10)
        assert "is not kept, so the next start is slower: no home directory for the cache" in caplog.text

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
    def test_a_folder_that_others_can_write_to_is_not_used(
        self, digits_export: Export, cache_folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with OpenVinoRunner.open(digits_export.path) as runner:
            runner.infer(images(1))
        (blob,) = cache_folder.glob("*/*")
        blob.write_bytes(b"from somebody else")
        blob.parent.chmod(0o777)
        with OpenVinoRunner.open(digits_export.path) as runner:
            assert runner.infer(images(1)).shape == (1, 10)
        assert blob.read_bytes() == b"from somebody else"
        assert "others can write there" in caplog.text

    def test_other_weights_and_other_cpus_have_their_own(self, exported: Exported, cache_folder: Path) -> None:
        facts = cpu_facts()
        for precision in ("fp32", "fp16"):
            with OpenVinoRunner.open(exported(precision).path) as runner:
                runner.infer(images(1))
        assert len(list(cache_folder.iterdir())) == 2
        others = (facts._replace(name="another CPU"), facts._replace(native=(*facts.native, "another precision")))
        assert len({module._Cache.of(b"x", cpu)._folder for cpu in (facts, *others)}) == 3

    def test_it_stays_small(self, graph_of: GraphOf, cache_folder: Path, cores: Callable[[int], None]) -> None:
        for number in range(1, 7):
            cores(number)
            with OpenVinoRunner(graph_of("fp32", 20)) as runner:
                runner.infer(images(1))
        assert blobs(cache_folder) == [f"f32-{number}-1x1.blob" for number in range(3, 7)]


class TestOpening:
    def test_the_runtime_is_chosen(self, digits_export: Export) -> None:
        names = {}
        for runtime in ("auto", "onnxruntime", "openvino"):
            with open_runner(digits_export.path, runtime=runtime) as runner:
                names[runtime] = runner.name.partition(" ")[0]
        assert names == {"auto": "onnxruntime", "onnxruntime": "onnxruntime", "openvino": "openvino"}

    @pytest.mark.parametrize(
        ("precision", "taken"), list(zip(PRECISIONS, ["onnxruntime", *["openvino"] * 3], strict=True))
    )
    def test_it_is_the_fastest_for_the_precision(
        self, graph_of: GraphOf, monkeypatch: pytest.MonkeyPatch, precision: str, taken: str
    ) -> None:
        metadata = graph_of(precision, 20).metadata
        assert Placement.of().runtime_for(metadata) == taken
        assert Placement.of(device="cpu").runtime_for(metadata) == taken
        assert Placement.of(provider="cpu").runtime_for(metadata) == "onnxruntime"
        monkeypatch.setattr(placement, "is_installed", lambda name: name != "openvino")
        assert Placement.of().runtime_for(metadata) == "onnxruntime"

    def test_a_missing_openvino_is_one_clear_line(self, digits_export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
        found = dependencies.is_installed
        monkeypatch.setattr(dependencies, "is_installed", lambda name: name != "openvino" and found(name))
        with pytest.raises(
            MissingDependencyError,
            match=r'^openvino not installed, needed for --runtime openvino · pip install "smlp-deploy\[cpu\]"$',
        ):
            open_runner(digits_export.path, runtime="openvino")
        with open_runner(digits_export.path) as runner:
            assert runner.name.startswith("onnxruntime")

    def test_a_graph_that_openvino_cannot_read_is_refused_before_any_image(
        self, digits_export: Export, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = Graph.read(digits_export.path).model()
        model.graph.node[3].op_type = "NoSuchOperator"
        monkeypatch.setattr(module, "_content", lambda graph: model.SerializeToString())
        with pytest.raises(
            ArtifactError, match=r"^OpenVINO cannot load it: .*Model wasn't fully converted.* · .*onnxruntime$"
        ):
            OpenVinoRunner.open(digits_export.path)

    def test_hostile_files_are_refused_first(self, digits_export: Export, tmp_path: Path) -> None:
        model = onnx.load(digits_export.path)
        model.graph.node[0].op_type = "Loop"
        onnx.save(model, tmp_path / "loop.onnx")
        with pytest.raises(SmlpError, match="Loop"):
            open_runner(tmp_path / "loop.onnx", runtime="openvino")

    def test_verify_proves_the_file_as_it_runs(self, digits_export: Export) -> None:
        report = verify_artifact(digits_export.path, placement=Placement.of(runtime="openvino"))
        assert report.candidate == "openvino (CPU) digits-fp32.onnx"
        assert report.passed

    def test_values_inside_are_read_in_onnx_runtime(self, digits_export: Export) -> None:
        with pytest.raises(UsageError, match="read with ONNX Runtime · --runtime openvino · leave it out"):
            verify_layers(digits_export.path, placement=Placement.of(runtime="openvino"))


SIGNAL = """
import signal, sys
from pathlib import Path
from smlp_deploy.runners import open_runner
first, second = [open_runner(Path(sys.argv[1]), runtime="openvino") for _ in range(2)]
del first
del second
signal.signal(signal.SIGINT, lambda *_: print("received"))
signal.raise_signal(signal.SIGINT)
"""


def test_a_signal_arrives_after_two_runners_are_gone(digits_export: Export, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SIGNAL, digits_export.path], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "received\n", "")


SPIES = """
import atexit, os, pathlib
pathlib.Path(os.environ["REPORT"]).write_text("imported")
class Telemetry:
    def __init__(self, *arguments, **options): raise SystemExit("telemetry")
"""

RUNS = """
import sys
from pathlib import Path
import numpy as np
from smlp_deploy.runners import open_runner
with open_runner(Path(sys.argv[1]), runtime="openvino") as runner:
    print(runner.infer(np.zeros((1, 3, 32, 32), np.float32)).shape)
import openvino
print(hasattr(openvino, "convert_model"), "openvino_telemetry" in sys.modules)
"""


def run(code: str, tmp_path: Path, *arguments: str | Path) -> str:
    """What code prints in a process with a home of its own, and an `openvino_telemetry` that tells of its import."""
    package = tmp_path / "spies" / "openvino_telemetry"
    (package / "backend").mkdir(parents=True)
    (package / "__init__.py").write_text(SPIES)
    (package / "backend" / "__init__.py").write_text("class backend_ga4: pass\n")
    (tmp_path / "home").mkdir()
    paths = os.pathsep.join([str(package.parent), *filter(None, sys.path)])
    variables = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    variables |= {"PYTHONPATH": paths, "HOME": str(tmp_path / "home"), "REPORT": str(tmp_path / "report")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_no_telemetry_and_no_files_but_the_cache(digits_export: Export, tmp_path: Path) -> None:
    assert run(RUNS, tmp_path, digits_export.path).splitlines() == ["(1, 10)", "False False"]
    assert not (tmp_path / "report").exists()
    written = {path.relative_to(tmp_path / "home") for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert {path.suffix for path in written} == {".blob"}
    assert all("smlp-deploy" in path.parts for path in written)


def test_importing_openvino_by_itself_would_report_it(tmp_path: Path) -> None:
    run("import openvino", tmp_path)
    assert (tmp_path / "report").read_text() == "imported"
