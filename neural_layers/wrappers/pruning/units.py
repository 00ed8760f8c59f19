"""The units that can be removed from a model: which entries of which tensors belong to one.

A unit is a feed-forward neuron, a key/value head with its query heads, one query head of each key/value head, a channel
of Mamba or a head of Mamba-2. Everything that is indexed by a unit goes or stays together (the dependency groups of
arXiv 2305.11627).

Letters: H query heads, G key/value heads or groups, K head width, E inner width, P head width of Mamba-2, N state size,
F feed-forward width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from neural_layers.mamba import Mamba
from neural_layers.mamba2 import GroupedRMSNorm, Mamba2

KINDS = ("feed_forward", "kv_heads", "query_heads", "mamba", "mamba2")


@dataclass(frozen=True)
class Part:
    """A tensor of which unit i owns the entries start + i · block … start + (i + 1) · block − 1 along `dim`.

    role: "makes" the unit's values, "reads" them, or is "other"wise indexed by it
    """

    owner: nn.Module
    name: str
    dim: int
    start: int
    block: int
    role: str

    @property
    def tensor(self) -> Tensor:
        return self.owner.get_parameter(self.name)


@dataclass(frozen=True)
class Units:
    """The units of one module.

    name:   of the module. count: how many units there are
    groups: the units lie in so many groups of equal size, and each group must keep as many (query heads of each
            key/value head; heads of each group of Mamba-2)
    exact:  whether a share must come to a whole number of units, as with the few heads
    finish: sets what else the module knows of its width, given the number of units kept
    fields: the fields of a config that hold the width, given the number of units kept
    """

    name: str
    kind: str
    module: nn.Module
    count: int
    parts: tuple[Part, ...]
    finish: Callable[[int], None]
    fields: Callable[[int], dict[str, Any]]
    groups: int = 1
    exact: bool = False
    per_layer: str | None = field(default=None)


def find_units(model: nn.Module, kind: str) -> Iterator[Units]:
    """All units of one of `KINDS` in the model, module by module.

    Raises ValueError where a module has the names of such a layer, and holds what cannot be taken apart.
    """
    for name, module in model.named_modules():
        if kind == "feed_forward" and _has(module, "gate_proj", "up_proj", "down_proj"):
            yield _feed_forward(name, module)
        elif kind in ("kv_heads", "query_heads") and _is_attention(module):
            yield _heads(name, module, kind)
        elif kind == "mamba" and isinstance(module, Mamba):
            yield _mamba(name, module)
        elif kind == "mamba2" and isinstance(module, Mamba2):
            yield _mamba2(name, module)


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _is_attention(module: nn.Module) -> bool:
    # num_kv_heads: ours; num_key_value_groups: attention layers of transformers in the manner of Llama's.
    is_grouped = hasattr(module, "num_kv_heads") or hasattr(module, "num_key_value_groups")
    return is_grouped and hasattr(module, "head_dim") and _has(module, "q_proj", "k_proj", "v_proj", "o_proj")


def linear(name: str, module: Any, child: str) -> nn.Linear:
    """The linear layer `child` of a module; raises ValueError where another kind of layer stands there."""
    found = getattr(module, child)
    if hasattr(found, "base_layer"):
        raise ValueError(f"{name}.{child} carries an adapter; fold_lora, shrink, and train an adapter of the new size")
    if not isinstance(found, nn.Linear):
        kind = type(found).__name__
        raise ValueError(f"{name}.{child} is a {kind}, and rows of nn.Linear can be removed; shrink before quantize")
    return found


def _rows(owner: Any, start: int, block: int, role: str) -> list[Part]:
    biases = [] if getattr(owner, "bias", None) is None else [Part(owner, "bias", 0, start, block, role)]
    return [Part(owner, "weight", 0, start, block, role), *biases]


def _refuse_others(name: str, module: nn.Module, parts: list[Part], known: tuple[nn.Module | None, ...]) -> None:
    """Raise ValueError for a parameter that is neither in the parts nor of the `known` modules, which stay whole."""
    whole = {id(p) for other in known if other is not None for p in other.parameters()}
    whole |= {id(part.tensor) for part in parts}
    for inner, parameter in module.named_parameters():
        # The bias of what reads the units is as long as the model is wide.
        is_output_bias = any(p.dim == 1 and getattr(p.owner, "bias", None) is parameter for p in parts)
        if id(parameter) not in whole and not is_output_bias:
            raise ValueError(f"{name}.{inner} is not known of such a layer, so its units cannot be removed; exclude it")


def _feed_forward(name: str, module: Any) -> Units:
    gate, up, down = (linear(name, module, child) for child in ("gate_proj", "up_proj", "down_proj"))
    parts = [*_rows(gate, 0, 1, "makes"), *_rows(up, 0, 1, "makes"), Part(down, "weight", 1, 0, 1, "reads")]
    _refuse_others(name, module, parts, ())

    def finish(kept: int) -> None:
        if hasattr(module, "intermediate_size"):
            module.intermediate_size = kept

    return Units(
        name,
        "feed_forward",
        module,
        down.in_features,
        tuple(parts),
        finish,
        lambda kept: {"intermediate_size": kept},
    )


def _heads(name: str, module: Any, kind: str) -> Units:
    q, k, v, o = (linear(name, module, child) for child in ("q_proj", "k_proj", "v_proj", "o_proj"))
    width = module.head_dim
    queries, groups = q.out_features // width, k.out_features // width
    if getattr(getattr(module, "attention", None), "alibi_heads", None) is not None:
        raise ValueError(f"{name} has ALiBi, whose slopes follow from the number of heads: none can be removed")
    norms = tuple(getattr(module, child, None) for child in ("q_norm", "k_norm"))
    for norm in norms:
        if any(p.numel() != width for p in norm.parameters()) if isinstance(norm, nn.Module) else False:
            raise ValueError(f"{name} normalises all heads together, so that none can be removed; exclude it")
    per = queries // groups if kind == "kv_heads" else 1  # query heads that go with a unit
    parts = [*_rows(q, 0, per * width, "makes"), Part(o, "weight", 1, 0, per * width, "reads")]
    if kind == "kv_heads":
        parts += [*_rows(k, 0, width, "makes"), *_rows(v, 0, width, "makes")]
    if getattr(module, "gate_proj", None) is not None:
        parts += _rows(linear(name, module, "gate_proj"), 0, per * width, "other")
    if isinstance(getattr(module, "sinks", None), nn.Parameter):
        parts.append(Part(module, "sinks", 0, 0, per, "other"))
    _refuse_others(name, module, parts, (*norms, k, v))

    def counts(kept: int) -> tuple[int, int]:
        return (kept * per, kept) if kind == "kv_heads" else (kept, groups)

    def finish(kept: int) -> None:
        heads, kv_heads = counts(kept)
        values = {"num_heads": heads, "num_attention_heads": heads, "num_key_value_groups": heads // kv_heads}
        values |= {"num_kv_heads": kv_heads, "num_key_value_heads": kv_heads}
        for attribute, value in values.items():
            if hasattr(module, attribute):
                setattr(module, attribute, value)

    def fields(kept: int) -> dict[str, Any]:
        heads, kv_heads = counts(kept)
        return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": width}

    count, within = (groups, 1) if kind == "kv_heads" else (queries, groups)
    return Units(name, kind, module, count, tuple(parts), finish, fields, within, exact=True)


def _mamba(name: str, module: Any) -> Units:
    in_proj, x_proj, dt_proj, out_proj = (
        linear(name, module, child) for child in ("in_proj", "x_proj", "dt_proj", "out_proj")
    )
    inner = out_proj.in_features
    parts = [
        *_rows(in_proj, 0, 1, "makes"),
        *_rows(in_proj, inner, 1, "makes"),
        *_rows(module.conv1d, 0, 1, "other"),
        Part(x_proj, "weight", 1, 0, 1, "reads"),
        *_rows(dt_proj, 0, 1, "other"),
        Part(module, "A_log", 0, 0, 1, "other"),
        Part(module, "D", 0, 0, 1, "other"),
        Part(out_proj, "weight", 1, 0, 1, "reads"),
    ]
    _refuse_others(name, module, parts, ())
    return Units(
        name,
        "mamba",
        module,
        inner,
        tuple(parts),
        lambda kept: None,
        lambda kept: {"mamba_inner_size": kept},
    )


def _mamba2(name: str, module: Any) -> Units:
    in_proj, out_proj = (linear(name, module, child) for child in ("in_proj", "out_proj"))
    inner, width, (_, _, state, _, heads) = out_proj.in_features, module.head_dim, module.widths
    parts = [
        *_rows(in_proj, 0, width, "makes"),
        *_rows(in_proj, inner, width, "makes"),
        *_rows(in_proj, 2 * inner + 2 * state, 1, "other"),
        *_rows(module.conv1d, 0, width, "other"),
        *(Part(module, own, 0, 0, 1, "other") for own in ("dt_bias", "A_log", "D")),
        Part(out_proj, "weight", 1, 0, width, "reads"),
    ]
    has_norm = isinstance(module.norm, GroupedRMSNorm)
    if has_norm:
        parts.append(Part(module.norm, "weight", 0, 0, width, "other"))
    _refuse_others(name, module, parts, (module.B_norm, module.C_norm))

    def eps(kept: int) -> float:
        return float(module.norm.eps) * heads / kept

    def finish(kept: int) -> None:
        if has_norm:
            # mean(y²) is over fewer channels now; those that went were zeros to it. With r = E'/E of them left,
            # sqrt(mean + eps) = sqrt(r) · sqrt(mean' + eps / r), and the weight takes the factor.
            module.norm.eps = eps(kept)
            module.norm.weight.data.mul_((heads / kept) ** 0.5)
        module.widths = (kept * width, kept * width, state, state, kept)

    def fields(kept: int) -> dict[str, Any]:
        return {"inner_dim": kept * width, **({"norm_eps": eps(kept)} if has_norm else {})}

    return Units(
        name,
        "mamba2",
        module,
        heads,
        tuple(parts),
        finish,
        fields,
        module.num_groups,
        exact=True,
        per_layer="mamba2_layers",
    )
