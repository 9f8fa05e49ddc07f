"""The commands of ``lasp bench``: options in words become a driver's arguments, its rows become a report."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def bench() -> None:
    """Measure links, exchanges, layers, models and scaling; write JSON, Markdown and a plot.

    Under torchrun the ranks of the job are measured, otherwise ranks of this machine that the command starts.
    """


def _output(command):
    help_text = "Folder of the results."
    return click.option("--output", type=Path, default="benchmarks/results/bench", show_default=True, help=help_text)(
        command
    )


def _ranks(default: str, help_text: str = "Ranks to start on this machine."):
    return click.option("--ranks", default=default, show_default=True, help=help_text)


def _device(command):
    return click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)(
        command
    )


def _refuse_without_virtual(**given) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name} has no effect without --virtual: add --virtual, or leave it out.")


def _refuse_with_virtual(**given) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name} has no effect with --virtual: leave it out.")


@bench.command()
@click.option("--virtual", is_flag=True, help="Between hosts of a virtual cluster on this machine.")
@click.option("--hosts", help="Hosts of the virtual cluster; default: 2.")
@click.option("--rate", help="Rate of its links in bits per second; default: 400M.")
@_ranks("2", "Ranks to start on this machine; with --virtual: on each host.")
@_device
@click.option("--name", help="Of the fabric and of its files; default: from the ranks.")
@_output
def fabric(virtual: bool, hosts: str | None, rate: str | None, ranks: str, device: str, name: str | None, output: Path):
    """Measure the links between ranks and write them as a fabric, for exchange=auto and `lasp plan`."""
    from lasp.launch.bench import fabric as driver
    from lasp.launch.bench import options
    from lasp.launch.bench.ranks import found_ranks, virtual_ranks
    from lasp.launch.bench.results import facts, one_line, write_report
    from lasp.launch.bench.virtual_cluster import MAX_HOSTS, VirtualCluster

    (per_host,) = options.counts("--ranks", ranks)

    def measure(found, default: str) -> None:
        about = facts(found.where)
        title = name or default
        measured, points = driver.measure_fabric(found, title, one_line(about))
        report = {"facts": about, "fabric": driver.as_dict(measured), "points": points}
        text = driver.markdown(measured, points)
        paths = write_report(output, f"fabric-{title}", report, text, lambda f: driver.draw(f, measured, points), found)
        if found.is_first:
            measured.save(output / f"{title}.json")
            click.echo("\n".join(text))
            click.echo(f"wrote {output / title}.json, for --fabric; {', '.join(map(str, paths))}")

    if virtual:
        (count,) = options.counts("--hosts", hosts or "2", 1, MAX_HOSTS)
        (bits,) = options.rates("--rate", rate or "400M")
        with VirtualCluster(count, bits) as cluster, virtual_ranks(cluster, per_host) as found:
            measure(found, f"virtual-{count}x{per_host}-{rate or '400M'}")
    else:
        _refuse_without_virtual(hosts=hosts, rate=rate)
        with found_ranks(per_host, device=device) as found:
            measure(found, f"measured-{found.size}")


@bench.command()
@click.option("--virtual", is_flag=True, help="Sweep over virtual clusters of this machine.")
@click.option("--hosts", help="With --virtual: hosts of the clusters; default: 2,3,4,6,8.")
@click.option("--rates", help="With --virtual: rates of the links in bits per second; default: 100M,400M,1G,2G.")
@_ranks("default", "Ranks to start on this machine, default 2; with --virtual: on each host, default 1,2.")
@click.option("--sizes", default="256K,1M,2M,8M", show_default=True, help="Bytes of a state.")
@click.option("--exchanges", help="Which to run; default: all there are.")
@click.option("--kind", default="diagonal", show_default=True, help="Transition: identity, scalar, diagonal, dense.")
@click.option("--layout", type=click.Choice(["contiguous", "zigzag"]), default="contiguous", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=25, show_default=True, help="At most; fewer of slow ones.")
@click.option("--fabric", "named", help="Without --virtual: predict from this fabric; default: measure it first.")
@click.option("--max-cells", type=click.IntRange(1), default=40, show_default=True)
@click.option("--skip-above", type=click.FloatRange(0), default=5.0, show_default=True, help="Predicted seconds.")
@click.option("--limit", type=click.FloatRange(0), default=1700.0, show_default=True, help="Seconds of the sweep.")
@_device
@_output
def exchange(
    virtual: bool,
    hosts: str | None,
    rates: str | None,
    ranks: str,
    sizes: str,
    exchanges: str | None,
    kind: str,
    layout: str,
    repeats: int,
    named: str | None,
    max_cells: int,
    skip_above: float,
    limit: float,
    device: str,
    output: Path,
) -> None:
    """Time every exchange beside the cost model's prediction, here or over a sweep of virtual clusters."""
    from lasp.cost.fabric import Fabric
    from lasp.exchange import names
    from lasp.launch.bench import exchange as driver
    from lasp.launch.bench import exchange_report, options
    from lasp.launch.bench.exchange_cell import KINDS, heads_of
    from lasp.launch.bench.ranks import found_ranks
    from lasp.launch.bench.results import facts, write_report

    (kind,) = options.names("--kind", kind, KINDS)
    wanted = names() if exchanges is None else options.names("--exchanges", exchanges, names())
    settings = driver.Settings(wanted, repeats, kind, layout, skip_above, limit)
    states = options.sizes("--sizes", sizes)
    for state in states:
        heads_of(state)

    def report(rows, thinned: int, where: str, found=None) -> None:
        summary = driver.summarise(rows)
        text = exchange_report.markdown(rows, summary, settings, thinned)
        values = {"facts": facts(where), "summary": summary, "settings": vars(settings), "rows": rows}
        draw = lambda figure: exchange_report.draw(figure, rows, wanted)  # noqa: E731
        paths = write_report(output, "exchange-virtual" if virtual else "exchange", values, text, draw, found)
        if found is None or found.is_first:
            click.echo("\n".join(text))
            click.echo(f"wrote {', '.join(map(str, paths))}")

    if virtual:
        _refuse_with_virtual(fabric=named)
        cells, thinned = driver.grid(
            options.counts("--hosts", hosts, 1, 16) if hosts else driver.HOSTS,
            options.counts("--ranks", ranks, 1, 16) if ranks != "default" else driver.RANKS,
            states,
            options.rates("--rates", rates) if rates else driver.RATES,
            max_cells,
        )
        rows = driver.virtual_sweep(cells, settings, click.echo)
        return report(rows, thinned, "virtual clusters: network namespaces, TCP, tc tbf, one thread per rank")
    _refuse_without_virtual(hosts=hosts, rates=rates)
    (size,) = options.counts("--ranks", "2" if ranks == "default" else ranks)
    known = None if named is None else Fabric.of(named)
    with found_ranks(size, device=device) as found:
        say = click.echo if found.is_first else lambda line: None
        report(driver.sweep_here(found, states, settings, say, known), 0, found.where, found)


