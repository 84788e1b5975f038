"""Results as self-contained HTML pages; each function turns a result into the text of a page."""

from smlp_deploy.reports.accuracy import IMAGES_SHOWN, evaluation_page, predictions_page
from smlp_deploy.reports.page import Origin, require_report
from smlp_deploy.reports.proof import divergence_page, parity_page
from smlp_deploy.reports.speed import benchmark_page, profile_page

__all__ = [
    "IMAGES_SHOWN",
    "Origin",
    "benchmark_page",
    "divergence_page",
    "evaluation_page",
    "parity_page",
    "predictions_page",
    "profile_page",
    "require_report",
]
