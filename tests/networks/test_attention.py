from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from miar_monai.acceleration.layers import rotate
from miar_monai.networks.attention import CrossAttention, KeyValue, SelfAttention, rotary_table
from miar_monai.networks.schedule import ScaleSchedule

HEAD = 8


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@given(st.lists(st.tuples(st.floats(-40, 40), st.floats(-40, 40)), min_size=1, max_size=9))
def test_rotation_preserves_norms(positions: list[tuple[float, float]]) -> None:
    x = normal(2, len(positions), 3, HEAD)
    turned = rotate(x, rotary_table(torch.tensor(positions), HEAD))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


def test_equal_positions_on_two_scales_have_equal_angles() -> None:
    schedule = ScaleSchedule((1, 3, 9))  # the center of a cell of side 3 is the center of a cell of side 9
    tables = schedule.split(rotary_table(schedule.positions(), HEAD), dim=1)
    torch.testing.assert_close(tables[0], tables[1].unflatten(1, (3, 3))[:, 1, 1][:, None])
    torch.testing.assert_close(tables[1].unflatten(1, (3, 3)), tables[2].unflatten(1, (9, 9))[:, 1::3, 1::3])


def test_angles_follow_the_rotary_formula() -> None:
    table = rotary_table(torch.tensor([[3.0, -2.5]]), HEAD)
    angles = torch.tensor([[3.0, 3.0 * 10000 ** (-0.5), -2.5, -2.5 * 10000 ** (-0.5)]], dtype=torch.float64)
    x = torch.arange(1.0, HEAD + 1)[None, None]
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.exp(1j * angles).to(torch.complex64)
    torch.testing.assert_close(rotate(x, table), torch.view_as_real(turned).flatten(-2))


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_scores_depend_only_on_offsets(rows: float, columns: float) -> None:
    positions = torch.rand(6, 2, dtype=torch.float64) * 32
    q, k = normal(1, 6, 2, HEAD), normal(1, 6, 2, HEAD)

    def scores(at: torch.Tensor) -> torch.Tensor:
        table = rotary_table(at, HEAD)
        return torch.einsum("bqhd,bkhd->bhqk", rotate(q, table), rotate(k, table))

    shifted = scores(positions + torch.tensor([rows, columns], dtype=torch.float64))
    torch.testing.assert_close(shifted, scores(positions), rtol=0, atol=1e-5)  # the table is in single precision
    assert not torch.allclose(scores(positions * 1.5), shifted, atol=1e-2)


