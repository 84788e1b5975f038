"""The manifests and the tree on docs/serving.md are about what smlp export --format triton writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from smlp_deploy.files import BUNDLED_MODEL
from smlp_deploy.pipeline.repository import export_repository

TEXT = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
READY = "/v2/models/classify/ready"


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    """By their kind."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    blocks = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return {found["kind"]: found for block in blocks for found in yaml.safe_load_all(block)}


def test_the_deployment_serves_the_volume_and_is_ready_with_the_ensemble(manifests: dict[str, Any]) -> None:
    pod = manifests["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert manifests["Deployment"]["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert f"--model-repository={mounted['models']}" in container["args"]
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == mounted.keys()
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] == READY


def test_the_service_leads_to_the_deployment(manifests: dict[str, Any]) -> None:
    service, pod = manifests["Service"]["spec"], manifests["Deployment"]["spec"]["template"]
    ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
    assert service["selector"] == pod["metadata"]["labels"]
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == ports


def test_kserve_has_the_same_image_and_readiness(manifests: dict[str, Any]) -> None:
    model = manifests["InferenceService"]["spec"]["predictor"]["model"]
    (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert model["image"] == container["image"]
    assert model["readinessProbe"]["httpGet"]["path"] == READY
    assert model["storageUri"].endswith("/model_repository")


def test_the_tree_has_every_file(tmp_path: Path) -> None:
    repository = export_repository(BUNDLED_MODEL, tmp_path / "model_repository").path
    lines = re.findall(r"^  (\w+)/ +(.*)$", TEXT, re.MULTILINE)
    assert {name for name, _ in lines} == {path.name for path in repository.iterdir()}
    for name, listed in lines:
        for path in (repository / name).rglob("*"):
            assert path.is_dir() or path.name == "empty.txt" or path.name in listed, path
