"""A network's frozen twin, which attacks use: eval mode, no parameter gradients, BatchNorm folded."""

import copy
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tla_service.errors import one_line
from tla_service.models.classifier import ModelOutput
from tla_service.models.small_networks import ConvolutionOfImages
from tla_service.models.wrapped import WrappedClassifier, noise

_TOLERANCE = 1e-5
_FEW_CHANNELS = 4
_log = logging.getLogger(__name__)


class FrozenTwin:
    """A second view of a network in eval mode, ``module``.

    The twin shares the network's storage, so it follows every in-place update (optimizers, `load_state_dict`,
    BatchNorm's statistics). None of its tensors requires a gradient, so no code, compiled or not, computes weight
    gradients, and the network itself stays in train mode, on its device, in its memory format.

    In eval mode BatchNorm is an affine map per channel, so each that is the only reader of a convolution can be folded
    into it: the same function up to rounding, with one pass less over the activations. A network that cannot be traced
    is used unchanged. Folded weights are the only copies; `refresh` recomputes them after an update.

    For autocast, weights can be kept in ``weights_dtype`` too: it only caches casts of weights that require gradients.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        fold_batchnorm: bool = True,
        weights_dtype: torch.dtype | None = None,
        check: bool = True,
    ) -> None:
        # A copy of the modules around the same tensors, none of which asks for a gradient.
        tensors: dict[int, Tensor] = {
            id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in network.parameters()
        }
        tensors |= {id(buffer): buffer.detach() for buffer in network.buffers()}
        self.module = copy.deepcopy(network, tensors).eval()
        self._folds: list[_Fold] = []
        self._wide: list[Tensor] = []
        self._narrow: list[Tensor] = []
        if fold_batchnorm and any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
            trouble = (_folding_trouble(network) if check else "") or self._fold_batchnorms()
            if trouble and check:
                _log.warning("BatchNorm is not folded into convolutions, so attacks take longer: %s", trouble)
        for module in self.module.modules() if weights_dtype is not None else ():
            if isinstance(module, nn.Conv2d | nn.Linear):
                for name, weight in list(module.named_parameters(recurse=False)):
                    narrow = nn.Parameter(torch.empty_like(weight, dtype=weights_dtype), requires_grad=False)
                    self._wide.append(weight.detach())
                    self._narrow.append(narrow)
                    setattr(module, name, narrow)
        self.refresh()

    def __call__(self, images: Tensor) -> ModelOutput:
        """Logits and embeddings of images (N, C, H, W), as the network gives them in eval mode."""
        return self.module(images)

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the folded weights; call it after every update of the network."""
        for fold in self._folds:
            fold.refresh()
        if self._wide:
            torch._foreach_copy_(self._narrow, self._wide)

    def _fold_batchnorms(self) -> str:
        """Fold; returns why it is not possible, or nothing."""
        try:
            traced = fx.GraphModule(self.module, _BatchNormTracer().trace(self.module))
        except Exception as error:  # noqa: BLE001 - its forward depends on values or shapes, or meets a proxy badly
            return f"the network cannot be traced ({one_line(error)})"
        for convolution, norm in _foldable(traced):
            # The folded convolution takes the convolution's place; the BatchNorm leaves the graph.
            place = str(convolution.target)
            fold = _Fold(traced.get_submodule(place), traced.get_submodule(str(norm.target)))
            traced.set_submodule(place, fold.target)
            norm.replace_all_uses_with(convolution)
            traced.graph.erase_node(norm)
            self._folds.append(fold)
        traced.graph.lint()
        traced.recompile()
        self.module = traced
        return ""


def _folding_trouble(network: nn.Module) -> str:
    """Why a network of others cannot be folded, or computes something else then, by running a copy; empty if it can.

    BatchNorm of fresh weights hardly changes anything, so the copy gets statistics that do.
    """
    wrapped = next((module for module in network.modules() if isinstance(module, WrappedClassifier)), None)
    if wrapped is None or next(network.parameters()).is_meta:
        return ""
    trial = copy.deepcopy(network).cpu().eval()
    images = noise(wrapped.image_shape).to(next(trial.parameters()).dtype)
    random = torch.Generator().manual_seed(0)
    for module in trial.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=random) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=random) + 0.5)
    with torch.no_grad():
        twin = FrozenTwin(trial, check=False)
        for found, wanted in zip(twin(images), trial(images), strict=True):
            difference = float((found - wanted).abs().max() / wanted.abs().max())
            if not difference <= _TOLERANCE:
                return f"its outputs would differ by {difference:.1g} of the largest"
    return ""


def use_matrix_products(module: nn.Module) -> None:
    """Let a frozen module's convolutions of images compute gradients by matrix products while on a CPU, in place.

    oneDNN takes up to ten times as long for the gradient to an image of one channel as for the convolution itself.
    """
    for convolution in module.modules():
        if type(convolution) is not nn.Conv2d or convolution.in_channels > _FEW_CHANNELS:
            continue
        is_plain = convolution.groups == 1 and set(convolution.dilation) == {1}
        if is_plain and convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str):
            convolution.__class__ = ConvolutionOfImages


class _Fold:
    """One convolution with the BatchNorm behind it multiplied in."""

    def __init__(self, source: nn.Module, norm: nn.Module) -> None:
        assert isinstance(source, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        self._source, self._norm = source, norm
        self.target = copy.deepcopy(source)
        self.weight, self.bias = torch.empty_like(source.weight), source.weight.new_empty(source.out_channels)
        self.target.weight = nn.Parameter(self.weight, requires_grad=False)
        self.target.bias = nn.Parameter(self.bias, requires_grad=False)

    def refresh(self) -> None:
        norm = self._norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        torch.mul(self._source.weight, scale[:, None, None, None], out=self.weight)
        mean = norm.running_mean if self._source.bias is None else norm.running_mean - self._source.bias
        self.bias.copy_(-mean * scale if norm.bias is None else norm.bias - mean * scale)


class _BatchNormTracer(fx.Tracer):
    """Traces down to BatchNorms and to whatever holds none."""

    proxy_buffer_attributes = True  # else what a forward method computes of a buffer would be a constant

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002 - torch's signature
        # Hooks, such as a tap's, do not run when a leaf is traced.
        inside = any(isinstance(module, _BatchNorm) or module._forward_hooks for module in m.modules())
        return not inside or (isinstance(m, _BatchNorm) and not m._forward_hooks)


def _foldable(traced: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Calls of a convolution whose only reader is a BatchNorm with running statistics; both called once."""
    modules = dict(traced.named_modules())
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    times = {node.target: sum(other.target == node.target for other in calls) for node in calls}
    for node in calls:
        before = node.args[0] if node.args else None
        norm = modules[node.target]
        if not (_is_plain(norm, nn.BatchNorm2d) and norm.running_mean is not None):
            continue
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        if _is_plain(modules[before.target], nn.Conv2d) and times[before.target] == times[node.target] == 1:
            yield before, node


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what its kind does, up to padding: no forward, hooks or computed weight of its own."""
    known = type(module).forward is kind.forward or type(module).__module__.startswith("tla_service.")
    hooks = module._forward_hooks or module._forward_pre_hooks
    return isinstance(module, kind) and known and "weight" in module._parameters and not hooks
