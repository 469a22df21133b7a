"""A new router waits until Serve has replaced the Ingress. Time is a list with one number; milliseconds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.errors import ConfigError
from deployments.rollout import PATIENCE_S, SETTLE_S, UNHEARD_S, wait_for_experts, wait_for_front


def details(*states: str, target: int = 1) -> dict[str, Any]:
    front = {"target_num_replicas": target, "replicas": [{"state": state} for state in states]}
    return {"applications": {"app": {"deployments": {"Ingress": front}}}}


def wait(*answers: Any) -> tuple[float, int]:
    """Seconds slept, and how often Serve was asked; the last answer is given for ever."""
    clock, asked = [0.0], [0]

    async def ask() -> Any:
        answer = answers[min(asked[0], len(answers) - 1)]
        asked[0] += 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(seconds: float) -> None:
        clock[0] += seconds

    asyncio.run(wait_for_front("app", details=ask, clock=lambda: clock[0], sleep=sleep))
    return clock[0], asked[0]


def test_where_the_ingress_is_in_place_nothing_is_waited_for() -> None:
    assert wait(details("RUNNING")) == (0, 1)
    assert wait(details("RUNNING", "RUNNING", target=2)) == (0, 1)
    assert wait(details()) == (0, 1)
    assert wait({"applications": {}}) == (0, 1)


def test_a_router_waits_while_the_ingress_is_replaced_and_until_the_proxies_know() -> None:
    slept_s, asked = wait(
        details("RUNNING", "STARTING"),
        details("RUNNING", "RUNNING"),
        details("STOPPING", "RUNNING"),
    )
    assert asked == 3
    assert slept_s > SETTLE_S
    assert wait(details("STARTING"), details("RUNNING"))[0] == slept_s - SETTLE_S - 0.5


def test_an_ingress_that_never_comes_is_not_waited_for_for_ever() -> None:
    slept_s, _ = wait(details("STARTING"))
    assert PATIENCE_S <= slept_s < PATIENCE_S + 1


def test_a_controller_that_does_not_answer_holds_nobody_up() -> None:
    assert wait(ConnectionError("down")) == (0, 1)


DEPLOYED_S = 50.0


def deployed(status: str, *replicas: tuple[str, float], routers: int = 1, message: str = "") -> dict[str, Any]:
    """An application deployed at `DEPLOYED_S`. replicas: state and start of each of its Ingress."""
    front = {
        "status": status,
        "message": message,
        "target_num_replicas": 1,
        "replicas": [{"state": state, "start_time_s": start_s} for state, start_s in replicas],
    }
    router = {"replicas": [{"state": "RUNNING"}] * routers}
    return {
        "applications": {
            "app": {"last_deployed_time_s": DEPLOYED_S, "deployments": {"Ingress": front, "Router": router}}
        }
    }


OLD, NEW = ("RUNNING", DEPLOYED_S - 9), ("RUNNING", DEPLOYED_S + 9)


def test_between_two_tries_to_start_the_ingress_the_old_one_is_still_in_use() -> None:
    assert wait(deployed("UPDATING", OLD), deployed("UPDATING", NEW)) == (0.5, 2)
    assert wait(deployed("UPDATING", OLD, ("STOPPING", DEPLOYED_S + 1)), deployed("UPDATING", NEW)) == (0.5, 2)


def test_an_ingress_that_was_not_replaced_or_only_drains_its_streams_is_not_waited_for() -> None:
    assert wait(deployed("HEALTHY", OLD)) == (0, 1)
    assert wait(deployed("UPDATING", NEW, ("STOPPING", DEPLOYED_S - 9))) == (SETTLE_S, 1)


TRACEBACK = "The deployment failed to start 3 times in a row.\nTraceback\n  x = 1\nValueError: no tokenizer\nrest\n"


def test_a_router_whose_ingress_serve_has_given_up_on_says_so_and_leaves_the_old_ones_at_work() -> None:
    given_up = deployed("DEPLOY_FAILED", OLD, message=TRACEBACK)
    with pytest.raises(ConfigError, match=r"this version cannot start \(ValueError: no tokenizer\); what ran before"):
        wait(deployed("UPDATING", OLD, ("STARTING", DEPLOYED_S + 1)), given_up)


def test_where_no_router_runs_one_starts_whatever_became_of_the_ingress() -> None:
    assert wait(deployed("DEPLOY_FAILED", OLD, routers=0, message=TRACEBACK)) == (0, 1)


def wait_for(running: int, *answers: tuple[int, list[str]] | Exception) -> float:
    """Seconds a new router waits for its experts beside `running` others; the Directory's last answer is for ever."""
    clock, asked = [0.0], iter([*answers, *[answers[-1]] * 1000])
    routers = {"replicas": [{"state": "STARTING"}, *[{"state": "RUNNING"}] * running]}

    async def details() -> Any:
        return {"applications": {"app": {"deployments": {"Router": routers}}}}

    async def lacking() -> tuple[int, list[str]]:
        answer = next(asked)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(seconds: float) -> None:
        clock[0] += seconds

    asyncio.run(wait_for_experts("app", lacking, details=details, clock=lambda: clock[0], sleep=sleep))
    return clock[0]


def test_the_first_router_waits_for_no_experts() -> None:
    assert wait_for(0, (0, ["experts-0"])) == 0


def test_a_router_of_another_model_takes_over_only_with_its_experts() -> None:
    slow = [(1, ["experts-0"])] * 300
    assert wait_for(1, *slow, (1, [])) == 150
    assert wait_for(2, (2, [])) == 0


def test_a_directory_that_has_not_heard_of_all_routers_is_not_believed_at_once() -> None:
    assert wait_for(1, (0, []), (1, ["experts-0"]), (1, [])) == 1.0
    assert UNHEARD_S <= wait_for(2, (1, [])) < UNHEARD_S + 1
    assert UNHEARD_S <= wait_for(1, ConnectionError("down")) < UNHEARD_S + 1
