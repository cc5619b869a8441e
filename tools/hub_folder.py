"""Folders in the layout of the Hugging Face Hub, which timm loads, too."""

import contextlib
import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

import models
from models.errors import printable
from models.hub import CONFIG, FOLDER, HUB, IMAGES, WEIGHTS, check_reachable
from training.checkpoints import plain
from training.flags import get_args_parser
from utils import UserError

LOG = "log.txt"
OF_WEIGHTS = ("fixed_input_size", "pool_size", "first_conv", "classifier", "license")
OF_TRAINING = ("drop_rate", "drop_path_rate", "num_classes")  # arguments without effect here
# flags that name places of one machine, or say nothing about the weights
LOCAL = """
    data_path val_path shard_cache output_dir resume finetune teacher_path device world_size
    dist_url dist_timeout local_rank num_workers pin_mem eval log_interval keep_checkpoints download
    save_every_steps save_every_minutes start_epoch stop_epoch dist_eval loader augment_on
""".split()  # noqa: SIM905
SOURCES = ("model", "teacher_model")  # flags that may name a folder
TOLERANCE = 1e-4  # of the largest logit
CARD = """\
---
tags:
- image-classification
- timm
library_name: timm
license: {license}
---
# {title}

Image classifier `{name}`, {parameters:.2f} M parameters, {num_classes} classes, images of {size}
pixels.

| | |
|---|---|
{facts}

## Use

```python
{usage}
```
{training}"""
RECIPE = """
## Training

Flags that differ from the defaults:

```yaml
{recipe}
```
"""
TIMM = """\
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or hf-hub:ORG/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"""
OURS = """\
import models  # of the repository that trained it

found = models.load_model("local-dir:FOLDER")  # or hf-hub:ORG/NAME
model, config = found.model, found.data_config"""


def write_folder(
    folder: Path,
    model: nn.Module,
    source: models.ModelSource,
    kwargs: Mapping[str, Any],
    ema: bool = False,
) -> str:
    """Write config, weights and model card to an empty folder; return a line about timm.

    Args:
        folder: Exists.
        model: With its weights and ``pretrained_cfg``, in evaluation mode.
        source: Of the weights.
        kwargs: Keyword arguments that built the model.
        ema: The weights are the moving average of the source.
    """
    config = config_of(model, source, kwargs)
    (folder / CONFIG).write_text(json.dumps(plain(config), indent=2) + "\n")
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / WEIGHTS[0], metadata={"format": "pt"})
    reason = why_not_timm(model, config)
    facts = {**images_of(config), **accuracy_of(source, ema)}
    card = card_of(model, source, config, folder.name, facts, not reason)
    (folder / "README.md").write_text(card)
    if reason:
        return f"plain timm does not load it ({reason}): this repository does"
    return "plain timm loads it, with the same logits"


