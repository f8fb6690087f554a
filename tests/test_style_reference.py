"""Pictures as references, what is for targets only, panoramas, and attention maps."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diaphane.kernels import reference
from diaphane.kernels.sources import Seen, shared
from diaphane.methods import style_reference as sr
from diaphane.methods.attention_maps import SharedMaps, WordMaps, colours, grid, picture, principal
from diaphane.methods.controlnet import Control
from diaphane.methods.freeu import FreeU, freeu
from diaphane.methods.lora import beside
from diaphane.methods.multidiffusion import Batch, View, multidiffusion, nearest, spread, windows
from diaphane.methods.style_aligned import Sharing, style_aligned
from diaphane.methods.style_targets import TargetControl, weights
from diaphane.methods.text_to_image import denoiser
from diaphane.model.blocks import Cond
from diaphane.model.controlnet import ControlNet, ControlNetConfig, controlling
from diaphane.model.ops import TORCH, Site
from diaphane.samplers.ddim import ddim, step
from diaphane.samplers.dpmpp import dpmpp
from diaphane.samplers.euler import euler, euler_ancestral
from diaphane.samplers.heun import heun
from diaphane.samplers.inversion import last
from diaphane.samplers.noise import seeded
from diaphane.samplers.parameterisation import Denoise
from diaphane.samplers.path import leading
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import golden_stylealigned
from .golden_latent import TINY
from .golden_reader import Folder
from .style_world import CFG, F64, SCHEDULE, at, drawn, net, prompts, told

PATH = leading(6, offset=1)


def seen_by(denoise: Denoise, calls: list[tuple[Tensor, Tensor]]) -> Denoise:
    """The same network, with what it is shown noted."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        calls.append((x, t))
        return denoise(x, t)

    return predict


def linear(x: Tensor, t: Tensor) -> Tensor:
    """A network of no use but quick."""
    return 0.3 * x + t.to(x)[:, None, None, None] / 4000


@pytest.mark.parametrize("end", [0, -1])
def test_inversion_takes_eps_at_the_timestep_that_it_goes_to(end: int):
    z0, path, calls = drawn(1, 4, 8, 8), leading(5, end=end), []
    zts = sr.trajectory(z0, sr.inverted(seen_by(linear, calls), z0, SCHEDULE, path), path)
    assert zts.shape == (6, 1, 4, 8, 8)
    assert torch.equal(zts[-1], z0)
    ups = list(pairwise(reversed(path)))
    assert [float(t[0]) for _, t in calls] == [s for t, s in ups if s != t]
    x = z0
    for i, (t, s) in enumerate(ups, 1):
        x = step(x, linear(x, at(s, x)), SCHEDULE(t), SCHEDULE(s))[0]
        assert (zts[5 - i] - x).abs().max() < 1e-12


def test_noise_added_outright_ends_in_the_picture():
    z0, z = drawn(2, 4, 8, 8), drawn(2, 4, 8, 8, seed=1)
    zts = sr.noised_outright(z0, z, SCHEDULE, PATH)
    assert torch.equal(zts[-1], z0)
    a = SCHEDULE(PATH[2])
    assert (zts[2] - (a.sqrt() * z0 + (1 - a).sqrt() * z)).abs().max() < 1e-12


@pytest.mark.parametrize("offset", [0, 1, 3, 5])
def test_what_the_network_sees_of_a_reference_is_the_authors_schedule(offset: int):
    zts, calls, x = drawn(7, 1, 4, 8, 8), [], drawn(3, 4, 8, 8)
    steps = list(sr.transferred(ddim, seen_by(linear, calls), x, SCHEDULE, PATH, sr.Trajectory(zts, PATH, offset)))
    for i, (shown, _) in enumerate(calls):
        assert torch.equal(shown[:1], zts[offset if i == 0 else max(offset + 1, i)])
        assert torch.equal(steps[i].x[:1], zts[max(offset + 1, i + 1)])
    alone = list(ddim(linear, x, SCHEDULE, PATH))
    assert torch.equal(steps[-1].x[1:], alone[-1].x[1:])
    assert torch.equal(steps[-1].x[0], zts[-1, 0])


