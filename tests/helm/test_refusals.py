"""What the chart refuses, and in which sentence: rules of KubeRay's that its definitions lack, and contradictions."""

from __future__ import annotations

import pytest

from tests.helm.charts import NEEDED, Document, Refused, merged, render

GROUP: Document = {"name": "g", "minReplicas": 1, "maxReplicas": 2, "resources": {"limits": {"cpu": 1}}}


def experts(**changes: object) -> Document:
    """Values with one worker group for experts."""
    return {"workerGroups": {"experts": [{**GROUP, **changes}]}}


REDIS: Document = {"gcsFaultTolerance": {"enabled": True, "redis": {"passwordSecret": {"existingSecret": "s"}}}}
INCREMENTAL: Document = {"rayService": {"upgradeType": "NewClusterWithIncrementalUpgrade"}}
S3: Document = {"model": {"volume": {"objectStorage": {"enabled": True}}}}

RULES_OF_KUBERAY: dict[str, tuple[Document, str]] = {
    "a name that is too long": ({"fullnameOverride": "x" * 48}, "has 48 characters; allowed: up to 47"),
    "a name that begins with a digit": (
        {"fullnameOverride": "1x"},
        'name "1x" is not allowed; it begins with a letter',
    ),
    "a name with capitals": ({"fullnameOverride": "Big"}, 'name "Big" is not allowed'),
    "resources said twice": (
        experts(rayResources={"CPU": "1"}, rayStartParams={"num-cpus": "1"}),
        "workerGroups.experts[0].rayStartParams.num-cpus: not allowed beside workerGroups.experts[0].rayResources",
    ),
    "resources said twice, head": (
        {"head": {"rayStartParams": {"num-gpus": "1"}}},
        "head.rayStartParams.num-gpus: not allowed beside head.rayResources",
    ),
    "labels as a parameter": (
        experts(rayStartParams={"labels": "a=b"}),
        "workerGroups.experts[0].rayStartParams.labels: not allowed; use workerGroups.experts[0].labels",
    ),
    "labels as a parameter, router": (
        {"workerGroups": {"router": {"rayStartParams": {"labels": "a=b"}}}},
        "workerGroups.router.rayStartParams.labels: not allowed",
    ),
    "an idle time with autoscaler v1": (
        {"autoscaler": {"version": "v1"}, **experts(idleTimeoutSeconds=60)},
        "workerGroups.experts[0].idleTimeoutSeconds: it needs autoscaler.enabled and autoscaler.version v2",
    ),
    "a priority without an autoscaler": (
        {"autoscaler": {"enabled": False}, **experts(priority=1)},
        "workerGroups.experts[0].priority: it needs autoscaler.enabled",
    ),
    "pods that are started again": (
        experts(podSpec={"restartPolicy": "Always"}),
        'workerGroups.experts[0].podSpec.restartPolicy: the value "Always" is not allowed with autoscaler v2',
    ),
    "a head that is started again": (
        {"head": {"podSpec": {"restartPolicy": "OnFailure"}}},
        "head.podSpec.restartPolicy: the value",
    ),
    "Redis in the head's environment": (
        merged(REDIS, {"head": {"env": [{"name": "REDIS_PASSWORD", "value": "x"}]}}),
        "head.env: REDIS_PASSWORD must not be set with gcsFaultTolerance.enabled",
    ),
    "Redis in everybody's environment": (
        merged(REDIS, {"env": [{"name": "RAY_REDIS_ADDRESS", "value": "x"}]}),
        "env: RAY_REDIS_ADDRESS must not be set",
    ),
    "Redis as a parameter": (
        merged(REDIS, {"head": {"rayStartParams": {"redis-password": "x"}}}),
        "head.rayStartParams.redis-password: it must not be set",
    ),
    "more at least than at most": (experts(minReplicas=3), "minReplicas: 3 is more than maxReplicas, 2"),
    "a count out of its bounds": (
        experts(replicas=5),
        "replicas: 5 is not allowed; minReplicas and maxReplicas allow 1",
    ),
    "two groups of one name": (experts(name="router"), '"router" names another worker group already'),
    "an incremental upgrade without options": (INCREMENTAL, "clusterUpgradeOptions.gatewayClassName: NewClusterWith"),
    "an incremental upgrade without autoscaler": (
        merged(INCREMENTAL, {"autoscaler": {"enabled": False}}),
        "NewClusterWithIncrementalUpgrade needs autoscaler.enabled",
    ),
    "options of another upgrade": (
        {"rayService": {"clusterUpgradeOptions": {"stepSizePercent": 5}}},
        "rayService.clusterUpgradeOptions: upgradeType NewCluster takes none",
    ),
}

