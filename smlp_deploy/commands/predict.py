"""smlp predict."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from smlp_deploy.commands import options as o
from smlp_deploy.errors import ImageError, UsageError

if TYPE_CHECKING:
    from smlp_deploy.images.gpu_decode import GpuDecoder
    from smlp_deploy.inference.classify import Classifier, Prediction
    from smlp_deploy.inference.devices import DeviceClassifier
    from smlp_deploy.inference.facts import Listing
    from smlp_deploy.inference.records import RecordStream, RunIdentity
    from smlp_deploy.inference.resume import RecordFile
    from smlp_deploy.inference.shards import Shard
    from smlp_deploy.interrupts import StopRequest
    from smlp_deploy.metadata import ModelMetadata
    from smlp_deploy.runners.placement import Placement


def predict(
    inputs: o.ImagesArgument,
    model: o.ModelOption = None,
    device: o.DeviceOption = None,
    devices: o.DevicesOption = None,
    provider: o.ProviderOption = None,
    runtime: o.RuntimeOption = o.Runtime.auto,
    batch_size: o.BatchSizeOption = None,
    topk: o.TopkOption = None,
    format_: o.RecordFormatOption = None,
    output: o.RecordsOutputOption = None,
    shard: o.ShardOption = None,
    ray: o.RayOption = None,
    actors: o.ActorsOption = None,
    actor_cpus: o.ActorCpusOption = None,
    actor_gpus: o.ActorGpusOption = None,
    resume: o.ResumeOption = False,
    workers: o.WorkersOption = None,
    decode: o.DecodeOption = o.DecodeOn.cpu,
    allow_errors: o.AllowErrorsOption = False,
    html: o.HtmlOption = None,
    as_json: o.RecordsJsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Classify images with the labels and preprocessing in the model; one record per image, in order.

    With -o, records are kept in FILE.partial until all are written; --resume continues a run that was stopped.
    """
    from smlp_deploy.commands.terminal import suggest

    if as_json and format_ not in (None, o.RecordFormat.jsonl):
        raise UsageError("contradicts --json", where=f"--format {format_.value}", fix="give one of them")
    request = Request(
        inputs=inputs,
        model=model,
        device=device,
        devices=devices,
        provider=provider,
        runtime=runtime,
        batch_size=batch_size,
        topk=topk,
        format=o.RecordFormat.jsonl if as_json else format_,
        output=output,
        shard=shard,
        resume=resume,
        workers=workers,
        decode_on_gpu=decode is o.DecodeOn.gpu,
        html=html,
    )
    if ray is not None or actors or actor_cpus or actor_gpus:
        from smlp_deploy.commands.on_ray import run_on_ray

        failed, following = run_on_ray(request, ray, actors=actors, cpus=actor_cpus or 1, gpus=actor_gpus or 0)
    else:
        failed, following = _run_here(request)
    if failed and not allow_errors:
        raise typer.Exit(ImageError.exit_code)
    if following:
        suggest("smlp", *following)


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options that say what to classify with what, and where the records go."""

    inputs: list[str]
    model: Path | None
    device: str | None
    devices: str | None
    provider: o.Provider | None
    runtime: o.Runtime
    batch_size: int | None
    topk: int | None
    format: o.RecordFormat | None
    output: Path | None
    shard: str | None
    resume: bool
    workers: int | None
    decode_on_gpu: bool
    html: Path | None


def _run_here(request: Request) -> tuple[int, list[object]]:
    """Classify images on this machine; returns how many failed, and the next useful command."""
    from smlp_deploy.commands.output import is_finished
    from smlp_deploy.commands.sources import default_model
    from smlp_deploy.files import check_writable
    from smlp_deploy.images.find import find_images
    from smlp_deploy.inference.facts import Listing
    from smlp_deploy.inference.records import RunIdentity
    from smlp_deploy.interrupts import put_off

    if request.decode_on_gpu and request.devices is not None:
        raise UsageError("contradicts --decode gpu", where="--devices", fix="give one of them")
    output, resume = request.output, request.resume
    part, kind = _check_shard(request)
    kind = kind or _check(request)
    images = Listing(find_images(request.inputs, o.standard_images(request.inputs)))
    placement, *others = o.choose_placements(
        request.device, request.devices, request.provider, request.runtime, request.model
    )
    if resume and output is not None and part is None and is_finished(output):
        return 0, []
    o.check_files(request.model)
    if output is not None:
        check_writable(output if part is None else part.file(output, kind.value))
    path = default_model(request.model, placement)
    with _open(path, placement, *others) as classifier, put_off(again=True) as stop:
        topk = classifier.resolve_topk(at_most(request.topk, len(classifier.labels)))
        size = classifier.resolve_batch_size(request.batch_size)
        decoder = _gpu_decoder(classifier.metadata) if request.decode_on_gpu else None
        identity = None
        if output is not None and kind is not o.RecordFormat.table:
            where, by = placement.kind_of(path, classifier.metadata), decoder.name if decoder else None
            identity = RunIdentity.of(
                path, classifier.metadata, provider=where, kind=kind.value, topk=topk, batch_size=size, decode=by
            )
        run = _Run(classifier, path, request.inputs, images, stop, identity, decoder, kind, topk, size, request.workers)
        if part is None:
            return run.whole(output, request.html, resume=resume), ["verify", path]
        return run.shard(part, output, resume=resume), ["merge", output, "-o", f"all.{kind}"]


@dataclass(frozen=True)
class _Run:
    """A run over images; `identity` is None if its records go where no run can be continued."""

    classifier: Classifier | DeviceClassifier
    model: Path
    inputs: Sequence[str]
    images: Listing
    stop: StopRequest
    identity: RunIdentity | None
    decoder: GpuDecoder | None
    kind: o.RecordFormat
    topk: int
    batch_size: int
    workers: int | None

    def whole(self, output: Path | None, html: Path | None, *, resume: bool) -> int:
        """Write the records of all images to a file, or to standard output, and a page; returns how many failed."""
        from smlp_deploy.commands.terminal import counting, say
        from smlp_deploy.images.find import count_images
        from smlp_deploy.inference.records import write_records

        first: list[Prediction] = []
        with _record_sink(output, self.identity, kind=self.kind, topk=self.topk, resume=resume) as sink:
            sink.skip(self.images)
            predictions = self.classifier.classify(
                self.stop.before(self.images),
                batch_size=self.batch_size,
                topk=self.topk,
                workers=self.workers,
                decoder=self.decoder,
            )
            if html is not None:
                from smlp_deploy.reports import IMAGES_SHOWN

                predictions = _remembering(predictions, first, IMAGES_SHOWN)
            on_terminal = output is None and sys.stdout.isatty()
            count = partial(count_images, self.inputs)
            with counting("images", done=sink.done, records_on_terminal=on_terminal, total=count) as advance:
                done, failed = write_records(predictions, sink, self.stop, batch_size=self.batch_size, advance=advance)
            self._conclude(sink, failed)
        if html is not None:
            from smlp_deploy.commands.output import page_origin, write_page
            from smlp_deploy.reports import predictions_page

            page = predictions_page(
                page_origin([self.model]), first, model=self.classifier.name, total=done, failed=failed
            )
            write_page(html, page)
        say(f"{_counted(done)}, {failed} failed" + (f", written to {output}" if output else ""))
        return failed

    def _size(self, shard: Shard) -> int | None:
        from smlp_deploy.images.find import count_images

        images = count_images(self.inputs)
        return None if images is None else shard.size(images, batch_size=self.batch_size)

    def _conclude(self, sink: RecordFile[Prediction] | RecordStream, failed: int) -> None:
        from smlp_deploy.inference.facts import Facts
        from smlp_deploy.inference.resume import RecordFile

        if self.kind is o.RecordFormat.parquet and isinstance(sink, RecordFile) and self.identity is not None:
            from smlp_deploy.inference.parquet import conclude

            conclude(sink, Facts.of(self.identity, self.images, failed=failed))

    def shard(self, shard: Shard, folder: Path | None, *, resume: bool) -> int:
        """Write the records of one shard to its file, unless that is finished; returns how many failed."""
        from smlp_deploy.commands.terminal import counting, say
        from smlp_deploy.inference.shards import run_shard

        assert folder is not None, "checked before"
        assert self.identity is not None, "a shard is no table"
        with counting("images", done=0, records_on_terminal=False, total=lambda: self._size(shard)) as advance:
            run = run_shard(
                self.classifier,
                self.identity,
                self.images,
                folder,
                shard=shard,
                resume=resume,
                stop=self.stop,
                workers=self.workers,
                decoder=self.decoder,
                advance=advance,
            )
        result = f"{_counted(run.facts.images)}, {run.facts.failed} failed"
        if run.skipped:
            say(f"shard {shard} is finished already: {result}, in {run.path}")
        else:
            say(f"shard {shard}: {result}, written to {run.path}")
        return run.facts.failed


def _counted(images: int) -> str:
    return f"{images} image" if images == 1 else f"{images} images"


def at_most(topk: int | None, classes: int) -> int | None:
    """`topk`, or the number of classes with a note if it is larger."""
    from smlp_deploy.commands.terminal import note

    if topk is None or topk <= classes:
        return topk
    note(f"the model has {classes} classes, so --topk is {classes} in place of {topk}")
    return classes


def _open(path: Path, placement: Placement, *others: Placement) -> Classifier | DeviceClassifier:
    if others:
        from smlp_deploy.inference.devices import DeviceClassifier

        return DeviceClassifier(path, [placement, *others])
    from smlp_deploy.inference.classify import Classifier

    return Classifier.open(path, placement=placement)


def _gpu_decoder(metadata: ModelMetadata) -> GpuDecoder:
    """A decoder on the GPU whose pixels are near enough to Pillow's.

    Raises:
        MissingDependencyError, GpuError: it does not start here, or they are not.
    """
    from smlp_deploy.commands.terminal import say
    from smlp_deploy.images.gpu_decode import GpuDecoder, check_pixels

    decoder = GpuDecoder.open()
    largest = check_pixels(decoder, metadata.preprocessing)
    say(f"JPEG files are decoded by {decoder.name}; on the bundled images it differs from Pillow by {largest} of 255")
    return decoder


def _check(request: Request) -> o.RecordFormat:
    """The format of the records.

    Raises:
        UsageError: the options contradict each other.
    """
    from smlp_deploy.commands.output import check_html

    kind = _choose_format(request.format, request.output)
    if kind is o.RecordFormat.parquet:
        from smlp_deploy.inference.parquet import require_parquet

        if request.output is None:
            raise UsageError("Parquet goes to a file", where="--format parquet", fix="add -o records.parquet")
        require_parquet()
    if request.resume and (request.output is None or kind is o.RecordFormat.table):
        raise UsageError(
            "only a JSONL, CSV or Parquet file can be continued", where="--resume", fix="add -o records.jsonl"
        )
    check_html(request.html, beside=request.output)
    if request.html is not None and request.resume:
        raise UsageError("a page shows the images of one run", where="--html", fix="leave out --resume")
    if request.decode_on_gpu and kind is o.RecordFormat.csv:
        raise UsageError("CSV does not say how images were decoded", where="--decode gpu", fix="write JSONL")
    return kind


def _check_shard(request: Request) -> tuple[Shard | None, o.RecordFormat | None]:
    """The shard that is asked for and its format; None for both without one.

    Raises:
        UsageError: the options contradict each other.
        MissingDependencyError: the package for Parquet is missing.
    """
    if request.shard is None:
        return None, None
    from smlp_deploy.inference.shards import Shard

    return Shard.parse(request.shard), check_shards(request, "--shard")


def check_shards(request: Request, option: str) -> o.RecordFormat:
    """The format of shards' files.

    Raises:
        UsageError: the options contradict `option`.
        MissingDependencyError: the package for Parquet is missing.
    """
    from smlp_deploy.inference.shards import KINDS

    kind = request.format or o.RecordFormat.parquet
    if kind.value not in KINDS:
        raise UsageError("shards are Parquet or JSONL", where=f"--format {kind}", fix="choose one of them")
    if request.output is None or request.output.is_file():
        raise UsageError("shards go to a folder", where=request.output or option, fix="add -o out/")
    if request.html is not None:
        raise UsageError("a page shows all images", where="--html", fix=f"leave out {option}")
    if kind is o.RecordFormat.parquet:
        from smlp_deploy.inference.parquet import require_parquet

        require_parquet()
    return kind


def _choose_format(given: o.RecordFormat | None, output: Path | None) -> o.RecordFormat:
    if given is not None:
        return given
    if output is None:
        return o.RecordFormat.table
    try:
        return o.RecordFormat(output.suffix.removeprefix("."))
    except ValueError:
        raise UsageError(
            "no format has this suffix", where=output, fix="end it in .jsonl, .csv or .parquet, or add --format"
        ) from None


def _remembering(predictions: Iterable[Prediction], first: list[Prediction], most: int) -> Iterator[Prediction]:
    """Pass `predictions` through, appending the first `most` to a list."""
    for prediction in predictions:
        if len(first) < most:
            first.append(prediction)
        yield prediction


@contextlib.contextmanager
def _record_sink(
    output: Path | None, identity: RunIdentity | None, *, kind: o.RecordFormat, topk: int, resume: bool
) -> Iterator[RecordFile[Prediction] | RecordStream]:
    """Where records go: standard output or a file, a resumable one if its identity is given.

    Undecodable bytes of file names are kept.
    """
    from smlp_deploy.commands.records import predictions_writer
    from smlp_deploy.files import replacing
    from smlp_deploy.inference.records import FORMATS, RecordStream
    from smlp_deploy.inference.resume import RecordFile

    if output is None:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        if kind is o.RecordFormat.table:
            yield RecordStream(sys.stdout, predictions_writer(sys.stdout))
        else:
            yield RecordStream(sys.stdout, FORMATS[kind].writer(sys.stdout, topk=topk))
    elif identity is None:
        with replacing(output) as temporary, temporary.open("w", encoding="utf-8", errors="surrogateescape") as stream:
            yield RecordStream(stream, predictions_writer(stream))
    else:
        with RecordFile.open(output, identity, resume=resume) as records:
            yield records
