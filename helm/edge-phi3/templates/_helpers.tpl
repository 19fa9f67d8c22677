{{/*
Every template begins with this. A value that is null, which Helm takes away, becomes what files/empty-values.json has for it:
nothing, or the default of what cannot be nothing. A number or a yes where a text belongs, as --set makes them, becomes that text.
*/}}
{{- define "edge-phi3.init" -}}
{{- if not (hasKey .Values "isReady") -}}
{{- include "edge-phi3.fill" (list .Values (.Files.Get "files/empty-values.json" | fromJson)) -}}
{{- $_ := set .Values "isReady" true -}}
{{- $_ := set .Values.storage "mountPath" (trimSuffix "/" .Values.storage.mountPath) -}}
{{- include "edge-phi3.validate" . -}}
{{- end -}}
{{- end -}}

{{- define "edge-phi3.fill" -}}
{{- $values := index . 0 -}}
{{- $empty := index . 1 -}}
{{- range $key, $value := $empty -}}
{{- if kindIs "invalid" (index $values $key) -}}{{- $_ := set $values $key $value -}}{{- end -}}
{{- end -}}
{{- range $key, $value := $values -}}
{{- $default := index $empty $key -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $values $key -}}
{{- else if kindIs "map" $value -}}
{{- include "edge-phi3.fill" (list $value (ternary $default dict (kindIs "map" $default))) -}}
{{- if regexMatch "(?i)(labels|annotations|nodeSelector|metadata)$" $key -}}{{- include "edge-phi3.fillTexts" $value -}}{{- end -}}
{{- else if and (kindIs "slice" $value) (ne $key "extraObjects") -}}
{{- if has $key (list "args" "command" "values") -}}
{{- $texts := list -}}{{- range $value -}}{{- $texts = append $texts (include "edge-phi3.text" .) -}}{{- end -}}
{{- $_ := set $values $key $texts -}}
{{- end -}}
{{- range $value -}}
{{- if kindIs "map" . -}}
{{- if and (hasKey . "value") (has $key (list "tolerations" "extraEnv" "env")) -}}{{- $_ := set . "value" (include "edge-phi3.text" .value) -}}{{- end -}}
{{- include "edge-phi3.fill" (list . dict) -}}
{{- end -}}
{{- end -}}
{{- else if kindIs "string" $default -}}
{{- $_ := set $values $key (include "edge-phi3.text" $value) -}}
{{- else if and (kindIs "float64" $value) (eq (float64 (int64 $value)) $value) -}}
{{- /* A file of values has no other numbers, and 10000000 would be written 1e+07, which is no integer. */ -}}
{{- $_ := set $values $key (int64 $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "edge-phi3.fillTexts" -}}
{{- $values := . -}}
{{- range $key, $value := $values -}}
{{- if not (or (kindIs "map" $value) (kindIs "slice" $value)) -}}{{- $_ := set $values $key (include "edge-phi3.text" $value) -}}{{- end -}}
{{- end -}}
{{- end -}}

{{/* A value as a text: a number without an exponent, nothing for null. */}}
{{- define "edge-phi3.text" -}}
{{- if and (kindIs "float64" .) (eq (float64 (int64 .)) (float64 .)) -}}{{- int64 . -}}
{{- else if not (kindIs "invalid" .) -}}{{- . -}}{{- end -}}
{{- end -}}

{{- define "edge-phi3.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/*
52 characters leave room for the suffixes of derived objects within 63. A Service's name has no dots and begins with a letter;
a release's name need not.
*/}}
{{- define "edge-phi3.fullname" -}}
{{- $name := include "edge-phi3.name" . -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- $full = default $full .Values.fullnameOverride | replace "." "-" -}}
{{- if regexMatch "^[^a-z]" $full -}}{{- $full = printf "phi3-%s" $full -}}{{- end -}}
{{- $full | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{/* What tells the pods of one component from all others: (list $ "component"). It keeps tests and jobs out of the Service. */}}
{{- define "edge-phi3.componentLabels" -}}
app.kubernetes.io/name: {{ include "edge-phi3.name" (index . 0) | quote }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "edge-phi3.selectorLabels" -}}
{{- include "edge-phi3.componentLabels" (list . "server") -}}
{{- end -}}

{{/* Labels of pods: what selects them, and the user's. A version among them would restart every pod at each of the chart's. */}}
{{- define "edge-phi3.podLabels" -}}
{{- $v := (index . 0).Values -}}
{{- $labels := merge (include "edge-phi3.componentLabels" . | fromYaml) $v.podLabels $v.commonLabels -}}
{{- if and (eq (index . 1) "server") (or $v.inferencePool.enabled $v.httpRoute.inferencePool) -}}
{{- /* By this label an endpoint picker knows the names of the metrics. */ -}}
{{- $engine := ternary "vllm" "edge-phi3" (eq "vllm:" (include "edge-phi3.metricsPrefix" (index . 0))) -}}
{{- $labels = merge $labels (dict "llm-d.ai/engine-type" $engine) -}}
{{- end -}}
{{- toYaml $labels -}}
{{- end -}}

{{/* Labels of an object: (list $ "component"). */}}
{{- define "edge-phi3.labels" -}}
{{- $root := index . 0 -}}
{{- $own := merge (include "edge-phi3.componentLabels" . | fromYaml) (dict
  "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-")
  "app.kubernetes.io/version" $root.Chart.AppVersion
  "app.kubernetes.io/managed-by" $root.Release.Service
) -}}
{{- toYaml (merge $own $root.Values.commonLabels) -}}
{{- end -}}

