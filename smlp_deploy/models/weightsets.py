"""Where in a saved object the weights of an sMLPNet stand: which mapping, and under which prefix of its keys.

Training tools wrap a network each in its own way: `{"state_dict": {"model.…": …}}`, `{"net": …}`, `module.` in front of
every key. The network's own keys tell them apart from everything else, so no list of tools is needed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from smlp_deploy.errors import CheckpointError

_MARKS = ("to_patch_embedding.0.0.weight", "token_mix.0.1.proj_h.weight", "mlp_head.0.weight")
_ENOUGH_MARKS = 2
"""One may be missing or damaged, and is then named in the error."""
_MODULES = ("to_patch_embedding.", "token_mix.", "channel_mix.", "batch_norm.", "mlp_head.")
_AVERAGED = re.compile(r"(?:^|[._-])ema(?:$|[._-])", re.IGNORECASE)
_USUAL = frozenset(
    (
        *("model", "state_dict", "model_state_dict", "model_state", "net", "network", "module", "weights", "params"),
        *("model_ema", "state_dict_ema", "ema", "ema_state_dict", "model_ema_state_dict", "ema_model"),
    )
)
NO_AVERAGES = "has no moving-average weights, such as 'model_ema'"
_MAX_DEPTH = 4
_MAX_SETS = 16
_NAMED = 4
_SHOWN = 40


@dataclass(frozen=True, kw_only=True)
class WeightSet:
    """The weights of one network in a saved object.

    Attributes:
        path: the keys that lead to the mapping they stand in.
        prefix: of their keys in it.
        mapping: that mapping, with everything else in it.
    """

    path: tuple[str, ...]
    prefix: str
    mapping: Mapping[Any, Any] = field(compare=False)

    @property
    def name(self) -> str:
        """For messages: `state_dict (keys model.*)`."""
        where = ".".join(key[:_SHOWN] for key in self.path)
        keys = f"keys {self.prefix[:_SHOWN]}*" if self.prefix else ""
        return f"{where} ({keys})" if where and keys else where or keys or "the whole file"

    @property
    def averaged(self) -> bool:
        """Whether its name says that these are moving averages."""
        return _AVERAGED.search(".".join((*self.path, self.prefix))) is not None

    @property
    def rank(self) -> tuple[bool, int]:
        """How unusual its place is; the least unusual is taken."""
        return any(key not in _USUAL for key in self.path), len(self.path)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The weights to read.

    Attributes:
        taken: where they stand.
        values: the network's key -> what stands there.
        others: the other sets in the file, each with how to take it; equal copies are not among them.
        left_out: how many tensors beside them in the same mapping are not read.
    """

    taken: WeightSet
    values: dict[str, Any]
    others: tuple[str, ...]
    left_out: int


def choose_weights(content: Mapping[Any, Any], *, ema: bool, is_tensor: Callable[[Any], bool]) -> Choice | None:
    """Find the weights of an sMLPNet in nested mappings.

    Args:
        content: what was saved.
        ema: take moving averages, which are known by the word "ema" in their place.
        is_tensor: whether a value in it is a tensor.

    Returns:
        The choice; None if there are none of either kind.

    Raises:
        CheckpointError: there are only those of the other kind, or several of this kind that differ and of which none
            stands in a more usual place.
    """
    sets = list(islice(_sets(content, is_tensor), _MAX_SETS + 1))
    if not sets:
        return None
    if len(sets) > _MAX_SETS:
        raise CheckpointError(f"refused: it has more than {_MAX_SETS} sets of weights")
    wanted = _least_unusual(sets, averaged=ema)
    if not wanted:
        if ema:
            raise CheckpointError(NO_AVERAGES, fix="omit --ema")
        raise CheckpointError(f"has only moving-average weights, {_names(sets)}", fix="add --ema to take them")
    taken = wanted[0]
    values = _values(taken, sets, is_tensor)
    if any(_values(one, sets, is_tensor) != values for one in wanted[1:]):
        raise CheckpointError(
            f"has {len(wanted)} different sets of weights, {_names(wanted)}, and does not say which is meant",
            fix="load it with torch.load, and save the state dict of the one you want with torch.save",
        )
    tensors = sum(map(is_tensor, taken.mapping.values()))
    read = sum(map(is_tensor, values.values()))
    left = [one for one in sets if one not in wanted]
    return Choice(
        taken=taken, values=values, others=tuple(_how_to_take(one, ema) for one in left), left_out=tensors - read
    )


def _how_to_take(one: WeightSet, ema: bool) -> str:
    if one.averaged == ema:
        return f"{one.name}; to take it, save it alone"
    return f"{one.name}; --ema takes it" if one.averaged else f"{one.name}; taken without --ema"


def _least_unusual(sets: Sequence[WeightSet], *, averaged: bool) -> list[WeightSet]:
    kind = [one for one in sets if one.averaged == averaged]
    best = min((one.rank for one in kind), default=None)
    return sorted((one for one in kind if one.rank == best), key=lambda one: (len(one.name), one.name))


def _names(sets: Sequence[WeightSet]) -> str:
    more = f" and {len(sets) - _NAMED} more" if len(sets) > _NAMED else ""
    return ", ".join(one.name for one in sets[:_NAMED]) + more


def _sets(content: Mapping[Any, Any], is_tensor: Callable[[Any], bool]) -> Iterator[WeightSet]:
    for path, mapping in _mappings(content):
        found = Counter(prefix for key, value in mapping.items() if is_tensor(value) for prefix in _prefixes(key))
        for prefix, marks in found.items():
            if marks >= _ENOUGH_MARKS:
                yield WeightSet(path=path, prefix=prefix, mapping=mapping)


def _mappings(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """The mapping and those in it, each once, the outer ones first."""
    level: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    seen = {id(content)}
    for _ in range(_MAX_DEPTH):
        yield from level
        inner = []
        for path, mapping in level:
            for key, value in mapping.items():
                if isinstance(key, str) and isinstance(value, Mapping) and id(value) not in seen:
                    seen.add(id(value))
                    inner.append(((*path, key), value))
        level = inner


def _prefixes(key: Any) -> Iterator[str]:
    """What stands before one of the marks in a key."""
    for mark in _MARKS:
        if isinstance(key, str) and key.endswith(mark):
            prefix = key.removesuffix(mark)
            if not prefix or prefix.endswith("."):
                yield prefix


def _values(chosen: WeightSet, sets: Sequence[WeightSet], is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """What stands under the prefix, without other sets below it and plain values that are none of the network's."""
    start = chosen.prefix
    below = tuple(
        one.prefix
        for one in sets
        if one.mapping is chosen.mapping and one.prefix != start and one.prefix.startswith(start)
    )
    values = {}
    for key, value in chosen.mapping.items():
        if isinstance(key, str) and key.startswith(start) and not key.startswith(below):
            own = key.removeprefix(start)
            if is_tensor(value) or own.startswith(_MODULES):
                values[own] = value
    return values
