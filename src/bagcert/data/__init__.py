"""Datasets: images, labels and class names."""
