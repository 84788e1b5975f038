"""smlp-deploy: a trained sMLPNet from checkpoint to production, with proof at each step that the numbers hold.

from smlp_deploy import Classifier

with Classifier.open("artifacts/model-fp32.onnx") as classifier:
    for prediction in classifier.classify(["a.jpg", "b.jpg"]):
        print(prediction.path, prediction.scores or prediction.error)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smlp_deploy.errors import SmlpError
    from smlp_deploy.inference.classify import Classifier, Prediction, Score

__version__ = "0.1.0"
__all__ = ["Classifier", "Prediction", "Score", "SmlpError", "__version__"]

_HOMES = {
    "Classifier": "smlp_deploy.inference.classify",
    "Prediction": "smlp_deploy.inference.classify",
    "Score": "smlp_deploy.inference.classify",
    "SmlpError": "smlp_deploy.errors",
}


def __getattr__(name: str) -> Any:
    # Public names are imported on first use, so that `smlp --help` loads neither numpy nor Pillow.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
