{{/* What values.schema.json cannot say, because it concerns two values at once. */}}
{{- define "edge-phi3.validate" -}}
{{- include "edge-phi3.validateModel" . -}}
{{- include "edge-phi3.validateStorage" . -}}
{{- include "edge-phi3.validateNumber" . -}}
{{- include "edge-phi3.validateResources" . -}}
{{- include "edge-phi3.validateWays" . -}}
{{- end -}}

{{- define "edge-phi3.validateModel" -}}
{{- $v := .Values -}}
{{- if and $v.model.revision (or $v.model.url (hasPrefix "/" $v.model.name) (not (contains "/" $v.model.name))) -}}
{{- fail (printf "model.revision is %q, but model.name %q is no Hub repository; name it as owner/name, for example microsoft/Phi-3-mini-4k-instruct." $v.model.revision $v.model.name) -}}
{{- end -}}
{{- if and (not $v.model.url) (hasPrefix "/" $v.model.name) (not (hasPrefix (printf "%s/" $v.storage.mountPath) $v.model.name)) -}}
{{- fail (printf "model.name is the path %s, which does not lie under storage.mountPath %s." $v.model.name $v.storage.mountPath) -}}
{{- end -}}
{{- if regexMatch "^(127[.].*|localhost|::1)$" (index $v.serve.options "host" | toString) -}}
{{- fail (printf "serve.options.host is %s, where neither the Service nor the probes of the kubelet reach; leave it out, or give an address of the pod, such as 0.0.0.0." (index $v.serve.options "host")) -}}
{{- end -}}
{{- if and (include "edge-phi3.isReadOnly" .) $v.model.url -}}
{{- fail "model.url needs a volume that can be written; set storage.readOnly to false and storage.type to one other than image, or put the file on the volume and give its path as model.name." -}}
{{- end -}}
{{- if and $v.model.url (eq $v.model.prepare.mode "none") -}}
{{- fail "model.url is downloaded before the service starts, so model.prepare.mode must be initContainer or job, not none." -}}
{{- end -}}
{{- if and $v.model.caBundle.existingConfigMap $v.model.caBundle.existingSecret -}}
{{- fail "model.caBundle.existingConfigMap and model.caBundle.existingSecret are both given; choose one." -}}
{{- end -}}
{{- if and $v.auth.keys $v.auth.existingSecret -}}
{{- fail "auth.keys and auth.existingSecret are both given; choose one." -}}
{{- end -}}
{{- end -}}

