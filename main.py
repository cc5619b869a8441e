"""Train and evaluate image classifiers; ``python main.py --help`` lists the flags."""

import copy
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader
from torchvision.utils import make_grid

import datasets
import engine
import models
import utils
from configs import ConfigError, LaunchError, Place, parse_args
from utils import log

EXPECTED_ERRORS = (
    ConfigError,
    datasets.DataError,
    engine.NoImagesError,
    engine.NonFiniteLossError,
    engine.SettingError,
    models.CheckpointError,
    models.ModelError,
    LaunchError,
    utils.OutputError,
)


def read_resume(args: Namespace) -> dict[str, Any]:
    """The checkpoint that ``--resume`` names, or an empty dict."""
    path = args.resume
    if path == "auto":
        path = Path(args.output_dir, utils.CHECKPOINT)
        if not path.exists():
            log(f"--resume auto: no {path} yet, starting afresh")
            return {}
    if not path:
        return {}
    log(f"reading {path}")
    return models.read_checkpoint(path)


def choose_model(
    args: Namespace, given: set[str], checkpoint: Mapping[str, Any], num_classes: int
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name, required and optional keyword arguments of the model.

    What a checkpoint of ours says about the model's function goes before the flags, with a
    warning where a given flag says otherwise. Another ``--model``, though, is taken at its word.
    """
    optional = {"img_size": args.input_size, "drop_rate": args.drop}
    optional |= {"drop_path_rate": args.drop_path}
    required = {"num_classes": num_classes, "qk_scale_factor": args.qk_scale_factor}
    for flag, key in (("drop", "drop_rate"), ("drop_path", "drop_path_rate")):
        if flag in given:
            required[key] = optional.pop(key)
    saved = dict(checkpoint.get("model_kwargs", {}))
    if not saved or ("model" in given and args.model != checkpoint["model_name"]):
        return args.model, required, optional
    if saved["num_classes"] != num_classes:
        raise datasets.DataError(
            f"{args.resume} knows {saved['num_classes']} classes, the dataset has {num_classes}"
        )
    exponent = saved.get("qk_scale_factor")
    if args.qk_scale_factor not in (None, exponent):
        log(
            f"warning: --qk-scale-factor {args.qk_scale_factor} is ignored: {args.resume} was "
            f"trained with {exponent}, and another would change what the model computes"
        )
    return checkpoint["model_name"], required | {"qk_scale_factor": exponent}, saved | optional


def choose_input_size(args: Namespace, checkpoint: Mapping[str, Any]) -> int:
    """``--input-size`` where given, else the checkpoint's, else the dataset's usual one."""
    saved = checkpoint.get("input_size")
    if args.input_size and saved and args.input_size != saved:
        log(f"warning: --input-size {args.input_size}, but {args.resume} was trained at {saved}")
    return args.input_size or saved or datasets.input_size_of(args)


def choose_precision(args: Namespace, model: nn.Module, device: torch.device) -> engine.Precision:
    """Mixed precision as flagged; the layout as flagged, else the one that suits the model."""
    dtype = getattr(torch, args.amp_dtype) if args.amp else None
    last = args.channels_last
    if last is None:
        last = getattr(model, "channels_last", False)
    return engine.Precision(device, dtype, torch.channels_last if last else torch.contiguous_format)


def fused(model: nn.Module, name: str, args: Namespace) -> nn.Module:
    """With ``--fuse``, the model's inference net."""
    if not args.fuse:
        return model
    if not hasattr(model, "fuse"):
        raise models.ModelError(f"{name} has no inference net of its own: leave --fuse out")
    return model.fuse()


class Run:
    """All that a checkpoint holds: model, moving average, optimizer, schedule, scaler, progress.

    Args:
        args: The flags.
        model: The model, on its device.
        model_name, model_kwargs: How :func:`models.build_model` made it.
        precision: Mixed precision.
        lr: Learning rate, scaled.
        updates_per_epoch: Optimizer steps of an epoch.
    """

    def __init__(
        self,
        args: Namespace,
        model: nn.Module,
        model_name: str,
        model_kwargs: dict[str, Any],
        precision: engine.Precision,
        lr: float,
        updates_per_epoch: int,
    ):
        self.args, self.model = args, model
        self.model_name, self.model_kwargs = model_name, model_kwargs
        self.precision = precision
        self.updates_per_epoch = updates_per_epoch
        self.epoch = args.start_epoch - 1
        self.best_acc1 = 0.0
        self.gelu = "none"
        self.ema = self.start_average()
        self.optimizer = engine.build_optimizer(args, model, lr)
        self.scheduler = engine.build_scheduler(args, self.optimizer, updates_per_epoch)

    def start_average(self) -> ModelEmaV3 | None:
        """A moving average that begins at the model's present weights, if there is to be one."""
        if not self.args.model_ema:
            return None
        return ModelEmaV3(
            self.model,
            self.args.model_ema_decay,
            use_warmup=self.args.model_ema_warmup,
            device=torch.device("cpu") if self.args.model_ema_force_cpu else None,
        )

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "epoch": self.epoch,
            "best_acc1": self.best_acc1,
            "model_name": self.model_name,
            "model_kwargs": self.model_kwargs,
            "input_size": self.args.input_size,
            "gelu": self.gelu,
            "args": vars(self.args),
        }

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; one of weights alone starts at ``--start_epoch``."""
        source = self.args.resume
        self.load(checkpoint, source)
        self.ema = self.start_average()
        if self.ema is not None and checkpoint.get("model_ema"):
            models.load_weights(self.ema.module, checkpoint, source, ema=True)
        if "optimizer" not in checkpoint or "epoch" not in checkpoint:
            log(f"{source} holds no optimizer: its weights start a new run")
        else:
            utils.restore_optimizer(self.optimizer, checkpoint["optimizer"], source)
            if checkpoint.get("scaler"):  # empty unless the run used float16
                self.precision.scaler.load_state_dict(checkpoint["scaler"])
            self.best_acc1 = checkpoint.get("best_acc1", 0.0)
            self.epoch = checkpoint["epoch"]
            self.tell_changes(checkpoint.get("args"))
            if self.args.sched == "plateau":
                self.scheduler.load_state_dict(checkpoint["lr_scheduler"])

    def finetune(self, path: str) -> None:
        """Start from the weights of a checkpoint, with a new classifier for other classes."""
        self.load(models.read_checkpoint(path), path, new_head=True)
        self.ema = self.start_average()

    def load(self, checkpoint: Mapping[str, Any], source: str, new_head: bool = False) -> None:
        """Load weights, and remember what they say about the function of the model."""
        log(str(models.load_weights(self.model, checkpoint, source, new_head=new_head)))
        self.gelu = checkpoint.get("gelu", self.gelu)
        if hasattr(self.model, "qk_scale_factor"):
            self.model_kwargs["qk_scale_factor"] = self.model.qk_scale_factor

    def tell_changes(self, saved: Any) -> None:
        """Say which flags differ from those of the checkpoint: they hold from here on."""
        if not isinstance(saved, Mapping):
            return
        changed = [
            f"{name} {value} (was {saved[name]})"
            for name, value in vars(self.args).items()
            if name in saved
            and saved[name] != value
            and name not in ("resume", "stop_epoch", "finetune")
        ]
        if changed:
            log(f"flags other than the checkpoint's: {', '.join(changed)}")

    def set_lr(self, metric: float | None = None) -> None:
        """The learning rate of the epoch that follows ``self.epoch``."""
        self.scheduler.step(self.epoch + 1, metric)
        self.scheduler.step_update((self.epoch + 1) * self.updates_per_epoch)


def evaluate(
    loader: DataLoader, model: nn.Module, args: Namespace, precision: engine.Precision, prefix: str
) -> dict[str, float]:
    """Evaluate, print DeiT's line, and return the statistics of the log."""
    if next(model.parameters()).device.type != precision.device.type:  # --model-ema-force-cpu
        model = copy.deepcopy(model).to(precision.device)
    utils.broadcast_buffers(model)
    model = engine.compiled(model, args.compile)
    stats = engine.evaluate(loader, model, precision.device, precision, shared=args.dist_eval)
    images, corrupt = stats.pop("images"), stats.pop("corrupt")
    log(
        f"{prefix}* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f} "
        f"on {images} images" + (f" ({corrupt} corrupt ones skipped)" if corrupt else "")
    )
    return stats | ({"corrupt": corrupt} if corrupt else {})