def config_of(
    model: nn.Module, source: models.ModelSource, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return timm's config of a model, with the GELU where it is not timm's."""
    own = model.pretrained_cfg
    with torch.device("meta"):
        default, _ = models.build_model(source.name, {}, {})
    arguments = {key: value for key, value in kwargs.items() if key not in OF_TRAINING}
    if arguments.get("qk_scale_factor") == getattr(default, "qk_scale_factor", None):
        arguments.pop("qk_scale_factor", None)  # which timm does not know
    images = {key: own[key] for key in (*IMAGES, *OF_WEIGHTS) if own.get(key) is not None}
    config = {
        "architecture": source.name.partition(".")[0],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": images | {"num_classes": model.num_classes, "custom_load": False},
    }
    if source.classes:
        config["label_names"] = list(source.classes)
    if source.data_config.exif:  # here, as timm refuses unknown keys in pretrained_cfg
        config["exif"] = True
    if (gelu := source.checkpoint.get("gelu", "none")) != "none":
        config["gelu"] = gelu
    return config


@torch.no_grad()
def why_not_timm(model: nn.Module, config: Mapping[str, Any]) -> str:
    """Return the reason for which timm's own class does not compute the same, or nothing."""
    name, settings = config["architecture"], config["pretrained_cfg"]
    build = getattr(timm.models, name, None)
    if build is None:
        return f"it has no {name}"
    images = torch.randn(2, *settings["input_size"], generator=torch.Generator().manual_seed(0))
    try:
        other = build(num_classes=model.num_classes, **config["model_args"])
        other.load_state_dict(model.state_dict())
        found, expected = other.eval()(images), model.eval()(images)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        return " ".join(str(error).split())[:200]
    difference = (found - expected).abs().max().item()
    if difference > TOLERANCE * expected.abs().max().item():
        return f"its logits differ by {difference:.2g}"
    return ""


def card_of(
    model: nn.Module,
    source: models.ModelSource,
    config: Mapping[str, Any],
    title: str,
    facts: Mapping[str, str],
    is_timms: bool,
) -> str:
    """Return the model card: preprocessing, accuracy of the run's log, licence, use, recipe."""
    images = config["pretrained_cfg"]
    flags = source.checkpoint.get("args")
    flags = vars(flags) if isinstance(flags, Namespace) else flags
    flags = flags if isinstance(flags, Mapping) else {}
    license_ = images.get("license") or "unknown"
    if flags and "model_name" in source.checkpoint:  # a run of this repository
        license_ = "apache-2.0"
    if origin := flags.get("finetune") or (flags.get("pretrained") and source.name):
        license_ = "unknown"
        name = printable(without_place(str(origin)))
        facts = {**facts, "licence": f"that of the weights it was fine-tuned from ({name})"}
    recipe = recipe_of(flags)
    return CARD.format(
        license=json.dumps(license_),
        title=printable(title),
        name=config["architecture"],
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        num_classes=config["num_classes"],
        size="x".join(map(str, images["input_size"][1:])),
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        usage=TIMM if is_timms else OURS,
        training=RECIPE.format(recipe=recipe) if recipe else "",
    )


def images_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the preprocessing in words."""
    images = config["pretrained_cfg"]
    how = f"{images['crop_mode']}, {images['crop_pct']:g}, {images['interpolation']}"
    return {"resize and crop": how, "mean, std": f"{images['mean']}, {images['std']}"}


def accuracy_of(source: models.ModelSource, ema: bool) -> dict[str, str]:
    """Return the accuracy that the log next to a checkpoint has for its epoch, if it has one."""
    path, checkpoint = Path(source.label).parent / LOG, source.checkpoint
    epoch = checkpoint.get("epoch")
    if epoch is None or checkpoint.get("step"):  # saved within the next epoch
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    row: Mapping[str, Any] = {}
    for line in lines:  # a resumed run repeats epochs: the last one counts
        with contextlib.suppress(ValueError):  # the end of a log that was cut off
            found = json.loads(line)
            if isinstance(found, dict) and found.get("epoch") == epoch:
                row = found
    kind, name = ("ema", "moving average") if ema else ("test", "raw weights")
    top1, top5 = (row.get(f"{kind}_acc{k}") for k in (1, 5))
    if not isinstance(top1, int | float) or not isinstance(top5, int | float):
        return {}
    return {f"validation, {name}": f"top-1 {top1:.3f} %, top-5 {top5:.3f} % (epoch {epoch})"}


def without_place(source: str) -> str:
    """Return a source without folders of this machine, and without the query of an address."""
    is_public = source.startswith((HUB, "http://", "https://"))
    return source.partition("?")[0] if is_public else Path(source.removeprefix(FOLDER)).name


def recipe_of(flags: Mapping[str, Any]) -> str:
    """Return a run's flags as lines of YAML, without defaults and places of a machine."""
    defaults = vars(get_args_parser().parse_args([]))
    sources = {name: without_place(flags[name]) for name in SOURCES if flags.get(name)}
    lines = [
        f"{name.replace('_', '-')}: {json.dumps(plain(value))}"
        for name, value in {**flags, **sources}.items()
        if name in defaults and name not in LOCAL and value != defaults[name]
    ]
    return printable("\n".join(lines).replace("\n", "\0")).replace("\\x00", "\n")


def push_folder(folder: Path, repository: str) -> str:
    """Upload a folder to the Hub; return its address.

    Raises:
        UserError: It cannot be uploaded.
    """
    import huggingface_hub as hub

    try:
        check_reachable(hub.constants.ENDPOINT, f"to {repository}")
        api = hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # of any type
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{folder} is written, but cannot be pushed to {repository}: {reason}"
        ) from error
    return f"{hub.constants.ENDPOINT}/{repository}"
