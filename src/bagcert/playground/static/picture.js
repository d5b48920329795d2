// Pictures as pixels of the model's input, and patches on them. All pixels are opaque, so that no canvas changes them.

export async function pixelsOf(blob, [height, width], fit) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const from = { x: 0, y: 0, width: bitmap.width, height: bitmap.height };
  if (fit === "center-crop") {
    const scale = Math.min(bitmap.width / width, bitmap.height / height);
    from.width = Math.max(1, Math.round(width * scale));
    from.height = Math.max(1, Math.round(height * scale));
    from.x = Math.floor((bitmap.width - from.width) / 2);
    from.y = Math.floor((bitmap.height - from.height) / 2);
  }
  const size = { width: bitmap.width, height: bitmap.height };
  const pixels = resized(bitmap, from, width, height);
  bitmap.close();
  return { pixels, size };
}

// Halved until less than a factor of two is left, since browsers look at few pixels when they shrink much at once.
function resized(source, from, width, height) {
  let [image, box] = [source, from];
  for (;;) {
    const next = { x: 0, y: 0, width: step(box.width, width), height: step(box.height, height) };
    const context = surface(next.width, next.height);
    context.imageSmoothingEnabled = next.width !== box.width || next.height !== box.height;
    context.imageSmoothingQuality = "high";
    context.drawImage(image, box.x, box.y, box.width, box.height, 0, 0, next.width, next.height);
    if (next.width === width && next.height === height) return context.getImageData(0, 0, width, height);
    [image, box] = [context.canvas, next];
  }
}

function step(now, wanted) {
  return now > 2 * wanted ? Math.ceil(now / 2) : wanted;
}

// White, so that transparent pictures lie on white as they do in the package.
function surface(width, height) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d", { alpha: false, colorSpace: "srgb", willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  return context;
}

export function withPatch(image, patch, content) {
  const result = new ImageData(new Uint8ClampedArray(image.data), image.width, image.height);
  for (let row = patch.top; row < patch.top + patch.height; row++) {
    for (let col = patch.left; col < patch.left + patch.width; col++) {
      const at = 4 * (row * image.width + col);
      result.data.set(content(at, row - patch.top, col - patch.left), at);
    }
  }
  return result;
}

// As large as the picture, so that a patch that moves or grows uncovers more of the same noise.
export function noise(width, height) {
  const bytes = Uint8Array.from({ length: 4 * width * height }, () => Math.floor(256 * Math.random()));
  return (at) => bytes.subarray(at, at + 3);
}

export function oneColor(hex) {
  const bytes = channels(hex);
  return () => bytes;
}

// Paint moves with the patch: rows and columns count from its corner. White where nobody has painted.
export function blank(width, height) {
  const bytes = new Uint8Array(3 * width * height).fill(255);
  const start = (row, col) => 3 * (row * width + col);
  return {
    dab: (row, col, hex) => bytes.set(channels(hex), start(row, col)),
    content: (at, row, col) => bytes.subarray(start(row, col), start(row, col) + 3),
  };
}

function channels(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

export function asPng(image) {
  const context = surface(image.width, image.height);
  context.putImageData(image, 0, 0);
  return new Promise((resolve) => context.canvas.toBlob(resolve, "image/png"));
}