@pytest.mark.parametrize("walk", [euler, heun, dpmpp, partial(euler_ancestral, noise=None)])
def test_a_drawn_reference_held_to_its_own_walk_changes_nothing(walk):
    """The trajectory of a reference that was drawn is what it would have been beside its targets, history and all."""
    if isinstance(walk, partial):
        walk = partial(euler_ancestral, noise=seeded([1, 2, 3]))
        again, alone = (partial(euler_ancestral, noise=seeded(rows)) for rows in ([1, 2, 3], [1]))
    else:
        again = alone = walk
    x, ops = drawn(3, 4, 8, 8), style_aligned(TORCH, [0, 0, 0])
    want = list(walk(told([0, 1, 2], ops), x, SCHEDULE, PATH))
    zts = sr.drawn(alone(told([0]), x[:1], SCHEDULE, PATH), x[:1])
    got = list(sr.transferred(again, told([0, 1, 2], ops), x, SCHEDULE, PATH, sr.Trajectory(zts, PATH)))
    bound = 1e-6 if walk is not heun else 1e-2  # Heun's second look is at a point between two steps
    for a, b in zip(got, want, strict=True):
        assert (a.x - b.x).abs().max() < bound * b.x.abs().max()


def test_bad_trajectories_are_refused():
    with pytest.raises(ValueError, match="one for each timestep"):
        sr.Trajectory(drawn(6, 1, 4, 8, 8), PATH)
    with pytest.raises(ValueError, match=r"0 ... 5"):
        sr.Trajectory(drawn(7, 1, 4, 8, 8), PATH, 6)
    with pytest.raises(ValueError, match="as many latents; got 2"):
        sr.trajectory(drawn(1, 4, 8, 8), iter([drawn(1, 4, 8, 8)] * 2), PATH)


def control() -> ControlNet:
    torch.manual_seed(5)
    cfg: ControlNetConfig = controlling(CFG)
    made = ControlNet(cfg).eval().requires_grad_(False).double()
    for p in made.parameters():
        p.copy_(p + 0.05 * torch.randn(p.shape))
    return made


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_references_get_no_residuals_and_targets_their_own(guidance: float):
    made, hints, x = control(), drawn(2, 3, 64, 64).sigmoid(), drawn(3, 4, 8, 8)
    positive, negative = prompts(3)

    def eps(control: Control) -> Tensor:
        return denoiser(net(), positive, negative, schedule=SCHEDULE, ids=torch.ones(3, 6), guidance=guidance,
                        controls=[control])(x, at(500, x))  # fmt: skip

    got = eps(TargetControl(net=made, hint=hints, scale=0.8, refs=[0, 0, 0]))
    some = torch.tensor([0.0, 0.8, 0.8], dtype=F64)
    want = eps(Control(net=made, hint=torch.cat([torch.zeros_like(hints[:1]), hints]), scale=some))
    assert (got - want).abs().max() < 1e-9
    plain = denoiser(net(), positive, negative, schedule=SCHEDULE, ids=torch.ones(3, 6), guidance=guidance)
    assert (got[0] - plain(x, at(500, x))[0]).abs().max() < 1e-9
    each = TargetControl(net=made, hint=hints, scale=torch.tensor([0.8, 0.0], dtype=F64), refs=[0, 0, 0])
    assert (eps(each)[1] - got[1]).abs().max() < 1e-9
    assert (eps(each)[2] - plain(x, at(500, x))[2]).abs().max() < 1e-9


def test_the_authors_slip_tells_the_controlnet_the_negative_text_twice():
    heard = []

    class Deaf(ControlNet):
        def forward(self, x, c: Cond, hint, ops=TORCH):  # type: ignore[override]
            heard.append(c)
            return super().forward(x, c, hint, ops)

    made = control()
    made.__class__ = Deaf
    x, (positive, negative) = drawn(3, 4, 8, 8), prompts(3)
    for slip in (False, True):
        one = TargetControl(net=made, hint=torch.zeros(1, 3, 64, 64), refs=[0, 0, 0], negative_text=slip)
        denoiser(net(), positive, negative, schedule=SCHEDULE, ids=torch.ones(3, 6), controls=[one])(x, at(500, x))
        c = heard.pop()
        assert torch.equal(c.context[:2], negative.context[1:])
        assert torch.equal(c.context[2:], (negative if slip else positive).context[1:])
        assert torch.equal(c.emb[:2], c.emb[2:]) == slip


