{{/* Names, labels and images. */}}

{{- define "twostroke.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Of every object; at most 40 characters, so that a pool's name and a pod's suffix fit into 63. */}}
{{- define "twostroke.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "twostroke.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "twostroke.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "twostroke.cluster" -}}
{{- default (printf "%s.%s" .Release.Namespace (include "twostroke.fullname" .)) .Values.clusterName -}}
{{- end -}}

{{- define "twostroke.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "twostroke.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change: what selectors use. Argument: dict root component [pool]. */}}
{{- define "twostroke.selector" -}}
app.kubernetes.io/name: {{ include "twostroke.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .pool }}
twostroke/pool: {{ . }}
{{- end }}
{{- end -}}

{{- define "twostroke.labels" -}}
{{ include "twostroke.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: twostroke
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .role }}
twostroke/role: {{ . }}
{{- end }}
{{- end -}}

{{/* Labels of a pod. No versions: a new chart alone must not restart workers that took minutes to load. */}}
{{- define "twostroke.podLabels" -}}
{{ include "twostroke.selector" . }}
{{- with .role }}
twostroke/role: {{ . }}
{{- end }}
{{- end -}}

{{/* Name and labels of an object. Argument: dict root component [pool] [role] [suffix]. */}}
{{- define "twostroke.metadata" -}}
name: {{ include "twostroke.fullname" .root }}{{ with .suffix }}-{{ . }}{{ end }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "twostroke.labels" . | nindent 2 }}
{{- end -}}

{{/* An image's reference. Argument: dict root image where: where names the value in the error. */}}
{{- define "twostroke.image" -}}
{{- if not .image.repository -}}
{{- fail (printf "%s.repository is empty: say where the image is (`make images` builds it)" .where) -}}
{{- end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (toString (default .root.Chart.AppVersion .image.tag)) -}}
{{- end -}}
{{- end -}}

{{/* A number as a flag takes it: numbers of YAML are floats here, and print large integers as 1e+09. */}}
{{- define "twostroke.scalar" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end -}}

{{/* A map of flags as arguments, sorted. */}}
{{- define "twostroke.flags" -}}
{{- range $flag, $value := . }}
{{- if kindIs "bool" $value }}
- --{{ if not $value }}no-{{ end }}{{ $flag }}
{{- else if not (kindIs "invalid" $value) }}
- {{ printf "--%s=%s" $flag (include "twostroke.scalar" $value) | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The pools that are enabled, as JSON: name -> a pool over poolDefaults. */}}
{{- define "twostroke.pools" -}}
{{- $pools := dict -}}
{{- range $name, $own := .Values.pools -}}
{{- $pool := mustMergeOverwrite (deepCopy $.Values.poolDefaults) (default dict $own) -}}
{{- if and $own $pool.enabled -}}
{{- $_ := set $pools $name $pool -}}
{{- end -}}
{{- end -}}
{{- toJson $pools -}}
{{- end -}}

{{- define "twostroke.etcdUrl" -}}
{{- default (printf "http://%s-etcd:2379" (include "twostroke.fullname" .)) .Values.etcd.url -}}
{{- end -}}

{{- define "twostroke.hasOwnRedis" -}}
{{- if not (or .Values.redis.url .Values.redis.urlSecret.name) -}}yes{{- end -}}
{{- end -}}

{{/* The port of a URL, or the scheme's. */}}
{{- define "twostroke.portOf" -}}
{{- $url := urlParse . -}}
{{- $port := regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) -}}
{{- default (get (dict "https" "443" "http" "80" "redis" "6379" "rediss" "6379") $url.scheme) $port -}}
{{- end -}}
