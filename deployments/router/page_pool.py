"""The pages of a bounded KV pool as plain integers: who holds them, and which hold a known prefix.

Knows no tensors, no requests and no policy of admission or preemption. A page is in exactly one of three states:

    used    refs >= 1: in the page lists of that many sequences (more than one only for a shared prefix)
    cached  refs == 0, but its keys and values are those of a known prefix: reusable until taken, oldest first
    blank   refs == 0, content unknown

Prefixes are found by a chain of digests, one per full page: digest(i) = blake2b(digest(i - 1), tokens of page i), so
equal digests mean equal tokens from the start of the sequence on. Block-hash prefix caching as vLLM describes it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def page_digest(previous: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a prefix that ends with a full page of `tokens`; `previous` is the digest of what precedes it."""
    return blake2b(previous + array("q", tokens).tobytes(), digest_size=32).digest()


class PagePool:
    """`num_pages` pages of `page_tokens` tokens each, all blank at first.

    Invariant: used + cached + blank == num_pages, and at most one page is published under a digest.
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        if num_pages < 1 or page_tokens < 1:
            raise ValueError(f"a pool needs pages and tokens in them, not {num_pages} pages of {page_tokens} tokens")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._refs = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out now, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def used(self) -> int:
        """Pages held by at least one sequence."""
        return self.num_pages - self.available

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens need."""
        return -(-tokens // self.page_tokens)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, blank ones first, then the longest unused of the cached.

        Raises:
            ValueError: fewer than `count` are available; ask `available` first.
        """
        if count > self.available:
            raise ValueError(f"{count} pages asked for, {self.available} available")
        pages = [self._take() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        return pages

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The published pages of the longest known prefix of this digest chain; takes none of them."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def unheld(self, pages: Iterable[int]) -> int:
        """How many of `pages` count as available, and would not after `acquire`."""
        return sum(self._refs[page] == 0 for page in pages)

    def acquire(self, pages: Iterable[int]) -> None:
        """Hold `pages`, which `match` returned, once more."""
        for page in pages:
            if self._refs[page] == 0:
                del self._cached[page]
            self._refs[page] += 1

    def publish(self, page: int, digest: bytes) -> None:
        """Say that the held, full `page` ends the prefix `digest`. A digest that is already known keeps its page."""
        if self._refs[page] < 1:
            raise ValueError(f"page {page} is held by nobody")
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def release(self, pages: Sequence[int], *, forget: bool = False) -> None:
        """Hold `pages` (in sequence order) once less; published ones stay cached once nobody holds them.

        forget: their content is not to be trusted, so no later sequence may reuse it.
        """
        for page in reversed(pages):  # the tail grows old first: a prefix is worth nothing without its beginning
            if self._refs[page] < 1:
                raise ValueError(f"page {page} is held by nobody")
            if forget:
                self._unpublish(page)
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if page in self._digest_of:
                    self._cached[page] = None
                else:
                    self._blank.append(page)

    def check(self) -> None:
        """Raise RuntimeError if the bookkeeping contradicts itself. O(num_pages)."""
        free = [*self._blank, *self._cached]
        if len(free) != len(set(free)) or any(self._refs[page] for page in free):
            raise RuntimeError("a free page is listed twice or still held")
        if min(self._refs) < 0 or sum(refs > 0 for refs in self._refs) != self.used:
            raise RuntimeError("a page is neither free nor held")
        if {page: digest for digest, page in self._page_of.items()} != self._digest_of:
            raise RuntimeError("the two directions of the prefix table differ")
        if any(page not in self._digest_of for page in self._cached) or any(p in self._digest_of for p in self._blank):
            raise RuntimeError("a free page is cached without a prefix, or blank with one")

    def check_idle(self) -> None:
        """`check`, and raise RuntimeError if any page is held: with no sequence alive that is a leak."""
        self.check()
        if self.used:
            held = [page for page, refs in enumerate(self._refs) if refs]
            raise RuntimeError(f"{self.used} pages are still held: {held[:8]}")

    def _take(self) -> int:
        if self._blank:
            return self._blank.pop()
        page, _ = self._cached.popitem(last=False)
        self._unpublish(page)
        return page

    def _unpublish(self, page: int) -> None:
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]
