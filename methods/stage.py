"""One stage of ConsiStory: a network as samplers see it, whose masks go from each call to the next."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..model.blocks import Cond
from ..model.controlnet import Residuals, controlled
from ..model.ops import Ops
from ..samplers.guidance import guided
from ..samplers.parameterisation import Denoise, as_eps
from .anchors import Kept, cached
from .cast import Branch, Cast, Focus, Masks, Tally
from .consistory import Heard, Places, Told, consistory, places
from .dift import Plan
from .freeu import raised
from .partly import stages, to_attention
from .prompt import Prompt, beside, conditioning
from .scene import SceneError
from .subject_masks import dropped, masks
from .taps import rows

Deep = Callable[[Ops], tuple[Tensor, list[Tensor]]]  # verbs -> h and skips of the call at hand


class Stage:
    """eps (B, C, H, W) of x (B, C, H, W) at t (B,), one call after another down a path; it lives as long as a walk."""

    def __init__(
        self,
        cast: Cast,
        number: int = 1,
        *,
        carried: Plan | None = None,
        order: Sequence[tuple[int, int]] = (),
        branch: Branch | None = None,
    ):
        scene = cast.scene
        self.cast, self.number, self.carried, self.order = cast, number, carried, tuple(order)
        self.where: Places = places(scene.unet.cfg)
        self.feature_at = cast.settings.feature_at(cast.path)
        self.calls, self.tally = 0, Tally()
        self.replayed = branch.eps if branch else ()
        self.history: list[Tensor] = list(branch.history) if branch else []
        self.focus = branch.focus if branch else None
        self.plain = branch.plain if branch else {}
        self.other = branch.other if branch and cast.apart and cast.keep is None else None
        self.eps: list[Tensor] = []
        self.branch: Branch | None = None
        self.feature: Tensor | None = None  # (B, C, H, W)
        self.seen: list[Masks] = []  # the masks after each call
        alone = self.network(scene.positive, scene.ids)
        both = alone
        if scene.negative is not None:
            ids, other = scene.ids, scene.negative_ids
            two = None if ids is None else torch.cat([ids if other is None else other, ids])
            both = self.beginning(self.network(beside(scene.negative, scene.positive), two), alone)
        scale = scene.guidance if scene.negative is not None else 1.0
        whole = guided(both, alone, scale, rescale=scene.rescale, interval=scene.interval)
        self.denoise = as_eps(whole, scene.schedule, scene.prediction)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """What a sampler calls; up to the branch the second stage repeats what the first predicted."""
        if self.calls < len(self.replayed):
            self.calls += 1
            return self.replayed[self.calls - 1]
        eps = self.denoise(self.pin(x, self.at(t)), t)
        if self.branch is None:
            self.eps.append(eps)
        self.calls += 1
        return eps

    def look(self, x: Tensor, t: Tensor) -> None:
        """A call that predicts nothing: the conditional half, up to the last map, or to the feature if it is due."""
        scene, now = self.cast.scene, self.at(t)
        t = t.round() if scene.whole_times else t
        embed = conditioning(scene.unet, scene.positive, scene.ids)
        self.leave(now)
        c, heard = self.read(embed(t)), Heard(keep_pools=self.cast.keep is not None)
        deep = self.deep(scene.positive, scene.ids, c, self.pin(x, now), t)
        told = self.told(1, now)
        ops = consistory(scene.ops, self.where, told, heard)
        h, skips = deep(ops)
        if now == self.feature_at and self.feature is None:
            stop = int(self.where.feature.partition(".")[2])
            heard.feature.append(stages(scene.unet, h, skips, c, ops, stop))
            self.count(len(x), encoders=1, features=1)
        else:
            to_attention(scene.unet, h, skips, c, ops, self.where.last_map)
            self.count(len(x), encoders=1, maps=1)
        self.note(heard, told, now, (x.shape[2], x.shape[3]))
        self.calls += 1

    def at(self, t: Tensor) -> float:
        """The timestep of a call, as the path has it: what comes in is rounded to x's type."""
        now = float(t[0])
        return min((float(known) for known in self.cast.path), key=lambda known: abs(known - now))

    def pin(self, x: Tensor, now: float) -> Tensor:
        """x with the pictures that are known at this timestep."""
        if self.cast.pinned is None:
            return x
        known = self.cast.pinned(now).to(x)
        return torch.cat([known, x[len(known) :]])

    def network(self, prompt: Prompt, ids: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """The network for rows of a prompt, as guidance takes it."""
        embed = conditioning(self.cast.scene.unet, prompt, ids)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            now = self.at(t)
            t = t.round() if self.cast.scene.whole_times else t
            c = self.read(embed(t))
            self.leave(now)
            return self.passed(self.deep(prompt, ids, c, x, t), c, x, now)

        return predict

    def beginning(self, both: Denoise, alone: Denoise) -> Denoise:
        """The network of both halves; where the second stage begins, the negative one is as it was in the first."""

        def predict(x: Tensor, t: Tensor) -> Tensor:
            if self.other is None or self.calls != len(self.replayed):
                return both(x, t)
            n = self.cast.scene.images
            return torch.cat([self.other, alone(x[-n:], t[-n:])])

        return predict

    def read(self, c: Cond) -> Cond:
        """The same with what was read of the text, of both halves or of the conditional one."""
        both = len(c.emb) > self.cast.scene.images or self.cast.scene.negative is None
        return c._replace(words=self.cast.words if both else self.cast.words.last(len(c.emb)))

    def deep(self, prompt: Prompt, ids: Tensor | None, c: Cond, x: Tensor, t: Tensor) -> Deep:
        """Encoder, bottleneck and ControlNets at x; those are run once for any number of encodings."""
        scene, found = self.cast.scene, list[Residuals]()
        kind = next(scene.unet.parameters()).dtype
        y = x.to(kind)
        if scene.canvas is not None:
            y = torch.cat([y, rows(scene.canvas.to(kind), len(y)).to(y)], dim=1)
        for control in scene.controls:
            if control.on(t):
                own = conditioning(control.net, prompt, ids)
                more = control.residuals(y, t, own, scene.control_ops)
                found.append(Residuals(more.h.to(kind), [skip.to(kind) for skip in more.skips]))

        def encoded(ops: Ops) -> tuple[Tensor, list[Tensor]]:
            low, skips = scene.unet.encode(y, c, ops)
            h = scene.unet.middle(low, c, ops)
            for more in found:
                h, skips = controlled(h, skips, more)
            return h, skips

        return encoded

    def leave(self, now: float) -> None:
        """Note the branch where injection begins."""
        if self.branch is None and self.number == 1 and self.cast.settings.injects(now):
            self.branch = Branch(tuple(self.eps), tuple(self.history), self.focus, {})

    def told(self, halves: int, now: float) -> Told:
        """What a call is told, but for the queries of a plain pass."""
        cast, n, anchors = self.cast, self.cast.scene.images, self.cast.anchors
        told = Told(images=n, tokens=self.cast.scene.words, align=cast.align, alpha=cast.settings.alpha)
        if self.carried is not None and cast.settings.injects(now):
            kept = anchors.outputs.get(self.calls, {}) if anchors else {}
            told = replace(told, carried=self.carried, order=self.order, rows=kept)
        if not cast.settings.attend:
            return told
        if anchors is not None:
            device = cast.scene.words.device
            stored = anchors.pool(self.number, self.calls)
            pools = {site: (k[-halves:].to(device), v[-halves:].to(device)) for site, (k, v) in stored.items()}
            lengths = {self.where.level[site.rpartition(".")[0]]: pair[0].shape[2] for site, pair in pools.items()}
            seen = {level: cached(length, n, halves, device) for level, length in lengths.items()}
            return replace(told, seen=seen, pools=pools)
        if self.focus is None:
            return told
        return replace(told, seen=self.focus.others(cast, halves))

    def passed(self, deep: Deep, c: Cond, x: Tensor, now: float) -> Tensor:
        """One whole call: the plain pass where its queries are wanted, then the one that counts."""
        cast, scene, heard = self.cast, self.cast.scene, Heard()
        told = self.told(len(x) // scene.images, now)
        heard.keep_pools = cast.keep is not None
        heard.keep_outputs = cast.keep is not None and self.number == 2 and cast.settings.injects(now)
        share = cast.settings.blends(now, cast.path[0]) if told.seen else 0.0
        encoded = None
        if share:
            plain = self.plain if self.calls == len(self.replayed) else {}
            plain = {site: q[-len(x) :] for site, q in plain.items()}
            if not plain:
                ops = consistory(scene.ops, self.where, told, heard)
                alone = deep(scene.ops) if told.carried is not None else deep(ops)
                encoded = None if told.carried is not None else alone  # the encoders differ by the injection alone
                plain = self.queries(*alone, c)
                self.count(len(x), encoders=1, queries=1)
            if self.branch is not None and self.calls == len(self.branch.eps):
                self.branch = self.branch._replace(plain=plain)
            told = replace(
                told,
                plain=plain,
                share=torch.tensor(share, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)),
            )
        ops = consistory(scene.ops, self.where, told, heard)
        if encoded is None:
            encoded = deep(ops)
            self.count(len(x), encoders=1)
        out = scene.unet.decode(*encoded, c, ops)[:, : x.shape[1]].to(x.dtype)
        self.count(len(x), decoders=1)
        if self.branch is not None and self.calls == len(self.branch.eps) and len(x) > scene.images:
            self.branch = self.branch._replace(other=out[: -scene.images])
        self.note(heard, told, now, (x.shape[2], x.shape[3]))
        return out

    def queries(self, h: Tensor, skips: list[Tensor], c: Cond) -> dict[str, Tensor]:
        """The decoder's queries of a plain pass."""
        scene, heard = self.cast.scene, Heard(keep_maps=False, keep_queries=True)
        told = Told(images=scene.images, tokens=scene.words)
        to_attention(scene.unet, h, skips, c, consistory(scene.ops, self.where, told, heard), self.where.last)
        return heard.queries

    def note(self, heard: Heard, told: Told, now: float, latents: tuple[int, int]) -> None:
        """What a call leaves to the next: the feature, masks, and what is kept for further pictures."""
        cast, n, sizes = self.cast, self.cast.scene.images, self.where.sizes(latents)
        if now == self.feature_at and self.feature is None and self.number == 1:
            self.feature = raised(heard.feature[0][-n:], cast.settings.dift_b)
        self.history.append(torch.stack(heard.maps).mean(0))
        if cast.settings.window is not None:
            self.history = self.history[-cast.settings.window :]
        found: Masks = masks(torch.stack(self.history).mean(0), cast.scene.words, sizes[self.where.maps], sizes)
        if cast.given is not None:
            found = cast.given(self.number, self.calls, found)
        levels = self.where.shared
        draws = cast.draws(self.calls, [found[level].shape[1] for level in levels])
        pairs = zip(levels, draws, strict=True)
        kept = {level: dropped(found[level], u.to(found[level].device), cast.settings.dropout) for level, u in pairs}
        self.focus = Focus(found, kept)
        self.seen.append(found)
        if cast.keep is not None:
            self.store(cast.keep, heard, told)

    def store(self, keep: Kept, heard: Heard, told: Told) -> None:
        """Put keys, values and outputs of a call away for further pictures."""
        shelf = self.cast.shelf or self.cast.scene.words.device
        if heard.pools:
            edges = {level: these.kept.edges for level, these in told.seen.items() if these.kept is not None}
            ends = {level: int(edge[keep.images]) for level, edge in edges.items()}
            keep.pools[self.number, self.calls] = {
                site: tuple_of(
                    x.detach()[:, :, : ends[self.where.level[site.rpartition(".")[0]]]].to(shelf) for x in pair
                )
                for site, pair in heard.pools.items()
            }
        if heard.outputs:
            if keep.masks is None:
                raise SceneError("outputs are kept at the subject's pixels, which are not known yet")
            inside, first = keep.masks.flatten(), slice(0, keep.images)
            rows = {site: x.detach()[first].flatten(0, 1)[inside].to(shelf) for site, x in heard.outputs.items()}
            keep.outputs[self.calls] = rows

    def count(self, height: int, **parts: int) -> None:
        """Rows of the batch that went through parts of the network."""
        whole = self.cast.scene.images * (2 if self.cast.scene.guided else 1)
        for name, times in parts.items():
            setattr(self.tally, name, getattr(self.tally, name) + times * height / whole)


def tuple_of(pair: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values."""
    k, v = pair
    return k, v
