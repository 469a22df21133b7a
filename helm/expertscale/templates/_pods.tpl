{{/* What the pods of head and workers have in common, and the two templates made of it. */}}

{{/* Variables of the files that `make serve` and the tests read too. */}}
{{- define "expertscale.env" -}}
{{- range $file := list "files/serve.env" "files/threads.env" -}}
{{- range $line := $.Files.Lines $file }}
{{- if and $line (not (hasPrefix "#" $line)) }}
{{- $pair := splitn "=" 2 $line }}
- name: {{ $pair._0 }}
  value: {{ $pair._1 | quote }}
{{- end }}
{{- end }}
{{- end }}
- {name: HOME, value: /tmp}
- {name: HF_HUB_OFFLINE, value: "1"}
- {name: PYTHONDONTWRITEBYTECODE, value: "1"}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- name: EXPERTSCALE_CLUSTER_KEY
  valueFrom: {secretKeyRef: {name: {{ .Values.security.clusterKey.existingSecret }}, key: {{ .Values.security.clusterKey.key }}}}
{{- with .Values.otel }}
{{- if .endpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ .endpoint | quote }}
{{- if .sampler }}
- name: OTEL_TRACES_SAMPLER
  value: {{ .sampler | quote }}
{{- end }}
{{- if .samplerArg }}
- name: OTEL_TRACES_SAMPLER_ARG
  value: {{ .samplerArg | quote }}
{{- end }}
{{- if .headers.existingSecret }}
- name: OTEL_EXPORTER_OTLP_HEADERS
  valueFrom: {secretKeyRef: {name: {{ .headers.existingSecret }}, key: {{ .headers.key }}}}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "expertscale.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: {{ .Values.tmpSizeLimit }}}
{{- with include "expertscale.modelClaim" . }}
- name: model
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- else }}
{{- if .Values.model.volume.objectStorage.enabled }}
- name: model
  emptyDir: {sizeLimit: {{ .Values.model.volume.objectStorage.sizeLimit }}}
{{- end }}
{{- end }}
{{- if include "expertscale.elastic" . }}
- name: policy
  configMap: {name: {{ include "expertscale.policyConfigMap" . }}}
{{- end }}
{{- if .Values.files }}
- name: files
  configMap: {name: {{ include "expertscale.fullname" . }}-files}
{{- end }}
{{- range $name, $keys := dict "api-keys" .Values.security.apiKeys "admin-keys" .Values.security.adminKeys }}
{{- if $keys.existingSecret }}
- name: {{ $name }}
  secret: {secretName: {{ $keys.existingSecret }}, defaultMode: 288} # 0440
{{- end }}
{{- end }}
{{- with .Values.volumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Folders, never `subPath`: a file mounted alone is not renewed when its ConfigMap or Secret changes. */}}
{{- define "expertscale.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if or (include "expertscale.modelClaim" .) .Values.model.volume.objectStorage.enabled }}
- {name: model, mountPath: {{ .Values.model.volume.mountPath }}, readOnly: true}
{{- end }}
{{- if include "expertscale.elastic" . }}
- {name: policy, mountPath: /etc/expertscale/policy, readOnly: true}
{{- end }}
{{- if .Values.files }}
- {name: files, mountPath: /etc/expertscale/files, readOnly: true}
{{- end }}
{{- range $name, $keys := dict "api-keys" .Values.security.apiKeys "admin-keys" .Values.security.adminKeys }}
{{- if $keys.existingSecret }}
- {name: {{ $name }}, mountPath: /etc/expertscale/{{ $name }}, readOnly: true}
{{- end }}
{{- end }}
{{- with .Values.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "expertscale.modelFetch" -}}
{{- with .Values.model.volume.objectStorage -}}
- name: model
  image: {{ .image }}
  imagePullPolicy: {{ $.Values.image.pullPolicy }}
  command: {{ toJson .command }}
  env:
    - {name: HOME, value: /tmp}
    - name: MODEL_URI
      value: {{ .uri | quote }}
    - name: MODEL_DIR
      value: {{ $.Values.model.path | quote }}
    {{- with .env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .existingSecret }}
  envFrom: [{secretRef: {name: {{ . }}}}]
  {{- end }}
  {{- with .resources }}
  resources: {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext: {{- toYaml $.Values.securityContext | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: model, mountPath: {{ $.Values.model.volume.mountPath }}}
{{- end -}}
{{- end -}}

{{/*
A pod template. root: the chart's context. part: head or worker. name: of the group. group: its values.
Its labels and annotations name no version and no checksum: a change here makes KubeRay build a new cluster.
*/}}
{{- define "expertscale.podTemplate" -}}
{{- $root := .root -}}
{{- $head := eq .part "head" -}}
{{- $probes := $head | ternary $root.Values.probes.head $root.Values.probes.worker -}}
metadata:
  labels:
    {{- include "expertscale.selectorLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .part }}
    expertscale.io/group: {{ .name }}
    {{- with $root.Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .group.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include (printf "expertscale.%sServiceAccount" .part) $root }}
  automountServiceAccountToken: {{ $head }}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext: {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  {{- with .group.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $root.Values.model.volume.objectStorage.enabled }}
  initContainers:
    {{- include "expertscale.modelFetch" $root | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-{{ .part }}
      image: {{ include "expertscale.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      env:
        {{- include "expertscale.env" $root | trim | nindent 8 }}
        {{- with .group.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        {{- if $head }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        - {name: as-metrics, containerPort: 44217}
        - {name: dash-metrics, containerPort: 44227}
        {{- end }}
        - {name: metrics, containerPort: 8080}
        - {name: serve, containerPort: {{ $root.Values.serve.port }}}
      resources: {{- include "expertscale.resources" . | nindent 8 }}
      securityContext: {{- toYaml $root.Values.securityContext | nindent 8 }}
      readinessProbe:
        httpGet: {{ $head | ternary (dict "path" "/api/local_raylet_healthz" "port" 52365) (dict "path" "/-/healthz" "port" "serve") | toJson }}
        {{- toYaml $probes.readiness | nindent 8 }}
      livenessProbe:
        httpGet: {{ dict "path" ($head | ternary "/api/healthz" "/api/local_raylet_healthz") "port" 52365 | toJson }}
        {{- toYaml $probes.liveness | nindent 8 }}
      volumeMounts:
        {{- include "expertscale.mounts" $root | nindent 8 }}
  volumes:
    {{- include "expertscale.volumes" $root | nindent 4 }}
{{- end -}}

{{/* A group's resources, with room on the node's disk for the checkpoint where it is copied. root, group. */}}
{{- define "expertscale.resources" -}}
{{- $resources := deepCopy .group.resources -}}
{{- with .root.Values.model.volume.objectStorage -}}
{{- if .enabled -}}
{{- $requests := merge (deepCopy (default dict $resources.requests)) (dict "ephemeral-storage" .sizeLimit) -}}
{{- $_ := set $resources "requests" $requests -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* The same with `podSpec` of the group laid over it. */}}
{{- define "expertscale.mergedPodTemplate" -}}
{{- $template := include "expertscale.podTemplate" . | fromYaml -}}
{{- $_ := set $template "spec" (mergeOverwrite $template.spec (deepCopy (default dict .group.podSpec))) -}}
{{- toYaml $template -}}
{{- end -}}

{{/* A worker group of the RayCluster. root, group. */}}
{{- define "expertscale.workerGroup" -}}
{{- $group := .group -}}
groupName: {{ $group.name }}
replicas: {{ int (default $group.minReplicas $group.replicas) }}
minReplicas: {{ int $group.minReplicas }}
maxReplicas: {{ int $group.maxReplicas }}
{{- range $key := list "idleTimeoutSeconds" "priority" }}
{{- if hasKey $group $key }}
{{ $key }}: {{ int (get $group $key) }}
{{- end }}
{{- end }}
{{- with $group.labels }}
labels: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $group.rayResources }}
resources: {{- toYaml . | nindent 2 }}
{{- end }}
rayStartParams: {{ toJson (default dict $group.rayStartParams) }}
template:
  {{- include "expertscale.mergedPodTemplate" (dict "root" .root "part" "worker" "name" $group.name "group" $group) | nindent 2 }}
{{- end -}}
