"""What all wrappers ask of a model: modules by name, who shares a weight, who reads one without calling its module."""

import difflib
import fnmatch
import re
from collections.abc import Iterable

from torch import Tensor, nn

_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_EXPRESSION = "re:"


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module `name` of `model` stands; children of containers are named by their index.

    Raises ValueError for "" (the model itself has no place to be replaced in) and for a name that there is not.
    """
    if not name:
        raise ValueError("name is empty, which is the model itself; wrap the model in another module, or name a part")
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise ValueError(unmatched_error([name], modules))
    parent, _, child = name.rpartition(".")
    # Not setattr: a property of that name would take it, and Sequential has no attribute "0".
    modules[parent]._modules[child] = new


def matches(name: str, pattern: str) -> bool:
    """Whether a module's name fits a pattern.

    pattern: a whole name ("model.layers.0.mixer.inner.q_proj"), its last parts ("q_proj", "inner.q_proj"), a glob over
             the whole name ("model.layers.*.q_proj"), or "re:" and a regular expression that must match all of it.
    Raises ValueError for a regular expression that is none.
    """
    if pattern.startswith(_EXPRESSION):
        try:
            return re.fullmatch(pattern.removeprefix(_EXPRESSION), name) is not None
        except re.error as problem:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {problem}") from problem
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")


def nearest(wanted: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` of the names that resemble `wanted`, the most alike first.

    A name is compared by as many of its last parts as `wanted` has; of several that end alike the first is told.
    """
    parts = wanted.removeprefix(_EXPRESSION).count(".") + 1
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(".".join(name.split(".")[-parts:]), name)
    first.pop("", None)
    return [first[end] for end in difflib.get_close_matches(wanted, first, n=count, cutoff=0.3)]


def unmatched_error(patterns: Iterable[str], names: Iterable[str]) -> str:
    """The text of the error for patterns that fit none of the names, with the nearest of these."""
    candidates = [name for name in names if name]
    told = []
    for pattern in patterns:
        alike = nearest(pattern, candidates)
        told.append(f"{pattern!r} matches no module" + (f"; the nearest are {', '.join(alike)}" if alike else ""))
    return "; ".join(told)


def read_by_others(model: nn.Module) -> set[str]:
    """The names of the modules whose weights torch's own attention reads without calling them.

    A wrapper in their place would be passed over: `nn.MultiheadAttention` computes with `out_proj.weight`, and the fast
    path of `nn.TransformerEncoderLayer` with all of its projections.
    """
    return {
        f"{name}.{inner}".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _READERS)
        for inner, _ in module.named_modules(remove_duplicate=False)
        if inner
    }


def tied(model: nn.Module) -> dict[int, list[str]]:
    """By the id of each parameter that has several holders: the names of the modules that hold it.

    A module that stands in several places is there under each of its names.
    """
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(name)
    return {key: names for key, names in holders.items() if len(names) > 1}


def tensor_bytes(model: nn.Module) -> int:
    """The bytes of all parameters and buffers, those that are kept out of checkpoints too; shared memory once.

    Tensors that overlap in one storage count once, and what else the storage holds does not count (a file that is
    mapped into memory is one storage). Tensors of the meta device count by their shapes.
    """
    total, ends = 0, dict[object, int]()
    for device, start, end in sorted({_extent(tensor) for tensor in [*model.parameters(), *model.buffers()]}):
        total += max(0, end - max(start, ends.get(device, 0)))
        ends[device] = max(end, ends.get(device, 0))
    return total


def _extent(tensor: Tensor) -> tuple[str, int, int]:
    """Where a tensor lies: device, first byte, the one behind the last."""
    if not tensor.numel():
        return str(tensor.device), 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.element_size()
    if tensor.is_meta:
        return f"meta {id(tensor)}", 0, size
    return str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + size
