"""Parts of pages that tools write, between ``<!-- NAME -->`` and ``<!-- end of NAME -->``."""

from pathlib import Path

from training.files import write_atomically
from utils import UserError


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what a page has between the two marks of a name.

    Raises:
        UserError: The page does not have both marks once.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = path.read_text()
    if page.count(begin) != 1 or page.count(end) != 1:
        raise UserError(f"{path} must have {begin} and {end} once each")
    head, _, rest = page.partition(begin)
    foot = rest.partition(end)[2]
    content = f"{head}{begin}\n\n{text}\n\n{end}{foot}"
    write_atomically(path, lambda file: file.write(content.encode()))
