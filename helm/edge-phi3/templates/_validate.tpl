{{/* What values.schema.json cannot say, because it concerns two values at once. */}}
{{- define "edge-phi3.validate" -}}
{{- $v := .Values -}}
{{- if and $v.model.revision (or $v.model.url (hasPrefix "/" $v.model.name) (not (contains "/" $v.model.name))) -}}
{{- fail (printf "model.revision is %q, but model.name %q is no Hub repository; name it as owner/name, for example microsoft/Phi-3-mini-4k-instruct." $v.model.revision $v.model.name) -}}
{{- end -}}
{{- if and (not $v.model.url) (hasPrefix "/" $v.model.name) (not (hasPrefix (printf "%s/" $v.storage.mountPath) $v.model.name)) -}}
{{- fail (printf "model.name is the path %s, which does not lie under storage.mountPath %s." $v.model.name $v.storage.mountPath) -}}
{{- end -}}
{{- if and (include "edge-phi3.isReadOnly" .) $v.model.url -}}
{{- fail "model.url needs a volume that can be written; set storage.readOnly to false and storage.type to one other than image, or put the file on the volume and give its path as model.name." -}}
{{- end -}}
{{- if and (eq $v.storage.type "image") (not (hasPrefix "/" $v.model.name)) -}}
{{- fail (printf "storage.type image holds a finished model; give its path under %s as model.name, not %q." $v.storage.mountPath $v.model.name) -}}
{{- end -}}
{{- if and (eq $v.model.prepare.mode "job") (ne $v.storage.type "existingClaim") -}}
{{- fail (printf "model.prepare.mode job runs before the release's own objects exist, so it needs storage.type existingClaim, not %s; docs/deployment.md has a claim to copy." $v.storage.type) -}}
{{- end -}}
{{- if and $v.autoscaling.enabled $v.keda.enabled -}}
{{- fail "autoscaling.enabled and keda.enabled are both true; two autoscalers would fight over the number of pods." -}}
{{- end -}}
{{- range tuple "autoscaling" "keda" -}}
{{- $scaler := index $v . -}}
{{- if gt (int $scaler.minReplicas) (int $scaler.maxReplicas) -}}
{{- fail (printf "%s.minReplicas %d is more than %s.maxReplicas %d." . (int $scaler.minReplicas) . (int $scaler.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- if and $v.auth.keys $v.auth.existingSecret -}}
{{- fail "auth.keys and auth.existingSecret are both given; choose one." -}}
{{- end -}}
{{- if and $v.gpu.dra.enabled (not $v.gpu.enabled) -}}
{{- fail "gpu.dra.enabled asks for a GPU, but gpu.enabled is false." -}}
{{- end -}}
{{- if and $v.inferencePool.enabled (not $v.inferencePool.endpointPicker) -}}
{{- fail "inferencePool.enabled needs inferencePool.endpointPicker, the Service of the endpoint picker." -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled needs httpRoute.parentRefs, the Gateway to hang on: [{name: ...}]." -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.hosts) -}}
{{- fail "ingress.enabled needs ingress.hosts: [{host: ..., paths: [{path: /, pathType: Prefix}]}]." -}}
{{- end -}}
{{- $cache := index $v.serve.options "prefix-cache-mib" | default 0 | int64 -}}
{{- $limit := dig "limits" "memory" "" $v.resources -}}
{{- if and $cache (ne (toString $limit) "") -}}
{{- if ge (mulf $cache 1048576) (include "edge-phi3.bytes" $limit | float64) -}}
{{- fail (printf "serve.options.prefix-cache-mib is %d MiB; it is main memory, and resources.limits.memory %v has no room for it beside the service." $cache $limit) -}}
{{- end -}}
{{- end -}}
{{- $most := int $v.replicas -}}
{{- if $v.autoscaling.enabled -}}{{- $most = int $v.autoscaling.maxReplicas -}}{{- end -}}
{{- if $v.keda.enabled -}}{{- $most = int $v.keda.maxReplicas -}}{{- end -}}
{{- if and (gt $most 1) (eq $v.storage.type "pvc") (eq $v.storage.accessMode "ReadWriteOncePod") -}}
{{- fail (printf "storage.accessMode ReadWriteOncePod lets one pod mount the claim, but there may be %d; use ReadWriteMany, or storage.type ephemeral." $most) -}}
{{- end -}}
{{- end -}}

{{/* The bytes of a Kubernetes quantity of memory, such as 8Gi, 8G or 8589934592. */}}
{{- define "edge-phi3.bytes" -}}
{{- $number := kindIs "string" . | ternary . (printf "%.0f" (float64 .)) -}}
{{- $unit := regexFind "[A-Za-z]*$" $number -}}
{{- $units := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- /* Another unit is larger than any machine, or Kubernetes itself refuses it. */ -}}
{{- mulf (trimSuffix $unit $number) (index $units $unit | default 1e15) -}}
{{- end -}}
