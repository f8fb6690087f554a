"""Measure what h-injection moves, factor by factor, where the truth is known (Jeong et al. 2024, figure 7).

    python examples/shapes/measure.py runs/shapes/reader.safetensors out/shapes

Inverts held-out content and style pictures, injects, reads the factors of every result, and writes injection.csv,
table.md, curves.png (with matplotlib) and pairs.png.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import reader
import torch
import world
from diaphane.methods.blend import BLENDS
from diaphane.methods.diffstyle import Content, diffstyle
from diaphane.methods.taps import invert
from diaphane.model.blocks import ThreeLists
from diaphane.model.load import build
from diaphane.samplers.inversion import last
from diaphane.samplers.path import papers
from diaphane.samplers.schedule import linear
from diaphane.weights.load import load
from torch import Tensor
from tqdm import tqdm

GAMMAS = (0.2, 0.4, 0.6, 0.8, 1.0)  # and 0, the style picture regenerated, which is the same for all
NEAR = 0.12  # two places are the same within about two pixels


def follows(name: str, read: reader.Reading, content: reader.Reading, style: reader.Reading) -> tuple[float, float]:
    """Shares of pictures whose factor is the content's and the style's, where the two differ; (nan, nan) if none do."""
    a, b, result = (getattr(source, name) for source in (content, style, read))
    if name == "place":
        to_a, to_b = (result - a).norm(dim=1), (result - b).norm(dim=1)
        differ = (a - b).norm(dim=1) > 2 * NEAR
        is_a, is_b = to_a < NEAR, to_b < NEAR
    else:
        choice = result.argmax(1)
        differ = a != b
        is_a, is_b = choice == a, choice == b
    return is_a[differ].float().mean().item(), is_b[differ].float().mean().item()


def distance(name: str, read: reader.Reading, other: reader.Reading) -> float:
    """Mean distance of a continuous factor to another picture's: RGB in [0, 1], or the light's unit vector."""
    return (getattr(read, name) - getattr(other, name)).norm(dim=1).mean().item()


def row(read: reader.Reading, content: reader.Reading, style: reader.Reading) -> dict[str, float]:
    """All factors of a batch of results."""
    out = {}
    for name in ("kind", "place", "pattern", "texture"):
        out[f"{name}_content"], out[f"{name}_style"] = follows(name, read, content, style)
    for name in ("solid", "ground", "light"):
        out[f"{name}_to_content"], out[f"{name}_to_style"] = distance(name, read, content), distance(name, read, style)
    return out


@torch.no_grad()
def runs(
    unet: ThreeLists, contents: Tensor, styles: Tensor, blends: list[str], gammas: list[float], steps: int
) -> Iterator[tuple[str, float, float, Tensor]]:
    """Every blend, with and without calibration, over gamma; t_edit 400, no boosting.  Yields the pictures."""
    schedule, path = linear(), papers(steps)
    style, content = (invert(unet, x, schedule, path, watch=tqdm) for x in (styles, contents))

    def injected(blend: str, omega: float, gamma: float) -> Tensor:
        content_h = [Content(content.h, gamma)]
        walk = diffstyle(unet, style.x_T, content_h, schedule, path, blend=BLENDS[blend], omega=omega, t_boost=0)
        return last(walk).x

    plain = injected("slerp", 0.0, 0.0)
    settings = [(b, w, g) for b in blends for w in (0.0, 0.3) for g in (gammas if b != "replacement" else (1.0,))]
    for blend, omega, gamma in tqdm(settings, desc="injecting"):
        if gamma == gammas[0]:
            yield blend, omega, 0.0, plain
        yield blend, omega, gamma, injected(blend, omega, gamma)


def table(rows: list[dict]) -> str:
    """The rows that matter most, as Markdown."""
    head = ["blend", "ω", "γ", "kind", "place", "pattern", "texture", "object colour", "ground colour"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        shares = [f"{r[k + '_content']:.2f} / {r[k + '_style']:.2f}" for k in ("kind", "place", "pattern", "texture")]
        colours = [f"{r[k + '_to_content']:.2f} / {r[k + '_to_style']:.2f}" for k in ("solid", "ground")]
        lines.append("| " + " | ".join([r["blend"], f"{r['omega']:g}", f"{r['gamma']:g}", *shares, *colours]) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], file: Path) -> None:
    """Shares and distances over gamma, one panel a factor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = ["kind_content", "place_content", "pattern_content", "texture_style", "solid_to_style", "ground_to_style"]
    titles = ["object kind is the content's", "place is the content's", "ground pattern is the content's"]
    titles += ["texture is the style's", "object colour, distance to style", "ground colour, distance to style"]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), sharex=True)
    for axis, key, title in zip(axes.flat, panels, titles, strict=True):
        for i, blend in enumerate(dict.fromkeys(r["blend"] for r in rows if r["blend"] != "replacement")):
            for omega, line in ((0.0, "-"), (0.3, "--")):
                chosen = [r for r in rows if r["blend"] == blend and r["omega"] == omega]
                label = f"{blend}, {'calibrated' if omega else 'plain'}"
                axis.plot([r["gamma"] for r in chosen], [r[key] for r in chosen], line, color=f"C{i}", label=label)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("γ")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="shapes", help="an embedded name or a path (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--blends", nargs="+", choices=list(BLENDS), default=list(BLENDS))
    parser.add_argument(
        "--gammas", type=float, nargs="+", default=list(GAMMAS), help="besides 0 (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=10**6, help="of the held-out pictures")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)

    network = load(args.model)
    unet = build(network.family, network.config, network.tensors, dtype=torch.float32).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(args.seed)
    scenes = world.sample(args.pairs, generator), world.sample(args.pairs, generator)
    contents, styles = (world.render(scene) for scene in scenes)
    content, style = (reader.truth(scene) for scene in scenes)
    read = reader.load(args.reader)

    rows, strips = [], [contents[:12], styles[:12]]
    for name, omega, gamma, pictures in runs(unet, contents, styles, args.blends, args.gammas, args.steps):
        found = row(read(pictures.clamp(-1, 1)), content, style)
        rows.append({"blend": name, "omega": omega, "gamma": gamma, **found})
        if name == "slerp":
            strips.append(pictures[:12])
    with (args.folder / "injection.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (args.folder / "table.md").write_text(table(rows))
    world.sheet(torch.cat(strips), 12).save(args.folder / "pairs.png")
    plot(rows, args.folder / "curves.png")
    print(table(rows))
    print(f"wrote {args.folder}/injection.csv, table.md, pairs.png, curves.png")


if __name__ == "__main__":
    main()
