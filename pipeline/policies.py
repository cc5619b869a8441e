"""Policies of timm for ``--aa``: RandAugment, AutoAugment and AugMix by name."""

import re

from .images import DataError

NUMBER = r"\d+(\.\d*)?(e[+]?\d+)?"
# the parts of a name after its first, as patterns and as examples; timm ignores some others
STD = {f"mstd{NUMBER}": "mstd0.5"}
RAND = {r"m\d+": "m9", r"n\d+": "n2", f"p{NUMBER}": "p0.5", r"mmax\d+": "mmax20"}
RAND |= {r"inc\d+": "inc1", "t(weights|3a|3aw)": "tweights"}
AUGMIX = {r"m\d+": "m3", r"w\d+": "w3", r"d\d+": "d2", f"a{NUMBER}": "a1", "b[01]": "b1"}
PARTS = {"rand": RAND | STD, "augmix": AUGMIX | STD}
PARTS |= dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), STD)


def check_policy(policy: str) -> None:
    """Check all parts of a policy's name, such as ``rand-m9-mstd0.5-inc1``; empty for none.

    Raises:
        DataError: Names the parts that timm does not know, and those that it does.
    """
    first, *parts = policy.split("-")
    if policy and first not in PARTS:
        raise DataError(
            f"unknown policy --aa {policy}: {first!r} must be one of {', '.join(PARTS)}"
        )
    known = PARTS.get(first, {})
    bad = [part for part in parts if not any(re.fullmatch(one, part) for one in known)]
    if bad:
        raise DataError(
            f"unknown policy --aa {policy}: {', '.join(map(repr, bad))} must be like one of "
            f"{', '.join(known.values())}"
        )
