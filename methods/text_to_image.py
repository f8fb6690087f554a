"""Text to image, image to image and inpainting with latent UNets: what goes into a walk, and what comes out.

Every walk of `samplers` takes (denoise, x, schedule, path) and yields Steps; here `ddim` stands for any of them, and
`denoise` for `denoiser(unet, positive, negative, schedule=schedule, ids=ids)`.

    text to image   ddim(denoise, pure_noise(parts, seeded(seeds), size), schedule, path)
    image to image  path = tail(path, strength); ddim(denoise, noised(x0, z, schedule(path[0])), schedule, path)
    inpainting      repainted(ddim, denoise, x, schedule, path, x0, z, mask) with any UNet, or with one of 9 channels
                    ddim(denoiser(..., canvas=canvas(mask, masked)), x, schedule, path)
    refiner         high, low = handoff(path, 0.2); the base walks `high`, the refiner goes on along `low`
    h and skips     tapped(unet, x, schedule, path, embed=conditioning(unet, prompt, ids)), as with pixel networks
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.components import Components
from ..model.ops import TORCH, Ops
from ..model.tiling import tiled_decode
from ..model.unet import UNet
from ..model.vae import VAE
from ..samplers.ddim import Step, Steps
from ..samplers.guidance import Interval, guided
from ..samplers.noise import Noise
from ..samplers.parameterisation import Denoise, Prediction, as_eps, noised, whole
from ..samplers.schedule import Schedule
from .controlnet import Control, predicting
from .prompt import Prompt, beside

Walk = Callable[[Denoise, Tensor, Schedule, Sequence[float]], Steps]
Time = TypeVar("Time", bound=float)


def denoiser(
    unet: UNet,
    positive: Prompt,
    negative: Prompt | None = None,
    *,
    schedule: Schedule,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    prediction: Prediction = "eps",
    guidance: float | Tensor = 5.0,
    rescale: float = 0.0,
    interval: Interval | None = None,
    controls: Sequence[Control] = (),
    canvas: Tensor | None = None,
    whole_times: bool = False,
    ops: Ops = TORCH,
    control_ops: Ops = TORCH,
) -> Denoise:
    """(x (B, 4, H, W), t (B,)) -> eps, guided away from `negative`; without it, or at guidance 1, not guided.

    Prompts, ids (and negative ids, by default the same) have B rows; guidance may be (B,).  `ops` hears of 2B rows
    where guidance doubles the batch, the negative ones first (`samplers.guidance`).  With `whole_times` the networks
    are told the nearest whole timestep (`samplers.parameterisation.whole`).
    """

    def predict(prompt: Prompt, sizes: Tensor | None) -> Denoise:
        found = predicting(unet, prompt, sizes, controls=controls, canvas=canvas, ops=ops, control_ops=control_ops)
        return whole(found) if whole_times else found

    alone = predict(positive, ids)
    if negative is None:
        return as_eps(alone, schedule, prediction)
    two = None if ids is None else torch.cat([ids if negative_ids is None else negative_ids, ids])
    both = predict(beside(negative, positive), two)
    return as_eps(guided(both, alone, guidance, rescale=rescale, interval=interval), schedule, prediction)


def latent_size(parts: Components, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels -> in latents.  A ValueError is raised for sizes that are no multiples of 8."""
    unit = parts.factor
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(hasattr(side, "__index__") for side in size):
        raise ValueError(f"a size is (height, width), two whole numbers, not {size!r}")
    if any(side < 1 or side % unit for side in size):
        near = tuple(max(unit, round(side / unit) * unit) for side in size)
        raise ValueError(f"height and width are multiples of {unit}, not {tuple(size)}: {near} is near")
    return size[0] // parts.factor, size[1] // parts.factor


def pure_noise(parts: Components, noise: Noise, size: tuple[int, int], n: int = 1) -> Tensor:
    """x_T of n pictures of `size`, (height, width) in pixels: the first draw of `noise`.  -> (n, 4, H / 8, W / 8)."""
    like = torch.empty(n, parts.vae.cfg.latent_channels, *latent_size(parts, size))
    return noise(like.to(next(parts.unet.parameters()).device))


