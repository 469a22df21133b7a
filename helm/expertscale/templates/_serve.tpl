{{/* The Serve config (serveConfigV2): what `serve deploy` would take, see deployments/configs in the repository. */}}
{{- define "expertscale.serveConfig" -}}
{{- $model := dict "path" .Values.model.path "dtype" .Values.model.dtype -}}
{{- with .Values.model.name }}{{ $_ := set $model "name" . }}{{ end -}}
{{- $security := dict "allow_open" .Values.security.allowOpen "cluster_key_env" "EXPERTSCALE_CLUSTER_KEY" -}}
{{- with .Values.security.apiKeys }}{{ if .existingSecret -}}
{{- $_ := set $security "api_keys_file" (printf "/etc/expertscale/api-keys/%s" .key) -}}
{{- end }}{{ end -}}
{{- with .Values.security.adminKeys }}{{ if .existingSecret -}}
{{- $_ := set $security "admin_keys_file" (printf "/etc/expertscale/admin-keys/%s" .key) -}}
{{- end }}{{ end -}}
{{- $args := dict "model" $model "security" $security -}}
{{- $_ := set $args "experts" (set (deepCopy .Values.serve.experts) "host" "node") -}}
{{- with .Values.serve.router }}{{ $_ := set $args "router" . }}{{ end -}}
{{- with .Values.serve.ingress }}{{ $_ := set $args "ingress" . }}{{ end -}}
{{- $app := dict "name" .Values.serve.applicationName "route_prefix" "/" "import_path" "deployments.app:build" "args" $args -}}
{{- if include "expertscale.elastic" . -}}
{{- $kwargs := dict "policy_file" "/etc/expertscale/policy/policy.yaml" -}}
{{- $_ := set $app "autoscaling_policy" (dict "policy_function" "autoscale.serve_policy:ServePolicy" "policy_kwargs" $kwargs) -}}
{{- end -}}
{{- $http := dict "host" "0.0.0.0" "port" .Values.serve.port -}}
{{- $logging := dict "encoding" .Values.serve.logEncoding -}}
{{- toYaml (dict "proxy_location" "EveryNode" "http_options" $http "logging_config" $logging "applications" (list $app)) -}}
{{- end -}}
