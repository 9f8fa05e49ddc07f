"""Names for settings: the families of linear layers and the models, as partial mappings of config fields.

Where implementations of a family disagree, the comment says which convention is meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MIXER_PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Katharopoulos et al., arXiv 2006.16236: phi = elu + 1, divided by the sum of weights.
    "linear": {"feature": "elu1", "normaliser": "sum", "out_norm": "none"},
    # The basic linear attention of LASP-2 (arXiv 2502.07563): no decay, no denominator, a norm on the output.
    # The paper leaves the feature map open; silu is what the authors' public Linear-Llama3 script sets.
    "basic": {"feature": "silu", "out_norm": "head_rms"},
    # The same with a learnt product map, (W1 x) * (W2 x).
    "linear_norm": {"feature": "hadamard", "out_norm": "head_rms"},
    # Lightning Attention / TransNormerLLM (arXiv 2307.14995); slopes of the authors' repository and MiniMax-01.
    "lightning": {
        "feature": "silu",
        "decay": "fixed",
        "slopes": "alibi",
        "per_layer_slopes": True,
        "scale": 1.0,
        "out_norm": "srms",
        "out_gate": "sigmoid",
    },
    # Retention (arXiv 2307.08621): rotary q and k, values twice as wide.
    "retnet": {
        "decay": "fixed",
        "slopes": "retnet",
        "expand_v": 2.0,
        "position": "rope",
        "out_gate": "silu",
    },
    # GLA (arXiv 2312.06635): keys half as wide, one gate per key channel through rank 16.
    "gla": {
        "decay": "channel",
        "gate": "logsigmoid",
        "gate_rank": 16,
        "expand_k": 0.5,
        "out_gate": "silu",
    },
    # Based (arXiv 2402.18668): second-order Taylor features of exp on narrow q and k.
    "based": {"feature": "taylor2", "key_dim": 16, "normaliser": "sum", "out_norm": "none"},
    # ReBased (arXiv 2402.10644): a learnt affine map of the normalised q and k, squared.
    "rebased": {"feature": "rebased", "key_dim": 16, "normaliser": "sum", "out_norm": "none"},
}

MODEL_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"vocab_size": 256, "dim": 64, "num_layers": 4, "pattern": "SLLL", "heads": 4, "ffn_dim": 192},
    # Linear-Llama3-1B of LASP-2 (arXiv 2502.07563): 16 layers, width 2048, 16 heads. Feed-forward width,
    # vocabulary, rotary base and the tied head are those of Llama 3.2 1B.
    "linear-llama3-1b": {
        "vocab_size": 128256,
        "dim": 2048,
        "num_layers": 16,
        "pattern": "L",
        "heads": 16,
        "ffn_dim": 8192,
        "rope_theta": 500000.0,
        "mixer": "basic",
    },
    # GLA with about 1B parameters, as in ZeCO's comparison (arXiv 2507.01004), which gives no sizes: those are the
    # defaults of the public GLA implementation, with 8 heads so that a value head is 256 wide.
    "1b-gla": {
        "vocab_size": 32000,
        "dim": 2048,
        "num_layers": 24,
        "pattern": "L",
        "heads": 8,
        "ffn_dim": 5632,
        "mixer": "gla",
    },
}
