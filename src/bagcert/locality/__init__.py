"""Locality, measured: does anything outside a patch's reach move when the content under the patch changes?

All certificates rest on one fact: outside R(l) the score map stands still. The geometry is derived from the layers
(`bagcert.nets.receptive_field.derive`); here it is measured on this device and dtype what the arithmetic makes of
it. See docs/method.md, "Locality is checked".

Two questions are kept apart. Within one configuration (device, dtype, threads, images per forward pass) a clean image
and its attacked version meet the same kernels: what moves there is a leak. Across configurations other kernels may
round otherwise: what moves there is drift. Certificates are of one configuration unless a model is loaded as portable.
"""

from bagcert.locality.cache import cached_report
from bagcert.locality.measurement import measure, require_local
from bagcert.locality.onnx import measure_onnx
from bagcert.locality.report import LocalityReport, Probe

__all__ = ["LocalityReport", "Probe", "cached_report", "measure", "measure_onnx", "require_local"]
