"""Train a GPT with Megatron-Core on any TP x PP x CP mesh; the remaining ranks are data-parallel.

    torchrun --nproc-per-node 8 examples/megatron_gpt.py --tp 2 --pp 2 --cp 2 --lasp LLLS

``--lasp`` makes some layers linear and gives all of them LASP's context parallelism. The whole change:

    +from lasp.parallel.megatron import hybrid_layer_spec
    +MIXER = {"decay": "scalar", "gate": "mamba", "feature": "elu1", "out_gate": "silu"}
    ...
    +    parser.add_argument("--lasp", metavar="PATTERN", help="L linear and S softmax layers, repeated: LLLS")
    ...
         spec = get_gpt_decoder_block_spec(config, use_transformer_engine=HAVE_TE)
    +    if args.lasp:
    +        spec = hybrid_layer_spec(config, args.lasp, mixer=MIXER)

Mesh, data, loss, optimizer, schedule and checkpoints stay Megatron's. ``attention_dropout`` is 0 and the mask None.
"""

import argparse
import functools
import importlib.util
import os
import sys

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

from lasp.parallel.megatron import hybrid_layer_spec

MIXER = {"decay": "scalar", "gate": "mamba", "feature": "elu1", "out_gate": "silu"}
HAVE_TE = importlib.util.find_spec("transformer_engine") is not None  # without it: cp 1, or --lasp


def parse_args():
    """Every option, with a model that fits any GPU."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--lasp", metavar="PATTERN", help="L linear and S softmax layers, repeated: LLLS")
    integer = functools.partial(parser.add_argument, type=int)
    integer("--tp", default=1, help="tensor-parallel ranks")
    integer("--pp", default=1, help="pipeline stages")
    integer("--cp", default=1, help="context-parallel ranks")
    integer("--layers", default=8)
    integer("--hidden", default=1024)
    integer("--heads", default=16)
    integer("--groups", default=8, help="heads of keys and values")
    integer("--vocab", default=32768, help="numbers that the data counts with")
    integer("--seq-length", default=16384, help="tokens of a sequence, a multiple of 2 * cp")
    integer("--micro-batch", default=1, help="sequences per micro-batch")
    integer("--global-batch", default=8, help="sequences per step, over all data-parallel ranks")
    integer("--steps", default=20)
    integer("--seed", default=1234)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--sequence-parallel", action="store_true", help="needs TransformerEngine's norms")
    parser.add_argument("--load", metavar="DIR", help="weights to start from, saved on any mesh")
    parser.add_argument("--save", metavar="DIR", help="where the trained weights go")
    args = parser.parse_args()
    if args.cp > 1 and args.seq_length % (2 * args.cp):
        parser.error(f"--seq-length must be a multiple of 2 * cp = {2 * args.cp}, got {args.seq_length}: zigzag order")
    return args


def join_mesh(args):
    """One process per GPU, and Megatron's groups of them."""
    local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= devices:
        sys.exit(f"Local rank {local_rank} needs a CUDA device of its own, and this machine has {devices} of them.")
    if "RANK" not in os.environ:
        sys.exit("This script needs torchrun: torchrun --nproc-per-node 8 examples/megatron_gpt.py --cp 8 --lasp LLLS")
    torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel(args.tp, args.pp, context_parallel_size=args.cp)
    seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()  # other layers, other weights
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def build_model(args):
    """This pipeline stage of the GPT."""
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        num_query_groups=args.groups,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        context_parallel_size=args.cp,
        sequence_parallel=args.sequence_parallel,
        bf16=args.dtype == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,  # the mean over the tokens of the global batch, however they are cut
        gradient_accumulation_fusion=False,  # would need apex
        finalize_model_grads_func=finalize_model_grads,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=HAVE_TE)
    if args.lasp:
        spec = hybrid_layer_spec(config, args.lasp, mixer=MIXER)
    model = GPTModel(
        config,
        spec,
        args.vocab,
        args.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )
    return model.to(torch.cuda.current_device())


def micro_batches(args, step):
    """This data-parallel rank's share of a step, cut over CP: each row counts up by a stride of its own, mod vocab."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    random = torch.Generator().manual_seed(args.seed + step)
    first, stride = torch.randint(1, args.vocab, (2, args.global_batch, 1), generator=random)
    rows = (first + stride * torch.arange(args.seq_length + 1)) % args.vocab  # [global_batch, seq_length + 1]
    for own in rows.chunk(size)[rank].split(args.micro_batch):
        batch = {"tokens": own[:, :-1], "labels": own[:, 1:], "loss_mask": torch.ones(own[:, 1:].shape)}
        batch["position_ids"] = torch.arange(args.seq_length).expand_as(batch["tokens"])
        batch = {name: x.contiguous().to(torch.cuda.current_device()) for name, x in batch.items()}
        yield get_batch_on_this_cp_rank(batch)


def loss_func(loss_mask, losses):
    """Sum over this rank's tokens, their number, and what to report."""
    total, tokens = (losses.float() * loss_mask).sum(), loss_mask.sum()
    return total, tokens.int(), {"loss": torch.stack([total.detach(), tokens])}


def forward_step(batches, model):
    """One micro-batch through this stage; the loss is taken on the last one."""
    batch = next(batches)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, functools.partial(loss_func, batch["loss_mask"])


def main():
    """Mesh, model, optimizer, steps."""
    args = parse_args()
    join_mesh(args)
    data_parallel = parallel_state.get_data_parallel_world_size()
    num_micro_batches, rest = divmod(args.global_batch, args.micro_batch * data_parallel)
    if rest:
        sys.exit(
            f"--global-batch {args.global_batch} must be a multiple of --micro-batch {args.micro_batch} times "
            f"{data_parallel} data-parallel ranks."
        )
    model = gpt = build_model(args)
    if args.load:
        gpt.load_state_dict(dist_checkpointing.load(gpt.sharded_state_dict(), args.load))
    if gpt.config.bf16:
        model = Float16Module(gpt.config, gpt)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(gpt.config, ddp, model)
    options = {"bf16": gpt.config.bf16, "params_dtype": gpt.config.params_dtype, "use_distributed_optimizer": True}
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=args.lr, **options), [model])
    last = dist.get_rank() == dist.get_world_size() - 1  # a rank of the last pipeline stage
    if last:
        shape = f"{num_micro_batches} micro-batches x {args.micro_batch} x {args.seq_length} tokens per step"
        print(f"tp {args.tp} pp {args.pp} cp {args.cp} dp {data_parallel}: {shape}", flush=True)

    for step in range(args.steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=micro_batches(args, step),
            model=model,
            num_microbatches=num_micro_batches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch,
            forward_only=False,
        )
        _, grad_norm, _ = optimizer.step()
        if reports:
            total = torch.stack([report["loss"] for report in reports]).sum(0)
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            if last:
                print(f"step {step + 1} loss {total[0] / total[1]:.7f} grad norm {grad_norm:.5f}", flush=True)

    if args.save:
        os.makedirs(args.save, exist_ok=True)
        dist_checkpointing.save(gpt.sharded_state_dict(), args.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
