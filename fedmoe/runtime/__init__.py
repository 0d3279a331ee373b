"""The process and its machine: errors, files, logs, records, devices, memory, threads."""
