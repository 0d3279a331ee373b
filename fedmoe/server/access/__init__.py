"""Access control: tokens and their scope, quotas, fair turns, the audit of requests, refusals as RFC 9457 problems."""
