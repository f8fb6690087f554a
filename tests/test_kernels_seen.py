"""What several methods have an attention see: described apart, attended to together."""

import pytest
import torch
from diaphane.kernels import reference
from diaphane.kernels.sources import Seen, Source, Sources, SourcesError, also, shared
from diaphane.model.ops import Site, attend, group_norm, softmax_attend

SITE = Site("dec.0", 0, "self")


def qkv(b=3, h=2, n=6, d=4, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, d, generator=noise, dtype=torch.float64) for _ in range(3)]


def written_out(q, k, v, extra):
    """Attention of image i to its own keys and to extra[i], a list of (keys, values, scale, shift)."""
    rows = []
    for i in range(len(q)):
        parts = [(k[i], v[i], 1.0, 0.0), *extra[i]]
        logits = torch.cat([q[i] @ pk.mT * (scale / q.shape[-1] ** 0.5) + shift for pk, _, scale, shift in parts], -1)
        rows.append(logits.softmax(-1) @ torch.cat([pv for _, pv, _, _ in parts], -2))
    return torch.stack(rows)


@pytest.mark.parametrize("verb", [attend, softmax_attend])
@pytest.mark.parametrize("pools", ["neither", "first", "second", "both"])
def test_two_descriptions_together_see_what_both_describe(verb, pools):
    q, k, v = qkv()
    noise = torch.Generator().manual_seed(7)
    apart = [torch.randn(2, 2, 9, 4, generator=noise, dtype=torch.float64) for _ in range(2)]
    small = [torch.randn(1, 2, 5, 4, generator=noise, dtype=torch.float64) for _ in range(2)]
    one = (apart[0], apart[1]) if pools in ("first", "both") else None
    two = (small[0], small[1]) if pools in ("second", "both") else None
    a = Seen(Sources.of([[Source(1, 0, 6, 0.5, 0.25)], [], [Source(0, 2, 6)]]), one)
    b = Seen(Sources.of([[Source(0, 1, 4)], [Source(0, 0, 5, 2.0)], []]), two)
    rows = [(k, v) if pool is None else pool for pool in (one, two)]
    extra = [
        [
            (rows[0][0][1, :, 0:6], rows[0][1][1, :, 0:6], 0.5, 0.25),
            (rows[1][0][0, :, 1:4], rows[1][1][0, :, 1:4], 1, 0),
        ],
        [(rows[1][0][0, :, 0:5], rows[1][1][0, :, 0:5], 2.0, 0)],
        [(rows[0][0][0, :, 2:6], rows[0][1][0, :, 2:6], 1, 0)],
    ]
    for seen in (also(also(None, a, k, v), b, k, v), also(b, a, k, v)):
        torch.testing.assert_close(verb(SITE, q, k, v, seen=seen), written_out(q, k, v, extra), rtol=1e-10, atol=1e-10)


def test_references_of_one_and_sources_of_the_other_come_together():
    q, k, v = qkv()
    ref = torch.tensor([0, 0, 0])
    plain = Seen(shared([0, 0, 0], 6))
    seen = also(Seen(ref=ref), plain, k, v)
    want = reference.source_attention(q, k, v, plain.sources, ref=ref)[0]
    torch.testing.assert_close(attend(SITE, q, k, v, seen=seen), want, rtol=1e-10, atol=1e-10)
    assert also(plain, Seen(ref=ref), k, v).ref is ref


def test_nothing_seen_changes_nothing():
    q, k, v = qkv()
    none = Seen(Sources.of([[], [], []]))
    torch.testing.assert_close(attend(SITE, q, k, v, seen=none), attend(SITE, q, k, v), rtol=1e-10, atol=1e-10)


def test_different_references_and_batches_are_errors():
    _, k, v = qkv()
    with pytest.raises(SourcesError, match="towards different images"):
        also(Seen(ref=torch.tensor([0, 0, 0])), Seen(ref=torch.tensor([0, 1, 0])), k, v)
    with pytest.raises(SourcesError, match="of 3 and of 2 images"):
        also(Seen(shared([0, 0, 0], 6)), Seen(shared([0, 0], 6)), k, v)


def test_a_bias_beside_other_keys_is_an_error_that_names_the_site():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"dec\.0"):
        attend(SITE, q, k, v, bias=torch.zeros(6, 6), seen=Seen(shared([0, 0, 0], 6)))


def test_pooled_statistics_are_those_of_both_images_and_the_reference_keeps_its_own():
    noise = torch.Generator().manual_seed(3)
    x = torch.randn(3, 8, 5, 4, generator=noise, dtype=torch.float64) + torch.tensor([0.0, 3.0, -2.0]).view(3, 1, 1, 1)
    w, b = torch.randn(2, 8, generator=noise, dtype=torch.float64)
    y = group_norm(Site("out", 0, "norm"), x, w, b, 4, 1e-5, False, torch.tensor([0, 0, 1]))
    alone = reference.group_norm(x, w, b, 4, 1e-5, False)
    torch.testing.assert_close(y[0], alone[0], rtol=1e-10, atol=1e-10)
    for i, r in ((1, 0), (2, 1)):
        groups = torch.cat([x[i].view(4, 2, 20), x[r].view(4, 2, 20)], -1).flatten(1)
        mean, var = groups.mean(1), groups.var(1, unbiased=False)
        each = (x[i].view(4, 2, 20) - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
        want = each.view(8, 5, 4) * w[:, None, None] + b[:, None, None]
        torch.testing.assert_close(y[i], want, rtol=1e-10, atol=1e-10)
