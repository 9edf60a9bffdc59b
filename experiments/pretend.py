"""A device that is not there: its tensors live on the CPU, and what makes the host wait for it is counted.

So what a GPU would do is tested without one: that tensors are where they must be, what the host reads, and the results.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_}
READS = {  # operations whose result the host needs before it can go on, or whose shape it must know
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
}


def is_possible() -> bool:
    """Whether this torch can pretend a device."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


def register() -> None:
    """Make the device known to torch."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)


class OnDevice(Tensor):
    """A tensor on the device; `held` is the tensor on the CPU behind it."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        """Put a tensor on the device."""
        tensor = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.held = held
        return tensor

    def __format__(self, form: str) -> str:
        return format(self.item(), form)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return execute(func, args, kwargs or {}, Watch.active)

    def data_ptr(self) -> int:
        """Where its memory is."""
        return self.held.data_ptr()

    def tolist(self) -> Any:
        """Its numbers; torch refuses this for tensors of a class of one's own."""
        return self.cpu().tolist()


class Watch(TorchDispatchMode):
    """While it is entered, the device exists; counts operations there, and waits for it by their cause.

    Without float64 it refuses such numbers, as Apple's GPUs do. `names` are those of all operations there.
    """

    active: "Watch | None" = None

    def __init__(self, float64: bool = True) -> None:
        super().__init__()
        self.float64 = float64
        self.operations = 0
        self.waits = Counter[str]()
        self.names = set[str]()

    def __enter__(self) -> "Watch":
        Watch.active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Watch.active = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return execute(func, args, kwargs or {}, self)

    @property
    def count(self) -> int:
        """How often the host waited."""
        return self.waits.total()


def execute(func: Any, args: Any, kwargs: dict[str, Any], watch: Watch | None) -> Any:
    """Do an operation on the CPU, and put its result where a GPU would have it."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [x for x in tensors if isinstance(x, OnDevice)]
    target = kwargs.get("device")
    arrives = target is not None and torch.device(target).type == NAME
    if not here and not arrives:
        return func(*args, **kwargs)
    # 1. count it
    packet = func.overloadpacket
    if watch is not None:
        watch.operations += 1
        if reason := reason_to_wait(packet, args, kwargs, arrives):
            watch.waits[reason] += 1
    if packet not in COPIES | READS | INDEXING:
        strangers = [x for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0]
        assert not (here and strangers), f"{func} mixes tensors of device and host"
    # 2. do it
    result = func(*tree_map(on_host, args), **tree_map(on_host, kwargs))
    leaves = packet is aten._to_copy and target is not None and not arrives
    if leaves:
        return result
    if packet is aten.copy_ and not isinstance(args[0], OnDevice):
        return args[0]
    if watch is not None:
        watch.names.add(str(func).removeprefix("aten."))
        has_float64 = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves(result))
        assert watch.float64 or not has_float64, f"{func} makes float64 on the device"
    # 3. what was changed in place is the tensor that it was
    owners = {id(x.held): x for x in here}

    def on_device(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return owners[id(x)] if id(x) in owners else OnDevice(x)

    return tree_map(on_device, result)


def reason_to_wait(packet: Any, args: Any, kwargs: dict[str, Any], arrives: bool) -> str | None:
    """Why the host waits for an operation, None where it does not."""
    if packet in READS:
        return str(packet.__name__)
    if packet in INDEXING:
        places = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in places):
            return f"{packet.__name__} with a mask"
        if not all(isinstance(x, OnDevice) for x in places):
            return f"{packet.__name__} with places from the host"
    if packet not in COPIES:
        return None
    if packet is aten._to_copy:
        source = args[0]
        to_device = arrives or kwargs.get("device") is None
    else:
        source = args[1]
        to_device = isinstance(args[0], OnDevice)
    if isinstance(source, OnDevice):
        return None if to_device else "copy to the host"
    non_blocking = args[2] if packet is aten.copy_ and len(args) > 2 else kwargs.get("non_blocking", False)
    return None if non_blocking else "copy from the host"


def on_host(x: Any) -> Any:
    """The tensor on the CPU behind one on the device, and the CPU for the device; anything else as it is."""
    if isinstance(x, OnDevice):
        return x.held
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x


def moved(model: nn.Module) -> nn.Module:
    """The model with its weights on the device; weights that are tied stay so."""
    on_device: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if weight not in on_device:
                    on_device[weight] = nn.Parameter(OnDevice(weight.detach().clone()), weight.requires_grad)
                module._parameters[name] = on_device[weight]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else OnDevice(buffer)
    return model


@contextmanager
def attention_by_formula() -> Iterator[None]:
    """Attention's own kernels read nothing, and are chosen in C++, where this device is unknown."""

    def formula(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        scores = q @ k.mT * (options.get("scale") or q.shape[-1] ** -0.5)
        if options.get("is_causal"):
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return scores.softmax(-1) @ v

    with mock.patch.object(F, "scaled_dot_product_attention", formula):
        yield
