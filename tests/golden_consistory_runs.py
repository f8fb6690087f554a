"""ConsiStory's whole calls and whole walks against the reference data, with its masks and without."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from diaphane.methods.anchors import Kept
from diaphane.methods.consistory import Heard, Told, consistory, others, places
from diaphane.methods.dift import Matches, plan, waves
from diaphane.methods.freeu import FreeU, freeu
from diaphane.methods.partly import to_attention
from diaphane.methods.prompt import Prompt
from diaphane.methods.scene import Scene, Settings, by_steps, strength
from diaphane.methods.story import Story
from diaphane.model import sites
from diaphane.model.ops import TORCH, Ops
from diaphane.samplers.ddim import Step, ddim, step
from diaphane.samplers.parameterisation import noised
from diaphane.samplers.path import leading
from torch import Tensor

from .golden_consistory_parts import exact, group_of, grouped, told
from .golden_latent import SCHEDULE, parts, within
from .golden_reader import Case, Folder

FREE, FED = 3e-2, 5e-4  # latents of a walk with its own masks, and with the stored ones
FLIPS, PIXELS = 1e-3, 2e-3  # shares of mask bits and of nearest pixels that may differ in a walk with its own masks


# --- one call


def unet_cases(folder: Folder, stem: str) -> list[Case]:
    """One call of the UNet with each feature in turn."""
    return grouped(folder, stem, unet_case)


def unet_case(case: Case):
    said, at = case.settings, group_of(case)
    told(said, "fp64_gap", "effect_vs_vanilla", "curr_iter")
    unet, n = parts().unet, said["B"]
    where, x = places(unet.cfg), case.input(f"{at}latents")
    assert tuple(x.shape) == (n, 4, said["H"], said.get("W", said["H"]))
    rows, words = torch.cat([x, x]), case.input(f"{at}token_indices").T
    context = case.input(f"{at}ehs")
    assert context.shape[1] == said["L"]
    t = torch.full((2 * n,), float(said["timestep"]))
    c = unet.embed(t, context, case.input(f"{at}pooled"), case.input(f"{at}time_ids"))
    sees = [
        [bool(v) and i != j for j, v in enumerate(row)] for i, row in enumerate(case.input(f"{at}mapping").tolist())
    ]
    assert sees == [[j < said["n_anchors"] and i != j for j in range(n)] for i in range(n)]
    sizes = where.sizes((x.shape[2], x.shape[3]))
    masks = {level: case.input(f"{at}mask_{size[0]}").bool() for level, size in sizes.items()}
    seen = {level: others(mask, sees, 2) for level, mask in masks.items()}
    pixel, distance = (
        case.input(f"{at}nn_map_{sizes[where.fine][0]}"),
        case.input(f"{at}nn_dist_{sizes[where.fine][0]}"),
    )
    found = Matches(pixel.long().clamp(min=0), distance.masked_fill(~torch.tensor(sees)[..., None], torch.inf))
    carried = {
        "carried": plan(found, masks[where.fine]),
        "order": tuple(waves(sees)),
        "alpha": said["injection"]["alpha"],
    }
    assert said["injection"]["range"] == [said["n_steps"] // 10, said["n_steps"] // 3]
    plain = Heard(keep_maps=False, keep_queries=True)
    quiet = consistory(TORCH, where, Told(images=n, tokens=words), plain)
    h, skips = unet.encode(rows, c)
    to_attention(unet, unet.middle(h, c), skips, c, quiet, where.last)
    v = strength(-said["query_iter"], 0, -(said["n_steps"] // 10))
    blended = {"plain": plain.queries, "share": torch.tensor(v)}
    factors = FreeU(**{name: said["freeu"][name] for name in FreeU._fields})
    free = freeu(TORCH, unet.cfg, factors)
    calls: dict[str, tuple[Ops, dict[str, Any]]] = {
        "vanilla": (TORCH, {}),
        "sdsa": (TORCH, {"seen": seen}),
        "sdsa_freeu": (free, {"seen": seen}),
        "sdsa_query": (TORCH, {"seen": seen, **blended}),
        "sdsa_inject": (TORCH, {"seen": seen, **carried}),
        "sdsa_inject_freeu": (free, {"seen": seen, **carried}),
    }
    bounds = {"sdsa_freeu": 2e-4, "sdsa_inject": 2e-4, "sdsa_inject_freeu": 2e-4}
    for name, (ops, more) in calls.items():
        if any(claim.startswith(f"{at}{name}.") for claim in case.claims):
            heard = Heard()
            what = consistory(ops, where, Told(images=n, tokens=words, **more), heard)
            outputs: dict[str, Tensor] = {}
            eps = unet(rows, c, recording(what, outputs, n))
            within(case, f"{at}{name}.eps", eps, bounds.get(name, 1e-4))
            within(case, f"{at}{name}.up0_at_store", heard.feature[0][-n:], 1e-4)
            altered = heard.feature[0][-n:].clone()
            altered[:, : altered.shape[1] // 2] *= factors.b2 if ops is free else 1
            within(case, f"{at}{name}.up0_as_read", altered, 1e-4)
            for claim in sorted(case.claims):
                module = claim.removeprefix(f"{at}{name}.")
                if claim != module and module.endswith((".attn1", ".attn2")):
                    within(case, claim, outputs[str(sites.site(unet.cfg, module))], 1e-4)
            if case.has(f"{at}{name}.mean_cross_map"):
                all_words = torch.arange(said["L"]).expand(n, -1)
                listening = Heard()
                unet(rows, c, consistory(ops, where, Told(images=n, tokens=all_words, **more), listening))
                within(case, f"{at}{name}.mean_cross_map", torch.stack(listening.maps).mean(0), 1e-5)


def recording(ops: Ops, into: dict[str, Tensor], images: int) -> Ops:
    """Verbs that write down what every attention adds."""

    def add(site: Any, x: Tensor, dx: Tensor) -> Tensor:
        if site.kind in ("self", "cross"):
            into[str(site)] = dx
        return ops.add(site, x, dx)

    return replace(ops, add=add)


# --- walks


def run_cases(folder: Folder, stem: str) -> list[Case]:
    """A whole run with the stored masks, and one with its own."""
    claims, said = frozenset(folder.tensors(stem)), folder.json(stem)
    return [
        Case(f"{stem}-{how}", run, folder, stem, claims, folder.entry(stem))
        for how in ("fed", "free")
        if said is not None
    ] or [Case(stem, run, folder, stem, claims, None)]


class Given:
    """The stored dropout: (call, sizes) -> draws."""

    def __init__(self, case: Case, at: str):
        self.case, self.at = case, at

    def __call__(self, call: int, sizes: Any) -> list[Tensor]:
        return [self.case.input(f"{self.at}uniform_{round(n**0.5)}")[call] for n in sizes]


def settings_of(case: Case, path: list[int]) -> Settings:
    said = case.settings
    factors = said.get("freeu")
    assert said["query_range"] == [0, said["n_steps"] // 10]
    assert said["inject_range"] == [said["n_steps"] // 10, said["n_steps"] // 3]
    blend = tuple(said["query_strength"])
    made = Settings(
        dropout=said["mask_dropout"],
        attend=said["perform_sdsa"],
        blend=blend if said["share_queries"] else None,
        inject=(881, 661) if said["perform_injection"] else None,
        alpha=said["alpha"],
        dift=said["dift_timestep"],
        dift_b=factors["b2"] if factors else 1.0,
    )
    return by_steps(made, path)


def scene_of(case: Case, rows: slice) -> Scene:
    said, factors = case.settings, case.settings.get("freeu")
    unet, words = parts().unet, case.input("token_indices").T[rows].long()
    n, side = len(words), 8.0 * said["H"]
    negative = Prompt(case.input("neg_embeds").expand(n, -1, -1), case.input("neg_pooled").expand(n, -1))
    ops = freeu(TORCH, unet.cfg, FreeU(**{name: factors[name] for name in FreeU._fields})) if factors else TORCH
    return Scene(
        unet=unet,
        positive=Prompt(case.input("prompt_embeds")[rows], case.input("pooled")[rows]),
        negative=negative,
        tokens=words,
        schedule=SCHEDULE,
        ids=torch.tensor([[side, side, 0, 0, side, side]]).repeat(n, 1),
        guidance=said["guidance"],
        ops=ops,
    )


def run(case: Case):
    said, free = case.settings, case.name.endswith("free")
    told(said, "seed", "fp64_gap_latents", "min_relative_margin_to_threshold", "same_latent", "latent_std_final")
    path = leading(said["n_steps"], len(SCHEDULE), offset=1, end=0)
    x = case.input("init_latents")
    assert x.shape[-1] == said["H"]
    assert len(x) == said["n_images"] + said["n_extra"]
    groups: list[tuple[str, slice]] = [("", slice(0, said["n_images"]))]
    if said["n_extra"]:
        groups = [("anchors.", groups[0][1])]
        groups += [
            (f"extra{i}.", slice(said["n_images"] + i, said["n_images"] + i + 1)) for i in range(said["n_extra"])
        ]
    kept: Kept | int = said["n_anchors"]
    want = set(said["stages"])
    with torch.no_grad():
        for at, rows in groups:
            story = story_of(case, at, rows, x[rows], path, kept, free=free, keep=at == "anchors.")
            compare(case, at, story, path, free=free, want=want)
            if story.kept is not None:
                kept = story.kept
    told_of_cache(case, kept)
    assert not want, f"{case.stem}: unknown stages {', '.join(sorted(want))}"


def story_of(
    case: Case, at: str, rows: slice, x: Tensor, path: list[int], kept: Kept | int, *, free: bool, keep: bool
) -> Story:
    said, where = case.settings, places(parts().unet.cfg)
    sizes = where.sizes((x.shape[2], x.shape[3]))

    def given(stage: int, call: int) -> dict[int, Tensor]:
        return {level: case.input(f"{at}stage{stage}.mask_{side}")[call].bool() for level, (side, _) in sizes.items()}

    pinned, many = None, said["instance_images"]
    if many:
        clean = case.input("instance_latents")
        assert len(clean) == many

        def pinned(t: float) -> Tensor:
            return noised(clean, x[:many], SCHEDULE(t))

    sees = None
    if keep:
        assert kept == len(x)
    return Story(
        scene_of(case, rows), lambda: ddim, x, path, settings_of(case, path), draws=Given(case, f"{at}stage1."),
        anchors=kept, sees=sees, keep=keep, pinned=pinned, given=None if free else given, whole=True,
    )  # fmt: skip


def compare(case: Case, at: str, story: Story, path: list[int], *, free: bool, want: set[str]):
    """Both stages of a story; one that injects nothing has its second stage's data equal to the first's."""
    bound, said = FREE if free else FED, case.settings
    stages: dict[int, list[Step]] = {1: [], 2: []}
    for number, made in story.steps():
        stages[number].append(made)
    if not story.two:
        stages[2] = stages[1]
    for number, steps in stages.items():
        start = f"{at}stage{number}."
        if f"{at}stage{number}" not in want:
            assert not any(name.startswith(start) for name in case.claims), f"{start} is in no stage of the json"
            continue
        want.remove(f"{at}stage{number}")
        exact(case, f"{start}timesteps", torch.tensor(path[:-1]))
        for i in said["stored_steps"]:
            name = f"{start}latents_after_step{i}"
            made = landed(story, steps[i], path[i], path[i + 1])
            within(case, name, made, bound)
            if case.has(name) and free:
                mean = float((made - case.input(name)).abs().mean())
                assert mean <= 2e-3, f"{name}: off by {mean:.3g} in the mean"
        bits = list(masks(story, number))
        for name in sorted(case.claims):
            if name.startswith(f"{start}mask_"):
                theirs, side = case.input(name), int(name.rpartition("_")[2])
                ours = torch.stack([next(m for m in step.values() if m.shape[1] == side**2) for step in bits])
                wrong = float((ours != theirs).float().mean())
                assert wrong <= (FLIPS if free else 0), f"{name}: {wrong:.3%} of the bits differ"
            elif name.startswith(f"{start}uniform_"):
                case.input(name)
        side = round((story.matches.pixel.shape[2] if story.matches else 0) ** 0.5)
        if case.has(f"{start}nn_map") and story.matches is not None:
            near(case, start, story, free=free, side=side)
        if case.has(f"{start}dift_raw_img0_ch0_1"):
            assert story.raw is not None
            within(case, f"{start}dift_raw_img0_ch0_1", story.raw[0, [0, -1]], FREE if free else 2e-3)


def near(case: Case, start: str, story: Story, *, free: bool, side: int):
    """Nearest pixels and their distances, which flipped masks may change."""
    found = story.matches
    assert found is not None
    pixel, distance = case.input(f"{start}nn_map").long(), case.input(f"{start}nn_dist")
    both = distance.isfinite() & found.distance.isfinite() & (distance < 2)
    wrong = float(((found.pixel != pixel) & both).float().mean())
    assert wrong <= (5 * PIXELS if free else PIXELS), f"{start}nn_map: {wrong:.3%} of the pixels differ"
    same = both & (found.pixel == pixel)
    error = float((found.distance - distance)[same].abs().max()) if bool(same.any()) else 0.0
    assert error <= (1e-3 if free else 2e-5), f"{start}nn_dist: off by {error:.3g}"


def masks(story: Story, number: int) -> Iterator[Any]:
    """The masks after each call of a stage; the second one's begin as the first's."""
    first = story.masks[0]
    if number == 2 and len(story.masks) > 1:
        yield from first[: len(first) - len(story.masks[1])]
        yield from story.masks[1]
    else:
        yield from first


def landed(story: Story, made: Step, t: float, s: float) -> Tensor:
    """A step's x; of pictures that are pinned, the step that was taken from where they were seen."""
    if story.cast.pinned is None:
        return made.x
    known = story.cast.pinned(t)
    rows, _ = step(known, made.eps[: len(known)], SCHEDULE(t), SCHEDULE(s))
    return torch.cat([rows, made.x[len(known) :]])


def told_of_cache(case: Case, kept: Kept | int):
    """How much of the anchors is kept: layers and calls."""
    said = case.settings.get("cache")
    if said is None or isinstance(kept, int):
        return
    calls = sorted({call for _, call in kept.pools})
    assert calls == said["steps_cached"]
    assert len(kept.pool(1, calls[0])) == said["layers_with_token_cache"]
    assert sorted(kept.outputs) == said["output_cache_steps"]
    assert {len(rows) for rows in kept.outputs.values()} == {said["output_cache_layers"]}
