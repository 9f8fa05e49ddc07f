#!/usr/bin/env bash
# Megatron-LM's own pretrain_gpt.py with LASP layers. MEGATRON is a checkout of Megatron-LM at core 0.16.
#
#   MEGATRON=../Megatron-LM examples/pretrain_gpt.sh                                   one node, mock data
#   NODES=4 NODE_RANK=0 HOST=node0 MEGATRON=../Megatron-LM examples/pretrain_gpt.sh    on each of 4 nodes
#   MEGATRON=... examples/pretrain_gpt.sh --save runs/gpt --save-interval 500          further options go last
#
# DATA is the prefix of a .bin/.idx pair and TOKENIZER a Hugging Face tokenizer. GPUS, TP, PP and CP cut the mesh;
# what remains of NODES * GPUS is data-parallel. A node's NVLink serves TP best; CP may span nodes.
set -euo pipefail
: "${MEGATRON:?must be a checkout of Megatron-LM at core 0.16}"
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" # for --spec hybrid_specs
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron orders messages and kernels by it

LASP=(
    --spec hybrid_specs gated # MODULE NAME of a layer_spec(...); hybrid_specs.py is beside this file, write your own
    # or: --spec lasp.parallel.megatron.megatron_lm spec --linear-attention-freq 4     every fourth layer is softmax
    --attention-dropout 0                    # required, the default is 0.1: the operators have none
    --no-create-attention-mask-in-dataloader # required: layers are causal and refuse a mask
    --context-parallel-size "${CP:-4}"       # not bounded by heads; --seq-length is a multiple of 2 * CP
    --cp-comm-type p2p                       # the default; chooses among TransformerEngine's exchanges, not among these
)
MODEL=(
    --num-layers 24 --hidden-size 2048 --ffn-hidden-size 5632
    --num-attention-heads 16 --group-query-attention --num-query-groups 8
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --hidden-dropout 0
    --position-embedding-type rope --rotary-base 500000 # Megatron rotates q and k of linear layers, too
    --seq-length 131072 --max-position-embeddings 131072
)
MESH=(
    --tensor-model-parallel-size "${TP:-2}" --sequence-parallel
    --pipeline-model-parallel-size "${PP:-1}" # with --num-layers-per-virtual-pipeline-stage: interleaved
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather # over data- and context-parallel ranks
)
TRAINING=(
    --micro-batch-size 1 --global-batch-size "${BATCH:-8}" --train-iters 1000 --bf16
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 100 --weight-decay 0.1 --clip-grad 1.0
    --calculate-per-token-loss                 # the mean over tokens, however many of them a rank has
    --ckpt-format torch_dist                   # the default; read on any other mesh
    --log-interval 10 --eval-interval 500 --eval-iters 10 # --log-throughput counts linear layers as softmax layers
)
INPUT=(--mock-data --tokenizer-type NullTokenizer --vocab-size 32768)
if [[ -n "${DATA:-}" ]]; then
    : "${TOKENIZER:?must be the Hugging Face tokenizer with which DATA was made}"
    INPUT=(--data-path "$DATA" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" --split 99,1,0)
fi

exec torchrun --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${GPUS:-8}" \
    --master-addr "${HOST:-localhost}" --master-port "${PORT:-29500}" \
    "$MEGATRON/pretrain_gpt.py" "${LASP[@]}" "${MODEL[@]}" "${MESH[@]}" "${TRAINING[@]}" "${INPUT[@]}" "$@"
