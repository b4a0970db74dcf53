{{/* What the pods of all services have in common. */}}

{{- define "twostroke.caEnv" -}}
{{- if .Values.tls.caSecret.name -}}
- name: SSL_CERT_FILE
  value: /etc/twostroke/ca/ca.crt
- name: OTEL_EXPORTER_OTLP_CERTIFICATE
  value: /etc/twostroke/ca/ca.crt
{{- end -}}
{{- end -}}

{{- define "twostroke.caMount" -}}
{{- if .Values.tls.caSecret.name -}}
- name: ca
  mountPath: /etc/twostroke/ca
  readOnly: true
{{- end -}}
{{- end -}}

{{- define "twostroke.caVolume" -}}
{{- with .Values.tls.caSecret -}}
{{- if .name -}}
- name: ca
  secret:
    secretName: {{ .name }}
    items: [{ key: {{ .key }}, path: ca.crt }]
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Flags that every service takes. Argument: dict root weights grace settings. */}}
{{- define "twostroke.commonArgs" -}}
{{- $root := .root -}}
{{- $telemetry := $root.Values.telemetry -}}
- --cluster={{ include "twostroke.cluster" $root }}
- --etcd={{ include "twostroke.etcdUrl" $root }}
- --model-dir={{ include "twostroke.modelDir" (dict "root" $root "weights" .weights) }}
- --model-name={{ include "twostroke.modelName" $root }}
- --grace={{ include "twostroke.scalar" .grace }}
- --log-format={{ $telemetry.logFormat }}
{{- with $telemetry.otlpEndpoint }}
- --otlp-endpoint={{ . }}
- --otlp-protocol={{ $telemetry.otlpProtocol }}
- --trace-sample={{ include "twostroke.scalar" $telemetry.traceSample }}
{{- end }}
{{- if not $telemetry.vllmMetrics }}
- --no-vllm-metrics
{{- end }}
{{- include "twostroke.flags" (mergeOverwrite (deepCopy $root.Values.settings) .settings) }}
{{- end -}}

{{/* Environment that every service gets. Argument: dict root env. */}}
{{- define "twostroke.commonEnv" -}}
{{- $root := .root -}}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
- name: TWOSTROKE_ID
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: OTEL_RESOURCE_ATTRIBUTES
  value: k8s.namespace.name={{ $root.Release.Namespace }},k8s.pod.name=$(TWOSTROKE_ID),k8s.node.name=$(NODE_NAME)
{{- if $root.Values.redis.urlSecret.name }}
- name: TWOSTROKE_REDIS
  valueFrom:
    secretKeyRef:
      name: {{ $root.Values.redis.urlSecret.name }}
      key: {{ $root.Values.redis.urlSecret.key }}
{{- else if $root.Values.redis.url }}
- name: TWOSTROKE_REDIS
  value: {{ $root.Values.redis.url | quote }}
{{- else }}
{{- $address := printf "%s-redis:6379" (include "twostroke.fullname" $root) }}
{{- if $root.Values.redis.passwordSecret.name }}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ $root.Values.redis.passwordSecret.name }}
      key: {{ $root.Values.redis.passwordSecret.key }}
- name: TWOSTROKE_REDIS
  value: redis://:$(REDIS_PASSWORD)@{{ $address }}
{{- else }}
- name: TWOSTROKE_REDIS
  value: redis://{{ $address }}
{{- end }}
{{- end }}
{{- include "twostroke.caEnv" $root | nindent 0 }}
{{- with .env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Probes by gRPC health. Argument: dict port startupSeconds. */}}
{{- define "twostroke.probes" -}}
startupProbe:
  grpc: { port: {{ .port }} }
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: {{ ceil (divf .startupSeconds 5) | int }}
readinessProbe:
  grpc: { port: {{ .port }} }
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
livenessProbe:
  grpc: { port: {{ .port }} }
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}

{{- define "twostroke.preStop" -}}
{{- if . -}}
lifecycle:
  preStop:
    exec:
      command: [sleep, {{ include "twostroke.scalar" . | quote }}]
{{- end -}}
{{- end -}}

{{/* Seconds from the first word of a stop to SIGKILL. Argument: a router or a pool. */}}
{{- define "twostroke.terminationSeconds" -}}
{{- ceil (addf .preStopSeconds .grace .shutdownMarginSeconds) | int -}}
{{- end -}}

{{/* The first lines of a pod's spec. Argument: dict root spec podSecurityContext. */}}
{{- define "twostroke.podSpec" -}}
{{- $root := .root -}}
serviceAccountName: {{ include "twostroke.serviceAccount" $root }}
automountServiceAccountToken: false
# Kubernetes would set TWOSTROKE_..._PORT for services of such names: close to what services read their settings from.
enableServiceLinks: false
{{- with $root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  {{- toYaml .podSecurityContext | nindent 2 }}
{{- with .spec.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .spec.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}
