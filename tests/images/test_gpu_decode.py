"""JPEG files decoded by nvImageCodec: by the library itself on the CPU where it is installed, and by a fake of it."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from smlp_deploy.cli import main
from smlp_deploy.errors import GpuError, ImageError, MissingDependencyError
from smlp_deploy.images import gpu_decode
from smlp_deploy.images.gpu_decode import GpuDecoder, check_pixels, is_ordinary
from smlp_deploy.images.preprocessing import load_image
from smlp_deploy.metadata import Preprocessing
from smlp_deploy.pipeline.export import Export

PREPROCESSING = Preprocessing(image_size=224)


class FakeLibrary:
    """nvImageCodec with Pillow under it.

    Args:
        shift: added to every pixel.
        broken: whether it decodes nothing.
        inflated: content whose size it states wrongly.
    """

    __version__ = "0.9.0"
    BackendKind = SimpleNamespace(GPU_ONLY=1, HYBRID_CPU_GPU=2)

    def __init__(self, *, shift: int = 0, broken: bool = False) -> None:
        self.shift, self.broken, self.inflated = shift, broken, b""
        self.decoded = 0
        self.options: dict[str, Any] = {}
        self._busy = threading.Lock()

    def Backend(self, kind: int) -> int:  # noqa: N802
        return kind

    def DecodeParams(self, *, apply_exif_orientation: bool) -> bool:  # noqa: N802
        return apply_exif_orientation

    def CodeStream(self, content: bytes) -> SimpleNamespace:  # noqa: N802
        with Image.open(io.BytesIO(content)) as image:
            width = 60_000 if content == self.inflated else image.width
            return SimpleNamespace(content=content, width=width, height=image.height)

    def Decoder(self, **options: Any) -> FakeLibrary:  # noqa: N802
        self.options = options
        return self

    def decode(self, stream: SimpleNamespace, *, params: bool) -> SimpleNamespace | None:
        assert params is False, "the library would turn the image"
        if self.broken or not self._busy.acquire(blocking=False):
            return None
        try:
            self.decoded += 1
            with Image.open(io.BytesIO(stream.content)) as image:
                pixels = np.asarray(image.convert("RGB")).astype(np.int16) + self.shift
        except OSError:
            return None
        finally:
            self._busy.release()
        return SimpleNamespace(cpu=lambda: pixels.clip(0, 255).astype(np.uint8))


def real_library() -> GpuDecoder:
    library = pytest.importorskip(gpu_decode.MODULE, reason="nvImageCodec is not installed")
    return GpuDecoder(library, device=library.NVIMGCODEC_DEVICE_CPU_ONLY, backends=(library.BackendKind.CPU_ONLY,))


@pytest.fixture(params=["fake", "real"])
def decoder(request: pytest.FixtureRequest) -> GpuDecoder:
    return real_library() if request.param == "real" else GpuDecoder(FakeLibrary())


def saved(path: Path, image: Image.Image, format_: str, **options: Any) -> Path:
    image.save(path, format_, **options)
    return path


def jpeg(path: Path, image: Image.Image, **options: Any) -> Path:
    return saved(path, image, "JPEG", **options)


def opened(path: Path, decoder: GpuDecoder) -> Image.Image | None:
    with Image.open(path) as image:
        return decoder.decode(image)


ORDINARY: dict[str, Callable[[Path, Image.Image], Path]] = {
    "baseline": lambda path, image: jpeg(path, image),
    "progressive": lambda path, image: jpeg(path, image, progressive=True),
    "grey": lambda path, image: jpeg(path, image.convert("L")),
    "4:4:4": lambda path, image: jpeg(path, image, subsampling=0),
    "4:2:2": lambda path, image: jpeg(path, image, subsampling=1),
    "odd size": lambda path, image: jpeg(path, image.resize((101, 77))),
    "one pixel": lambda path, image: jpeg(path, image.resize((1, 1))),
}
OTHERS: dict[str, Callable[[Path, Image.Image], Path]] = {
    "CMYK": lambda path, image: jpeg(path, image.convert("CMYK")),
    "RGB inside": lambda path, image: jpeg(path, image, keep_rgb=True),
    "PNG": lambda path, image: saved(path, image, "PNG"),
    "WebP": lambda path, image: saved(path, image, "WEBP"),
    "MPO": lambda path, image: saved(path, image, "MPO", save_all=True, append_images=[image]),
}


class TestWhatIsDecoded:
    @pytest.mark.parametrize("kind", ORDINARY)
    def test_ordinary_files_give_the_pixels_of_pillow(
        self, decoder: GpuDecoder, photo: Image.Image, tmp_path: Path, kind: str
    ) -> None:
        path = ORDINARY[kind](tmp_path / "x", photo)
        decoded = opened(path, decoder)
        assert decoded is not None
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))
        np.testing.assert_array_equal(load_image(path, PREPROCESSING, None, decoder), load_image(path, PREPROCESSING))

    @pytest.mark.parametrize("kind", OTHERS)
    def test_other_files_are_left_to_pillow(
        self, decoder: GpuDecoder, photo: Image.Image, tmp_path: Path, kind: str
    ) -> None:
        path = OTHERS[kind](tmp_path / "x", photo)
        assert opened(path, decoder) is None
        np.testing.assert_array_equal(load_image(path, PREPROCESSING, None, decoder), load_image(path, PREPROCESSING))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation_is_applied_once(
        self, decoder: GpuDecoder, photo: Image.Image, tmp_path: Path, orientation: int
    ) -> None:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        path = jpeg(tmp_path / "x.jpg", photo, exif=exif)
        assert opened(path, decoder) is not None
        np.testing.assert_array_equal(load_image(path, PREPROCESSING, None, decoder), load_image(path, PREPROCESSING))

    @pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.999])
    @pytest.mark.parametrize("progressive", [False, True])
    def test_a_file_that_is_cut_off_has_the_same_reason_as_ever(
        self, photo: Image.Image, tmp_path: Path, kept: float, progressive: bool
    ) -> None:
        library = FakeLibrary()
        content = jpeg(tmp_path / "x.jpg", photo, progressive=progressive).read_bytes()
        (tmp_path / "x.jpg").write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(ImageError) as expected:
            load_image(tmp_path / "x.jpg", PREPROCESSING)
        with pytest.raises(ImageError) as found:
            load_image(tmp_path / "x.jpg", PREPROCESSING, None, GpuDecoder(library))
        assert str(found.value) == str(expected.value)
        assert not library.decoded  # nvJPEG would have decoded it without an error

    def test_another_size_than_pillow_reads_is_left_to_pillow(self, photo: Image.Image, tmp_path: Path) -> None:
        library = FakeLibrary()
        path = jpeg(tmp_path / "x.jpg", photo)
        library.inflated = path.read_bytes()
        assert opened(path, GpuDecoder(library)) is None
        assert library.decoded == 1  # a good file, to see that the GPU is well

    def test_limits_come_first(self, photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from smlp_deploy.images import decode

        library = FakeLibrary()
        monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
        with pytest.raises(ImageError, match="more than 1000 pixels"):
            load_image(jpeg(tmp_path / "x.jpg", photo), PREPROCESSING, None, GpuDecoder(library))
        assert not library.decoded

    def test_unusual_samplings_are_not_ordinary(self, photo: Image.Image, tmp_path: Path) -> None:
        with Image.open(jpeg(tmp_path / "x.jpg", photo)) as image:
            assert isinstance(image, JpegImageFile)
            assert is_ordinary(image)
            image.layer = [(1, 4, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)]  # 4:1:1
            assert not is_ordinary(image)

    def test_many_threads_share_one_decoder(self, decoder: GpuDecoder, photo: Image.Image, tmp_path: Path) -> None:
        path = jpeg(tmp_path / "x.jpg", photo)
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda _: opened(path, decoder) is not None, range(100)))


class TestAFailingDecoder:
    def test_a_dead_gpu_ends_the_run(self, photo: Image.Image, tmp_path: Path) -> None:
        library = FakeLibrary()
        decoder = GpuDecoder(library)
        library.broken = True
        with pytest.raises(GpuError, match="does not decode any more"):
            load_image(jpeg(tmp_path / "x.jpg", photo), PREPROCESSING, None, decoder)

    def test_the_gpu_is_asked_for_and_its_chroma_interpolated(self) -> None:
        library = FakeLibrary()
        GpuDecoder(library)
        assert library.options == {"device_id": 0, "backends": [1, 2], "options": ":fancy_upsampling=1"}

    def test_the_real_library_says_in_one_line_that_there_is_no_gpu(self) -> None:
        library = pytest.importorskip(gpu_decode.MODULE, reason="nvImageCodec is not installed")
        if gpu_decode_here():
            pytest.skip("there is a GPU")
        with pytest.raises(MissingDependencyError, match="nvImageCodec does not start here") as caught:
            GpuDecoder(library)
        assert "\n" not in str(caught.value)


def gpu_decode_here() -> bool:
    from smlp_deploy.dependencies import find_gpu

    return find_gpu() is not None


class TestGate:
    def test_the_real_library_passes_on_the_cpu(self) -> None:
        assert check_pixels(real_library(), PREPROCESSING) == 0

    def test_small_differences_pass(self) -> None:
        assert check_pixels(GpuDecoder(FakeLibrary()), PREPROCESSING) == 0
        assert 0 < check_pixels(GpuDecoder(FakeLibrary(shift=1)), PREPROCESSING) <= 4

    def test_larger_ones_do_not(self) -> None:
        with pytest.raises(GpuError, match=r"differs from Pillow by \d+ of 255 levels, more than 4"):
            check_pixels(GpuDecoder(FakeLibrary(shift=20)), PREPROCESSING)

    def test_a_decoder_that_leaves_all_to_pillow_does_not_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_decode, "is_ordinary", lambda _: False)
        with pytest.raises(GpuError, match="does not decode the bundled"):
            check_pixels(GpuDecoder(FakeLibrary()), PREPROCESSING)


@pytest.mark.gpu
def test_a_gpu_decodes_as_pillow_does(photo: Image.Image, tmp_path: Path) -> None:
    pytest.importorskip(gpu_decode.MODULE, reason="nvImageCodec is not installed")
    if not gpu_decode_here():
        pytest.skip("no NVIDIA GPU and driver here")
    decoder = GpuDecoder.open()
    assert check_pixels(decoder, PREPROCESSING) <= gpu_decode.MOST
    for progressive in (False, True):
        path = jpeg(tmp_path / "x.jpg", photo, progressive=progressive)
        ours, theirs = load_image(path, PREPROCESSING), load_image(path, PREPROCESSING, None, decoder)
        assert np.abs(ours - theirs).max() <= gpu_decode.MOST / 255 / min(PREPROCESSING.std) + 1e-5


class TestPredict:
    @pytest.fixture
    def library(self, monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
        library = FakeLibrary()
        monkeypatch.setattr(GpuDecoder, "open", lambda: GpuDecoder(library))
        return library

    def run(self, *arguments: object) -> int:
        with pytest.raises(SystemExit) as stop:
            main(["predict", *map(str, arguments)])
        return int(stop.value.code or 0)

    def test_each_record_says_so(
        self, digits_export: Export, digit_images: list[Path], tmp_path: Path, library: FakeLibrary
    ) -> None:
        for name, options in (("gpu", ["--decode", "gpu"]), ("cpu", [])):
            target = tmp_path / f"{name}.jsonl"
            assert self.run(*digit_images[:3], "--model", digits_export.path, "-o", target, *options) == 0
        on_gpu, on_cpu = (
            [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
            for name in ("gpu", "cpu")
        )
        assert library.decoded >= 18 + 3
        assert [record.pop("decode") for record in on_gpu] == ["gpu"] * 3
        assert on_gpu == on_cpu

    def test_a_run_does_not_mix_decoders(
        self,
        digits_export: Export,
        digit_images: list[Path],
        tmp_path: Path,
        library: FakeLibrary,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        target = tmp_path / "x.jsonl"
        arguments = (*digit_images, "--model", digits_export.path, "-o", target, "--batch-size", "2")
        decode, calls = GpuDecoder.decode, []

        def dying(self: GpuDecoder, image: Image.Image) -> Image.Image | None:
            calls.append(image)
            library.broken = len(calls) > 18 * 2 + 6  # two decodes of each image of the gate come first
            return decode(self, image)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GpuDecoder, "decode", dying)
            assert self.run(*arguments, "--decode", "gpu") == 6
        assert "does not decode any more" in capsys.readouterr().err
        library.broken = False
        assert self.run(*arguments, "--resume") == 2
        assert "decode" in capsys.readouterr().err
        assert self.run(*arguments, "--resume", "--decode", "gpu") == 0
        assert len(target.read_text().splitlines()) == len(digit_images)

    def test_csv_is_refused(
        self, digits_export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str], library: FakeLibrary
    ) -> None:
        assert self.run("x.jpg", "--model", digits_export.path, "-o", tmp_path / "x.csv", "--decode", "gpu") == 2
        assert "CSV does not say how images were decoded" in capsys.readouterr().err

    def test_a_machine_that_cannot_says_so_in_one_line(
        self, digits_export: Export, digit_images: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        if gpu_decode_here():
            pytest.skip("there is a GPU")
        assert self.run(digit_images[0], "--model", digits_export.path, "--decode", "gpu", "--quiet") == 6
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert "decode" in captured.err
