"""smlp serve-check."""

from __future__ import annotations

from typing import Annotated

import typer

from smlp_deploy.commands import options as o
from smlp_deploy.errors import CheckError, UsageError

_LOAD_PANEL = "Latency and throughput"

UrlArgument = Annotated[str, typer.Argument(metavar="URL", help="The server's address for HTTP: localhost:8000.")]
ImagesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGES",
        help="Images, folders, quoted patterns, @FILE with a path per line, - for such a list on stdin.",
    ),
]
GrpcOption = Annotated[
    str | None, typer.Option("--grpc", metavar="HOST:PORT", help="Its address for gRPC. Default: the next port.")
]
ProtocolOption = Annotated[
    str, typer.Option(metavar="PROTOCOL", help="http, grpc, or http,grpc for both.", show_default=False)
]
ConcurrencyOption = Annotated[
    str,
    typer.Option(metavar="N,N", help="Clients that ask at the same time; 0 to skip.", rich_help_panel=_LOAD_PANEL),
]
RequestsOption = Annotated[int, typer.Option(min=1, help="Requests of each measurement.", rich_help_panel=_LOAD_PANEL)]
DifferenceOption = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        min=0,
        max=1,
        help="Maximum difference of a probability. Default: by precision.",
        rich_help_panel=o.AGREEMENT_PANEL,
    ),
]


def serve_check(
    url: UrlArgument,
    inputs: ImagesArgument,
    model: o.ModelOption = None,
    grpc: GrpcOption = None,
    protocol: ProtocolOption = "http,grpc",
    device: o.DeviceOption = None,
    provider: o.ProviderOption = None,
    runtime: o.RuntimeOption = o.Runtime.auto,
    min_top1: o.MinSameOption = 1.0,
    max_difference: DifferenceOption = None,
    concurrency: ConcurrencyOption = "1,4,16",
    requests: RequestsOption = 200,
    as_json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Compare a running Triton server with a local run of the same artifact, and measure it.

    The server must serve a repository of smlp export --format triton.
    """
    from smlp_deploy.commands.output import show
    from smlp_deploy.commands.sources import default_model
    from smlp_deploy.commands.tables import show_server
    from smlp_deploy.commands.terminal import building
    from smlp_deploy.evaluation.server import PROTOCOLS, endpoints_of, require_client
    from smlp_deploy.evaluation.serving import Settings, check_server
    from smlp_deploy.inference.classify import Classifier

    wanted = protocol.split(",")
    if not set(wanted) <= set(PROTOCOLS):
        raise UsageError(f"{protocol!r} is neither http nor grpc", where="--protocol", fix="for example http,grpc")
    endpoints = [found for found in endpoints_of(url, grpc=grpc) if found.protocol in wanted]
    settings = Settings(
        concurrency=_numbers(concurrency), requests=requests, min_top1=min_top1, max_difference=max_difference
    )
    require_client()
    images = o.find_given_images(inputs, "IMAGES")
    placement = o.choose_placement(device, provider, runtime, [model])
    o.check_files(model)
    path = default_model(model, placement)
    with Classifier.open(path, placement=placement) as classifier, building("asking") as progress:
        report = check_server(endpoints, classifier, images, settings=settings, progress=progress)
    show(as_json=as_json, json_text=report.to_json, table=lambda: show_server(report))
    if report.failures:
        raise CheckError(f"the server does not agree: {'; '.join(report.failures)}", where=path)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{text!r} is not a list of numbers", where="--concurrency", fix="for example 1,4") from None
    return () if numbers == (0,) else numbers