def test_rows_and_columns_rotate_different_pairs() -> None:
    rows, columns, nowhere = rotary_table(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), HEAD)[:, :, 0].unbind(1)
    assert torch.equal(rows[:, : HEAD // 2], columns[:, HEAD // 2 :])
    assert torch.equal(rows[:, HEAD // 2 :], nowhere[:, HEAD // 2 :])


def test_cached_attention_equals_attention_under_a_causal_mask() -> None:
    attention = SelfAttention(16, num_heads=2).double()
    x, table = normal(3, 7, 16), rotary_table(torch.rand(7, 2) * 5, HEAD)
    level = torch.tensor([0, 1, 1, 1, 2, 2, 2])
    rotation = attention.rotation(table)
    masked, _ = attention(x, rotation, mask=level[:, None] >= level)
    cache, parts = None, []
    for first, last in ((0, 1), (1, 4), (4, 7)):
        out, cache = attention(x[:, first:last], rotation[:, first:last], cache=cache)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), masked, rtol=0, atol=1e-12)


def test_attention_is_a_mean_of_values_weighted_by_scaled_cosines() -> None:
    attention = SelfAttention(16, num_heads=2).double()
    x, table = normal(1, 5, 16), rotary_table(torch.rand(5, 2) * 5, HEAD)
    out, cache = attention(x, attention.rotation(table))
    q = attention.rotary(attention.query_key(x)[..., :16].unflatten(-1, (2, HEAD)), table)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, cache.key).softmax(dim=-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, cache.value)
    torch.testing.assert_close(out, attention.out(expected.flatten(2)))
    maximum = q.norm(dim=-1) * cache.key.norm(dim=-1)  # for parallel queries and keys
    torch.testing.assert_close(maximum, torch.full((1, 5, 2), 4.0, dtype=torch.float64), rtol=1e-4, atol=0)
    attention.log_temperature.data.fill_(9.0)
    _, cache = attention(x, attention.rotation(table))
    assert (q.norm(dim=-1) * cache.key.norm(dim=-1)).max() <= 100.01


def test_cross_attention_depends_on_offsets_between_tokens_and_features() -> None:
    attention = CrossAttention(16, num_heads=2, context_dim=5).double()
    x, features = normal(2, 4, 16), normal(2, 9, 5)
    token_positions, feature_positions = (
        torch.rand(4, 2, dtype=torch.float64) * 9,
        torch.rand(9, 2, dtype=torch.float64) * 9,
    )

    def attend(shift: float) -> torch.Tensor:
        context = attention.context(features, rotary_table(feature_positions + shift, HEAD))
        return attention(x, rotary_table(token_positions + shift, HEAD), context)

    torch.testing.assert_close(attend(3.5), attend(0.0), rtol=0, atol=1e-5)
    order = torch.randperm(9)
    shuffled = attention.context(features[:, order], rotary_table(feature_positions[order], HEAD))
    torch.testing.assert_close(attention(x, rotary_table(token_positions, HEAD), shuffled), attend(0.0))


def test_candidates_share_the_cache_and_context_of_their_sample() -> None:
    layer, cross = SelfAttention(16, num_heads=2).double(), CrossAttention(16, num_heads=2, context_dim=5).double()
    earlier, x, features = normal(2, 3, 16), normal(6, 4, 16), normal(2, 7, 5)
    table, feature_table = rotary_table(torch.rand(7, 2) * 5, HEAD), rotary_table(torch.rand(7, 2) * 5, HEAD)
    first, rest = layer.rotation(table).split([3, 4], dim=1)
    _, cache = layer(earlier, first)
    _, copies = layer(earlier.repeat_interleave(3, dim=0), first)
    shared, extended = layer(x, rest, cache=cache)
    repeated_output, expected = layer(x, rest, cache=copies)
    torch.testing.assert_close(shared, repeated_output)
    torch.testing.assert_close(tuple(extended), tuple(expected))
    shared_output = cross(x, table[:, 3:], cross.context(features, feature_table))
    repeated = cross(x, table[:, 3:], cross.context(features.repeat_interleave(3, dim=0), feature_table))
    torch.testing.assert_close(shared_output, repeated)


def test_cache_operations_leave_the_original_unchanged() -> None:
    cache = KeyValue(normal(2, 3, 2, 4), normal(2, 3, 2, 4))
    original = KeyValue(cache.key.clone(), cache.value.clone())
    candidates = KeyValue(normal(6, 1, 2, 4), normal(6, 1, 2, 4))
    for first, samples in ((cache, [0, 1]), (cache.select(torch.tensor([1, 0, 1])), [1, 0, 1])):
        twice = first.select(torch.tensor([1, 0]))
        for selected, order in ((first, samples), (twice, [samples[1], samples[0]])):
            extended = selected.append(candidates)
            per_sample = 6 // len(order)
            for i in range(6):
                for old, new, joined in zip(cache[:2], candidates[:2], extended[:2], strict=True):
                    assert torch.equal(joined[i], torch.cat([old[order[i // per_sample]], new[i]]))
    assert torch.equal(cache.key, original.key)
    assert torch.equal(cache.value, original.value)


def test_keys_and_values_of_a_cache_have_the_same_precision() -> None:
    attention = SelfAttention(16, num_heads=2)
    x, rotation = normal(1, 5, 16).float(), attention.rotation(rotary_table(torch.rand(5, 2) * 5, HEAD))
    with torch.autocast("cpu", torch.bfloat16):
        out, cache = attention(x, rotation)
    assert cache.key.dtype == cache.value.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention(x, rotation)[0], rtol=0, atol=0.02)
