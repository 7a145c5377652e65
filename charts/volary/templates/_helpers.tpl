{{/* The prefix of all object names: the release's name, short enough for the pods of a pool. */}}
{{- define "volary.name" -}}
{{- .Release.Name | trunc 30 | trimSuffix "-" -}}
{{- end -}}

{{- define "volary.labels" -}}
app.kubernetes.io/name: volary
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "volary.selector" -}}
app.kubernetes.io/name: volary
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "volary.identity" -}}
{{- .Values.identity.existingSecret | default (printf "%s-identity" (include "volary.name" .)) -}}
{{- end -}}

{{/* The DNS name of the supervisor's pod, behind a headless Service: QUIC must not pass a ClusterIP. */}}
{{- define "volary.supervisorHost" -}}
{{- $name := include "volary.name" . -}}
{{- printf "%s-supervisor-0.%s-supervisor.%s.svc" $name $name .Release.Namespace -}}
{{- end -}}

{{- define "volary.otlp" -}}
{{- if .Values.telemetry.otlpEndpoint -}}
{{- .Values.telemetry.otlpEndpoint -}}
{{- else if .Values.jaeger.enabled -}}
{{- printf "http://%s-jaeger.%s.svc:4317" .Release.Name .Release.Namespace -}}
{{- end -}}
{{- end -}}

{{- define "volary.env" -}}
- name: RUST_LOG
  value: {{ .Values.logLevel | quote }}
{{- with include "volary.otlp" . }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "volary.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "volary.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: ["ALL"]
{{- end -}}

{{- define "volary.probes" -}}
startupProbe:
  httpGet: { path: /health, port: http }
  periodSeconds: 5
  failureThreshold: 120
livenessProbe:
  httpGet: { path: /health, port: http }
  periodSeconds: 20
  failureThreshold: 6
readinessProbe:
  httpGet: { path: /health, port: http }
  periodSeconds: 10
{{- end -}}

{{/* A pool merged over the defaults. */}}
{{- define "volary.pool" -}}
{{- toYaml (mergeOverwrite (deepCopy .root.Values.nodeDefaults) (deepCopy (.pool | default dict))) -}}
{{- end -}}
