"""A ConsiStory set with an image prompt by the Triton kernels in Triton's interpreter, in a process of its own."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diaphane.kernels import (
    adain,
    builds,
    compact,
    compact_triton,
    device,
    masked_maps,
    masked_maps_triton,
    match,
    match_triton,
    source_attention,
    source_attention_triton,
)
from diaphane.methods.instant_style import ImagePrompt, Term, instant_style
from diaphane.methods.prompt import Prompt
from diaphane.methods.scene import Scene, Settings
from diaphane.methods.story import Story
from diaphane.methods.subject_masks import Seeded
from diaphane.model.ops import TORCH, Ops, Site
from diaphane.model.unet import UNet, UNetConfig
from diaphane.samplers.ddim import ddim
from diaphane.samplers.schedule import scaled_linear
from torch import Tensor

CFG = UNetConfig(
    channels=(16, 32), depth=(1, 1), mid_depth=1, blocks=1, head_dim=16, context_dim=12, pooled_dim=None, groups=8
)
PATH, PICTURES = [981, 781, 261, 0], 2
SETTINGS = Settings(inject=(781, 781))
SEEN = Site("dec.0", 0, "cross")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pictured(ops: Ops, dtype: torch.dtype) -> Ops:
    """Verbs with an image prompt at one site."""
    k, v = (random(2 * PICTURES, 4, CFG.channels[-1], seed=seed).to(dtype) for seed in (5, 6))
    return instant_style(ops, [ImagePrompt(batch=PICTURES, terms={SEEN: Term(k, v, 0.7)})])


def drawn(net: UNet, dtype: torch.dtype, way: str) -> Tensor:
    """The latents of a set, computed in one type."""
    unet = copy.deepcopy(net).to(dtype)
    prompts = Prompt(random(PICTURES, 5, 12, seed=1).to(dtype), None)
    scene = Scene(
        unet=unet, positive=prompts, negative=prompts.zeros(), tokens=torch.tensor([[1], [2]]),
        schedule=scaled_linear(), guidance=3.0, ops=pictured(TORCH, dtype) if way == "image prompt" else TORCH,
    )  # fmt: skip
    settings = replace(SETTINGS, attend=False, inject=None) if way == "plain" else SETTINGS
    start = random(PICTURES, 4, 8, 8, seed=3).to(dtype)
    story = Story(scene, lambda: ddim, start, PATH, settings, draws=Seeded([0, 1]))
    for _ in story.steps():
        pass
    return story.x


def launching(launched: set[str]) -> Callable[..., None]:
    """A launch that writes down which kernel it was."""

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.add(kernel.fn.__name__)
        builds.launch(kernel, *args, **kwargs)

    return launch


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = UNet(CFG).double().eval()
    ways = ("alone", "image prompt")
    want = {way: drawn(net, torch.float64, way) for way in ways}
    plain, torches = drawn(net, torch.float64, "plain"), {way: drawn(net, torch.float32, way) for way in ways}
    wide = {"takes_triton": lambda x, *limits: x.dtype in (*device.SINGLE, torch.bool)}
    for module in (source_attention, adain, masked_maps, compact):
        vars(module).update(wide)
    match.on_nvidia = wide["takes_triton"]
    launched: set[str] = set()
    for module in (source_attention_triton, masked_maps_triton, match_triton, compact_triton):
        vars(module).update(launch=launching(launched))
    assert source_attention_triton.INTERPRETED
    for way in ways:
        got = drawn(net, torch.float32, way)
        errors = {kind: float((y - want[way]).abs().max()) for kind, y in (("triton", got), ("torch", torches[way]))}
        moved = float((want[way] - plain).abs().max())
        print(json.dumps({"way": way, "moved": moved, "launched": sorted(launched), **errors}), flush=True)


if __name__ == "__main__":
    main()
