"""The boards: what an operator asks while requests are slow, experts are hot, or replicas do not follow the load."""

from __future__ import annotations

from cluster import metrics as m
from infra.grafana.words import Board, Panel, Query, Row, level, mean, quantiles, rate, rise

OF_ONE = 'expert!="other"'

SERVING = Board(
    "serving",
    "ExpertScale / serving",
    "What clients see, and what the routers do for them.",
    (
        Row(
            "Requests",
            (
                Panel(
                    "Requests",
                    "Requests that ended, by outcome.",
                    "reqps",
                    (Query(rate(m.REQUESTS, "outcome"), "{{outcome}}"),),
                ),
                Panel(
                    "Errors",
                    "Requests that ended with an error, by its code; those of clients (4xx) among them.",
                    "reqps",
                    (Query(rate(m.REQUEST_ERRORS, "code"), "{{code}}"),),
                ),
                Panel(
                    "Requests in the house",
                    "Accepted and not ended; of their sequences those in the batch and those in the engines' queues.",
                    "short",
                    (
                        Query(level(m.OPEN_REQUESTS), "open requests"),
                        Query(level(m.RUNNING), "running sequences"),
                        Query(level(m.WAITING), "waiting sequences"),
                    ),
                ),
                Panel(
                    "Time to first token",
                    "From a request's arrival to its first token.",
                    "s",
                    quantiles(m.FIRST_TOKEN_S, 0.5, 0.95, 0.99),
                ),
                Panel(
                    "Time per output token",
                    "Of a finished choice: the mean time from one token to the next.",
                    "s",
                    quantiles(m.NEXT_TOKEN_S, 0.5, 0.95, 0.99),
                ),
                Panel(
                    "Whole requests",
                    "From a request's arrival to the end of its answer.",
                    "s",
                    quantiles(m.REQUEST_S, 0.5, 0.95, 0.99),
                ),
            ),
        ),
        Row(
            "Routers",
            (
                Panel(
                    "Tokens",
                    "Tokens generated, prompt tokens computed, and prompt tokens found in the KV pool instead.",
                    "short",
                    (
                        Query(rate(m.GENERATED_TOKENS), "generated/s"),
                        Query(rate(m.PROMPT_TOKENS), "prompt/s"),
                        Query(rate(m.CACHED_TOKENS), "cached prompt/s"),
                    ),
                ),
                Panel(
                    "KV pool in use",
                    "Share of each router's pool that holds keys and values; full pools preempt.",
                    "percentunit",
                    (Query(f"{level(m.KV_USED_TOKENS, 'replica')} / {level(m.KV_TOKENS, 'replica')}", "{{replica}}"),),
                ),
                Panel(
                    "Step",
                    "Mean time of a forward pass, and what of it is spent waiting for experts.",
                    "s",
                    (
                        Query(mean(m.STEP_S, m.STEPS), "step"),
                        Query(mean(m.SCATTER_S, m.STEPS), "scatter and gather in it"),
                    ),
                ),
                Panel(
                    "Prefix hits",
                    "Share of prompt tokens that did not have to be computed.",
                    "percentunit",
                    (
                        Query(
                            f"{rate(m.CACHED_TOKENS)} / (({rate(m.CACHED_TOKENS)} + {rate(m.PROMPT_TOKENS)}) > 0)",
                            "hits",
                        ),
                    ),
                ),
                Panel(
                    "Finish reasons",
                    "Choices that ended, by their finish reason.",
                    "short",
                    (Query(rate(m.FINISHED_CHOICES, "reason"), "{{reason}}"),),
                ),
                Panel(
                    "Out of the ordinary",
                    "Sequences preempted for want of KV, requests refused by bounds, and resumed on another router.",
                    "short",
                    (
                        Query(rise(m.PREEMPTIONS), "preemptions"),
                        Query(rise(m.REFUSED_REQUESTS), "refused"),
                        Query(rise(m.RESUMED_REQUESTS), "resumed"),
                    ),
                ),
            ),
        ),
    ),
)

