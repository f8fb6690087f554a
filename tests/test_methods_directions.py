"""What moves h: delta blocks, free deltas, means, components, the Jacobian; thresholds and correlations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diaphane.methods.blend import norm_matched_slerp, replacement
from diaphane.methods.correlation import correlate, correlations, pearson
from diaphane.methods.delta import (
    ADMDeltaBlock,
    DeltaBlock,
    FreeDelta,
    delta_block,
    given,
    global_delta,
    mean_delta,
    timeless,
)
from diaphane.methods.directions import jacobian, mean_difference, pca
from diaphane.methods.taps import look, tapped
from diaphane.methods.thresholds import first_reaching, t_boost, t_edit, table
from diaphane.model.blocks import Cond
from diaphane.model.ops import JVP
from diaphane.samplers.ddim import ddim
from diaphane.samplers.parameterisation import times
from diaphane.samplers.path import papers, upward
from torch import Tensor

from .methods_world import KINDS, SCHEDULE, World, random, same, world_of

C = Cond(random(2, 16, seed=9))


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest) -> World:
    return world_of(request.param)


# ---- Δh ------------------------------------------------------------------------------------------------------------


def norm(x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float) -> Tensor:
    grouped = x.reshape(len(x), groups, -1)
    y = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return y.reshape(x.shape) * w[:, None, None] + b[:, None, None]


def point(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("oi,bihw->bohw", w[:, :, 0, 0], x) + b[:, None, None]


def randomised(f: torch.nn.Module) -> dict[str, Tensor]:
    f.double().requires_grad_(False)
    for i, p in enumerate(f.parameters()):
        p.copy_(random(*p.shape, seed=20 + i))
    return dict(f.named_parameters())


def test_the_ddpm_block_is_conv_time_norm_silu_conv():
    f, h = DeltaBlock(8, 16, groups=4), random(2, 8, 3, 3)
    w = randomised(f)
    time = F.silu(C.emb) @ w["emb.weight"].T + w["emb.bias"]
    for emb, add in ((C.emb, time[:, :, None, None]), (None, 0)):
        y = point(h, w["conv1.weight"], w["conv1.bias"]) + add
        y = F.silu(norm(y, w["norm.weight"], w["norm.bias"], 4, 1e-6))
        same(f(h, emb), point(y, w["conv2.weight"], w["conv2.bias"]), 1e-12)
    same(timeless(f)(h, C.emb), f(h, None), 0)


def test_the_adm_block_is_norm_silu_conv_time_norm_silu_conv():
    f, h = ADMDeltaBlock(8, 16, groups=4), random(2, 8, 3, 3)
    w = randomised(f)
    time = F.silu(C.emb) @ w["emb.weight"].T + w["emb.bias"]
    for emb, add in ((C.emb, time[:, :, None, None]), (None, 0)):
        y = F.silu(norm(h, w["norm1.weight"], w["norm1.bias"], 4, 1e-5))
        y = point(y, w["conv1.weight"], w["conv1.bias"]) + add
        y = F.silu(norm(y, w["norm2.weight"], w["norm2.bias"], 4, 1e-5))
        same(f(h, emb), point(y, w["conv2.weight"], w["conv2.bias"]), 1e-12)


@pytest.mark.parametrize("kind", [DeltaBlock, ADMDeltaBlock])
def test_a_block_is_built_from_its_tensors_alone(kind: type[torch.nn.Module]):
    f, h = kind(8, 16, groups=4), random(2, 8, 3, 3)
    tensors = {name: p.clone() for name, p in randomised(f).items()}
    again = delta_block(tensors, groups=4)
    assert type(again) is kind
    assert torch.equal(again(h, C.emb), f(h, C.emb))


def test_the_published_block_has_788992_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in DeltaBlock(512, 512).parameters()) == 788_992


def test_free_deltas_serve_the_nearest_timestep_and_are_trained_where_they_are_used():
    free = FreeDelta((4, 2, 2), [999, 500, 0, -1]).double()
    assert sorted(free.deltas) == ["0", "500", "999"]
    assert torch.equal(free.at(600), free.deltas["500"])
    assert torch.equal(free.at(250), free.deltas["500"])  # equally near: the later one
    assert torch.equal(free.at(751), free.deltas["999"])
    h = random(2, 4, 2, 2)
    same(given(free, 2.0, origin=0.5)(h, 510, C).detach(), 0.5 * h + 2 * free.deltas["500"])
    given(free)(h, 510, C).sum().backward()
    assert [p.grad is not None for p in (free.deltas["0"], free.deltas["500"], free.deltas["999"])] == [
        False, True, False,
    ]  # fmt: skip


def test_free_deltas_start_as_the_authors_or_at_zero():
    values = torch.stack(list(FreeDelta((64, 8, 8), [999, 500, 0]).deltas.values()))
    assert float(values.detach().std()) == pytest.approx(0.2, rel=0.05)
    assert not FreeDelta((4, 2, 2), std=0.0).at(7).any()
    assert torch.equal(FreeDelta((4, 2, 2), seed=1).at(0), FreeDelta((4, 2, 2), seed=1).at(0))
    assert not torch.equal(FreeDelta((4, 2, 2), seed=1).at(0), FreeDelta((4, 2, 2), seed=2).at(0))


def test_given_deltas_may_be_one_map_or_one_a_timestep():
    h, d, e = random(2, 4, 2, 2), random(4, 2, 2, seed=1), random(2, 4, 2, 2, seed=2)
    same(given(d, 0.5)(h, 3, C), h + 0.5 * d)
    same(given({0: d, 100: e}, 0.5)(h, 90, C), h + 0.5 * e)
    same(given({0: d, 100: e}, 0.5)(h, 10, C), h + 0.5 * d)


def test_mean_and_global_deltas_are_means_over_images_then_over_timesteps():
    per_image = {t: random(5, 4, 2, 2, seed=t) for t in (999, 500, 0)}
    mean = mean_delta(per_image)
    for t, delta in mean.items():
        same(delta[0], sum(per_image[t]) / 5)
    same(global_delta(mean), (mean[999] + mean[500] + mean[0]) / 3)


# ---- directions without training -----------------------------------------------------------------------------------


def test_the_mean_difference_is_target_minus_source_at_every_timestep():
    source, target = (
        {0: random(3, 4, 2, 2), 9: random(3, 4, 2, 2, seed=1)},
        {0: random(5, 4, 2, 2), 9: random(5, 4, 2, 2)},
    )
    found = mean_difference(source, target)
    for t in (0, 9):
        same(found[t], target[t].mean(0, keepdim=True) - source[t].mean(0, keepdim=True))
    with pytest.raises(ValueError, match="same path"):
        mean_difference(source, {0: target[0]})


def test_pca_is_the_eigendecomposition_of_the_covariance():
    h = random(12, 3, 2, 2) * torch.linspace(3, 0.5, 12, dtype=torch.float64).view(3, 2, 2)
    values, vectors = np.linalg.eigh(np.cov(h.flatten(1).numpy().T))
    found = pca(h, 4)
    np.testing.assert_allclose(found.variances, values[::-1][:4], atol=1e-10)
    np.testing.assert_allclose(found.mean, h.numpy().mean(0, keepdims=True), atol=1e-12)
    flat = found.directions.flatten(1).numpy()
    np.testing.assert_allclose(np.abs((flat * vectors[:, ::-1][:, :4].T).sum(1)), 1, atol=1e-8)
    np.testing.assert_allclose(flat @ flat.T, np.eye(4), atol=1e-10)
    for k in (0, 12):
        with pytest.raises(ValueError, match=r"1 \.\.\. 11 components"):
            pca(h, k)


def test_the_jacobians_triples_are_those_of_the_explicit_jacobian(world: World):
    c = (world.embed or world.unet.embed)(times(600, world.style.x_T))
    h, skips = look(world.unet, world.style.x_T, 600, world.embed)
    found = jacobian(world.unet, h, skips, c, k=3, iterations=20)
    one, first = [skip[:1] for skip in skips], Cond(c.emb[:1])  # images do not mix: the first one alone
    whole = torch.func.jacrev(lambda h: world.unet.decode(h, one, first, JVP)[0, :3])(h[:1])
    explicit = whole.flatten(3).flatten(0, 2)  # (N', N)
    values = torch.linalg.svdvals(explicit)[:3]
    same(found.values[:2, 0], values[:2], 1e-4)
    same(found.values[2:, 0], values[2:], 0.02)  # as the next one is near, the last one comes slowly
    for k in range(3):
        v, u, value = found.directions[k, 0].flatten(), found.effects[k, 0].flatten(), found.values[k, 0]
        same(explicit @ v, value * u)
        assert float((explicit.T @ u - value * v).norm() / value) < (0.02, 0.1, 0.5)[k]
    for found_of in (found.directions, found.effects):
        for i in range(2):
            rows = found_of[:, i].flatten(1)
            same(rows @ rows.T, torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="got k = 0"):
        jacobian(world.unet, h, skips, c, k=0)


# ---- when to edit --------------------------------------------------------------------------------------------------


def test_a_threshold_is_first_reached_from_below_even_where_the_table_falls_again():
    distances = {900: 0.9, 0: 0.05, 300: 0.4, 600: 0.2}
    assert first_reaching(distances, 0.05) == 0
    assert first_reaching(distances, 0.06) == 300
    assert first_reaching(distances, 0.41) == 900
    with pytest.raises(ValueError, match=r"no timestep reaches 1\.000: the table ends at 0\.900"):
        first_reaching(distances, 1.0)
    with pytest.raises(ValueError, match="no timestep reaches"):
        first_reaching({}, 0.1)


def test_t_edit_scales_its_threshold_by_the_texts_cosine_and_t_boost_does_not():
    distances = {t: t / 1000 for t in range(0, 2000, 10)}
    assert t_edit(distances) == 330
    assert t_edit(distances, cosine=0.5) == 170
    assert t_edit(distances, cosine=1.0, threshold=0.2) == 200
    assert t_boost(distances) == 1200
    assert t_boost(distances, 0.1) == 100


def test_a_table_holds_mean_distances_by_the_timestep_reached():
    images, path = random(3, 3, 4, 4).tanh(), papers(5)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return x.sin()

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().flatten(1).mean(1)

    found = table(denoise, images, SCHEDULE, path, distance)
    walk = list(ddim(denoise, images, SCHEDULE, upward(path)))
    assert list(found.x) == list(found.x0) == [249, 499, 749, 999]
    for step in walk:
        assert found.x[step.s] == pytest.approx(float((step.x - images).abs().mean()))
        assert found.x0[step.s] == pytest.approx(float((step.x0 - images).abs().mean()))


# ---- correlations --------------------------------------------------------------------------------------------------


def sizes(x: Tensor) -> np.ndarray:
    return np.array([math.sqrt(float(image.square().sum())) for image in x])


def test_correlations_are_numpys_over_images_and_over_every_pair_of_different_images():
    h, g = random(6, 4, 3, 3), random(6, 5, 3, 3, seed=1)
    found = correlate(7, h, g, gamma=0.4)
    homo = np.corrcoef(sizes(h), sizes(g))[0, 1]
    assert found.t == 7
    assert found.homo == pytest.approx(homo)
    shifts = range(1, 6)
    hetero = np.mean([np.corrcoef(np.roll(sizes(h), k), sizes(g))[0, 1] for k in shifts])
    assert found.hetero == pytest.approx(hetero)
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    pooled = np.corrcoef([sizes(h)[j] for _, j in pairs], [sizes(g)[i] for i, _ in pairs])[0, 1]
    assert found.hetero == pytest.approx(pooled)
    mixed = [np.corrcoef(sizes(0.6 * h + 0.4 * h.roll(k, 0)), sizes(g))[0, 1] for k in shifts]
    assert found.alt["lerp"] == pytest.approx(np.mean(mixed))


def test_norm_matched_slerp_leaves_the_correlation_alone_and_replacement_loses_it():
    h, g = random(6, 4, 3, 3), random(6, 5, 3, 3, seed=1)
    found = correlate(7, h, g, blends={"slerp": norm_matched_slerp, "replacement": replacement})
    assert found.alt["slerp"] == pytest.approx(found.homo, abs=1e-9)
    assert found.alt["replacement"] == pytest.approx(found.hetero, abs=1e-9)


def test_pearson_is_nan_where_nothing_varies_and_one_where_all_goes_together():
    a = random(6)
    assert pearson(a, 3 * a + 1) == pytest.approx(1)
    assert pearson(a, -a) == pytest.approx(-1)
    assert math.isnan(pearson(a, torch.ones(6)))
    with pytest.raises(ValueError, match="at least 3 images; got 2"):
        correlate(0, random(2, 4, 3, 3), random(2, 4, 3, 3))


def test_correlations_of_a_walk_are_those_of_h_and_the_matched_skip_at_every_step(world: World):
    x, path = random(4, 3, 8, 8), papers(3)
    found = list(correlations(tapped(world.unet, x, SCHEDULE, path), gamma=0.2))
    assert [c.t for c in found] == path[:-1]
    for ours, tap in zip(found, tapped(world.unet, x, SCHEDULE, path), strict=True):
        assert ours.homo == pytest.approx(np.corrcoef(sizes(tap.h), sizes(tap.skips[-1]))[0, 1])
        assert ours == correlate(tap.step.t, tap.h, tap.skips[-1], gamma=0.2)