def test_a_lora_for_targets_leaves_the_reference_with_base_weights():
    class Thin:
        down, up, scale = drawn(2, 16, seed=8), drawn(16, 2, seed=9), 0.5

    name = "enc.1.1.blocks.0.self_attn.q.weight"
    refs, x = [0, 0, 0], drawn(3, 4, 8, 8)
    positive, negative = prompts(3)
    ops = style_aligned(TORCH, refs)
    given = {"schedule": SCHEDULE, "ids": torch.ones(3, 6), "guidance": 3.0}
    assert weights(refs).tolist() == [0, 1, 1]
    assert weights([0, 0, 2, 2], [0.5, 2.0]).tolist() == [0, 0.5, 0, 2.0]
    base = denoiser(net(), positive, negative, ops=ops, **given)(x, at(500, x))
    mixed = beside(net(), {name: Thin()}, weights(refs))
    got = denoiser(mixed, positive, negative, ops=ops, **given)(x, at(500, x))
    assert (got[0] - base[0]).abs().max() < 1e-9
    assert (got[1:] - base[1:]).abs().amax((1, 2, 3)).min() > 1e-4


def alone(batch: Batch) -> Denoise:
    """The same text for every window."""
    rows = [0] * len(batch.views)
    return told(rows)


def test_one_window_is_the_plain_network_bit_for_bit():
    x = drawn(1, 4, 8, 8)
    denoise = multidiffusion(alone, windows(8, 8, 8, 4))
    assert torch.equal(denoise(x, at(500, x)), told([0])(x, at(500, x)))


@pytest.mark.parametrize(
    ("height", "width", "circular"), [(8, 20, False), (8, 20, True), (12, 16, False), (4, 22, False)]
)
def test_averaged_predictions_are_averaged_steps(height: int, width: int, circular: bool):
    views = windows(height, width, 8, 4, circular=circular)
    x, (t, s) = drawn(1, 4, height, width), (501, 334)
    total, count = torch.zeros_like(x), torch.zeros(height, width, dtype=F64)
    for view in views:
        columns = torch.arange(view.left, view.right) % width
        part = x[:, :, view.top : view.bottom][..., columns]
        moved = step(part, told([0])(part, at(t, part)), SCHEDULE(t), SCHEDULE(s))[0]
        rows = torch.arange(view.top, view.bottom)[:, None]
        total[:, :, rows, columns] += moved
        count[rows, columns] += 1
    for batch in (1, 3):
        denoise = multidiffusion(alone, views, batch=batch)
        got = last(ddim(denoise, x, SCHEDULE, [t, s])).x
        assert (got - total / count).abs().max() < 1e-9


def test_windows_cover_everything_and_wrap_around():
    assert windows(8, 20, 8, 4) == [View(0, 8, left, left + 8) for left in (0, 4, 8, 12)]
    assert [view.left for view in windows(8, 21, 8, 4)] == [0, 4, 8, 12, 13]
    assert [view.left for view in windows(8, 20, 8, 4, circular=True)] == [0, 4, 8, 12, 16]
    assert windows(6, 6, 8, 4) == [View(0, 6, 0, 6)]
    assert nearest(windows(8, 20, 8, 4), [0, 1], 20) == [0, 0, 1, 1]
    assert nearest(windows(8, 20, 8, 4, circular=True), [0, 0.5], 20, circular=True) == [0, 1, 1, 0, 0]
    assert spread(2) == [0.25, 0.75]
    for bad in ((8, 8, 4, 5), (8, 8, 4, 0)):
        with pytest.raises(ValueError, match="gaps"):
            windows(*bad)
    x = drawn(1, 4, 8, 24)
    with pytest.raises(ValueError, match="uncovered"):
        multidiffusion(alone, windows(8, 20, 8, 4))(x, at(5, x))
    with pytest.raises(ValueError, match="no window of 8 x 24"):
        multidiffusion(alone, windows(16, 24, 16, 8))(x, at(5, x))
    with pytest.raises(ValueError, match="one picture at a time"):
        multidiffusion(alone, windows(8, 20, 8, 4))(drawn(2, 4, 8, 20), torch.ones(2))
    with pytest.raises(ValueError, match=r"has a reference 0 ... 0; got"):
        multidiffusion(
            alone, windows(8, 20, 8, 4), references=sr.Trajectory(drawn(7, 1, 4, 8, 8), PATH), assigned=[0, 1]
        )


