"""A TensorRT that builds nothing, but has exactly the names of a real binding and no others.

`data/tensorrt-names/` lists every class and member of five real bindings. Whatever the adapter touches is looked up
there first, so a call that a version does not have fails the test as it would fail that version. `data/inspector/` has
the forms in which engine inspectors print.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAMES = Path(__file__).parents[1] / "data" / "tensorrt-names"
VERSIONS = sorted(path.stem for path in NAMES.glob("*.json"))
KERNEL = (
    "Name: conv_myl0_1, LayerType: correlation, Inputs: [ { Name: a, Dimensions: [4,3,8,8], Strides: [1], "
    "Datatype: Half, Format: (NHWC) } ], Constants: [], Outputs: [ { Name: b, Dimensions: [4,16,8,8], "
    "Datatype: Half, Format: (NHWC) } ], TacticName: x, StreamId: 0, Metadata: [ONNX Layer: blocks.0/conv]"
)
INSPECTOR = Path(__file__).parents[1] / "data" / "inspector"


def inspected(form: str) -> str:
    """What an engine inspector prints, in the form of that name."""
    return (INSPECTOR / f"{form}.json").read_text()


class Strict:
    """An object of a class of the binding: only the members listed for that class exist."""

    def __init__(self, name: str, members: list[str], behaviour: dict[str, Any]) -> None:
        object.__setattr__(self, "_class", name)
        object.__setattr__(self, "_members", set(members))
        object.__setattr__(self, "_behaviour", behaviour)

    def __getattr__(self, name: str) -> Any:
        if name not in self._members:
            raise AttributeError(f"{self._class} has no {name}")
        return self._behaviour[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._members:
            raise AttributeError(f"{self._class} has no {name}")
        self._behaviour[name] = value


class FakeTensorRT:
    """The module. `calls` lists what was set or asked for, `fail` chooses what goes wrong.

    An old driver fails the constructors ("driver", or only that of the "runtime"), GPU "memory" an execution context.
    """

    def __init__(self, version: str, *, fail: str = "", batch: int = -1) -> None:
        self.names: dict[str, list[str]] = json.loads((NAMES / f"{version}.json").read_text())
        self.__version__ = version.rpartition("-")[2]
        self.calls: list[tuple[Any, ...]] = []
        self.fail = fail
        self.monitor: Any = None
        self.logger: Any = None
        self.config: dict[str, Any] = {}
        self.compiled = b"kernels"
        self.images = {"name": "images", "shape": (batch, 3, 8, 8)}

    def __getattr__(self, name: str) -> Any:
        if name not in self.names:
            raise AttributeError(f"the module has no {name}")
        made = getattr(self, f"make_{name}", None)
        return made() if made else self._enumeration(name)

    def _enumeration(self, name: str) -> Any:
        members = {member: index for index, member in enumerate(self.names[name])}
        return SimpleNamespace(**members)

    def _object(self, name: str, **behaviour: Any) -> Strict:
        return Strict(name, self.names[name], behaviour)

    def _noted(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))

    def make_ILogger(self) -> type:  # noqa: N802
        class Base:
            Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

        return Base

    def make_IProgressMonitor(self) -> type:  # noqa: N802
        return type("Monitor", (), {})

    def make_Builder(self) -> Any:  # noqa: N802
        def builder(logger: Any) -> Strict | None:
            self.logger = logger
            if self.fail == "builder":
                return None
            if self.fail == "driver":
                raise TypeError("pybind11::init(): factory function returned nullptr")
            return self._object(
                "Builder",
                create_network=self._network,
                create_builder_config=self._config,
                create_optimization_profile=lambda: self._object(
                    "IOptimizationProfile", set_shape=self._noted("set_shape")
                ),
                build_serialized_network=self._build,
            )

        return builder

    def _network(self, flags: int) -> Strict:
        self.calls.append(("create_network", flags))
        images = Strict("ITensor", self.names["ITensor"], self.images)
        return self._object("INetworkDefinition", get_input=lambda index: images)

    def _config(self) -> Strict:
        def create_timing_cache(contents: bytes) -> Strict:
            return self._object("ITimingCache", serialize=lambda: contents + b"+")

        self.config = {
            name: self._noted(name)
            for name in (
                "set_flag",
                "clear_flag",
                "set_memory_pool_limit",
                "add_optimization_profile",
                "set_compute_capability",
            )
        }
        self.config |= {"create_timing_cache": create_timing_cache, "set_timing_cache": self._noted("set_timing_cache")}
        return Strict("IBuilderConfig", self.names["IBuilderConfig"], self.config)

    def make_OnnxParser(self) -> Any:  # noqa: N802
        error = self._object(
            "ParserError",
            node_operator=lambda: "Loop",
            node_name=lambda: "blocks.1/loop",
            desc=lambda: "no importer",
        )
        return lambda network, logger: self._object(
            "OnnxParser", parse=lambda graph: self.fail != "parse", num_errors=1, get_error=lambda index: error
        )

    def _build(self, network: Any, config: Any) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        if not monitor.step_complete("Building engine", 0):
            return None
        monitor.phase_finish("Building engine")
        if self.fail == "build":
            self.logger.log(1, "out of memory")
            return None
        self.logger.log(3, "Max Scratch Memory: 12 bytes")
        self.logger.log(4, f"Layers:\n{KERNEL}")
        return b"plan"

    def make_Runtime(self) -> Any:  # noqa: N802
        def runtime(logger: Any) -> Strict:
            if self.fail in ("driver", "runtime"):
                raise TypeError("pybind11::init(): factory function returned nullptr")

            def load(plan: bytes) -> Strict | None:
                brings_code = ("set_flag", self.BuilderFlag.VERSION_COMPATIBLE) in self.calls
                if self.fail == "load" or (brings_code and not made.engine_host_code_allowed):
                    return None
                return self._built()

            made = self._object("Runtime", engine_host_code_allowed=False, deserialize_cuda_engine=load)
            return made

        return runtime

    def _built(self) -> Strict:
        """The engine that was built, as far as it is inspected: a context tells it the shapes that it runs."""
        shapes: dict[str, tuple[int, ...]] = {}

        def set_input_shape(name: str, shape: tuple[int, ...]) -> bool:
            self.calls.append(("set_input_shape", name, shape))
            shapes[name] = shape
            return True

        def create_inspector() -> Strict:
            behaviour: dict[str, Any] = {"execution_context": None}
            behaviour["get_engine_information"] = lambda form: self._information(behaviour["execution_context"], shapes)
            return Strict("EngineInspector", self.names["EngineInspector"], behaviour)

        context = self._object("IExecutionContext", set_input_shape=set_input_shape)
        names = ("logits", self.images["name"])
        return self._object(
            "ICudaEngine",
            create_engine_inspector=create_inspector,
            create_execution_context=lambda: None if self.fail == "memory" else context,
            num_io_tensors=len(names),
            get_tensor_name=names.__getitem__,
            get_tensor_mode=lambda name: self.TensorIOMode.OUTPUT if name == "logits" else self.TensorIOMode.INPUT,
            get_tensor_shape=lambda name: self.images["shape"],
        )

    def _information(self, context: Strict | None, shapes: Mapping[str, tuple[int, ...]]) -> str:
        if self.fail == "inspect":
            return ""
        form = "static" if context is not None and self.images["name"] in shapes else "dynamic"
        return inspected(f"tensorrt-{self.__version__.partition('.')[0]}-{form}")

    def engine(self) -> Strict:
        """An engine that is loaded; the kernels it compiled are `self.compiled`."""
        behaviour: dict[str, Any] = {"create_execution_context": self._noted("create_execution_context")}
        if "IRuntimeCache" in self.names:
            behaviour["create_runtime_config"] = self._runtime_config
        return self._object("ICudaEngine", **behaviour)

    def _runtime_config(self) -> Strict:
        cache = self._object("IRuntimeCache", serialize=lambda: self.compiled, deserialize=self._restore)
        return self._object(
            "IRuntimeConfig",
            create_runtime_cache=lambda: cache,
            set_runtime_cache=self._noted("set_runtime_cache"),
        )

    def _restore(self, blob: bytes) -> bool:
        self.calls.append(("deserialize", blob))
        return self.fail != "deserialize"
