"""The oracle against closed forms that share no code with it."""

import pytest
import torch

from lasp.kernels import reference


def inputs(length=9, heads=2, key_dim=4, value_dim=3):
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    q, k = make(1, length, heads, key_dim), make(1, length, heads, key_dim)
    return q, k, make(1, length, heads, value_dim)


@pytest.mark.parametrize("gate", ["none", "fixed", "token", "channel"])
def test_decayed_attention_equals_its_quadratic_form(gate):
    q, k, v = inputs()
    shape = {"fixed": (2,), "token": (1, 9, 2), "channel": (1, 9, 2, 4)}.get(gate)
    g = None if shape is None else -torch.rand(shape, dtype=torch.float64)
    per_channel = torch.zeros(1, 9, 2, 4, dtype=torch.float64)
    if g is not None:
        per_channel = per_channel + (g if g.dim() == 4 else g.view(1, -1, 2, 1) if g.dim() == 3 else g.view(1, 1, 2, 1))
    total = per_channel.cumsum(1)
    decay = (total[:, :, None] - total[:, None]).exp()  # [1, i, j, H, K]
    scores = torch.einsum("bihk,bjhk,bijhk->bhij", q, k, decay).tril()
    expected = 0.5 * torch.einsum("bhij,bjhv->bihv", scores, v)
    o, final = reference.recurrence(q, k, v, g)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(final, torch.einsum("bjhk,bjhv->bhkv", k * decay[:, -1], v))


def test_the_delta_rule_decays_first_and_then_erases():
    q, k, v = inputs()
    k = torch.nn.functional.normalize(k, dim=-1)
    g, beta = -torch.rand(1, 9, 2, 4, dtype=torch.float64), torch.rand(1, 9, 2, dtype=torch.float64)
    state = torch.zeros(2, 4, 3, dtype=torch.float64)
    for t in range(9):
        for h in range(2):
            kt, eye = k[0, t, h], torch.eye(4, dtype=torch.float64)
            state[h] = (eye - beta[0, t, h] * torch.outer(kt, kt)) @ torch.diag(g[0, t, h].exp()) @ state[h]
            state[h] += beta[0, t, h] * torch.outer(kt, v[0, t, h])
    _, final = reference.recurrence(q, k, v, g, beta)
    torch.testing.assert_close(final[0], state)
    # the same through the general dense form, A = diag(w) + b a^T
    w, step = g.exp(), beta.unsqueeze(-1)
    _, dense = reference.recurrence(q, k, step * v, g, dense=(w * k, -step * k))
    torch.testing.assert_close(dense, final)


def test_documents_do_not_see_each_other_and_empty_ones_keep_their_state():
    q, k, v = inputs()
    g, initial = -torch.rand(1, 9, 2, dtype=torch.float64), torch.randn(4, 2, 4, 3, dtype=torch.float64)
    o, final = reference.recurrence(q, k, v, g, cu_seqlens=(0, 4, 4, 5, 9), initial_state=initial)
    for n, (a, b) in enumerate([(0, 4), (4, 4), (4, 5), (5, 9)]):
        part = reference.recurrence(*(x[:, a:b] for x in (q, k, v, g)), initial_state=initial[n : n + 1])
        torch.testing.assert_close(o[:, a:b], part[0])
        torch.testing.assert_close(final[n : n + 1], part[1])


def test_softmax_reference_equals_torch():
    q, k, v = (torch.randn(2, 11, 4, 8, dtype=torch.float64) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(reference.softmax_attention(q, k, v), expected)


def test_convolution_reference_equals_torch():
    x, weight, bias = torch.randn(2, 11, 6), torch.randn(6, 4), torch.randn(6)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    expected = torch.nn.functional.conv1d(padded, weight.unsqueeze(1), bias, groups=6).transpose(1, 2)
    torch.testing.assert_close(reference.short_convolution(x, weight, bias), expected)
