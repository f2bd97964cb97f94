// Attention of words over patches. All of it came with the widget, so every answer is computed here, at once.

const RAMP = [[8, 8, 16], [74, 18, 96], [176, 50, 90], [243, 120, 25], [252, 255, 164]]; // like inferno, in five steps
function heat(t) {
  const x = Math.max(0, Math.min(0.9999, t)) * (RAMP.length - 1), i = Math.floor(x);
  return RAMP[i].map((a, k) => a + (RAMP[i + 1][k] - a) * (x - i));
}

// A sharper (temperature < 1) or flatter (> 1) version of the same distribution: p^(1/T), summing to one again.
function temper(weights, temperature) {
  if (!weights.some((x) => x > 0)) return weights; // Grad-CAM may find nothing at all for a word
  const powers = weights.map((x) => Math.pow(Math.max(x, 1e-12), 1 / temperature));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / total);
}

// Attention as rows[word][patch] of one layer and one head (or the mean of its heads).
function rowsOf(model) {
  const [, heads, words, patches] = model.get("shape");
  const all = floats(model.get("attention"));
  const chosen = model.get("head") < 0 ? [...Array(heads).keys()] : [model.get("head")];
  const row = (word) => Array.from({ length: patches }, (_, patch) => chosen.reduce((sum, head) =>
    sum + all[((model.get("layer") * heads + head) * words + word) * patches + patch], 0));
  return Array.from({ length: words }, (_, word) => temper(row(word), model.get("temperature")));
}

// The image in dim gray: on it the glow of the map cannot be mistaken for a color of the picture.
function grayed(image, W, H) {
  const canvas = h("canvas", { width: W, height: H }), c = canvas.getContext("2d");
  c.drawImage(image, 0, 0, W, H);
  const pixels = c.getImageData(0, 0, W, H), p = pixels.data;
  for (let i = 0; i < p.length; i += 4) {
    const gray = 0.22 * 255 + 0.5 * (0.3 * p[i] + 0.59 * p[i + 1] + 0.11 * p[i + 2]);
    for (let k = 0; k < 3; k++) p[i + k] = 0.65 * gray + 0.35 * p[i + k];
  }
  c.putImageData(pixels, 0, 0);
  return canvas;
}

// A smooth picture of a coarse map: cubic interpolation (Catmull-Rom) between patch centers, color afterwards.
function heatCanvas(map, [rows, columns]) {
  const fine = 8, canvas = h("canvas", { width: columns * fine, height: rows * fine });
  const c = canvas.getContext("2d"), out = c.createImageData(canvas.width, canvas.height);
  const value = (y, x) => map[Math.max(0, Math.min(rows - 1, y)) * columns + Math.max(0, Math.min(columns - 1, x))];
  const taps = (f) => [f * (f * (2 - f) - 1), f * f * (3 * f - 5) + 2, f * (f * (4 - 3 * f) + 1), f * f * (f - 1)].map((x) => x / 2);
  for (let y = 0; y < canvas.height; y++) for (let x = 0; x < canvas.width; x++) {
    const [v, u] = [(y + 0.5) / fine - 0.5, (x + 0.5) / fine - 0.5], [i, j] = [Math.floor(v), Math.floor(u)];
    const [down, across] = [taps(v - i), taps(u - j)];
    let t = 0;
    for (let k = 0; k < 4; k++) for (let m = 0; m < 4; m++) t += down[k] * across[m] * value(i + k - 1, j + m - 1);
    out.data.set([...heat(t), 230 * Math.pow(Math.max(t, 0), 0.7)], 4 * (y * canvas.width + x)); // nothing where nothing is
  }
  c.putImageData(out, 0, 0);
  return canvas;
}