def test_each_window_of_a_panorama_has_the_style_of_its_reference():
    views = windows(8, 20, 8, 4)
    assigned, zts, x = nearest(views, spread(2), 20), drawn(7, 2, 4, 8, 8, seed=4), drawn(1, 4, 8, 20)
    assert assigned == [0, 0, 1, 1]

    def make(batch: Batch) -> Denoise:
        rows = [1 + i for i in batch.references] + [0] * len(batch.views)
        return told(rows, style_aligned(TORCH, batch.refs, Sharing(norms=True)))

    references = sr.Trajectory(zts, PATH)
    eps = [
        multidiffusion(make, views, batch=b, references=references, assigned=assigned)(x, at(PATH[2], x))
        for b in (1, 3, 4)
    ]
    assert all((one - eps[0]).abs().max() < 1e-9 for one in eps)
    first = torch.cat([zts[2][:1], x[..., :8]])
    want = told([1, 0], style_aligned(TORCH, [0, 0], Sharing(norms=True)))(first, at(PATH[2], first))[1]
    assert (eps[0][0, :, :, :4] - want[:, :, :4]).abs().max() < 1e-9  # where no other window is


def test_shared_maps_are_means_of_the_softmax_and_change_nothing():
    q, k, v = (drawn(6, 2, 16, 8, seed=s) for s in range(3))
    maps = SharedMaps([1, 2], 3)
    ops = maps.watching(TORCH)
    seen = Seen(shared([0, 0, 0, 3, 3, 3], 16, 0.5, 0.25), None, torch.tensor([0, 0, 0, 3, 3, 3]))
    site, want = Site("mid", 0, "self"), []
    for scale in (1.0, 2.0):
        assert torch.equal(
            ops.attend(site, scale * q, k, v, None, seen), TORCH.attend(site, scale * q, k, v, None, seen)
        )
        ref = torch.tensor([0, 0, 0, 3, 3, 3])
        a, b = reference.adain(scale * q, ref), reference.adain(k, ref)
        logits = torch.cat([a[4] @ b[4].mT, 0.5 * (a[4] @ k[3].mT) + 0.25 * 8**0.5], -1) * 8**-0.5
        want.append(logits.softmax(-1).mean(0))
    got = maps.mean(1, 16)
    assert (got - (want[0] + want[1]) / 2).abs().max() < 1e-9
    assert (got.sum(1) - 1).abs().max() < 1e-12
    few = SharedMaps([1], 3, queries=[5], tokens=16)
    few.watching(TORCH).attend(site, q, k, v, None, seen)
    assert few.mean(1, 16).shape == (1, 32)
    assert (few.mean(1, 16)[0] - want[0][5]).abs().max() < 1e-9
    with pytest.raises(ValueError, match="16 tokens of image 1"):
        maps.mean(1, 64)
    with pytest.raises(ValueError, match="no image 3 among 3"):
        SharedMaps([3], 3).watching(TORCH).attend(site, q, k, v)


def test_a_walk_is_watched_at_every_resolution():
    maps, words, x = SharedMaps([1], 2), WordMaps([[1], [2, 3]], 2), drawn(2, 4, 8, 16)
    ops = style_aligned(words.watching(maps.watching(TORCH)), [0, 0])
    for t in (900, 100):
        assert torch.equal(told([0, 1], ops)(x, at(t, x)), told([0, 1], style_aligned(TORCH, [0, 0]))(x, at(t, x)))
    assert {n: each.count for (_, n), each in maps.means.items()} == {128: 6, 32: 10}
    assert words.combined((8, 16)).shape == (2, 2, 8, 16)
    assert all(((each.value > 0) & (each.value < 1)).all() for each in words.means.values())
    with pytest.raises(ValueError, match=r"words are tokens 0 ... 4"):
        told([0, 1], WordMaps([[5]], 2).watching(TORCH))(x, at(5, x))
    with pytest.raises(ValueError, match="no attention to text"):
        WordMaps([[1]], 2).combined((8, 16))


def test_words_maps_are_means_over_their_tokens():
    q, k = drawn(4, 2, 6, 8), drawn(4, 2, 5, 8, seed=1)
    words = WordMaps([[1, 3]], 2)
    words.watching(TORCH).attend(Site("mid", 0, "cross"), q, k, k)
    want = (q @ k.mT * 8**-0.5).softmax(-1).mean(1)[2:, :, [1, 3]].mean(-1)
    assert (words.means[6].value[:, 0] - want).abs().max() < 1e-12


