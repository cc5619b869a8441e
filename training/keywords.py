"""``KEY=VALUE`` words of ``--model-kwargs`` and ``--opt-kwargs``."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from utils import UserError

ELSEWHERE = {  # model arguments that --model-kwargs does not accept, and what sets them instead
    "num_classes": "is set by the dataset: leave it out",
    "img_size": "is set by --input-size",
    "drop_rate": "is set by --drop",
    "drop_path_rate": "is set by --drop-path",
    "qk_scale_factor": "is set by --qk-scale-factor",
    "locality_strength": "is set by --locality-strength",
    "local_up_to_layer": "is set by --local-up-to-layer",
    "pretrained": "loads weights: use --pretrained",
    "checkpoint_path": "loads weights: use --finetune CHECKPOINT",
    "features_only": "makes a backbone without a classifier: leave it out",
    "in_chans": "is set by --in-chans",
}
OPTIMIZER_ELSEWHERE = {  # likewise, arguments of optimizers
    "params": "are the model's: leave it out",
    "lr": "is set by --lr",
    "weight_decay": "is set by --weight-decay",
    "eps": "is set by --opt-eps",
    "betas": "is set by --opt-betas",
    "momentum": "is set by --momentum",
    "deterministic": "is always on: leave it out",
}


def keyword_arguments(
    words: Sequence[str], flag: str = "--model-kwargs", elsewhere: Mapping[str, str] = ELSEWHERE
) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` words; a value is a Python literal, else a string.

    Args:
        words: Values of the flag.
        flag: Its name.
        elsewhere: Arguments that it does not accept, and what sets them instead.

    Raises:
        UserError: A word has another form, or another flag sets the argument.
    """
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"{flag} {word} must be KEY=VALUE, such as depth=6")
        if key in elsewhere:
            raise UserError(f"{flag} {word}: {key} {elsewhere[key]}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found
