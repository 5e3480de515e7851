{{- define "gannet.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- /* Release `gannet` gives gannet-agent, release `x` x-gannet-agent. */}}
{{- define "gannet.fullname" -}}
{{- $name := include "gannet.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "gannet.agent" -}}{{ include "gannet.fullname" . }}-agent{{- end }}
{{- define "gannet.collector" -}}{{ include "gannet.fullname" . }}-collector{{- end }}

{{- /* Called with (dict "root" $ "component" "agent"). */}}
{{- define "gannet.selector" -}}
app.kubernetes.io/name: {{ include "gannet.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "gannet.labels" -}}
{{ include "gannet.selector" . }}
app.kubernetes.io/part-of: gannet
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Without versions, so that a new chart version alone restarts no pod. */}}
{{- define "gannet.podLabels" -}}
{{ include "gannet.selector" . }}
app.kubernetes.io/part-of: gannet
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Called with (dict "root" $ "image" .Values.agent.image). */}}
{{- define "gannet.image" -}}
{{- $i := .image -}}
{{- if $i.registry }}{{ trimSuffix "/" $i.registry }}/{{ end }}{{ $i.repository }}
{{- if $i.digest }}@{{ $i.digest }}{{ else }}:{{ $i.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- /*
The kernels of Debian and Ubuntu have levels of kernel.perf_event_paranoid above 2, which are their default. They ask for
SYS_ADMIN then, not for PERFMON. Only `helm install` and `upgrade` can ask the cluster for its nodes, not `helm template`.
*/}}
{{- define "gannet.agent.capabilities" -}}
{{- $all := .Values.agent.capabilities -}}
{{- $mode := toString .Values.agent.sysAdmin -}}
{{- $admin := eq $mode "true" -}}
{{- if eq $mode "auto" -}}
{{- range (lookup "v1" "Node" "" "").items -}}
{{- $kernel := .status.nodeInfo.kernelVersion -}}
{{- if and (contains "Debian" .status.nodeInfo.osImage) (regexMatch "-(amd64|arm64)$" $kernel) -}}
{{- $admin = true -}}
{{- else if and (contains "Ubuntu" .status.nodeInfo.osImage) (regexMatch "-(generic|lowlatency|aws|azure|gcp|gke|gkeop|ibm|kvm|nvidia|oracle|raspi)" $kernel) -}}
{{- $admin = true -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $admin (not (has "SYS_ADMIN" $all)) }}{{ $all = append $all "SYS_ADMIN" }}{{ end -}}
{{- toJson $all -}}
{{- end }}

{{- define "gannet.agent.serviceAccount" -}}
{{- if .Values.agent.serviceAccount.create -}}{{ .Values.agent.serviceAccount.name | default (include "gannet.agent" .) }}
{{- else -}}{{ .Values.agent.serviceAccount.name | default "default" }}{{- end -}}
{{- end }}

{{- define "gannet.collector.serviceAccount" -}}
{{- if .Values.collector.serviceAccount.create -}}{{ .Values.collector.serviceAccount.name | default (include "gannet.collector" .) }}
{{- else -}}{{ .Values.collector.serviceAccount.name | default "default" }}{{- end -}}
{{- end }}


{{- /* The Secret of one part: (dict "root" $ "part" "agent"). */}}
{{- define "gannet.tls.secret" -}}
{{- if eq .root.Values.tls.mode "existingSecrets" -}}{{ get .root.Values.tls.existingSecrets .part }}
{{- else -}}{{ include "gannet.fullname" .root }}-{{ .part }}-tls{{- end -}}
{{- end }}

{{- /* The names in the collector's certificate. */}}
{{- define "gannet.tls.names" -}}
{{- $name := include "gannet.collector" . -}}
{{- $ns := .Release.Namespace -}}
{{- list (printf "%s.%s.svc" $name $ns) (printf "%s.%s" $name $ns) $name (printf "%s.%s.svc.cluster.local" $name $ns) "localhost" | toJson -}}
{{- end }}

{{- define "gannet.collectorUrl" -}}
{{- if .Values.collector.enabled -}}
{{- printf "%s://%s.%s.svc:%v" (ne .Values.tls.mode "insecure" | ternary "https" "http") (include "gannet.collector" .) .Release.Namespace .Values.collector.service.grpcPort -}}
{{- else -}}{{ .Values.agent.collectorUrl }}{{- end -}}
{{- end }}

{{- /* Whether agents prove their node by a token: from 1.30 on, Kubernetes reports the node of a token's pod. */}}
{{- define "gannet.tokens" -}}
{{- $by := .Values.collector.nodeIdentity -}}
{{- if and (ne .Values.tls.mode "insecure") .Values.collector.enabled (or (eq $by "token") (and (eq $by "auto") (semverCompare ">=1.30-0" .Capabilities.KubeVersion.Version))) -}}true{{- end -}}
{{- end }}

{{- /* The audience of the agents' tokens: no other service accepts them, and the collector accepts no other. */}}
{{- define "gannet.audience" -}}{{ include "gannet.collector" . }}.{{ .Release.Namespace }}{{- end }}

{{- /* Whether the agent may ask kubelet or API server for pods. */}}
{{- define "gannet.agent.readsPods" -}}
{{- if and .Values.agent.enabled .Values.rbac.create (not (has .Values.agent.kubelet.source (list "none" "podinfo"))) }}true{{ end -}}
{{- end }}

{{- /* Whether rules are TriggerRule resources. */}}
{{- define "gannet.collector.keepsResources" -}}
{{- if and .Values.collector.enabled .Values.rbac.create (eq .Values.collector.rulesStore "kubernetes") }}true{{ end -}}
{{- end }}

{{- /* Whether the collector asks the API server about the tokens of agents. */}}
{{- define "gannet.collector.reviewsTokens" -}}
{{- if and .Values.collector.enabled .Values.rbac.create (include "gannet.tokens" .) }}true{{ end -}}
{{- end }}

{{- /* Whether cert-manager signs with an authority of this release. */}}
{{- define "gannet.tls.ownIssuer" -}}
{{- if and (eq .Values.tls.mode "certManager") (not .Values.tls.certManager.issuerRef) }}true{{ end -}}
{{- end }}

{{- /* The parts that have a certificate, as a JSON list. */}}
{{- define "gannet.tls.parts" -}}
{{- $parts := list -}}
{{- if .Values.collector.enabled }}{{ $parts = concat $parts (list "collector" "client") }}{{ end -}}
{{- if .Values.agent.enabled }}{{ $parts = append $parts "agent" }}{{ end -}}
{{- toJson $parts -}}
{{- end }}

{{- /* The options that the agent reads at its start. */}}
{{- define "gannet.agent.config" -}}
{{- $a := .Values.agent -}}
{{- $tls := ne .Values.tls.mode "insecure" -}}
{{- $c := dict
  "endpoint" (include "gannet.collectorUrl" .)
  "state_dir" "/var/lib/gannet"
  "http_listen" (printf "%s:8081" .Values.listenAddress)
  "pod_source" $a.kubelet.source
  "rules" (list "/etc/gannet/rules.yaml") -}}
{{- if include "gannet.tokens" . }}{{- $_ := set $c "token_file" "/run/gannet/token/token" }}{{- end -}}
{{- with .Values.clusterName }}{{- $_ := set $c "cluster" . }}{{- end -}}
{{- if include "gannet.podinfo" . }}{{- $_ := set $c "podinfo_socket" $a.kubelet.podInfoSocket }}{{- end -}}
{{- with $a.debugInfoUpload -}}
{{- if .enabled -}}
{{- $c = merge $c (dict "debuginfo_upload" true "debuginfo_upload_rate" .rate "debuginfo_upload_file_bytes" .fileBytes) -}}
{{- end -}}
{{- end -}}
{{- if $tls -}}
{{- $c = merge $c (dict "tls_ca" "/run/gannet/tls/ca.crt" "tls_cert" "/run/gannet/tls/tls.crt" "tls_key" "/run/gannet/tls/tls.key") -}}
{{- else -}}
{{- $c = merge $c (dict "insecure" true) -}}
{{- end -}}
{{- toYaml (merge $c $a.config) -}}
{{- end }}

{{- /* Refuses values that contradict each other, and names the cure. */}}
{{- define "gannet.check" -}}
{{- $v := .Values -}}
{{- range $key := list "podMonitor" "serviceMonitor" "prometheusRule" "dashboard" }}
{{- if hasKey $v $key }}
{{- fail (printf "%s has moved: write monitoring.%s" $key $key) }}
{{- end }}
{{- end }}
{{- if not (or $v.agent.enabled $v.collector.enabled) }}
{{- fail "agent.enabled and collector.enabled are both false: nothing would be installed" }}
{{- end }}
{{- if $v.collector.enabled }}
{{- if $v.agent.collectorUrl }}
{{- fail "agent.collectorUrl is set while this release has a collector of its own: set collector.enabled to false, or leave agent.collectorUrl empty" }}
{{- end }}
{{- else }}
{{- if not $v.agent.collectorUrl }}
{{- fail "collector.enabled is false: name the collector that the agents dial (agent.collectorUrl: https://HOST:4100)" }}
{{- end }}
{{- if eq $v.tls.mode "helm" }}
{{- fail "tls.mode is helm, but a collector elsewhere does not know the certificates of this release: set tls.mode to existingSecrets or certManager" }}
{{- end }}
{{- if and (hasPrefix "http://" $v.agent.collectorUrl) (ne $v.tls.mode "insecure") }}
{{- fail "agent.collectorUrl is http:// (plaintext) while tls.mode is not insecure: write https://, or set tls.mode to insecure if the network is trusted" }}
{{- end }}
{{- end }}
{{- if and (eq $v.tls.mode "existingSecrets") (or (and $v.agent.enabled (not $v.tls.existingSecrets.agent)) (and $v.collector.enabled (not (and $v.tls.existingSecrets.collector $v.tls.existingSecrets.client)))) }}
{{- fail "tls.mode is existingSecrets: name the Secrets in tls.existingSecrets.collector, .agent and .client (each with tls.crt, tls.key and ca.crt)" }}
{{- end }}
{{- if and (eq $v.tls.mode "certManager") (not $v.collector.enabled) (not $v.tls.certManager.issuerRef) }}
{{- fail "tls.mode is certManager without a collector in this release: name the issuer that the collector elsewhere trusts (tls.certManager.issuerRef)" }}
{{- end }}
{{- if and (eq $v.collector.nodeIdentity "token") (eq $v.tls.mode "insecure") }}
{{- fail "collector.nodeIdentity is token while tls.mode is insecure: tokens would go over the network in plaintext" }}
{{- end }}
{{- if and (eq $v.collector.rulesStore "kubernetes") $v.collector.enabled (not $v.collector.serviceAccount.create) (not $v.collector.serviceAccount.name) }}
{{- fail "collector.rulesStore is kubernetes: the collector needs a service account of its own (collector.serviceAccount.create or .name), or set collector.rulesStore to file" }}
{{- end }}
{{- if and (gt (int $v.collector.replicas) 1) (not (and $v.collector.bucket.url (eq $v.collector.rulesStore "kubernetes"))) }}
{{- fail "collector.replicas is above 1, and collectors share only a bucket and resources: set collector.bucket.url, and collector.rulesStore to kubernetes" }}
{{- end }}
{{- if and $v.collector.bucket.existingSecret (not $v.collector.bucket.url) }}
{{- fail "collector.bucket.existingSecret is set without collector.bucket.url" }}
{{- end }}
{{- if and $v.collector.clickhouse.url (not (or $v.collector.clickhouse.tables $v.collector.bucket.url)) }}
{{- fail "collector.clickhouse.url is set, and the server cannot read the volume of the collector: set collector.bucket.url, or collector.clickhouse.tables" }}
{{- end }}
{{- if and $v.collector.clickhouse.passwordSecret.name (not $v.collector.clickhouse.user) }}
{{- fail "collector.clickhouse.passwordSecret is set without the user to whom the password belongs: set collector.clickhouse.user" }}
{{- end }}
{{- if and (gt (int $v.collector.replicas) 1) $v.collector.persistence.existingClaim }}
{{- fail "collector.persistence.existingClaim belongs to one collector: leave it empty where collector.replicas is above 1" }}
{{- end }}
{{- if and $v.collector.persistence.existingClaim (not $v.collector.persistence.enabled) }}
{{- fail "collector.persistence.existingClaim is set while collector.persistence.enabled is false" }}
{{- end }}
{{- if and $v.collector.httpRoute.enabled (not $v.collector.httpRoute.parentRefs) }}
{{- fail "collector.httpRoute.enabled: name the gateway in collector.httpRoute.parentRefs" }}
{{- end }}
{{- if and $v.collector.ingress.enabled (not $v.collector.ingress.hosts) }}
{{- fail "collector.ingress.enabled: name a host in collector.ingress.hosts" }}
{{- end }}
{{- if and (eq $v.agent.kubelet.source "podinfo") (not $v.agent.kubelet.podInfoSocket) }}
{{- fail "agent.kubelet.source is podinfo: name the kubelet's socket in agent.kubelet.podInfoSocket" }}
{{- end }}
{{- range $key := list "endpoint" "node" "rules" "state_dir" "http_listen" "debug_listen" "pod_source" "podinfo_socket" "cluster" "insecure" "tls_ca" "tls_cert" "tls_key" "token_file" }}
{{- if hasKey $v.agent.config $key }}
{{- fail (printf "agent.config.%s is set by the chart: use the value for it (agent.collectorUrl, agent.rules, agent.stateHostPath, agent.kubelet, clusterName, listenAddress, tls)" $key) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Whether the agent tries the kubelet's own stream of pods. */}}
{{- define "gannet.podinfo" -}}
{{- $k := .Values.agent.kubelet -}}
{{- if or (eq $k.source "podinfo") (and (eq $k.source "auto") $k.podInfoSocket) }}true{{ end -}}
{{- end }}

{{- /* Whether the chart can look objects up: in `helm install` and `upgrade`, and with --dry-run=server. `helm template` cannot. */}}
{{- define "gannet.inCluster" -}}
{{- if lookup "v1" "Namespace" "" "default" }}true{{ end -}}
{{- end }}

{{- /* The bytes of a quantity (`20Gi`), so that equal sizes compare equal. */}}
{{- define "gannet.bytes" -}}
{{- $units := dict "_" 1 "_Ki" 1024 "_Mi" 1048576 "_Gi" 1073741824 "_Ti" 1099511627776 "_Pi" 1125899906842624 "_Ei" 1152921504606846976 "_k" 1000 "_K" 1000 "_M" 1000000 "_G" 1000000000 "_T" 1000000000000 "_P" 1000000000000000 "_E" 1000000000000000000 -}}
{{- mulf (float64 (regexFind "^[0-9.]+" .)) (get $units (printf "_%s" (regexFind "[A-Za-z]*$" .))) -}}
{{- end }}

{{- /*
Kubernetes refuses to change the claims of a StatefulSet, and its message names neither the value nor the cure. A claim that no volume
can satisfy ends `helm install --wait` with "context deadline exceeded". Both are known before the installation.
*/}}
{{- define "gannet.checkVolume" -}}
{{- $p := .Values.collector.persistence -}}
{{- $name := include "gannet.collector" . -}}
{{- $ns := .Release.Namespace -}}
{{- $claims := and $p.enabled (not $p.existingClaim) -}}
{{- $set := lookup "apps/v1" "StatefulSet" $ns $name -}}
{{- if $set -}}
{{- $old := dig "spec" "volumeClaimTemplates" list $set -}}
{{- $changed := list -}}
{{- if ne (empty $old) (not $claims) -}}
{{- $changed = append $changed (ternary "enabled" "enabled or existingClaim" (empty $p.existingClaim)) -}}
{{- else if $claims -}}
{{- $spec := (first $old).spec -}}
{{- $class := ternary (dict) (dict "class" (eq $p.storageClass "-" | ternary "" $p.storageClass)) (empty $p.storageClass) -}}
{{- if ne (hasKey $spec "storageClassName") (hasKey $class "class") -}}{{- $changed = append $changed "storageClass" -}}
{{- else if ne (dig "storageClassName" "" $spec) (dig "class" "" $class) -}}{{- $changed = append $changed "storageClass" -}}{{- end -}}
{{- if ne (toJson $spec.accessModes) (toJson $p.accessModes) -}}{{- $changed = append $changed "accessModes" -}}{{- end -}}
{{- if ne (include "gannet.bytes" $spec.resources.requests.storage) (include "gannet.bytes" $p.size) -}}{{- $changed = append $changed "size" -}}{{- end -}}
{{- end -}}
{{- if $changed -}}
{{- fail (printf "collector.persistence.%s differs from the StatefulSet %s, and Kubernetes does not let its claims change. Delete the StatefulSet, which keeps its pods and claims, and run this command again: kubectl -n %s delete statefulset %s --cascade=orphan (docs/chart.md, \"Volume of the collector\", says what happens to the profiles)" (join ", collector.persistence." $changed) $name $ns $name) -}}
{{- end -}}
{{- else if and $claims (include "gannet.inCluster" .) (not (lookup "v1" "PersistentVolumeClaim" $ns (printf "data-%s-0" $name))) -}}
{{- $wanted := eq $p.storageClass "-" | ternary "" $p.storageClass -}}
{{- $found := false -}}
{{- $classes := list -}}
{{- range (lookup "storage.k8s.io/v1" "StorageClass" "" "").items -}}
{{- $classes = append $classes .metadata.name -}}
{{- $default := or (eq "true" (dig "metadata" "annotations" "storageclass.kubernetes.io/is-default-class" "" .)) (eq "true" (dig "metadata" "annotations" "storageclass.beta.kubernetes.io/is-default-class" "" .)) -}}
{{- if or (eq .metadata.name $wanted) (and $default (empty $p.storageClass)) -}}{{- $found = true -}}{{- end -}}
{{- end -}}
{{- range (lookup "v1" "PersistentVolume" "" "").items -}}
{{- if and (eq "Available" (dig "status" "phase" "" .)) (eq $wanted (dig "spec" "storageClassName" "" .)) -}}{{- $found = true -}}{{- end -}}
{{- end -}}
{{- if not $found -}}
{{- fail (printf "the collector asks for a volume of %s, and no %s and no available PersistentVolume provides it: its pod would stay Pending, and helm --wait would end with \"context deadline exceeded\". Set collector.persistence.storageClass (this cluster has: %s), or make a class the default, or set collector.persistence.enabled to false, which loses profiles and rules with the pod" $p.size (empty $wanted | ternary "default StorageClass" (printf "StorageClass %s" $wanted)) (join ", " $classes | default "none")) -}}
{{- end -}}
{{- end -}}
{{- end }}
