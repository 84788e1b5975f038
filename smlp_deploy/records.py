"""Predictions as machine-readable records: one JSON object or CSV row per input. Odd file names survive both."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from typing import TextIO

from smlp_deploy.classify import Prediction

Write = Callable[[Prediction], None]


def jsonl_writer(stream: TextIO) -> Write:
    """Writes `{"path", "predictions": [{"index", "label", "probability"}]}` or `{"path", "error"}`, one per line."""

    def write(prediction: Prediction) -> None:
        record: dict[str, object] = {"path": prediction.path}
        if prediction.error is None:
            record["predictions"] = [vars(score) for score in prediction.scores]
        else:
            record["error"] = prediction.error
        stream.write(json.dumps(record) + "\n")

    return write


def csv_writer(stream: TextIO, *, topk: int) -> Write:
    """Writes a header, then path, error, and index, label and probability of each of the `topk` classes."""
    rows = csv.writer(stream, lineterminator="\n")
    columns = [f"{name}_{rank}" for rank in range(1, topk + 1) for name in ("index", "label", "probability")]
    rows.writerow(["path", "error", *columns])

    def write(prediction: Prediction) -> None:
        values = [value for score in prediction.scores for value in (score.index, score.label, score.probability)]
        rows.writerow([prediction.path, prediction.error or "", *(values or [""] * len(columns))])

    return write
