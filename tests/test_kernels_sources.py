"""Tests of sources: what each image may see, and what is refused."""

import pytest
import torch
from diaphane.kernels import cases
from diaphane.kernels.sources import Source, Sources, SourcesError, compacted, everyone, shared


def test_a_reference_gets_no_source_and_the_others_get_the_reference():
    assert shared([0, 0, 2, 2], 9, 0.5, 1.5).listed() == [
        [],
        [Source(0, 0, 9, 0.5, 1.5)],
        [],
        [Source(2, 0, 9, 0.5, 1.5)],
    ]


def test_everyone_sees_all_the_others_of_the_group():
    assert everyone([[2, 0], [1]], 4).listed() == [[Source(2, 0, 4)], [], [Source(0, 0, 4)]]


def test_compacted_neighbours_become_one_range_and_an_image_skips_itself():
    seen = compacted([3, 4, 5], [[True] * 3] * 3, halves=2).listed()
    assert seen[:3] == [[Source(0, 3, 12)], [Source(0, 0, 3), Source(0, 7, 12)], [Source(0, 0, 7)]]
    assert seen[3:] == [[s._replace(image=1) for s in row] for row in seen[:3]]


def test_empty_ranges_are_dropped():
    assert compacted([0, 4], [[True, True]] * 2).listed() == [[Source(0, 0, 4)], []]


def test_the_least_pool_is_what_the_ranges_reach():
    made = Sources.of([[Source(2, 1, 7)], [Source(0, 3, 9)]])
    assert (made.images, made.pool_images, made.pool_rows) == (2, 3, 9)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (Source(-1, 0, 1), "image >= 0"),
        (Source(0, -1, 1), "start <= stop"),
        (Source(0, 2, 1), "start <= stop"),
        (Source(0, 0, 1, -1.0), "scale >= 0"),
        (Source(0, 0, 1, float("nan")), "finite scale"),
        (Source(0, 0, 1, 1.0, float("inf")), "finite shift"),
    ],
)
def test_a_source_that_cannot_be_is_refused_in_one_line(source: Source, word: str):
    with pytest.raises(SourcesError, match=word) as e:
        Sources.of([[], [source]])
    assert str(e.value).startswith("image 1: ")
    assert "\n" not in str(e.value)


def test_a_reference_of_a_reference_is_refused():
    with pytest.raises(SourcesError, match=r"ref\[0\] is 1, which is its own reference; got ref\[1\] = 0"):
        shared([1, 0], 4)


def test_a_reference_outside_the_batch_is_refused():
    with pytest.raises(SourcesError, match="0 to 1; got 2"):
        shared([0, 2], 4)


def test_groups_that_miss_an_image_are_refused():
    with pytest.raises(SourcesError, match="every image of the batch once"):
        everyone([[0], [2]], 4)


def test_a_row_of_another_length_is_refused():
    with pytest.raises(SourcesError, match=r"sees\[0\] has one entry per image of the pool, 2; got 1"):
        compacted([1, 2], [[True]])


def test_every_case_says_why_and_is_named_once():
    every = [*cases.SDXL, *cases.EDGES]
    assert len({c.name for c in every}) == len(every)
    assert all(c.why for c in every)
    for case in cases.EDGES:
        made = cases.inputs(case, torch.float32)
        assert made["q"].shape == (case.batch, case.heads, case.tokens, case.dim)
        assert (sources := cases.sources(case)) is None or sources.images == case.batch
