"""What `import smlp_deploy` offers."""

from __future__ import annotations

from pathlib import Path

import smlp_deploy
from smlp_deploy import Classifier, Preprocessing, build_engine, export, verify
from smlp_deploy.exporters.tensorrt import BuildOptions
from smlp_deploy.files import BUNDLED_CHECKPOINT
from smlp_deploy.pipeline.export import Export

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_its_names_are_listed_and_documented() -> None:
    assert set(smlp_deploy.__all__) <= set(dir(smlp_deploy))
    assert all(getattr(smlp_deploy, name).__doc__ for name in smlp_deploy.__all__)
    assert not hasattr(smlp_deploy, "absent")


def test_from_a_checkpoint_to_an_engine(tmp_path: Path, digit_images: list[Path]) -> None:
    prepared = Preprocessing(image_size=32, crop_pct=1.0, mean=(0.1307,) * 3, std=(0.3081,) * 3)
    exported = export(str(BUNDLED_CHECKPOINT), tmp_path / "x.onnx", labels=WORDS, preprocessing=prepared, form="cpu")
    assert exported.report.passed
    assert verify(str(exported.path)).passed
    with Classifier.open(exported.path) as classifier:
        assert classifier.labels == WORDS
        (prediction,) = classifier.classify(digit_images[3])
    assert prediction.scores[0].label == "three"
    options = BuildOptions(architectures=("sm89",))
    built = build_engine(
        exported.path, tmp_path / "x.engine", precision="fp16", options=options, backend="tensorrt-rtx"
    )
    assert built.path.exists()
    assert built.not_run


def test_an_export_is_that_of_the_verb(exported: object, digits_export: Export, tmp_path: Path) -> None:
    again = export(BUNDLED_CHECKPOINT, tmp_path / digits_export.path.name, form="cpu")
    assert again.path.read_bytes() == digits_export.path.read_bytes()
