"""A tiny random network of each kind in float64, with two images inverted into it, for the tests of the methods."""

from dataclasses import dataclass, field
from functools import partial

import torch
from diaphane.methods.asyrp import asyrp
from diaphane.methods.diffstyle import Content, diffstyle
from diaphane.methods.taps import Embed, Inverted, invert
from diaphane.model.adm import ADM, ADMConfig
from diaphane.model.blocks import Cond, ThreeLists, denoiser
from diaphane.model.ddpm import DDPM, DDPMConfig
from diaphane.samplers.ddim import Step, ddim
from diaphane.samplers.path import papers
from diaphane.samplers.schedule import linear
from torch import Tensor

SCHEDULE, PATH = linear(), papers(6)  # 999, 799, 599, 399, 199, 0, -1
NEVER = 10_000
TINY_ADM = ADMConfig(resolution=8, base=32, mult=(1, 1), blocks=1, attention=(4,), head_dim=16)
LABELLED = ADMConfig(resolution=8, base=32, mult=(1, 1), blocks=1, attention=(4,), head_dim=16, classes=5, updown=False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass
class World:
    """A network with two images inverted into it, and what was called."""

    unet: ThreeLists
    embed: Embed | None
    content: Inverted = field(init=False)
    style: Inverted = field(init=False)
    calls: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.content = invert(self.unet, random(2, 3, 8, 8).tanh(), SCHEDULE, PATH, embed=self.embed)
        self.style = invert(self.unet, random(2, 3, 8, 8, seed=1).tanh(), SCHEDULE, PATH, embed=self.embed)
        self.unet.enc[0].register_forward_hook(lambda *_: self.calls.append("enc"))
        self.unet.conv_out.register_forward_hook(lambda *_: self.calls.append("dec"))

    def plain(self, **settings) -> list[Step]:
        return list(ddim(denoiser(self.unet, self.embed), self.style.x_T, SCHEDULE, PATH, **settings))

    def diffstyle(self, gamma: float = 0.3, mask: Tensor | None = None, **settings) -> list[Step]:
        """Without calibration and boosting, unless asked for."""
        contents = [Content(self.content.h, gamma, mask)]
        settings = {"omega": 0.0, "t_boost": 0, "embed": self.embed} | settings
        return list(diffstyle(self.unet, self.style.x_T, contents, SCHEDULE, PATH, **settings))

    def asyrp(self, edit, **settings) -> list[Step]:
        settings = {"embed": self.embed} | settings
        return list(asyrp(self.unet, self.style.x_T, SCHEDULE, PATH, edit, **settings))


KINDS = ("ddpm", "learned sigma", "classes")


def world_of(kind: str) -> World:
    torch.manual_seed(3)
    unet: ThreeLists
    if kind == "ddpm":
        unet = DDPM(DDPMConfig(resolution=8, base=16, mult=(1, 2), blocks=1, attention=(4,), groups=8))
    else:
        unet = ADM(TINY_ADM if kind == "learned sigma" else LABELLED)
    unet = unet.double().eval().requires_grad_(False)
    return World(unet, partial(unet.embed, label=torch.tensor([1, 4])) if kind == "classes" else None)


def equal(a: list[Step], b: list[Step]):
    """Every tensor of every step, bit for bit."""
    for one, other in zip(a, b, strict=True):
        assert (one.t, one.s) == (other.t, other.s)
        assert all(torch.equal(one[i], other[i]) for i in (2, 3, 4))


def same(a: Tensor, b: Tensor, tolerance: float = 1e-9):
    torch.testing.assert_close(a, b, atol=tolerance * max(1.0, float(b.detach().abs().max())), rtol=0)


def apart(a: list[Step], b: list[Step]) -> float:
    return float((a[-1].x - b[-1].x).abs().max())


def push(h: Tensor, t: int, c: Cond) -> Tensor:
    """An edit that is felt."""
    return h + 0.5 * h.roll(1, 1)
