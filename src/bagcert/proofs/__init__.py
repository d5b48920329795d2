"""Proof records: written for each certificate, and checked by a second program."""
