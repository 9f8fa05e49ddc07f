"""Each family against its definition, written out quadratically; the small layers against theirs."""

import math

import pytest
import torch
import torch.nn.functional as F

from lasp import CPContext, linear_attention
from lasp.models.config import ModelConfig
from lasp.models.features import FEATURES, feature_map, feature_width
from lasp.models.gates import GATES, fixed_log_decay
from lasp.models.layers import RMSNorm, SoftmaxMixer, SwiGLU, apply_rotary, rotary_angles
from lasp.models.linear_mixer import LinearMixer
from lasp.models.presets import MIXER_PRESETS
from lasp.models.sizes import LinearSizes
from tests.harness import assert_close, relative_error

DIM, HEADS, LAYER, LAYERS = 16, 2, 1, 3
BORDERS = (0, 5, 12)

# a few settings between the families, so that every option is on somewhere
VARIANTS = {
    "conv": {"conv_width": 3, "conv_activation": "silu"},
    "mamba_scalar": {"decay": "scalar", "gate": "mamba", "feature": "relu", "out_norm": "full_rms"},
    "mamba_channel": {"decay": "channel", "gate": "mamba", "gate_rank": 3, "scale": 0.7, "out_norm": "none"},
    "logsigmoid_scalar": {"decay": "scalar", "gate": "logsigmoid", "gate_tau": 4, "value_dim": 3},
    "rotary_relu_sum": {"feature": "relu", "normaliser": "sum", "position": "rope", "out_gate": "silu"},
    "decayed_sum": {"feature": "elu1", "normaliser": "sum", "decay": "fixed", "slopes": "retnet", "out_norm": "none"},
    "hadamard_wide": {"feature": "hadamard", "feature_dim": 11, "out_gate": "sigmoid", "out_gate_rank": 3},
    "bidirectional": {"feature": "silu", "causal": False},
    "bidirectional_sum": {"feature": "elu1", "normaliser": "sum", "causal": False, "conv_width": 2},
}
SETTINGS = {name: {"preset": name} for name in MIXER_PRESETS} | VARIANTS


def make_config(mixer, **fields) -> ModelConfig:
    fields = {"pattern": "L", "heads": HEADS, **fields}
    return ModelConfig.from_dict({"vocab_size": 8, "dim": DIM, "num_layers": LAYERS, "mixer": mixer, **fields})


def make_mixer(config: ModelConfig) -> LinearMixer:
    mixer = LinearMixer(config, LAYER, dtype=torch.float64)
    with torch.no_grad():
        for parameter in mixer.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape) * fan_in**-0.5 + (parameter.dim() == 1))
    return mixer


