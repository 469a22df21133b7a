"""The page pool's bookkeeping, by hand and by random histories. About 3 s."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deployments.router.page_pool import PagePool, page_digest

PAGE = 2


def chain(tokens: list[int]) -> list[bytes]:
    """The digests of all full pages of `tokens`."""
    digests: list[bytes] = []
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        digests.append(page_digest(digests[-1] if digests else b"", tokens[start : start + PAGE]))
    return digests


def publish_all(pool: PagePool, pages: list[int], tokens: list[int]) -> None:
    for page, digest in zip(pages, chain(tokens), strict=False):
        pool.publish(page, digest)


def test_a_new_pool_is_idle_and_hands_out_every_page_once() -> None:
    pool = PagePool(4, PAGE)
    pool.check_idle()
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]
    assert (pool.available, pool.used) == (0, 4)


def test_more_than_is_available_is_refused_and_takes_nothing() -> None:
    pool = PagePool(4, PAGE)
    pool.allocate(3)
    with pytest.raises(ValueError, match="2 pages asked for, 1 available"):
        pool.allocate(2)
    assert pool.available == 1


def test_released_pages_stay_known_until_they_are_needed() -> None:
    pool = PagePool(3, PAGE)
    pages = pool.allocate(3)
    publish_all(pool, pages, [1, 2, 3, 4, 5, 6])
    pool.release(pages)
    pool.check_idle()
    assert pool.match(chain([1, 2, 3, 4, 9, 9])) == pages[:2]
    pool.allocate(1)
    assert pool.match(chain([1, 2, 3, 4, 5, 6])) == pages[:2], "the tail of a prefix goes first"


def test_the_prefix_unused_for_longest_goes_first() -> None:
    pool = PagePool(2, PAGE)
    [first], [second] = pool.allocate(1), pool.allocate(1)
    publish_all(pool, [first], [1, 1])
    publish_all(pool, [second], [2, 2])
    pool.release([first])
    pool.release([second])
    pool.acquire([first])
    pool.release([first])
    pool.allocate(1)
    assert pool.match(chain([1, 1])) == [first]
    assert pool.match(chain([2, 2])) == []


def test_a_shared_page_is_free_after_its_last_holder() -> None:
    pool = PagePool(2, PAGE)
    pages = pool.allocate(1)
    publish_all(pool, pages, [1, 2])
    pool.acquire(pages)
    pool.release(pages)
    assert pool.used == 1
    pool.release(pages)
    pool.check_idle()


def test_forgotten_pages_are_never_matched_again() -> None:
    pool = PagePool(2, PAGE)
    pages = pool.allocate(2)
    publish_all(pool, pages, [1, 2, 3, 4])
    pool.release(pages, forget=True)
    assert pool.match(chain([1, 2, 3, 4])) == []
    pool.check_idle()


def test_a_page_released_twice_is_an_error() -> None:
    pool = PagePool(2, PAGE)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(ValueError, match="held by nobody"):
        pool.release(pages)
    with pytest.raises(ValueError, match="held by nobody"):
        pool.publish(pages[0], b"digest")


def test_a_leak_is_found_when_idle() -> None:
    pool = PagePool(2, PAGE)
    pool.allocate(1)
    with pytest.raises(RuntimeError, match="1 pages are still held"):
        pool.check_idle()


def test_digests_depend_on_everything_before_them() -> None:
    assert chain([1, 2, 3, 4])[1] != chain([9, 2, 3, 4])[1]
    assert chain([1, 2, 3, 4])[1] == chain([1, 2, 3, 4, 5, 6])[1]


@dataclass(eq=False)
class Holder:
    tokens: list[int]
    pages: list[int]


class PoolHistory(RuleBasedStateMachine):
    """Sequences over an alphabet of two tokens come, grow and go; prefixes collide all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(8, PAGE)
        self.holders: list[Holder] = []
        self.content: dict[int, list[int]] = {}
        """What each page was last written to hold: the whole prefix that ends with it."""

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def start(self, tokens: list[int]) -> None:
        shared = self.pool.match(chain(tokens))
        fresh = self.pool.pages_for(len(tokens)) - len(shared)
        if fresh + self.pool.unheld(shared) > self.pool.available:
            return
        for index, page in enumerate(shared):
            assert self.content[page] == tokens[: (index + 1) * PAGE], "a match must hold exactly this prefix"
        self.pool.acquire(shared)
        holder = Holder(tokens, shared + self.pool.allocate(fresh))
        self.holders.append(holder)
        self.write(holder, len(shared))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        if len(holder.tokens) == len(holder.pages) * PAGE:
            if not self.pool.available:
                return
            holder.pages += self.pool.allocate(1)
        holder.tokens = [*holder.tokens, token]
        self.write(holder, len(holder.pages) - 1)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), forget=st.booleans())
    def end(self, data: st.DataObject, forget: bool) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        self.pool.release(holder.pages, forget=forget)

    @invariant()
    def bookkeeping_is_consistent(self) -> None:
        self.pool.check()
        held = {page for holder in self.holders for page in holder.pages}
        assert self.pool.used == len(held)
        assert self.pool.used + self.pool.available == self.pool.num_pages

    @invariant()
    def pages_are_shared_only_by_equal_prefixes(self) -> None:
        for index, holder in enumerate(self.holders):
            for other in self.holders[:index]:
                for place, page in enumerate(holder.pages):
                    if page in other.pages:
                        assert other.pages[place] == page
                        end = (place + 1) * PAGE
                        assert holder.tokens[:end] == other.tokens[:end]
                        assert len(holder.tokens) >= end

    def write(self, holder: Holder, first_page: int) -> None:
        for place in range(first_page, len(holder.pages)):
            self.content[holder.pages[place]] = holder.tokens[: (place + 1) * PAGE]
        publish_all(self.pool, holder.pages, holder.tokens)

    def teardown(self) -> None:
        for holder in self.holders:
            self.pool.release(holder.pages)
        self.pool.check_idle()


TestPoolHistory = PoolHistory.TestCase
TestPoolHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
