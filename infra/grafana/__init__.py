"""Grafana dashboards over the metrics of `cluster.metrics`; see README.md here."""
