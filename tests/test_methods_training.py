"""Training Δh: the directional loss by its definition, the trained path, and that it learns on a toy problem."""

import math

import pytest
import torch
from diaphane.methods.asyrp import deltas
from diaphane.methods.delta import DeltaBlock, FreeDelta, given
from diaphane.methods.train_delta import Loss, directional_loss, text_direction, train_delta, training_path
from diaphane.model.ddpm import DDPM, DDPMConfig
from diaphane.samplers.schedule import linear
from torch import Tensor

from .methods_world import random, same


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def test_the_text_direction_is_the_unit_mean_of_unit_differences():
    source, target = random(5, 4), random(5, 4, seed=1)
    want = unit(sum((unit(target[i]) - unit(source[i]) for i in range(5)), torch.zeros(4, dtype=torch.float64)) / 5)
    same(text_direction(source, target)[0], want)


def test_the_directional_loss_is_one_minus_the_cosine_of_the_change_averaged_over_images():
    edited, source, text = random(3, 4), random(3, 4, seed=1), random(1, 4, seed=2)
    each = []
    for i in range(3):
        change = unit(edited[i]) - unit(source[i])
        each.append(1 - float(change @ text[0]) / float(change.norm() * text.norm()))
    assert float(directional_loss(edited, source, text)) == pytest.approx(sum(each) / 3, abs=1e-6)
    assert float(directional_loss(unit(source[0])[None] + 1e-3 * text, source[:1], text)) < 0.5
    assert math.isfinite(float(directional_loss(source, source, text)))


def test_the_trained_path_is_what_lies_at_or_above_t_edit():
    assert training_path(6, 300) == [999, 799, 599, 399, -1]
    assert training_path(6, 399) == [999, 799, 599, 399, -1]
    assert training_path(6, 400) == [999, 799, 599, -1]
    assert training_path(40, 0)[-3:] == [25, 0, -1]
    with pytest.raises(ValueError, match="no timestep of 6 steps lies at or above t_edit = 1000"):
        training_path(6, 1000)


class Toy:
    """A small network, an encoder that sees colours, and a text direction that asks for red."""

    def __init__(self):
        torch.manual_seed(5)
        cfg = DDPMConfig(resolution=8, base=16, mult=(1, 2), blocks=1, attention=(4,), groups=8)
        self.unet = DDPM(cfg).eval().requires_grad_(False)
        self.text = torch.tensor([[1.0, -0.5, -0.5, 0.0]])
        self.images = [(torch.randn(1, 3, 8, 8).tanh(), torch.randn(1, 3, 8, 8)) for _ in range(2)]
        self.path = [999, 666, -1]

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), torch.ones(len(x), 1)], dim=1)

    def passes(self, edit, optimiser: torch.optim.Optimizer, n: int, **settings) -> list[list[Loss]]:
        return [
            list(
                train_delta(
                    self.unet, self.images, linear(), self.path, edit, optimiser, self.encode, self.text, **settings
                )
            )
            for _ in range(n)
        ]


@pytest.mark.parametrize("kind", ["block", "free"])
def test_training_lowers_the_directional_loss(kind: str):
    toy = Toy()
    f = DeltaBlock(32, 64) if kind == "block" else FreeDelta((32, 4, 4), toy.path, std=0.0)
    edit = deltas([f], [1.0]) if isinstance(f, DeltaBlock) else given(f)
    runs = toy.passes(edit, torch.optim.Adam(f.parameters(), lr=0.02), 25, w_l1=0.01)
    assert [loss.t for loss in runs[0]] == [999, 666, 999, 666]
    first, final = (sum(loss.direction for loss in runs[i]) / 4 for i in (0, -1))
    assert final < first - 0.25


def test_the_loss_is_its_terms_and_its_weights():
    toy = Toy()
    f = DeltaBlock(32, 64)
    (losses,) = toy.passes(
        deltas([f], [1.0]), torch.optim.SGD(f.parameters(), lr=0.0), 1, w_clip=0.7, w_l1=2.0, text_cosine=0.9
    )
    for loss in losses:
        assert loss.clip == pytest.approx(-math.log((2 - loss.direction) / 2), rel=1e-5)
        assert loss.total == pytest.approx(0.7 * loss.clip + 2.0 * 0.9 * loss.l1, rel=1e-5)
        assert loss.l1 > 0


def test_without_an_edit_the_l1_term_is_zero_and_the_network_is_not_trained():
    toy = Toy()
    free = FreeDelta((32, 4, 4), toy.path, std=0.0)
    before = [p.clone() for p in toy.unet.parameters()]
    (losses,) = toy.passes(given(free), torch.optim.SGD(free.parameters(), lr=0.0), 1)
    assert all(loss.l1 == 0 for loss in losses)
    assert all(torch.equal(a, b) for a, b in zip(before, toy.unet.parameters(), strict=True))


def test_a_step_is_taken_at_every_timestep_only_when_it_is_asked_for():
    toy = Toy()
    free = FreeDelta((32, 4, 4), toy.path, std=0.0)
    walk = train_delta(
        toy.unet, toy.images, linear(), toy.path, given(free),
        torch.optim.SGD(free.parameters(), lr=1.0), toy.encode, toy.text,
    )  # fmt: skip
    assert not any(p.any() for p in free.parameters())
    next(walk)
    assert free.deltas["999"].any()
    assert not free.deltas["666"].any()
    next(walk)
    assert free.deltas["666"].any()