@bench.command()
@click.option("--virtual", is_flag=True, help="Between hosts of a virtual cluster on this machine.")
@click.option("--hosts", help="Hosts of the virtual cluster; default: 2.")
@click.option("--rate", help="Rate of its links in bits per second; default: 400M.")
@_ranks("2", "Ranks to start on this machine; with --virtual: on each host.")
@click.option("--methods", help="Which to compare, by name; default: all there are.")
@click.option("--tokens", type=click.IntRange(1), default=4096, show_default=True, help="Of each rank.")
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True)
@click.option("--dim", type=click.IntRange(1), default=64, show_default=True, help="Of a head.")
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True)
@click.option("--fabric", "named", help="For auto and for slices; default: measured first.")
@_device
@_output
def layer(
    virtual: bool,
    hosts: str | None,
    rate: str | None,
    ranks: str,
    methods: str | None,
    tokens: int,
    heads: int,
    dim: int,
    repeats: int,
    named: str | None,
    device: str,
    output: Path,
) -> None:
    """Compare LASP-1, LASP-2, ZeCO, our exchanges, Ring Attention and Ulysses on one layer, and what they expose."""
    from lasp.cost.fabric import Fabric
    from lasp.launch.bench import layer as driver
    from lasp.launch.bench import options
    from lasp.launch.bench.baselines import methods as known_methods
    from lasp.launch.bench.fabric import as_dict, measure_fabric
    from lasp.launch.bench.ranks import found_ranks, virtual_ranks
    from lasp.launch.bench.results import facts, write_report
    from lasp.launch.bench.virtual_cluster import MAX_HOSTS, VirtualCluster

    (per_host,) = options.counts("--ranks", ranks)
    wanted = tuple(known_methods()) if methods is None else options.names("--methods", methods, known_methods())
    shape = {"tokens": tokens, "heads": heads, "dim": dim}
    known = None if named is None else Fabric.of(named)

    def measure(found) -> None:
        about = facts(found.where)
        fabric = known
        if fabric is None and found.size > 1:
            fabric, _ = measure_fabric(found, "measured here", "measured before the layers")
        rows = driver.compare(found, wanted, **shape, repeats=repeats, fabric=fabric)
        text = driver.markdown(rows, ranks=found.size, **shape)
        values = {"facts": about, **shape, "fabric": None if fabric is None else as_dict(fabric), "rows": rows}
        paths = write_report(
            output, "layer-virtual" if virtual else "layer", values, text, lambda f: driver.draw(f, rows), found
        )
        if found.is_first:
            click.echo("\n".join(text))
            click.echo(f"wrote {', '.join(map(str, paths))}")

    if virtual:
        (count,) = options.counts("--hosts", hosts or "2", 1, MAX_HOSTS)
        (bits,) = options.rates("--rate", rate or "400M")
        with VirtualCluster(count, bits) as cluster, virtual_ranks(cluster, per_host) as found:
            measure(found)
    else:
        _refuse_without_virtual(hosts=hosts, rate=rate)
        with found_ranks(per_host, device=device) as found:
            measure(found)


