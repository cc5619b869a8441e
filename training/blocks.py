"""The blocks of a model: the parts that are sharded or compiled one at a time."""

import re

from torch import nn

ROW = re.compile(r"(blocks|layers?|stages?)\d*")  # names of containers of blocks


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model; what is not in one belongs to the root.

    They are the children of every Sequential or ModuleList named blocks, layers or stages, with
    or without a number (``blocks.3`` of ViT, ``stage2.0`` of Visformer, ``layer1.2`` of ResNet).
    Of nested ones, the inner ones count (``layers.1.blocks.0`` of Swin).
    """
    rows = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        and ROW.fullmatch(name.rpartition(".")[2])
    }
    return [
        child
        for name, row in rows.items()
        for key, child in row.named_children()
        if any(True for _ in child.parameters())
        and not any(inner.startswith(f"{name}.{key}.") for inner in rows)
    ]
