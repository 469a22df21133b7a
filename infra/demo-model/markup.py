"""Manual pages (roff) and Perl documentation (POD) to plain paragraphs.

Not a formatter: it keeps what a reader would call prose (headings and paragraphs) and drops synopses, code, tables and
author lists. A demo model this small learns to write whatever markup is left in its corpus, so what is unsure goes.
It knows nothing of packages or licences.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# Sections with code, link lists or people in them; English and Chinese headings.
_SKIPPED_SECTIONS = re.compile(
    r"SYNOPSIS|AUTHOR|COPYRIGHT|LICEN[SC]E|SEE ALSO|COLOPHON|HISTORY|LIBRARY|ATTRIBUTES|REPORTING|MAINTAINER|CONTRIBUT"
    r"|ACKNOWLEDG|EXAMPLE|TRANSLAT|概述|总览|綜述|语法|作者|译者|版权|參見|参见|另见|相关|示例|例子|跋|中文|历史|附注|維護",
    re.I,
)
_FONT_MACROS = {"B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "SB", "SM"}
_ALTERNATING = {"BR", "RB", "BI", "IB", "IR", "RI"}
_BREAKS = {"PP", "P", "LP", "TP", "IP", "HP", "sp", "br", "RS", "RE", "TQ"}
_LITERAL_OPEN = {"nf", "EX", "TS", "EQ", "de", "ig", "DS", "CS"}
_LITERAL_CLOSE = {"fi", "EE", "TE", "EN", ".", "DE", "CE"}
_ESCAPES = [
    (re.compile(r'\\".*'), ""),
    (re.compile(r"\\f(\[\w*\]|\(..|.)|\\s[-+]?\d|\\[&/,|^)%:]|\\[vhw]'[^']*'"), ""),
    (re.compile(r"\\\(aq|\\\[aq\]|\\\(cq|\\\(oq"), "'"),
    (re.compile(r"\\\((?:lq|rq|dq)|\\\[[lrd]q\]"), '"'),
    (re.compile(r"\\\((?:em|en)|\\\[(?:em|en)\]|\\-"), "-"),
    (re.compile(r"\\\((?:bu|ti|ha|rs)|\\\[\w+\]|\\\(..|\\\*\(..|\\\*\[\w+\]|\\\*."), ""),
    (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\e|\\\\"), "\\\\"),
]
_CJK = "\u3000-\u303f\u4e00-\u9fff\uff00-\uffef"
_POD_CODE = re.compile(r"[A-Z]<<*\s*([^<>]*?)\s*>+")


def roff_to_text(source: str) -> str:
    """Paragraphs and headings of one manual page, separated by blank lines; empty if there is no prose."""
    blocks: list[str] = []
    paragraph: list[str] = []
    literal = skipped = False

    def flush() -> None:
        text = _join(paragraph)
        paragraph.clear()
        if text and not skipped:
            blocks.append(text)

    for line in source.splitlines():
        macro, text = _split_macro(line)
        if literal:
            literal = macro not in _LITERAL_CLOSE
        elif macro in _LITERAL_OPEN:
            flush()
            literal = True
        elif macro in {"SH", "SS"}:
            flush()
            skipped = bool(_SKIPPED_SECTIONS.search(text)) if macro == "SH" else skipped
            paragraph.append(text)
            flush()
        elif macro in _BREAKS or (not macro and not text):
            flush()
        elif text and (not macro or macro in _FONT_MACROS):
            paragraph.append(text)
    flush()
    return "\n\n".join(_drop_bare_headings(blocks))


def pod_to_text(source: str) -> str:
    """Paragraphs and headings of the POD in one Perl file; indented (code) paragraphs are dropped."""
    blocks: list[str] = []
    inside = skipped = False
    for block in re.split(r"\n\s*\n", source):
        if block.startswith("="):
            command, _, text = block.partition(" ")
            inside = command not in {"=cut", "=begin", "=for"}
            if command == "=head1":
                skipped = bool(_SKIPPED_SECTIONS.search(text))
            if not command.startswith(("=head", "=item")) or len(text) < 3:
                continue
        elif not inside or block.startswith((" ", "\t")):
            continue
        else:
            text = block
        if not skipped:
            blocks.append(_join(_strip_pod_codes(text).splitlines()))
    return "\n\n".join(_drop_bare_headings(blocks))


def _strip_pod_codes(text: str) -> str:
    for _ in range(3):  # codes nest: C<B<x>>
        text = _POD_CODE.sub(r"\1", text)
    return text


def _split_macro(line: str) -> tuple[str, str]:
    """(macro, text): macro is empty for a text line, "?" for a line to ignore."""
    match = re.match(r"^[.']\s*(\S*)\s*(.*)$", line)
    if match is None:
        return "", _unescape(line).strip()
    macro, rest = match.groups()
    if macro.startswith('\\"') or macro == "":
        return "?", ""
    arguments = [_unescape(a.strip('"')) for a in re.findall(r'"[^"]*"|\S+', rest)]
    return macro, ("" if macro in _ALTERNATING else " ").join(arguments).strip()


def _unescape(text: str) -> str:
    for pattern, replacement in _ESCAPES:
        text = pattern.sub(replacement, text)
    return text


def _join(lines: Iterable[str]) -> str:
    """One paragraph on one line. Chinese text takes no space where a line was broken."""
    text = re.sub(r"\s+", " ", " ".join(lines)).strip()
    return re.sub(rf"(?<=[{_CJK}]) (?=[{_CJK}])", "", text)


def _drop_bare_headings(blocks: list[str]) -> Iterator[str]:
    """Leave out a heading (a short block in capitals, or short Chinese) which the next heading follows at once."""
    for block, following in zip(blocks, [*blocks, "END"][1:], strict=True):
        if not (_is_heading(block) and _is_heading(following)):
            yield block


def _is_heading(block: str) -> bool:
    return len(block) < 40 and block == block.upper() and not block.endswith((".", "。"))
