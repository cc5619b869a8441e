"""One hostile input, run in a forked process with limits, and how it ended."""

import contextlib
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.attack.programs import PROGRAMS
from tests.attack.valid import World

FINE, REFUSED = "fine", "refused"
MEMORY = 500 << 20  # bytes that a case may have beyond those of the parent
CPU_SECONDS, WALL_SECONDS = 20, 40
BROKEN = 99  # exit status if the input itself could not be made
REPORTS = 600  # descriptor of the list of violations, out of the reach of programs
LOCK = "run.lock"  # empty; removing it would let two runs write into one folder
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HOMES = ("TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")
CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod")
STARTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn")
LOCAL = ("127.0.0.1", b"127.0.0.1", "localhost", b"localhost", "::1", "", None)
SHARED_MEMORY = ("/dev/null", "/dev/shm/", "/proc/")
ERROR = re.compile(r"error( on rank [^:]*)?: |[\w. /-]+: error: ")  # ours, and argparse's
EXHAUSTED = "out of memory"

Make = Callable[[Path, World], object]


@dataclass(frozen=True)
class Case:
    """A hostile input, and the outcome that it must have.

    Attributes:
        kind: Class of the case.
        name: Of the case within its class.
        program: Key of ``PROGRAMS``.
        words: Command line; ``@x`` is the input x of the case, ``=x`` its output x, ``+x`` the
            valid file x, ``^x`` the address x of the hostile server.
        make: Writes the input into a folder.
        named: What the error must name, ``@x`` as in ``words``; of several, any.
        outcome: ``fine`` or ``refused``.
        leaves: Patterns of output files that may stay after a refusal.
        around: Called in the process before the program starts.
    """

    kind: str
    name: str
    program: str
    words: Sequence[object]
    make: Make = lambda folder, world: None
    named: str | Sequence[str] = ""
    outcome: str = REFUSED
    leaves: Sequence[str] = ()
    around: Callable[[], object] = lambda: None

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}, {self.program}"


def run_case(case: Case, world: World, folder: Path) -> str | None:
    """Run a case in a new ``folder``; return what it did wrong, or None if it survived."""
    for name in ("in", "out", "home", "tmp"):
        (folder / name).mkdir(parents=True)
    child = os.fork()
    if not child:
        _be_child(case, world, folder)
    ended = wait(child, WALL_SECONDS)
    wrong = f"no end after {WALL_SECONDS} s" if ended is None else _judge(case, ended, folder)
    if wrong is None:
        _remove(folder)
    return wrong


def wait(child: int, seconds: float) -> int | None:
    """Return the exit status of a child; kill it and its group after the limit, and return None."""
    handle = os.pidfd_open(child)
    try:
        ended, _, _ = select.select([handle], [], [], seconds)
    finally:
        os.close(handle)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if ended else None


def limit(memory: int = MEMORY, seconds: int = CPU_SECONDS) -> None:
    """Limit memory, beyond the present, and CPU time of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _be_child(case: Case, world: World, folder: Path) -> None:
    """Run the program and end this process."""
    status = BROKEN
    try:
        os.setsid()
        words = [_word(word, folder, world) for word in case.words]
        _redirect(folder)
        case.make(folder / "in", world)
        _settle(folder)
        limit()
        case.around()
        status = 1
        status = PROGRAMS[case.program](words)
        sys.stdout.flush()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status or 0)


def _word(word: object, folder: Path, world: World) -> str:
    text, places = str(word), {"@": folder / "in", "=": folder / "out", "+": world.folder}
    places["^"] = world.base
    mark = re.search(r"(^|local-dir:)([@=+^])", text)
    if not mark:
        return text
    return f"{mark[1]}{places[mark[2]]}/{text[mark.end() :]}"


def _redirect(folder: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for number, name in enumerate((os.devnull, folder / "stdout", folder / "stderr")):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 until the end
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115


def _settle(folder: Path) -> None:
    """Make the folder this process's only one, and report what it does beyond."""
    sys.dont_write_bytecode = True
    os.chdir(folder / "in")
    os.environ.update({"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")})
    for name in HOMES:
        os.environ[name] = str(folder / "home")
    tempfile.tempdir = None
    torch.hub.set_dir(str(folder / "home"))
    file = os.open(folder / "violations", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, REPORTS)
    os.close(file)
    inside = os.path.realpath(folder)

    def is_inside(path: object) -> bool:
        if isinstance(path, int):
            return True
        place = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
        name = f"{place}/{os.path.basename(os.fsdecode(path))}"
        return place == inside or name.startswith((f"{inside}/", *SHARED_MEMORY))

    def watch(event: str, args: tuple) -> None:
        paths: tuple = ()
        if event == "open":
            paths = args[:1] if isinstance(args[2], int) and args[2] & WRITING else ()
        elif event in CHANGES:
            paths = args[:1]
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = args[:2] if event == "os.rename" else args[1:2]
        elif event in STARTS:
            _report(f"{event} {args[0]}")
        elif event in ("socket.connect", "socket.getaddrinfo"):
            address = args[1] if event == "socket.connect" else args[:1]
            if isinstance(address, tuple) and address[0] not in LOCAL:
                _report(f"{event} {address[0]}")
        for path in paths:
            if path is not None and not is_inside(path):
                _report(f"{event} {path}")

    sys.addaudithook(watch)


def _report(text: str) -> None:
    os.write(REPORTS, f"{text}\n".encode(errors="backslashreplace"))


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _judge(case: Case, status: int, folder: Path) -> str | None:
    errors, output = _read(folder / "stderr"), _read(folder / "stdout")
    last = (errors.splitlines() or [""])[-1][:400]
    if status == BROKEN:
        return f"the case itself failed: {last}"
    if violations := _read(folder / "violations"):
        return f"it went beyond its folder: {violations.splitlines()[0]}"
    if status < 0:
        return f"killed by signal {-status}; {last}"
    if "Traceback" in errors:
        return f"a traceback: {last}"
    if strange := [c for c in errors + output if c != "\n" and not c.isprintable()]:
        return f"it prints {strange[0]!r}"
    if left := [path.name for path in (folder / "tmp").iterdir()]:
        return f"it leaves {left[0]} in the temporary folder"
    if case.outcome == FINE:
        return None if status == 0 else f"status {status}: {last}"
    return _judge_refusal(case, status, errors, folder)


def _judge_refusal(case: Case, status: int, errors: str, folder: Path) -> str | None:
    if status == 0:
        return f"accepted: {(_read(folder / 'stdout').splitlines() or [''])[-1][:200]}"
    lines = errors.splitlines()
    if lines and lines[0].startswith("usage: ") and status == 2:
        lines = lines[-1:]
    if len(lines) != 1 or not ERROR.match(lines[0]):
        return f"{len(lines)} lines of errors: {errors[:300]!r}"
    if EXHAUSTED in lines[0] and case.named != EXHAUSTED:
        return f"memory: {lines[0][:300]}"
    names = [case.named] if isinstance(case.named, str) else case.named
    names = [str(folder / "in" / name[1:]) if name[:1] == "@" else name for name in names]
    if not any(name in lines[0] for name in names):
        return f"the error does not name {names}: {lines[0][:300]}"
    outputs = [path for path in (folder / "out").rglob("*") if not path.is_dir()]
    patterns = (LOCK, *case.leaves)
    if left := [path.name for path in outputs if not any(map(path.match, patterns))]:
        return f"it leaves {left} behind; {lines[0][:200]}"
    return None


def _remove(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder)
