"""smlp predict --ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from smlp_deploy.commands import options as o
from smlp_deploy.commands.predict import Request, at_most, check_shards
from smlp_deploy.errors import UsageError

if TYPE_CHECKING:
    from smlp_deploy.inference.devices import Opened
    from smlp_deploy.inference.records import RunIdentity


def run_on_ray(
    request: Request, address: str | None, *, actors: int | None, cpus: int, gpus: int
) -> tuple[int, list[object]]:
    """Classify images on a cluster, into shards' files; returns how many failed, and the next useful command."""
    from smlp_deploy.commands.sources import default_model
    from smlp_deploy.commands.terminal import counting, say, working
    from smlp_deploy.files import check_writable
    from smlp_deploy.images.find import find_images
    from smlp_deploy.inference.cluster import ActorOptions, connect, shards_of
    from smlp_deploy.interrupts import put_off

    kind, folder = _check(request, address)
    lines = o.standard_images(request.inputs)
    if isinstance(lines, bytes):
        raise UsageError("an image on standard input does not travel to a cluster", where="-", fix="give its path")
    images = list(find_images(request.inputs, lines))
    if not images:
        raise UsageError(
            "no images", where=", ".join(request.inputs), fix="name image files, folders or listings of them"
        )
    o.check_files(request.model)
    model = default_model(request.model, o.choose_placement(None, request.provider, request.runtime, [request.model]))
    options = ActorOptions(
        model=model.absolute(),
        actors=actors,
        cpus=cpus,
        gpus=gpus,
        provider=request.provider and request.provider.value,
        runtime=request.runtime.value,
    )
    check_writable(shards_of(len(images), batch_size=1)[0].file(folder, kind.value))
    with connect(str(address), options) as cluster, put_off(again=True) as stop:
        with working("opening the model on the cluster"):
            identity = _identity(cluster.describe(), request, model, kind)
        with counting("images", done=0, records_on_terminal=False, total=lambda: len(images)) as advance:
            shards = cluster.run(
                identity,
                images,
                folder,
                workers=request.workers,
                resume=request.resume,
                stop=stop,
                advance=advance,
            )
    failed = sum(shard.facts.failed for shard in shards)
    before = sum(shard.skipped for shard in shards)
    kept = f", {before} of them finished before" if before else ""
    say(f"{len(images)} images, {failed} failed, in {len(shards)} shards{kept}, written to {folder}")
    return failed, ["merge", folder, "-o", f"all.{kind}"]


def _check(request: Request, address: str | None) -> tuple[o.RecordFormat, Path]:
    """The format and the folder of the shards' files.

    Raises:
        UsageError: the options contradict each other.
    """
    if address is None:
        raise UsageError("actors are Ray's", where="--actors, --actor-cpus, --actor-gpus", fix="add --ray ADDRESS")
    beside = {
        "--device": request.device,
        "--devices": request.devices,
        "--shard": request.shard,
        "--decode gpu": request.decode_on_gpu,
    }
    if wrong := next((option for option, value in beside.items() if value), None):
        raise UsageError("contradicts --ray", where=wrong, fix="give one of them")
    kind = check_shards(request, "--ray")
    assert request.output is not None, "check_shards has seen it"
    return kind, request.output


def _identity(opened: Opened, request: Request, model: Path, kind: o.RecordFormat) -> RunIdentity:
    from smlp_deploy.inference.classify import check_batch_size, check_topk
    from smlp_deploy.inference.records import RunIdentity

    classes = len(opened.metadata.labels)
    return RunIdentity.of(
        model,
        opened.metadata,
        provider=opened.provider,
        kind=kind.value,
        topk=check_topk(at_most(request.topk, classes), classes=classes),
        batch_size=check_batch_size(request.batch_size, usual=opened.batch_size, largest=opened.largest),
    )
