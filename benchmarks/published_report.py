"""Tables and plots of benchmarks/published.py: published figures beside the model, and predictions marked as such."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lasp.exchange import EXCHANGES

COLOURS = {
    "all_gather": "tab:red", "ring": "tab:brown", "all_scan": "tab:blue", "log_scan": "tab:orange",
    "hierarchical": "tab:green", "LASP-1": "tab:brown", "LASP-2": "tab:red", "ZeCO": "tab:blue", "no SP": "0.4",
}  # fmt: skip
OTHER_COLOURS = ("tab:purple", "tab:pink", "tab:olive", "tab:cyan")  # of exchanges that are not among them


def tables(result: dict) -> dict[str, str]:
    """Every table of the document, by the name in its marker."""
    settings = dict.fromkeys(row["setting"] for row in result["predicted_share"])
    return {
        "fabric": _fabric(result),
        "errors": _table(
            ("figures", "number", "median error", "largest error"),
            ([k, e["figures"], _percent(e["median"]), _percent(e["largest"])] for k, e in result["errors"].items()),
        ),
        "collective": _compared(result["collective"], "exchange", "{:.3f}"),
        "throughput": _compared(result["throughput"], "method", "{:.0f}"),
        "weak scaling": _weak_scaling(result["table_6"]),
        "table 6": _table_6(result["table_6"]),
        "predicted exchange": _table(
            ("GPUs", *EXCHANGES, "auto takes"),
            ([r["gpus"], *(f"{r[e]:.3f}" for e in EXCHANGES), r["auto"]] for r in result["predicted_exchange"]),
        ),
        **{f"predicted share, {setting}": _share(result, setting) for setting in settings},
        "sensitivity": _table(
            ("change", "median error, held out", "exchange at 256, ms", "at 1024, ms", "share kept at 256", "at 1024"),
            ([r["change"], _percent(r["held_out_median"]), f"{r['ms_256']:.3f}", f"{r['ms_1024']:.3f}",
              f"{100 * r['share_256']:.1f} %", f"{100 * r['share_1024']:.1f} %"] for r in result["sensitivity"]),
        ),
    }  # fmt: skip


def write_tables(result: dict, path: Path) -> None:
    """Put each table between its markers ``<!-- table NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: the document lacks a marker.
    """
    text = path.read_text(encoding="utf-8")
    for name, table in tables(result).items():
        marker = f"<!-- table {name} -->"
        if marker not in text:
            raise ValueError(f"{path} has no place for a table: add the lines {marker} and <!-- end -->.")
        start, rest = text.split(marker + "\n", 1)
        text = f"{start}{marker}\n{table}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    path.write_text(text, encoding="utf-8")


def plot(result: dict, folder: Path) -> None:
    """``published_exchange.png``, ``published_throughput.png``, ``predicted_share.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    _plot_exchange(result, folder / "published_exchange.png")
    _plot_throughput(result, folder / "published_throughput.png")
    _plot_share(result, folder / "predicted_share.png")


