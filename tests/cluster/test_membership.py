"""The registry against a plain model of it, over random histories. About four seconds."""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.membership import KEPT_GONE, SUSPICIONS, Address, Epoch, Membership, Replica, State, View

HERE = Address("node", "socket", "127.0.0.1", 7000)
IDS = st.sampled_from(["a", "b", "c"])
ORDER = list(State)


def replica(replica_id="a", group="experts-0", state=State.READY, speed=100.0, pool="default"):
    return Replica(replica_id, group, pool, HERE, "ab" * 32, speed, state)


class AnyHistory(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.membership = Membership("one", heartbeat_timeout_s=10, suspect_timeout_s=2)
        self.now = 0.0
        self.known = {}
        self.heard = {}
        self.complaints = {}
        self.gone = set()
        self.last = self.membership.view()

    @rule(replica_id=IDS, state=st.sampled_from(State), speed=st.sampled_from([1.0, 2.0]))
    def report(self, replica_id, state, speed):
        taken = self.membership.report(replica(replica_id, state=state, speed=speed), self.now)
        assert taken == (replica_id not in self.gone)
        if taken:
            before = self.known.get(replica_id)
            if before is None or ORDER.index(state) >= ORDER.index(before.state):
                self.known[replica_id] = replica(replica_id, state=state, speed=speed)
            self.heard[replica_id] = self.now
            self.complaints[replica_id] = 0

    @rule(replica_id=IDS)
    def leave(self, replica_id):
        self.membership.leave(replica_id)
        self.gone.add(replica_id)
        self.known.pop(replica_id, None)

    @rule(replica_id=IDS)
    def suspect(self, replica_id):
        self.membership.suspect(replica_id)
        if replica_id in self.known:
            self.complaints[replica_id] += 1

    @rule(seconds=st.floats(0, 12))
    def pass_time(self, seconds):
        self.now += seconds

    @rule()
    def expire(self):
        late = {
            rid for rid in self.known if self.now - self.heard[rid] > (2 if self.complaints[rid] >= SUSPICIONS else 10)
        }
        assert set(self.membership.expire(self.now)) == late
        for replica_id in late:
            del self.known[replica_id]

    @invariant()
    def the_view_is_what_the_model_knows_in_order_of_id(self):
        assert self.membership.view().replicas == tuple(self.known[rid] for rid in sorted(self.known))

    @invariant()
    def the_epoch_rises_exactly_when_the_view_changes_and_states_only_move_forward(self):
        view = self.membership.view()
        assert (view.epoch.n > self.last.epoch.n) == (view.replicas != self.last.replicas)
        before = {r.id: r for r in self.last.replicas}
        for member in view.replicas:
            assert member.id not in self.gone
            if member.id in before:
                assert ORDER.index(member.state) >= ORDER.index(before[member.id].state)
        self.last = view


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_report_that_was_overtaken_does_not_bring_old_numbers_back():
    membership = Membership("one")
    membership.report(replica(speed=0.0, state=State.JOINING), 0)
    membership.report(replica(speed=100.0, state=State.READY), 1)
    membership.report(replica(speed=0.0, state=State.JOINING), 2)
    assert membership.view().replicas == (replica(speed=100.0),)


def test_an_id_that_turns_up_as_something_else_is_refused():
    membership = Membership("one")
    assert membership.report(replica(), 0)
    assert not membership.report(replica(group="experts-1"), 1)
    assert not membership.report(replica(pool="h100"), 1)
    assert not membership.report(replace(replica(), digest="cd" * 32), 1)
    assert membership.view().replicas == (replica(),)


def test_a_slow_replica_may_come_back_but_one_that_left_may_not():
    membership = Membership("one", heartbeat_timeout_s=10)
    membership.report(replica("slow"), 0)
    membership.report(replica("left"), 0)
    membership.leave("left")
    assert membership.expire(10.5) == ["slow"]
    assert membership.report(replica("slow"), 11)
    assert not membership.report(replica("left"), 11)


def test_leaving_before_the_first_report_arrives_counts():
    membership = Membership("one")
    membership.leave("a")
    assert not membership.report(replica("a"), 0)


def test_one_complaint_or_a_complaint_before_a_heartbeat_changes_nothing():
    membership = Membership("one", heartbeat_timeout_s=10, suspect_timeout_s=2)
    membership.report(replica(), 0)
    membership.suspect("a")
    assert membership.expire(3) == []
    membership.suspect("a")
    membership.report(replica(), 3)
    assert membership.expire(6) == []
    membership.suspect("a")
    membership.suspect("a")
    assert membership.expire(6) == ["a"]


def test_complaints_about_strangers_are_not_kept():
    membership = Membership("one", suspect_timeout_s=2)
    for _ in range(SUSPICIONS):
        membership.suspect("a")
    membership.report(replica(), 0)
    assert membership.expire(5) == []


def test_a_view_tells_who_takes_rows_and_which_groups_have_nobody():
    ready, joining, draining = (replica(s.value, state=s) for s in (State.READY, State.JOINING, State.DRAINING))
    view = View(Epoch("one", 3), (draining, joining, ready))
    assert view.ready("experts-0") == (ready,)
    assert view.missing(("experts-0", "experts-1")) == ("experts-1",)
    assert View(Epoch("one", 4), (joining, draining)).missing(["experts-0"]) == ("experts-0",)


def test_a_view_of_one_model_holds_its_replicas_only():
    membership = Membership("one")
    for name, digest in (("a", "ab" * 32), ("b", "cd" * 32)):
        membership.report(Replica(name, "g", "default", Address("n", "", "", 0), digest, 1.0), 0.0)
    view = membership.view()
    assert [each.id for each in view.of("cd" * 32).replicas] == ["b"]
    assert view.of("cd" * 32).epoch == view.epoch


def test_only_the_last_ids_that_left_are_remembered():
    membership = Membership("one")
    for number in range(KEPT_GONE + 1):
        membership.leave(str(number))
    assert len(membership._gone) == KEPT_GONE
    last = Replica(str(KEPT_GONE), "g", "default", Address("n", "", "", 0), "ab" * 32, 1.0)
    assert not membership.report(last, 0.0)
