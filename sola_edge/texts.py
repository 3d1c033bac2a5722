"""Text: a user's files, a hub data set, or what every machine with Python has.

Three built-in texts need no network: `mixed` (prose and questions that come with this package, documentation strings and code
of the standard library; the default for calibration), `python-docstrings` (the documentation strings alone) and
`python-reference` (the language reference behind `help()`, the default for scoring). The last shares no document with the
others, so nothing is scored on what it was calibrated on, but it is technical English: a model calibrated on documentation
strings keeps more of its ability there than elsewhere.
"""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from sola_edge.errors import UserError

SEPARATOR = "\n\n"
SHORTEST = 200  # characters: one-line documentation strings are noise
MIXED = 1_000_000  # characters of the mixed text: about 250,000 tokens
LONGEST = 4000  # of a piece of code, so that no single one fills a window


@dataclass(frozen=True)
class Text:
    """Documents and where they came from. `sha256` is that of the documents joined by `SEPARATOR`, in UTF-8."""

    name: str
    documents: tuple[str, ...]

    @property
    def joined(self) -> str:
        return SEPARATOR.join(self.documents)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.joined.encode()).hexdigest()


def load_text(source: str) -> Text:
    """A built-in text's name, a .txt file, a .jsonl file of {"text": …} rows, or a hub data set's name.

    Line endings are kept as they are. Raises UserError when there is no such text or it is empty.
    """
    path = Path(source)
    if source in BUILT_IN:
        documents = list(_built_in(source))
    elif path.suffix in READERS:
        documents = _read(path)
    elif path.exists():
        raise UserError(
            f"{path} is neither .txt nor .jsonl; give a text file, rows of {{'text': …}}, or a data set's name"
        )
    else:
        documents = _from_hub(source)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{source} holds no text; give a .txt or .jsonl file that does")
    return Text(source if source in BUILT_IN else path.name, tuple(documents))


@cache
def _built_in(name: str) -> tuple[str, ...]:
    """The documents of a built-in text; parsing the standard library takes seconds."""
    return tuple(BUILT_IN[name]())


def _read(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:  # no newline translation: it would change tokens
            return READERS[path.suffix](stream.read())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is not JSON lines of {{"text": "…"}} ({error}); convert it') from error


def _json_rows(content: str) -> list[str]:
    rows = [json.loads(line)["text"] for line in content.split("\n") if line.strip()]
    if not all(isinstance(row, str) for row in rows):
        raise ValueError("a row's text is no string")
    for row in rows:
        row.encode()  # a lone surrogate is valid JSON and no text
    return rows


READERS: dict[str, Callable[[str], list[str]]] = {".txt": lambda content: [content], ".jsonl": _json_rows}


def _from_hub(name: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        message = f"{name} is no file; for a hub data set of that name install the extra: pip install 'sola-edge[hub]'"
        raise UserError(message) from error
    repository, _, configuration = name.partition(":")
    try:
        rows = load_dataset(repository, configuration or None, split="train", streaming=True)
        return [row["text"] for row, _ in zip(rows, range(10_000), strict=False)]
    except Exception as error:  # whatever the hub or the data set's format raises
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} is no file, and no data set with a text column on the hub ({line})") from error


def _mixed() -> list[str]:
    """Documents of four kinds, always of the one with least characters so far; a kind that is used up is left out."""
    docstrings = (text for path in _standard_library() for text in _docstrings_of(path))
    kinds = [iter(_shipped("prose.txt")), iter(_shipped("questions.txt")), docstrings, _code()]
    lengths = dict.fromkeys(range(len(kinds)), 0)
    found: list[str] = []
    total = 0
    while lengths and total < MIXED:
        kind = min(lengths, key=lambda k: lengths[k])
        document = next(kinds[kind], None)
        if document is None:
            del lengths[kind]
            continue
        found.append(document)
        lengths[kind] += len(document)
        total += len(document)
    return found


def _shipped(name: str) -> list[str]:
    """Documents of a file of this package, which have a line of a tilde between them."""
    return (resources.files("sola_edge") / "data" / name).read_text(encoding="utf-8").strip().split("\n~\n")


def _code() -> Iterator[str]:
    """Functions and classes of the standard library that are neither tiny nor endless, in file order."""
    for path in _standard_library():
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError, OSError):
            continue
        lines = source.splitlines()
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                if SHORTEST <= len(text) <= LONGEST:
                    yield text


def _docstrings() -> list[str]:
    """Documentation strings of the standard library's modules, in file order: parsed, never imported."""
    return [text for path in _standard_library() for text in _docstrings_of(path)]


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
    paths = [p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts)]
    return sorted(paths, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= SHORTEST:
                yield text


def _reference() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        message = "this Python comes without pydoc_data (its language reference); give a text file of your own"
        raise UserError(message) from error
    return [topics[name] for name in sorted(topics)]


BUILT_IN: dict[str, Callable[[], list[str]]] = {
    "mixed": _mixed,
    "python-docstrings": _docstrings,
    "python-reference": _reference,
}
DEFAULT_CALIBRATION = "mixed"  # measured against the other: docs/results.md
DEFAULT_SCORING = "python-reference"
