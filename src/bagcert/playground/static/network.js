// The exported model: pixels in; label, certificate, margin and scores out.

import * as ort from "./vendor/ort.wasm.bundle.min.mjs";

ort.env.wasm.numThreads = 1; // the sums of one thread always come in the same order
ort.env.wasm.wasmPaths = { wasm: new URL("vendor/ort-wasm-simd-threaded.wasm", import.meta.url).href };
ort.env.logLevel = "error";

export async function loadNetwork(about) {
  const answer = await fetch("model.onnx");
  if (!answer.ok) throw new Error(`the model did not come (${answer.status})`);
  const bytes = new Uint8Array(await answer.arrayBuffer());
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  return (image) => decide(session, about, image);
}

// `image` is ImageData of the model's size; bytes / 255 rounded to float32 is what the package computes, too.
async function decide(session, about, image) {
  const [height, width] = about.image_size;
  const area = height * width;
  const values = new Float32Array(about.channels * area);
  for (let channel = 0; channel < about.channels; channel++) {
    for (let i = 0; i < area; i++) values[channel * area + i] = image.data[4 * i + channel] / 255;
  }
  const tensor = new ort.Tensor("float32", values, [1, about.channels, height, width]);
  const { label, certified, margin, scores } = await session.run({ images: tensor });
  return {
    label: Number(label.data[0]),
    certified: Boolean(certified.data[0]),
    margin: Number(margin.data[0]),
    scores: scores.data,
    map: scores.dims.slice(2),
  };
}

// The class with the largest sum of scores besides the answer; the lowest index among equals.
export function runnerUp(decision) {
  const regions = decision.map[0] * decision.map[1];
  let best = -1;
  let most = -Infinity;
  for (let name = 0; name * regions < decision.scores.length; name++) {
    if (name === decision.label) continue;
    let sum = 0;
    for (let i = 0; i < regions; i++) sum += decision.scores[name * regions + i];
    if (sum > most) [best, most] = [name, sum];
  }
  return best;
}

// Per region, by how much it scores the answer above the runner-up.
export function lead(decision, other) {
  const regions = decision.map[0] * decision.map[1];
  const own = decision.scores.subarray(decision.label * regions, (decision.label + 1) * regions);
  return Array.from(own, (score, i) => score - decision.scores[other * regions + i]);
}
