"""Export of a network with its head, rule and certification as one ONNX file, which runs without bagcert.

Input: `images`, float32 [batch, channels, height, width] in [0, 1]. Outputs: `label` int64 [batch], `certified` bool
[batch], `margin` int64 [batch] and `scores` int32 [batch, classes, rows, cols], the same as from `BagCert.certify`.
Images with NaN or values outside [0, 1] are never certified; their margin is -2^24.
"""
