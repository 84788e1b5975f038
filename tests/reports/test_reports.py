"""Pages of small values; names and labels are as hostile as names can be. `test_reports_browser.py` opens them."""

from __future__ import annotations

import base64
import io
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from smlp_deploy import __version__, dependencies, reports
from smlp_deploy.errors import MissingDependencyError
from smlp_deploy.evaluation.accuracy import (
    Answer,
    ClassResult,
    Confusion,
    Evaluation,
    ImageRecord,
    ModelResult,
    Share,
    evaluate,
)
from smlp_deploy.evaluation.benchmark import BatchTiming, Benchmark, EndToEnd, ModelTiming, Ratio
from smlp_deploy.evaluation.layers import DivergenceReport, LayerNoise, PointReport
from smlp_deploy.evaluation.parity import HalfReport, ParityReport, prove
from smlp_deploy.evaluation.profile import GraphProfile
from smlp_deploy.exporters.kernels import Kernel, KernelTensor, summarize
from smlp_deploy.images import decode as decoding
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.images.dataset import LabelledImage
from smlp_deploy.inference.classify import Prediction, Score
from smlp_deploy.reports import Origin
from smlp_deploy.reports.page import four_digits, thumbnail
from tests.support.fakes import FakeRunner, metadata, quadrant_means

HOSTILE = "<script>alert(1)</script>"
LABELS = (HOSTILE, '$x^$ & #010101 id="a"', "漢字 \N{PILE OF POO}", "'\"><img src=x onerror=alert(1)>")


