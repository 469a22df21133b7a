"""Builds the Serve application; the only file that knows all deployments.

    python -m deployments.app check CONFIG

says in one sentence per error what is wrong with a config file, without starting Ray.
"""

# No `from __future__ import annotations` here: Serve reads the annotation of `build` to validate its arguments.
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import BackpressureConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from cluster.blueprint import Blueprint, make_blueprint
from cluster.config import ELASTIC, HOME_POOL, AppConfig, PoolSpec, ResourceSpec, deployment_name, resolve
from cluster.errors import ConfigError
from cluster.keys import provide_key, read_key_file
from deployments import config_file
from deployments.directory import Directory
from deployments.experts.deployment import ExpertGroup
from deployments.ingress.auth import authenticator
from deployments.ingress.deployment import Ingress
from deployments.ingress.exposure import refuse_open
from deployments.router.deployment import Router

POLICY_FUNCTION = "autoscale.serve_policy:ServePolicy"
# The policy owns all delays. Reports reach the controller within half a second and are read raw, not averaged.
_REPORTING = {"upscale_delay_s": 0, "downscale_delay_s": 0, "metrics_interval_s": 0.5, "look_back_period_s": 1}

SURGE_PERCENT = 100
"""In a rollout the whole new version starts beside the old one. Where there is no room for both, Serve waits for it."""
HEALTH = {"health_check_period_s": 2, "health_check_timeout_s": 6}
"""Three strikes: Serve replaces a replica that hangs, or whose process was stopped, after some 20 s."""
MARGIN_S = 10.0
"""What a replica gets beyond the longest request to end in peace, before Serve kills it."""

CALLS_FACTOR = 4
"""Calls a router or ingress may hold for each request it may have accepted: refusals are calls too, if short ones."""


def build(args: AppConfig) -> serve.Application:
    """The Serve application for `args`.

    Raises:
        ConfigError: what `check` would have said; `serve run` itself would print a traceback and stay up.
    """
    blueprint = make_blueprint(args)
    longest_s = args.ingress.request_timeout_s
    provide_key(args.security, os.environ)
    directory = _directory(args, blueprint)
    router = Router.options(  # type: ignore[attr-defined]
        **_router_size(args),
        ray_actor_options=args.router.resources.ray_actor_options(),
        # The engine alone decides who waits, and says at once whom it refuses: nobody waits at the handle for a place
        # in the queue, only for a router where there is none.
        max_ongoing_requests=CALLS_FACTOR * _accepted(args),
        max_queued_requests=args.router.max_queued_requests,
        max_surge_percent=SURGE_PERCENT,
        **HEALTH,
        graceful_shutdown_timeout_s=longest_s + MARGIN_S,
        request_router_config=RequestRouterConfig(request_router_class="deployments.router.affinity:AffinityRouter"),
    ).bind(args, blueprint, directory)
    return Ingress.options(  # type: ignore[attr-defined]
        num_replicas=args.ingress.replicas,
        ray_actor_options=args.ingress.resources.ray_actor_options(),
        max_ongoing_requests=_http_calls(args),
        max_queued_requests=_http_calls(args),
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        max_surge_percent=SURGE_PERCENT,
        **HEALTH,
        graceful_shutdown_timeout_s=longest_s + MARGIN_S,
    ).bind(args, blueprint, router, directory, _expert_groups(args, blueprint, directory))


def _accepted(args: AppConfig) -> int:
    """Requests one router may have at once."""
    return args.router.max_sequences + args.router.max_queued_requests


def _http_calls(args: AppConfig) -> int:
    """HTTP requests one ingress may have at once, and as many in front of it; more are answered 429 by Serve."""
    routers = args.experts.max_replicas_hard if args.router.replicas == ELASTIC else args.router.replicas
    return CALLS_FACTOR * _accepted(args) * int(routers)


def _directory(args: AppConfig, blueprint: Blueprint) -> Any:
    return Directory.options(  # type: ignore[attr-defined]
        max_surge_percent=SURGE_PERCENT,
        **HEALTH,
        ray_actor_options=ResourceSpec().ray_actor_options(),
    ).bind(args.model.served_name, blueprint.digest.hex(), blueprint.placement, args.experts, args.router.elastic)


