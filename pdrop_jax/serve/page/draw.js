// Pictures with a grid of patches over them.

const HEAT = [[27, 16, 53], [107, 29, 129], [196, 60, 110], [249, 142, 78], [252, 245, 176]];
const VEIL = "#141b21"; // over dropped patches, in light and dark
const WIDTH = 480; // of a canvas; CSS scales it

export function load(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = url;
  });
}

// Patches that are not in `kept` are dimmed: `amount` is 0 for not at all and 1 for as far as they are.
export function drawKept(canvas, image, view, kept, amount = 1) {
  const stays = new Set(kept);
  paint(canvas, image, view, (patch) => (stays.has(patch) ? null : [VEIL, 0.82 * amount]));
}

// Patches in the colour of their score; those without one are dimmed.
export function drawScores(canvas, image, view, scores) {
  const known = scores.filter((x) => x !== null).sort((a, b) => a - b);
  const low = known[0] ?? 0;
  const high = known[Math.floor((known.length - 1) * 0.98)] ?? 1; // one patch alone would leave the others dark
  paint(canvas, image, view, (patch) => {
    if (scores[patch] === null) return [VEIL, 0.82];
    const at = Math.sqrt(Math.max(0, Math.min(1, (scores[patch] - low) / (high - low || 1))));
    return [`rgb(${heat(at)})`, 0.74];
  });
}

function heat(at) {
  const place = at * (HEAT.length - 1);
  const n = Math.min(Math.floor(place), HEAT.length - 2);
  return HEAT[n].map((from, c) => Math.round(from + (HEAT[n + 1][c] - from) * (place - n)));
}

function paint(canvas, image, { rows, columns }, colour) {
  canvas.width = WIDTH;
  canvas.height = Math.round((WIDTH * image.naturalHeight) / image.naturalWidth);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const found = colour(row * columns + column);
      if (!found) continue;
      [context.fillStyle, context.globalAlpha] = found;
      // Edges are rounded, or lines would show between patches.
      const [x, y] = [Math.round((column * canvas.width) / columns), Math.round((row * canvas.height) / rows)];
      const right = Math.round(((column + 1) * canvas.width) / columns);
      const bottom = Math.round(((row + 1) * canvas.height) / rows);
      context.fillRect(x, y, right - x, bottom - y);
    }
  }
  context.globalAlpha = 1;
}
