"""Folders in the layout of the Hugging Face Hub, which timm loads, too."""

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
from models.hub import CONFIG, IMAGES, WEIGHTS, check_reachable
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
import datasets, models  # of the repository that trained it

found = models.load_model("local-dir:FOLDER")  # or hf-hub:ORG/NAME
model, config = found.model, found.data_config"""


def write_folder(
    folder: Path, model: nn.Module, source: models.ModelSource, kwargs: Mapping[str, Any]
) -> str:
    """Write config, weights and model card to an empty folder; return a line about timm.

    Args:
        folder: Exists.
        model: With its weights and ``pretrained_cfg``, in evaluation mode.
        source: Of the weights.
        kwargs: Keyword arguments that built the model.
    """
    config = config_of(model, source, kwargs)
    (folder / CONFIG).write_text(json.dumps(plain(config), indent=2) + "\n")
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / WEIGHTS[0], metadata={"format": "pt"})
    reason = why_not_timm(model, config)
    (folder / "README.md").write_text(card_of(model, source, config, folder.name, not reason))
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
    is_timms: bool,
) -> str:
    """Return the model card: preprocessing, accuracies of the run's log, licence, use, recipe."""
    images = config["pretrained_cfg"]
    flags = source.checkpoint.get("args")
    flags = vars(flags) if isinstance(flags, Namespace) else flags
    flags = flags if isinstance(flags, Mapping) else {}
    facts = {
        "resize and crop": ", ".join(
            str(images[key]) for key in ("crop_mode", "crop_pct", "interpolation")
        ),
        "mean, std": f"{images['mean']}, {images['std']}",
        **accuracies(source),
    }
    license_ = images.get("license", "apache-2.0")
    if origin := flags.get("finetune") or (flags.get("pretrained") and source.name):
        license_ = "unknown"
        name = printable(Path(str(origin)).name)
        facts["licence"] = f"that of the weights it was fine-tuned from ({name})"
    training = ""
    if recipe := recipe_of(flags):
        training = (
            f"\n## Training\n\nFlags that differ from the defaults:\n\n```yaml\n{recipe}\n```\n"
        )
    return CARD.format(
        license=license_,
        title=printable(title),
        name=config["architecture"],
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        num_classes=config["num_classes"],
        size="x".join(map(str, images["input_size"][1:])),
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        usage=TIMM if is_timms else OURS,
        training=training,
    )


def accuracies(source: models.ModelSource) -> dict[str, str]:
    """Return the accuracies that the log next to a checkpoint has for its epoch."""
    path, epoch = Path(source.label).parent / LOG, source.checkpoint.get("epoch")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the end of a log that was cut off
            continue
        if isinstance(row, dict) and row.get("epoch") == epoch and epoch is not None:
            rows.append(row)
    found = {}
    for kind, name in (("test", "raw weights"), ("ema", "moving average")):
        if rows and all(isinstance(rows[-1].get(f"{kind}_acc{k}"), int | float) for k in (1, 5)):
            top1, top5 = (rows[-1][f"{kind}_acc{k}"] for k in (1, 5))
            found[f"validation, {name}"] = f"top-1 {top1:.3f} %, top-5 {top5:.3f} % (epoch {epoch})"
    return found


def recipe_of(flags: Mapping[str, Any]) -> str:
    """Return a run's flags as lines of YAML, without defaults and places of a machine."""
    defaults = vars(get_args_parser().parse_args([]))
    lines = [
        f"{name.replace('_', '-')}: {json.dumps(plain(value))}"
        for name, value in flags.items()
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
