"""smlp predict."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from smlp_deploy.commands import options as o
from smlp_deploy.errors import UsageError

if TYPE_CHECKING:
    from smlp_deploy.images.gpu_decode import GpuDecoder
    from smlp_deploy.inference.classify import Classifier, Prediction
    from smlp_deploy.inference.records import RecordStream, RunIdentity
    from smlp_deploy.inference.resume import RecordFile


def predict(
    inputs: o.ImagesArgument,
    model: o.ModelOption = None,
    device: o.DeviceOption = None,
    provider: o.ProviderOption = None,
    runtime: o.RuntimeOption = o.Runtime.auto,
    batch_size: o.BatchSizeOption = None,
    topk: o.TopkOption = None,
    format_: o.RecordFormatOption = None,
    output: o.RecordsOutputOption = None,
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
    from smlp_deploy.commands.output import is_finished, write_page
    from smlp_deploy.commands.sources import default_model
    from smlp_deploy.commands.terminal import counting, say, suggest
    from smlp_deploy.files import check_writable
    from smlp_deploy.images.find import count_images, find_images
    from smlp_deploy.inference.classify import Classifier
    from smlp_deploy.inference.records import RunIdentity, write_records
    from smlp_deploy.interrupts import put_off

    if as_json and format_ not in (None, o.RecordFormat.jsonl):
        raise UsageError("contradicts --json", where=f"--format {format_.value}", fix="give one of them")
    kind = _check(o.RecordFormat.jsonl if as_json else format_, output, html, resume=resume)
    if decode is o.DecodeOn.gpu and kind is o.RecordFormat.csv:
        raise UsageError("CSV does not say how images were decoded", where="--decode gpu", fix="write JSONL")
    images = find_images(inputs, o.standard_images(inputs))
    placement = o.choose_placement(device, provider, runtime, [model])
    if resume and output is not None and is_finished(output):
        return
    o.check_files(model)
    if output is not None:
        check_writable(output)
    path = default_model(model, placement)
    first: list[Prediction] = []
    with Classifier.open(path, placement=placement) as classifier, put_off(again=True) as stop:
        topk = _at_most(topk, len(classifier.labels))
        topk, size = classifier.resolve_topk(topk), classifier.resolve_batch_size(batch_size)
        decoder = _gpu_decoder(classifier) if decode is o.DecodeOn.gpu else None

        def identity() -> RunIdentity:
            return RunIdentity.of(
                path,
                classifier.runner.metadata,
                provider=placement.kind_of(path, classifier.runner.metadata),
                kind=kind.value,
                topk=topk,
                batch_size=size,
                decode=decoder.name if decoder else None,
            )

        with _record_sink(output, identity, kind=kind, topk=topk, resume=resume) as sink:
            sink.skip(images)
            predictions = classifier.classify(
                stop.before(images), batch_size=size, topk=topk, workers=workers, decoder=decoder
            )
            if html is not None:
                from smlp_deploy.reports import IMAGES_SHOWN

                predictions = _remembering(predictions, first, IMAGES_SHOWN)
            on_terminal = output is None and sys.stdout.isatty()
            total = partial(count_images, inputs)
            with counting("images", done=sink.done, records_on_terminal=on_terminal, total=total) as advance:
                done, failed = write_records(predictions, sink, stop, batch_size=size, advance=advance)
        if html is not None:
            from smlp_deploy.reports import predictions_page

            write_page(html, predictions_page(first, model=classifier.runner.name, total=done, failed=failed))
    say(f"{done} {'image' if done == 1 else 'images'}, {failed} failed" + (f", written to {output}" if output else ""))
    if failed and not allow_errors:
        raise typer.Exit(1)
    suggest("smlp", "verify", path)


def _at_most(topk: int | None, classes: int) -> int | None:
    from smlp_deploy.commands.terminal import note

    if topk is None or topk <= classes:
        return topk
    note(f"the model has {classes} classes, so --topk is {classes} in place of {topk}")
    return classes


def _gpu_decoder(classifier: Classifier) -> GpuDecoder:
    """A decoder on the GPU whose pixels are near enough to Pillow's.

    Raises:
        MissingDependencyError, GpuError: it does not start here, or they are not.
    """
    from smlp_deploy.commands.terminal import say
    from smlp_deploy.images.gpu_decode import GpuDecoder, check_pixels

    decoder = GpuDecoder.open()
    largest = check_pixels(decoder, classifier.runner.metadata.preprocessing)
    say(f"JPEG files are decoded by {decoder.name}; on the bundled images it differs from Pillow by {largest} of 255")
    return decoder


def _check(given: o.RecordFormat | None, output: Path | None, html: Path | None, *, resume: bool) -> o.RecordFormat:
    """The format of the records.

    Raises:
        UsageError: the options contradict each other.
    """
    from smlp_deploy.commands.output import check_html

    kind = _choose_format(given, output)
    if resume and (output is None or kind is o.RecordFormat.table):
        raise UsageError("only a JSONL or CSV file can be continued", where="--resume", fix="add -o records.jsonl")
    check_html(html, beside=output)
    if html is not None and resume:
        raise UsageError("a page shows the images of one run", where="--html", fix="leave out --resume")
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
            "no format has this suffix", where=output, fix="end it in .jsonl or .csv, or add --format"
        ) from None


def _remembering(predictions: Iterable[Prediction], first: list[Prediction], most: int) -> Iterator[Prediction]:
    """Pass `predictions` through, appending the first `most` to a list."""
    for prediction in predictions:
        if len(first) < most:
            first.append(prediction)
        yield prediction


@contextlib.contextmanager
def _record_sink(
    output: Path | None, identity: Callable[[], RunIdentity], *, kind: o.RecordFormat, topk: int, resume: bool
) -> Iterator[RecordFile[Prediction] | RecordStream]:
    """Where records go: standard output or a file. Undecodable bytes of file names are kept.

    `identity` is called only where it is stored, because it hashes the whole model.
    """
    from smlp_deploy.commands.tables import predictions_writer
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
    elif kind is o.RecordFormat.table:
        with replacing(output) as temporary, temporary.open("w", encoding="utf-8", errors="surrogateescape") as stream:
            yield RecordStream(stream, predictions_writer(stream))
    else:
        with RecordFile.open(output, identity(), resume=resume) as records:
            yield records
