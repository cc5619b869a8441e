"""Parameters, multiply-accumulates and activations of models, in total and by stage."""

from tools.flops.counting import Cost, count, our_models, size_options

__all__ = ["Cost", "count", "our_models", "size_options"]
