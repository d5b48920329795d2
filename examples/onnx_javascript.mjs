// Answers with their proof from an exported model, in JavaScript. It takes Node and the vendored onnxruntime-web.
//
//     bagcert export default -o model.onnx
//     magick photo.jpg -resize '32x32!' -depth 8 rgb:photo.rgb
//     node examples/onnx_javascript.mjs model.onnx photo.rgb...
//
// An image is its RGB bytes, row by row, in the size the network takes; the patch is in pixels of that size.

import { readFile } from "node:fs/promises";
import * as ort from "../src/bagcert/playground/static/vendor/ort.wasm.bundle.min.mjs"; // elsewhere: "onnxruntime-web"

const runtime = new URL("../src/bagcert/playground/static/vendor/ort-wasm-simd-threaded.wasm", import.meta.url);
ort.env.wasm.wasmBinary = await readFile(runtime);
ort.env.wasm.numThreads = 1; // more would need workers, which keep Node waiting
const [model, ...images] = process.argv.slice(2);
const session = await ort.InferenceSession.create(new Uint8Array(await readFile(model)));
const [, channels, height, width] = session.inputMetadata[0].shape;
for (const path of images) {
  const bytes = await readFile(path);
  const area = height * width;
  if (bytes.length !== channels * area) throw new Error(`${path}: expected ${channels} x ${area} bytes of pixels`);
  const planes = Float32Array.from(bytes, (_, i) => bytes[(i % area) * channels + Math.floor(i / area)] / 255);
  const tensor = new ort.Tensor("float32", planes, [1, channels, height, width]);
  const { label, certified, margin } = await session.run({ images: tensor });
  const proof = certified.data[0] ? "certified" : "not certified";
  console.log(`${path}: class ${label.data[0]}, ${proof} (margin ${margin.data[0]})`);
}
