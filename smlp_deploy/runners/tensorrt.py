"""Engines in TensorRT or TensorRT-RTX, through polygraphy.

An engine is code: it is loaded only if its sha256 is the one in the JSON beside it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, Self

from smlp_deploy.artifacts import engine_card_path
from smlp_deploy.dependencies import TENSORRT_MODULES, gpu_present, installed_version, require
from smlp_deploy.errors import ArtifactError, MissingDependencyError
from smlp_deploy.files import sha256_of
from smlp_deploy.metadata import EngineCard
from smlp_deploy.runners.base import Closing, FloatArray, in_batches

_INPUT, _OUTPUT = "images", "logits"
_EXTRAS = {"tensorrt": "gpu", "tensorrt-rtx": "rtx"}
_DISTRIBUTIONS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu12"}


class Session(Protocol):
    """What runs the engine: polygraphy's TrtRunner, whose outputs are buffers that the next run overwrites."""

    def infer(self, feed_dict: Mapping[str, FloatArray]) -> Mapping[str, Any]: ...


class TensorRTRunner(Closing):
    """Runs an engine; any number of images, split and padded to the engine's batch profile.

    Args:
        path: the engine's file.
        card: the facts beside it.
        session: what runs it.
    """

    def __init__(self, path: Path, card: EngineCard, session: Session) -> None:
        self.name = f"{card.flavour} {path.name}"
        self.metadata = card.metadata
        self._profile = card.profile
        self._session: Session | None = session
        self._stack = ExitStack()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Load an engine onto the GPU.

        Raises:
            ArtifactError: it is not the engine that the JSON beside it is about, or there is no GPU it runs on.
            MissingDependencyError: its flavour of TensorRT is not installed, or another major version is.
        """
        card = read_card(path)
        check_machine(path, card)
        stack = ExitStack()
        runner = cls(path, card, stack.enter_context(_session(path, card)))
        runner._stack = stack
        return runner

    def infer(self, batch: FloatArray) -> FloatArray:
        return in_batches(batch, self._profile, self._run)

    def _run(self, batch: FloatArray) -> FloatArray:
        assert self._session is not None, "the runner is closed"
        logits: FloatArray = self._session.infer({_INPUT: batch})[_OUTPUT]
        return logits

    def close(self) -> None:
        self._session = None
        self._stack.close()


def read_card(path: Path) -> EngineCard:
    """The facts about the engine at `path`, after checking that they are about this very file.

    Raises:
        ArtifactError: one of the two files cannot be read, or the JSON is about another engine.
        ConfigError: the JSON is damaged.
    """
    beside = engine_card_path(path)
    try:
        sha256, text = sha256_of(path), beside.read_text(encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            f"cannot read it: {error.strerror}", where=error.filename, fix="build the engine again"
        ) from None
    except UnicodeDecodeError:
        raise ArtifactError("is not JSON", where=beside, fix="build the engine again") from None
    card = EngineCard.from_json(text, where=beside)
    if card.engine_sha256 != sha256:
        raise ArtifactError(
            "is not the engine that the JSON beside it is about, so it is not loaded", where=path, fix="build it again"
        )
    return card


def check_machine(path: Path, card: EngineCard) -> None:
    """Check that an engine can run here, as far as can be told without loading it.

    Raises:
        ArtifactError: there is no GPU.
        MissingDependencyError: its flavour is not installed, or another major version of it is.
    """
    if not gpu_present():
        raise ArtifactError("needs an NVIDIA GPU and driver, and there is none", where=path, fix="use the ONNX file")
    extra = _EXTRAS[card.flavour]
    require("polygraphy", TENSORRT_MODULES[card.flavour], purpose=f"to run {card.flavour} engines", extra=extra)
    installed = installed_version(_DISTRIBUTIONS[card.flavour]) or ""
    if installed.split(".")[0] != card.version.split(".")[0] and not card.options.get("version_compatible"):
        raise MissingDependencyError(
            f"built by {card.flavour} {card.version}, installed is {installed or 'none'}",
            where=path,
            fix="build the engine again with the installed version",
        )


def _session(path: Path, card: EngineCard) -> Any:
    """polygraphy's runner of the engine, not yet activated."""
    if card.flavour == "tensorrt-rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when polygraphy is imported
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner
    from polygraphy.exception import PolygraphyException

    try:
        engine = EngineFromBytes(path.read_bytes())()
    except PolygraphyException:
        raise ArtifactError(
            f"{card.flavour} {card.version} does not load it on this GPU",
            where=path,
            fix=f"it was built for {', '.join(card.architectures) or 'the GPU of its builder'}; build it again here",
        ) from None
    return TrtRunner(engine)
