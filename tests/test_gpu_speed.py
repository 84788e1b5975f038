"""docs/gpu-speed.md has what the script computes, and the script computes what its sources say."""

from __future__ import annotations

import re

import pytest

from scripts import gpu_speed
from scripts.gpu_speed import BOARDS, Limits, bottleneck, limits
from smlp_deploy.models.variants import VARIANTS

BY_NAME = {board.gpu.name: board for board in BOARDS}


def test_the_page_is_up_to_date() -> None:
    assert gpu_speed.TARGET.read_text(encoding="utf-8") == gpu_speed.page()


def test_every_gpu_has_a_row_for_each_network() -> None:
    page = gpu_speed.page()
    for name in ("T4", "A10", "L4", "A100 80GB", "RTX 4090", "L40S", "H100"):
        assert len(re.findall(rf"^\| {name} \| smlpnet_\w+ \| [\d,]+ \| \d+ \|", page, re.MULTILINE)) == len(VARIANTS)
        assert f"- {name}: {BY_NAME[name].gpu.source}\n" in page


def test_limits_are_rates_over_amounts() -> None:
    tiny = limits(BY_NAME["T4"], "smlpnet_tiny")
    assert tiny.memory == pytest.approx(
        320e9 / (1781.1e6 / 8)
    )  # the engine for sm75 moves more bytes than that for sm89
    assert tiny.arithmetic == pytest.approx(65e12 / (2 * 4_989_451_520))
    assert limits(BY_NAME["L4"], "smlpnet_tiny").memory == pytest.approx(300e9 / (1058.0e6 / 8))
    assert tiny.bus_uint8 == pytest.approx(4 * tiny.bus_float32)


def test_the_bus_runs_at_the_measured_share_of_its_peak() -> None:
    assert gpu_speed.pcie_peak(5) == pytest.approx(63.0, abs=0.1)
    assert BY_NAME["H100"].bus == pytest.approx(38_535_168 / 0.77e-3 / 1e9)
    assert BY_NAME["T4"].bus == pytest.approx(BY_NAME["H100"].bus / 4)


@pytest.mark.parametrize(
    ("preparing", "expected"), [(5, ("CPU", 5)), (50, ("memory", 10)), (10.5, ("memory", 10)), (9.5, ("CPU", 9.5))]
)
def test_the_slowest_stage_limits_a_run(preparing: float, expected: tuple[str, float]) -> None:
    found = Limits(memory=10, arithmetic=30, bus_float32=20, bus_uint8=80)
    assert bottleneck(found, preparing) == expected
    assert found.network == 10


def test_a_batch_takes_at_least_the_larger_of_two_times() -> None:
    row = {"variant": "smlpnet_tiny", "graph": "fp16", "how": "fp16", "batch": 64}
    assert gpu_speed.least_milliseconds(row) == pytest.approx(8 * 1058.0e6 / 3350e9 * 1e3)
    wide = {**row, "graph": "lowered fp32", "how": "fp32, TF32 off"}
    assert gpu_speed.least_milliseconds(wide) == pytest.approx(64 * 2 * 4_989_451_520 / 67e12 * 1e3)
    narrow = {**wide, "how": "fp32, TF32"}
    assert gpu_speed.least_milliseconds(narrow) == pytest.approx(8 * 2109.2e6 / 3350e9 * 1e3)


def test_nothing_measured_is_faster_than_the_model_allows() -> None:
    for kind in ("pytorch", "onnxruntime"):
        for row in gpu_speed.MEASURED[kind]["rows"]:
            assert row["milliseconds"] > gpu_speed.least_milliseconds(row)
