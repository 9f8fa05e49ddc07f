"""The command ``lasp``.

lasp train configs/quickstart.yaml optimizer.lr=1e-3 --cp 4
lasp generate runs/quickstart --prompt "def main(" --temperature 0.7
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from pathlib import Path

import click

from lasp.launch.bench.commands import bench
from lasp.launch.versions import missing_extra, version_line
from lasp.parallel.engines.table import ENGINES

_FAILURE, _INTERRUPTED = 1, 130
_DEBUG = "--debug"


def _print_version(context: click.Context, _option: click.Option, wanted: bool) -> None:
    if wanted:
        click.echo(version_line())
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Versions.")
def cli() -> None:
    """Train linear and hybrid language models on sequences cut over many ranks, exact against one device.

    With --debug anywhere, an error shows its traceback.
    """


def _sizes(command):
    """The aliases of mesh sizes, turned into overrides."""
    for name in ("pp", "tp", "dp", "cp"):
        command = click.option(f"--{name}", type=int, help=f"Same as {name}_size=N.")(command)
    return command


def _with_aliases(overrides: tuple[str, ...], **sizes: int | None) -> list[str]:
    return [*overrides, *(f"{name}_size={size}" for name, size in sizes.items() if size is not None)]


@cli.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_sizes
@click.option("--print", "print_only", is_flag=True, help="With launcher=torchrun: print every node's command.")
@click.option("--slurm", is_flag=True, help="With launcher=torchrun: print a Slurm script for sbatch.")
def train(config: str, overrides: tuple[str, ...], print_only: bool, slurm: bool, **sizes: int | None) -> None:
    """Train as CONFIG (a YAML file) says. Keys are dotted: optimizer.lr=1e-3.

    Starts the ranks of one machine itself, or with launcher=torchrun this node's of any number; under torchrun it
    joins those it finds. Ctrl-C saves and stops; the same command goes on from there.
    """
    from lasp.launch.config.schema import load_config

    arguments = [config, *_with_aliases(overrides, **sizes)]
    run = load_config(config, arguments[1:])
    if (print_only or slurm) and run.launcher != "torchrun":
        raise ValueError(
            f"{'--slurm' if slurm else '--print'} has no effect with launcher={run.launcher}. Add launcher=torchrun."
        )
    if run.launcher == "ray":
        from lasp.launch.launchers.ray_cluster import run_ray

        run_ray(run)
    elif slurm:
        from lasp.launch.launchers.torchrun import sbatch_script

        click.echo(sbatch_script(run, arguments), nl=False)
    elif print_only:
        from lasp.launch.launchers.torchrun import all_commands

        for node, command in enumerate(all_commands(run, arguments)):
            click.echo(f"# node {node}\n{command}")
    else:
        from lasp.launch.launchers.start import start

        start("train", run, arguments)


@cli.command()
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_sizes
def doctor(config: str | None, overrides: tuple[str, ...], **sizes: int | None) -> None:
    """Look whether this machine, or the job of CONFIG, is fit: versions, devices, network, disk, clocks, layout.

    Runs the ranks that training would run: start it in the same way. Exit code 0 only when nothing is wrong.
    """
    if config is not None:
        from lasp.launch.config.schema import load_config
        from lasp.launch.launchers.start import start

        arguments = [config, *_with_aliases(overrides, **sizes)]
        return start("doctor", load_config(config, arguments[1:]), arguments)
    if given := [f"--{name}" for name, size in sizes.items() if size is not None]:
        raise ValueError(f"{given[0]} has no effect without CONFIG. Name a YAML file, or leave it out.")
    from lasp.launch.doctor.examine import examine

    examine(None)


@cli.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--pp", type=int, help="Same as pp_size=N, with backend=megatron.")
@click.option("--tp", type=int, help="Same as tp_size=N, with backend=megatron.")
@click.option("--cp", "cp_size", type=int, help="Ranks to compare with one; default: the configuration's, at least 2.")
def verify(config: str, overrides: tuple[str, ...], cp_size: int | None, **sizes: int | None) -> None:
    """Check that the model of CONFIG gives the same loss and gradients on one rank and on several.

    With backend=megatron the several run Megatron, over tp x pp x cp, and the one runs the native model.
    """
    from lasp.launch.config.schema import load_config
    from lasp.launch.verify import verify as compare

    run = load_config(config, _with_aliases(overrides, **sizes))
    sys.exit(compare(run, max(2, run.cp_size) if cp_size is None else cp_size))


@cli.command()
@click.option("--model", required=True, help="A preset, like 1b-gla, or a run's YAML file.")
@click.option("--seq-len", help="Tokens of a sequence, like 32K or 4M; default: the YAML file's.")
@click.option("--gpus", type=int, help="Default: the sizes of the YAML file.")
@click.option("--fabric", required=True, help="A preset, like h100-ib, or a file of `lasp bench fabric`.")
@click.option("--batch", type=int, help="Sequences of a step; default: the YAML file's, or 1.")
@click.option("--gpus-per-node", type=int, default=8, show_default=True)
@click.option("--memory", default="80GB", show_default=True, help="Of one GPU.")
@click.option("--engine", help=f"{', '.join(ENGINES)}; default: the best.")
@click.option("--layout", help="contiguous or zigzag; default: the YAML file's, or contiguous.")
@click.option("--device", help="h100, a100 or cpu; default: the fabric's.")
@click.option(
    "--tokens-per-s", type=float, help="Of one GPU without --cp and recompute, measured; default: the roofline."
)
@click.option("--explain", is_flag=True, help="Also all exchanges, and the memory term by term.")
@click.option("--all", "every", is_flag=True, help="All candidates.")
def plan(model: str, seq_len: str | None, gpus: int | None, fabric: str, **options) -> None:
    """Predict how to run a model: mesh, engine, exchange and recomputation, with speed and memory. Starts nothing."""
    from lasp.launch.plan.report import plan_command

    plan_command(model, seq_len, gpus, fabric, **options)


@cli.group()
def data() -> None:
    """Prepare training data."""


@data.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--output", required=True, help="Prefix of the files to write: PREFIX.bin, .idx and .json.")
@click.option("--tokenizer", default="bytes", show_default=True, help="bytes, or a Hugging Face tokenizers JSON file.")
@click.option("--glob", "pattern", default="*", show_default=True, help="Which files of a folder to read.")
def prepare(inputs: tuple[str, ...], output: str, tokenizer: str, pattern: str) -> None:
    """Turn text files, or folders of them, into Megatron token files: one document per file."""
    from lasp.launch.data.token_files import check_output, list_files, read_texts, write_token_file
    from lasp.launch.data.tokenizer import load_tokenizer

    files = list_files(inputs, pattern)
    check_output(output, [*files, Path(tokenizer)])
    file = write_token_file(output, read_texts(files), load_tokenizer(tokenizer))
    click.echo(f"{output}.bin, .idx: {len(file):,} documents, {file.num_tokens:,} tokens")
    overrides = shlex.join([f"data.source={output}", f"data.tokenizer={tokenizer}"])
    click.echo(f"train on it with {overrides}")


@cli.command()
@click.argument("checkpoint")
@click.option("--prompt", required=True, help="Text to go on from.")
@click.option("--max-new-tokens", type=click.IntRange(0), default=200, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True, help="0: the likeliest token.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
def generate(checkpoint: str, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Let a trained model continue a text. CHECKPOINT is a checkpoint or a run directory."""
    from lasp.launch.run.generate import load_model, sample_text

    model, tokenizer = load_model(checkpoint)
    ids = tokenizer.encode(prompt)
    click.echo(sample_text(model, tokenizer, ids, max_new_tokens, temperature=temperature, seed=seed))


