"""Write the tables of README.md (between its markers) and energy.png from results.json. The picture needs matplotlib.

python experiments/energy/report.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ACCOUNTINGS = {
    "as_published": "as published",
    "like_for_like": "like for like",
    "equal_32": "all 32 bits",
    "equal_8": "all 8 bits",
}
COMPONENTS = ("compute", "register", "noc", "sram", "dram")
CONVERTED = ("EcoFormer-style", "ShiftAddViT", "ShiftAddViT, MLPs shift", "vitrify")
FORMATS = ("FP32 multiply", "BF16 multiply", "FP8 multiply", "INT8 multiply")
PRIMITIVES = ("INT32 shift", "INT8 shift", "INT32 add", "INT8 add")

Forms = dict[str, dict[str, Any]]


def main() -> None:
    """Rewrite the tables and the picture."""
    models: dict[str, Forms] = json.loads((HERE / "results.json").read_text())["models"]
    readme = HERE / "README.md"
    text = readme.read_text()
    for name, table in (
        ("published", published(models)),
        ("repaired", repaired(models)),
        ("energies", energies(models)),
        ("formats", formats(models)),
    ):
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, table=table: found[1] + table + found[2],
            text,
            flags=re.S,
        )
        if count != 1:
            raise SystemExit(f"README.md needs one table marked {name}")
    readme.write_text(text)
    draw(models, HERE / "energy.png")


def published(models: dict[str, Forms]) -> str:
    """Savings in the authors' accounting, by baseline."""
    baselines = ("softmax", "softmax, reduction removed", "EcoFormer-style")
    header = ["model", "what became of it", *(f"against {name}" for name in baselines)]
    return table(
        header,
        (
            [title, form, *(saving(published_mj(forms, form), published_mj(forms, baseline)) for baseline in baselines)]
            for title, forms in models.items()
            for form in ("ShiftAddViT", "ShiftAddViT, MLPs shift")
        ),
    )


def repaired(models: dict[str, Forms]) -> str:
    """What is left of the saving against softmax as assumptions are taken back, beside plain INT8 multiplication."""
    header = [
        "model",
        "what became of it",
        "as published",
        "shift data in 32 bits",
        "and adds pay for memory",
        "like for like, own widths",
        "all 32 bits",
        "all 8 bits",
        "shift and add alone",
        "softmax, INT8 multiplied: as published",
        "like for like",
    ]
    rows = []
    for title, forms in models.items():
        before = forms["softmax"]["energy"]
        plain = (
            saving(forms["softmax"]["contenders"]["as_published"]["INT8 multiply"], before["as_published"]["total_mj"]),
            saving(before["equal_8"]["total_mj"], before["like_for_like"]["total_mj"]),
        )
        for form in ("ShiftAddViT", "ShiftAddViT, MLPs shift"):
            after, made = forms[form]["energy"], forms[form]["contenders"]["like_for_like"]
            base = before["as_published"]["total_mj"]
            rows.append(
                [
                    title,
                    form,
                    saving(after["as_published"]["total_mj"], base),
                    *(saving(step, base) for step in forms[form]["published_repaired"].values()),
                    *(
                        saving(after[name]["total_mj"], before[name]["total_mj"])
                        for name in ("like_for_like", "equal_32", "equal_8")
                    ),
                    saving(made["as built"], made["as built, multiplied"]),
                    *plain,
                ]
            )
    return table(header, rows)


def energies(models: dict[str, Forms]) -> str:
    """MJ of every form under every accounting."""
    return table(
        [
            "model",
            "what became of it",
            "products, M",
            "shift, %",
            "add, %",
            *(f"{a}, mJ" for a in ACCOUNTINGS.values()),
        ],
        (
            [
                title,
                form,
                f"{found['macs'] / 1e6:,.0f}",
                *(f"{100 * found[primitive] / found['macs']:.0f}" for primitive in ("shift", "add")),
                *("-" if blind(form, name) else f"{found['energy'][name]['total_mj']:.1f}" for name in ACCOUNTINGS),
            ]
            for title, forms in models.items()
            for form, found in forms.items()
            # DeiT has no reduction to remove.
            if not ("removed" in form and title.startswith("DeiT"))
        ),
    )


def formats(models: dict[str, Forms]) -> str:
    """MJ of the original's products, all of them made by one contender."""
    names = (*FORMATS, *PRIMITIVES)
    return table(
        ["model", "accounting", *names],
        (
            [title, ACCOUNTINGS[preset], *(f"{forms['softmax']['contenders'][preset][name]:.1f}" for name in names)]
            for title, forms in models.items()
            for preset in ("as_published", "like_for_like")
        ),
    )


def blind(form: str, accounting: str) -> bool:
    """Say whether the accounting charges the form as if it were softmax: the published one knows no INT8 layers."""
    return form == "softmax, INT8 linears" and accounting == "as_published"


def published_mj(forms: Forms, form: str) -> float:
    """Return the energy in the authors' accounting."""
    return float(forms[form]["energy"]["as_published"]["total_mj"])


def saving(energy: float, baseline: float) -> str:
    """Return the part saved in per cent; negative where it costs more."""
    return f"{100 * (1 - energy / baseline):.1f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(models: dict[str, Forms], path: Path) -> None:
    """Draw the energy of each form by component, relative to softmax in the same accounting."""
    from matplotlib import pyplot  # noqa: PLC0415  # only here, so that the tables need no matplotlib

    titles = [title for title in models if "class token" not in title]
    forms = ("softmax", *CONVERTED)
    figure, axes = pyplot.subplots(
        2, len(titles), figsize=(3 * len(titles), 6.5), sharey=True, layout="constrained", squeeze=False
    )
    for row, preset in zip(axes, ("as_published", "like_for_like"), strict=True):
        for axis, title in zip(row, titles, strict=True):
            found = models[title]
            whole = found["softmax"]["energy"][preset]["total_mj"]
            below = [0.0] * len(forms)
            for component in COMPONENTS:
                heights = [found[form]["energy"][preset][f"{component}_mj"] / whole for form in forms]
                axis.bar(forms, heights, bottom=below, label=component, width=0.75)
                below = [low + height for low, height in zip(below, heights, strict=True)]
            eight = (
                found["softmax"]["contenders"][preset]["INT8 multiply"]
                if preset == "as_published"
                else found["softmax"]["energy"]["equal_8"]["total_mj"]
            )
            axis.axhline(eight / whole, color="black", linestyle="--", label="softmax, INT8 multiplied")
            axis.set_title(f"{title}, {ACCOUNTINGS[preset]}\nsoftmax: {whole:.0f} mJ", fontsize=10)
            axis.tick_params(axis="x", rotation=90)
    for row in axes:
        row[0].set_ylabel("energy, softmax = 1")
    for axis in axes[0]:
        axis.set_xticklabels([])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