{{- define "edge-phi3.validateStorage" -}}
{{- $storage := .Values.storage -}}
{{- if and (eq $storage.type "image") (not (hasPrefix "/" .Values.model.name)) -}}
{{- fail (printf "storage.type image holds a finished model; give its path under %s as model.name, not %q." $storage.mountPath .Values.model.name) -}}
{{- end -}}
{{- if regexMatch "^/(((opt|etc)/(edge-phi3|cuda)(/.*)?)|(proc|sys|dev)/.*|bin|boot|dev|etc|lib|lib64|opt|proc|root|run|sbin|sys|tmp|usr|var)$" $storage.mountPath -}}
{{- fail (printf "storage.mountPath %s would hide a folder that the container needs; choose another, such as /models." $storage.mountPath) -}}
{{- end -}}
{{- if has $storage.type (list "pvc" "ephemeral" "emptyDir") -}}
{{- if or $storage.readOnly (and (ne $storage.type "emptyDir") (eq $storage.accessMode "ReadOnlyMany")) -}}
{{- fail (printf "storage.type %s begins empty, so it must be written to; for a volume that holds the model and is only read, use storage.type existingClaim with storage.readOnly." $storage.type) -}}
{{- end -}}
{{- end -}}
{{- range tuple "existingClaim" "hostPath" "imageReference" "subPath" -}}
{{- if and (index $storage .) (eq $storage.type "pvc") -}}
{{- fail (printf "storage.%s is given, but storage.type is pvc, which makes a claim of its own; set storage.type to %s." . (dict "subPath" "existingClaim" "imageReference" "image" | dig . .)) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $storage.type "existingClaim") (eq $storage.accessMode "ReadOnlyMany") (not $storage.readOnly) -}}
{{- fail "storage.accessMode ReadOnlyMany can only be read: set storage.readOnly to true, with the model in the claim." -}}
{{- end -}}
{{- if and $storage.volumeName (ne $storage.type "pvc") -}}
{{- fail (printf "storage.volumeName binds the chart's own claim, but storage.type is %s, not pvc." $storage.type) -}}
{{- end -}}
{{- if and $storage.volumeName (include "edge-phi3.claimPerPod" .) -}}
{{- fail "storage.volumeName is one volume, but workload.kind StatefulSet makes a claim for each pod; leave one of them out." -}}
{{- end -}}
{{- if eq .Values.model.prepare.mode "job" -}}
{{- $howLong := printf "Helm waits for it, so give helm --timeout %ds as well" (int .Values.model.prepare.jobTimeoutSeconds) -}}
{{- if ne $storage.type "existingClaim" -}}
{{- fail (printf "model.prepare.mode job runs before the release's own objects exist, so it needs storage.type existingClaim, not %s; docs/deployment.md has a claim to copy. %s." $storage.type $howLong) -}}
{{- end -}}
{{- if and (eq (include "edge-phi3.prepareMode" .) "job") (hasPrefix "ReadWriteOnce" $storage.accessMode) (not .Values.nodeSelector) (not .Values.affinity) -}}
{{- fail (printf "model.prepare.mode job may run on another node than the service, and storage.accessMode %s lets one node mount the claim; give the claim's own mode if it is ReadWriteMany, or keep both on one node with nodeSelector, such as {kubernetes.io/hostname: NODE}." $storage.accessMode) -}}
{{- end -}}
{{- if and (eq (include "edge-phi3.prepareMode" .) "job") (eq $storage.accessMode "ReadWriteOncePod") -}}
{{- fail "storage.accessMode ReadWriteOncePod lets one pod mount the claim, so the job of model.prepare.mode could never run beside the service; use initContainer." -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "edge-phi3.validateNumber" -}}
{{- $v := .Values -}}
{{- if and $v.autoscaling.enabled $v.keda.enabled -}}
{{- fail "autoscaling.enabled and keda.enabled are both true; two autoscalers would fight over the number of pods." -}}
{{- end -}}
{{- range tuple "autoscaling" "keda" -}}
{{- $scaler := index $v . -}}
{{- if gt (int $scaler.minReplicas) (int $scaler.maxReplicas) -}}
{{- fail (printf "%s.minReplicas %d is more than %s.maxReplicas %d." . (int $scaler.minReplicas) . (int $scaler.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- if $v.keda.enabled -}}
{{- if and (eq 0 (int $v.keda.minReplicas)) (not $v.keda.triggers) -}}
{{- fail "keda.minReplicas 0 removes the last pod, and without a pod there is no queue to bring one back; set it to 1, or give a trigger that does not depend on pods in keda.triggers." -}}
{{- end -}}
{{- if not (or $v.serviceMonitor.enabled $v.keda.query) -}}
{{- fail "keda.enabled asks Prometheus for the queue, and nothing of this release is scraped; set serviceMonitor.enabled, or keda.query if something else scrapes the pods." -}}
{{- end -}}
{{- end -}}
{{- if and (eq $v.workload.kind "StatefulSet") (eq (default "" $v.updateStrategy.type) "Recreate") -}}
{{- fail "updateStrategy.type Recreate is a Deployment's; a StatefulSet (workload.kind) stops each old pod before its new one anyway." -}}
{{- end -}}
{{- $rolling := default dict $v.updateStrategy.rollingUpdate -}}
{{- if and (hasKey $rolling "maxSurge") (hasKey $rolling "maxUnavailable") (regexMatch "^0%?$" (toString $rolling.maxSurge)) (regexMatch "^0%?$" (toString $rolling.maxUnavailable)) -}}
{{- fail "updateStrategy.rollingUpdate has maxSurge 0 and maxUnavailable 0, so that no pod could be replaced; set maxSurge to 1, for which a second GPU must be free, or leave maxUnavailable at 1." -}}
{{- end -}}
{{- $most := int $v.replicas -}}
{{- if $v.autoscaling.enabled -}}{{- $most = int $v.autoscaling.maxReplicas -}}{{- end -}}
{{- if $v.keda.enabled -}}{{- $most = int $v.keda.maxReplicas -}}{{- end -}}
{{- if and (gt $most 1) (has $v.storage.type (list "pvc" "existingClaim")) (eq $v.storage.accessMode "ReadWriteOncePod") (not (include "edge-phi3.claimPerPod" .)) -}}
{{- fail (printf "storage.accessMode ReadWriteOncePod lets one pod mount the claim, but there may be %d; use ReadWriteMany, storage.type ephemeral, or workload.kind StatefulSet." $most) -}}
{{- end -}}
{{- end -}}

{{- define "edge-phi3.validateResources" -}}
{{- $v := .Values -}}
{{- $gpu := $v.gpu -}}
{{- if and $gpu.dra.enabled (not $gpu.enabled) -}}
{{- fail "gpu.dra.enabled asks for a GPU, but gpu.enabled is false." -}}
{{- end -}}
{{- if and $gpu.dra.existingTemplate $gpu.dra.existingClaim -}}
{{- fail "gpu.dra.existingTemplate and gpu.dra.existingClaim are both given; choose one." -}}
{{- end -}}
{{- $wanted := ternary (int $gpu.count | toString) "0" (and $gpu.enabled (not $gpu.dra.enabled)) -}}
{{- range tuple "limits" "requests" -}}
{{- $given := dig . $gpu.resourceName "" $v.resources | toString -}}
{{- if and (ne $given "") (ne $given $wanted) -}}
{{- fail (printf "resources.%s asks for %s of %s, and the values of gpu for %s; set the number in gpu.count alone." . $given $gpu.resourceName $wanted) -}}
{{- end -}}
{{- end -}}
{{- $claims := list -}}
{{- range $v.resourceClaims -}}{{- $claims = append $claims .name -}}{{- end -}}
{{- range default list $v.resources.claims -}}
{{- if not (has .name $claims) -}}
{{- fail (printf "resources.claims names %q, which is not among resourceClaims; the claim of gpu.dra is added by itself." .name) -}}
{{- end -}}
{{- end -}}
{{- if and $gpu.dra.enabled (has "gpu" $claims) -}}
{{- fail "resourceClaims has a claim of the name gpu, which gpu.dra makes itself; give it another name." -}}
{{- end -}}
{{- $cache := index $v.serve.options "prefix-cache-mib" | default 0 | int64 -}}
{{- $limit := dig "limits" "memory" "" $v.resources -}}
{{- if and $cache (ne (toString $limit) "") -}}
{{- if ge (mulf $cache 1048576) (include "edge-phi3.bytes" $limit | float64) -}}
{{- fail (printf "serve.options.prefix-cache-mib is %d MiB; it is main memory, and resources.limits.memory %v has no room for it beside the service." $cache $limit) -}}
{{- end -}}
{{- end -}}
{{- range $name, $resources := dict "resources" $v.resources "model.prepare.resources" $v.model.prepare.resources "tests.resources" $v.tests.resources -}}
{{- range $kind, $limit := default dict $resources.limits -}}
{{- $request := dig "requests" $kind "" $resources -}}
{{- if and (ne (toString $request) "") (gt (include "edge-phi3.bytes" $request | float64) (include "edge-phi3.bytes" $limit | float64)) -}}
{{- fail (printf "%s.requests.%s %v is more than %s.limits.%s %v; lower the one, or raise the other." $name $kind $request $name $kind $limit) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "edge-phi3.validateWays" -}}
{{- $v := .Values -}}
{{- if and $v.inferencePool.enabled (not $v.inferencePool.endpointPicker) -}}
{{- fail "inferencePool.enabled needs inferencePool.endpointPicker, the Service of the endpoint picker." -}}
{{- end -}}
{{- if and $v.inferencePool.enabled $v.httpRoute.inferencePool -}}
{{- fail "inferencePool.enabled makes a pool, and httpRoute.inferencePool names another one; choose one." -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled needs httpRoute.parentRefs, the Gateway to hang on: [{name: ...}]." -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.hosts) -}}
{{- fail "ingress.enabled needs ingress.hosts: [{host: ..., paths: [{path: /, pathType: Prefix}]}]." -}}
{{- end -}}
{{- range list
  (list "extraVolumes" $v.extraVolumes (list "models" "tmp" "keys" "scripts" "ca"))
  (list "extraContainers and extraInitContainers" (concat $v.extraContainers $v.extraInitContainers) (list "edge-phi3" "prepare"))
-}}
{{- $of := index . 0 -}}
{{- $names := index . 2 -}}
{{- range index . 1 -}}
{{- if has .name $names -}}
{{- fail (printf "A name in %s is %s, which the chart or another of them has already; choose another." $of .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- end -}}
{{- $names := list "http" -}}
{{- $numbers := list "8080/TCP" (printf "%d/TCP" (int $v.service.port)) -}}
{{- range include "edge-phi3.extraPorts" . | fromYamlArray -}}
{{- $number := printf "%d/%s" (int .port) .protocol -}}
{{- if or (has .name $names) (has $number $numbers) -}}
{{- fail (printf "extraContainers has the port %s (%s), which the service or another container has already; its name and number must be its own, also beside service.port and 8080." .name $number) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- $numbers = append $numbers $number -}}
{{- end -}}
{{- end -}}

{{/* The number that a Kubernetes quantity is, such as 8Gi, 8G, 8589934592 or 500m. */}}
{{- define "edge-phi3.bytes" -}}
{{- $number := include "edge-phi3.text" . -}}
{{- $unit := regexFind "[A-Za-z]*$" $number -}}
{{- $units := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- /* Another unit is larger than any machine, or Kubernetes itself refuses it. */ -}}
{{- mulf (trimSuffix $unit $number) (index $units $unit | default 1e15) -}}
{{- end -}}
