"""docs/platforms.md has the table of GPUs that its script writes, and the table agrees with the bindings."""

from __future__ import annotations

import pytest

from scripts.platforms import FAMILIES, TARGET, Family, hardware
from smlp_deploy.exporters.tensorrt import TensorRT


def test_the_section_on_gpus_is_up_to_date() -> None:
    page = TARGET.read_text(encoding="utf-8")
    assert page[page.index("## GPUs") :] == "".join(hardware())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.capability)
def test_tensorrt_rtx_names_the_architectures_that_it_is_said_to_serve(family: Family) -> None:
    known = TensorRT.load("tensorrt-rtx").architectures()
    named = f"sm{family.capability.replace('.', '')}" in known
    assert named == family.rtx.startswith(("yes", "unknown: its binding names it"))
