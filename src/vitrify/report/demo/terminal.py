"""The demo's numbers for the terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from vitrify.bench.table import milliseconds
from vitrify.report.demo.results import SMALL, Results


def summary(results: Results) -> Group:
    """Return what to print at the end: two tables that fit 80 columns, and what they were measured on."""
    return Group(_gains(results), _latencies(results), *_notes(results))


def _gains(results: Results) -> Table:
    table = Table(title="before and after", title_justify="left")
    for name in ("", "softmax", "Taylor", "ratio"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    before, zero_shot, after = (f"{accuracy.percent:.1f} %" for accuracy in results.accuracies.values())
    table.add_row("accuracy, converted", before, zero_shot, "")
    table.add_row("accuracy, fine-tuned", before, f"[bold]{after}[/]", "")
    softmax_m, taylor_m = (results.multiplications[name] / 1e6 for name in ("softmax", "taylor"))
    table.add_row(
        "attention multiplications", f"{softmax_m:.1f} M", f"{taylor_m:.1f} M", f"{softmax_m / taylor_m:.1f}x fewer"
    )
    last = results.points[-1]
    taylor_mib = last.memory_mib["taylor"]
    for kind, label in (("softmax", "fused"), ("unfused", "unfused")):
        mib = last.memory_mib[kind]
        name = f"memory of a core, {last.tokens:,} tokens, {label}"
        table.add_row(name, f"{mib:.1f} MiB", f"{taylor_mib:.1f} MiB", f"{mib / taylor_mib:.1f}x")
    return table


def _latencies(results: Results) -> Table:
    table = Table(title="latency, ms, batch 1 (softmax in PyTorch's fused kernel)", title_justify="left")
    table.add_column("tokens", justify="right")
    for part in ("core", "model"):
        for name in ("softmax", "Taylor", "ratio"):
            table.add_column(f"{part}\n{name}", justify="right", no_wrap=True)
    table.add_column("model is", no_wrap=True)
    for point in results.points:
        cells = [f"{point.tokens:,}"]
        for softmax, taylor, speed in (
            (point.core_softmax, point.core_taylor, point.core_speedup),
            (point.model_softmax, point.model_taylor, point.model_speedup),
        ):
            cells += [milliseconds(softmax.median_ms), milliseconds(taylor.median_ms), f"{speed.ratio:.2f}x"]
        table.add_row(*cells, point.model_speedup.verdict)
    return table


def _shift_and_mix(results: Results) -> list[str]:
    mixed = results.shift_add
    zero_shot, tuned = (mixed.accuracies[name].percent for name in ("zero-shot", "fine-tuned"))
    shares = ", ".join(f"{100 * layer.share:.0f}" for layer in mixed.layers.values())
    target = next(iter(mixed.layers.values())).target
    return [
        f"Shift, add, mix (recipe vitrify): {zero_shot:.1f} % converted, [bold]{tuned:.1f} %[/] tuned for "
        f"{mixed.training_seconds:.0f} s.",
        f"Tokens multiplied, by MLP: {shares} % (wanted {100 * target:.0f} %); {mixed.speedup.ratio:.2f}x, "
        f"{mixed.speedup.verdict}.",
    ]


def _notes(results: Results) -> list[str]:
    margin = max(accuracy.margin for accuracy in results.accuracies.values())
    return [
        *_shift_and_mix(results),
        SMALL,
        f"Accuracy is good to ±{margin:.1f} points (95 %). Fine-tuned for {results.training_seconds:.0f} s.",
        *(f"Data: {source}" for source in results.data),
        f"Machine: {results.machine}",
    ]
