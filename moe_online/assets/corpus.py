"""The text of the shipped checkpoint: the Python standard library's sources, split into training and held-out files.

A file belongs to one side because of its path alone, so the split is the same for every Python version.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
from pathlib import Path

import numpy as np

HELDOUT_SHARE = 0.04  # of the files
SAMPLE_BYTES = 144_000  # of the held-out text that is shipped
SAMPLE_FILE_BYTES = 30_000  # longer files are not in the sample, so that it has many authors
COPIED_SHARE = 0.1  # of a file's passages; files that share more with training files are not in the sample
EXCLUDED = (  # installed packages, generated tables, data, and files that are no valid Python on purpose
    "site-packages/*",
    "*__pycache__/*",
    "_sysconfigdata*",
    "config-*",
    "encodings/*",
    "lib2to3/tests/data/*",
    "pydoc_data/*",
    "test/cjkencodings/*",
    "test/encoded_modules/*",
    "test/tokenizedata/*",
    "test/test_lib2to3/data/*",
    "*unicode*",
)
RULE = (
    "by file: held out if the first 32 bits of sha256(path relative to the library) are below "
    f"{HELDOUT_SHARE} * 2**32; left out: files that are not UTF-8, repeated contents, " + " ".join(EXCLUDED)
)
LICENCE = (
    "Text and heldout.txt: Python standard library, Copyright (c) 2001 Python Software Foundation, "
    "PSF License Agreement (https://docs.python.org/3/license.html)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Bytes of both sides, files joined in the order of their paths."""

    train: np.ndarray  # uint8 [N]
    heldout: np.ndarray  # uint8
    sample: bytes  # whole held-out files, no tests, no copies: shipped beside the checkpoint
    num_files: tuple[int, int]  # train, held-out
    sample_files: tuple[str, ...]
    sha256: str  # of all paths and contents

    @property
    def sample_tokens(self) -> np.ndarray:
        """`sample` as uint8 tokens."""
        return np.frombuffer(self.sample, np.uint8)


def read(stdlib: Path) -> Corpus:
    """Reads the `*.py` files under `stdlib`.

    Raises:
      ValueError: there is too little text for both sides.
    """
    files = dict(_files(stdlib))
    digest = hashlib.sha256()
    for path, content in files.items():
        digest.update(path.encode() + b"\0" + hashlib.sha256(content).digest())
    heldout = {path: content for path, content in files.items() if _hash(path) < HELDOUT_SHARE}
    train = {path: content for path, content in files.items() if path not in heldout}
    sample = _sample(heldout, train)
    if not train or not sample:
        raise ValueError(
            f"{stdlib} holds {len(train)} training and {len(sample)} held-out files that can be used; "
            "give the folder of a standard library, such as sysconfig.get_paths()['stdlib']"
        )
    return Corpus(
        train=_join(train),
        heldout=_join(heldout),
        sample=b"".join(heldout[path] for path in sample),
        num_files=(len(train), len(heldout)),
        sample_files=tuple(sample),
        sha256=digest.hexdigest(),
    )


def _files(stdlib: Path) -> list[tuple[str, bytes]]:
    """Path and content of every file that is used, sorted by path; of equal contents the first."""
    seen: set[bytes] = set()
    files = []
    for path in sorted(p.relative_to(stdlib).as_posix() for p in stdlib.rglob("*.py")):
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in EXCLUDED):
            continue
        content = (stdlib / path).read_bytes().replace(b"\r\n", b"\n")
        if content.strip() and content not in seen and _is_utf8(content):
            seen.add(content)
            files.append((path, content))
    return files


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _hash(path: str) -> float:
    """A number in [0, 1) that depends on the path alone."""
    return int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) / 2**32


def _sample(heldout: dict[str, bytes], train: dict[str, bytes]) -> list[str]:
    """Files of the sample, in the order of their hashes, up to `SAMPLE_BYTES`."""
    seen = set().union(*(_passages(content) for content in train.values()))
    chosen, size = [], 0
    for path in sorted(heldout, key=_hash):
        length, passages = len(heldout[path]), _passages(heldout[path])
        is_test = any(part in ("test", "tests", "idle_test") for part in path.split("/"))
        is_copy = len(passages & seen) > COPIED_SHARE * len(passages)  # as chunk.py, which wave.py contains
        if not is_test and not is_copy and length <= SAMPLE_FILE_BYTES and size + length <= SAMPLE_BYTES:
            chosen.append(path)
            size += length
    return chosen


def _passages(content: bytes) -> set[bytes]:
    """Each four lines in a row, blank lines and indentation left out."""
    lines = [line.strip() for line in content.split(b"\n") if line.strip()]
    return {b"\n".join(lines[i : i + 4]) for i in range(len(lines) - 3)}


def _join(files: dict[str, bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(files.values()), np.uint8)
