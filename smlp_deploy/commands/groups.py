"""Groups of options: a verb has each group as one parameter, and the command line its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, get_type_hints

from smlp_deploy.commands import options as o
from smlp_deploy.errors import UsageError
from smlp_deploy.files import check_regular

if TYPE_CHECKING:
    from smlp_deploy.pipeline.precision import Int8Options


def with_groups(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb for Typer: in the place of each parameter that is a dataclass are the fields of that, as options.

    Args:
        verb: its parameters are options, whose types are those of `commands/options.py`, or dataclasses of such.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(verb, eval_str=True).parameters.values():
        group = parameter.annotation
        if not is_dataclass(group):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        types = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
            )
            for field in fields(group)
        ]

    @wraps(verb)
    def ungrouped(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        verb(**given)

    ungrouped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    ungrouped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return ungrouped


@dataclass(frozen=True, kw_only=True)
class Gates:
    """The bounds of the parity gates, where they replace those of the precision."""

    min_cosine: o.MinCosineOption = None
    max_difference: o.MaxDifferenceOption = None
    min_top1: o.MinTop1Option = None

    @property
    def bounds(self) -> dict[str, float]:
        """Those that were given."""
        named = {"cosine": self.min_cosine, "difference": self.max_difference, "top1": self.min_top1}
        return {name: bound for name, bound in named.items() if bound is not None}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How to quantize."""

    calibration_data: o.CalibrationDataOption = None
    calibrator: o.CalibratorOption = o.Calibrator.minmax
    calibration_table: o.CalibrationTableOption = None
    max_drop: o.MaxDropOption = None

    def int8_options(self, precision: str | None, *, per_channel: bool) -> Int8Options | None:
        """How to quantize, or None for another precision.

        Raises:
            UsageError: calibration options for another precision.
        """
        data, table = self.calibration_data, self.calibration_table
        if precision != "int8":
            if data or table or self.max_drop is not None:
                raise UsageError("calibration is for int8", fix="add --int8")
            return None
        images = tuple(o.find_given_images(data, "--calibration-data")) if data else ()
        if table is not None:
            check_regular(table, error=UsageError, fix="an int8 export writes one beside its file: x.calibration.json")
        from smlp_deploy.exporters.calibration import read_table  # onnxruntime is slow to import
        from smlp_deploy.pipeline.precision import Int8Options

        return Int8Options(
            images=images,
            table=read_table(table) if table else None,
            method=self.calibrator.value,
            max_drop=self.max_drop,
            per_channel=per_channel,
        )


@dataclass(frozen=True, kw_only=True)
class StatedPreprocessing:
    """The preprocessing of a checkpoint that states none."""

    mean: o.MeanOption = None
    std: o.StdOption = None
    crop_pct: o.CropPctOption = None
    interpolation: o.InterpolationOption = None

    @property
    def fields(self) -> dict[str, Any]:
        """The options that were given, as fields of `metadata.Preprocessing`.

        Raises:
            UsageError: mean or std is not three numbers.
        """
        given: dict[str, Any] = {"crop_pct": self.crop_pct, "interpolation": self.interpolation}
        for name, text in (("mean", self.mean), ("std", self.std)):
            if text is not None:
                try:
                    red, green, blue = (float(part) for part in text.split(","))
                except ValueError:
                    raise UsageError(
                        f"{text!r} is not three numbers", where=f"--{name}", fix="for example 0.5,0.5,0.5"
                    ) from None
                given[name] = (red, green, blue)
        return {name: value for name, value in given.items() if value is not None}