// Does this word name what is in the box? Articles name nothing; Chinese is written without spaces.
function names(label, word) {
  if (["a", "an", "the"].includes(word.toLowerCase())) return false;
  return /^[\w'-]+$/.test(word) ? label.toLowerCase().split(/\s+/).includes(word.toLowerCase()) : /\p{L}/u.test(word) && label.includes(word);
}

function render({ model, el }) {
  const { root, body, status } = frame(el, "attention viewer",
    "Point at a word to see what it attends to; click to keep it. Click the image to see which words attend to a patch.");
  const [layers, heads] = model.get("shape"), [rows, columns] = model.get("grid");
  const words = model.get("words"), boxes = model.get("boxes");
  let hover = -1, gray = null;

  const bar = h("div", { class: "mvlp-words", role: "group", "aria-label": "words of the caption" });
  const settle = roving(bar);
  const buttons = words.map((word, i) => {
    const show = (at) => () => { hover = at; draw(); };
    return h("button", { class: "mvlp-word", "data-key": i, onclick: () => {
      hover = -1;
      put(model, { word: model.get("word") === i ? -1 : i });
      draw();
    }, onmouseenter: show(i), onmouseleave: show(-1) }, word);
  });
  bar.append(...buttons);
  buttons.forEach((button) => { button.tabIndex = -1; });
  settle();

  const view = picture(model.get("image"), "the image", `image of ${rows} by ${columns} patches: arrow keys choose a patch, Escape lets go`);
  view.canvas.classList.add("mvlp-pick");
  view.canvas.addEventListener("click", (event) => {
    const [x, y] = view.at(event);
    const patch = Math.min(rows - 1, Math.floor(y * rows)) * columns + Math.min(columns - 1, Math.floor(x * columns));
    put(model, { patch: model.get("patch") === patch ? -1 : patch });
    draw();
  });
  view.canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!step && event.key !== "Escape") return;
    event.preventDefault();
    const now = model.get("patch") < 0 ? Math.floor(rows / 2) * columns + Math.floor(columns / 2) : model.get("patch");
    const inside = (x, n) => Math.max(0, Math.min(n - 1, x));
    put(model, { patch: step ? inside(Math.floor(now / columns) + step[0], rows) * columns + inside(now % columns + step[1], columns) : -1 });
    draw();
  });

  const sliders = [slider(model, "temperature", "Temperature", [-1, 1, 0.05],
    (t) => `${t.toFixed(2)}${t < 0.99 ? " sharper" : t > 1.01 ? " flatter" : ""}`, (x) => 10 ** x, (t) => Math.log10(t))];
  if (heads > 1) sliders.unshift(slider(model, "head", "Head", [-1, heads - 1, 1], (x) => (x < 0 ? `mean of ${heads}` : `${x + 1} of ${heads}`)));
  const called = model.get("names"); // what is shown, where it is not just layers
  if (layers > 1) sliders.unshift(slider(model, "layer", called.length ? "Map" : "Layer", [0, layers - 1, 1], (x) => called[x] ?? `${x + 1} of ${layers}`));
  const scale = h("div", { class: "mvlp-scale", "aria-hidden": "true" }, h("span", {}, "little"), h("i"), h("span", {}, "most attention"));
  const reset = h("button", { class: "mvlp-button", onclick: () => {
    put(model, { word: -1, patch: -1, temperature: 1, head: -1, layer: layers - 1 });
    draw();
  } }, "Start again");
  body.append(bar, view.node, h("div", { class: "mvlp-side" }, ...sliders.map((s) => s.node), scale, reset));

  const place = (patch) => `row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;
  const inBox = (map, [cx, cy, w, h]) => map.reduce((sum, x, i) => {
    const [y0, x0] = [Math.floor(i / columns) / rows, (i % columns) / columns]; // part of the patch that the box covers
    const part = (low, size, center, side) => Math.max(0, Math.min(low + size, center + side / 2) - Math.max(low, center - side / 2)) / size;
    return sum + x * part(x0, 1 / columns, cx, w) * part(y0, 1 / rows, cy, h);
  }, 0);

  function draw() {
    const all = rowsOf(model), patch = model.get("patch");
    const word = hover >= 0 ? hover : model.get("word");
    const best = word >= 0 ? all[word].indexOf(Math.max(...all[word])) : -1;
    sliders.forEach((s) => s.draw());
    view.paint((c, W, H) => {
      if (word >= 0) {
        const top = all[word][best];
        c.imageSmoothingQuality = "high";
        c.drawImage((gray ??= grayed(view.image, W, H)), 0, 0);
        c.drawImage(heatCanvas(all[word].map((x) => x / (top || 1)), [rows, columns]), 0, 0, W, H);
      }
      boxes.filter(([name]) => word < 0 || names(name, words[word]))
        .forEach(([name, box]) => drawBox(c, W, H, box, "#fff", name));
      if (patch >= 0) drawBox(c, W, H, [((patch % columns) + 0.5) / columns, (Math.floor(patch / columns) + 0.5) / rows, 1 / columns, 1 / rows], "#56b4e9", "");
    });
    const column = patch >= 0 ? all.map((row) => row[patch]) : null, most = column ? Math.max(...column) : 0;
    buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", String(model.get("word") === i));
      button.style.setProperty("--share", column ? `${Math.round((100 * column[i]) / (most || 1))}%` : "0%");
      button.title = column ? `${percent(column[i])} of the attention of “${words[i]}” falls on this patch` : "";
    });
    const said = [];
    if (word >= 0 && !all[word][best]) said.push(`“${words[word]}” attends to nothing in this map.`);
    else if (word >= 0) {
      said.push(`“${words[word]}” attends most to ${place(best)}: ${percent(all[word][best])} of its attention (an even spread gives ${percent(1 / all[word].length)}).`);
      const box = boxes.find(([name]) => names(name, words[word]));
      if (box) said.push(`${percent(inBox(all[word], box[1]))} falls in the box “${box[0]}”, which is ${percent(box[1][2] * box[1][3])} of the image.`);
    }
    if (column) said.push(most ? `The patch at ${place(patch)} gets most attention from “${words[column.indexOf(most)]}”.` : `No word attends to the patch at ${place(patch)}.`);
    status.textContent = said.join(" ") || "No word and no patch is chosen.";
    Object.assign(root.dataset, { word, patch, best });
  }
  return redraw(model, ["layer", "head", "temperature", "word", "patch"], draw);
}
export default { render };