EXPERTS = Board(
    "experts",
    "ExpertScale / experts",
    "Which experts are hot, and what the hop to them costs.",
    (
        Row(
            "Experts",
            (
                Panel(
                    "Rows a second by layer and expert",
                    "The busiest experts of each layer, layers downwards; all others of the layer are `other`: about "
                    "600 series whatever the model.",
                    "short",
                    (Query(level(m.EXPERT_ROWS_PER_S, "layer, expert"), ""),),
                    kind="matrix",
                    width=24,
                ),
                Panel(
                    "Imbalance by layer",
                    "Busiest expert of the layer over the mean of all of them: 1 is even.",
                    "short",
                    (Query(level(m.IMBALANCE, "layer", "max"), "layer {{layer}}"),),
                ),
                Panel(
                    "Busiest experts",
                    "The ten experts with most rows a second.",
                    "short",
                    (
                        Query(
                            f"topk(10, {level(m.EXPERT_ROWS_PER_S, 'layer, expert', 'sum', OF_ONE)})",
                            "layer {{layer}}, expert {{expert}}",
                        ),
                    ),
                ),
                Panel(
                    "Rows a second by group",
                    "Rows computed by all replicas of a group.",
                    "short",
                    (Query(rate(m.COMPUTED_ROWS, "group"), "{{group}}"),),
                    stacked=True,
                ),
            ),
        ),
        Row(
            "The critical path",
            (
                Panel(
                    "Critical share",
                    "Share of the routers' step time in which they waited for this group alone, after all others had "
                    "answered: what a replica more can save.",
                    "percentunit",
                    (
                        Query(
                            f"{rate(m.CRITICAL_S, 'group')} / on () group_left () ({rate(m.STEP_S)} > 0)", "{{group}}"
                        ),
                    ),
                ),
                Panel(
                    "Wait share",
                    "Share of the routers' step time from sending a layer's rows to this group's last one.",
                    "percentunit",
                    (Query(f"{rate(m.WAIT_S, 'group')} / on () group_left () ({rate(m.STEP_S)} > 0)", "{{group}}"),),
                ),
                Panel(
                    "Scatter and gather",
                    "Mean time of one MoE layer, from sending its rows to having them all back.",
                    "s",
                    (Query(mean(m.SCATTER_S, m.SCATTERS), "a layer"),),
                ),
            ),
        ),
        Row(
            "Replicas",
            (
                Panel(
                    "Utilisation",
                    "Share of their time that the replicas of a group compute, on average.",
                    "percentunit",
                    (Query(rate(m.BUSY_S, "group, pool", how="avg"), "{{group}} {{pool}}"),),
                ),
                Panel(
                    "Queue",
                    "Rows that wait to be computed.",
                    "short",
                    (Query(level(m.QUEUED_ROWS, "group, pool"), "{{group}} {{pool}}"),),
                ),
                Panel(
                    "Rows in a batch",
                    "Mean rows of a batch: what requests that wait for the same layer save by going together.",
                    "short",
                    (Query(mean(m.COMPUTED_ROWS, m.BATCHES, "group"), "{{group}}"),),
                ),
                Panel(
                    "Computing a batch",
                    "Time of one batch on a replica, without the way there and back; sampled.",
                    "s",
                    quantiles(m.FFN_S, 0.5, 0.95),
                ),
                Panel(
                    "Speed",
                    "Rows of one layer per second of a replica, as measured when it started.",
                    "short",
                    (Query(level(m.SPEED, "group, pool", "avg"), "{{group}} {{pool}}"),),
                ),
                Panel(
                    "Bytes",
                    "Rows sent and received by routers, by transport.",
                    "Bps",
                    (Query(rate(m.TRANSPORT_BYTES, "transport"), "{{transport}}"),),
                ),
                Panel(
                    "Batches sent again, and raced",
                    "After a failure, and because a reply was late. Both cost rows twice and lose nothing.",
                    "short",
                    (Query(rise(m.RESENT_BATCHES), "sent again"), Query(rise(m.HEDGED_BATCHES), "raced")),
                ),
                Panel(
                    "Connections",
                    "Routers connected to the replicas of a group.",
                    "short",
                    (Query(level(m.CONNECTIONS, "group, pool"), "{{group}} {{pool}}"),),
                ),
            ),
        ),
    ),
)

