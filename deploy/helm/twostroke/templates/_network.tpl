{{/* Rules of network policies. */}}

{{/* Names are asked of the cluster's DNS, wherever it runs. */}}
{{- define "twostroke.egressDns" -}}
- ports:
    - { protocol: UDP, port: 53 }
    - { protocol: TCP, port: 53 }
{{- end -}}

{{/* A port of the workers, every one that a pool has: not all network plugins know ports by name. Argument: dict root kind. */}}
{{- define "twostroke.workerPorts" -}}
{{- $ports := list -}}
{{- $kind := .kind -}}
{{- range include "twostroke.pools" .root | fromJson -}}
{{- $ports = append $ports (int (get .ports $kind)) -}}
{{- end -}}
{{- range $ports | uniq }}
- { protocol: TCP, port: {{ . }} }
{{- end }}
{{- end -}}

{{/* To a part of this release. Argument: dict root component port. */}}
{{- define "twostroke.egressTo" -}}
- to:
    - podSelector:
        matchLabels:
          {{- include "twostroke.selector" . | nindent 10 }}
  {{- with .port }}
  ports:
    - { protocol: TCP, port: {{ . }} }
  {{- end }}
{{- end -}}

{{/* To a port outside. Argument: dict root port. */}}
{{- define "twostroke.egressOutside" -}}
- ports:
    - { protocol: TCP, port: {{ .port }} }
  {{- with .root.Values.networkPolicy.externalTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* What routers and workers both reach: names, etcd, Redis, a collector, the hub. */}}
{{- define "twostroke.egressShared" -}}
{{- $values := .Values -}}
{{- include "twostroke.egressDns" . }}
{{ if $values.etcd.url -}}
{{- include "twostroke.egressOutside" (dict "root" . "port" (include "twostroke.portOf" $values.etcd.url)) }}
{{- else -}}
{{- include "twostroke.egressTo" (dict "root" . "component" "etcd" "port" 2379) }}
{{- end }}
{{ if include "twostroke.hasOwnRedis" . -}}
{{- include "twostroke.egressTo" (dict "root" . "component" "redis" "port" 6379) }}
{{- else if $values.redis.url -}}
{{- include "twostroke.egressOutside" (dict "root" . "port" (include "twostroke.portOf" $values.redis.url)) }}
{{- else -}}
{{- include "twostroke.egressOutside" (dict "root" . "port" (int $values.redis.port)) }}
{{- end }}
{{- with $values.telemetry.otlpEndpoint }}
{{ include "twostroke.egressOutside" (dict "root" $ "port" (include "twostroke.portOf" .)) }}
{{- end }}
{{- if and $values.model.hf.repository (not $values.model.hf.offline) }}
{{ include "twostroke.egressOutside" (dict "root" . "port" (include "twostroke.portOf" (default "https://huggingface.co" $values.model.hf.endpoint))) }}
{{- end }}
{{- with $values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end -}}
