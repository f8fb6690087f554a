"""Edits of h alone: the blends and where they are put, against their definitions in float64."""

import math

import pytest
import torch
from diaphane.methods.blend import BLENDS, addition, lerp, match_norm, norm, norm_matched_slerp, replacement, slerp
from diaphane.methods.diffstyle import Content, at_h, calibrated, check, inject
from diaphane.methods.taps import closest
from diaphane.model.blocks import Cond
from diaphane.samplers.schedule import linear
from torch import Tensor

C = Cond(torch.zeros(1, 1))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


H, OTHER = random(3, 4, 8, 8), 2 * random(3, 4, 8, 8, seed=1)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def angle(a: Tensor, b: Tensor) -> float:
    """Between two maps, by their dot product."""
    return math.acos(float((a * b).sum() / a.norm() / b.norm()))


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.5, 1.0])
def test_slerp_is_its_formula_with_one_angle_per_image(gamma: float):
    for i in range(3):
        h, c = H[i : i + 1], OTHER[i : i + 1]
        a = angle(h, c)
        raw = math.sin((1 - gamma) * a) / math.sin(a) * h + math.sin(gamma * a) / math.sin(a) * c
        same(slerp(H, OTHER, gamma)[i : i + 1], raw)
        c = c / c.norm() * h.norm()
        matched = math.sin((1 - gamma) * a) / math.sin(a) * h + math.sin(gamma * a) / math.sin(a) * c
        same(norm_matched_slerp(H, OTHER, gamma)[i : i + 1], matched)


def test_norm_matched_slerp_keeps_the_norm_and_turns_by_gamma_of_the_angle():
    for gamma in (0.1, 0.3, 0.9):
        mixed = norm_matched_slerp(H, OTHER, gamma)
        same(norm(mixed), norm(H))
        for i in range(3):
            assert angle(H[i], mixed[i]) == pytest.approx(gamma * angle(H[i], OTHER[i]), abs=1e-9)
            assert angle(mixed[i], OTHER[i]) == pytest.approx((1 - gamma) * angle(H[i], OTHER[i]), abs=1e-9)


def test_norm_is_l2_of_the_whole_map_and_match_norm_changes_only_it():
    assert norm(H).shape == (3, 1, 1, 1)
    same(norm(H)[1].squeeze(), H[1].square().sum().sqrt())
    matched = match_norm(OTHER, H)
    same(norm(matched), norm(H))
    same(matched / norm(matched), OTHER / norm(OTHER))


def test_the_other_blends_are_their_formulas():
    same(lerp(H, OTHER, 0.3), 0.7 * H + 0.3 * OTHER)
    same(addition(H, OTHER, 0.3), H + 0.3 * OTHER)
    assert torch.equal(replacement(H, OTHER, 0.3), OTHER)
    assert set(BLENDS) == {"slerp", "lerp", "addition", "replacement"}


@pytest.mark.parametrize("blend", BLENDS)
def test_gamma_zero_changes_nothing_bit_for_bit(blend: str):
    assert torch.equal(BLENDS[blend](H, OTHER, 0.0), H)
    assert torch.equal(BLENDS[blend](H.float(), OTHER.float(), 0.0), H.float())


