"""The laws. Each takes a `Subject` and returns the largest relative deviation that it found."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neural_layers.kernels.dispatch import OPS, use_backend
from neural_layers.testing.subject import Subject, deviation, gradients


def chunked(s: Subject) -> float:
    """Parallel = step by step = any split into chunks."""
    whole = s.mixer(s.x)
    splits = [[1] * s.length, s.random_split(), s.random_split()]
    return max(deviation(s.in_chunks(s.x, split), whole) for split in splits)


def packed(s: Subject) -> float:
    """Documents packed into one row = each document alone."""
    masks, expected = _pack(s)
    return deviation(s.mixer(s.x, **masks), expected)


def packed_chunked(s: Subject) -> float:
    """The same where the row is read in chunks, whose borders may fall inside a document or between two."""
    masks, expected = _pack(s)
    splits = [[1] * s.length, s.random_split()]
    return max(deviation(s.in_chunks(s.x, split, **masks), expected) for split in splits)


def _pack(s: Subject) -> tuple[dict[str, Tensor], Tensor]:
    """`seq_idx` and `position_ids` of a random packing of x, and what each document gives alone."""
    seq_idx, position_ids = torch.empty(2, s.batch, s.length, dtype=torch.long)
    alone = []
    for row in range(s.batch):
        start = 0
        for document, length in enumerate(s.random_split()):
            end = start + length
            # The ids alternate: a document is a run of equal ids, and one that comes back is another.
            seq_idx[row, start:end], position_ids[row, start:end] = document % 2, torch.arange(length)
            alone.append(s.mixer(s.x[row : row + 1, start:end])[0])
            start = end
    return {"seq_idx": seq_idx, "position_ids": position_ids}, torch.cat(alone).view_as(s.x)


def left_padding(s: Subject) -> float:
    """Tokens before the first real one change nothing, whatever they hold."""
    x, masks, pads = _pad(s)
    return _padded_deviation(s, x, pads, s.mixer(x, **masks))


def padded_chunked(s: Subject) -> float:
    """The same with a cache, whether or not the first chunk ends within the padding."""
    x, masks, pads = _pad(s)
    border = s.randint(1, x.shape[1])
    return _padded_deviation(s, x, pads, s.in_chunks(x, [border, x.shape[1] - border], **masks))


def _pad(s: Subject) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """Rows of one length, each with its own number of meaningless tokens in front."""
    pads = [0] + [s.randint(1, 4) for _ in range(s.batch - 1)]
    x = 3 * s.randn(s.batch, max(pads) + s.length, s.x.shape[2])
    mask = (torch.arange(x.shape[1]) >= torch.tensor(pads).unsqueeze(1)).long()
    return x, {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}, pads


def _padded_deviation(s: Subject, x: Tensor, pads: list[int], output: Tensor) -> float:
    alone = [s.mixer(x[row : row + 1, pad:])[0] for row, pad in enumerate(pads)]
    return max(deviation(output[row, pad:], alone[row]) for row, pad in enumerate(pads))


def causality(s: Subject) -> float:
    """No output depends on a later input, in value or in gradient."""
    x, error = s.x.clone().requires_grad_(), 0.0
    whole = s.mixer(x)
    for border in range(1, s.length):
        before = whole[:, :border]
        (grad,) = torch.autograd.grad(before.sum(), x, retain_graph=True)
        changed = torch.cat([s.x[:, :border], s.randn(*s.x[:, border:].shape) * 3], dim=1)
        error = max(error, grad[:, border:].abs().max().item(), deviation(s.mixer(changed)[:, :border], before))
    return error


def recomputed(s: Subject) -> float:
    """Gradients with activations recomputed (checkpointing) = gradients with activations saved."""
    weight, found = s.randn(*s.x.shape), []
    for run in (s.mixer, lambda x: checkpoint(s.mixer, x, use_reentrant=False)):
        x = s.x.clone().requires_grad_()
        found.append(gradients(s, run(x), x, weight))
    return _largest(*found)


def finite_differences(s: Subject) -> float:
    """Gradients by x and every parameter = finite differences, in float64 whatever the dtype asked for."""
    mixer = s.mixer.double()
    names = [name for name, p in mixer.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in mixer.parameters() if p.requires_grad]
    x = s.x.double().requires_grad_()

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (x,))

    # gradcheck raises, naming the input and both numbers, where they differ.
    torch.autograd.gradcheck(run, (x, *values), fast_mode=True)
    return 0.0


def state_gradient(s: Subject) -> float:
    """Gradients through the cache, chunk by chunk = gradients of one parallel call."""
    weight, found = s.randn(*s.x.shape), []
    split = s.random_split()
    for run in (s.mixer, lambda x: s.in_chunks(x, split)):
        x = s.x.clone().requires_grad_()
        found.append(gradients(s, run(x), x, weight))
    return _largest(*found)


def beam_reorder(s: Subject) -> float:
    """A cache whose rows are reordered, repeated or dropped goes on as if those rows had been read."""
    later, error = s.randn(s.batch, 2, s.x.shape[2]), 0.0
    rows = torch.arange(s.batch)
    for index in (rows.flip(0), torch.full_like(rows, s.batch - 1)):
        cache = s.make_cache()
        s.mixer(s.x, cache=cache)
        cache.reorder_cache(index)
        continued = s.in_chunks(later, [1, 1], cache)
        expected = s.mixer(torch.cat([s.x[index], later], dim=1))[:, s.length :]
        error = max(error, deviation(continued, expected))
    return error


def save_load(s: Subject) -> float:
    """The weights, saved as safetensors and loaded into a mixer of other weights, give the same bits."""
    from safetensors.torch import load, save

    before, content = s.mixer(s.x), save({k: v.contiguous() for k, v in s.mixer.state_dict().items()})
    with torch.no_grad():
        for value in s.mixer.state_dict().values():
            value.zero_()
    s.mixer.load_state_dict(load(content), strict=True)
    return 0.0 if torch.equal(s.mixer(s.x), before) else max(deviation(s.mixer(s.x), before), 1.0)


def reference(s: Subject) -> float:
    """The backends that `auto` takes = the reference backends of all ops, in value and gradient."""
    weight, found = s.randn(*s.x.shape), []
    for choice in ("auto", "reference"):
        x = s.x.clone().requires_grad_()
        with use_backend(**dict.fromkeys(OPS, choice)):
            output = s.mixer(x)
        found.append([output.detach(), *gradients(s, output, x, weight)])
    return _largest(*found)


def _largest(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(deviation(a, e) for a, e in zip(actual, expected, strict=True))


LAWS: dict[str, Callable[[Subject], float]] = {
    law.__name__: law
    for law in (
        chunked,
        packed,
        packed_chunked,
        left_padding,
        padded_chunked,
        causality,
        recomputed,
        finite_differences,
        state_gradient,
        beam_reorder,
        save_load,
        reference,
    )
}
