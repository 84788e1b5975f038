from __future__ import annotations

import csv
import io
import json
import os

import pytest

from smlp_deploy.evaluation.accuracy import Answer, ImageRecord, image_writer, read_images
from smlp_deploy.inference.classify import Prediction, Score
from smlp_deploy.inference.records import csv_writer, jsonl_writer

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


class TestImages:
    RECORDS = (
        ImageRecord(ODD, 3, (Answer(index=3, probability=0.1 + 0.2, loss=5e-324, top5=True), Answer(error="NaN, \n"))),
        ImageRecord(UNDECODABLE, 0, error="empty file"),
        ImageRecord("b.jpg", 1, (Answer(index=0, probability=1 / 3, loss=1e300), Answer(index=1, probability=1.0))),
    )

    def text(self) -> bytes:
        stream = io.StringIO()
        write = image_writer(stream)
        for record in self.RECORDS:
            write(record)
        return stream.getvalue().encode()

    def test_every_number_is_read_as_it_was_written(self) -> None:
        found = list(read_images(io.BytesIO(self.text())))
        assert tuple(record for record, _ in found) == self.RECORDS
        assert found[-1].end == len(self.text())

    def test_what_is_torn_or_foreign_is_not_read(self) -> None:
        text = self.text()
        ends = [written.end for written in read_images(io.BytesIO(text))]
        for cut in range(len(text)):
            found = list(read_images(io.BytesIO(text[:cut])))
            assert [written.end for written in found] == [end for end in ends if end <= cut]
        for line in (b"[]", b"1", b'{"path": "a"}', b'{"path": 1, "label": 0, "answers": []}', b"\xff"):
            assert not list(read_images(io.BytesIO(line + b"\n" + text)))
