"""Answers with their proof from an exported model. It takes onnxruntime, numpy and Pillow, and no bagcert.

    bagcert export default -o model.onnx
    python examples/onnx_python.py model.onnx photo.jpg...

The patch is in pixels of the image as the network takes it.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
height, width = json.loads(about["image_size"])
names = json.loads(about["class_names"])
for path in sys.argv[2:]:
    pixels = np.asarray(Image.open(path).convert("RGB").resize((width, height)), dtype=np.float32) / 255
    images = pixels.transpose(2, 0, 1)[None]
    label, certified, margin, _ = session.run(None, {"images": np.ascontiguousarray(images)})
    proof = f"no {about['patch']} px patch changes that" if certified[0] else "not certified"
    print(f"{path}: {names[label[0]]}, {proof} (margin {margin[0]})")
