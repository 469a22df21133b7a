"""The adapter under a real Serve: same session, same replica. One small cluster, about 25 seconds."""

import asyncio

import pytest
import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from deployments.generation import GenerationRequest, SamplingParams
from deployments.router.affinity import PREFIX_TOKENS
from deployments.targets import TargetReplicas
from deployments.whereabouts import WHEREABOUTS

APPLICATION = "affinity"


@serve.deployment(
    num_replicas=2,
    max_ongoing_requests=100,
    ray_actor_options={"num_cpus": 0},
    request_router_config=RequestRouterConfig(request_router_class="deployments.router.affinity:AffinityRouter"),
)
class Answering:
    async def who(self, _request):
        await asyncio.sleep(0)
        return serve.get_replica_context().replica_tag

    async def stream(self, _request):
        yield serve.get_replica_context().replica_tag


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Asking:
    def __init__(self, answering):
        self.answering = answering
        self.targets = TargetReplicas(APPLICATION)

    async def several_at_once(self):
        """Calls that belong to one request, as those of a completion with several prompts do."""
        calls = [self.answering.options(session_id=name).who.remote(short()) for name in "abcdefgh"]
        return await asyncio.gather(*calls)

    async def read_targets(self):
        return await self.targets()


def short():
    return request_with(range(4))


def request_with(tokens):
    tokens = tuple(tokens)
    return GenerationRequest("id", tokens, SamplingParams(max_tokens=1, seed=0), prompt_tokens=len(tokens))


@pytest.fixture(scope="module")
def handles():
    # Put back afterwards: servers that later modules start must log as they would for a user.
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_SERVE_LOG_TO_STDERR", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            serve.start(proxy_location="Disabled")
            asking = serve.run(Asking.bind(Answering.bind()), name=APPLICATION, route_prefix=None)
            yield asking, serve.get_deployment_handle("Answering", APPLICATION)
        finally:
            serve.shutdown()
            ray.shutdown()


def test_requests_of_a_session_or_with_a_common_prefix_meet_on_one_replica(handles):
    _, answering = handles
    # One question each way first, so that both replicas' queues are known.
    seen = {answering.who.remote(short()).result(timeout_s=30) for _ in range(20)}
    assert len(seen) == 2

    def replicas_of(session, request):
        handle = answering.options(session_id=session)
        return {handle.who.remote(request).result(timeout_s=30) for _ in range(3)}

    # Replicas have random names: with 16 keys both are somebody's in all but 3 of 100,000 runs.
    by_session = [replicas_of(f"session-{index}", short()) for index in range(16)]
    assert all(len(replicas) == 1 for replicas in by_session)
    assert set.union(*by_session) == seen
    by_prefix = [replicas_of("", request_with(range(index, index + PREFIX_TOKENS))) for index in range(16)]
    assert all(len(replicas) == 1 for replicas in by_prefix)
    assert set.union(*by_prefix) == seen
    streamed = answering.options(session_id="session-0", stream=True).stream.remote(short())
    assert set(streamed) == by_session[0]


def test_the_caller_s_process_knows_where_a_call_is_and_can_have_a_replica_avoided(handles):
    _, answering = handles
    handle = answering.options(session_id="avoiding")
    home = handle.who.remote(short()).result(timeout_s=30)
    placed = WHEREABOUTS.placed(short().request_id)
    assert home.endswith(placed.router)
    WHEREABOUTS.suspect(placed.router)
    try:
        others = {handle.who.remote(short()).result(timeout_s=30) for _ in range(6)}
    finally:
        WHEREABOUTS._suspects.clear()
    assert len(others) == 1
    assert home not in others
    assert handle.who.remote(short()).result(timeout_s=30) == home


def test_concurrent_calls_of_one_request_are_all_answered(handles):
    asking, _ = handles
    for _ in range(5):
        assert len(asking.several_at_once.remote().result(timeout_s=30)) == 8


def test_the_targets_are_what_serve_works_towards(handles):
    asking, _ = handles
    assert asking.read_targets.remote().result(timeout_s=30) == {"Asking": 1, "Answering": 2}
