from __future__ import annotations

from smlp_deploy.errors import SmlpError, printable


def test_a_message_says_what_where_and_what_next() -> None:
    error = SmlpError("no such file", where="a/b.onnx", fix="export it")
    assert str(error) == "no such file · a/b.onnx · export it"
    assert str(SmlpError("no such file")) == "no such file"


def test_a_message_is_one_line_whatever_a_file_is_called() -> None:
    assert str(SmlpError("empty", where="a\nb\x1b[31m\udcff")) == r"empty · a\nb\x1b[31m\udcff"


def test_a_text_from_a_file_does_not_make_it_endless() -> None:
    assert len(str(SmlpError("x" * 5000, where="a.json"))) < 600


def test_printable_leaves_other_scripts_alone() -> None:
    assert printable("Straße 図.jpg") == "Straße 図.jpg"
