{{/* What the schema cannot say. One line, naming the value. */}}

{{- define "twostroke.check" -}}
{{- $values := .Values -}}
{{- $model := $values.model -}}
{{- if and $model.hf.repository $model.pvc.claimName -}}
{{- fail "model.hf.repository and model.pvc.claimName: give one of them" -}}
{{- else if not (or $model.hf.repository $model.pvc.claimName) -}}
{{- fail "model: give model.hf.repository (with model.hf.revision) or model.pvc.claimName" -}}
{{- else if and $model.hf.repository (not $model.hf.revision) -}}
{{- fail "model.hf.revision is empty: name a commit of the model, so that every pod has the same" -}}
{{- else if and $model.hf.offline (not (and $model.cache.enabled $model.cache.claimName)) -}}
{{- fail "model.hf.offline: nothing is fetched, so model.cache.claimName must name a volume that holds the model" -}}
{{- end -}}
{{- if and $values.etcd.persistence.enabled $values.etcd.url -}}
{{- fail "etcd.persistence.enabled: etcd.url names an etcd that is not the chart's" -}}
{{- else if and (gt (int $values.etcd.replicas) 1) (not $values.etcd.persistence.enabled) (not $values.etcd.url) -}}
{{- fail "etcd.replicas: more than one member needs etcd.persistence.enabled" -}}
{{- end -}}
{{- if and $values.redis.url $values.redis.urlSecret.name -}}
{{- fail "redis.url and redis.urlSecret.name: give one of them" -}}
{{- else if and $values.redis.passwordSecret.name (not (include "twostroke.hasOwnRedis" .)) -}}
{{- fail "redis.passwordSecret.name is of the chart's Redis; a URL brings its own password (redis.urlSecret)" -}}
{{- end -}}
{{- if and $values.ingress.enabled (not $values.ingress.hosts) -}}
{{- fail "ingress.hosts is empty: name a host" -}}
{{- end -}}
{{- if and (or $values.gateway.http.enabled $values.gateway.grpc.enabled) (not $values.gateway.parentRefs) -}}
{{- fail "gateway.parentRefs is empty: name the Gateway that the routes are for" -}}
{{- end -}}
{{- $decode := 0 -}}
{{- range $name, $pool := include "twostroke.pools" . | fromJson -}}
{{- include "twostroke.checkPool" (dict "root" $ "name" $name "pool" $pool) -}}
{{- if eq $pool.role "decode" -}}{{- $decode = add1 $decode -}}{{- end -}}
{{- end -}}
{{- if not $decode -}}
{{- fail "pools: no pool with role decode is enabled; a decode pool alone serves by itself, a prefill pool alone does not" -}}
{{- end -}}
{{- end -}}

{{- define "twostroke.checkPool" -}}
{{- $where := printf "pools.%s" .name -}}
{{- with .pool -}}
{{- if and .hpa.enabled .keda.enabled -}}
{{- fail (printf "%s: hpa.enabled and keda.enabled: one of them scales a pool" $where) -}}
{{- else if and .keda.enabled (not .keda.triggers) (not .keda.serverAddress) -}}
{{- fail (printf "%s.keda.serverAddress is empty: name the Prometheus that KEDA asks" $where) -}}
{{- end -}}
{{- if .leaderWorkerSet.enabled -}}
{{- if not .leaderWorkerSet.preview -}}
{{- fail (printf "%s.leaderWorkerSet: the engine has no tensor parallelism yet, over hosts or within one; leaderWorkerSet.preview=true renders the group all the same" $where) -}}
{{- else if not ($.root.Capabilities.APIVersions.Has "leaderworkerset.x-k8s.io/v1") -}}
{{- fail (printf "%s.leaderWorkerSet: this Kubernetes has no leaderworkerset.x-k8s.io/v1 (install LeaderWorkerSet first)" $where) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