def _table(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _fabric(result: dict) -> str:
    fields = (
        ("latency within a node", "within_us", "us"),
        ("rate within a node, per GPU", "within_GB_per_s", "GB/s"),
        ("latency between nodes", "between_us", "us"),
        ("rate of one interface", "between_GB_per_s", "GB/s"),
        ("interfaces per node", "nics_per_node", ""),
        ("overhead per exchange", "overhead_us", "us"),
    )
    return _table(
        ("parameter", "h100-ib", "a100-ib"),
        ([name, *(f"{result[f][key]:.3g} {unit}".strip() for f in ("fabric", "a100"))] for name, key, unit in fields),
    )


def _compared(rows: list[dict], key: str, form: str) -> str:
    return _table(
        (key, "GPUs", "published", "model", "error", "use"),
        (
            [r[key], r["gpus"], *(form.format(r[k]) for k in ("published", "model")), _signed(r["error"]), r["use"]]
            for r in rows
        ),
    )


def _weak_scaling(rows: list[dict]) -> str:
    """The diagonal of table 6, per GPU."""
    diagonal = [r for r in rows if r["tokens"] == 16 * 1024 * r["gpus"]]
    per_gpu = [{**r, "published": r["published"] / r["gpus"], "model": r["model"] / r["gpus"]} for r in diagonal]
    return _compared([{**r, "sequence": f"{r['tokens'] // 1024}K"} for r in per_gpu], "sequence", "{:.0f}")


def _table_6(rows: list[dict]) -> str:
    cells = {(r["tokens"], r["gpus"]): r for r in rows}
    gpus = sorted({g for _, g in cells})

    def cell(tokens: int, n: int) -> str:
        if (tokens, n) not in cells:
            return "OOM"
        r = cells[tokens, n]
        return f"{r['published']:.0f} / {r['model']:.0f} ({_signed(r['error'])})"

    return _table(
        ("sequence", *(f"{n} GPUs" for n in gpus)),
        ([f"{t // 1024}K", *(cell(t, n) for n in gpus)] for t in sorted({t for t, _ in cells})),
    )


def _share(result: dict, setting: str) -> str:
    rows = [r for r in result["predicted_share"] if r["setting"] == setting]
    return _table(
        ("GPUs", *EXCHANGES, "auto"),
        ([r["gpus"], *(_percent(r[e]) for e in (*EXCHANGES, "auto"))] for r in rows),
    )


def _marks(axes, rows: list[dict], colour: str, label: str) -> None:
    """Published figures: full where they were fitted, hollow where held out."""
    for use, face in (("fitted", colour), ("held out", "none")):
        some = [r for r in rows if r["use"] == use]
        axes.plot([r["gpus"] for r in some], [r["published"] for r in some], "o", color=colour, markerfacecolor=face,
                  label=f"{label}, published, {use}")  # fmt: skip


def _axes(axes, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("GPUs (8 per node)")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _save(figure, axes, title: str, path: Path) -> None:
    """With the legend beside the plot, and no mark of the library's version in the file."""
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _colour(name: str) -> str:
    """Of an exchange."""
    others = [exchange for exchange in EXCHANGES if exchange not in COLOURS]
    return COLOURS[name] if name in COLOURS else OTHER_COLOURS[others.index(name) % len(OTHER_COLOURS)]


def _plot_exchange(result: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.2))
    predicted = result["predicted_exchange"]
    for name in EXCHANGES:
        published = [r for r in result["collective"] if r["exchange"] == name]
        style, label = ("-", f"{name}, model") if published else ("--", f"{name}, predicted")
        axes.plot([r["gpus"] for r in predicted], [r[name] for r in predicted], style, color=_colour(name), label=label)
        _marks(axes, published, _colour(name), name)
    axes.axhline(0.5, color="0.5", linewidth=0.8, linestyle=":", label="aim at 256 GPUs")
    axes.set_yscale("log")
    _axes(axes, "one exchange, ms")
    _save(figure, axes, "d = 4096, 32 heads, h100-ib: published (ZeCO) and model; beyond 256 GPUs all predicted", path)


def _plot_throughput(result: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for method in dict.fromkeys(r["method"] for r in result["throughput"]):
        rows = [r for r in result["throughput"] if r["method"] == method]
        _marks(axes, rows, COLOURS[method], method)
        model = [r["model"] for r in rows]
        axes.plot([r["gpus"] for r in rows], model, "-", color=COLOURS[method], label=f"{method}, model")
    axes.set_ylim(0)
    _axes(axes, "tokens/s/GPU")
    _save(figure, axes, "1B GLA, 32K tokens per GPU: published (ZeCO, H100) and model", path)


def _plot_share(result: dict, path: Path) -> None:
    """All exchanges, and once more close to the aims."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2))
    first, *others = dict.fromkeys(r["setting"] for r in result["predicted_share"])
    for axes in panels:
        for name in EXCHANGES:
            rows = [r for r in result["predicted_share"] if r["setting"] == first]
            share = [100 * r[name] for r in rows]
            axes.plot([r["gpus"] for r in rows], share, color=_colour(name), label=f"{name}, {first}")
        for setting, style in zip(others, ("--", ":"), strict=True):
            rows = [r for r in result["predicted_share"] if r["setting"] == setting]
            share = [100 * r["auto"] for r in rows]
            axes.plot([r["gpus"] for r in rows], share, style, color="tab:green", label=f"auto, {setting}")
        axes.plot((256, 1024), (97, 95), "k+", markersize=10, label="aims")
        _axes(axes, "")
    panels[0].set_ylabel("speed kept of a run without sequence parallelism, %")
    panels[0].set_ylim(0, 102)
    panels[1].set_ylim(93, 100)
    _save(figure, panels[1], "predicted: 1B GLA, 32K tokens per GPU, h100-ib", path)
