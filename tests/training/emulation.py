"""What a GPU would complain of, seen on CPU tensors."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Results whose size or value the host must read.
WAITING = {
    aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default,
    aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default, aten.unique_dim.default,
    aten.bincount.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
FACTORIES = {
    torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.linspace, torch.eye, torch.tensor,
    torch.as_tensor, torch.from_numpy, torch.rand, torch.randn, torch.randint, torch.randperm,
}  # fmt: skip
CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}


class DeviceRules(TorchDispatchMode):
    """Reports what would wait for a GPU, mix devices or mix memory formats.

    On a GPU, a run's tensors are on the device, and a tensor that is created without a device is on the host. Here both
    are on the CPU: `HostTensors` tells which would be on the host.

    Attributes:
        found: One line for each violation.
        hosts: Tensors of the host.
    """

    def __init__(self, *, channels_last: bool = False) -> None:
        super().__init__()
        self.found: list[str] = []
        self.hosts: dict[int, torch.Tensor] = {}  # kept, so that no other tensor takes an id
        self._channels_last = channels_last

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_of((args, kwargs))
        host = [tensor for tensor in tensors if id(tensor) in self.hosts]
        device = [tensor for tensor in tensors if id(tensor) not in self.hosts]
        if func in WAITING and device:
            self.found.append(f"{func} waits")
        if func in INDEXING and any(index.dtype == torch.bool for index in tensors_of(args[1:2])):
            self.found.append(f"{func} with a mask waits")
        if device and any(tensor.dim() for tensor in host):
            self.found.append(f"{func} mixes a tensor of the host, {[tuple(each.shape) for each in host]}, with others")
        if self._channels_last and func in CONVOLUTIONS:
            for tensor in tensors:
                if tensor.dim() == 4 and not tensor.is_contiguous(memory_format=torch.channels_last):
                    self.found.append(f"{func}: {tuple(tensor.shape)} not in channels_last")
        out = func(*args, **kwargs)
        if host and not device:
            self.hosts |= {id(tensor): tensor for tensor in tensors_of(out)}
        return out


class HostTensors(TorchFunctionMode):
    """Finds tensors that are created without a device: on a GPU machine they are on the host."""

    def __init__(self, rules: DeviceRules) -> None:
        super().__init__()
        self._rules = rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in FACTORIES and (kwargs or {}).get("device") is None:
            self._rules.hosts |= {id(tensor): tensor for tensor in tensors_of(out)}
        return out


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """All tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class EmulatedGraph:
    """Records the operators of a block; a replay runs them on the same tensors, as a CUDA graph's kernels do."""

    captured: list["EmulatedGraph"]
    replays: list["EmulatedGraph"]

    def __init__(self) -> None:
        self.recorder = _Recorder()

    def replay(self) -> None:
        self.replays.append(self)
        with torch.no_grad():
            for func, args, kwargs, out in self.recorder.calls:
                given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    # What an operator changes in place, or views, has changed already.
                    if isinstance(old, torch.Tensor) and id(old) not in given and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)


@pytest.fixture
def emulated_graphs(monkeypatch: pytest.MonkeyPatch) -> type[EmulatedGraph]:
    """CUDA graphs on the CPU."""
    EmulatedGraph.captured, EmulatedGraph.replays = [], []

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    @contextlib.contextmanager
    def capture(graph: EmulatedGraph, *, capture_error_mode: str = "global") -> Iterator[None]:
        assert capture_error_mode == "thread_local", "another thread may pin memory meanwhile"
        EmulatedGraph.captured.append(graph)
        with graph.recorder:
            yield

    stand_ins: dict[str, Callable[..., Any]] = {
        "Stream": Stream, "current_stream": Stream, "CUDAGraph": EmulatedGraph, "graph": capture,
        "stream": lambda _: contextlib.nullcontext(),
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    from tla_service.config import RunConfig

    monkeypatch.setattr(RunConfig, "check_device", lambda *_, **__: None)
    return EmulatedGraph


def violations(
    call: Callable[[], object], *, channels_last: bool = False, hosts: Sequence[torch.Tensor] = ()
) -> list[str]:
    """What a call would do wrong on a GPU, with these tensors on the host."""
    with DeviceRules(channels_last=channels_last) as rules, HostTensors(rules):
        rules.hosts |= {id(tensor): tensor for tensor in hosts}
        call()
    return rules.found
