"""Receptive fields of the regions of a score map, derived from the layers and measured."""
