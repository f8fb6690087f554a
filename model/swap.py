"""Networks around other tensors for a while: on another device, in another type."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def swapped(change: Callable[[Tensor], Tensor], *networks: nn.Module) -> Iterator[None]:
    """`change` of every parameter and buffer meanwhile, and afterwards the very tensors that were there.

    They are copied, not moved: coming back costs nothing, and what a file maps stays mapped.
    """
    held: list[tuple[dict[str, Any], str, Tensor]] = [
        (tensors, name, tensor)
        for network in networks
        for module in network.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    try:
        for tensors, name, tensor in held:
            other = change(tensor)
            if isinstance(tensor, nn.Parameter) and other is not tensor:
                other = nn.Parameter(other, requires_grad=tensor.requires_grad)
            tensors[name] = other
        yield
    finally:
        for tensors, name, tensor in held:
            tensors[name] = tensor
