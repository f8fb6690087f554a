"""ConsiStory's whole calls and whole walks against the reference data, with its masks and without."""

from typing import Any

import torch
from diaphane.methods.anchors import Kept
from diaphane.methods.cast import Masks
from diaphane.methods.consistory import places
from diaphane.methods.freeu import FreeU, freeu
from diaphane.methods.prompt import Prompt
from diaphane.methods.scene import Scene, Settings, by_steps
from diaphane.methods.story import Story
from diaphane.model.ops import TORCH
from diaphane.samplers.ddim import Step, ddim, step
from diaphane.samplers.parameterisation import noised
from diaphane.samplers.path import leading
from torch import Tensor

from .golden_consistory_parts import exact, told
from .golden_latent import SCHEDULE, parts, within
from .golden_reader import Case, Folder

LATENTS, GAPS = 5e-4, 3.0  # what latents may be off by, and in gaps between the reference's own float32 and float64
FLIPS, PIXELS = 1e-3, 2e-3  # shares of mask bits and of nearest pixels that may differ


def run_cases(folder: Folder, stem: str) -> list[Case]:
    """A whole run; each call's own masks are compared, and the next one goes on from the stored ones."""
    return [Case(stem, run, folder, stem, frozenset(folder.tensors(stem)), folder.entry(stem))]


class Given:
    """The stored dropout of n pictures: (call, sizes) -> draws; where nothing is ever dropped they may be absent."""

    def __init__(self, case: Case, at: str, n: int):
        self.case, self.at, self.n = case, at, n
        self.unused = not (case.settings["perform_sdsa"] and case.settings["mask_dropout"])

    def __call__(self, call: int, sizes: Any) -> list[Tensor]:
        names = [f"{self.at}uniform_{round(n**0.5)}" for n in sizes]
        if self.unused and not any(map(self.case.has, names)):
            return [torch.ones(self.n, n) for n in sizes]
        return [self.case.input(name)[call] for name in names]


def settings_of(case: Case, path: list[int]) -> Settings:
    said = case.settings
    factors = said.get("freeu")
    windows = {"share_queries": [0, said["n_steps"] // 10], "inject": [said["n_steps"] // 10, said["n_steps"] // 3]}
    assert not said["share_queries"] or said["query_range"] == windows["share_queries"]
    assert not said["perform_injection"] or said["inject_range"] == windows["inject"]
    blend = tuple(said["query_strength"]) if said["share_queries"] else None
    told(said, "query_range", "query_strength", "inject_range")
    made = Settings(
        dropout=said["mask_dropout"],
        attend=said["perform_sdsa"],
        blend=blend,
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
    said = case.settings
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
            found: dict[str, list[Tensor]] = {}
            story = story_of(case, at, rows, x[rows], path, kept, found)
            compare(case, at, story, path, found, want)
            if story.kept is not None:
                kept = story.kept
    told_of_cache(case, kept)
    assert not want, f"{case.stem}: unknown stages {', '.join(sorted(want))}"


def story_of(
    case: Case, at: str, rows: slice, x: Tensor, path: list[int], kept: Kept | int, found: dict[str, list[Tensor]]
) -> Story:
    """A story that goes on from the stored masks, where there are any, and notes its own in `found`."""
    where, keep = places(parts().unet.cfg), at == "anchors."
    sizes = where.sizes((x.shape[2], x.shape[3]))

    def given(stage: int, call: int, own: Masks) -> Masks:
        names = {level: f"{at}stage{stage}.mask_{side}" for level, (side, _) in sizes.items()}
        for level, name in names.items():
            found.setdefault(name, []).append(own[level])
        stored = {level: case.input(name)[call].bool() for level, name in names.items() if case.has(name)}
        return {**own, **stored}

    pinned, many = None, case.settings["instance_images"]
    if many:
        clean = case.input("instance_latents")
        assert len(clean) == many

        def pinned(t: float) -> Tensor:
            return noised(clean, x[:many], SCHEDULE(t))

    if keep:
        assert kept == len(x)
    return Story(
        scene_of(case, rows), lambda: ddim, x, path, settings_of(case, path), draws=Given(case, f"{at}stage1.", len(x)),
        anchors=kept, keep=keep, pinned=pinned, given=given, whole=True,
    )  # fmt: skip


def compare(case: Case, at: str, story: Story, path: list[int], found: dict[str, list[Tensor]], want: set[str]) -> None:
    """Both stages of a story; one that injects nothing has its second stage's data equal to the first's."""
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
        compare_masks(case, start, found, f"{at}stage1.")
        gaps = case.settings.value.get("fp64_gap_latents")
        gap = gaps.get(f"{at}stage{number}", 0.0) if isinstance(gaps, dict) else gaps or 0.0
        for i in case.settings["stored_steps"]:
            made = landed(story, steps[i], path[i], path[i + 1])
            within(case, f"{start}latents_after_step{i}", made, max(LATENTS, GAPS * gap))
        if case.has(f"{start}nn_map"):
            near(case, start, story)
        if case.has(f"{start}dift_raw_img0_ch0_1"):
            assert story.raw is not None
            within(case, f"{start}dift_raw_img0_ch0_1", story.raw[0, [0, -1]], 2e-3)


def compare_masks(case: Case, start: str, found: dict[str, list[Tensor]], first: str) -> None:
    """The masks after each call; a second stage's begin as the first's, and are these where there is no second."""
    for name in sorted(case.claims):
        if name.startswith(f"{start}mask_"):
            theirs, begun = case.input(name).bool(), found[name.replace(start, first)]
            own = found.get(name, [])
            bits = torch.stack([*begun[: len(begun) - len(own)], *own] if start != first else begun)
            wrong = int((bits != theirs).sum())
            assert wrong <= max(2, FLIPS * theirs.numel()), f"{name}: {wrong} of {theirs.numel()} bits differ"
        elif name.startswith(f"{start}uniform_"):
            case.input(name)


def near(case: Case, start: str, story: Story) -> None:
    """Nearest pixels and their distances; one picture alone has none but itself, whose are not to be read."""
    found, looked = story.matches, story.sources
    pixel, distance = case.input(f"{start}nn_map").long(), case.input(f"{start}nn_dist")
    if found is None:
        assert bool(distance.isinf().all()), f"{start}nn_dist: this picture has others to match"
        return
    pixel, distance = pixel[:, looked], distance[:, looked]
    both = distance.isfinite() & found.distance.isfinite() & (distance < 2)
    wrong = float(((found.pixel != pixel) & both).float().mean())
    assert wrong <= PIXELS, f"{start}nn_map: {wrong:.3%} of the pixels differ"
    same = both & (found.pixel == pixel)
    error = float((found.distance - distance)[same].abs().max()) if bool(same.any()) else 0.0
    assert error <= 2e-5, f"{start}nn_dist: off by {error:.3g}"


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
    assert max((len(pools) for pools in kept.pools.values()), default=0) == said["layers_with_token_cache"]
    assert sorted(kept.outputs) == said["output_cache_steps"]
    assert max((len(rows) for rows in kept.outputs.values()), default=0) == said["output_cache_layers"]
