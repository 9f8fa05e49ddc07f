import dataclasses

import pytest

from lasp.models.config import MixerConfig, ModelConfig
from lasp.models.presets import MIXER_PRESETS, MODEL_PRESETS


@pytest.mark.parametrize("name", MIXER_PRESETS)
def test_every_family_is_a_setting_of_one_class(name):
    config = MixerConfig.preset(name)
    assert MixerConfig.from_dict(dataclasses.asdict(config)) == config
    assert MixerConfig.preset(name, heads=3).heads == 3


def test_own_fields_win_over_the_preset():
    gla = MixerConfig.preset("gla", key_dim=24, out_gate="sigmoid", gate_tau=8)
    assert (gla.key_dim, gla.expand_k, gla.out_gate, gla.gate_tau) == (24, 1.0, "sigmoid", 8)
    based = MixerConfig.preset("based", expand_k=0.25)
    assert (based.key_dim, based.expand_k, based.feature) == (None, 0.25, "taylor2")


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_model_presets_round_trip(name):
    config = ModelConfig.preset(name)
    assert ModelConfig.from_dict(dataclasses.asdict(config)) == config


def test_nested_mixer_by_name_and_by_mapping():
    named = ModelConfig.from_dict({"preset": "tiny", "mixer": "gla"})
    assert named.mixer == MixerConfig.preset("gla")
    nested = ModelConfig.preset("tiny", mixer={"preset": "gla", "heads": 2})
    assert nested.mixer == MixerConfig.preset("gla", heads=2)
    assert (nested.mixer_heads, nested.key_dim, nested.value_dim) == (2, 16, 32)


def test_pattern_repeats_to_the_number_of_layers():
    config = ModelConfig(vocab_size=8, dim=16, num_layers=6, pattern="LLLS")
    assert config.layer_kinds == "LLLSLL"
    assert ModelConfig(vocab_size=8, dim=96, num_layers=1).hidden_dim == 256
    assert ModelConfig(vocab_size=8, dim=96, num_layers=1, ffn_dim=100).hidden_dim == 100


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"feature": "exp"}, r"feature must be one of \['identity', .*\], got 'exp'\.$"),
        ({"feature": "rebase"}, r"feature must be one of .*, got 'rebase'\. Did you mean 'rebased'\?"),
        ({"heads": True}, "heads must be int or None, got True"),
        ({"heads": "4"}, "heads must be int or None, got '4'"),
        ({"heads": 0}, "heads must be positive and finite, got 0"),
        ({"expand_v": float("nan")}, "expand_v must be positive and finite, got nan"),
        ({"key_dim": 8, "expand_k": 0.5}, r"expand_k=0.5 has no effect: key_dim sets the width. Leave it 1.0"),
        ({"slopes": "alibi"}, "slopes='alibi' has no effect: decay='none' has no fixed slopes"),
        ({"per_layer_slopes": True}, "per_layer_slopes=True has no effect"),
        ({"gate": "mamba"}, "gate='mamba' has no effect: decay='none' has no gate"),
        ({"gate": "mambo"}, r"gate must be one of \['logsigmoid', 'mamba'\], got 'mambo'\. Did you mean 'mamba'\?"),
        ({"decay": "fixed"}, r"slopes must be one of \['alibi', 'retnet'\] when decay='fixed', got None"),
        ({"decay": "fixed", "slopes": "alibis"}, r"slopes must be one of .*, got 'alibis'\. Did you mean 'alibi'\?"),
        ({"out_norm": "rms"}, r"out_norm must be one of \['none', .*\], got 'rms'"),
        ({"out_gate": "swish"}, r"out_gate must be one of \['none', 'silu', 'sigmoid'\], got 'swish'\.$"),
        ({"decay": "channel"}, r"gate must be one of \['logsigmoid', 'mamba'\] when decay='channel', got None"),
        ({"decay": "scalar", "gate": "mamba", "gate_tau": 8}, "gate_tau=8 has no effect: only gate='logsigmoid'"),
        ({"feature": "silu", "feature_dim": 4}, "feature_dim=4 has no effect: only feature='hadamard'"),
        ({"normaliser": "sum"}, "normaliser='sum' divides by a sum of weights, .* got 'identity'"),
        ({"normaliser": "sum", "feature": "elu1", "scale": 2.0}, "scale=2.0 has no effect: normaliser='sum' cancels"),
        ({"conv_width": 1}, r"conv_width must be 0 \(none\) or at least 2, got 1"),
        ({"conv_activation": "silu"}, "conv_activation='silu' has no effect: conv_width=0"),
        ({"out_gate_rank": 4}, "out_gate_rank=4 has no effect: out_gate='none'"),
        ({"causal": False, "decay": "fixed", "slopes": "retnet"}, "causal=False needs decay='none', got 'fixed'"),
    ],
)
def test_mixer_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        MixerConfig(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pattern": "LX"}, "pattern must be made of L .* and S .*, got 'LX'"),
        ({"pattern": "LLLLS"}, "pattern must not be longer than num_layers = 4, got 'LLLLS'"),
        ({"pattern": "L", "window": 4}, "window=4 has no effect: pattern='L' has no softmax layer"),
        ({"pattern": "L", "kv_heads": 2}, "kv_heads=2 has no effect"),
        ({"kv_heads": 3}, "kv_heads must divide heads = 4, got 3"),
        ({"dim": 66}, "heads must divide dim where head_dim is None: dim = 66, heads = 4"),
        ({"head_dim": 15}, "a softmax head must have an even width for the rotary embedding, got 15"),
        ({"mixer": {"heads": 5}}, r"the heads of the mixer must divide expand_k \* dim = 1.0 \* 64, got 5 heads"),
        ({"mixer": {"preset": "retnet", "key_dim": 5}}, "mixer.position='rope' needs an even key_dim, got 5"),
        ({"mixer": {"causal": False}, "window": 4}, "window needs a causal model, got window = 4"),
        ({"mixer": "glaa"}, r"preset of MixerConfig must be one of \['based', .*\], got 'glaa'"),
        ({"mixer": {"haeds": 2}}, "MixerConfig has no field haeds; its fields are"),
        ({"layers": 2}, "ModelConfig has no field layers; its fields are"),
        ({"norm_eps": "1e-5"}, "norm_eps must be float, got '1e-5'"),
    ],
)
def test_model_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.preset("tiny", **fields)


def test_required_fields():
    with pytest.raises(ValueError, match=r"ModelConfig needs dim, num_layers\. Set them, or name a preset"):
        ModelConfig.from_dict({"vocab_size": 8})
