"""Train a Visformer on handwritten digits, stop, resume and evaluate it.

``python -m tools.demo``: every command is printed and runs in its own process.
"""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = "output/demo"
RECIPE = "configs/digits.yaml"
PICTURE = "demo.png"  # in the output folder
STOP_EPOCH = "8"
INTERRUPT = (signal.SIGINT,)


def run_main(*flags: str) -> list[str]:
    """Run ``main.py`` with ``flags``, print its output and return its lines.

    After Ctrl-C it may save its state. It does not get the terminal's signal, as it may be busy
    with its imports, but SIGTERM.
    """
    print("\n$ python main.py", shlex.join(flags), flush=True)
    command = [sys.executable, str(ROOT / "main.py"), *flags]
    lines = []
    signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPT)  # which the process inherits
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPT)
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line.rstrip("\n"))
        except KeyboardInterrupt:
            process.terminate()
            print(process.stdout.read(), end="", flush=True)
            raise
    if process.returncode:
        raise SystemExit(process.returncode)
    return lines


def accuracies(lines: list[str]) -> list[str]:
    """Return the last lines with the accuracies of the weights and of their moving average."""
    return [line for line in lines if "* Acc@1" in line][-2:]


def demo(argv: list[str]) -> int:
    """Run with the flags ``argv``; return 1 if evaluation and training differ in accuracy."""
    from tools import demo_picture
    from training.parser import Parser

    parser = Parser("python -m tools.demo", description=__doc__.splitlines()[0])
    folder = "folder for checkpoints, logs and a picture"
    parser.add_argument("--output_dir", default=OUTPUT, metavar="FOLDER", help=folder)
    output = parser.parse_args(argv).output_dir
    train = ["-c", RECIPE, "--output_dir", output]
    checkpoint = f"{output}/checkpoint.pth"
    again = ["--overwrite"] if output == OUTPUT else []  # nobody keeps a run there
    run_main(*train, "--stop-epoch", STOP_EPOCH, *again)
    trained = accuracies(run_main(*train, "--resume", "auto"))
    evaluated = accuracies(run_main("--eval", "--resume", checkpoint))
    print("\nat the end of training:", *trained, sep="\n  ")
    print(f"evaluating {checkpoint}:", *evaluated, sep="\n  ")
    demo_picture.draw(output, RECIPE, Path(output, PICTURE))
    print(f"curves, predictions and attention: {Path(output, PICTURE)}")
    print(f"more: tensorboard --logdir {output}")
    if trained != evaluated:
        print("error: the two differ", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str]) -> int:
    """Run the command line ``argv``; return the exit status."""
    try:
        from tools import cli  # takes seconds, in which Ctrl-C may come

        return cli.program(demo)(argv)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
