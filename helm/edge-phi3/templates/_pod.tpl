{{/*
What every pod of the release has: (list $ "component"). Only the service's pods need a GPU's node; a job may run on any, but
has the tolerations, so that it may run beside them.
*/}}
{{- define "edge-phi3.podSpec" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $v := $root.Values -}}
{{- $selector := $v.nodeSelector -}}
{{- if and $v.gpu.enabled (eq $component "server") -}}{{- $selector = merge (deepCopy $selector) $v.gpu.nodeSelector -}}{{- end -}}
{{- $all := dict
  "imagePullSecrets" (include "edge-phi3.pullSecrets" $root | fromYamlArray)
  "securityContext" $v.podSecurityContext
  "dnsPolicy" $v.dnsPolicy
  "dnsConfig" $v.dnsConfig
  "hostAliases" $v.hostAliases
  "nodeSelector" $selector
  "tolerations" (concat (ternary $v.gpu.tolerations list $v.gpu.enabled) $v.tolerations)
  "affinity" $v.affinity
  "priorityClassName" $v.priorityClassName
  "schedulerName" $v.schedulerName
-}}
{{- range $key, $value := $all -}}{{- if not $value -}}{{- $all = omit $all $key -}}{{- end -}}{{- end -}}
serviceAccountName: {{ include "edge-phi3.serviceAccountName" . | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $all }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* One list of environment variables out of several: of those with one name the last, which is the user's, counts. */}}
{{- define "edge-phi3.joinEnv" -}}
{{- $all := list -}}{{- range . -}}{{- $all = concat $all . -}}{{- end -}}
{{- $names := list -}}{{- range $all -}}{{- $names = append $names .name -}}{{- end -}}
{{- $joined := list -}}
{{- range $index, $item := $all -}}
{{- if not (has $item.name (slice $names (add1 $index))) -}}{{- $joined = append $joined $item -}}{{- end -}}
{{- end -}}
{{- toYaml $joined -}}
{{- end -}}

{{/* Environment of every container that runs edge-phi3. */}}
{{- define "edge-phi3.env" -}}
- name: EDGE_PHI3_STORE
  value: {{ .Values.storage.mountPath | quote }}
- name: HF_HOME
  value: {{ ternary "/tmp/huggingface" (printf "%s/huggingface" .Values.storage.mountPath) (eq "true" (include "edge-phi3.isReadOnly" .)) | quote }}
{{- if include "edge-phi3.caVolume" . }}
# OpenSSL's variable, which Python follows, and that of requests, which sends traces.
- name: SSL_CERT_FILE
  value: /etc/edge-phi3/ca/ca.crt
- name: REQUESTS_CA_BUNDLE
  value: /etc/edge-phi3/ca/ca.crt
{{- end }}
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
  {{- $own := printf "%s\n%s\n%s" (include "edge-phi3.env" .) (include "edge-phi3.noGpuEnv" .) (include "edge-phi3.hubEnv" .) | fromYamlArray }}
  {{- include "edge-phi3.joinEnv" (list $own .Values.extraEnv $model.prepare.extraEnv) | nindent 2 }}
{{- with .Values.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $model.prepare.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts:
  {{- include "edge-phi3.mounts" (list . false) | nindent 2 }}
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

{{/* The mounts of a container that runs edge-phi3, the model's among them: (list $ readOnly). */}}
{{- define "edge-phi3.mounts" -}}
{{- $root := index . 0 -}}
- name: models
  mountPath: {{ $root.Values.storage.mountPath | quote }}
  {{- if and (eq $root.Values.storage.type "existingClaim") $root.Values.storage.subPath }}
  subPath: {{ $root.Values.storage.subPath | quote }}
  {{- end }}
  {{- if or (index . 1) (include "edge-phi3.isReadOnly" $root) }}
  readOnly: true
  {{- end }}
- name: tmp
  mountPath: /tmp
{{- if include "edge-phi3.caVolume" $root }}
- name: ca
  mountPath: /etc/edge-phi3/ca
  readOnly: true
{{- end }}
{{- with $root.Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The volumes of a pod of the service or of the job: (list $ withScripts). */}}
{{- define "edge-phi3.volumes" -}}
{{- $root := index . 0 -}}
{{- $storage := $root.Values.storage -}}
{{- if not (include "edge-phi3.claimPerPod" $root) -}}
- name: models
{{- if eq $storage.type "pvc" }}
  persistentVolumeClaim:
    claimName: {{ include "edge-phi3.fullname" $root | quote }}
{{- else if eq $storage.type "existingClaim" }}
  persistentVolumeClaim:
    claimName: {{ $storage.existingClaim | quote }}
    {{- if $storage.readOnly }}
    readOnly: true
    {{- end }}
{{- else if eq $storage.type "hostPath" }}
  # Not DirectoryOrCreate: root would own the folder, and the service could not write to it.
  hostPath:
    path: {{ $storage.hostPath | quote }}
    type: Directory
{{- else if eq $storage.type "image" }}
  image:
    reference: {{ $storage.imageReference | quote }}
    pullPolicy: {{ $root.Values.image.pullPolicy }}
{{- else if eq $storage.type "ephemeral" }}
  ephemeral:
    volumeClaimTemplate:
      metadata:
        labels:
          {{- include "edge-phi3.componentLabels" (list $root "storage") | nindent 10 }}
      spec:
        {{- include "edge-phi3.claimSpec" $root | nindent 8 }}
{{- else }}
  emptyDir: {}
{{- end }}
{{- end }}
- name: tmp
  emptyDir:
    sizeLimit: {{ $storage.tmpSizeLimit }}
{{- include "edge-phi3.caVolume" $root }}
{{- if index . 1 }}
- name: scripts
  configMap:
    name: {{ include "edge-phi3.fullname" $root }}-scripts
{{- end }}
{{- with $root.Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The volume with the certificates of model.caBundle; empty without. */}}
{{- define "edge-phi3.caVolume" -}}
{{- $bundle := .Values.model.caBundle -}}
{{- if or $bundle.existingConfigMap $bundle.existingSecret }}
- name: ca
  {{- if $bundle.existingConfigMap }}
  configMap:
    name: {{ $bundle.existingConfigMap | quote }}
  {{- else }}
  secret:
    secretName: {{ $bundle.existingSecret | quote }}
  {{- end }}
    items: [{key: {{ $bundle.key | quote }}, path: ca.crt}]
{{- end }}
{{- end -}}

{{- define "edge-phi3.claimSpec" -}}
{{- $storage := .Values.storage -}}
accessModes: [{{ $storage.accessMode }}]
{{- with $storage.storageClassName }}
storageClassName: {{ ternary "" . (eq . "-") | quote }}
{{- end }}
{{- if and $storage.volumeName (eq $storage.type "pvc") }}
volumeName: {{ $storage.volumeName | quote }}
{{- end }}
resources:
  requests:
    storage: {{ $storage.size }}
{{- end -}}

{{/* "true" when each pod of a StatefulSet has a claim of its own. */}}
{{- define "edge-phi3.claimPerPod" -}}
{{- if and (eq .Values.workload.kind "StatefulSet") (eq .Values.storage.type "pvc") -}}true{{- end -}}
{{- end -}}

{{/* The ports of extraContainers, and of extraInitContainers that stay (sidecars), as a list of {name, port, protocol}. */}}
{{- define "edge-phi3.extraPorts" -}}
{{- $ports := list -}}
{{- $staying := .Values.extraContainers -}}
{{- range .Values.extraInitContainers -}}{{- if eq (toString .restartPolicy) "Always" -}}{{- $staying = append $staying . -}}{{- end -}}{{- end -}}
{{- range $staying -}}
{{- range .ports -}}
{{- $port := int .containerPort -}}
{{- $ports = append $ports (dict "name" (default (printf "port-%d" $port) .name) "port" $port "protocol" (default "TCP" .protocol)) -}}
{{- end -}}
{{- end -}}
{{- toYaml $ports -}}
{{- end -}}

{{/* The resources of the service's container. */}}
{{- define "edge-phi3.resources" -}}
{{- $gpu := .Values.gpu -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if and $gpu.enabled $gpu.dra.enabled -}}
{{- $_ := set $resources "claims" (append (default list $resources.claims) (dict "name" "gpu")) -}}
{{- else if $gpu.enabled -}}
{{- $resources = mergeOverwrite $resources (dict "limits" (dict $gpu.resourceName (int $gpu.count))) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Environment of the service's container, before the user's. */}}
{{- define "edge-phi3.serveEnv" -}}
{{- $v := .Values -}}
{{- include "edge-phi3.env" . }}
- name: EDGE_PHI3_HOST
  value: "::"
{{- if or (not $v.gpu.enabled) $v.gpu.dra.enabled }}
{{ include "edge-phi3.noGpuEnv" . }}
{{- end }}
{{- if and (eq (include "edge-phi3.prepareMode" .) "none") (not (include "edge-phi3.isReadOnly" .)) }}
- name: CUDA_CACHE_PATH
  value: {{ printf "%s/cuda-cache" $v.storage.mountPath | quote }}
{{ include "edge-phi3.hubEnv" . }}
{{- else }}
- name: CUDA_CACHE_PATH
  value: /tmp/cuda-cache
# The model is on the volume by now; the service itself never needs the Hub, nor a token for it.
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- end -}}

{{/* Arguments of the service's container. */}}
{{- define "edge-phi3.serveArgs" -}}
{{- $options := .Values.serve.options -}}
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
{{- if and .Values.gpu.enabled (not (hasKey $options "require-gpu")) (ne (index $options "n-gpu-layers" | toString) "0") }}
- --require-gpu
{{- end }}
{{- range .Values.serve.adapters }}
- --lora
{{- $strength := ternary .strength 1 (hasKey . "strength") }}
- {{ ternary (printf "%s=%s:%v" .name .file $strength) (printf "%s=%v" .file $strength) (hasKey . "name") | quote }}
{{- end }}
{{- range $flag, $value := $options }}
{{- if kindIs "bool" $value }}
- {{ printf "--%s%s" (ternary "" "no-" $value) $flag }}
{{- else if kindIs "slice" $value }}
{{- range $value }}
- --{{ $flag }}
- {{ . | toString | quote }}
{{- end }}
{{- else }}
- --{{ $flag }}
- {{ include "edge-phi3.text" $value | quote }}
{{- end }}
{{- end }}
{{- with index $options "allowed-host" }}
# The name by which `helm test` and the cluster call the service.
- --allowed-host
- {{ printf "%s.%s.svc" (include "edge-phi3.fullname" $) $.Release.Namespace | quote }}
{{- end }}
{{- end -}}
