"""The model that ships: it is as good as its metadata say, on digits it never saw."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from scripts.digits import load_digits
from smlp_deploy.files import BUNDLED_CHECKPOINT, BUNDLED_MODEL
from smlp_deploy.graphs.file import Graph
from smlp_deploy.images.preprocessing import prepare
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.pipeline.export import Export
from smlp_deploy.pipeline.verify import verify_artifact
from smlp_deploy.runners import open_runner


def test_the_split_is_fixed_stratified_and_disjoint() -> None:
    train, held_out = load_digits()
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(held_out.labels).tolist() == [100] * 10
    assert not set(train.positions) & set(held_out.positions)
    assert held_out.positions[:3].tolist() == [10, 13, 14]


def test_held_out_accuracy_is_what_the_metadata_say(digits: Checkpoint) -> None:
    _, held_out = load_digits()
    with open_runner(BUNDLED_CHECKPOINT) as runner:
        images = [prepare(Image.fromarray(pixels), runner.metadata.preprocessing) for pixels in held_out.pixels]
        right = int((runner.infer(np.stack(images)).argmax(axis=1) == held_out.labels).sum())
    assert right >= 975
    assert abs(right / 10 - digits.metadata.training["held_out_top1"]) <= 0.1  # another CPU may tip one digit


def test_the_onnx_file_is_an_export_of_it(digits_export: Export) -> None:
    shipped, exported = Graph.read(BUNDLED_MODEL), digits_export.graph
    assert replace(shipped.metadata, libraries={}) == replace(exported.metadata, libraries={})
    assert graph_alone(shipped) == graph_alone(exported)
    report = verify_artifact(BUNDLED_MODEL)
    assert report.passed, report.failures


def graph_alone(graph: Graph) -> bytes:
    """Its bytes without metadata, which name the versions that made it."""
    model = graph.model()
    del model.metadata_props[:]
    return bytes(model.SerializeToString(deterministic=True))


def test_the_file_is_small() -> None:
    assert BUNDLED_CHECKPOINT.stat().st_size < 3_000_000
    assert BUNDLED_MODEL.stat().st_size < 3_000_000
