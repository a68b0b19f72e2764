"""The demo's numbers for the terminal."""

from __future__ import annotations

from rich.table import Table

from vitrify.report.demo.results import SMALL, Results


def summary(results: Results) -> Table:
    """Return the numbers for the terminal."""
    first, last = results.points[0], results.points[-1]
    table = Table(title="what it cost, and what it gained", caption=_caption(results), caption_justify="left")
    for name in ("", "softmax", "Taylor", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    before, zero_shot, after = results.accuracies.values()
    table.add_row("accuracy, zero-shot", f"{before.percent:.1f} %", f"{zero_shot.percent:.1f} %", "")
    table.add_row("accuracy, fine-tuned", f"{before.percent:.1f} %", f"[bold]{after.percent:.1f} %[/]", "")
    softmax_m, taylor_m = (results.multiplications[name] / 1e6 for name in ("softmax", "taylor"))
    ratio = f"{softmax_m / taylor_m:.1f}x fewer"
    table.add_row("multiplications in attention, per image", f"{softmax_m:.2f} M", f"{taylor_m:.2f} M", ratio)
    for point in (first, last):
        memory = point.memory_mib
        table.add_row(
            f"peak memory of a core, {point.tokens:,} tokens",
            f"{memory['softmax']:.2f} MiB ({memory['unfused']:.1f} unfused)",
            f"{memory['taylor']:.2f} MiB",
            f"{memory['softmax'] / memory['taylor']:.1f}x ({memory['unfused'] / memory['taylor']:.0f}x)",
        )
    for point in results.points:
        for name in ("core", "model"):
            speed = getattr(point, f"{name}_speedup")
            table.add_row(
                f"{'attention core' if name == 'core' else 'whole model'}, {point.tokens:,} tokens",
                f"{getattr(point, f'{name}_softmax').median_ms:.3g} ms",
                f"{getattr(point, f'{name}_taylor').median_ms:.3g} ms",
                f"{speed.ratio:.2f}x, {speed.verdict}",
            )
    return table


def _caption(results: Results) -> str:
    margin = max(accuracy.margin for accuracy in results.accuracies.values())
    return (
        f"{SMALL}\nAccuracy is good to ±{margin:.1f} points (95 %). Data: {'; '.join(results.data)}.\n"
        f"Fine-tuned for {results.training_seconds:.0f} s. {results.machine}"
    )