CONTRADICTIONS: dict[str, tuple[Document, str]] = {
    "no model": ({"model": {"path": ""}}, "model.path: the folder of the checkpoint inside the containers is needed"),
    "no cluster key": ({"security": {"clusterKey": {"existingSecret": ""}}}, "security.clusterKey.existingSecret: a"),
    "an open door": ({"security": {"apiKeys": {"existingSecret": ""}}}, "nobody is asked for a key; name a Secret"),
    "two sources of the model": (
        {"model": {"volume": {"existingClaim": "c", "claim": {"create": True}}}},
        "existingClaim, claim.create and objectStorage.enabled exclude each other",
    ),
    "a model outside its volume": (
        {"model": {"path": "/data/x", "volume": {"existingClaim": "c"}}},
        'model.path: "/data/x" does not lie below model.volume.mountPath, "/models"',
    ),
    "object storage without an address": (S3, "model.volume.objectStorage.uri: it is needed"),
    "object storage with a placeholder": (
        {"model": {"volume": {"objectStorage": {"uri": "s3://models/CHECKPOINT"}}}},
        '"s3://models/CHECKPOINT" ends in a placeholder; name the checkpoint\'s folder',
    ),
    "object storage without an image": (S3, "model.volume.objectStorage.image: it is needed"),
    "object storage without a command": (S3, "model.volume.objectStorage.command: it is needed"),
    "a Redis of ours without a password": (
        {"gcsFaultTolerance": {"enabled": True}},
        "gcsFaultTolerance.redis.passwordSecret.existingSecret: the installed Redis needs",
    ),
    "a budget of nodes that nobody may list": (
        {"serve": {"experts": {"replicas": "elastic"}}, "policy": {"spec": {"budget": {"gpus": "nodes"}}}},
        'policy.spec.budget.gpus: "nodes" needs rbac.listNodes',
    ),
    "an Ingress for nobody": ({"ingress": {"enabled": True}}, "ingress.hosts: at least one host is needed"),
    "a route without a gateway": ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs: at least one Gateway"),
}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [*RULES_OF_KUBERAY.values(), *CONTRADICTIONS.values()],
    ids=[*RULES_OF_KUBERAY, *CONTRADICTIONS],
)
def test_it_is_refused_in_one_sentence(values: Document, sentence: str) -> None:
    with pytest.raises(Refused) as refusal:
        render(merged(NEEDED, values))
    lines = [line for line in str(refusal.value).splitlines() if sentence in line]
    assert len(lines) == 1
    assert lines[0].endswith((".", "makes one."))


def test_all_faults_are_said_at_once() -> None:
    with pytest.raises(Refused) as refusal:
        render({})
    said = str(refusal.value)
    assert all(key in said for key in ("model.path:", "security.clusterKey", "security.apiKeys"))


def test_what_is_refused_alone_is_allowed_where_it_belongs() -> None:
    """The rules above do not refuse everything."""
    render(merged(NEEDED, experts(idleTimeoutSeconds=60, priority=2, replicas=2, rayResources={"CPU": "1"})))
    render(merged(NEEDED, experts(rayStartParams={"num-cpus": "1"}, podSpec={"restartPolicy": "Never"})))
    render(merged(NEEDED, {"autoscaler": {"enabled": False}}, experts(podSpec={"restartPolicy": "Always"})))
    render(merged(NEEDED, {"head": {"env": [{"name": "REDIS_PASSWORD", "value": "x"}]}}))
    render(merged(NEEDED, {"fullnameOverride": "x" * 47}))
    budget: Document = {"policy": {"spec": {"budget": {"gpus": "nodes"}}}, "rbac": {"listNodes": True}}
    render(merged(NEEDED, budget, {"serve": {"experts": {"replicas": "elastic"}}}))


@pytest.mark.parametrize(
    "values",
    [
        {"nodeSelector": {}},
        {"image": {"tagg": "x"}},
        {"head": {"service": {"name": "x"}}},  # KubeRay allows none
        {"workerGroups": {"routers": {}}},
        {"workerGroups": {"router": {"replica": 1}}},
        {"workerGroups": {"experts": [{"name": "g", "minReplicas": 0, "maxReplicas": 1}]}},
        {"workerGroups": {"experts": {"g": {}}}},
        experts(minReplicas="1"),
        experts(name="headgroup"),
        experts(tolerations=[{"keys": "x"}]),
        experts(podSpec={"containers": []}),
        {"serve": {"experts": {"host": "0.0.0.0"}}},
        {"serve": {"experts": {"pools": {"h100": {"resource": {}}}}}},
        {"policy": {"spec": {"version": 1, "budgets": {}}}},
        {"policy": {"spec": {"version": 1, "router": {"upscale": {"after": 1}}}}},
        {"gcsFaultTolerance": {"redis": {"address": "redis"}}},
        {"model": {"volume": {"objectStorage": {"uri": "https://x"}}}},
        {"security": {"clusterKey": {"value": "secret in a values file"}}},
        {"rayService": {"upgradeType": "Rolling"}},
        {"probes": {"head": {"readiness": {"httpGet": {}}}}},
    ],
    ids=str,
)
def test_the_schema_takes_no_value_that_it_does_not_know(values: Document) -> None:
    render(NEEDED)
    with pytest.raises(Refused, match=r"^expertscale:\n- at '"):
        render(merged(NEEDED, values))