@bench.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--cp", type=int, help="Same as cp_size=N.")
@click.option("--dp", type=int, help="Same as dp_size=N.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Steps after one that warms up.")
@_output
def model(config: str, overrides: tuple[str, ...], cp: int | None, dp: int | None, repeats: int, output: Path) -> None:
    """Time training steps of CONFIG's model over made-up tokens, with the memory of a rank.

    A preset: lasp bench model configs/quickstart.yaml model=tiny data.seq_len=8192 --cp 2
    """
    from lasp.launch.bench import steps
    from lasp.launch.bench.ranks import joined_ranks
    from lasp.launch.bench.results import facts, table, write_report
    from lasp.launch.config.schema import load_config
    from lasp.launch.run.rendezvous import Job

    sizes = [f"{key}={value}" for key, value in (("cp_size", cp), ("dp_size", dp)) if value is not None]
    run = load_config(config, [*overrides, *sizes])

    def report(row, where: str, found=None) -> None:
        shown = [
            ("parameters", f"{row['parameters']:,}"),
            ("ranks", f"cp {run.cp_size} of {row['ranks']}"),
            ("tokens per step", f"{run.data.seq_len * run.data.batch_size:,}"),
            ("a step", f"{row['step_s']:.3f} s"),
            ("throughput", f"{row['tokens_per_s']:,.0f} tokens/s"),
            ("memory of the rank with most", f"{row['memory_bytes'] / 2**20:,.1f} MiB over an idle rank"),
            ("an idle rank, without libraries", f"{row['baseline_bytes'] / 2**20:,.1f} MiB"),
        ]
        text = ["# Training steps of one model", "", *table(("", ""), shown)]
        values = {"facts": facts(where), "config": run.plain(), "row": row}

        def draw(figure) -> None:
            axes = figure.add_subplot(xlabel="rank", ylabel="MiB over an idle rank")
            each = [memory / 2**20 for memory in row["memory_bytes_of_each"]]
            axes.bar(range(len(each)), each)
            axes.set_title(f"{row['tokens_per_s']:,.0f} tokens/s")

        paths = write_report(output, "model", values, text, draw, found)
        if found is None or found.is_first:
            click.echo("\n".join(text))
            click.echo(f"wrote {', '.join(map(str, paths))}")

    job = Job.from_environment()
    if job is None:
        row = steps.measure_here(run, repeats=repeats)
        return report(row, row["where"])
    with joined_ranks(job, device=run.device, timeout_s=run.timeout_s) as found:
        report(steps.measure(found, run, repeats=repeats), found.where, found)


@bench.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--sizes", default="1,2,4,8", show_default=True, help="Ranks that share a sequence.")
@click.option("--weak", default="4096", show_default=True, help="Tokens of each rank; a list, or none.")
@click.option("--strong", default="32768", show_default=True, help="Tokens of the sequence; a list, or none.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Steps after one that warms up.")
@click.option("--limit", type=click.FloatRange(0), default=1700.0, show_default=True, help="Seconds of the sweep.")
@_output
def scaling(
    config: str,
    overrides: tuple[str, ...],
    sizes: str,
    weak: str,
    strong: str,
    repeats: int,
    limit: float,
    output: Path,
) -> None:
    """Weak and strong scaling of CONFIG's training steps over ranks of this machine, with the memory of a rank.

    A million tokens on a CPU: lasp bench scaling configs/million.yaml --sizes 2,4,8 --weak 131072 --strong none
    """
    from lasp.launch.bench import options
    from lasp.launch.bench import scaling as driver
    from lasp.launch.bench.ranks import MAX_PROCESSES
    from lasp.launch.bench.results import facts, write_report
    from lasp.launch.config.schema import load_config
    from lasp.launch.run.rendezvous import Job

    if Job.from_environment() is not None:
        raise ValueError(
            "lasp bench scaling starts its ranks itself, fresh ones for each size. In a job that torchrun started, "
            "measure one size with lasp bench model."
        )
    run = load_config(config, list(overrides))
    tokens = [
        [] if text == "none" else options.counts(name, text) for name, text in (("--weak", weak), ("--strong", strong))
    ]
    wanted = driver.points(options.counts("--sizes", sizes, 1, MAX_PROCESSES), *tokens)
    about = facts("ranks of one machine, started anew for each row")
    rows = driver.sweep(run, wanted, repeats=repeats, limit_s=limit, say=click.echo)
    text = driver.markdown(rows)
    values = {"facts": about, "config": run.plain(), "rows": rows}
    paths = write_report(output, "scaling", values, text, lambda figure: driver.draw(figure, rows))
    click.echo("\n".join(text))
    click.echo(f"wrote {', '.join(map(str, paths))}")
