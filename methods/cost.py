"""What parts of a call cost, as shares of one pass of the network: FLOP, counted without computing anything."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..model.blocks import Cond
from ..model.components import placed
from ..model.ops import TORCH
from ..model.unet import UNet
from .consistory import Heard, Told, consistory, places
from .partly import stages, to_attention
from .stage import Tally


def shares(unet: UNet, latents: tuple[int, int], tokens: int = 77) -> Tally:
    """The parts that ConsiStory runs, as shares of a pass at latents (height, width) under a text of `tokens`."""
    where, cfg = places(unet.cfg), unet.cfg
    with torch.no_grad(), placed("meta", unet):
        kind = next(unet.parameters())
        x = torch.empty(1, cfg.in_channels, *latents, device="meta", dtype=kind.dtype)
        c = Cond(
            torch.empty(1, 4 * cfg.channels[0], device="meta", dtype=kind.dtype),
            torch.empty(1, tokens, cfg.context_dim, device="meta", dtype=kind.dtype),
        )
        words = torch.zeros(1, 1, dtype=torch.long, device="meta")
        quiet = Heard(keep_maps=False, keep_queries=True)
        listening = consistory(TORCH, where, Told(images=1, tokens=words), quiet)
        low, skips = unet.encode(x, c)
        h = unet.middle(low, c)
        encoder = counted(lambda: unet.middle(unet.encode(x, c)[0], c))
        decoder = counted(lambda: unet.decode(h, skips, c))
        queries = counted(lambda: to_attention(unet, h, skips, c, listening, where.last))
        maps = counted(lambda: to_attention(unet, h, skips, c, TORCH, where.last_map))
        feature = counted(lambda: stages(unet, h, skips, c, TORCH, int(where.feature.partition(".")[2])))
    whole = encoder + decoder
    return Tally(encoder / whole, decoder / whole, queries / whole, maps / whole, feature / whole)


def counted(run: Callable[[], Tensor | None]) -> int:
    """FLOP of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
