from __future__ import annotations

import csv
import io
import json
import os

import pytest

from smlp_deploy.classify import Prediction, Score
from smlp_deploy.records import csv_writer, jsonl_writer

ODD = 'a "b",\n\t\x1b[31m図 .jpg'
UNDECODABLE = os.fsdecode(b"\xff\xfe.jpg")
SCORES = (Score(3, 'cat, "tabby"', 0.75), Score(1, "dog", 0.25))


@pytest.mark.parametrize("path", [ODD, UNDECODABLE])
def test_jsonl_round_trips(path: str) -> None:
    stream = io.StringIO()
    write = jsonl_writer(stream, topk=2)
    write(Prediction(path, SCORES))
    write(Prediction(path, error="empty file"))
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first == {
        "path": path,
        "predictions": [
            {"index": 3, "label": 'cat, "tabby"', "probability": 0.75},
            {"index": 1, "label": "dog", "probability": 0.25},
        ],
    }
    assert second == {"path": path, "error": "empty file"}


@pytest.mark.parametrize("path", [ODD, UNDECODABLE])
def test_csv_round_trips(path: str) -> None:
    stream = io.StringIO(newline="")
    write = csv_writer(stream, topk=2)
    write(Prediction(path, SCORES))
    write(Prediction(path, error="empty file"))
    stream.seek(0)
    good, bad = csv.DictReader(stream)
    assert good["path"] == bad["path"] == path
    assert (good["label_1"], good["index_1"], good["probability_2"], good["error"]) == ('cat, "tabby"', "3", "0.25", "")
    assert (bad["label_1"], bad["error"]) == ("", "empty file")
