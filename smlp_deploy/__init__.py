"""smlp-deploy: a trained sMLPNet from checkpoint to production, with proof at each step that the numbers hold.

from smlp_deploy import Classifier

with Classifier.open("artifacts/model-fp32.onnx") as classifier:
    for prediction in classifier.classify(["a.jpg", "b.jpg"]):
        print(prediction.path, prediction.scores or prediction.error)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smlp_deploy.errors import SmlpError
    from smlp_deploy.inference.classify import Classifier, Prediction, Score
    from smlp_deploy.metadata import Preprocessing
    from smlp_deploy.pipeline.build import build_engine
    from smlp_deploy.pipeline.export import export
    from smlp_deploy.pipeline.verify import verify_artifact as verify

__version__ = "0.1.0"
__all__ = [
    "Classifier",
    "Prediction",
    "Preprocessing",
    "Score",
    "SmlpError",
    "__version__",
    "build_engine",
    "export",
    "verify",
]

# ONNX Runtime reports its use to Microsoft unless this is set before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "Classifier": ("inference.classify", "Classifier"),
    "Prediction": ("inference.classify", "Prediction"),
    "Preprocessing": ("metadata", "Preprocessing"),
    "Score": ("inference.classify", "Score"),
    "SmlpError": ("errors", "SmlpError"),
    "build_engine": ("pipeline.build", "build_engine"),
    "export": ("pipeline.export", "export"),
    "verify": ("pipeline.verify", "verify_artifact"),
}


def __getattr__(name: str) -> Any:
    # Public names are imported on first use, so that `smlp --help` loads neither numpy nor Pillow.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"smlp_deploy.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
