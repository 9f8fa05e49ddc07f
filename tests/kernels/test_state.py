import pytest
import torch

from lasp.kernels.state import StateMap, apply, compose, fold, in_ieee, suffix_sum, transition

KINDS = ("identity", "scalar", "diagonal", "dense")


def make_maps(kind, n=5, heads=2, key_dim=4, value_dim=3, dtype=torch.float64):
    state = torch.randn(n, heads, key_dim, value_dim, dtype=dtype)
    if kind == "dense":
        return StateMap(state, matrix=torch.randn(n, heads, key_dim, key_dim, dtype=dtype) * 0.5)
    if kind == "identity":
        return StateMap(state)
    return StateMap(state, -torch.rand(n, heads, 1 if kind == "scalar" else key_dim, dtype=dtype))


def row(maps, i):
    pick = lambda x: None if x is None else x[i]  # noqa: E731
    return StateMap(maps.state[i], pick(maps.log_decay), pick(maps.matrix))


@pytest.mark.parametrize("kind", KINDS)
def test_composing_maps_is_applying_them_in_turn_and_associative(kind):
    maps = make_maps(kind)
    a, b, c = (row(maps, i) for i in range(3))
    assert compose(b, a).kind == kind
    state = torch.randn_like(a.state)
    torch.testing.assert_close(apply(compose(b, a), state), apply(b, apply(a, state)))
    left, right = compose(compose(c, b), a), compose(c, compose(b, a))
    torch.testing.assert_close(apply(left, state), apply(right, state))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("initial", [False, True])
def test_fold_is_the_maps_applied_one_by_one(kind, initial):
    maps = make_maps(kind)
    start = torch.randn_like(maps.state[0]) if initial else torch.zeros_like(maps.state[0])
    expected = start
    for i in range(len(maps.state)):
        expected = apply(row(maps, i), expected)
    torch.testing.assert_close(fold(maps, start if initial else None), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_transposed_map_is_the_adjoint(kind):
    map_ = row(make_maps(kind), 0)
    x, y = torch.randn_like(map_.state), torch.randn_like(map_.state)
    torch.testing.assert_close((transition(map_, x) * y).sum(), (x * transition(map_.transpose(), y)).sum())


def test_compose_accepts_the_identity_beside_another_kind():
    dense, scalar, identity = (row(make_maps(k), 0) for k in ("dense", "scalar", "identity"))
    state = torch.randn_like(dense.state)
    for other in (dense, scalar):
        torch.testing.assert_close(apply(compose(other, identity), state), apply(other, apply(identity, state)))
        torch.testing.assert_close(apply(compose(identity, other), state), apply(identity, apply(other, state)))
    torch.testing.assert_close(apply(compose(dense, scalar), state), apply(dense, apply(scalar, state)))


def test_a_decay_of_minus_infinity_forgets_everything_before():
    maps = make_maps("scalar")
    maps.log_decay[3] = -torch.inf
    expected = apply(row(maps, 4), maps.state[3])
    torch.testing.assert_close(fold(maps, torch.randn_like(maps.state[0])), expected)


def test_suffix_sums_of_strong_decays_keep_the_digits_of_weak_ones():
    x = torch.tensor([-1e6, -1e6, -0.1, -0.2], dtype=torch.float32)
    torch.testing.assert_close(suffix_sum(x, 0)[2:], torch.tensor([-0.3, -0.2]))
    torch.testing.assert_close(suffix_sum(x, 0, inclusive=False)[1:], torch.tensor([-0.3, -0.2, 0.0]))


def set_legacy(value):
    torch.set_float32_matmul_precision(value)


def set_switches(value):
    torch.backends.cuda.matmul.fp32_precision = value
    torch.backends.mkldnn.matmul.fp32_precision = value


@pytest.mark.parametrize(("setting", "value"), [(set_legacy, "medium"), (set_switches, "tf32")])
@pytest.mark.parametrize("kind", KINDS)
def test_states_ignore_the_callers_autocast_and_matmul_precision(kind, setting, value):
    maps = make_maps(kind, key_dim=64, value_dim=64, dtype=torch.float32)
    expected = fold(maps)
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    setting(value)
    chosen = [switch.fp32_precision for switch in switches]
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(fold(maps), expected) and fold(maps).dtype == torch.float32
            inside = in_ieee(lambda: (torch.is_autocast_enabled("cpu"), [s.fp32_precision for s in switches]))()
        assert inside == (False, ["ieee", "ieee"])
        assert [switch.fp32_precision for switch in switches] == chosen
    finally:
        torch.set_float32_matmul_precision("highest")
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
