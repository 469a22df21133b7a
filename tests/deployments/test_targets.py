"""Targets out of Serve's instance details, cached, and never an error. Milliseconds; no Ray is started."""

import asyncio

from deployments.targets import TTL_S, TargetReplicas, target_replicas

DETAILS = {
    "applications": {
        "expertscale": {
            "deployments": {"Router": {"target_num_replicas": 2}, "experts-0": {"target_num_replicas": 3}},
        },
        "other": {"deployments": {"Router": {"target_num_replicas": 9}}},
    }
}


class Controller:
    def __init__(self):
        self.calls = 0
        self.error = None

    async def __call__(self):
        self.calls += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return DETAILS


def test_only_the_named_application_is_read():
    assert target_replicas(DETAILS, "expertscale") == {"Router": 2, "experts-0": 3}
    assert target_replicas(DETAILS, "absent") == {}


def test_the_controller_is_asked_once_a_second_by_however_many_readers():
    async def story():
        controller, clock = Controller(), [0.0]
        targets = TargetReplicas("expertscale", details=controller, clock=lambda: clock[0])
        answers = await asyncio.gather(*(targets() for _ in range(10)))
        assert answers == [{"Router": 2, "experts-0": 3}] * 10
        assert controller.calls == 1
        clock[0] += TTL_S
        await targets()
        assert controller.calls == 2

    asyncio.run(story())


def test_while_the_controller_is_down_the_last_answer_stands():
    async def story():
        controller, clock = Controller(), [0.0]
        targets = TargetReplicas("expertscale", details=controller, clock=lambda: clock[0])
        controller.error = RuntimeError("down")
        assert await targets() == {}
        controller.error = None
        clock[0] += TTL_S
        assert await targets() == {"Router": 2, "experts-0": 3}
        controller.error = RuntimeError("down")
        clock[0] += TTL_S
        assert await targets() == {"Router": 2, "experts-0": 3}
        await targets()
        assert controller.calls == 3

    asyncio.run(story())