AUTOSCALING = Board(
    "autoscaling",
    "ExpertScale / autoscaling",
    "Whether replicas follow the load, why they changed, and whether somebody still balances.",
    (
        Row(
            "Replicas",
            (
                Panel(
                    "Target",
                    "Replicas the policy wants, by group and pool; `Router` are the routers.",
                    "short",
                    (Query(level(m.TARGET_REPLICAS, "group, pool", "max"), "{{group}} {{pool}}"),),
                ),
                Panel(
                    "Actual",
                    "Replicas that run, as the policy counts them.",
                    "short",
                    (Query(level(m.ACTUAL_REPLICAS, "group, pool", "max"), "{{group}} {{pool}}"),),
                ),
                Panel(
                    "Starting",
                    "Replicas asked for that do not run yet. What stays here for long is given up.",
                    "short",
                    (Query(level(m.STARTING_REPLICAS, "group, pool", "max"), "{{group}} {{pool}}"),),
                ),
                Panel(
                    "Replicas by state",
                    "As the Directory knows them: joining, ready, draining.",
                    "short",
                    (Query(level(m.REPLICAS, "state"), "{{state}}"),),
                    stacked=True,
                ),
                Panel(
                    "Ready, as routers see it",
                    "Replicas the fewest-seeing router may send rows to; less than ready means it hears late.",
                    "short",
                    (Query(level(m.VIEW_READY_REPLICAS, "group", "min"), "{{group}}"),),
                ),
                Panel(
                    "Routers",
                    "Routers the Directory hears of.",
                    "short",
                    (Query(level(m.ROUTERS, "application", "max"), "{{application}}"),),
                ),
            ),
        ),
        Row(
            "Decisions",
            (
                Panel(
                    "Decisions by reason",
                    "Changes of a target since the point before. The sentences are in /v1/cluster.",
                    "short",
                    (Query(rise(m.DECISIONS, "direction, reason"), "{{direction}}: {{reason}}"),),
                ),
                Panel(
                    "Decisions by group",
                    "The same by group.",
                    "short",
                    (Query(rise(m.DECISIONS, "group, direction"), "{{group}} {{direction}}"),),
                ),
                Panel(
                    "Held back",
                    "Changes the policy would make if bounds, budget and back-offs let it, or its signals were there.",
                    "short",
                    (Query(level(m.HELD_BACK, "application", "max"), "{{application}}"),),
                ),
                Panel(
                    "Starts that failed",
                    "Replicas that could not start, and starts given up because they took too long.",
                    "short",
                    (
                        Query(rise(m.START_FAILURES, "part"), "{{part}} could not start"),
                        Query(rise(m.GIVEN_UP_STARTS, "group"), "{{group}} given up"),
                    ),
                ),
            ),
        ),
        Row(
            "Does anybody balance?",
            (
                Panel(
                    "Wrong now",
                    "The reasons of /health that do not keep requests from being answered: 1 while one holds.",
                    "short",
                    (Query(level(m.DEGRADED, "reason", "max"), "{{reason}}"),),
                    kind="numbers",
                    width=24,
                ),
                Panel(
                    "Age of signals",
                    "Since the last report of the most silent replica, or router. Above `signals.max_age_s` of the "
                    "policy nothing is decided for that part.",
                    "s",
                    (Query(level(m.SIGNAL_AGE_S, "part", "max"), "{{part}}"),),
                ),
                Panel(
                    "Silence",
                    "Since routers heard the Directory, and the Directory the autoscaler; each speaks every 5 s.",
                    "s",
                    (
                        Query(level(m.VIEW_AGE_S, "replica", "max"), "router {{replica}}"),
                        Query(level(m.POLICY_SILENCE_S, "application", "max"), "autoscaler"),
                    ),
                ),
                Panel(
                    "Policy",
                    "How often Serve asks the policy a second (about 9), ticks that failed, and 1 while its file "
                    "cannot be used.",
                    "short",
                    (
                        Query(rate(m.POLICY_TICKS, "application"), "asked/s"),
                        Query(rise(m.POLICY_FAILURES, "application"), "failed"),
                        Query(level(m.POLICY_ERROR, "application", "max"), "file cannot be used"),
                    ),
                ),
            ),
        ),
    ),
)

BOARDS = (SERVING, EXPERTS, AUTOSCALING)
