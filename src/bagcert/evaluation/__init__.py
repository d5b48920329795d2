"""Evaluation: accuracy and certified accuracy on a data set, one record per image."""
