"""Defences: what is deployed. Each has `predict` and `certify`, and neither takes a label."""
