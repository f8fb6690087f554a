"""A roofline of measured rows (Williams et al. 2009): FLOP a byte across, FLOP a second along, both logarithmic."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..kernels.contests import OURS

Rows = Sequence[Mapping[str, Any]]


def points(rows: Rows) -> list[tuple[str, str, float, float]]:
    """(way, "kernel case", FLOP / B, TFLOP/s) of the timed rows that compute; cells may be text, as in a file."""
    timed = [row for row in rows if row.get("ms") not in ("", None) and float(row["gflop"]) > 0]
    return [
        (row["way"], f"{row['kernel']} {row['case']}", float(row["gflop"]) / float(row["gb"]), float(row["tflops"]))
        for row in timed
    ]


def drawn(rows: Rows, kind: str) -> bytes:
    """The picture as png, svg or pdf.  ValueError: nothing was timed."""
    from matplotlib.figure import Figure

    found = points(rows)
    if not found:
        raise ValueError("there is nothing to draw: no row was timed")
    copy, products = float(rows[0]["ceiling_gbps"]) / 1e3, float(rows[0]["ceiling_tflops"])
    low, high = min(p[2] for p in found) / 2, max(max(p[2] for p in found) * 2, products / copy * 2)
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.add_subplot()
    knee = products / copy
    axes.plot([low, knee], [low * copy, products], color="black", label=f"copy {copy * 1e3:.4g} GB/s")
    axes.plot([knee, high], [products] * 2, color="black", label=f"products {products:.3g} TFLOP/s")
    for each, rate in exponentials(rows).items():
        axes.plot([knee, high], [rate] * 2, color="black", linestyle=":", label=f"exponentials, {each:.4g} FLOP each")
    for way in dict.fromkeys(p[0] for p in found):
        xs, ys = [p[2] for p in found if p[0] == way], [p[3] for p in found if p[0] == way]
        ours = way == OURS
        axes.scatter(xs, ys, s=130 if ours else 28, marker="*" if ours else "o", zorder=3 if ours else 2, label=way)
    tops: dict[str, tuple[float, float]] = {}
    for _, case, x, y in found:
        tops[case] = (x, max(y, tops.get(case, (x, y))[1]))
    for case, (x, y) in tops.items():
        axes.annotate(case, (x, y), xytext=(0, 7), textcoords="offset points", fontsize=6, rotation=45)
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOP / byte", ylabel="TFLOP/s")
    axes.set_title(f"{rows[0]['device']}, {rows[0]['dtype']}, {rows[0]['date']}", fontsize=9)
    axes.grid(which="both", alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=7)
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=150)
    return out.getvalue()


def exponentials(rows: Rows) -> dict[float, float]:
    """FLOP to an exponential -> the TFLOP/s that the exponential unit allows, where it was measured."""
    timed = [row for row in rows if row["gexp"] not in ("", None) and float(row["gexp"]) > 0]
    each = sorted({round(float(row["gflop"]) / float(row["gexp"]), 1) for row in timed})
    return {n: n * float(rows[0]["ceiling_texps"]) for n in each if rows[0]["ceiling_texps"] not in ("", None)}
