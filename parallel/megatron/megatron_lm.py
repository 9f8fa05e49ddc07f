"""What Megatron-LM's ``pretrain_gpt.py --spec MODULE NAME`` can name: the layers of a hybrid model, of every stage.

Megatron-LM imports the name and hands the object to GPTModel as it is. It calls no function, so the object knows
neither the config nor the stage. A spec of *one layer* is repeated for the layers of a stage, each built with both:

    --spec lasp.parallel.megatron.megatron_lm spec         layers by --linear-attention-freq, the mixer "basic"
    --spec my_specs spec                                   spec = layer_spec("LLLS", mixer={...}) in my_specs.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from lasp.models.config import MixerConfig
from lasp.parallel.megatron.contexts import CPContexts
from lasp.parallel.megatron.specs import hybrid_layer_spec


def layer_spec(
    pattern: str | None = None,
    *,
    mixer: MixerConfig | Mapping[str, Any] | str = "basic",
    window: int | None = None,
    linear_query_groups: int | None = None,
    softmax_core: type | ModuleSpec | None = None,
) -> ModuleSpec:
    """A spec without a config, for ``--spec`` and wherever else one spec serves all layers and stages.

    The order of tokens is zigzag, in which Megatron-LM cuts batches. Whether layers are TransformerEngine's follows
    from ``--transformer-impl``.

    Args:
        pattern, mixer, window, linear_query_groups, softmax_core: see
            :func:`~lasp.parallel.megatron.specs.hybrid_layer_spec`, whose errors are raised when a layer is built.
    """
    options = {
        "pattern": pattern,
        "mixer": mixer,
        "contexts": CPContexts("zigzag"),  # one for all layers
        "window": window,
        "linear_query_groups": linear_query_groups,
        "softmax_core": softmax_core,
    }
    return ModuleSpec(HybridLayer, params={"options": options})


class HybridLayer(TransformerLayer):
    """A TransformerLayer that finds out by its number which kind of layer it is.

    Args:
        config, layer_number, pg_collection, vp_stage: as Megatron passes them; ``layer_number`` counts from 1 within
            this stage.
        options: of hybrid_layer_spec.

    Raises:
        ValueError: multi-token prediction; what hybrid_layer_spec refuses.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layer_number: int,
        options: Mapping[str, Any],
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        **others: Any,
    ):
        if config.mtp_num_layers is not None:
            raise ValueError(
                f"mtp_num_layers must be None with a layer_spec, got {config.mtp_num_layers}: whether Megatron-LM "
                "builds these layers by --spec depends on its version. Leave --mtp-num-layers out."
            )
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        stage = hybrid_layer_spec(
            config,
            **options,
            vp_stage=vp_stage,
            pp_rank=pg_collection.pp.rank(),
            use_transformer_engine=None if config.transformer_impl == "transformer_engine" else False,
        )
        layer = stage.layer_specs[layer_number - 1]
        place = {"layer_number": layer_number, "pg_collection": pg_collection, "vp_stage": vp_stage}
        super().__init__(config, layer.submodules, **place, **layer.params, **others)


spec = layer_spec()
