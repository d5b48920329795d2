"""Measurement of locality: whether scores outside a patch's reach change when the content of the patch changes.

All certificates assume that scores outside R(l) do not change. The geometry is derived from the layers
(`bagcert.nets.receptive_field.derive`). This package measures whether the arithmetic of a device and dtype keeps to it.
See docs/method.md, "Locality is checked".

There are two kinds of changes. Within one configuration (device, dtype, threads, images per forward pass), a clean
image and its attacked version are processed by the same kernels; a change there is a leak. Other configurations may use
kernels that round differently; a change between configurations is drift. Certificates hold for one configuration unless
the model is loaded with `portable=True`.
"""

from bagcert.locality.cache import cached_report
from bagcert.locality.measurement import measure, require_local
from bagcert.locality.onnx import measure_onnx
from bagcert.locality.report import LocalityReport, Probe

__all__ = ["LocalityReport", "Probe", "cached_report", "measure", "measure_onnx", "require_local"]
