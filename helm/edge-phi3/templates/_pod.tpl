{{/* Environment of every container that runs edge-phi3. */}}
{{- define "edge-phi3.env" -}}
- name: EDGE_PHI3_STORE
  value: {{ .Values.storage.mountPath | quote }}
- name: HF_HOME
  value: {{ ternary "/tmp/huggingface" (printf "%s/huggingface" .Values.storage.mountPath) (eq "true" (include "edge-phi3.isReadOnly" .)) | quote }}
{{- end -}}

{{/* Keeps a container that asked for no GPU away from the node's GPUs, where the NVIDIA runtime is the default one. */}}
{{- define "edge-phi3.noGpuEnv" -}}
- name: NVIDIA_VISIBLE_DEVICES
  value: void
{{- end -}}

{{/* The container that fetches, converts and quantises; in a pod of the service or in the job. */}}
{{- define "edge-phi3.prepareContainer" -}}
{{- $model := .Values.model -}}
name: prepare
image: {{ include "edge-phi3.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- if $model.url }}
command:
  - python
  - /etc/edge-phi3/scripts/fetch_model.py
  - --sha256
  - {{ $model.sha256 | lower | quote }}
  - {{ $model.url | quote }}
  - {{ include "edge-phi3.model" . | quote }}
{{- else }}
command:
  - edge-phi3
  - pull
  - {{ include "edge-phi3.model" . | quote }}
  - --quant
  - {{ $model.quant | quote }}
{{- end }}
env:
  {{- include "edge-phi3.env" . | nindent 2 }}
  {{- include "edge-phi3.noGpuEnv" . | nindent 2 }}
  {{- include "edge-phi3.hubEnv" . | nindent 2 }}
  {{- with $model.prepare.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $model.prepare.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts:
  {{- include "edge-phi3.modelMount" (list . false) | nindent 2 }}
  - name: tmp
    mountPath: /tmp
  {{- if $model.url }}
  - name: scripts
    mountPath: /etc/edge-phi3/scripts
    readOnly: true
  {{- end }}
{{- end -}}

{{/* How to reach the Hub, for the container that fetches the model. */}}
{{- define "edge-phi3.hubEnv" -}}
{{- $model := .Values.model -}}
- name: HF_HUB_OFFLINE
  value: {{ ternary "1" "0" $model.offline | quote }}
{{- with $model.endpoint }}
- name: HF_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- with $model.token.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: {{ $model.token.key | quote }}
{{- end }}
{{- end -}}

{{/* The mount of the model's volume: (list $ readOnly). */}}
{{- define "edge-phi3.modelMount" -}}
{{- $root := index . 0 -}}
- name: models
  mountPath: {{ $root.Values.storage.mountPath | quote }}
  {{- if and (eq $root.Values.storage.type "existingClaim") $root.Values.storage.subPath }}
  subPath: {{ $root.Values.storage.subPath | quote }}
  {{- end }}
  {{- if or (index . 1) (include "edge-phi3.isReadOnly" $root) }}
  readOnly: true
  {{- end }}
{{- end -}}

{{/* The volumes of a pod of the service or of the job. */}}
{{- define "edge-phi3.volumes" -}}
{{- $storage := .Values.storage -}}
- name: models
{{- if eq $storage.type "pvc" }}
  persistentVolumeClaim:
    claimName: {{ include "edge-phi3.fullname" . | quote }}
{{- else if eq $storage.type "existingClaim" }}
  persistentVolumeClaim:
    claimName: {{ $storage.existingClaim | quote }}
    {{- if $storage.readOnly }}
    readOnly: true
    {{- end }}
{{- else if eq $storage.type "hostPath" }}
  hostPath:
    path: {{ $storage.hostPath | quote }}
    type: {{ ternary "Directory" "DirectoryOrCreate" $storage.readOnly }}
{{- else if eq $storage.type "image" }}
  image:
    reference: {{ $storage.imageReference | quote }}
    pullPolicy: {{ .Values.image.pullPolicy }}
{{- else if eq $storage.type "ephemeral" }}
  ephemeral:
    volumeClaimTemplate:
      metadata:
        labels:
          {{- include "edge-phi3.labels" (list . "storage") | nindent 10 }}
      spec:
        {{- include "edge-phi3.claimSpec" . | nindent 8 }}
{{- else }}
  emptyDir: {}
{{- end }}
- name: tmp
  emptyDir:
    sizeLimit: {{ $storage.tmpSizeLimit }}
{{- if .Values.model.url }}
- name: scripts
  configMap:
    name: {{ include "edge-phi3.fullname" . }}-scripts
{{- end }}
{{- end -}}

{{- define "edge-phi3.claimSpec" -}}
{{- $storage := .Values.storage -}}
accessModes: [{{ $storage.accessMode }}]
{{- with $storage.storageClassName }}
storageClassName: {{ ternary "" . (eq . "-") | quote }}
{{- end }}
resources:
  requests:
    storage: {{ $storage.size }}
{{- end -}}

{{/* Where pods may run, on lines of their own: (list $ indent). The GPU's and the user's choices together. */}}
{{- define "edge-phi3.scheduling" -}}
{{- $v := (index . 0).Values -}}
{{- $selector := deepCopy $v.nodeSelector -}}
{{- $tolerations := $v.tolerations -}}
{{- if $v.gpu.enabled -}}
{{- $selector = merge $selector (default dict $v.gpu.nodeSelector) -}}
{{- $tolerations = concat (default list $v.gpu.tolerations) $v.tolerations -}}
{{- end -}}
{{- $all := dict
  "nodeSelector" $selector
  "tolerations" $tolerations
  "affinity" $v.affinity
  "priorityClassName" $v.priorityClassName
  "schedulerName" $v.schedulerName
-}}
{{- range $key, $value := $all -}}{{- if not $value -}}{{- $all = omit $all $key -}}{{- end -}}{{- end -}}
{{- if $all -}}{{- toYaml $all | nindent (index . 1) -}}{{- end -}}
{{- end -}}

{{/* Arguments of the service's container. */}}
{{- define "edge-phi3.serveArgs" -}}
- serve
- {{ include "edge-phi3.model" . | quote }}
- --quant
- {{ .Values.model.quant | quote }}
- --port
- "8080"
- --grace-period
- {{ .Values.shutdown.graceSeconds | toString | quote }}
{{- if or .Values.auth.keys .Values.auth.existingSecret }}
- --api-key-file
- {{ printf "/etc/edge-phi3/keys/%s" .Values.auth.secretKey | quote }}
{{- end }}
{{- range $flag, $value := .Values.serve.options }}
{{- if kindIs "bool" $value }}
- {{ printf "--%s%s" (ternary "" "no-" $value) $flag }}
{{- else if kindIs "slice" $value }}
{{- range $value }}
- --{{ $flag }}
- {{ . | toString | quote }}
{{- end }}
{{- else }}
- --{{ $flag }}
- {{ ternary ($value | int64 | toString) ($value | toString) (and (kindIs "float64" $value) (eq (float64 (int64 $value)) $value)) | quote }}
{{- end }}
{{- end }}
{{- end -}}
