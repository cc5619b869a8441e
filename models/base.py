"""timm's interface, as far as it is the same for all models of this repository."""

from collections.abc import Sequence

import torch
import torch.fx
from timm.models._features import feature_take_indices as take_indices
from torch import nn

from .layers.fuse import Fusible
from .layers.tracing import Scriptable


@torch.fx.wrap
def check_image_size(height: int, width: int, stride: int, strict: bool) -> None:
    """Raise ValueError if an image of this size does not fit ``stride``."""
    remainder = strict and (height % stride != 0 or width % stride != 0)
    if remainder or height < stride or width < stride:
        near_height = max((2 * height + stride) // (2 * stride), 1) * stride
        near_width = max((2 * width + stride) // (2 * stride), 1) * stride
        raise ValueError(
            f"image size {height}x{width} does not fit: height and width must be multiples "
            f"of {stride}, such as {near_height}x{near_width}"
        )


class BaseModel(Fusible, Scriptable):
    """Classifier with timm's interface.

    Subclasses define ``forward_features``, ``forward_head``, ``reset_classifier`` and
    ``init_layer``, and set ``head`` and ``total_stride``.
    """

    strict_img_size = True
    grad_checkpointing = False

    @staticmethod
    def init_layer(module: nn.Module) -> None:
        """Initialise one layer; for :meth:`torch.nn.Module.apply`."""
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError if an image of this size does not fit ``total_stride``."""
        check_image_size(height, width, self.total_stride, self.strict_img_size)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay besides biases and norms: none, as in the originals."""
        return set()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.head

    def initialised(self, head: nn.Module) -> nn.Module:
        """Initialise a new head, on the device and in the dtype and mode of the model."""
        reference = next(self.parameters())
        head.apply(self.init_layer)
        return head.to(reference.device, reference.dtype).train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image ``B 3 H W`` to logits ``B num_classes``."""
        return self.forward_head(self.forward_features(x))


class StagedModel(BaseModel):
    """Model of ``stages``, each with a feature map of its own.

    Subclasses define the three parts of ``forward_features``: ``forward_stem``,
    ``forward_stage`` and ``forward_last``.
    """

    channels_last = True  # the memory format in which it runs best

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Image ``B 3 H W`` to the final feature map ``B D H/32 W/32``."""
        x = self.forward_stem(x)
        for index in range(len(self.stages)):
            x = self.forward_stage(x, index)
        return self.forward_last(x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Feature maps after the stages.

        Args:
            x: Image, ``B 3 H W``.
            indices: Stages to return: the last n, those of a sequence, or all.
            norm: Apply the final norm, where the model has one, to the last stage's feature map.
            stop_early: Leave out stages after the last one asked for.
            output_fmt: Only ``NCHW``.
            intermediates_only: Return the list alone.

        Returns:
            The feature maps, or the final features and the feature maps.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is not supported, only 'NCHW'")
        count = len(self.stages)
        wanted, last = take_indices(count, indices)
        final_norm = self.norm if norm and hasattr(self, "norm") else nn.Identity()
        x = self.forward_stem(x)
        maps = []
        for index in range(last + 1 if stop_early else count):
            x = self.forward_stage(x, index)
            if index in wanted:
                maps.append(final_norm(x) if index == count - 1 else x)
        if intermediates_only:
            return maps
        return x if stop_early and last + 1 < count else self.forward_last(x), maps
