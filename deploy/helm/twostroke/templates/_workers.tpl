{{/* The pod of a worker. Argument of all: dict root name pool. */}}

{{- define "twostroke.workerImage" -}}
{{- $kind := ternary "workerGpu" "workerCpu" (eq .pool.device "cuda") -}}
{{- $image := get .root.Values.images $kind -}}
{{- $where := printf "images.%s" $kind -}}
{{- with .pool.image -}}
{{- if .repository -}}
{{- $image = . -}}
{{- else if or .tag .digest -}}
{{- $image = dict "repository" $image.repository "tag" .tag "digest" .digest -}}
{{- end -}}
{{- end -}}
{{- include "twostroke.image" (dict "root" .root "image" $image "where" $where) -}}
{{- end -}}

{{- define "twostroke.workerPullPolicy" -}}
{{- default (get .root.Values.images (ternary "workerGpu" "workerCpu" (eq .pool.device "cuda"))).pullPolicy .pool.image.pullPolicy -}}
{{- end -}}

{{- define "twostroke.initSecurityContext" -}}
{{- mustMergeOverwrite (deepCopy .root.Values.securityContext) (deepCopy .pool.securityContext) | toYaml -}}
{{- end -}}

{{- define "twostroke.workerSecurityContext" -}}
{{- $pinning := dict -}}
{{- if and .pool.rdma.resource .pool.rdma.ipcLock -}}
{{- $pinning = dict "capabilities" (dict "add" (list "IPC_LOCK")) -}}
{{- end -}}
{{- mustMergeOverwrite (deepCopy .root.Values.securityContext) $pinning (deepCopy .pool.securityContext) | toYaml -}}
{{- end -}}

{{/* Requests and limits, with what the node's plugins hand out. */}}
{{- define "twostroke.workerResources" -}}
{{- $devices := dict -}}
{{- if and (eq .pool.device "cuda") .pool.gpus.count -}}
{{- $_ := set $devices .pool.gpus.resource (int .pool.gpus.count) -}}
{{- end -}}
{{- if .pool.rdma.resource -}}
{{- $_ := set $devices .pool.rdma.resource (int .pool.rdma.count) -}}
{{- end -}}
{{- mustMergeOverwrite (dict "limits" (deepCopy $devices) "requests" (deepCopy $devices)) (deepCopy .pool.resources) | toYaml -}}
{{- end -}}

{{- define "twostroke.workerPod" -}}
{{- $values := .root.Values -}}
{{- $pool := .pool -}}
{{- $initSecurityContext := include "twostroke.initSecurityContext" . | fromYaml -}}
metadata:
  labels:
    {{- include "twostroke.podLabels" (dict "root" .root "component" "worker" "pool" .name "role" $pool.role) | nindent 4 }}
    {{- with $pool.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $pool.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- $podSecurityContext := mustMergeOverwrite (deepCopy $values.podSecurityContext) (deepCopy $pool.podSecurityContext) }}
  {{- include "twostroke.podSpec" (dict "root" .root "spec" $pool "podSecurityContext" $podSecurityContext) | nindent 2 }}
  terminationGracePeriodSeconds: {{ include "twostroke.terminationSeconds" $pool }}
  {{- if or $pool.hostNetwork $pool.cudaIpcAcrossPods }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  {{- if $pool.cudaIpcAcrossPods }}
  hostIPC: true
  hostPID: true
  {{- end }}
  {{- $hasFetch := not $values.model.pvc.claimName }}
  {{- if or $hasFetch (eq $pool.device "cuda") }}
  initContainers:
    {{- if $hasFetch }}
    {{- include "twostroke.fetchContainer" (dict "root" .root "weights" true "securityContext" $initSecurityContext) | nindent 4 }}
    {{- end }}
    {{- if eq $pool.device "cuda" }}
    {{- include "twostroke.kernelContainer" (dict "worker" . "securityContext" $initSecurityContext) | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    {{- include "twostroke.workerContainer" . | nindent 4 }}
  volumes:
    {{- include "twostroke.modelVolume" .root | nindent 4 }}
    {{- include "twostroke.workerVolumes" . | nindent 4 }}
{{- end -}}

{{/* Copies the kernels that the image brings to where more can be added. */}}
{{- define "twostroke.kernelContainer" -}}
- name: copy-kernels
  image: {{ include "twostroke.workerImage" .worker }}
  imagePullPolicy: {{ include "twostroke.workerPullPolicy" .worker }}
  command: [cp, -Ru, /opt/twostroke/kernels/., /var/cache/twostroke/triton/]
  resources:
    requests: { cpu: 100m, memory: 64Mi }
    limits: { memory: 256Mi }
  securityContext:
    {{- toYaml .securityContext | nindent 4 }}
  volumeMounts:
    - name: kernels
      mountPath: /var/cache/twostroke/triton
{{- end -}}

{{- define "twostroke.workerContainer" -}}
{{- $root := .root -}}
{{- $pool := .pool -}}
- name: worker
  image: {{ include "twostroke.workerImage" . }}
  imagePullPolicy: {{ include "twostroke.workerPullPolicy" . }}
  command: [tini, --, python, -m, {{ printf "twostroke_%s" $pool.role }}]
  args:
    - --listen={{ $root.Values.bindHost }}:{{ $pool.ports.grpc }}
    - --metrics={{ $root.Values.bindHost }}:{{ $pool.ports.metrics }}
    - --device={{ $pool.device }}
    {{- include "twostroke.commonArgs" (dict "root" $root "weights" true "grace" $pool.grace "settings" $pool.settings) | nindent 4 }}
  env:
    - name: OMP_NUM_THREADS
      value: {{ include "twostroke.scalar" (default 1 $pool.settings.threads) | quote }}
    {{- include "twostroke.commonEnv" (dict "root" $root "env" $pool.env) | nindent 4 }}
  ports:
    - name: grpc
      containerPort: {{ $pool.ports.grpc }}
    - name: metrics
      containerPort: {{ $pool.ports.metrics }}
  {{- include "twostroke.probes" (dict "port" $pool.ports.grpc "startupSeconds" $pool.startupSeconds) | nindent 2 }}
  {{- include "twostroke.preStop" $pool.preStopSeconds | nindent 2 }}
  resources:
    {{- include "twostroke.workerResources" . | nindent 4 }}
  securityContext:
    {{- include "twostroke.workerSecurityContext" . | nindent 4 }}
  volumeMounts:
    - name: models
      mountPath: /models
      readOnly: true
    - name: tmp
      mountPath: /tmp
    {{- if eq $pool.device "cuda" }}
    - name: kernels
      mountPath: /var/cache/twostroke/triton
    {{- end }}
    {{- if $pool.sharedMemory }}
    - name: shm
      mountPath: /dev/shm
    {{- end }}
    {{- include "twostroke.caMount" $root | nindent 4 }}
{{- end -}}

{{- define "twostroke.workerVolumes" -}}
- name: tmp
  emptyDir: {}
{{- if eq .pool.device "cuda" }}
- name: kernels
  {{- if .pool.kernelCache.claimName }}
  persistentVolumeClaim:
    claimName: {{ .pool.kernelCache.claimName }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ .pool.kernelCache.size }}
  {{- end }}
{{- end }}
{{- if .pool.sharedMemory }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .pool.sharedMemory }}
{{- end }}
{{- include "twostroke.caVolume" .root | nindent 0 }}
{{- end -}}