def rotate(x, theta=10000.0):
    """Heads [T, H, K] as complex numbers times exp(i * position * frequency)."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def naive_kernel(option, p, config, q, k):
    """phi(q_i) . phi(k_j) as a matrix [H, T, T], and per-channel features where they exist."""
    dot = torch.einsum("ihk,jhk->hij", q, k)
    if option.feature == "taylor2":
        s = dot / math.sqrt(q.shape[-1])
        return 1 + s + s**2 / 2
    if option.feature == "rebased":
        q, k = (
            (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() for z in (q, k)
        )
        q = p["feature_q.gamma"] * q + p["feature_q.beta"]
        k = p["feature_k.gamma"] * k + p["feature_k.beta"]
        return torch.einsum("ihk,jhk->hij", q, k) ** 2
    raise AssertionError(option.feature)


def naive_features(option, p, z, which):
    if option.feature == "hadamard":
        w1, w2 = p[f"feature_{which}.weight"]
        return (z @ w1.T) * (z @ w2.T)
    return {
        "identity": lambda z: z,
        "silu": lambda z: z * torch.sigmoid(z),
        "relu": lambda z: z.clamp(min=0),
        "elu1": lambda z: torch.where(z > 0, z + 1, z.clamp(max=0).exp()),
    }[option.feature](z)


def naive_log_decay(option, p, x, config):
    """g [T, H, K or 1]."""
    length, heads = len(x), config.mixer_heads
    if option.decay == "none":
        return torch.zeros(length, heads, 1, dtype=x.dtype)
    if option.decay == "fixed":
        h = torch.arange(heads, dtype=x.dtype)
        slopes = {"alibi": -(2.0 ** (-8 * (h + 1) / heads)), "retnet": torch.log(1 - 2.0 ** (-5 - h))}[option.slopes]
        if option.per_layer_slopes:
            slopes = slopes * (1 - LAYER / (LAYERS - 1) + 1e-5)
        return slopes[:, None].expand(length, heads, 1)
    z = (
        x @ p["decay.proj.0.weight"].T @ p["decay.proj.1.weight"].T
        if option.gate_rank
        else x @ p["decay.proj.weight"].T
    )
    z = (z + p["decay.bias"]).reshape(length, heads, -1)
    if option.gate == "logsigmoid":
        return torch.log(torch.sigmoid(z)) / (option.gate_tau or 16)
    return -torch.exp(p["decay.A_log"])[:, None] * torch.log(1 + torch.exp(z))


def rms(x, weight=None):
    y = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return y if weight is None else y * weight


def naive(p, config, x):
    """One document x [T, dim] to y [T, dim], with [T, T] matrices of weights."""
    option, heads = config.mixer, config.mixer_heads
    length = len(x)
    q, k, v = (x @ p[f"{name}_proj.weight"].T for name in "qkv")
    if option.conv_width:
        mixed, width = torch.cat([q, k, v], -1), option.conv_width
        padded = torch.cat([mixed.new_zeros(width - 1, mixed.shape[1]), mixed])
        mixed = sum(padded[w : w + length] * p["conv_weight"][:, w] for w in range(width))
        mixed = mixed * torch.sigmoid(mixed) if option.conv_activation else mixed
        q, k, v = mixed.split([q.shape[1], k.shape[1], v.shape[1]], -1)
    q, k, v = (z.reshape(length, heads, -1) for z in (q, k, v))
    if option.position == "rope":
        q, k = rotate(q), rotate(k)
    if option.feature in ("taylor2", "rebased"):
        weights = naive_kernel(option, p, config, q, k)
    else:
        q, k = naive_features(option, p, q, "q"), naive_features(option, p, k, "k")
        decay = naive_log_decay(option, p, x, config).cumsum(0)
        difference = decay[:, None] - decay[None]  # [T, T, H, K or 1]
        if option.causal:
            difference = difference.clamp(max=0)  # j > i is masked below
        weights = (q[:, None] * k[None] * difference.exp()).sum(-1).permute(2, 0, 1)
    if option.normaliser == "none":
        weights = weights * (option.scale or q.shape[-1] ** -0.5)
    weights = weights.tril() if option.causal else weights
    o = torch.einsum("hij,jhv->ihv", weights, v)
    if option.normaliser == "sum":
        o = o / (weights.sum(-1).T[..., None] + 1e-6)
    if option.out_norm == "head_rms":
        o = rms(o, p["out_norm.weight"])
    o = o.reshape(length, -1)
    if option.out_norm in ("full_rms", "srms"):
        o = rms(o, p.get("out_norm.weight"))
    if option.out_gate != "none":
        ranked = option.out_gate_rank is not None
        gate = x @ (p["out_gate.1.weight"] @ p["out_gate.0.weight"] if ranked else p["out_gate.weight"]).T
        o = o * torch.sigmoid(gate) * (gate if option.out_gate == "silu" else 1)
    return o @ p["o_proj.weight"].T


def run_mixer(mixer, config, x, borders):
    cp = CPContext.local(borders)
    rotary = {}
    if mixer.rotary_dim is not None:
        rotary[mixer.rotary_dim] = rotary_angles(cp.position_ids, mixer.rotary_dim, config.rope_theta, x.dtype)
    return mixer(x, rotary, cp)[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_family_equals_its_definition(name):
    """Packed documents through the layer; each document alone through the definition. Outputs, all gradients."""
    config = make_config(SETTINGS[name])
    mixer = make_mixer(config)
    x = torch.randn(1, BORDERS[-1], DIM, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(1, BORDERS[-1], DIM, dtype=torch.float64)
    parameters = dict(mixer.named_parameters())

    y = run_mixer(mixer, config, x, BORDERS)
    grads = torch.autograd.grad(y, [x, *parameters.values()], dy)
    expected = torch.cat(
        [naive(parameters, config, x[0, a:b]) for a, b in zip(BORDERS, BORDERS[1:], strict=False)]
    ).unsqueeze(0)
    expected_grads = torch.autograd.grad(expected, [x, *parameters.values()], dy)

    assert_close("y", y, expected, 1e-10)
    for grad_name, grad, wanted in zip(["x", *parameters], grads, expected_grads, strict=True):
        assert wanted.abs().max() > 0, f"{grad_name} has no gradient"
        assert_close(f"gradient of {grad_name}", grad, wanted, 1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_one_operator_call_per_layer(name, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return linear_attention(*args, **kwargs)

    monkeypatch.setattr("lasp.models.linear_mixer.linear_attention", counted)
    config = make_config(SETTINGS[name])
    run_mixer(make_mixer(config), config, torch.randn(2, 6, DIM, dtype=torch.float64), 6)
    assert len(calls) == 1
    q, k, v, g = calls[0]
    width = feature_width(config.mixer.feature, config.key_dim, config.mixer.feature_dim)
    assert q.shape == k.shape == (2, 6, HEADS, width)
    assert v.shape == (2, 6, HEADS, config.value_dim + (config.mixer.normaliser == "sum"))
    shapes = {"none": None, "fixed": (HEADS,), "scalar": (2, 6, HEADS), "channel": (2, 6, HEADS, width)}
    assert (None if g is None else g.shape) == shapes[config.mixer.decay]


@pytest.mark.parametrize("name", [name for name in SETTINGS if "bidirectional" not in name])
def test_sizes_are_those_of_the_layer(name):
    """The widths that planners and messages count with, against the tensors of the layer itself."""
    config = make_config(SETTINGS[name])
    sizes, mixer = LinearSizes.of(config), make_mixer(config)
    x = torch.randn(1, 6, DIM, dtype=torch.float64)
    rotary = {sizes.key_dim: rotary_angles(torch.arange(6), sizes.key_dim, 10000.0, x.dtype)}
    _, cache = mixer(x, rotary, keep_cache=True)
    assert cache.state.shape == (1, sizes.heads, sizes.state_dim, sizes.columns)
    assert cache.state.numel() == sizes.state_elements
    assert mixer.k_proj.out_features == sizes.heads * sizes.key_dim
    assert mixer.v_proj.out_features == sizes.heads * sizes.value_dim
    gated = config.mixer.gate is not None
    assert sizes.transition_elements == (mixer.decay.proj(x).shape[-1] if gated else 0)
    assert LinearSizes.of(config, HEADS).transition_elements * HEADS == sizes.transition_elements


@pytest.mark.parametrize("name", FEATURES)
def test_feature_width(name):
    phi = feature_map(name, 6, dtype=torch.float64)
    if hasattr(phi, "init_parameters"):
        phi.init_parameters()
    y = phi(torch.randn(2, 3, 6, dtype=torch.float64))
    assert y.shape == (2, 3, feature_width(name, 6))
    assert not y.isnan().any()


def test_width_of_based_and_rebased_features():
    assert feature_width("taylor2", 16) == 153
    assert feature_width("rebased", 16) == 136
    assert feature_width("hadamard", 16, 24) == 24


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_gates_are_never_positive_and_fp32(gate, decay):
    config = make_config({"decay": decay, "gate": gate})
    layer = LinearMixer(config, dtype=torch.bfloat16).decay
    layer.init_parameters(torch.Generator().manual_seed(1))
    torch.nn.init.normal_(layer.proj.weight, std=100.0)  # saturates both ends
    g = layer(layer.proj(torch.randn(4, 50, DIM).bfloat16()))
    assert g.dtype == torch.float32
    assert g.shape == ((4, 50, HEADS) if decay == "scalar" else (4, 50, HEADS, 8))
    assert (g <= 0).all() and g.isfinite().all()


@pytest.mark.parametrize("mixer", ["basic", "retnet", "gla"])
def test_a_mixer_of_some_heads_is_that_part_of_the_whole_layer(mixer):
    config = make_config(mixer)
    whole, x = LinearMixer(config, LAYER, dtype=torch.float64), torch.randn(1, 12, DIM, dtype=torch.float64)
    for p in whole.parameters():
        torch.nn.init.normal_(p)
    rotary = {config.key_dim: rotary_angles(torch.arange(12), config.key_dim, 10000.0, torch.float64)}
    decay = whole.decay.proj(x) if whole.options.gate else None
    gate = whole.out_gate(x) if whole.options.out_gate != "none" else None
    projected = [whole.q_proj(x), whole.k_proj(x), whole.v_proj(x), decay, gate]
    expected, _ = whole.mix(*projected, rotary)
    shards = [None if z is None else z.chunk(HEADS, -1) for z in projected]
    for head in range(HEADS):
        part = LinearMixer(config, LAYER, dtype=torch.float64, heads=range(head, head + 1))
        state = {name: p for name, p in whole.state_dict().items() if name in part.state_dict()}
        if "decay.bias" in state:
            state["decay.bias"] = state["decay.bias"].chunk(HEADS)[head]
        part.load_state_dict(state)
        o, _ = part.mix(*(None if z is None else z[head] for z in shards), rotary)
        torch.testing.assert_close(o, expected.chunk(HEADS, -1)[head], rtol=1e-12, atol=1e-12)


def test_a_norm_over_all_heads_refuses_some_of_them():
    with pytest.raises(ValueError, match=r"out_norm='full_rms' spans all 2 heads, but this rank has 1.*head_rms"):
        LinearMixer(make_config({"out_norm": "full_rms"}), heads=range(1))


@pytest.mark.parametrize("slopes", ["alibi", "retnet"])
def test_fixed_slopes(slopes):
    g = fixed_log_decay(slopes, 8, torch.device("cpu"), torch.float32)
    wanted = {"alibi": [-0.5, -(2.0**-8)], "retnet": [math.log(1 - 2**-5), math.log(1 - 2**-12)]}[slopes]
    torch.testing.assert_close(g[[0, -1]], torch.tensor(wanted), rtol=1e-6, atol=0)


def test_last_layer_of_lightning_hardly_decays():
    config = make_config("lightning")
    factors = [LinearMixer(config, layer).slope_factor for layer in range(LAYERS)]
    assert factors == pytest.approx([1 + 1e-5, 0.5 + 1e-5, 1e-5])
    assert LinearMixer(make_config("lightning", num_layers=1), 0).slope_factor == pytest.approx(1 + 1e-5)


def test_rotary_depends_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    position = torch.tensor([3, 17, 1_000_003, 1_000_017])
    cos, sin = rotary_angles(position, 8, 10000.0, torch.float64)
    rotated_q, rotated_k = (apply_rotary(z.expand(1, 4, 1, 8), cos, sin) for z in (q, k))
    dot = torch.einsum("bihd,bjhd->ij", rotated_q, rotated_k)
    assert dot[0, 1].item() == pytest.approx(dot[2, 3].item(), abs=1e-9)
    assert dot[0, 1].item() != pytest.approx(dot[1, 0].item(), abs=1e-3)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1).expand(1, 4, 1))


def test_rotary_angle_is_accurate_at_a_million():
    """An fp32 product of position and frequency would be off by 1e-2 here."""
    cos, _ = rotary_angles(torch.tensor([999_999]), 64, 10000.0, torch.float32)
    wanted = [math.cos(999_999 * 10000.0 ** (-2 * i / 64)) for i in range(32)]
    torch.testing.assert_close(cos[0, 0], torch.tensor(wanted), rtol=0, atol=1e-6)


def test_rotary_of_bf16_heads_is_rounded_once():
    x = torch.randn(1, 40, 2, 8).bfloat16()
    position = torch.arange(40) + 100_000
    exact = apply_rotary(x.double(), *rotary_angles(position, 8, 10000.0, torch.float64))
    y = apply_rotary(x, *rotary_angles(position, 8, 10000.0, torch.float32))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm(affine):
    norm = RMSNorm(6, 1e-5, affine, dtype=torch.float64)
    if affine:
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_close("norm", norm(x), rms(x, norm.weight), 1e-14)


def test_rms_norm_of_bf16_takes_the_mean_in_fp32():
    norm = RMSNorm(4096, 1e-5)
    norm.init_parameters()
    x = (torch.randn(2, 4096) + 3).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), rms(x.double()), rtol=2**-8, atol=0)


def test_swiglu():
    layer = SwiGLU(6, 10, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 6, dtype=torch.float64)
    gate, up = x @ layer.gate_proj.weight.T, x @ layer.up_proj.weight.T
    assert_close("swiglu", layer(x), (gate * gate.sigmoid() * up) @ layer.down_proj.weight.T, 1e-13)


def grads_of(layer, x, dy):
    """The output of a layer, and the gradients of x and of its parameters."""
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)


def swiglus(*tiles, dtype=torch.float64, dim=6, hidden=10):
    """Layers with the same parameters and different tiles."""
    layers = [SwiGLU(dim, hidden, dtype=dtype, tile=tile) for tile in tiles]
    for parameters in zip(*(layer.parameters() for layer in layers), strict=True):
        torch.nn.init.normal_(parameters[0], std=dim**-0.5)
        for other in parameters[1:]:
            other.data.copy_(parameters[0].data)
    return layers


@pytest.mark.parametrize("tile", [1, 5, 13, 14])
def test_swiglu_over_tiles_equals_swiglu(tile):
    """Rows of a batch are one run of tokens, and the last tile may be short."""
    whole, tiled = swiglus(None, tile)
    x, dy = (torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=needed) for needed in (True, False))
    for a, b in zip(grads_of(tiled, x, dy), grads_of(whole, x, dy), strict=True):
        assert_close("swiglu", a, b, 1e-12)


def test_swiglu_over_tiles_keeps_its_input_alone_and_frozen_weights_get_no_gradient():
    (layer,) = swiglus(8)
    layer.up_proj.weight.requires_grad_(False)
    x = torch.randn(1, 100, 6, dtype=torch.float64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert sum(t.numel() for t in kept) == x.numel() + 3 * 60
    y.sum().backward()
    assert layer.up_proj.weight.grad is None and layer.gate_proj.weight.grad.abs().min() > 0
    with torch.no_grad():
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_swiglu_over_tiles_in_bf16_is_as_accurate_as_whole(autocast):
    """Weights' gradients are summed over tiles in fp32: many small tiles lose nothing."""
    dim, hidden, dtype = 16, 48, torch.float32 if autocast else torch.bfloat16
    whole, tiled = swiglus(None, 2, dtype=dtype, dim=dim, hidden=hidden)
    x, dy = (torch.randn(1, 512, dim, dtype=dtype, requires_grad=needed) for needed in (True, False))
    (exact,) = swiglus(None, dim=dim, hidden=hidden)
    exact.load_state_dict(whole.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = tiled(x)
    assert y.dtype == torch.bfloat16
    results = []
    for layer in (whole, tiled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            results.append(grads_of(layer, x, dy.bfloat16()))
    reference = grads_of(exact, x.double().detach().requires_grad_(), dy.bfloat16().double())
    for expected, mine, wanted in zip(*results, reference, strict=True):
        assert mine.dtype == expected.dtype
        assert relative_error(mine, wanted) <= 1.1 * relative_error(expected, wanted) + 2**-9


@pytest.mark.parametrize("window", [None, 3])
def test_softmax_mixer_equals_its_definition(window):
    """Grouped queries, rotary positions that restart in each document, and a window."""
    config = make_config("basic", pattern="S", heads=4, kv_heads=2, window=window, rope_theta=100.0)
    mixer = SoftmaxMixer(config, dtype=torch.float64)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, BORDERS[-1], DIM, dtype=torch.float64, requires_grad=True)
    cp = CPContext.local(BORDERS)
    y = mixer(x, {4: rotary_angles(cp.position_ids, 4, 100.0, torch.float64)}, cp)[0]

    outputs = []
    for a, b in zip(BORDERS, BORDERS[1:], strict=False):
        q, k, v = (F.linear(x[0, a:b], getattr(mixer, f"{n}_proj").weight).unflatten(-1, (-1, 4)) for n in "qkv")
        q, k = rotate(q, 100.0), rotate(k, 100.0)
        k, v = k[:, [0, 0, 1, 1]], v[:, [0, 0, 1, 1]]
        i = torch.arange(b - a)
        hidden = (i[None] > i[:, None]) | (i[None] <= i[:, None] - (window or 100))
        scores = (torch.einsum("ihd,jhd->hij", q, k) / 2).masked_fill(hidden, -math.inf)
        o = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
        outputs.append(o.flatten(1) @ mixer.o_proj.weight.T)
    expected = torch.cat(outputs).unsqueeze(0)
    dy = torch.randn_like(y)
    inputs = [x, *mixer.parameters()]
    assert_close("y", y, expected, 1e-10)
    for grad, wanted in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        assert relative_error(grad, wanted) <= 1e-10
