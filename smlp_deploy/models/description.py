"""From a checkpoint to the metadata of its artifacts: the labels and preprocessing to use, and where they come from.

The user's options come first, then what the file itself says, then ImageNet's for a head of 1,000 classes. Every
assumption is logged as a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from smlp_deploy.artifacts import checkpoint_stem
from smlp_deploy.dependencies import installed_version
from smlp_deploy.errors import ConfigError, SmlpError, UsageError
from smlp_deploy.files import DATA_FOLDER
from smlp_deploy.metadata import ModelMetadata, Preprocessing
from smlp_deploy.models.variants import VARIANTS, variant_of

if TYPE_CHECKING:
    from smlp_deploy.models.checkpoint import Checkpoint  # which imports torch

logger = logging.getLogger(__name__)

_MOST = 2
"""A mean or standard deviation above this is none of pixels from 0 to 1."""


def imagenet_labels() -> tuple[str, ...]:
    """The names of the 1,000 ILSVRC 2012 classes, in the order of their WordNet ids; each name is unique."""
    lines = (DATA_FOLDER / "imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    return tuple(line.split("\t")[1] for line in lines)


def describe(
    checkpoint: Checkpoint,
    *,
    labels: tuple[str, ...] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    batch: int | None = None,
    precision: str = "fp32",
) -> ModelMetadata:
    """The metadata of artifacts made from `checkpoint`.

    Args:
        checkpoint: the weights.
        labels: class names that replace the file's own.
        preprocessing: fields of `Preprocessing` that replace the file's own.
        batch: the one batch size the artifact accepts, or None for any.
        precision: of the artifact's arithmetic.

    Raises:
        ConfigError: the number of labels and of classes differ, or a preprocessing value is out of range.
    """
    variant = variant_of(checkpoint.config)
    return ModelMetadata(
        name=_name(checkpoint),
        config=checkpoint.config,
        labels=_labels(checkpoint, labels),
        preprocessing=_preprocessing(checkpoint, preprocessing or {}),
        batch=batch,
        precision=precision,
        variant=variant.name if variant else None,
        checkpoint=checkpoint.path.name,
        checkpoint_sha256=checkpoint.sha256,
        ema=checkpoint.ema,
        libraries={name: installed_version(name) or "unknown" for name in ("smlp-deploy", "torch")},
    )


def check_preprocessing(given: Mapping[str, Any]) -> None:
    """Check options for preprocessing before a checkpoint is loaded.

    Raises:
        UsageError: a value is out of range, or a mean or a standard deviation is of pixels from 0 to 255.
    """
    try:
        preprocessing = Preprocessing(**{"image_size": 224, **given})
    except ConfigError as error:
        raise UsageError(error.what, where=error.where, fix=error.fix) from None
    _check_scale(preprocessing, UsageError, where="--mean, --std")


def _name(checkpoint: Checkpoint) -> str:
    official = {variant.weights_file: variant.name for variant in VARIANTS.values() if variant.weights_file}
    return official.get(checkpoint.path.name, checkpoint_stem(checkpoint.path))


def _labels(checkpoint: Checkpoint, given: tuple[str, ...] | None) -> tuple[str, ...]:
    classes = checkpoint.config.num_classes
    labels = given if given is not None else checkpoint.metadata.labels
    if labels is not None:
        if len(labels) != classes:
            raise ConfigError(f"{len(labels)} labels for {classes} classes", where=checkpoint.path.name)
        return labels
    if classes == 1000:
        logger.warning("%s states no labels; its 1000 classes are assumed to be ImageNet's", checkpoint.path.name)
        return imagenet_labels()
    logger.warning(
        "%s states no labels; its %d classes are named by index (smlp export --labels FILE names them)",
        checkpoint.path.name,
        classes,
    )
    return tuple(str(index) for index in range(classes))


def _preprocessing(checkpoint: Checkpoint, given: Mapping[str, Any]) -> Preprocessing:
    own = checkpoint.metadata.preprocessing
    if own is not None and not {"mean", "std"} & given.keys():
        _check_scale(own, ConfigError, where=f"the preprocessing that belongs to {checkpoint.path.name}")
    if own is None:
        own = Preprocessing(image_size=checkpoint.config.image_size)
        names = {"mean": "mean", "std": "std", "crop_pct": "crop", "interpolation": "interpolation"}
        assumed = [f"{name} {_text(getattr(own, field))}" for field, name in names.items() if field not in given]
        if assumed:
            logger.warning(
                "%s states no preprocessing; ImageNet's is assumed: %s", checkpoint.path.name, ", ".join(assumed)
            )
    prepared = replace(own, **given)
    _check_scale(prepared, UsageError, where="--mean, --std")
    return prepared


def _check_scale(preprocessing: Preprocessing, error: type[SmlpError], *, where: str) -> None:
    """Refuse a mean and a standard deviation of pixels from 0 to 255: pixels here are from 0 to 1.

    Of values from 0 to 1 the mean is at most 1 and the standard deviation at most 0.5, and a std of 1 leaves them as
    they are. Up to 2 is allowed, because some networks are trained with constants that are no statistics. Pixels from 0
    to 255 have both below 2 only if the images are black.

    Raises:
        SmlpError: they are; of the type `error`.
    """
    mean, std = preprocessing.mean, preprocessing.std
    wrong = {"mean": mean} if max(map(abs, mean)) > _MOST else {}
    # A std of 1 beside such a mean says that the pixels were only centred, on the same scale.
    if max(std) > _MOST or (wrong and max(std) >= 1):
        wrong["std"] = std
    if wrong:
        found = " and ".join(f"{name} {_listed(values)}" for name, values in wrong.items())
        by_255 = {name: [value / 255 for value in values] for name, values in wrong.items()}
        raise error(
            f"{found}: for pixels from 0 to 255, but here pixels are from 0 to 1",
            where=where,
            fix=f"divide by 255: {' '.join(f'--{name} {_listed(values)}' for name, values in by_255.items())}",
        )


def _text(value: Any) -> str:
    return _listed(value) if isinstance(value, tuple) else str(value)


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:.6g}" for value in values)
