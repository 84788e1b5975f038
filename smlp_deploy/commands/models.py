"""smlp models."""

from __future__ import annotations

import json

from smlp_deploy.commands.options import JsonOption, QuietOption


def models(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the paper's variants: parameters, MACs, accuracy, and official weights."""
    from smlp_deploy.commands import output
    from smlp_deploy.commands.tables import show_variants
    from smlp_deploy.commands.terminal import suggest
    from smlp_deploy.models.variants import VARIANTS, variant_facts

    output.show(
        as_json=as_json,
        json_text=lambda: json.dumps([variant_facts(variant) for variant in VARIANTS.values()], indent=2),
        table=lambda: show_variants(VARIANTS),
    )
    if not as_json:
        suggest("smlp", "download", "smlpnet_small")
