"""Proof records: one record per certificate, verified by an independent checker."""