def run(args: Namespace, given: set[str], place: Place, device: torch.device) -> None:
    """One run: build everything, then evaluate or train."""
    found = "found" if device.type == "cuda" else "not found"
    why = "" if args.device else f" (CUDA {found})"
    log(f"device {device}{why}, {place.world_size} process(es) started by {place.launcher}")
    checkpoint = read_resume(args)
    args = Namespace(**vars(args) | {"input_size": choose_input_size(args, checkpoint)})
    utils.seed_everything(args.seed)
    torch.backends.cudnn.benchmark = True

    share = (place.world_size, place.rank)
    eval_set, num_classes = datasets.build_dataset(False, args)
    eval_loader = datasets.build_eval_loader(eval_set, args, *(share if args.dist_eval else (1, 0)))
    name, required, optional = choose_model(args, given, checkpoint, num_classes)
    model, model_kwargs = models.build_model(name, required, optional)
    if hasattr(model, "qk_scale_factor"):
        model_kwargs["qk_scale_factor"] = model.qk_scale_factor
    models.check_input_size(model, name, args.input_size)
    precision = choose_precision(args, model, device)
    precision.place(model)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            message = f"{name} cannot recompute blocks: leave --grad-checkpointing out"
            raise models.ModelError(message) from error
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(f"model {name} {model_kwargs}: {n_parameters / 1e6:.2f} M parameters, {precision}")

    if args.eval:
        log(str(models.load_weights(model, checkpoint, args.resume)))
        evaluate(eval_loader, fused(model, name, args), args, precision, "")
        if checkpoint.get("model_ema"):
            models.load_weights(model, checkpoint, args.resume, ema=True)
            evaluate(eval_loader, fused(model, name, args), args, precision, "EMA ")
        return

    train_set, _ = datasets.build_dataset(True, args)
    train_loader = datasets.build_train_loader(train_set, args, *share)
    mixup_fn = engine.build_mixup(args, num_classes)
    lr = engine.scaled_lr(args, place.world_size)
    global_batch = args.batch_size * args.accum_iter * place.world_size
    log(f"learning rate {lr:.6g} (--lr {args.lr:g}) for {global_batch} images per step")
    updates_per_epoch = -(-len(train_loader) // args.accum_iter)
    state = Run(args, model, name, model_kwargs, precision, lr, updates_per_epoch)
    if checkpoint:
        state.restore(checkpoint)
    elif args.finetune:
        state.finetune(args.finetune)
    state.set_lr()
    output = utils.Output(args.output_dir, args, start_epoch=state.epoch + 1)
    if state.epoch < 0:
        output.add_images("train/images", example_images(train_set))
    train(state, output, train_loader, eval_loader, mixup_fn, num_classes, place, n_parameters)
    output.close()


def train(
    state: Run,
    output: utils.Output,
    train_loader: DataLoader,
    eval_loader: DataLoader,
    mixup_fn: Any,
    num_classes: int,
    place: Place,
    n_parameters: int,
) -> None:
    """Epochs up to ``--epochs`` or ``--stop-epoch``, each trained, evaluated, logged and saved."""
    args, model, precision = state.args, state.model, state.precision
    wrapped = model
    if place.world_size > 1:
        static = args.accum_iter == 1 and args.compile is None
        wrapped = engine.distribute(model, precision.device, static)
    wrapped = engine.compiled(wrapped, args.compile)
    criterion = engine.build_criterion(args, mixup_fn, num_classes).to(precision.device)
    stop = args.epochs if args.stop_epoch is None else min(args.epochs, args.stop_epoch)
    if state.epoch + 1 >= stop:
        log(f"nothing left to train: {state.epoch + 1} of {stop} epochs are done")
        return
    log(f"training epochs {state.epoch + 1} to {stop - 1} of {args.epochs}")
    started = time.time()
    for epoch in range(state.epoch + 1, stop):
        utils.seed_everything(args.seed, epoch, place.rank)
        train_loader.sampler.set_epoch(epoch)
        progress = utils.Progress(train_loader, epoch, stop, place.world_size)
        train_stats = engine.train_one_epoch(
            wrapped,
            criterion,
            progress,
            state.optimizer,
            precision.device,
            epoch,
            precision,
            max_norm=args.clip_grad,
            model_ema=state.ema,
            mixup_fn=mixup_fn,
            lr_scheduler=state.scheduler,
            accum_iter=args.accum_iter,
            set_training_mode=args.train_mode,
            log_interval=args.log_interval,
            report=progress.report,
        )
        test_stats = evaluate(eval_loader, model, args, precision, "")
        stats = {f"train_{key}": value for key, value in train_stats.items()}
        stats |= {f"test_{key}": value for key, value in test_stats.items()}
        if state.ema is not None:
            ema_stats = evaluate(eval_loader, state.ema.module, args, precision, "EMA ")
            stats |= {f"ema_{key}": value for key, value in ema_stats.items()}
        state.epoch = epoch
        state.set_lr(metric=test_stats["acc1"])
        is_best = test_stats["acc1"] > state.best_acc1
        state.best_acc1 = max(test_stats["acc1"], state.best_acc1)
        log(f"Max accuracy: {state.best_acc1:.2f}%")
        output.log_epoch(stats | {"epoch": epoch, "n_parameters": n_parameters}, epoch)
        output.save(state.state, best=is_best)
    if state.epoch + 1 < args.epochs:
        log(f"stopped before epoch {stop} of {args.epochs} (--stop-epoch)")
    log(f"Training time {timedelta(seconds=int(time.time() - started))}")


def example_images(dataset: datasets.AugmentedDataset, count: int = 32) -> torch.Tensor:
    """A picture of augmented training images, spread over the classes."""
    indices = [i * len(dataset) // count for i in range(count)]
    images = [dataset[datasets.Draw(index)].image for index in indices]
    return make_grid(datasets.denormalize(torch.stack(images)), nrow=8)


def start(argv: list[str]) -> None:
    """Run with the flags ``argv``."""
    args, given = parse_args(argv)
    with utils.process_group(args) as (place, device):
        run(args, given, place, device)


def main(argv: list[str]) -> int:
    """Run with the flags ``argv``; returns the exit status."""
    return utils.exit_status(lambda: start(argv), EXPECTED_ERRORS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
