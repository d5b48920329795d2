// What is drawn: pixels, the votes of the regions over them, and which regions see the patch.

const LONG_SIDE = 640; // of the canvas for votes, in its own pixels
const STRONGEST = 0.7; // opacity of the strongest vote

export function drawPixels(canvas, image) {
  [canvas.width, canvas.height] = [image.width, image.height];
  canvas.getContext("2d", { alpha: false }).putImageData(image, 0, 0);
}

// `reach` is {rows, cols}, the indices of the regions that see the patch, or null.
export function drawVotes(canvas, imageSize, map, votes, strongest, reach) {
  const scale = LONG_SIDE / Math.max(...imageSize);
  [canvas.height, canvas.width] = imageSize.map((side) => Math.round(side * scale));
  const context = canvas.getContext("2d");
  const [high, wide] = [canvas.height / map[0], canvas.width / map[1]];
  const style = getComputedStyle(document.documentElement);
  const colors = ["--for", "--against"].map((name) => style.getPropertyValue(name));
  votes.forEach((vote, i) => {
    if (!vote) return;
    context.globalAlpha = STRONGEST * Math.sqrt(Math.abs(vote) / strongest);
    context.fillStyle = colors[vote > 0 ? 0 : 1];
    const [row, col] = [Math.floor(i / map[1]), i % map[1]];
    context.fillRect(col * wide + 1, row * high + 1, wide - 2, high - 2);
  });
  context.globalAlpha = 1;
  if (reach && reach.rows.length && reach.cols.length) outline(context, reach, high, wide);
}

function outline(context, reach, high, wide) {
  const [top, left] = [reach.rows[0] * high, reach.cols[0] * wide];
  const box = [left + 2, top + 2, reach.cols.length * wide - 4, reach.rows.length * high - 4];
  for (const [color, dashes] of [["#000", []], ["#fff", [10, 8]]]) {
    context.setLineDash(dashes);
    context.lineWidth = 4;
    context.strokeStyle = color;
    context.strokeRect(...box);
  }
}

// The regions along one axis whose pixels meet [start, stop); `seen` holds runs of pixels per region.
export function touched(seen, start, stop) {
  return seen.flatMap((runs, region) => (runs.some(([from, to]) => from < stop && start < to) ? [region] : []));
}
