"""Build the demo model's corpus from packages installed on a Debian machine: three domains, whole documents.

    python infra/demo-model/corpus.py --out BUILD

writes BUILD/corpus.json: {"packages": {name: version}, "documents": [{"domain", "source", "text"}]}. It knows packages
and licences; tokens, chat samples and training are elsewhere. What may go in is decided here and only here:
`PACKAGES` names the licence for each package, and `_may_be_modified` looks at each page.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from markup import pod_to_text, roff_to_text

DOMAINS = ("python", "english", "chinese")


class Package(NamedTuple):
    domain: str
    pattern: str  # dpkg package name, may hold a glob for the version
    suffix: str  # of the files to read
    licence: str


PACKAGES = (
    Package("python", "libpython3.*-minimal", r"\.py$", "PSF-2.0 and compatible (BSD, MIT, HPND)"),
    Package("python", "libpython3.*-stdlib", r"\.py$", "PSF-2.0 and compatible (BSD, MIT, HPND)"),
    Package("english", "manpages", r"/man\d/.*\.gz$", "GPL, BSD, MIT or Linux-man-pages-copyleft, by page"),
    Package("english", "manpages-dev", r"/man\d/.*\.gz$", "GPL, BSD, MIT or Linux-man-pages-copyleft, by page"),
    Package("english", "perl-modules-5.*", r"\.(pm|pod)$", "GPL-1.0-or-later or Artistic-1.0-Perl"),
    Package("chinese", "manpages-zh", r"/zh_CN/man\d/.*\.gz$", "GFDL-1.2-or-later without invariant sections, GPL"),
)

# Page licences accepted for the English manual pages; a page without one of these is left out.
_SPDX_ALLOWED = re.compile(
    r"SPDX-License-Identifier:\s*(Linux-man-pages-copyleft|L?GPL-[\d.]+-(?:or-later|only)|BSD-[234]-Clause(?:-UC)?|MIT|0BSD)\b"
)
# Data tables, bundled wheels and text that is not Python code.
_PYTHON_SKIPPED = re.compile(r"/(encodings|pydoc_data|idlelib|test|ensurepip)/|_sysconfigdata|/this\.py")
_PEOPLE = re.compile(
    r"\S+@\S+\.\w+|\bcopyright\b|\(c\) \d{4}|__author__|\bwritten by\b|\bmaintained by\b"
    r"|版权|作者|译者|翻译计划|linuxforum|\\options manual",
    re.I,
)
_MIN_CHARS, _MAX_CHARS = 400, 60_000


def build(read_packages: Callable[[Package], tuple[str, str, list[Path]]]) -> dict[str, object]:
    """The corpus as the dictionary described above, in a fixed order: package table, then path."""
    versions: dict[str, str] = {}
    documents: list[dict[str, str]] = []
    seen: set[str] = set()
    for package in PACKAGES:
        name, version, paths = read_packages(package)
        versions[name] = version
        for path in sorted(paths):
            text = _document(package, path)
            if len(text) >= _MIN_CHARS and text[:400] not in seen:  # alias pages repeat their neighbour
                seen.add(text[:400])
                documents.append({"domain": package.domain, "source": f"{name}:{path.name}", "text": text[:_MAX_CHARS]})
    return {"packages": versions, "documents": documents}


def installed_package(package: Package) -> tuple[str, str, list[Path]]:
    """(name, version, files) of the first installed package that fits. Raises SystemExit naming what to install."""
    query = ["dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Status}\n", package.pattern]
    rows = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
    found = sorted(row.split()[:2] for row in rows if row.endswith(" installed"))
    if not found:
        raise SystemExit(f"no installed package matches {package.pattern!r}: apt-get install it, then run again")
    name, version = found[0]
    listing = subprocess.run(["dpkg-query", "-L", name], capture_output=True, text=True, check=True).stdout.split("\n")
    files = [Path(line) for line in listing if re.search(package.suffix, line)]
    return name, version, [f for f in files if f.is_file() and not f.is_symlink()]


def _document(package: Package, path: Path) -> str:
    """The clean text of one file, or an empty string where it may not or should not be used."""
    data = path.read_bytes()
    raw = (gzip.decompress(data) if path.suffix == ".gz" else data).decode(errors="replace")
    if package.domain == "python":
        return "" if _PYTHON_SKIPPED.search(str(path)) else _without_people(_without_header(raw))
    if not _may_be_modified(package, raw):
        return ""
    text = _without_people(pod_to_text(raw) if path.suffix in {".pm", ".pod"} else roff_to_text(raw))
    if package.domain == "chinese":  # what was left untranslated would teach the Chinese experts English
        text = "\n\n".join(p for p in text.split("\n\n") if len(p) < 60 or _chinese_share(p) > 0.2)
        text = text if _chinese_share(text) > 0.2 else ""
    return text if "\ufffd" not in text else ""


def _may_be_modified(package: Package, raw: str) -> bool:
    """Does the page's own notice allow modified copies? Pages that only allow verbatim ones are left out."""
    if package.pattern in {"manpages", "manpages-dev"}:
        return _SPDX_ALLOWED.search(raw) is not None
    notice = raw[:4000].lower()
    return "verbatim" not in notice or "modified" in notice


def _without_header(source: str) -> str:
    """Drop the comment block at the head of a Python file: an interpreter line, names and licence notices."""
    lines = source.splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    return "\n".join(lines[start:])


def _without_people(text: str) -> str:
    """Drop lines with addresses or credits: a demo should not recite names."""
    return "\n".join(line for line in text.splitlines() if not _PEOPLE.search(line)).strip()


def _chinese_share(text: str) -> float:
    return sum("\u4e00" <= c <= "\u9fff" for c in text) / max(1, len(text))


def _summary(corpus: dict[str, object]) -> Iterator[str]:
    documents = corpus["documents"]
    assert isinstance(documents, list)
    count, chars = Counter[str](), Counter[str]()
    for document in documents:
        key = f"{document['domain']:8} {document['source'].split(':')[0]}"
        count[key] += 1
        chars[key] += len(document["text"])
    for key in count:
        yield f"{key:40} {count[key]:5} documents {chars[key] / 1e6:6.2f} M characters"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write corpus.json into")
    out: Path = parser.parse_args().out
    corpus = build(installed_package)
    out.mkdir(parents=True, exist_ok=True)
    (out / "corpus.json").write_text(json.dumps(corpus, ensure_ascii=False))
    print(corpus["packages"], *_summary(corpus), sep="\n")


if __name__ == "__main__":
    main()
