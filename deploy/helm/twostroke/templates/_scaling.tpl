{{/* What makes a pool larger or smaller. Argument of all: dict root name pool. */}}

{{- define "twostroke.scaleTarget" -}}
{{- if .pool.leaderWorkerSet.enabled -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
{{- else -}}
apiVersion: apps/v1
kind: Deployment
{{- end }}
name: {{ include "twostroke.fullname" .root }}-{{ .name }}
{{- end -}}

{{/* One query to Prometheus. Argument: dict keda query threshold type. */}}
{{- define "twostroke.kedaTrigger" -}}
- type: prometheus
  metricType: {{ .type }}
  metadata:
    serverAddress: {{ .keda.serverAddress | quote }}
    query: {{ .query | quote }}
    threshold: {{ include "twostroke.scalar" .threshold | quote }}
  {{- with .keda.authenticationRef }}
  authenticationRef:
    name: {{ . }}
  {{- end }}
{{- end -}}

{{/* Routers and the worker itself tell the same of a worker, which `max by (worker)` counts once. */}}
{{- define "twostroke.kedaTriggers" -}}
{{- $keda := .pool.keda -}}
{{- /* A pool may be called decode and another one decode-long: pods are told apart by all of their names. */ -}}
{{- $suffix := ternary "[0-9]+(-[0-9]+)?" "[a-z0-9]+-[a-z0-9]+" .pool.leaderWorkerSet.enabled -}}
{{- $worker := printf "worker=~\"%s-%s-%s\"" (include "twostroke.fullname" .root) .name $suffix -}}
{{- $namespace := printf "namespace=\"%s\"" .root.Release.Namespace -}}
{{- if eq .pool.role "prefill" -}}
{{- $query := printf "sum(max by (worker) (twostroke_sequences{state=\"waiting\",%s,%s}))" $worker $namespace -}}
{{- include "twostroke.kedaTrigger" (dict "keda" $keda "query" $query "threshold" $keda.waiting "type" "AverageValue") -}}
{{- else -}}
{{- $usage := printf "100 * avg(max by (worker) (twostroke_kv_usage_ratio{%s,%s}))" $worker $namespace -}}
{{- include "twostroke.kedaTrigger" (dict "keda" $keda "query" $usage "threshold" $keda.kvUsagePercent "type" "Value") }}
{{ $itl := printf "1000 * histogram_quantile(0.95, sum by (le) (rate(twostroke_itl_seconds_bucket{%s}[2m])))" $namespace -}}
{{- include "twostroke.kedaTrigger" (dict "keda" (merge (dict) $keda) "query" $itl "threshold" $keda.itlMilliseconds "type" "Value") -}}
{{- end -}}
{{- end -}}