def _expert_groups(args: AppConfig, blueprint: Blueprint, directory: Any) -> list[DeploymentHandle]:
    """One deployment per (group, pool); none where the routers hold the experts themselves."""
    if args.experts.transport == "local":
        return []
    bound = []
    for index, group in enumerate(args.experts.group_names):
        home = PoolSpec(resources=args.experts.resources, emulate=args.experts.emulate)
        for pool, spec in {HOME_POOL: home, **args.experts.pools}.items():
            count = ELASTIC if args.experts.elastic else args.experts.replicas_of(group, pool)
            deployment = ExpertGroup.options(  # type: ignore[attr-defined]
                **_size(count, fewest=1 if pool == HOME_POOL else 0, args=args),
                name=deployment_name(group, pool),
                ray_actor_options=spec.resources.ray_actor_options(),
                max_surge_percent=SURGE_PERCENT,
                **HEALTH,
                # Old routers finish their streams first, see `experts.farewell`; then what is on its way is computed.
                graceful_shutdown_timeout_s=args.ingress.request_timeout_s + 2 * args.experts.timeout_s + MARGIN_S,
                graceful_shutdown_wait_loop_s=0.1,
            )
            bound.append(deployment.bind(args, blueprint, index, pool, spec.emulate, directory))
    return bound


def _size(count: int | str, *, fewest: int, args: AppConfig) -> dict[str, Any]:
    """Serve's options for a number of replicas: fixed, or wide bounds within which the policy file decides.

    Serve takes no `num_replicas` of 0, only bounds that allow it.
    """
    hard = args.experts.max_replicas_hard
    if count == ELASTIC:
        return {"autoscaling_config": {**_REPORTING, "min_replicas": fewest, "max_replicas": hard}}
    if count == 0:
        return {"autoscaling_config": {"min_replicas": 0, "initial_replicas": 0, "max_replicas": hard}}
    return {"num_replicas": count}


def _router_size(args: AppConfig) -> dict[str, Any]:
    """As `_size`. Serve shows a policy only what has bounds, and experts are scaled by what routers report."""
    count = args.router.replicas
    if args.experts.elastic and count != ELASTIC:
        return {"autoscaling_config": {**_REPORTING, "min_replicas": count, "max_replicas": count}}
    return _size(count, fewest=1, args=args)


def check(path: Path) -> list[str]:
    """Everything wrong with the config file, one sentence each; empty when `serve run` may start."""
    try:
        file = config_file.read(path)
        _check_security(file)
        _check_policy(file)
        make_blueprint(file.args)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def _check_security(file: config_file.ConfigFile) -> None:
    """Keys that cannot be read, and an open door. Variables are not looked at: the Ingress may run elsewhere."""
    security = file.args.security
    authenticator(security.model_copy(update={"api_keys_env": None, "admin_keys_env": None}), {})
    if security.cluster_key_file is not None and (path := resolve(security.cluster_key_file)).exists():
        read_key_file(path)
    # A file without a host is checked as `make serve` runs it; `serve run` is for the Ingress to refuse.
    refuse_open((file.document.get("http_options") or {}).get("host", config_file.HOST), security)


def _check_policy(file: config_file.ConfigFile) -> None:
    """That a policy is there exactly where something is elastic, and what it says of its own arguments."""
    policy = file.document["applications"][0].get("autoscaling_policy")
    elastic = [key for key in ("experts", "router") if getattr(file.args, key).elastic]
    if policy is None:
        if elastic:
            raise ConfigError(
                f"{elastic[0]}.replicas: {ELASTIC!r} needs applications.0.autoscaling_policy with a policy file; "
                "deployments/configs/elastic.yaml has one."
            )
        return
    if not elastic:
        raise ConfigError(
            "applications.0.autoscaling_policy: nothing here is elastic; set experts.replicas or router.replicas to "
            f"{ELASTIC!r}, or leave the policy out."
        )
    name = policy["policy_function"]
    try:
        module, _, attribute = name.partition(":")
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise ConfigError(
            f"autoscaling_policy.policy_function: the value {name!r} is not allowed: use {POLICY_FUNCTION!r}."
        ) from None
    if errors := getattr(function, "check", _no_errors)(policy.get("policy_kwargs") or {}, file.args):
        raise ConfigError("\n".join(errors))


def _no_errors(_kwargs: Any, _config: AppConfig) -> list[str]:
    """A policy of the user's own that checks nothing."""
    return []


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    if len(arguments) != 2 or arguments[0] != "check":
        print("usage: python -m deployments.app check CONFIG", file=sys.stderr)
        return 2
    errors = check(Path(arguments[1]))
    for line in errors:
        print(line, file=sys.stderr)
    if not errors:
        print(f"{arguments[1]}: ok")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
