"""Capture by torch.fx and TorchScript: layers that stay one node, models that are traced first."""

import timm.layers
import torch
from torch import nn
from torch.fx import GraphModule, Proxy, Tracer


def is_captured() -> bool:
    """Return True while torch.compile, torch.export or torch.jit.trace captures a graph."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def one_node(layer: nn.Module, x: Proxy) -> Proxy:
    """Record the call ``layer(x)`` as one node of the graph of torch.fx that ``x`` is of.

    For layers whose program depends on shapes. Any tracer keeps them whole, while
    ``timm.models.register_notrace_module`` is known to timm's tracer alone.
    """
    path = x.tracer.path_of_module(layer)
    return x.tracer.create_proxy("call_module", path, (x,), {})


class _ScriptTracer(Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        is_drop_path = isinstance(module, timm.layers.DropPath)  # it depends on the mode
        return is_drop_path or super().is_leaf_module(module, name)


class Scriptable(nn.Module):
    """Model that ``torch.jit.script`` compiles from its graph of torch.fx."""

    def __prepare_scriptable__(self) -> GraphModule:
        tracer = _ScriptTracer()
        return GraphModule(self, tracer.trace(self), type(self).__name__)
