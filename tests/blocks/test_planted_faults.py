"""The laws are worth something only if they break: each fault here must be found by the law named."""

import functools

import pytest
import torch

import neural_layers.attention
import neural_layers.mamba
import neural_layers.recurrence
from neural_layers import GroupedQueryAttention, LayerCache, Mamba
from neural_layers.kernels.dispatch import OPS
from neural_layers.testing import check_mixer


class LeakyAttention(GroupedQueryAttention):
    """Every token also sees a little of the next."""

    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs) + 1e-3 * torch.roll(x, -1, dims=1)


class ForgetfulCache(LayerCache):
    """Drops the recurrent state."""

    def update_recurrent_state(self, state):
        return super().update_recurrent_state(torch.zeros_like(state))


class StubbornCache(LayerCache):
    """Does not reorder the keys."""

    def reorder_cache(self, index):
        self.values = self.values.index_select(0, index)


class DetachedCache(LayerCache):
    """Cuts the gradient through the state."""

    def update_recurrent_state(self, state):
        return super().update_recurrent_state(state.detach())


class AbsoluteAttention(GroupedQueryAttention):
    """Counts padding as positions, and uses them absolutely."""

    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs) * torch.arange(1, x.shape[1] + 1).view(1, -1, 1)


def with_faulty_op(monkeypatch, module, name, **changes):
    """Replace an op in a block's module by one that changes some keyword arguments."""
    op = getattr(module, name)

    @functools.wraps(op)
    def faulty(*args, **kwargs):
        kwargs.update({k: change(kwargs[k]) for k, change in changes.items() if kwargs.get(k) is not None})
        return op(*args, **kwargs)

    monkeypatch.setattr(module, name, faulty)


def with_faulty_backend(monkeypatch, op, **changes):
    """Let the fastest backends of an op change some keyword arguments, and leave the reference right."""
    right = OPS[op].backends

    def plant(backend):
        def run(*args, **kwargs):
            kwargs.update({k: change(kwargs[k]) for k, change in changes.items() if kwargs.get(k) is not None})
            return backend.run(*args, **kwargs)

        return type(backend)(backend.name, run, backend.obstacle)

    monkeypatch.setattr(OPS[op], "backends", (*map(plant, right[:-1]), right[-1]))


def broken_by(module, **kwargs) -> set[str]:
    return set(check_mixer(module, length=10, **kwargs).failed)


def test_a_leaked_future_token_breaks_causality() -> None:
    assert "causality" in broken_by(LeakyAttention(8, 4))


def test_a_dropped_state_breaks_chunking() -> None:
    assert {"chunked", "beam_reorder"} <= broken_by(Mamba(4, 3), make_cache=ForgetfulCache)


@pytest.mark.parametrize(
    ("module", "op"), [(neural_layers.recurrence, "causal_conv1d"), (neural_layers.mamba, "selective_scan")]
)
def test_an_ignored_seq_idx_breaks_packing(monkeypatch, module, op) -> None:
    with_faulty_op(monkeypatch, module, op, seq_idx=lambda seq_idx: None)
    assert broken_by(Mamba(4, 3)) == {"packed", "packed_chunked"}


def test_an_ignored_seq_idx_in_attention_breaks_packing(monkeypatch) -> None:
    with_faulty_op(monkeypatch, neural_layers.attention, "flash_attention", seq_idx=lambda seq_idx: None)
    assert broken_by(GroupedQueryAttention(8, 4)) == {"packed", "packed_chunked"}


def test_a_window_shifted_by_one_in_a_kernel_breaks_the_reference_law(monkeypatch) -> None:
    with_faulty_backend(monkeypatch, "flash_attention", window=lambda window: window + 1)
    assert broken_by(GroupedQueryAttention(8, 4, window=3)) == {"reference"}


def test_a_window_cache_one_key_short_breaks_chunking() -> None:
    assert "chunked" in broken_by(GroupedQueryAttention(8, 4, window=4), make_cache=lambda: LayerCache(window=3))


def test_a_d_term_lost_in_single_steps_breaks_chunking(monkeypatch) -> None:
    with_faulty_op(monkeypatch, neural_layers.mamba, "selective_scan_step", D=lambda D: None)
    assert "chunked" in broken_by(Mamba(4, 3))


def test_a_wrong_alibi_slope_in_a_kernel_breaks_the_reference_law(monkeypatch) -> None:
    with_faulty_backend(monkeypatch, "flash_attention", alibi_slopes=lambda slopes: slopes * 1.01)
    assert broken_by(GroupedQueryAttention(8, 4, position="alibi")) == {"reference"}


def test_an_ignored_padding_mask_breaks_left_padding(monkeypatch) -> None:
    with_faulty_op(monkeypatch, neural_layers.attention, "flash_attention", key_padding_mask=lambda mask: None)
    assert broken_by(GroupedQueryAttention(8, 4)) == {"left_padding", "padded_chunked"}


def test_a_cache_that_reorders_only_values_breaks_beams() -> None:
    assert broken_by(GroupedQueryAttention(8, 4), make_cache=StubbornCache) == {"beam_reorder"}


def test_a_detached_state_breaks_the_gradient_through_it() -> None:
    assert broken_by(Mamba(4, 3), make_cache=DetachedCache) == {"state_gradient"}


def test_old_inputs_kept_across_a_border_break_packing_in_chunks(monkeypatch) -> None:
    right = neural_layers.recurrence._same_document
    monkeypatch.setattr(neural_layers.recurrence, "_same_document", lambda *args: torch.ones_like(right(*args)))
    assert broken_by(Mamba(4, 3)) == {"packed_chunked"}


def test_absolute_positions_break_chunking_and_padding() -> None:
    assert {"chunked", "packed", "left_padding"} <= broken_by(AbsoluteAttention(8, 4))


def test_a_gradient_that_is_half_too_large_breaks_finite_differences() -> None:
    class Exaggerated(Mamba):
        def forward(self, x, **kwargs):
            y = super().forward(x, **kwargs)
            return y.detach() + 1.5 * (y - y.detach())

    assert broken_by(Exaggerated(4, 3)) == {"finite_differences"}


def test_a_weight_outside_the_state_dict_breaks_saving() -> None:
    class Hidden(Mamba):
        def state_dict(self, *args, **kwargs):
            full = super().state_dict(*args, **kwargs)
            return {name: value.clone() if name == "D" else value for name, value in full.items()}

        def load_state_dict(self, state, *args, **kwargs):
            return super().load_state_dict({**state, "D": state["D"] + 1}, *args, **kwargs)

    assert broken_by(Hidden(4, 3)) == {"save_load"}


def test_randomness_breaks_recomputation() -> None:
    class Noisy(Mamba):
        count = 0

        def forward(self, x, **kwargs):
            Noisy.count += 1
            return super().forward(x, **kwargs) * (1 + 0.01 * Noisy.count)

    assert "recomputed" in broken_by(Noisy(4, 3))