def test_principal_components_are_those_of_a_singular_value_decomposition():
    x = drawn(24, 40)
    left, values = principal(x)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert (left @ left.T - u[:, :3] @ u[:, :3].T).abs().max() < 1e-9
    assert (values[:10] - s[:10]).abs().max() < 1e-9
    shown = colours(x, (4, 6))
    assert shown.shape == (3, 4, 6)
    assert shown.amin((1, 2)).tolist() == [0, 0, 0]
    assert shown.amax((1, 2)).tolist() == [1, 1, 1]
    enlarged = picture(shown, (32, 48))
    assert enlarged.shape == (3, 32, 48)
    assert (enlarged[:, ::8, ::8] / 2 + 0.5 - shown.float()).abs().max() < 1e-6
    heat = picture(x[:4, :6], (8, 12))
    assert heat.shape == (3, 8, 12)
    assert heat.amin() == -1
    assert heat.amax() == 1


def test_grids_are_those_of_the_levels():
    assert grid((128, 96), 128 * 96 // 16) == (32, 24)
    assert grid((9, 13), 5 * 7) == (5, 7)
    with pytest.raises(ValueError, match="no level of 8 x 8 latents has 20 tokens"):
        grid((8, 8), 20)


def test_the_example_of_the_docs_draws_a_set():
    text = (Path(__file__).parents[1] / "docs" / "style_aligned.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    said = code.replace('"stabilityai/stable-diffusion-xl-base-1.0", variant="fp16"', repr(str(TINY)))
    said = said.replace("(1024, 1024)", "(64, 64)").replace("leading(50, ", "leading(2, ")
    assert said != code
    names: dict[str, Any] = {}
    exec(said, names)
    assert names["drawn"].shape == (3, 3, 64, 64)


def found_wrong(root: Path) -> list[str]:
    """The names of the cases of a folder of reference data that fail."""
    wrong = []
    for case in golden_stylealigned.cases(Folder(root)):
        try:
            if not case.skip:
                case.check()
        except AssertionError:
            wrong.append(case.name)
    return wrong


def test_the_golden_runner_fails_by_name_for_what_it_does_not_know(tmp_path: Path):
    stem, golden = "attn_default", TINY.parent / "stylealigned"

    def told(name: str, change: Callable[[dict], object]):
        said = json.loads((golden / f"{stem}.json").read_text())
        change(said)
        (tmp_path / f"{name}.json").write_text(json.dumps(said))
        shutil.copy(golden / f"{stem}.safetensors", tmp_path / f"{name}.safetensors")

    told("another_name", lambda said: None)
    told("level", lambda said: said["settings"]["style_aligned"].update(only_self_level=0.9))  # of a network
    assert found_wrong(tmp_path) == []
    told("setting", lambda said: said["settings"]["style_aligned"].update(sharpness=1))
    told("key", lambda said: said.update(weather=1))
    told("flag", lambda said: said["settings"]["style_aligned"].update(adain_values=True))
    told("weights", lambda said: said["weights"].update(sha256="0"))
    assert found_wrong(tmp_path) == ["flag", "key", "setting", "weights"]
    told("kind", lambda said: said.update(kind="watercolour"))
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "weights.safetensors").unlink()
    tensors = load_file(tmp_path / "another_name.safetensors")
    save_file(tensors | {"out.more": tensors["out.q"].clone()}, tmp_path / "another_name.safetensors")
    wrong = set(found_wrong(tmp_path))
    assert {"unknown file kind.json of kind watercolour", "unknown file kind.safetensors of kind watercolour"} <= wrong
    assert {"unknown file notes.txt", "another_name"} <= wrong
    assert "weights" not in wrong


def test_what_changes_other_verbs_goes_with_it_in_either_order():
    x, factors = drawn(3, 4, 8, 8), FreeU(1.2, 1.4, 0.9, 0.2)
    one = freeu(style_aligned(TORCH, [0, 0, 0]), CFG, factors)
    two = style_aligned(freeu(TORCH, CFG, factors), [0, 0, 0])
    got = told([0, 1, 2], one)(x, at(500, x))
    assert torch.equal(got, told([0, 1, 2], two)(x, at(500, x)))
    alone = told([0], freeu(TORCH, CFG, factors))(x[:1], at(500, x[:1]))
    assert (got[:1] - alone).abs().max() < 1e-9
