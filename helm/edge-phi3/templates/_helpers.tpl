{{- define "edge-phi3.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* 52 characters leave room for the suffixes of derived objects within 63. */}}
{{- define "edge-phi3.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "edge-phi3.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "edge-phi3.selectorLabels" -}}
app.kubernetes.io/name: {{ include "edge-phi3.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: server
{{- end -}}

{{/* Labels of an object: (list $ "component"). The component keeps tests and jobs out of the Service. */}}
{{- define "edge-phi3.labels" -}}
{{- $root := index . 0 -}}
{{- $own := dict
  "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-")
  "app.kubernetes.io/name" (include "edge-phi3.name" $root)
  "app.kubernetes.io/instance" $root.Release.Name
  "app.kubernetes.io/component" (index . 1)
  "app.kubernetes.io/version" $root.Chart.AppVersion
  "app.kubernetes.io/managed-by" $root.Release.Service
-}}
{{- toYaml (merge $own $root.Values.commonLabels) -}}
{{- end -}}

{{/* The `annotations:` of an object, on lines of their own: (list $ indent dict...), later dictionaries win. */}}
{{- define "edge-phi3.annotations" -}}
{{- $root := index . 0 -}}
{{- $all := deepCopy $root.Values.commonAnnotations -}}
{{- range slice . 2 -}}{{- $all = mergeOverwrite $all . -}}{{- end -}}
{{- if $all -}}{{- dict "annotations" $all | toYaml | nindent (index . 1) -}}{{- end -}}
{{- end -}}

{{- define "edge-phi3.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "edge-phi3.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "edge-phi3.image" -}}
{{- $flavour := ternary "cuda" "cpu" .Values.gpu.enabled -}}
{{- $name := .Values.image.repository -}}
{{- with .Values.image.registry -}}{{- $name = printf "%s/%s" (trimSuffix "/" .) $name -}}{{- end -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" $name .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default (printf "%s-%s" .Chart.AppVersion $flavour) .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* What `edge-phi3 pull` and `edge-phi3 serve` are told to take. */}}
{{- define "edge-phi3.model" -}}
{{- $model := .Values.model -}}
{{- if $model.url -}}
{{- printf "%s/url/%s" .Values.storage.mountPath (include "edge-phi3.urlFile" .) -}}
{{- else if $model.revision -}}
{{- $parts := splitn "/" 3 $model.name -}}
{{- $file := "" -}}{{- with $parts._2 -}}{{- $file = printf "/%s" . -}}{{- end -}}
{{- printf "%s/%s@%s%s" $parts._0 $parts._1 $model.revision $file -}}
{{- else -}}
{{- $model.name -}}
{{- end -}}
{{- end -}}

{{/* Files of different contents behind one URL do not meet: the name begins with the checksum. */}}
{{- define "edge-phi3.urlFile" -}}
{{- printf "%s-%s" (trunc 12 .Values.model.sha256) (urlParse .Values.model.url | dig "path" "model.gguf" | base) -}}
{{- end -}}

{{/* "true" when the model comes from outside the volume. */}}
{{- define "edge-phi3.isRemote" -}}
{{- $model := .Values.model -}}
{{- if and (not $model.offline) (or $model.url (not (or (hasPrefix "/" $model.name) (eq $model.name "demo") (eq $model.name "phi-3-demo")))) -}}
true
{{- end -}}
{{- end -}}

{{/* "true" when the volume cannot be written. */}}
{{- define "edge-phi3.isReadOnly" -}}
{{- if or .Values.storage.readOnly (eq .Values.storage.type "image") -}}true{{- end -}}
{{- end -}}

{{/* initContainer, job or none: nothing is prepared on a volume that cannot be written, nor for a GGUF that lies there. */}}
{{- define "edge-phi3.prepareMode" -}}
{{- $isFile := and (not .Values.model.url) (hasPrefix "/" .Values.model.name) (hasSuffix ".gguf" .Values.model.name) -}}
{{- if or (include "edge-phi3.isReadOnly" .) $isFile -}}none{{- else -}}{{- .Values.model.prepare.mode -}}{{- end -}}
{{- end -}}

{{/* "true" when pods of the service fetch the model themselves, and so need to reach its source. */}}
{{- define "edge-phi3.podFetches" -}}
{{- if and (include "edge-phi3.isRemote" .) (not (include "edge-phi3.isReadOnly" .)) (ne (include "edge-phi3.prepareMode" .) "job") -}}true{{- end -}}
{{- end -}}

{{- define "edge-phi3.metricsPrefix" -}}
{{- index .Values.serve.options "metrics-prefix" | default "edge_phi3_" -}}
{{- end -}}

{{- define "edge-phi3.serviceUrl" -}}
{{- $port := ternary "" (printf ":%d" (int .Values.service.port)) (eq (int .Values.service.port) 80) -}}
http://{{ include "edge-phi3.fullname" . }}.{{ .Release.Namespace }}.svc{{ $port }}
{{- end -}}
