"""What a quantized layer takes over from the plain one in whose place it stands, beside the weight."""

from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def take_hooks(old: nn.Module, new: nn.Module) -> None:
    """Make the hooks of calls and gradients those of `new`: the very dicts, so that their handles still remove them."""
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))


def hold_zeros(old: nn.Module, new: nn.Module) -> None:
    """Where the weight of `old` is pruned, and `new` trains it on, hold its zeros there."""
    from neural_layers.wrappers.pruning.masks import hold, mask_of

    mask = mask_of(old)
    if mask is not None:
        hold(new, mask)
