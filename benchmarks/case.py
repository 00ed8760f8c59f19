"""What a benchmark is made of: an op at some sizes, our backends, and the peers that do the same."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

Size = Mapping[str, int]
Inputs = dict[str, Any]

OURS = "neural_layers"
# Not for use: the definition is written to be read.
NOT_TIMED = ("reference",)


class Maker:
    """Random tensors of one device and dtype, the same for the same seed.

    make = Maker("cpu", torch.float32); make.normal(2, 3)
    """

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal, in the case's dtype where none is given."""
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 from 0 to high − 1."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)


@dataclass(frozen=True)
class Call:
    """A contender at one size, ready to be timed.

    run:     one call; what it returns is kept until the clock has stopped
    leaves:  the tensors that get a gradient; empty where there is no backward
    compare: brings what `run` returned into our layout, for the check that all contenders compute the same
    """

    run: Callable[[], Any]
    leaves: tuple[Tensor, ...] = ()
    compare: Callable[[Any], Tensor] = lambda output: output[0] if isinstance(output, tuple) else output


def always(size: Size, effort: str) -> None:
    """No reason against a measurement, at any size."""


@dataclass(frozen=True)
class Peer:
    """Another library's best call for the same thing.

    prepare:  from the op's inputs to its call, in the layout that the library likes best; imports the library
    module:   what must be importable, e.g. "mambapy.pscan"
    install:  the command that makes it so
    device:   the only kind of device it runs on, where it runs on one
    skip:     the reason in words why it is not run at a size with an effort (`quick`, `full`), or None
    skip_backward: the same for forward + backward
    only_full: why it is left out of quick runs, or ""
    call:     which call is timed, for the reader
    """

    name: str
    prepare: Callable[[Inputs], Call]
    module: str = "torch"
    install: str = ""
    device: str = ""
    skip: Callable[[Size, str], str | None] = always
    skip_backward: Callable[[Size, str], str | None] = always
    only_full: str = ""
    call: str = ""

    def absence(self, device: str, effort: str) -> str | None:
        """Why it cannot take part on this machine, or None."""
        if self.device and self.device != device:
            return f"runs on {self.device} only"
        if not is_installed(self.module):
            return f"not installed; {self.install}"
        return self.only_full if self.only_full and effort != "full" else None


@cache
def is_installed(module: str) -> bool:
    """Whether the package of a module can be found, without importing it."""
    try:
        spec = importlib.util.find_spec(module.split(".")[0])
    except ImportError:
        return False
    # A folder of that name on the path is found as a namespace, which has no origin.
    return spec is not None and spec.origin is not None


@dataclass(frozen=True)
class Limit:
    """What no implementation can beat, timed in the same rounds: a copy of the same bytes, the exponentials alone.

    prepare: from the op's inputs to the forward's and the forward + backward's call; None where it does not apply
    """

    name: str
    prepare: Callable[[Inputs], tuple[Callable[[], Any] | None, Callable[[], Any] | None]]


@dataclass(frozen=True)
class Case:
    """An op with one set of options, over sizes.

    name:   unique; the op's own name where it has one case
    op:     a name of `neural_layers.functional`, or of what `ours` does
    about:  what is compared, one line
    axis:   the dimension that the plot runs over
    make:   the op's keyword arguments at a size
    leaves: those that get a gradient; empty where backward is not measured
    tiny, quick, full, cuda: the sizes of the tests, of `--quick`, of a recording, and of both on CUDA
    dtypes: of the inputs, by kind of device
    ours:    our contenders where the case is no op but something that models do; the first is the default
    compare: as in `Call`
    largest_difference: above this share of the largest output, contenders do not compute the same
    untimed: the reason in words why only memory is measured at a size with an effort, or None
    no_memory: the reason in words why memory is not measured, or ""
    """

    name: str
    op: str
    about: str
    axis: str
    make: Callable[[Size, Maker], Inputs]
    leaves: tuple[str, ...]
    tiny: tuple[Size, ...]
    quick: tuple[Size, ...]
    full: tuple[Size, ...]
    cuda: tuple[Size, ...] = ()
    peers: tuple[Peer, ...] = ()
    ours: tuple[Peer, ...] = ()
    limit: Limit | None = None
    dtypes: Mapping[str, torch.dtype] = field(default_factory=lambda: {"cpu": torch.float32, "cuda": torch.bfloat16})
    compare: Callable[[Any], Tensor] = Call.compare
    largest_difference: Mapping[str, float] = field(default_factory=lambda: {"cpu": 1e-3, "cuda": 5e-2})
    untimed: Callable[[Size, str], str | None] = always
    no_memory: str = ""

    def sizes(self, effort: str, device: str) -> tuple[Size, ...]:
        """The sizes for `tiny`, `quick` or `full`."""
        if device == "cuda" and self.cuda and effort != "tiny":
            return self.cuda
        sizes: tuple[Size, ...] = getattr(self, effort)
        return sizes

    def inputs(self, size: Size, device: str) -> Inputs:
        """The op's arguments at a size; those of `leaves` ask for a gradient."""
        made = self.make(size, Maker(device, self.dtypes[device]))
        return made | {name: made[name].detach().requires_grad_() for name in self.leaves}


def sweep(**dims: int | tuple[int, ...]) -> tuple[Size, ...]:
    """Sizes of which one dimension takes several values: sweep(T=(512, 2048), E=1536)."""
    (axis,) = [name for name, value in dims.items() if isinstance(value, tuple)]
    values = dims[axis]
    assert isinstance(values, tuple)
    return tuple({name: at if name == axis else value for name, value in dims.items()} for at in values)  # type: ignore[misc]


def leaf(tensor: Tensor) -> Tensor:
    """The same values in a tensor of its own that asks for a gradient where the given one does."""
    return tensor.detach().contiguous().requires_grad_(tensor.requires_grad)