@cli.group()
def checkpoint() -> None:
    """Look at checkpoints, and convert them."""


@checkpoint.command()
@click.argument("path")
def inspect(path: str) -> None:
    """Verify every byte of a checkpoint and say what it holds."""
    from lasp.parallel.checkpoints import checkpoint as checkpoints
    from lasp.parallel.checkpoints.native_weights import parameter_index

    saved = checkpoints.load(checkpoints.find(Path(path)))
    model = parameter_index(saved)
    parameters = sum(math.prod(info.shape) for info in model.values())
    backend, position = saved.state.get("backend", "native"), saved.state["data_position"]
    click.echo(f"{saved.path}: good")
    click.echo(f"step {saved.step}, {position:,} tokens seen, {parameters:,} parameters, backend {backend}")
    for name, info in model.items():
        click.echo(f"  {name:<44} {info.shape!s:<16} {str(info.dtype).removeprefix('torch.')}")


@checkpoint.command()
@click.argument("source")
@click.argument("target")
@click.option("--weights-only", is_flag=True, help="Parameters alone, without optimizer states.")
@click.option("--config", help="The run's YAML file, for a safetensors file that was not made by this command.")
def convert(source: str, target: str, weights_only: bool, config: str | None) -> None:
    """Turn a checkpoint into one safetensors file, or such a file into a checkpoint.

    One of SOURCE and TARGET is a file NAME.safetensors, the other a run directory (or a checkpoint as SOURCE). A file
    without optimizer states becomes a checkpoint of step 0: training begins there.
    """
    from lasp.launch.config.schema import load_config
    from lasp.launch.convert import SUFFIX, from_file, to_file

    if source.endswith(SUFFIX) == target.endswith(SUFFIX):
        raise ValueError(f"one of SOURCE = {source} and TARGET = {target} must end with {SUFFIX}. Name one such file.")
    if target.endswith(SUFFIX):
        if config is not None:
            raise ValueError(f"--config has no effect when {target} is written: leave it out.")
        count = to_file(Path(source), Path(target), weights_only=weights_only)
        click.echo(f"{target}: {count} tensors")
    else:
        if weights_only:
            raise ValueError(f"--weights-only has no effect when {source} is read: leave it out.")
        path = from_file(Path(source), Path(target), None if config is None else load_config(config))
        click.echo(f"{path}: good; train in it with run_dir={target}")


cli.add_command(bench)


def main() -> None:
    """Run the command line: 0 on success, 1 with one clean message on failure, 2 on wrong usage, 130 if interrupted."""
    arguments = [argument for argument in sys.argv[1:] if argument != _DEBUG]
    try:
        cli(arguments, standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if _DEBUG in sys.argv or (sentence := missing_extra(error)) is None:
            raise
        click.secho(f"error: {sentence}", fg="red", err=True)
        sys.exit(_FAILURE)
    except Exception as error:
        _fail(error, debug=_DEBUG in sys.argv)


def _fail(error: Exception, debug: bool) -> None:
    """One message for what a user can mend; a traceback for what is our fault."""
    from lasp.launch.run.failures import Interrupted, RankFailure
    from lasp.parallel.user_errors import USER_ERRORS, sentence

    _leave_for_agent(error)
    if debug and isinstance(error, RankFailure):
        click.echo(error.details, err=True)
    elif debug or not isinstance(error, (RankFailure, *USER_ERRORS)):
        raise error
    click.secho(f"error: {sentence(error)}", fg="red", err=True)
    sys.exit(_INTERRUPTED if isinstance(error, Interrupted) else _FAILURE)


def _leave_for_agent(error: Exception) -> None:
    """Under torchrun the agent shows the first error of a job, from whichever rank; it looks for it in a file."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


if __name__ == "__main__":
    main()
