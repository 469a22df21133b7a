{{/*
What the schemas of the chart, of KubeRay and of Kubernetes do not express, one sentence for each fault, all at once.
Those marked (KubeRay) are rules of its operator, which would otherwise refuse the object after it was accepted.
*/}}
{{- define "expertscale.checks" -}}
{{- $faults := concat (include "expertscale.nameFaults" . | fromJsonArray) (include "expertscale.valueFaults" . | fromJsonArray) -}}
{{- $faults = concat $faults (include "expertscale.headFaults" . | fromJsonArray) (include "expertscale.groupFaults" . | fromJsonArray) -}}
{{- $faults = concat $faults (include "expertscale.placeFaults" . | fromJsonArray) -}}
{{- if $faults }}{{ fail (printf "\n%s" (join "\n" $faults)) }}{{ end -}}
{{- end -}}

{{- define "expertscale.nameFaults" -}}
{{- $faults := list -}}
{{- $name := include "expertscale.fullname" . -}}
{{- if gt (len $name) 47 -}}
{{- $faults = append $faults (printf "fullnameOverride: the RayService's name %q has %d characters; allowed: up to 47." $name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- $faults = append $faults (printf "fullnameOverride: the RayService's name %q is not allowed; it begins with a letter, ends with a letter or digit and holds lower-case letters, digits and '-'." $name) -}}
{{- end -}}
{{- toJson $faults -}}
{{- end -}}

{{/* Values that are needed, and values that contradict each other. */}}
{{- define "expertscale.valueFaults" -}}
{{- $faults := list -}}
{{- $volume := .Values.model.volume -}}
{{- if not .Values.model.path -}}
{{- $faults = append $faults "model.path: the folder of the checkpoint inside the containers is needed, for instance /models/mixtral." -}}
{{- end -}}
{{- $sources := 0 -}}
{{- range list $volume.existingClaim $volume.claim.create $volume.objectStorage.enabled }}{{ if . }}{{ $sources = add1 $sources }}{{ end }}{{ end -}}
{{- if gt (int $sources) 1 -}}
{{- $faults = append $faults "model.volume: existingClaim, claim.create and objectStorage.enabled exclude each other; keep one." -}}
{{- end -}}
{{- if and .Values.model.path (gt (int $sources) 0) (not (hasPrefix (printf "%s/" (trimSuffix "/" $volume.mountPath)) .Values.model.path)) -}}
{{- $faults = append $faults (printf "model.path: %q does not lie below model.volume.mountPath, %q." .Values.model.path $volume.mountPath) -}}
{{- end -}}
{{- if $volume.objectStorage.enabled -}}
{{- range $key := list "uri" "image" "command" -}}
{{- if not (get $volume.objectStorage $key) -}}
{{- $faults = append $faults (printf "model.volume.objectStorage.%s: it is needed to copy the checkpoint." $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if hasSuffix "/CHECKPOINT" $volume.objectStorage.uri -}}
{{- $faults = append $faults (printf "model.volume.objectStorage.uri: %q ends in a placeholder; name the checkpoint's folder." $volume.objectStorage.uri) -}}
{{- end -}}
{{- if not .Values.security.clusterKey.existingSecret -}}
{{- $faults = append $faults "security.clusterKey.existingSecret: a Secret with the key of routers and expert replicas is needed; `kubectl create secret generic NAME --from-literal=cluster-key=$(openssl rand -hex 32)` makes one." -}}
{{- end -}}
{{- if and (not .Values.security.apiKeys.existingSecret) (not .Values.security.allowOpen) -}}
{{- $faults = append $faults "security.apiKeys.existingSecret: other pods can reach the API and nobody is asked for a key; name a Secret, or set security.allowOpen: true." -}}
{{- end -}}
{{- if and (include "expertscale.bundledRedis" .) (not .Values.gcsFaultTolerance.redis.passwordSecret.existingSecret) -}}
{{- $faults = append $faults "gcsFaultTolerance.redis.passwordSecret.existingSecret: the installed Redis needs a Secret with its password." -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
{{- $faults = append $faults "ingress.hosts: at least one host is needed where the Ingress is enabled." -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- $faults = append $faults "httpRoute.parentRefs: at least one Gateway is needed where the route is enabled." -}}
{{- end -}}
{{- if and .Values.prometheusRule.enabled (not (.Files.Glob "files/prometheus/*.yaml")) (not .Values.prometheusRule.groups) -}}
{{- $faults = append $faults "prometheusRule.groups: this chart was packaged without rules, so groups of your own are needed." -}}
{{- end -}}
{{- if and .Values.grafana.dashboards.enabled (not (.Files.Glob "files/grafana/*.json")) -}}
{{- $faults = append $faults "grafana.dashboards.enabled: this chart was packaged without dashboards." -}}
{{- end -}}
{{- range $resource := list "gpus" "cpus" -}}
{{- $amount := get (default dict $.Values.policy.spec.budget) $resource -}}
{{- if and (eq (toString $amount) "nodes") (include "expertscale.elastic" $) $.Values.rbac.create (not $.Values.rbac.listNodes) -}}
{{- $faults = append $faults (printf "policy.spec.budget.%s: \"nodes\" needs rbac.listNodes, the right to list the cluster's nodes." $resource) -}}
{{- end -}}
{{- end -}}
{{- if eq .Values.rayService.upgradeType "NewClusterWithIncrementalUpgrade" -}}
{{- /* (KubeRay) */ -}}
{{- if not .Values.autoscaler.enabled -}}
{{- $faults = append $faults "rayService.upgradeType: NewClusterWithIncrementalUpgrade needs autoscaler.enabled." -}}
{{- end -}}
{{- range $key := list "gatewayClassName" "stepSizePercent" "intervalSeconds" -}}
{{- if not (hasKey $.Values.rayService.clusterUpgradeOptions $key) -}}
{{- $faults = append $faults (printf "rayService.clusterUpgradeOptions.%s: NewClusterWithIncrementalUpgrade needs it." $key) -}}
{{- end -}}
{{- end -}}
{{- else if .Values.rayService.clusterUpgradeOptions -}}
{{- $faults = append $faults (printf "rayService.clusterUpgradeOptions: upgradeType %s takes none." .Values.rayService.upgradeType) -}}
{{- end -}}
{{- toJson $faults -}}
{{- end -}}

{{/* (KubeRay) What only the head is asked for. */}}
{{- define "expertscale.headFaults" -}}
{{- $faults := include "expertscale.startFaults" (dict "root" . "where" "head" "group" .Values.head) | fromJsonArray -}}
{{- if .Values.gcsFaultTolerance.enabled -}}
{{- range $where, $env := dict "head.env" .Values.head.env "env" .Values.env -}}
{{- range $env -}}
{{- if has .name (list "REDIS_PASSWORD" "RAY_REDIS_ADDRESS") -}}
{{- $faults = append $faults (printf "%s: %s must not be set with gcsFaultTolerance.enabled; use gcsFaultTolerance.redis." $where .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if hasKey .Values.head.rayStartParams "redis-password" -}}
{{- $faults = append $faults "head.rayStartParams.redis-password: it must not be set with gcsFaultTolerance.enabled; use gcsFaultTolerance.redis.passwordSecret." -}}
{{- end -}}
{{- end -}}
{{- toJson $faults -}}
{{- end -}}

{{/* (KubeRay) Of head and workers alike. root, where: the key in the values, group. */}}
{{- define "expertscale.startFaults" -}}
{{- $faults := list -}}
{{- $params := default dict .group.rayStartParams -}}
{{- $autoscaling := .root.Values.autoscaler -}}
{{- if hasKey $params "labels" -}}
{{- $faults = append $faults (printf "%s.rayStartParams.labels: not allowed; use %s.labels." .where .where) -}}
{{- end -}}
{{- range $param := list "num-cpus" "num-gpus" "memory" "resources" -}}
{{- if and (hasKey $params $param) $.group.rayResources -}}
{{- $faults = append $faults (printf "%s.rayStartParams.%s: not allowed beside %s.rayResources; keep one of them." $.where $param $.where) -}}
{{- end -}}
{{- end -}}
{{- $restart := default "Never" (get (default dict .group.podSpec) "restartPolicy") -}}
{{- if and $autoscaling.enabled (eq $autoscaling.version "v2") (ne $restart "Never") -}}
{{- $faults = append $faults (printf "%s.podSpec.restartPolicy: the value %q is not allowed with autoscaler v2; use Never or leave it out." .where $restart) -}}
{{- end -}}
{{- toJson $faults -}}
{{- end -}}

{{- define "expertscale.groupFaults" -}}
{{- $faults := list -}}
{{- $names := list -}}
{{- $v2 := and .Values.autoscaler.enabled (eq .Values.autoscaler.version "v2") -}}
{{- range $index, $group := prepend .Values.workerGroups.experts .Values.workerGroups.router -}}
{{- $where := gt $index 0 | ternary (printf "workerGroups.experts[%d]" (int (sub $index 1))) "workerGroups.router" -}}
{{- $faults = concat $faults (include "expertscale.startFaults" (dict "root" $ "where" $where "group" $group) | fromJsonArray) -}}
{{- if has $group.name $names -}}
{{- $faults = append $faults (printf "%s.name: %q names another worker group already." $where $group.name) -}}
{{- end -}}
{{- $names = append $names $group.name -}}
{{- range $key := list "idleTimeoutSeconds" "priority" -}}
{{- if and (hasKey $group $key) (not $v2) -}}
{{- $faults = append $faults (printf "%s.%s: it needs autoscaler.enabled and autoscaler.version v2." $where $key) -}}
{{- end -}}
{{- end -}}
{{- $least := int $group.minReplicas -}}
{{- $most := int $group.maxReplicas -}}
{{- $count := int (default $group.minReplicas $group.replicas) -}}
{{- if gt $least $most -}}
{{- $faults = append $faults (printf "%s.minReplicas: %d is more than maxReplicas, %d." $where $least $most) -}}
{{- else if or (lt $count $least) (gt $count $most) -}}
{{- $faults = append $faults (printf "%s.replicas: %d is not allowed; minReplicas and maxReplicas allow %d to %d." $where $count $least $most) -}}
{{- end -}}
{{- end -}}
{{- toJson $faults -}}
{{- end -}}

{{/*
Whether some group has what each deployment asks for. Ray's autoscaler starts a node only for what its group is known to
have: labels that Ray finds out on the node itself must be written in the group's `labels` too.
*/}}
{{- define "expertscale.placeFaults" -}}
{{- $faults := list -}}
{{- $experts := .Values.serve.experts -}}
{{- $asked := dict "serve.experts.resources" $experts.resources "serve.router.resources" .Values.serve.router.resources "serve.ingress.resources" .Values.serve.ingress.resources -}}
{{- range $pool, $spec := default dict $experts.pools -}}
{{- $_ := set $asked (printf "serve.experts.pools.%s.resources" $pool) $spec.resources -}}
{{- end -}}
{{- $groups := prepend .Values.workerGroups.experts .Values.workerGroups.router -}}
{{- if ne (toString (get .Values.head.rayResources "CPU")) "0" }}{{ $groups = append $groups .Values.head }}{{ end -}}
{{- range $where, $resources := $asked -}}
{{- $needs := default dict $resources -}}
{{- $custom := keys (default dict $needs.resources) -}}
{{- if $needs.accelerator_type }}{{ $custom = append $custom (printf "accelerator_type:%s" $needs.accelerator_type) }}{{ end -}}
{{- $fits := false -}}
{{- range $group := $groups -}}
{{- $has := true -}}
{{- range $label, $value := default dict $needs.label_selector -}}
{{- $plain := not (regexMatch "^(!|in\\()" $value) -}}
{{- if and $plain (ne (toString (get (default dict $group.labels) $label)) $value) }}{{ $has = false }}{{ end -}}
{{- end -}}
{{- range $name := $custom -}}
{{- if not (hasKey (default dict $group.rayResources) $name) }}{{ $has = false }}{{ end -}}
{{- end -}}
{{- if gt (float64 (default 0 $needs.num_gpus)) (float64 (include "expertscale.gpus" $group)) }}{{ $has = false }}{{ end -}}
{{- if $has }}{{ $fits = true }}{{ end -}}
{{- end -}}
{{- if not $fits -}}
{{- $faults = append $faults (printf "%s: no worker group has what it asks for, %s; see `labels`, `rayResources` and `resources.limits` of workerGroups." $where (toJson $needs)) -}}
{{- end -}}
{{- end -}}
{{- toJson $faults -}}
{{- end -}}

{{/* How many GPUs Ray counts on a node of a group. */}}
{{- define "expertscale.gpus" -}}
{{- $gpus := "0" -}}
{{- range $name, $count := default dict .resources.limits -}}
{{- if hasSuffix "gpu" $name }}{{ $gpus = toString $count }}{{ end -}}
{{- end -}}
{{- with .rayStartParams }}{{ with get . "num-gpus" }}{{ $gpus = . }}{{ end }}{{ end -}}
{{- with .rayResources }}{{ with get . "GPU" }}{{ $gpus = . }}{{ end }}{{ end -}}
{{- $gpus -}}
{{- end -}}