{{/* The `annotations:` of an object, on lines of their own: (list $ indent dict...), later dictionaries win. */}}
{{- define "edge-phi3.annotations" -}}
{{- $root := index . 0 -}}
{{- $all := deepCopy $root.Values.commonAnnotations -}}
{{- range slice . 2 -}}{{- $all = mergeOverwrite $all . -}}{{- end -}}
{{- if $all -}}{{- dict "annotations" $all | toYaml | nindent (index . 1) -}}{{- end -}}
{{- end -}}

{{/* The account of a pod: (list $ "component"). The job runs before the release's own account exists, and has one that is a hook. */}}
{{- define "edge-phi3.serviceAccountName" -}}
{{- $root := index . 0 -}}
{{- $account := $root.Values.serviceAccount -}}
{{- if not $account.create -}}
{{- default "default" $account.name -}}
{{- else if eq (index . 1) "prepare" -}}
{{- include "edge-phi3.fullname" $root }}-prepare
{{- else -}}
{{- default (include "edge-phi3.fullname" $root) $account.name -}}
{{- end -}}
{{- end -}}

{{/* What a hook before the release is annotated with: (list weight). What succeeded or served the job goes with it. */}}
{{- define "edge-phi3.hook" -}}
helm.sh/hook: pre-install,pre-upgrade
helm.sh/hook-weight: {{ index . 0 | toString | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}

{{/* The API keys, one a line; a key of digits is a number when --set gives it. */}}
{{- define "edge-phi3.apiKeys" -}}
{{- range $index, $key := .Values.auth.keys -}}
{{- if $index }}{{ "\n" }}{{ end -}}
{{- include "edge-phi3.text" $key -}}
{{- end -}}
{{- end -}}

{{/* Whole, not by subPath: the kubelet then brings changed keys into running pods, and the service reads them anew. */}}
{{- define "edge-phi3.keysMount" -}}
- name: keys
  mountPath: /etc/edge-phi3/keys
  readOnly: true
{{- end -}}

{{- define "edge-phi3.keysVolume" -}}
- name: keys
  secret:
    secretName: {{ default (printf "%s-api-keys" (include "edge-phi3.fullname" .)) .Values.auth.existingSecret | quote }}
    defaultMode: 0440
{{- end -}}

{{/* As a list under `imagePullSecrets`, from the chart's value and the umbrella chart's; items may be names alone. */}}
{{- define "edge-phi3.pullSecrets" -}}
{{- $all := list -}}
{{- range concat .Values.image.pullSecrets .Values.global.imagePullSecrets -}}
{{- $all = append $all (ternary (dict "name" .) . (kindIs "string" .)) -}}
{{- end -}}
{{- toYaml (uniq $all) -}}
{{- end -}}

{{- define "edge-phi3.image" -}}
{{- $flavour := ternary "cuda" "cpu" .Values.gpu.enabled -}}
{{- $name := .Values.image.repository -}}
{{- with default .Values.global.imageRegistry .Values.image.registry -}}{{- $name = printf "%s/%s" (trimSuffix "/" .) $name -}}{{- end -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" $name .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default (printf "%s-%s" .Chart.AppVersion $flavour) .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The port that a URL leads to. */}}
{{- define "edge-phi3.port" -}}
{{- $url := urlParse . -}}
{{- regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (dict "https" "443" "http" "80" | dig $url.scheme "1080") -}}
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
