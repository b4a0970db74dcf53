{{/* The model: where it lies in a pod, and how it comes there. */}}

{{- define "twostroke.modelName" -}}
{{- $folder := .Values.model.pvc.path | trimSuffix "/" | base -}}
{{- coalesce .Values.model.name .Values.model.hf.repository (ternary "" $folder (has $folder (list "." "/"))) .Values.model.pvc.claimName -}}
{{- end -}}

{{/* Argument: dict root weights. A router alone on its disk fetches no weights: another folder. */}}
{{- define "twostroke.modelDir" -}}
{{- $model := .root.Values.model -}}
{{- if $model.pvc.claimName -}}
{{- printf "/models/%s" (trimPrefix "/" $model.pvc.path) | trimSuffix "/" -}}
{{- else -}}
{{- $folder := printf "%s@%s" ($model.hf.repository | replace "/" "--") ($model.hf.revision | replace "/" "--") -}}
{{- printf "/models/%s%s" $folder (ternary "" ".no-weights" .weights) -}}
{{- end -}}
{{- end -}}

{{- define "twostroke.modelVolume" -}}
{{- $model := .Values.model -}}
- name: models
  {{- if $model.pvc.claimName }}
  persistentVolumeClaim:
    claimName: {{ $model.pvc.claimName }}
    readOnly: true
  {{- else if $model.cache.enabled }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-models" (include "twostroke.fullname" .)) $model.cache.claimName }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ $model.cache.podSizeLimit }}
  {{- end }}
{{- end -}}

{{/* Fetches the model before the service starts. Argument: dict root weights securityContext. */}}
{{- define "twostroke.fetchContainer" -}}
{{- $root := .root -}}
{{- $hf := $root.Values.model.hf -}}
- name: fetch-model
  image: {{ include "twostroke.image" (dict "root" $root "image" $root.Values.images.router "where" "images.router") }}
  imagePullPolicy: {{ $root.Values.images.router.pullPolicy }}
  command: [python, -m, twostroke_cli.fetch]
  args:
    - --repository={{ $hf.repository }}
    - --revision={{ $hf.revision }}
    - --dir={{ include "twostroke.modelDir" (dict "root" $root "weights" .weights) }}
    {{- if not .weights }}
    - --without-weights
    {{- end }}
  env:
    - name: HF_HOME
      value: /tmp/huggingface
    {{- if $hf.offline }}
    - name: HF_HUB_OFFLINE
      value: "1"
    {{- end }}
    {{- with $hf.endpoint }}
    - name: HF_ENDPOINT
      value: {{ . | quote }}
    {{- end }}
    {{- if $hf.tokenSecret.name }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef:
          name: {{ $hf.tokenSecret.name }}
          key: {{ $hf.tokenSecret.key }}
    {{- end }}
    {{- include "twostroke.caEnv" $root | nindent 4 }}
  resources:
    requests: { cpu: 500m, memory: 512Mi }
    limits: { memory: 4Gi }
  securityContext:
    {{- toYaml .securityContext | nindent 4 }}
  volumeMounts:
    - name: models
      mountPath: /models
    - name: tmp
      mountPath: /tmp
    {{- include "twostroke.caMount" $root | nindent 4 }}
{{- end -}}