def tail(path: Sequence[Time], strength: float) -> list[Time]:
    """The last int(n strength) of n steps: what image to image runs.

    A ValueError is raised for strengths outside 0 ... 1, and where no step is left.
    """
    n = len(path) - 1
    run = int(n * strength) if 0 <= strength <= 1 else 0
    if run < 1:
        raise ValueError(f"strength is in 0 ... 1 and leaves a step to run; {strength} of {n} steps does not")
    return list(path[n - run :])


def handoff(path: Sequence[Time], share: float = 0.2, steps: int = 1000) -> tuple[list[Time], list[Time]]:
    """Two paths: what the base model walks, and what the refiner goes on along (Podell et al. 2023, section 2.5).

    The refiner has the timesteps below share * steps, the low noise that it was trained on.  A ValueError is raised
    where one of the two has nothing to do.
    """
    cut = round(share * steps)
    at = sum(t >= cut for t in path[:-1])
    if not 0 < at < len(path) - 1:
        raise ValueError(f"a share of {share} leaves one of the two without a step of {len(path) - 1}")
    return list(path[: at + 1]), list(path[at:])


def latent_mask(mask: Tensor, like: Tensor) -> Tensor:
    """A mask (B or 1, 1, H, W) of pixels, 1 where to repaint -> at latents' size, nearest neighbour."""
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"a mask is (B, 1, H, W); got {tuple(mask.shape)}")
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("a mask lies in [0, 1]: 1 where to repaint")
    return F.interpolate(mask.to(like), size=like.shape[2:], mode="nearest")


def covered(pictures: Tensor, mask: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], grey where the mask says to repaint: what an inpainting UNet is shown."""
    return pictures * (mask < 0.5).to(pictures)


def canvas(mask: Tensor, masked: Tensor) -> Tensor:
    """What a UNet of 9 channels sees beside x: the mask, then the latents of the covered picture.  -> (B, 5, H, W)."""
    if len(mask) not in (1, len(masked)):
        raise ValueError(f"{len(mask)} masks are not for {len(masked)} pictures: give one, or one each")
    return torch.cat([latent_mask(mask, masked).expand(len(masked), -1, -1, -1), masked], dim=1)


def repainted(
    walk: Walk,
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    path: Sequence[float],
    x0: Tensor,
    noise: Tensor,
    mask: Tensor,
) -> Iterator[Step]:
    """A walk that keeps the latents x0 where the mask (B or 1, 1, H, W) is 0: inpainting with an ordinary UNet.

    What is kept is noised anew, always by the same `noise`, after each step and wherever else within a step the network
    looks (Heun's second look), and clean after the last.  With a mask of ones nothing changes.
    """
    keep, last = latent_mask(mask, x0), len(path) - 2

    def known(t: float | Tensor) -> Tensor:
        return (1 - keep) * noised(x0, noise, schedule(t))

    def look(y: Tensor, t: Tensor) -> Tensor:
        return denoise(y if y is x else keep * y + known(t), t)

    steps, step = walk(look, x, schedule, path), None
    for i in range(last + 1):
        step = next(steps) if step is None else steps.send(x)
        x = keep * step.x + ((1 - keep) * x0 if i == last else known(step.s))
        yield step._replace(x=x)


def pictures(vae: VAE, latents: Tensor, *, tile: int | None = None, ops: Ops = TORCH) -> Tensor:
    """Latents (B, 4, H, W) -> pictures (B, 3, 8H, 8W) in [-1, 1], float32, one after the other.

    `tile` is the side of tiles, in latents, for pictures too large to be decoded whole.  Where float16 is too narrow
    for the autoencoder it is float32 meanwhile (`VAE.wide_enough`).  Raises NonFiniteError for what is not finite even
    so, naming where.
    """

    def run() -> Tensor:
        rows = vae.unscaled(latents).split(1)
        if tile is None:
            return torch.cat([vae.decode(z, ops, checked=True).float() for z in rows])
        return torch.cat([tiled_decode(vae, z, tile=tile, ops=ops, checked=True).float() for z in rows])

    return vae.wide_enough(run).clamp(-1, 1)
