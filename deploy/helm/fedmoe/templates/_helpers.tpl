{{- define "fedmoe.labels" -}}
app.kubernetes.io/name: fedmoe
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "fedmoe.image" -}}
image: "{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}"
imagePullPolicy: {{ .image.pullPolicy }}
{{- end }}

{{- define "fedmoe.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "fedmoe.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "fedmoe.claim" -}}
accessModes: [ReadWriteOnce]
{{- with .className }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests:
    storage: {{ .size }}
{{- end }}

{{- define "fedmoe.coordinatorUrl" -}}
{{ if .Values.coordinator.tlsSecret }}https{{ else }}http{{ end }}://{{ .Release.Name }}-coordinator.{{ .Release.Namespace }}.svc:5000
{{- end }}

{{- /* What gateway and worker need to reach the coordinators. */ -}}
{{- define "fedmoe.callerEnv" -}}
- name: FEDMOE_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .Values.coordinator.tokensSecret }}, key: join}
- {name: FEDMOE_CACHE, value: /var/lib/fedmoe/cache}
- {name: HF_HOME, value: /var/lib/fedmoe/cache/hub}
{{- if .Values.coordinator.tlsSecret }}
- {name: SSL_CERT_FILE, value: /run/own/trusted.crt}
{{- end }}
{{- end }}

{{- /* Writes /run/own/trusted.crt: the authorities of the image, and that of the coordinators' certificate. */ -}}
{{- define "fedmoe.trust" -}}
- name: trust
  {{- include "fedmoe.image" . | nindent 2 }}
  command: [sh, -c, "cat /etc/ssl/certs/ca-certificates.crt /run/tls/ca.crt >/run/own/trusted.crt"]
  securityContext: {{- include "fedmoe.security" .root | nindent 4 }}
  volumeMounts:
    - {name: tls, mountPath: /run/tls, readOnly: true}
    - {name: own, mountPath: /run/own}
{{- end }}
