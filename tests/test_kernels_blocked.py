"""Tests of source attention by blocks of plain products, which devices and types without a fused call take."""

import pytest
import torch
from diaphane.kernels import blocked_attention, cases, reference, source_attention_torch
from diaphane.kernels.source_attention import source_attention

from .kernels_world import errors, results

NAMED = pytest.mark.parametrize("case", cases.EDGES, ids=[c.name for c in cases.EDGES])


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """No fused call, and blocks of 16 queries."""
    monkeypatch.setattr(source_attention_torch, "fused", lambda q: False)
    monkeypatch.setattr(blocked_attention, "LOGITS", 1)


@NAMED
def test_it_is_the_definition_in_float64(case: cases.Case):
    made = cases.inputs(case, torch.float64)
    ours, true = results(source_attention, case, made), results(reference.source_attention, case, made)
    for name, exact in true.items():
        torch.testing.assert_close(ours[name], exact, rtol=1e-7, atol=1e-9 * (1 + exact.norm().item()))


@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_it_errs_at_most_twice_as_much_as_the_definition_in_the_same_type(case: cases.Case, dtype: torch.dtype):
    floor = 8 * torch.finfo(dtype).eps  # of one key a probability has no gradient, and rounding leaves a little
    assert {name: e for name, e in errors(case, dtype).items() if not e[0] <= max(e[1], floor)} == {}


def test_blocks_hold_no_more_logits_than_they_may(monkeypatch):
    monkeypatch.setattr(blocked_attention, "LOGITS", 2**20)
    q, k = torch.empty(8, 10, 4096, 64, device="meta"), torch.empty(8, 10, 512, 64, device="meta")
    assert blocked_attention.rows(q, k) == 25
    assert blocked_attention.rows(q, q) == 16