class Page(HTMLParser):
    """What a page has in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, name: str) -> list[str]:
        return [value or "" for key, value in self.attributes if key == name]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def picture(folder: Path, bright: int) -> Path:
    """An 8 x 8 image of which one quadrant is white, at a hostile path."""
    path = folder / f"{HOSTILE}{bright}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (8, 8))
    image.paste("white", (bright % 2 * 4, bright // 2 * 4, bright % 2 * 4 + 4, bright // 2 * 4 + 4))
    image.save(path)
    return path


def predictions(folder: Path) -> list[Prediction]:
    scores = tuple(Score(i, label, 0.4 - 0.1 * i) for i, label in enumerate(LABELS))
    return [Prediction(str(picture(folder, 0)), scores), Prediction("a\x1b[2J\udcff.jpg", error=f"damaged {HOSTILE}")]


def evaluation(folder: Path) -> Evaluation:
    """Image 0: both right. 1: both wrong. 2: the second alone is right. 3: the second has no answer. 4: unreadable."""

    def answering(*answers: int) -> Callable[[FloatArray], FloatArray]:
        table = np.eye(4, dtype=np.float32)[list(answers)] * 5
        return lambda batch: np.asarray(table[quadrant_means(batch).argmax(axis=1)], np.float32)

    def second(batch: FloatArray) -> FloatArray:
        logits = answering(0, 3, 2, 3)(batch)
        logits[quadrant_means(batch).argmax(axis=1) == 3] = np.nan
        return logits

    of = replace(metadata(), labels=LABELS)
    samples = [LabelledImage(picture(folder, i), i) for i in range(4)] + [
        LabelledImage(folder / f"absent {HOSTILE}", 0)
    ]
    return evaluate([FakeRunner(answering(0, 2, 1, 3), of), FakeRunner(second, of)], samples)


def parity(folder: Path) -> ParityReport:
    found = prove(
        FakeRunner(quadrant_means),
        FakeRunner(lambda batch: quadrant_means(batch) + np.float32(0.5)),
        [picture(folder, 1), folder / HOSTILE],
    )
    half = HalfReport(images=2, max_relative=1e-3, min_cosine=math.nan, largest_activation=812.5, layer="blocks.1")
    return replace(found, candidate=HOSTILE, half=half)


def divergence(*errors: float) -> DivergenceReport:
    points = tuple(
        PointReport(name=f"{HOSTILE} {i}", error=e, worst_error=e, worst_image=HOSTILE, max_abs=e, growth=None)
        for i, e in enumerate(errors or (0.0, 1e-4, 2e-2, math.nan, math.inf))
    )
    layers = (
        LayerNoise(name=f"{HOSTILE}/conv", sqnr_db=math.nan, own_sqnr_db=12.34),
        LayerNoise(name="head/matmul", sqnr_db=20.5, own_sqnr_db=math.inf),
    )
    facts = {"reference": "a", "candidate": "b", "precision": "int8"}
    return DivergenceReport(**facts, images=2, unreadable=(HOSTILE,), max_error=5e-3, points=points, layers=layers)


def timing(batch: int, scale: float, ratio: Ratio | None) -> BatchTiming:
    rounds = tuple(tuple(scale * batch * (1 + 0.1 * i + 0.01 * j) for j in range(9)) for i in range(3))
    middle = rounds[1][4]
    return BatchTiming(
        batch=batch,
        stable=batch > 1,
        rounds=rounds,
        median=middle,
        p90=rounds[2][6],
        p95=rounds[2][7],
        p99=rounds[2][8],
        spread=0.1,
        images_per_second=batch / middle,
        ratio=ratio,
        gpu_median=middle / 2 if ratio else None,
    )


def benchmark() -> Benchmark:
    ratio = Ratio(value=0.05, low=0.04, high=0.061)
    end = EndToEnd(
        images=9,
        failed=1,
        batch=4,
        workers=2,
        seconds=3,
        inference=1,
        idle=2,
        decode=1,
        images_per_second=3,
        ratio=None,
    )
    return Benchmark(
        environment={"CPU": HOSTILE, "cores": "2 of 2"},
        models=tuple(
            ModelTiming(
                name=name,
                precision="fp32",
                load=1.5,
                first=0.25,
                peak_memory=peak,
                batches=tuple(timing(batch, scale, to_first) for batch in (1, 8)),
                end_to_end=replace(end, ratio=to_first),
            )
            for name, scale, to_first, peak in (("engine", 0.001, None, 3 << 20), (HOSTILE, 0.02, ratio, None))
        ),
        left_out=(f"torch.compile of {HOSTILE}",),
    )


def profile() -> GraphProfile:
    def kernel(element: str, *nodes: str) -> Kernel:
        tensor = KernelTensor(shape=(2, 500, 1000), element=element)
        return Kernel(name="k", kind="gemm", inputs=(tensor,), outputs=(tensor,), nodes=nodes)

    kernels = (
        kernel("Half", "embeddings.0/Conv_1"),
        kernel("Half", "blocks.3/add", "blocks.3.hidden/conv2d_5"),
        kernel("Float", "blocks.3.hidden/conv2d_5"),
        kernel("Float", "mean_2"),
        kernel("Float", f"{HOSTILE}/x"),
        replace(kernel("Half"), outputs=()),
    )
    return GraphProfile(
        source=Path(f"{HOSTILE}.onnx"),
        precision="fp16",
        architecture="sm89",
        kernels=kernels,
        summary=summarize(kernels, batch=2),
        macs=3_250_000_000,
    )


ORIGIN = Origin(
    date="2026-11-27 08:09 UTC",
    command=f"smlp eval '{HOSTILE}'",
    models={f"{HOSTILE}.onnx": "5a" * 32},
    versions={"smlp-deploy": "9.8.7", "numpy": "2.3.4"},
)


def pages(folder: Path) -> dict[str, str]:
    """Each kind of page."""
    return {
        "predictions": reports.predictions_page(ORIGIN, predictions(folder), model=HOSTILE, total=10, failed=1),
        "evaluation": reports.evaluation_page(ORIGIN, evaluation(folder)),
        "parity": reports.parity_page(ORIGIN, parity(folder)),
        "divergence": reports.divergence_page(ORIGIN, divergence()),
        "benchmark": reports.benchmark_page(ORIGIN, benchmark()),
        "profile": reports.profile_page(ORIGIN, profile()),
    }


@pytest.fixture(scope="module")
def all_pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return pages(tmp_path_factory.mktemp("images"))


class TestEveryPage:
    def test_hostile_text_stays_text(self, all_pages: dict[str, str]) -> None:
        for html in all_pages.values():
            page = Page(html)
            assert HOSTILE in page.text
            assert not {"script", "iframe", "object", "link", "base", "form"} & page.tags.keys()
            assert not [name for name, _ in page.attributes if name.startswith("on")]
            assert "\x1b" not in html

    def test_nothing_is_loaded(self, all_pages: dict[str, str]) -> None:
        for html in all_pages.values():
            page = Page(html)
            assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page.values("content")
            assert all(address.startswith("data:image/jpeg;base64,") for address in page.values("src"))
            assert all(address.startswith("#") for address in page.values("href"))
            assert not re.search(r"url\((?!#)|@import|https?:", html)

    def test_ids_are_unique_and_references_lead_to_them(self, all_pages: dict[str, str]) -> None:
        for html in all_pages.values():
            page = Page(html)
            ids = page.values("id")
            assert len(ids) == len(set(ids))
            references = [address[1:] for address in page.values("href")] + page.values("aria-labelledby")
            assert set(references) <= set(ids)

    def test_tables_say_what_their_cells_are(self, all_pages: dict[str, str]) -> None:
        for name, html in all_pages.items():
            page = Page(html)
            assert page.tags["th"] == len(page.values("scope"))
            assert page.tags["table"] or name == "predictions"
            assert page.tags["svg"] == page.values("role").count("img")

    def test_says_when_how_and_of_what_it_was_made(self, all_pages: dict[str, str]) -> None:
        for html in all_pages.values():
            text = Page(html).text
            assert "date 2026-11-27 08:09 UTC" in text
            assert f"command smlp eval '{HOSTILE}'" in text
            assert f"sha256 of {HOSTILE}.onnx {'5a' * 32}" in text
            assert "smlp-deploy 9.8.7" in text
            assert "numpy 2.3.4" in text

    def test_the_same_values_give_the_same_page(self, tmp_path: Path) -> None:
        assert pages(tmp_path) == pages(tmp_path)


class TestPredictions:
    def test_how_many_are_shown(self, tmp_path: Path) -> None:
        text = Page(reports.predictions_page(ORIGIN, predictions(tmp_path), model="digits", total=1234, failed=1)).text
        assert "1,234 images" in text
        assert "1 failed" in text
        assert "The first 2 of 1,234 images." in text
        assert "40.0 %" in text
        all_of_them = reports.predictions_page(ORIGIN, predictions(tmp_path), model="digits", total=2, failed=1)
        assert "All images, in order." in all_of_them

    def test_what_cannot_be_printed_is_escaped(self, tmp_path: Path) -> None:
        page = Page(reports.predictions_page(ORIGIN, predictions(tmp_path), model="digits", total=2, failed=1))
        assert r"a\x1b[2J\udcff.jpg" in page.text
        assert "no picture" in page.text
        assert page.tags["img"] == 1


class TestEvaluation:
    def test_headline_pairs_and_groups(self, tmp_path: Path) -> None:
        text = Page(reports.evaluation_page(ORIGIN, evaluation(tmp_path))).text
        assert "50.00 % top-1 (95 %: 15.0 to 85.0) on 4 images · fake" in text
        positions = [
            text.index(title, text.index("McNemar"))
            for title in ("No model is right: 1", "Some models are right, some wrong: 2", "All models are right: 1")
        ]
        assert positions == sorted(positions)
        assert "2 ✗ wrong: the network's output has NaN or infinite values" in text
        assert "1 ✓ right: '\"><img src=x onerror=alert(1)>" in text
        assert "Unreadable images: 1" in text
        assert "no such file or directory" in text

    def test_of_many_images_and_classes_some_are_shown(self) -> None:
        classes, each = 50, 20
        labels = tuple(f"class {i}" for i in range(classes))
        model = ModelResult(
            name="m",
            precision="fp32",
            top1=Share.of(950, 1000),
            top5=Share.of(1000, 1000),
            loss=None,
            calibration_error=None,
            unanswered=0,
            classes=tuple(ClassResult(index=i, label=labels[i], n=each, right=19, top1=0.95) for i in range(classes)),
            confusions=tuple(Confusion(label=i, predicted=49, count=1) for i in range(12)),
        )
        records = [ImageRecord(f"{i}.jpg", i % classes, (Answer(49, i / 1000),)) for i in range(1000)]
        found = Evaluation(
            named_by="label", labels=labels, evaluated=1000, models=(model,), pairs=(), records=tuple(records)
        )
        page = Page(reports.evaluation_page(ORIGIN, found))
        assert "Wrong: 980" in page.text
        assert "Shown: the first 100 of 980, most confident first." in page.text
        assert page.text.index("998.jpg") < page.text.index("997.jpg")
        assert "the first 40" not in page.text
        assert page.text.count("no picture") == 120 <= reports.IMAGES_SHOWN
        assert "Shown are the 30 most confused of 50 classes." in page.text
        assert page.tags["details"] == 2


def test_a_failed_parity_says_which_gate(tmp_path: Path) -> None:
    text = Page(reports.parity_page(ORIGIN, parity(tmp_path))).text
    assert "✗ FAILED failed: difference, cosine" in text
    assert "not finite" in text
    passed = prove(FakeRunner(quadrant_means), FakeRunner(quadrant_means), [picture(tmp_path, 1)])
    assert "✓ passed 7 gates" in Page(reports.parity_page(ORIGIN, passed)).text


def test_divergence_names_the_first_point_over_the_gate() -> None:
    text = Page(reports.divergence_page(ORIGIN, divergence())).text
    assert f"✗ over the gate at {HOSTILE} 2" in text
    assert f"first over: {HOSTILE} 2" in text
    assert "not finite" in text
    assert "no noise 20.5" in text
    assert "12.3 not finite" in text
    assert "✓ within the gate at most 0.005" in Page(reports.divergence_page(ORIGIN, divergence(0.0, 0.0))).text
    assert not Page(reports.divergence_page(ORIGIN, replace(divergence(), points=()))).tags["svg"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.123456, "0.1235"), (28.25, "28.25"), (11943.2, "11,940"), (5e7, "50,000,000")]
)
def test_numbers_have_no_powers_of_ten(value: float, text: str) -> None:
    assert four_digits(value) == text


def test_speed_is_told_with_its_interval() -> None:
    text = Page(reports.benchmark_page(ORIGIN, benchmark())).text
    assert "0.05× (95 %: 0.04 to 0.061) as fast at batch 1" in text
    assert f"Left out: torch.compile of {HOSTILE}" in text
    assert "ms per run, logarithmic" in text
    alone = replace(benchmark(), models=benchmark().models[:1])
    assert Page(reports.benchmark_page(ORIGIN, alone)).tags["svg"] == 3


def test_the_headline_compares_equal_batches() -> None:
    report = benchmark()
    first, second = report.models
    batches = (first.batches[0], replace(first.batches[1], images_per_second=5432.1))
    others = (second.batches[0], replace(second.batches[1], ratio=Ratio(value=0.7, low=0.6, high=0.8)))
    models = (replace(first, batches=batches), replace(second, batches=others))
    text = Page(reports.benchmark_page(ORIGIN, replace(report, models=models))).text
    assert "5,432 images/s at batch 8 · engine 0.7× (95 %: 0.6 to 0.8) as fast at batch 8" in text


def test_a_version_stands_on_a_page_once() -> None:
    report = replace(benchmark(), environment={"CPU": "x", "numpy": "2.3.4"})
    assert Page(reports.benchmark_page(ORIGIN, report)).text.count("2.3.4") == 1


def test_an_origin_is_of_files_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"abc")
    origin = Origin.of(["predict", "two words.jpg"], [tmp_path / "a.onnx"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", origin.date)
    assert origin.command == "smlp predict 'two words.jpg'"
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert origin.models == {str(tmp_path / "a.onnx"): expected}
    assert origin.versions["smlp-deploy"] == __version__
    assert origin.versions["pillow"]


def test_traffic_is_by_block_and_precision() -> None:
    text = Page(reports.profile_page(ORIGIN, profile())).text
    assert "embeddings.0 4.000 0.000" in text or "embeddings.0 0.000 4.000" in text
    assert re.search(r"blocks\.3 (8\.000 4\.000|4\.000 8\.000)", text)
    assert "between blocks" in text
    assert "An estimate; nothing was run" in text
    assert "unknown" not in text
    dynamic = replace(profile().kernels[0], outputs=(KernelTensor(shape=(-1, 7), element="Half"),))
    some = replace(profile(), kernels=(dynamic,), summary=summarize((dynamic,), batch=2))
    text = Page(reports.profile_page(ORIGIN, some)).text
    assert "read and written per image; bytes of 1 kernels unknown" in text
    assert "? Half gemm ?×7" in text
    assert "between blocks" not in text
    empty = replace(profile(), kernels=(), summary=summarize((), batch=2))
    assert "0 kernels" in Page(reports.profile_page(ORIGIN, empty)).text


class TestThumbnails:
    @staticmethod
    def opened(address: str | None) -> Image.Image:
        assert address is not None
        return Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/jpeg;base64,"))))

    def test_are_small_and_upright(self, tmp_path: Path) -> None:
        image = Image.new("RGB", (2000, 2000), "white")
        image.paste("black", (0, 0, 2000, 1000))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # a quarter turn clockwise: the black upper half is on the right
        image.save(tmp_path / "a.jpg", exif=exif)
        small = self.opened(thumbnail(tmp_path / "a.jpg")).convert("L")
        assert small.size == (96, 96)
        pixels = np.asarray(small)
        assert pixels[:, 10].min() > 200
        assert pixels[:, 85].max() < 50

    def test_small_images_are_enlarged_by_whole_pixels(self, tmp_path: Path) -> None:
        Image.new("L", (28, 40)).save(tmp_path / "a.png")
        assert self.opened(thumbnail(tmp_path / "a.png")).size == (84, 84)

    def test_what_cannot_be_read_has_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff no image")
        Image.new("RGB", (20, 20)).save(tmp_path / "large.png")
        monkeypatch.setattr(decoding, "MAX_PIXELS", 399)
        for name in ("a.jpg", "absent.jpg", "a\0b", "large.png"):
            assert thumbnail(tmp_path / name) is None


class TestDependencies:
    def test_what_is_missing_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dependencies, "find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r'HTML reports .* "smlp-deploy\[report\]"'):
            reports.require_report()
        with pytest.raises(MissingDependencyError, match="jinja2, matplotlib not installed"):
            reports.benchmark_page(ORIGIN, benchmark())

    def test_importing_the_module_loads_none_of_them(self) -> None:
        script = "import sys, smlp_deploy.reports; print(*sys.modules)"
        loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        assert not {"jinja2", "matplotlib", "torch", "onnx", "onnxruntime"} & set(loaded.split())
