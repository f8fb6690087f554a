"""A tiny set of pictures in float64: a random UNet of SDXL's kind, prompts, and walks."""

from typing import Any

import torch
from diaphane.methods.prompt import Prompt
from diaphane.methods.scene import Scene, Settings, by_steps
from diaphane.methods.story import Story
from diaphane.methods.subject_masks import Seeded
from diaphane.model.unet import UNet, UNetConfig
from diaphane.samplers.ddim import ddim
from diaphane.samplers.path import leading
from diaphane.samplers.schedule import scaled_linear
from torch import Tensor

from . import latent_twins as twins

SMALL = UNetConfig(
    channels=(8, 16, 24),
    depth=(0, 1, 1),
    mid_depth=1,
    head_dim=8,
    context_dim=12,
    pooled_dim=10,
    id_dim=6,
    groups=4,
    blocks=1,
)
SCHEDULE, STEPS, SIZE = scaled_linear(), 12, (8, 12)
PATH = leading(STEPS, offset=1, end=0)
SETTINGS = by_steps(Settings(), PATH)  # one call blends, four inject
F64 = torch.float64


def net(cfg: UNetConfig = SMALL, seed: int = 7) -> UNet:
    """A UNet with random weights, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = UNet(cfg).double().eval().requires_grad_(False)
        twins.randomised(made, 0.6)
    return made


UNET = net()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def scene(rows: slice = slice(0, 3), images: int = 5, **more: Any) -> Scene:
    """Some of five pictures; each has the rows that it has in any set."""
    n = len(range(images)[rows])
    text, pooled = random(images, 7, SMALL.context_dim, seed=1), random(images, SMALL.pooled_dim or 0, seed=2)
    positive = Prompt(text[rows], pooled[rows])
    words = torch.tensor([[2, 4], [3, -1], [-1, 5], [1, 2], [4, -1]])[rows]
    told = {"negative": positive.zeros(), "ids": torch.full((n, 6), 64.0), "guidance": 3.0} | more
    return Scene(unet=UNET, positive=positive, tokens=words, schedule=SCHEDULE, **told)


def noise(rows: slice = slice(0, 3), size: tuple[int, int] = SIZE) -> Tensor:
    return random(5, 4, *size, seed=3)[rows]


def drawn(rows: slice = slice(0, 3)) -> Seeded:
    return Seeded(range(5)[rows])


def story(rows: slice = slice(0, 3), settings: Settings = SETTINGS, path: Any = PATH, **more: Any) -> Story:
    """A story of some of the pictures that is not yet walked."""
    told = {"walks": lambda: ddim, "x": noise(rows), "draws": drawn(rows)} | more
    set_of = told.pop("scene", None) or scene(rows)
    return Story(set_of, told.pop("walks"), told.pop("x"), path, settings, **told)


def walked(made: Story) -> Tensor:
    """A story to its end: the latents."""
    for _ in made.steps():
        pass
    return made.x
