"""Export: a network with its head, rule and proof in one ONNX file, which needs no bagcert to run.

Input `images` float32 [batch, channels, height, width] in [0, 1]; outputs `label` int64 [batch], `certified` bool
[batch], `margin` int64 [batch] and `scores` int32 [batch, classes, rows, cols], as `BagCert.certify` gives them. Images
with NaN or values outside [0, 1] are never certified; their margin is -2^24.
"""
