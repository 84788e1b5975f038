"""smlp doctor."""

from __future__ import annotations

import typer

from smlp_deploy.commands.options import JsonOption, QuietOption
from smlp_deploy.errors import CheckError


def doctor(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Check what works on this machine, and how to fix what does not."""
    from smlp_deploy.commands import output
    from smlp_deploy.commands.tables import show_findings
    from smlp_deploy.commands.terminal import suggest, working
    from smlp_deploy.doctor import examine, to_json

    with working("checking"):
        findings = examine()
    output.show(as_json=as_json, json_text=lambda: to_json(findings), table=lambda: show_findings(findings))
    if any(finding.status == "error" for finding in findings):
        raise typer.Exit(CheckError.exit_code)
    suggest("smlp", "export")
