"""ConsiStory inside one call: by its equations, with other methods, compiled; Otsu's threshold; what is carried."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diaphane.methods.anchors import cached
from diaphane.methods.consistory import Heard, Told, consistory, others, places
from diaphane.methods.cost import shares
from diaphane.methods.dift import Matches, Plan, injected, matches, plan, smoothed, waves
from diaphane.methods.partly import stages, to_attention
from diaphane.methods.scene import Settings, by_steps, strength
from diaphane.methods.style_aligned import style_aligned
from diaphane.methods.subject_masks import Seeded, dropped, masks, otsu, thresholded, token_maps
from diaphane.methods.subject_words import places_of
from diaphane.model.ops import TORCH, Site
from diaphane.model.tokenizer import Tokenizer
from diaphane.model.unet import SD15, SD21, SDXL, SDXL_REFINER
from diaphane.samplers.path import leading
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from . import latent_twins as twins
from . import story_world as world
from .story_world import F64, UNET, random

WHERE = places(UNET.cfg)
TWO = torch.tensor([[1], [3]])
SIZES = WHERE.sizes(world.SIZE)


def call(**more: Any) -> tuple[Tensor, Heard]:
    """eps of two pictures, both halves, and what was heard."""
    told = {"images": 2, "tokens": TWO} | more
    ops, heard = told.pop("ops", TORCH), Heard()
    x = random(4, 4, *world.SIZE, seed=11)
    return UNET(x, cond(), consistory(ops, WHERE, Told(**told), heard)), heard


def cond() -> Any:
    cfg = UNET.cfg
    text = random(4, 7, cfg.context_dim, seed=12)
    return UNET.embed(
        torch.full((4,), 500.0, dtype=F64), text, random(4, cfg.pooled_dim or 0), torch.ones(4, 6).double()
    )


def some(share: float = 0.4) -> dict[int, Tensor]:
    """A random mask of two pictures at each level."""
    g = torch.Generator().manual_seed(5)
    return {level: torch.rand(2, h * w, generator=g) < share for level, (h, w) in SIZES.items()}


def seen(kept: dict[int, Tensor], halves: int = 2, **more: Any) -> dict[int, Any]:
    return {level: others(mask, [[True, True], [True, True]], halves, **more) for level, mask in kept.items()}


def test_a_call_that_is_told_nothing_changes_nothing_and_hears_every_map():
    eps, heard = call()
    assert torch.equal(eps, UNET(random(4, 4, *world.SIZE, seed=11), cond()))
    cfg = UNET.cfg
    coarse = [cfg.depth[-1]] * (cfg.blocks + cfg.blocks + 1)
    assert len(heard.maps) == sum(coarse) + cfg.mid_depth
    assert heard.maps[0].shape == (2, SIZES[WHERE.maps][0] * SIZES[WHERE.maps][1], 1)
    assert heard.feature[0].shape[2:] == SIZES[WHERE.fine]


def test_empty_masks_change_nothing():
    empty = {level: torch.zeros_like(mask) for level, mask in some().items()}
    assert float((call(seen=seen(empty))[0] - call()[0]).abs().max()) < 1e-12


@pytest.mark.parametrize("halves", [1, 2])
def test_attention_is_softmax_over_the_own_keys_and_the_others_masked_ones(halves: int):
    n, tokens, site = 3, 12, Site("dec.0", 0, "self")
    q, k, v = (random(halves * n, 2, tokens, 8, seed=i) for i in range(3))
    mask = torch.rand(n, tokens, generator=torch.Generator().manual_seed(1)) < 0.4
    sees = [[False, True, False], [True, False, True], [False, False, True]]
    level = WHERE.level["dec.0"]
    told = Told(images=n, tokens=torch.zeros(n, 1).long(), seen={level: others(mask, sees, halves)})
    out = consistory(TORCH, WHERE, told, Heard()).attend(site, q, k, v)
    for half in range(halves):
        for i in range(n):
            bias = torch.full((n, tokens), -torch.inf, dtype=F64)
            bias[i] = 0
            for j in range(n):
                if sees[i][j] and j != i:
                    bias[j] = torch.where(mask[j], 0.0, -torch.inf).double()
            rows = slice(half * n, half * n + n)
            keys, values = (x[rows].transpose(0, 1).flatten(1, 2) for x in (k, v))
            scores = q[half * n + i] @ keys.mT / 8**0.5 + bias.flatten()  # eq. 1 to 3: log M+
            assert torch.allclose(out[half * n + i], scores.softmax(-1) @ values, atol=1e-12)


def test_plain_queries_are_mixed_in_where_others_are_seen():
    site, share = Site("dec.0", 0, "self"), 0.7
    q, k, v, p = (random(4, 2, 6, 8, seed=i) for i in range(4))
    told = {"images": 2, "tokens": TWO, "plain": {"dec.0.0": p}, "share": torch.tensor(share, dtype=F64)}
    mixed = consistory(TORCH, WHERE, Told(**told), Heard()).attend(site, q, k, v)
    assert torch.allclose(mixed, TORCH.attend(site, share * p + (1 - share) * q, k, v), atol=1e-12)


def test_keys_of_real_pictures_take_the_statistics_of_who_looks():
    n, tokens, site = 3, 10, Site("dec.0", 0, "self")
    q, k, v = (random(n, 2, tokens, 8, seed=i) for i in range(3))
    mask = torch.ones(n, tokens, dtype=torch.bool)
    sees = [[False, False, False], [True, False, False], [True, False, False]]
    these = others(mask, sees, 1, align=True)
    told = Told(images=n, tokens=torch.zeros(n, 1).long(), seen={WHERE.level["dec.0"]: these}, align=True)
    out = consistory(TORCH, WHERE, told, Heard()).attend(site, q, k, v)
    std, mean = torch.std_mean(k, dim=2, keepdim=True)
    assert torch.allclose(out[0], TORCH.attend(site, q, k, v)[0], atol=1e-12)
    for i in (1, 2):
        keys = torch.cat([k[i], (k[0] - mean[0]) / std[0] * std[i] + mean[i]], 1)
        want = (q[i] @ keys.mT / 8**0.5).softmax(-1) @ torch.cat([v[i], v[0]], 1)
        assert torch.allclose(out[i], want, atol=1e-4)  # 1e-5 under the root


def test_what_is_cached_is_seen_as_what_is_in_the_batch():
    n, tokens, site, level = 3, 9, Site("dec.0", 0, "self"), WHERE.level["dec.0"]
    q, k, v = (random(2 * n, 2, tokens, 8, seed=i) for i in range(3))
    mask = torch.rand(n, tokens, generator=torch.Generator().manual_seed(1)) < 0.4
    sees, words = [[False, False, False]] * 2 + [[True, True, False]], torch.zeros(n, 1).long()
    heard = Heard(keep_pools=True)
    told = Told(images=n, tokens=words, seen={level: others(mask, sees, 2)})
    whole = consistory(TORCH, WHERE, told, heard).attend(site, q, k, v)
    count, last = int(mask[:2].sum()), [2, 5]
    alone = Told(images=1, tokens=words[:1], seen={level: cached(count, 1, 2, torch.device("cpu"))}, pools=heard.pools)
    one = consistory(TORCH, WHERE, alone, Heard()).attend(site, q[last], k[last], v[last])
    assert torch.allclose(one, whole[last], atol=1e-12)


def test_it_stacks_with_methods_that_share_attention():
    kept = seen(some())
    plain = {"images": 2, "tokens": TWO}
    shared = style_aligned(TORCH, [0, 1])
    assert torch.equal(call(ops=shared, seen=kept)[0], call(seen=kept)[0])
    both = call(ops=style_aligned(TORCH, [0, 0]), seen=kept)[0]
    assert not torch.allclose(both, call(seen=kept)[0])
    assert torch.equal(call(ops=style_aligned(TORCH, [0, 0]), **plain)[0],
                       UNET(random(4, 4, *world.SIZE, seed=11), cond(), style_aligned(TORCH, [0, 0])))  # fmt: skip


def test_gradients_flow_through_a_whole_call():
    fine = SIZES[WHERE.fine][0] * SIZES[WHERE.fine][1]
    carried = Plan(torch.arange(2 * fine).view(2, fine).flip(0), torch.ones(2, fine, dtype=torch.bool), torch.zeros(2))
    x = random(4, 4, *world.SIZE, seed=11).requires_grad_()
    told = Told(images=2, tokens=TWO, seen=seen(some()), carried=carried, order=((0, 1), (1, 2)))
    UNET(x, cond(), consistory(TORCH, WHERE, told, Heard())).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert bool((x.grad != 0).any(3).all())


def test_a_step_compiles_whole_and_at_most_once_more_when_masks_change():
    net, compiled = UNET, []
    where, x, c = places(net.cfg), random(4, 4, *world.SIZE, seed=11), cond()

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def run(x: Tensor, c: Any, told: Told) -> tuple[Tensor, Tensor]:
        heard = Heard()
        eps = net(x, c, consistory(TORCH, where, told, heard))
        return eps, torch.stack(heard.maps).mean(0)

    torch._dynamo.reset()
    for few, many in ((3, 9), (4, 12), (2, 5), (5, 20)):
        kept = {
            level: torch.arange(h * w).expand(2, -1) < (few if level == 2 else many) for level, (h, w) in SIZES.items()
        }
        told = Told(images=2, tokens=TWO, seen=seen(kept))
        eps, maps = run(x, c, told)
        heard = Heard()
        assert torch.allclose(eps, net(x, c, consistory(TORCH, where, told, heard)), atol=1e-9)
        assert torch.allclose(maps, torch.stack(heard.maps).mean(0), atol=1e-9)
    assert len(compiled) <= 2


def test_one_graph_and_one_more_serve_every_window_of_a_walk_where_what_is_off_is_told_as_nothing():
    compiled = []
    x, base, fine = random(4, 4, *world.SIZE, seed=11), cond(), SIZES[WHERE.fine][0] * SIZES[WHERE.fine][1]
    plain, rows = Heard(keep_maps=False, keep_queries=True), torch.arange(2 * fine).view(2, fine).flip(0)
    h, skips = UNET.encode(x, base)
    quiet = consistory(TORCH, WHERE, Told(images=2, tokens=TWO), plain)
    to_attention(UNET, UNET.middle(h, base), skips, base, quiet, WHERE.last)

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    def run(x: Tensor, c: Any, told: Told) -> Tensor:
        return UNET(x, c, consistory(TORCH, WHERE, told, Heard()))

    torch._dynamo.reset()
    quick = torch.compile(run, fullgraph=True, backend=backend)
    for i, (tokens, share, carries) in enumerate(
        ((0, 0, 0), (9, 0.9, 0), (12, 0.8, 1), (5, 0, 1), (20, 0, 0), (1, 0, 0))
    ):
        c = base._replace(emb=base.emb * (1 + 0.1 * i))
        kept = {level: torch.arange(h * w).expand(2, -1) < tokens for level, (h, w) in SIZES.items()}
        carried = Plan(rows, torch.full((2, fine), bool(carries)), torch.zeros(2))
        order = ((0, 1), (1, 2))
        whole = Told(images=2, tokens=TWO, seen=seen(kept), plain=plain.queries, carried=carried, order=order,
                     share=torch.tensor(share, dtype=F64))  # fmt: skip
        needed = {"seen": seen(kept)} if tokens else {}
        needed |= {"plain": plain.queries, "share": whole.share} if share else {}
        needed |= {"carried": carried, "order": order} if carries else {}
        with torch.no_grad():
            eps, want = quick(x, c, whole), run(x, c, Told(images=2, tokens=TWO, **needed))
        assert torch.allclose(eps, want, atol=1e-9)
    assert len(compiled) <= 2


# --- where it acts


def test_the_places_of_published_networks():
    xl = places(SDXL)
    assert (xl.shared, xl.maps, xl.fine, xl.feature) == ((2, 1), 2, 1, "dec.3")
    assert (xl.last, xl.last_map) == (Site("dec.5", 1, "self"), Site("dec.2", 9, "cross"))
    assert xl.sizes((128, 96)) == {2: (32, 24), 1: (64, 48)}
    sd = places(SD15)
    assert (sd.shared, sd.maps, sd.fine, sd.feature) == ((2, 1, 0), 2, 1, "dec.6")
    assert places(SD21).last == Site("dec.11", 0, "self")
    assert places(SDXL_REFINER).feature == "dec.6"
    with pytest.raises(ValueError, match="two adjacent levels"):
        places(replace(SDXL, depth=(2, 0, 10)))


@pytest.mark.parametrize("name", ["xl", "sd1"])
def test_a_decoder_that_ends_early_makes_what_the_whole_one_does_on_the_way(name: str):
    cfg = twins.CONFIGS[name]
    net, where = world.net(cfg), places(cfg)
    c = net.embed(
        torch.tensor([400.0], dtype=F64), random(1, 5, cfg.context_dim),
        *((random(1, cfg.pooled_dim), torch.ones(1, 6).double()) if cfg.pooled_dim else ()),
    )  # fmt: skip
    low, skips = net.encode(random(1, 4, 9, 13), c)
    h = net.middle(low, c)
    whole, part = Heard(), Heard()
    told = Told(images=1, tokens=TWO[:1])
    net.decode(h, skips, c, consistory(TORCH, where, told, whole))
    to_attention(net, h, skips, c, consistory(TORCH, where, told, part), where.last_map)
    assert len(part.maps) == len(whole.maps)
    assert all(torch.equal(a, b) for a, b in zip(part.maps, whole.maps, strict=True))
    feature = stages(net, h, skips, c, TORCH, int(where.feature.partition(".")[2]))
    assert torch.equal(feature, whole.feature[0])
    plain = Heard(keep_queries=True)
    to_attention(net, h, skips, c, consistory(TORCH, where, told, plain), where.last)
    blocks = (len(cfg.depth) - min(where.shared)) * (cfg.blocks + 1)
    assert len(plain.queries) == sum(cfg.depth[where.level[f"dec.{i}"]] for i in range(blocks))
    with pytest.raises(ValueError, match="no attention of a decoder"):
        to_attention(net, h, skips, c, TORCH, Site("enc.4", 0, "self"))


def test_shares_of_a_pass_are_those_that_torch_counts():
    part = shares(UNET, world.SIZE, 7)
    x, c = random(4, 4, *world.SIZE), cond()
    low, skips = UNET.encode(x, c)
    h = UNET.middle(low, c)

    def counted(run: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    encoder = counted(lambda: UNET.middle(UNET.encode(x, c)[0], c))
    whole = encoder + counted(lambda: UNET.decode(h, skips, c))
    maps = counted(lambda: to_attention(UNET, h, skips, c, TORCH, WHERE.last_map))
    assert part.encoders + part.decoders == pytest.approx(1)
    assert part.encoders == pytest.approx(encoder / whole, abs=0.01)
    assert part.maps == pytest.approx(maps / whole, abs=0.01)
    assert part.maps < part.features < part.queries < part.decoders


# --- masks


def defined(x: np.ndarray) -> float:
    """Otsu's threshold over numpy's own histogram, in its own arithmetic."""
    flat = x.ravel()
    if (flat == flat[0]).all():
        return float(flat[0])
    counts, edges = np.histogram(flat, bins=256)
    counts, centres = counts.astype(np.float32), (edges[1:] + edges[:-1]) / 2
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    left = np.cumsum(counts * centres) / below
    right = np.cumsum((counts * centres)[::-1])[::-1] / above
    between = below[:-1] * above[1:] * (left[:-1] - right[1:]) ** 2
    return float(centres[np.argmax(between)])


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_otsu_is_the_definition_over_numpy_s_histogram(kind: type):
    g = np.random.default_rng(0)
    rows = [g.random(300) ** 4, g.normal(0, 1, 300), np.r_[g.normal(0, 1, 200), g.normal(9, 1, 100)], np.full(300, 0.3),
            np.r_[np.zeros(299), 1], g.random(300) * 2 + 5, np.full(300, 2.0)]  # fmt: skip
    x = np.stack(rows).astype(kind)
    ours = otsu(torch.from_numpy(x))
    for row, got in zip(x, ours.tolist(), strict=True):
        assert got == pytest.approx(defined(row), rel=1e-6 if kind != np.float16 else 2e-3)


def test_a_constant_map_has_an_empty_mask_and_words_are_united():
    maps = torch.zeros(2, 16, 2)
    maps[0, :4, 0], maps[0, 12:, 1], maps[1, 3, 1] = 1, 1, 5
    tokens = torch.tensor([[1, 2], [1, -1]])
    got = thresholded(maps, tokens, (4, 4), (4, 4)).mask
    assert got[0].tolist() == [i < 4 or i >= 12 for i in range(16)]
    assert not bool(got[1].any())  # its only word has a constant map
    both = masks(maps, tokens, (4, 4), {2: (4, 4), 1: (8, 8)})
    assert (both[2].shape, both[1].shape) == ((2, 16), (2, 64))


def test_maps_are_columns_of_the_softmax_with_a_bias_and_without():
    q, k, bias = random(2, 3, 5, 8), random(2, 3, 6, 8, seed=1), random(2, 1, 5, 6, seed=2)
    tokens = torch.tensor([[0, 5], [2, -1]])
    for extra in (None, bias):
        weights = (q @ k.mT / 8**0.5 + (0 if extra is None else extra)).softmax(-1).mean(1)
        want = torch.stack([weights[0, :, [0, 5]], torch.stack([weights[1, :, 2], torch.zeros(5, dtype=F64)], 1)])
        assert torch.allclose(token_maps(q, k, tokens, extra), want, atol=1e-12)


def test_dropped_tokens_are_below_the_draw_and_the_same_in_both_stages():
    draws = Seeded([4, 9])
    first = draws(3, [8, 16])
    assert torch.equal(Seeded([4, 9])(3, [8, 16])[1], first[1])
    assert torch.equal(Seeded([9])(3, [8, 16])[0][0], first[0][1])  # whatever the batch
    mask = torch.ones(2, 8, dtype=torch.bool)
    assert torch.equal(dropped(mask, first[0], 0.5), first[0] >= 0.5)
    assert not bool(dropped(mask, first[0], 1.0).any())
    assert torch.equal(dropped(mask, first[0], 0.0), mask)


# --- matches and what is carried


def test_the_nearest_pixel_inside_the_subject_is_found_and_trusted_below_otsu():
    source, target = random(2, 6, 4, 4), random(1, 6, 4, 4, seed=3)
    target[0, :, 1, 2] = source[1, :, 3, 3]
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[1, 8:] = True
    found = matches(source, mask, target, (4, 4), torch.tensor([[True, True]]))
    assert int(found.pixel[0, 1, 6]) == 15
    assert bool((found.pixel[0, 1] >= 8).all())
    assert torch.equal(found.distance[0, 0], torch.full((16,), 2.0, dtype=F64))
    told = plan(found, torch.ones(1, 16, dtype=torch.bool))
    assert bool(told.chosen[0, 6])
    assert bool((told.row >= 16).all())
    assert torch.equal(told.chosen[0], found.distance[0, 1] < told.threshold[0])
    none = plan(Matches(found.pixel, torch.full_like(found.distance, torch.inf)), torch.ones(1, 16, dtype=torch.bool))
    assert not bool(none.chosen.any())


def test_in_order_a_picture_reads_altered_rows_and_all_at_once_it_does_not():
    x = torch.arange(3.0)[:, None, None].expand(3, 2, 1).clone()
    told = Plan(torch.tensor([[2, 3], [0, 1], [0, 1]]), torch.tensor([[True, False]] * 3), torch.zeros(3))
    sees = [[False, True, False], [True, False, False], [True, False, False]]
    assert waves(sees) == [(0, 1), (1, 3)]
    assert waves(sees, sequential=False) == [(0, 3)]
    assert injected(x, told, waves(sees), 0.5)[:, :, 0].tolist() == [[0.5, 0], [0.75, 1], [1.25, 2]]
    assert injected(x, told, waves(sees, sequential=False), 0.5)[:, :, 0].tolist() == [[0.5, 0], [0.5, 1], [1, 2]]


def test_smoothing_keeps_what_is_even_inside():
    even = smoothed(torch.ones(1, 2, 5, 5, dtype=F64))
    assert torch.allclose(even[:, :, 1:-1, 1:-1], torch.ones(1, 2, 3, 3, dtype=F64))
    assert bool((even[:, :, 0] < 1).all())


# --- settings and words


def test_windows_in_timesteps_are_those_in_steps_at_fifty():
    path = leading(50, offset=1, end=0)
    assert by_steps(Settings(), path) == Settings()
    blended = [Settings().blends(t, path[0]) for t in path[:7]]
    assert blended == pytest.approx([0.9 - i * 0.8 / 49 for i in range(6)] + [0.0], abs=1e-8)
    assert [t for t in path if Settings().injects(t)] == path[5:17]
    assert Settings().feature_at(path) == 261
    assert Settings().feature_at(leading(20, offset=1, end=0)) == 251
    assert strength(1, 1, 1) == 0.9


def test_a_word_is_found_by_all_its_tokens_where_it_comes_first():
    tokens = Tokenizer(
        twins.TINY / "tokenizer" / "vocab.json", twins.TINY / "tokenizer" / "merges.txt", pad="<|endoftext|>"
    )
    ids = tokens.ids("a cat and a dog, the cat")
    found = places_of(tokens, ["a cat and a dog, the cat", "the dog"], ["cat", "dog"])
    word = tokens.ids("cat")[1:-1]
    assert ids[int(found[0, 0]) : int(found[0, 0]) + len(word)] == word
    assert (int(found[1, 0]), int(found[0, 0])) == (-1, 1 + len(tokens.ids("a")[1:-1]))
    with pytest.raises(ValueError, match="does not name the subject 'hat'"):
        places_of(tokens, ["a cat"], ["hat"])
    with pytest.raises(ValueError, match="does not name"):
        places_of(tokens, ["a " * 80 + "cat"], ["cat"])
    with pytest.raises(ValueError, match="no prompt has the subject's word 'hat'"):
        places_of(tokens, ["a cat"], ["cat", "hat"])
