"""Train the embedded model: an unconditional DDPM on the shapes world.

    python examples/shapes/train.py runs/shapes --steps 12000

Stops and resumes at any time: run the same command again.  A larger --steps goes on from where the run stands.
"""

import argparse
import csv
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import world
from diaphane.model.blocks import denoiser
from diaphane.model.ddpm import DDPM, DDPMConfig
from diaphane.model.ops import TORCH, Site, concat
from diaphane.samplers.ddim import ddim
from diaphane.samplers.inversion import last
from diaphane.samplers.noise import seeded
from diaphane.samplers.parameterisation import over
from diaphane.samplers.path import papers
from diaphane.samplers.schedule import linear
from torch import Tensor
from tqdm import tqdm

CONFIG = DDPMConfig(resolution=32, base=32, mult=(1, 2, 3, 4), blocks=1, attention=(8,), groups=8)
SCHEDULE = linear()


def loss(net: DDPM, x0: Tensor, t: Tensor, noise: Tensor, forget: float) -> tuple[Tensor, Tensor]:
    """The simple loss (Ho et al. 2020, eq. 14), and the one that is trained on.

    The simple loss of a trained network is about 2.6 / (t + 4) on this world: it hardly notices the timesteps near T,
    where sampling from pure noise begins and where its errors grow by up to 1 / sqrt(alpha_T) = 157.  Two weights mend
    that and change no minimiser, as each term is least for the conditional expectation: t + 4 evens out the timesteps,
    and the errors of local means are added, since a wrong mean is a wrong colour yet little energy.
    """
    a = SCHEDULE(t)
    x = over(a.sqrt(), x0) * x0 + over((1 - a).sqrt(), x0) * noise
    with torch.autocast(x.device.type, torch.bfloat16):
        eps = net(x, net.embed(t), replace(TORCH, join=forgetful(len(x), forget)))
    error = eps.float() - noise
    every = error.square().mean((1, 2, 3))
    coarse = sum(k * F.avg_pool2d(error, k).square().mean((1, 2, 3)) for k in (4, CONFIG.resolution))
    return every.mean(), ((every + coarse) * (t + 4) / (len(SCHEDULE) / 2)).mean()


def forgetful(n: int, share: float, finest: int = 16) -> Callable[[Site, Tensor, Tensor], Tensor]:
    """A join that hides the skips of 16 x 16 and coarser from a share of the pictures: h has to carry what they show.

    Without it the skips alone decide the picture, and an injected h changes next to nothing.
    """
    kept = (torch.rand(n, 1, 1, 1) >= share).float()

    def join(site: Site, h: Tensor, skip: Tensor) -> Tensor:
        return concat(site, h, skip * kept.to(skip) if skip.shape[-1] <= finest else skip)

    return join


def amplitude(n: int, generator: torch.Generator) -> Tensor:
    """Noise that is a little too strong or too weak in half of the pictures.  -> (n, 1, 1, 1)

    Group normalisation hides the amplitude of x from a network.  One that predicts noise of the usual strength whatever
    it sees takes any excess for picture, and a walk from pure noise runs away; this teaches it to look.
    """
    off = torch.exp(0.1 * torch.randn(n, 1, 1, 1, generator=generator))
    return torch.where(torch.rand(n, 1, 1, 1, generator=generator) < 0.5, off, 1.0)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up over 300 steps, hold, and fall to zero over the last quarter."""
    return peak * min(1.0, (step + 1) / 300, (steps - step) / (0.25 * steps))


@torch.no_grad()
def update_average(average: DDPM, net: DDPM, step: int) -> None:
    """Exponential moving average of the weights; short at first."""
    decay = min(0.9995, (step + 1) / (step + 10))
    for slow, fast in zip(average.parameters(), net.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


@torch.no_grad()
def draw(net: DDPM, n: int, steps: int = 50) -> Tensor:
    """n pictures by DDIM from fixed noise."""
    x = seeded(range(7, 7 + n))(torch.empty(n, 3, CONFIG.resolution, CONFIG.resolution))
    walk = ddim(denoiser(net), x.to(next(net.parameters())), SCHEDULE, papers(steps))
    return last(walk).x.cpu()


def save(folder: Path, **state: object) -> None:
    """Write the checkpoint so that a crash leaves the old one."""
    torch.save(state, folder / "checkpoint.tmp")
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where checkpoints, samples and the loss curve go")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument(
        "--forget", type=float, default=0.6, help="share of pictures without coarse skips (default: 0.6)"
    )
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(args.seed)
    net = DDPM(CONFIG).to(device)
    average = DDPM(CONFIG).to(device).requires_grad_(False)
    average.load_state_dict(net.state_dict())
    optimiser = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(args.seed)
    step = 0
    if (args.folder / "checkpoint.pt").exists():
        state = torch.load(args.folder / "checkpoint.pt", map_location=device, weights_only=True)
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"].cpu())
        step = state["step"]

    def checkpoint() -> None:
        save(args.folder, net=net.state_dict(), average=average.state_dict(), optimiser=optimiser.state_dict(),
             generator=generator.get_state(), step=step, config=asdict(CONFIG))  # fmt: skip

    running = None
    with (args.folder / "loss.csv").open("a", newline="") as file, tqdm(total=args.steps, initial=step) as bar:
        log = csv.writer(file)
        while step < args.steps:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
            x0 = world.render(world.sample(args.batch, generator))
            noise = torch.randn(x0.shape, generator=generator) * amplitude(args.batch, generator)
            t = (
                (torch.arange(args.batch) + torch.rand(args.batch, generator=generator)) * len(SCHEDULE) / args.batch
            ).long()
            simple, total = loss(net, x0.to(device), t.to(device), noise.to(device), args.forget)
            optimiser.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            update_average(average, net, step)
            step += 1
            running = simple.item() if running is None else 0.99 * running + 0.01 * simple.item()
            bar.update()
            bar.set_postfix(loss=f"{running:.4f}")
            if step % 100 == 0:
                log.writerow([step, f"{running:.5f}", f"{total.item():.5f}"])
                file.flush()
            if step % 250 == 0 or step == args.steps:
                checkpoint()
            if step % 1000 == 0 or step == args.steps:
                world.sheet(draw(average, 32), 8).save(args.folder / f"samples-{step:06d}.png")
    print(
        f"wrote {args.folder / 'checkpoint.pt'}: {step} steps, loss {running if running is None else round(running, 5)}"
    )


if __name__ == "__main__":
    main()
