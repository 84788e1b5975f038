"""The first commands of someone with an ordinary training script's checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from smlp_deploy.cli import main
from tests.support.recipe import CASES, config_of, recipe_weights

CONFIG = config_of(CASES["micro"])
WEIGHTS, AVERAGED = recipe_weights(CONFIG, 1), recipe_weights(CONFIG, 2)
NAMES = ("ant", "bee", "cat", "dog", "emu", "fox", "gnu", "hen", "ibis", "jay")
Smlp = Callable[..., tuple[object, str, str]]


@pytest.fixture
def smlp(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smlp:
    """Runs the command line in a folder of the test's own; returns the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return caught.value.code, *capsys.readouterr()

    return run


def pictures(folder: Path) -> Path:
    """A folder of class folders with one picture each."""
    for i, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (25 * i, 10, 255 - 25 * i)).save(folder / name / "a.png")
    return folder


def test_a_lightning_checkpoint_goes_all_the_way(smlp: Smlp) -> None:
    state = {f"model.{key}": tensor for key, tensor in WEIGHTS.items()} | {"loss.weight": torch.ones(3)}
    torch.save({"state_dict": state, "hyper_parameters": {"root": Path("x")}, "epoch": 2}, "epoch=2-step=9.ckpt")
    pictures(Path("train"))
    code, out, err = smlp("export", "epoch=2-step=9.ckpt", "--labels", "train", "--crop-pct", "1")
    assert code == 0, err
    taken = "the weights taken are state_dict (keys model.*); tensors beside them that are left out: 1"
    assert f"note: epoch=2-step=9.ckpt: {taken}\n" in err
    artifact = Path(out.strip())
    assert artifact == Path("artifacts/epoch=2-step=9-fp32.onnx")
    code, out, err = smlp("predict", "--format", "jsonl", "train/cat/a.png")
    assert code == 0
    assert json.loads(out)["predictions"][0]["label"] in NAMES
    # What predict suggests next.
    code, out, err = smlp("verify", artifact, "--images", "train")
    assert (code, err) == (0, "")


def test_inspect_says_what_is_taken_and_how_to_take_the_other(smlp: Smlp) -> None:
    torch.save({"model": WEIGHTS, "model_ema": AVERAGED, "path": Path("x")}, "both.pth")
    facts = json.loads(smlp("inspect", "--json", "both.pth")[1])
    assert (facts["weights"], facts["other_weights"]) == ("model", ["model_ema; --ema takes it"])
    assert facts["not_built"] == ["pathlib.PosixPath"]
    facts = json.loads(smlp("inspect", "--json", "--ema", "both.pth")[1])
    assert (facts["weights"], facts["other_weights"]) == ("model_ema", ["model; taken without --ema"])
    assert "--ema takes it" in smlp("inspect", "both.pth")[1]


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ((), ["both.pth: the weights taken are model", "both.pth also has model_ema; --ema takes it"]),
        (("--ema",), ["both.pth: the weights taken are model_ema", "both.pth also has model; taken without --ema"]),
    ],
)
def test_export_says_so_too(smlp: Smlp, options: tuple[str, ...], notes: list[str]) -> None:
    torch.save({"model": WEIGHTS, "model_ema": AVERAGED}, "both.pth")
    _, _, err = smlp("export", "both.pth", "--labels", "absent", *options)
    assert "no such file" in err  # before anything is read
    Path("one.txt").write_text("one\n")
    code, _, err = smlp("export", "both.pth", "--labels", "one.txt", *options)
    assert code == 5
    assert "1 labels for" in err
    assert [line for line in err.splitlines() if line.startswith("note: both.pth") and "states" not in line] == [
        f"note: {note}" for note in notes
    ]
    assert not Path("artifacts").exists()


def test_a_plain_checkpoint_needs_no_note(smlp: Smlp) -> None:
    torch.save({"model": WEIGHTS, "epoch": 3}, "plain.pth")
    _, _, err = smlp("export", "plain.pth", "--mean", "123.675,116.28,103.53")
    assert "weights taken" not in err


def test_eval_of_named_folders_with_a_model_that_only_numbers_them(smlp: Smlp) -> None:
    torch.save({"model": WEIGHTS}, "plain.pth")
    folder = pictures(Path("val"))
    code, out, err = smlp("eval", folder, "--model", "plain.pth", "--json")
    assert code == 0, err
    assert "0 is ant, 9 is jay (--class-order gives another)" in err
    report = json.loads(out)
    assert report["named_by"] == "order"
    assert [record["label"] for record in report["records"]] == list(range(10))
    Path("classes.txt").write_text("\n".join(reversed(NAMES)))
    code, out, err = smlp("eval", folder, "--model", "plain.pth", "--json", "--class-order", "classes.txt")
    assert [record["label"] for record in json.loads(out)["records"]] == list(range(9, -1, -1))
    assert "sorted order" not in err
    Path("m.json").write_text("{}")
    code, _, err = smlp("eval", folder, "--class-order", "classes.txt", "--mapping", "m.json")
    assert code == 2
    assert "contradicts --mapping" in err


def test_several_networks_are_one_clear_error(smlp: Smlp) -> None:
    torch.save({"student": WEIGHTS, "teacher": AVERAGED}, "both.pth")
    for verb in ("inspect", "export"):
        code, out, err = smlp(verb, "both.pth")
        assert (code, out) == (5, "")
        assert "error: has 2 different sets of weights, student, teacher, and does not say which is meant · both" in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["weights", "model_best.pth.tar", "x.dat"])
def test_inspect_reads_any_name_by_content(smlp: Smlp, name: str) -> None:
    torch.save({"model": WEIGHTS}, name)
    assert json.loads(smlp("inspect", "--json", name)[1])["kind"] == "checkpoint"
    Path("y.dat").write_text("text")
    assert smlp("inspect", "y.dat")[0] == 2
