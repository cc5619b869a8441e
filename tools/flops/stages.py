"""Cost of a model by stage, from the tree of its modules."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from tools.flops.counting import ForwardCounter, PartCost, total


def parts(model: nn.Module, counter: ForwardCounter, stages: Sequence[str]) -> list[str]:
    """Return names of modules that divide the model, in the order in which they ran.

    They are its children, or the children of those that contain stages or are not called. A child
    that other children call, such as one that blocks share, belongs to them.
    """

    def walk(name: str, module: nn.Module) -> Iterator[str]:
        holds_stages = any(stage.startswith(f"{name}.") for stage in stages)
        if name in counter.calls and not holds_stages:
            yield name
        else:
            for child, inner in module.named_children():
                yield from walk(f"{name}.{child}", inner)

    found = [part for child, module in model.named_children() for part in walk(child, module)]
    order = {name: index for index, name in enumerate(counter.calls)}
    own = [name for name in found if counter.within[name].isdisjoint(found)]
    return sorted(own, key=order.__getitem__)


def groups(
    names: Sequence[str], stages: Sequence[str], counter: ForwardCounter, plain: bool
) -> Iterator[tuple[str, list[str]]]:
    """Yield rows and their parts: modules before the first stage, stages, modules after the last.

    A stage includes the modules between it and the one before. The modules up to the first one with
    products are the stem; in a plain transformer, all before the first block are the embedding.
    """
    places = [index for index, name in enumerate(names) if name in stages]
    first, last = (places[0], places[-1]) if places else (0, -1)
    products = [counter.calls[name].macs > 0 for name in names]
    if plain:
        begin = first
    elif places and not products[first]:  # such as the activation of the stem
        begin = first + 1
    else:
        begin = next((index + 1 for index in range(first) if products[index]), 0)
    if begin:
        yield ("embed" if plain else "stem"), list(names[:begin])
    waiting = []
    for index, name in enumerate(names[begin:], begin):
        waiting.append(name)
        if name in stages or index > last:
            yield name, waiting
            waiting = []


def join_blocks(
    rows: Sequence[tuple[str, list[str]]], stages: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows, with all blocks as one."""
    for are_blocks, same in itertools.groupby(rows, lambda row: row[0] in stages):
        same = list(same)
        if are_blocks:
            name = same[0][0].rpartition(".")[0] or "blocks"
            yield f"{name} ({len(same)})", [part for _, members in same for part in members]
        else:
            yield from same


def _part_of(name: str, owner: Mapping[str, PartCost]) -> str:
    """Return the part that contains a parameter, empty if none does."""
    part = name
    while part and part not in owner:
        part = part.rpartition(".")[0]
    return part


def share_parameters(
    model: nn.Module, rows: Sequence[PartCost], owner: dict[str, PartCost]
) -> None:
    """Add every parameter to the row of its part.

    Parameters of the model itself go to the row of their number (``pos_embed2`` to ``stage2``),
    without a number to the first row; those of no part are left out.
    """
    numbers = {re.search(r"\d*$", row.name)[0]: row for row in reversed(rows)}
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, aliases in names.items():
        name = aliases[0]
        part = next(filter(None, (_part_of(alias, owner) for alias in aliases)), "")
        if part:
            owner[part].parameters += parameter.numel()
        elif "." not in name and rows:
            number = re.search(r"\d*$", name)[0]
            row = numbers.get(number, rows[0]) if number else rows[0]
            row.parameters += parameter.numel()


def by_stage(model: nn.Module, counter: ForwardCounter, blocks: bool = False) -> list[PartCost]:
    """Return rows that add up to the whole: stem, stages, later modules, and any ``rest``.

    Stages end at the modules of ``feature_info``. A plain transformer, whose maps all have one
    size, has its embedding, its blocks (in one row unless ``blocks``), and later modules.
    """
    infos = [info for info in getattr(model, "feature_info", None) or [] if "module" in info]
    stages = [info["module"] for info in infos]
    plain = len(stages) > 1 and len({info["reduction"] for info in infos}) == 1
    found = list(groups(parts(model, counter, stages), stages, counter, plain))
    if plain and not blocks:
        found = list(join_blocks(found, stages))
    rows: list[PartCost] = []
    owner: dict[str, PartCost] = {}
    for name, members in found:
        calls = [counter.calls[member] for member in members]
        macs, activations = sum(c.macs for c in calls), sum(c.activations for c in calls)
        rows.append(PartCost(name, 0, macs, activations, calls[-1].shape))
        owner |= dict.fromkeys(members, rows[-1])
    share_parameters(model, rows, owner)
    rows = [row for row in rows if row.parameters or row.macs]
    whole = total(model, counter)
    keys = ("parameters", "macs", "activations")
    rest = [getattr(whole, key) - sum(getattr(row, key) for row in rows) for key in keys]
    return [*rows, PartCost("rest", *rest)] if any(rest) else rows
