"""What a router makes of a restarted Directory. Milliseconds."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.membership import Address, Epoch, Replica, State, View
from deployments.view_keeper import ViewKeeper

GROUPS = ("experts-0", "experts-1")
HERE = Address("node", "socket", "127.0.0.1", 7000)


def view(incarnation, n, *groups, state=State.READY):
    members = tuple(Replica(f"{g}-r", g, "default", HERE, "ab" * 32, 100.0, state) for g in groups)
    return View(Epoch(incarnation, n), members)


def test_the_first_view_is_used_whatever_it_lacks():
    assert ViewKeeper(GROUPS).accept(view("one", 0), 0.0) == view("one", 0)


def test_within_an_incarnation_the_newest_view_is_used_even_if_it_is_empty():
    keeper = ViewKeeper(GROUPS)
    keeper.accept(view("one", 5, *GROUPS), 0.0)
    assert keeper.accept(view("one", 4), 1.0).epoch.n == 5
    assert keeper.accept(view("one", 6), 1.0).epoch.n == 6


def test_a_new_incarnation_is_used_as_soon_as_it_has_heard_every_group():
    keeper = ViewKeeper(GROUPS, patience_s=10)
    keeper.accept(view("one", 5, *GROUPS), 0.0)
    assert keeper.accept(view("two", 0), 1.0).epoch.incarnation == "one"
    assert keeper.accept(view("two", 1, "experts-0"), 2.0).epoch.incarnation == "one"
    joining = view("two", 2, "experts-0").replicas + view("two", 2, "experts-1", state=State.JOINING).replicas
    assert keeper.accept(View(Epoch("two", 2), joining), 3.0).epoch.incarnation == "one"
    assert keeper.accept(view("two", 3, *GROUPS), 4.0).epoch == Epoch("two", 3)
    assert keeper.patience_left_s(4.0) is None


def test_a_new_incarnation_is_used_after_a_while_whatever_it_lacks():
    keeper = ViewKeeper(GROUPS, patience_s=10)
    keeper.accept(view("one", 5, *GROUPS), 0.0)
    assert keeper.accept(view("two", 0), 1.0).epoch.incarnation == "one"
    assert keeper.patience_left_s(4.0) == 7.0
    assert keeper.accept(view("two", 1), 10.9).epoch.incarnation == "one"
    assert keeper.accept(view("two", 1), 11.0).epoch == Epoch("two", 1)


def test_a_group_that_was_missing_before_is_not_waited_for():
    keeper = ViewKeeper(GROUPS)
    keeper.accept(view("one", 5, "experts-0"), 0.0)
    assert keeper.accept(view("two", 1, "experts-0"), 1.0).epoch.incarnation == "two"


def test_a_third_incarnation_gets_the_full_patience():
    keeper = ViewKeeper(GROUPS, patience_s=10)
    keeper.accept(view("one", 5, *GROUPS), 0.0)
    keeper.accept(view("two", 0), 1.0)
    assert keeper.accept(view("three", 0), 10.0).epoch.incarnation == "one"
    assert keeper.accept(view("three", 0), 12.0).epoch.incarnation == "one"
    assert keeper.accept(view("three", 0), 20.0).epoch.incarnation == "three"


def test_an_old_incarnation_that_still_answers_stays_in_use():
    keeper = ViewKeeper(GROUPS, patience_s=10)
    keeper.accept(view("one", 5, *GROUPS), 0.0)
    keeper.accept(view("two", 0), 1.0)
    keeper.accept(view("one", 6, *GROUPS), 2.0)
    assert keeper.accept(view("two", 0), 11.5).epoch.incarnation == "one"


VIEWS = st.builds(
    lambda incarnation, n, groups: view(incarnation, n, *groups),
    st.sampled_from(["one", "two", "three"]),
    st.integers(0, 5),
    st.sets(st.sampled_from(GROUPS)).map(sorted),
)


@given(st.lists(st.tuples(VIEWS, st.floats(0, 4)), min_size=1))
def test_the_view_in_use_was_always_given_and_loses_a_group_only_after_its_patience_or_by_its_own_incarnation(history):
    keeper, now, given_views, used = ViewKeeper(GROUPS, patience_s=10), 0.0, [], None
    since = {}
    for offered, seconds in history:
        now += seconds
        given_views.append(offered)
        since.setdefault(offered.epoch.incarnation, now)
        chosen = keeper.accept(offered, now)
        assert chosen in given_views
        if used is not None and chosen.epoch.incarnation != used.epoch.incarnation:
            caught_up = set(chosen.missing(GROUPS)) <= set(used.missing(GROUPS))
            assert caught_up or now - since[chosen.epoch.incarnation] >= 10
        used = chosen
