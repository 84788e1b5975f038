from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from smlp_deploy.errors import CheckpointError, ConfigError
from smlp_deploy.metadata import METADATA_KEY, SMLPNetConfig
from smlp_deploy.models.checkpoint import Checkpoint, infer_config, load_checkpoint
from smlp_deploy.models.smlpnet import SMLPNet
from tests.support.recipe import CASES, config_of, recipe_weights

CONFIG = config_of(CASES["micro"])


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return recipe_weights(CONFIG, 1)


def saved(tmp_path: Path, content: Any, name: str = "model.pth") -> Path:
    path = tmp_path / name
    torch.save(content, path)
    return path


def assert_holds(checkpoint: Checkpoint, weights: dict[str, Tensor]) -> None:
    assert checkpoint.config == CONFIG
    state_dict = checkpoint.network().state_dict()
    assert state_dict.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(state_dict[key], tensor), key


def test_official_training_checkpoint_loads(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    network = SMLPNet(CONFIG)
    optimizer = torch.optim.AdamW(network.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    network(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    scheduler.step()
    ema = {f"module.{key}": tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in weights.items()}
    content = {
        "model": collections.OrderedDict(weights),
        "model_ema": ema,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 299,
        "args": argparse.Namespace(model="smlpnet_tiny", lr=1e-3, data_path=None, device="cuda", betas=(0.9, 0.99)),
    }
    path = saved(tmp_path, content)
    assert_holds(load_checkpoint(path), weights)
    averaged = load_checkpoint(path, ema=True)
    assert averaged.ema
    assert torch.equal(averaged.state_dict["mlp_head.0.bias"], weights["mlp_head.0.bias"] + 1)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_bare_state_dict_loads_whatever_its_prefix(tmp_path: Path, weights: dict[str, Tensor], prefix: str) -> None:
    path = saved(tmp_path, {prefix + key: tensor for key, tensor in weights.items()})
    assert_holds(load_checkpoint(path), weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(tmp_path: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    path = saved(tmp_path, {key: t.to(dtype) if t.is_floating_point() else t for key, t in weights.items()})
    loaded = load_checkpoint(path)
    expected = weights["mlp_head.0.weight"].to(dtype).float()
    assert torch.equal(loaded.state_dict["mlp_head.0.weight"], expected)


def test_safetensors_carry_labels_and_preprocessing(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    document = {"labels": list("abcdefghij"), "preprocessing": {"mean": [0.5, 0.5, 0.5], "crop_pct": 1}}
    save_file(weights, path, metadata={METADATA_KEY: json.dumps(document)})
    checkpoint = load_checkpoint(path)
    assert_holds(checkpoint, weights)
    assert checkpoint.metadata.labels == tuple("abcdefghij")
    assert checkpoint.metadata.preprocessing is not None
    assert checkpoint.metadata.preprocessing.mean == (0.5, 0.5, 0.5)
    assert checkpoint.metadata.preprocessing.image_size == CONFIG.image_size


def test_a_json_beside_the_file_does_the_same(micro_pth: Path) -> None:
    micro_pth.with_suffix(".json").write_text(json.dumps({"labels": list("abcdefghij")}))
    assert load_checkpoint(micro_pth).metadata.labels == tuple("abcdefghij")


def test_a_damaged_json_beside_the_file_is_an_error(micro_pth: Path) -> None:
    micro_pth.with_suffix(".json").write_text('{"labels": "abc"}')
    with pytest.raises(ConfigError, match=r"metadata is damaged: Expected `array.*labels.*micro\.json"):
        load_checkpoint(micro_pth)


def test_missing_counters_do_not_matter(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = saved(tmp_path, {key: t for key, t in weights.items() if not key.endswith("num_batches_tracked")})
    assert_holds(load_checkpoint(path), weights)


def test_network_owns_its_weights(micro_pth: Path) -> None:
    checkpoint = load_checkpoint(micro_pth)
    with torch.no_grad():
        checkpoint.network().mlp_head[0].bias.zero_()  # type: ignore[operator]
    assert checkpoint.state_dict["mlp_head.0.bias"].abs().sum() > 0


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        SMLPNetConfig(dim=5, depths=(1,), expansion=1, patch_size=1, image_size=3, num_classes=1),
        SMLPNetConfig(dim=2, depths=(3, 1, 2), expansion=4, patch_size=2, image_size=24, num_classes=17),
        SMLPNetConfig(dim=80, depths=(2, 8, 14, 2)),
    ],
)
def test_configuration_is_recovered_from_shapes(config: SMLPNetConfig) -> None:
    assert infer_config(shapes_of(config)) == config


Shapes = dict[str, tuple[int, ...]]


def shapes_of(config: SMLPNetConfig) -> Shapes:
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in SMLPNet(config).state_dict().items()}


@st.composite
def configurations(draw: st.DrawFn) -> SMLPNetConfig:
    depths = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    patch_size = draw(st.integers(1, 8))
    return SMLPNetConfig(
        dim=draw(st.integers(1, 200)),
        depths=depths,
        expansion=draw(st.integers(1, 5)),
        patch_size=patch_size,
        image_size=patch_size * 2 ** (len(depths) - 1) * draw(st.integers(1, 20)),
        num_classes=draw(st.integers(1, 3000)),
    )


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(configurations())
def test_any_configuration_is_recovered_from_its_shapes(config: SMLPNetConfig) -> None:
    assert infer_config(shapes_of(config)) == config


def mutated(data: st.DataObject, shapes: Shapes) -> Shapes:
    """The same shapes with one key dropped, added, renamed, or with one other dimension."""
    counters = [key for key in shapes if key.endswith("num_batches_tracked")]
    key = data.draw(st.sampled_from(sorted(shapes.keys() - counters)))
    kind = data.draw(st.sampled_from(["drop", "add", "rename", "resize", "rank"]))
    others = {other: shape for other, shape in shapes.items() if other != key}
    if kind == "drop":
        return others
    if kind == "add":
        return shapes | {data.draw(st.sampled_from([f"{key}x", f"x.{key}", key.replace("0", "7") + "7"])): shapes[key]}
    if kind == "rename":
        return others | {f"{key}_": shapes[key]}
    if kind == "rank":
        return shapes | {key: (*shapes[key], 1)}
    axis = data.draw(st.integers(0, len(shapes[key]) - 1))
    size = data.draw(st.integers(0, 300) | st.integers(1 << 31, 1 << 62))
    resized = (*shapes[key][:axis], size, *shapes[key][axis + 1 :])
    return shapes | {key: resized}


@settings(derandomize=True, deadline=None, database=None, max_examples=150)
@given(st.data(), configurations())
def test_any_single_mutation_is_refused(data: st.DataObject, config: SMLPNetConfig) -> None:
    shapes = shapes_of(config)
    changed = mutated(data, shapes)
    if changed == shapes:
        return
    try:
        found = infer_config(changed)
    except (CheckpointError, ConfigError):
        return
    # Where the change makes another network's shapes, they are exactly that network's.
    assert {key: shape for key, shape in shapes_of(found).items() if key in changed} == changed


def test_a_lying_shape_costs_no_time(weights: dict[str, Tensor]) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    for key, shape in [
        ("to_patch_embedding.0.0.weight", (1 << 40, 3, 4, 4)),
        ("to_patch_embedding.0.0.weight", (8, 3, 1 << 40, 1 << 40)),
        ("token_mix.0.1.proj_h.weight", (1 << 40, 8, 1, 1)),
        ("channel_mix.0.2.net.0.weight", (1 << 62, 8)),
        ("mlp_head.0.weight", (1 << 62, 64)),
    ]:
        with pytest.raises((CheckpointError, ConfigError)):
            infer_config(shapes | {key: shape})


def test_more_blocks_than_any_network_has_are_refused() -> None:
    config = SMLPNetConfig(dim=1, depths=(1,), image_size=4, num_classes=1)
    shapes = shapes_of(config) | {f"token_mix.{i}.0.conv_merge.Conv.weight": (1, 1, 3, 3) for i in range(50_000)}
    with pytest.raises(ConfigError, match="at most 2048 blocks"):
        infer_config(shapes)


class TestRefusesWhatDoesNotFit:
    def test_a_shape(self, tmp_path: Path, weights: dict[str, Tensor]) -> None:
        weights["channel_mix.3.2.net.3.weight"] = torch.zeros(3, 5)
        expected = "'channel_mix.3.2.net.3.weight' has shape (3, 5), expected (32, 96)"
        with pytest.raises(CheckpointError, match=re.escape(expected)):
            load_checkpoint(saved(tmp_path, weights))

    def test_a_missing_key(self, tmp_path: Path, weights: dict[str, Tensor]) -> None:
        del weights["token_mix.2.1.proh_w.bias"]
        with pytest.raises(CheckpointError, match=r"'token_mix\.2\.1\.proh_w\.bias' of shape \(2,\) is missing"):
            load_checkpoint(saved(tmp_path, weights))

    def test_an_unknown_key(self, tmp_path: Path, weights: dict[str, Tensor]) -> None:
        weights["head_dist.bias"] = torch.zeros(3)
        with pytest.raises(CheckpointError, match=r"'head_dist\.bias' of shape \(3,\) is not part of sMLPNet"):
            load_checkpoint(saved(tmp_path, weights))

    def test_a_block_of_another_width(self, tmp_path: Path, weights: dict[str, Tensor]) -> None:
        weights["token_mix.1.0.conv_merge.Conv.weight"] = torch.zeros(17, 1, 3, 3)
        with pytest.raises(CheckpointError, match=r"has shape \(17, 1, 3, 3\), expected \(8, 1, 3, 3\)"):
            load_checkpoint(saved(tmp_path, weights))

    def test_another_network(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="not an sMLPNet checkpoint"):
            load_checkpoint(saved(tmp_path, {"conv1.weight": torch.zeros(3)}))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_values_that_are_no_numbers(self, tmp_path: Path, weights: dict[str, Tensor], bad: float) -> None:
        weights["mlp_head.0.weight"][3, 4] = bad
        with pytest.raises(CheckpointError, match=r"'mlp_head\.0\.weight' has values that are NaN"):
            load_checkpoint(saved(tmp_path, weights))

    @pytest.mark.parametrize(
        ("dtype", "reason"),
        [
            (torch.int32, r"'mlp_head\.0\.weight' is int32, expected float32"),
            (torch.complex64, r"'mlp_head\.0\.weight' is a torch\.ComplexFloatStorage, not a tensor of numbers"),
        ],
    )
    def test_types_that_are_no_weights(
        self, tmp_path: Path, weights: dict[str, Tensor], dtype: torch.dtype, reason: str
    ) -> None:
        weights["mlp_head.0.weight"] = weights["mlp_head.0.weight"].to(dtype)
        with pytest.raises(CheckpointError, match=reason):
            load_checkpoint(saved(tmp_path, weights))

    def test_a_tensor_that_claims_more_than_its_storage(self, tmp_path: Path, weights: dict[str, Tensor]) -> None:
        weights["mlp_head.0.weight"] = torch.zeros(1).expand(1 << 20, 1 << 20)
        with pytest.raises(CheckpointError, match="claims more values than the file holds"):
            load_checkpoint(saved(tmp_path, weights))

    def test_what_is_not_a_state_dict(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="holds a list"):
            load_checkpoint(saved(tmp_path, [1, 2]))
        with pytest.raises(CheckpointError, match="'epoch' is a int, not a tensor"):
            load_checkpoint(saved(tmp_path, {"epoch": 3}))

    def test_negative_variances(self, tmp_path: Path, weights: dict[str, Tensor]) -> None:
        weights["batch_norm.running_var"] *= -1
        with pytest.raises(CheckpointError, match=r"'batch_norm\.running_var' has negative variances"):
            load_checkpoint(saved(tmp_path, weights))

    def test_a_stage_without_blocks(self, tmp_path: Path, weights: dict[str, Tensor]) -> None:
        kept = {key: tensor for key, tensor in weights.items() if not key.startswith("token_mix.4.")}
        with pytest.raises(CheckpointError, match="4 patch embeddings but stage 3 has no blocks"):
            load_checkpoint(saved(tmp_path, kept))

    def test_a_tensor_of_another_rank(self, tmp_path: Path, weights: dict[str, Tensor]) -> None:
        weights["mlp_head.0.weight"] = torch.zeros(3)
        with pytest.raises(CheckpointError, match=r"'mlp_head\.0\.weight' has shape \(3,\), expected 2 positive sizes"):
            load_checkpoint(saved(tmp_path, weights))

    def test_an_empty_state_dict(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="holds no state dict"):
            load_checkpoint(saved(tmp_path, {}))

    def test_moving_averages_of_safetensors(self, tmp_path: Path, weights: dict[str, Tensor]) -> None:
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="has no moving-average weights"):
            load_checkpoint(tmp_path / "model.safetensors", ema=True)

    def test_absent_moving_averages(self, micro_pth: Path) -> None:
        with pytest.raises(CheckpointError, match=r"has no moving-average weights, such as 'model_ema'.* omit --ema"):
            load_checkpoint(micro_pth, ema=True)


class Runs:
    """Unpickling it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


class TestRefusesWhatIsUnsafe:
    @pytest.mark.parametrize(
        ("name", "wanted"), [("system", r"posix\.system|nt\.system"), ("eval", r"(builtins|__builtin__)\.eval")]
    )
    def test_code(self, tmp_path: Path, weights: dict[str, Tensor], name: str, wanted: str) -> None:
        proof = tmp_path / "proof"
        call = {
            "system": Runs(os.system, f"touch {proof}"),
            "eval": Runs(eval, f"open({str(proof)!r}, 'w')"),
        }[name]
        for key in ("model", "state_dict"):
            with pytest.raises(CheckpointError, match=f"^its weights are a ({wanted}), which is not built"):
                load_checkpoint(saved(tmp_path, {key: call, "args": 1}))
        checkpoint = load_checkpoint(saved(tmp_path, {"model": weights, "args": call}))
        assert_holds(checkpoint, weights)
        assert any(re.fullmatch(wanted, found) for found in checkpoint.not_built)
        assert not proof.exists()

    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_a_bare_pickle(self, tmp_path: Path, protocol: int) -> None:
        proof, path = tmp_path / "proof", tmp_path / "model.pth"
        path.write_bytes(pickle.dumps(Runs(os.system, f"touch {proof}"), protocol=protocol))
        with pytest.raises(CheckpointError, match="not a zip-format torch file"):
            load_checkpoint(path)
        assert not proof.exists()

    def test_imports_by_another_opcode(self, tmp_path: Path, micro_pth: Path) -> None:
        proof = tmp_path / "proof"
        hostile = pickle.dumps(Runs(os.system, f"touch {proof}"), protocol=4)
        path = rewritten(micro_pth, tmp_path / "model.pth", lambda name, data: hostile if "data.pkl" in name else data)
        with pytest.raises(CheckpointError, match=r"nothing was run: the file uses FRAME, which torch.save does not"):
            load_checkpoint(path)
        assert not proof.exists()

    def test_compressed_members(self, tmp_path: Path, micro_pth: Path) -> None:
        path = rewritten(micro_pth, tmp_path / "model.pth", compression=zipfile.ZIP_DEFLATED)
        with pytest.raises(CheckpointError, match="members are compressed"):
            load_checkpoint(path)

    def test_a_zip_that_is_no_torch_file(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
            archive.writestr("readme.txt", "hello")
        with pytest.raises(CheckpointError, match=r"no data\.pkl"):
            load_checkpoint(tmp_path / "model.pth")

    def test_members_that_overlap(self, micro_pth: Path) -> None:
        with zipfile.ZipFile(micro_pth, "a") as archive:
            largest = max(archive.infolist(), key=lambda member: member.file_size)
            for copy in range(64):
                twin = zipfile.ZipInfo(f"micro/data/x{copy}")
                twin.header_offset, twin.CRC = largest.header_offset, largest.CRC
                twin.file_size = twin.compress_size = largest.file_size
                archive.filelist.append(twin)
                archive._didModify = True  # type: ignore[attr-defined]
        with pytest.raises(CheckpointError, match="members claim more bytes than the file has"):
            load_checkpoint(micro_pth)

    def test_a_safetensors_header_that_is_no_json(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes((3).to_bytes(8, "little") + b"abc")
        with pytest.raises(CheckpointError, match="its header is not"):
            load_checkpoint(path)

    def test_a_flipped_bit(self, micro_pth: Path) -> None:
        content = bytearray(micro_pth.read_bytes())
        content[len(content) // 2] ^= 1
        micro_pth.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(micro_pth)

    @pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
    def test_a_member_twice(self, micro_pth: Path) -> None:
        with zipfile.ZipFile(micro_pth, "a") as archive:
            archive.writestr(archive.namelist()[0], b"again")
        with pytest.raises(CheckpointError, match="occurs twice"):
            load_checkpoint(micro_pth)

    def test_a_safetensors_key_twice(self, tmp_path: Path) -> None:
        entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
        header = f"{{{entry},{entry}}}".encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        with pytest.raises(CheckpointError, match="occurs twice"):
            load_checkpoint(path)

    def test_a_safetensors_header_that_lies(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match="claims more bytes"):
            load_checkpoint(path)


def rewritten(source: Path, target: Path, change: Any = None, *, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)) if change else old.read(name))
    return target


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1])
def test_truncated_files_are_refused(micro_pth: Path, keep: int) -> None:
    micro_pth.write_bytes(micro_pth.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="empty file" if keep == 0 else "not a zip-format torch file"):
        load_checkpoint(micro_pth)


def test_truncated_safetensors_are_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged safetensors file"):
        load_checkpoint(path)


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    for name, reason in [
        ("absent.pth", "no such file"),
        ("folder.pth", "is a directory"),
        ("x.txt", "no such file"),
        ("x.onnx", "is an artifact"),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            load_checkpoint(tmp_path / name)
