"""Train a Visformer, stop, resume and evaluate it: ``python -m tools.demo``.

Every command is printed and runs in its own process.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from training.parser import Parser

ROOT = Path(__file__).resolve().parent.parent
STOP_EPOCH = "8"


def run_main(*flags: str) -> list[str]:
    """Run ``main.py`` with ``flags``, print its output and return its lines."""
    print("\n$ python main.py", shlex.join(flags), flush=True)
    command = [sys.executable, str(ROOT / "main.py"), *flags]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    if process.returncode:
        raise SystemExit(process.returncode)
    return lines


def accuracies(lines: list[str]) -> list[str]:
    """Return the last lines with the accuracies of the weights and of their moving average."""
    return [line for line in lines if "* Acc@1" in line][-2:]


def main() -> int:
    """Run the demo; return 1 if the evaluation differs from the last one of the training."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="output/demo")
    output = parser.parse_args().output_dir
    train = ["-c", "configs/digits.yaml", "--output_dir", output]
    checkpoint = f"{output}/checkpoint.pth"
    run_main(*train, "--stop-epoch", STOP_EPOCH)
    trained = accuracies(run_main(*train, "--resume", "auto"))
    evaluated = accuracies(run_main("--eval", "--resume", checkpoint))
    print("\nat the end of training:", *trained, sep="\n  ")
    print(f"evaluating {checkpoint}:", *evaluated, sep="\n  ")
    print(f"curves and pictures: tensorboard --logdir {output}")
    if trained != evaluated:
        print("error: the two differ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
