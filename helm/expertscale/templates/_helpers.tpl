{{/* Names, labels and images. */}}

{{- define "expertscale.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride }}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ $name }}{{ end -}}
{{- end -}}
{{- end -}}

{{/* What selects the pods of this release. Not app.kubernetes.io/name: KubeRay sets that label on its pods itself. */}}
{{- define "expertscale.selectorLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
expertscale.io/service: {{ include "expertscale.fullname" . }}
{{- end -}}

{{/* Labels of objects other than pods: with the versions, whose change must not touch pods. */}}
{{- define "expertscale.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "expertscale.selectorLabels" . }}
{{- end -}}

{{- define "expertscale.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ default (printf "%s-cuda" $.Chart.AppVersion) .tag }}{{ end -}}
{{- end -}}
{{- end -}}

{{- define "expertscale.headServiceAccount" -}}
{{- $own := .Values.serviceAccount.create | ternary (include "expertscale.fullname" .) "default" -}}
{{- default $own .Values.serviceAccount.headName -}}
{{- end -}}

{{- define "expertscale.workerServiceAccount" -}}
{{- $own := .Values.serviceAccount.create | ternary (printf "%s-worker" (include "expertscale.fullname" .)) "default" -}}
{{- default $own .Values.serviceAccount.workerName -}}
{{- end -}}

{{/* KubeRay's name for the Service of the HTTP API. */}}
{{- define "expertscale.serveService" -}}
{{ include "expertscale.fullname" . }}-serve-svc
{{- end -}}

{{- define "expertscale.policyConfigMap" -}}
{{ default (printf "%s-policy" (include "expertscale.fullname" .)) .Values.policy.existingConfigMap }}
{{- end -}}

{{- define "expertscale.modelClaim" -}}
{{- with .Values.model.volume -}}
{{- if .existingClaim }}{{ .existingClaim }}{{ else if .claim.create }}{{ include "expertscale.fullname" $ }}-model{{ end -}}
{{- end -}}
{{- end -}}

{{/* Whether Redis is installed by this release; empty where not. */}}
{{- define "expertscale.bundledRedis" -}}
{{- if and .Values.gcsFaultTolerance.enabled (not .Values.gcsFaultTolerance.redis.address) }}true{{ end -}}
{{- end -}}

{{/* Whether a policy decides about replicas; empty where not. */}}
{{- define "expertscale.elastic" -}}
{{- if has "elastic" (list (toString .Values.serve.experts.replicas) (toString .Values.serve.router.replicas)) }}true{{ end -}}
{{- end -}}
