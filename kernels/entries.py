"""The kernels of the benchmark, one entry each."""

from . import rivals_attention, rivals_maps, rivals_pointwise

ENTRIES = (rivals_attention.ENTRY, *rivals_pointwise.ENTRIES, *rivals_maps.ENTRIES)