def test_slerp_of_equal_parallel_opposite_and_empty_maps_is_finite_and_the_chord():
    zero = torch.zeros_like(H)
    same(slerp(H, H, 0.3), H)
    same(norm_matched_slerp(H, 5 * H, 0.3), H)
    same(slerp(H, 3 * H, 0.5), 2 * H)
    same(slerp(H, -H, 0.3), 0.4 * H)
    same(slerp(H, zero, 0.3), 0.7 * H)
    same(slerp(zero, OTHER, 0.3), 0.3 * OTHER)
    assert torch.equal(norm_matched_slerp(zero, OTHER, 0.3), zero)
    near = H.float() * (1 + 1e-7 * OTHER.float())
    torch.testing.assert_close(norm_matched_slerp(H.float(), near, 0.3), H.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pair", ["apart", "equal", "opposite", "content zero", "both zero"])
def test_slerp_has_finite_gradients_everywhere(pair: str):
    h, c = {
        "apart": (H, OTHER),
        "equal": (H, H.clone()),
        "opposite": (H, -H),
        "content zero": (H, 0 * H),
        "both zero": (0 * H, 0 * H),
    }[pair]
    h, c = h.clone().requires_grad_(True), c.clone().requires_grad_(True)
    norm_matched_slerp(h, c, 0.3).square().sum().backward()
    assert h.grad is not None
    assert c.grad is not None
    assert h.grad.isfinite().all()
    assert c.grad.isfinite().all()


def test_the_closest_timestep_serves_and_of_two_equally_near_the_later():
    held = {0: torch.tensor(0.0), 100: torch.tensor(100.0), 200: torch.tensor(200.0)}
    for t, want in ((0, 0), (49, 0), (50, 100), (51, 100), (150, 200), (149, 100), (999, 200)):
        assert float(closest(t, held)) == want


# ---- where they are put --------------------------------------------------------------------------------------------


def half_mask() -> Tensor:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    return mask


@pytest.mark.parametrize("blend", BLENDS)
def test_a_mask_of_zeros_changes_nothing_and_of_ones_is_no_mask(blend: str):
    def edit(mask: Tensor | None) -> Tensor:
        return inject([Content({5: OTHER}, 0.4, mask)], BLENDS[blend])(H, 5, C)

    assert torch.equal(edit(torch.zeros(1, 1, 8, 8)), H)
    same(edit(torch.ones(1, 1, 8, 8)), edit(None))


def test_a_masked_edit_is_the_blend_of_the_masked_maps_inside_and_h_outside():
    mask = half_mask()
    edited = inject([Content({5: OTHER}, 0.4, mask)])(H, 5, C)
    inside = norm_matched_slerp(H[..., :4], OTHER[..., :4], 0.4)
    same(edited[..., :4], inside)
    assert torch.equal(edited[..., 4:], H[..., 4:])


def test_two_regions_get_each_its_own_content():
    third = random(3, 4, 8, 8, seed=2)
    left = Content({5: OTHER}, 0.4, half_mask())
    right = Content({5: third}, 0.7, 1 - half_mask())
    both = inject([left, right])(H, 5, C)
    same(both[..., :4], inject([left])(H, 5, C)[..., :4])
    same(both[..., 4:], inject([right])(H, 5, C)[..., 4:])
    same(both, inject([right, left])(H, 5, C))


def test_each_image_of_a_batch_may_have_its_own_mask_and_content():
    mask = torch.stack([half_mask()[0], 1 - half_mask()[0], torch.ones(1, 8, 8)])
    together = inject([Content({5: OTHER}, 0.4, mask)])(H, 5, C)
    for i in range(3):
        alone = inject([Content({5: OTHER[i : i + 1]}, 0.4, mask[i : i + 1])])(H[i : i + 1], 5, C)
        same(together[i : i + 1], alone)
    shared = inject([Content({5: OTHER[:1]}, 0.4)])(H, 5, C)
    same(shared[2:], norm_matched_slerp(H[2:], OTHER[:1], 0.4))


def test_a_mask_of_any_resolution_is_averaged_to_that_of_h():
    fine = torch.zeros(1, 1, 32, 32)
    fine[..., :14] = 1
    coarse = at_h(fine, H)
    assert coarse[0, 0, 0].tolist() == [1, 1, 1, 0.5, 0, 0, 0, 0]
    assert torch.equal(at_h(coarse, H), coarse)
    assert at_h(torch.ones(1, 1, 2, 2, dtype=torch.bool), H).dtype == H.dtype


def test_the_content_of_the_nearest_timestep_is_taken():
    content = Content({0: H, 100: OTHER}, 1.0)
    edit = inject([content], lerp)
    assert torch.equal(edit(H, 49, C), H)
    same(edit(H, 50, C), OTHER)


ONES = torch.ones(1, 1, 8, 8)
WRONG: dict[str, tuple[list[Content], str]] = {
    "nothing": ([], "at least one content"),
    "no timestep": ([Content({})], "no timestep"),
    "shape": ([Content({0: OTHER[:, :, :4]})], "(3, 4, 4, 8)"),
    "batch": ([Content({0: OTHER[:2]})], "batch"),
    "mask shape": ([Content({0: OTHER}, 0.3, ONES[0])], "a mask is (1, 1, H, W)"),
    "mask channels": ([Content({0: OTHER}, 0.3, ONES.expand(1, 4, 8, 8))], "a mask is (1, 1, H, W)"),
    "mask range": ([Content({0: OTHER}, 0.3, 2 * ONES)], "[0, 1]"),
    "no masks": ([Content({0: OTHER}, 0.3, ONES), Content({0: OTHER})], "a mask each"),
    "overlap": ([Content({0: OTHER}, 0.3, half_mask()), Content({0: OTHER}, 0.3, 0.1 * ONES)], "overlap"),
}


@pytest.mark.parametrize("what", WRONG)
def test_contents_that_cannot_be_injected_are_refused_in_one_line(what: str):
    contents, says = WRONG[what]
    with pytest.raises(ValueError) as caught:
        check(contents, H, len(H))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_masks_that_touch_without_overlapping_are_taken():
    check([Content({0: OTHER}, 0.3, half_mask()), Content({0: OTHER}, 0.3, 1 - half_mask())], H, len(H))


# ---- style calibration ---------------------------------------------------------------------------------------------


def test_calibration_is_its_definition_image_by_image():
    x, eps, edited = random(2, 3, 8, 8), random(2, 3, 8, 8, seed=1), random(2, 3, 8, 8, seed=2)
    a = linear()(700)
    ours = calibrated(x, eps, edited, a, 0.3)
    root, rest = math.sqrt(a), math.sqrt(1 - a)
    for i in range(2):
        p, q = (x[i] - rest * eps[i]) / root, (x[i] - rest * edited[i]) / root
        spread = [math.sqrt(float(((v - v.mean()) ** 2).sum()) / (v.numel() - 1)) for v in (p, q)]
        matched = q.mean() + (q - q.mean()) * spread[0] / spread[1]
        same(ours[i], x[i] + root * (matched - p) + 0.3 * rest * (edited[i] - eps[i]), 1e-10)


def test_calibration_without_an_edit_moves_nothing():
    x, eps, a = random(2, 3, 8, 8), random(2, 3, 8, 8, seed=1), linear()(700)
    same(calibrated(x, eps, eps.clone(), a, 0.3), x, 1e-10)


def test_at_omega_one_only_the_spread_is_corrected():
    x, eps, edited = random(2, 3, 8, 8), random(2, 3, 8, 8, seed=1), random(2, 3, 8, 8, seed=2)
    a = linear()(700)

    def step(omega: float) -> Tensor:
        return calibrated(x, eps, edited, a, omega) - x

    p = (x - (1 - a).sqrt() * edited) / a.sqrt()
    q = (x - (1 - a).sqrt() * eps) / a.sqrt()
    ratio = q.std((1, 2, 3), keepdim=True) / p.std((1, 2, 3), keepdim=True)
    same(step(1.0), a.sqrt() * (p - p.mean((1, 2, 3), keepdim=True)) * (ratio - 1), 1e-10)
    same(step(1.0) - step(0.0), (1 - a).sqrt() * (edited - eps), 1e-10)
