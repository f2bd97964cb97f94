// What all widgets share. Python puts this text in front of each widget's own file, so that one string is the
// whole module: no build step, no import, nothing fetched.

// Make an element: h("button", { class: "x", onclick: f }, "text", child).
function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

// The frame of every widget: a line that says what to do, the body, and a line that says in words what is shown.
// JupyterLab would take arrows and letters typed here for its own shortcuts (d d deletes a cell!). Depending on its version
// the attribute prevents that or the listener does.
function frame(el, name, hint) {
  const body = h("div", { class: "mvlp-body" });
  const status = h("p", { class: "mvlp-status", role: "status", "aria-live": "polite" });
  const root = h("section", { class: `mvlp mvlp-${name.split(" ")[0]}`, "aria-label": name, "data-lm-suppress-shortcuts": "true" },
    h("p", { class: "mvlp-hint" }, hint), body, status);
  root.addEventListener("keydown", (event) => event.stopPropagation());
  el.append(root);
  return { root, body, status };
}

// Set values on the shared model and pass them on to the kernel, if there is one.
function put(model, values) {
  for (const [key, value] of Object.entries(values)) model.set(key, value);
  model.save_changes();
}

// Call `draw` now and after every change of the named values; the returned function ends it.
function redraw(model, names, draw) {
  for (const name of names) model.on(`change:${name}`, draw);
  draw();
  return () => { for (const name of names) model.off(`change:${name}`, draw); };
}

// A labelled slider bound to one value of the model. `show` turns the value into words.
function slider(model, name, label, [low, high, step], show, read = (x) => x, write = (x) => x) {
  const value = h("span", { class: "mvlp-value", "aria-hidden": "true" }); // aria-valuetext says it
  const input = h("input", { type: "range", min: low, max: high, step, "data-name": name,
    oninput: () => put(model, { [name]: read(Number(input.value)) }) });
  const node = h("label", { class: "mvlp-slider" }, h("span", {}, label), input, value);
  const draw = () => {
    const words = show(model.get(name));
    input.value = write(model.get(name));
    value.textContent = words;
    input.setAttribute("aria-valuetext", words);
  };
  return { node, draw };
}

// One tab stop for a row of buttons; the arrow keys walk through it.
function roving(box) {
  const items = () => [...box.querySelectorAll("button")];
  const enter = (at) => items().forEach((item, i) => { item.tabIndex = i === at ? 0 : -1; });
  box.addEventListener("focusin", (event) => enter(items().indexOf(event.target.closest("button"))));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const at = items().indexOf(document.activeElement);
    if (!step || at < 0) return;
    event.preventDefault();
    items()[Math.max(0, Math.min(items().length - 1, at + step))].focus();
  });
  return () => { if (!items().some((item) => item.tabIndex === 0)) enter(0); };
}

// Fill a box of buttons anew and keep the keyboard where it was.
function refill(box, children, settle) {
  const key = box.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  box.replaceChildren(...children);
  children.forEach((child) => { const b = child.matches("button") ? child : child.querySelector("button"); if (b) b.tabIndex = -1; });
  if (key !== undefined) box.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
  settle();
}

// A picture with a drawing layer over it. The layer has the image's own shape; `paint` gets its context and size.
function picture(source, alt, label) {
  const image = h("img", { src: source, alt, draggable: "false" });
  const canvas = h("canvas", { tabindex: "0", role: "application", "aria-label": label });
  const node = h("div", { class: "mvlp-picture" }, image, canvas);
  const fit = () => node.classList.add(image.naturalWidth >= image.naturalHeight ? "mvlp-wide" : "mvlp-tall");
  image.complete && image.naturalWidth ? fit() : image.addEventListener("load", fit, { once: true });
  const paint = (draw) => {
    if (!image.naturalWidth) return void image.addEventListener("load", () => paint(draw), { once: true });
    const scale = 720 / Math.max(image.naturalWidth, image.naturalHeight); // twice the shown size: sharp lines
    canvas.width = Math.round(image.naturalWidth * scale);
    canvas.height = Math.round(image.naturalHeight * scale);
    draw(canvas.getContext("2d"), canvas.width, canvas.height);
  };
  const at = (event) => {
    const r = canvas.getBoundingClientRect();
    return [(event.clientX - r.left) / r.width, (event.clientY - r.top) / r.height].map((x) => Math.max(0, Math.min(1, x)));
  };
  return { node, image, canvas, paint, at };
}

// The numbers of a float32 array that Python sent as bytes.
function floats(view) {
  return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

// Draw a box (cx, cy, w, h in 0..1) with a tag that stays inside the picture.
function drawBox(c, W, H, [cx, cy, w, h], color, text, dashed = false) {
  const [x, y] = [(cx - w / 2) * W, (cy - h / 2) * H];
  for (const [style, width] of [["#000", 9], [color, 5]]) { // a dark rim keeps the line visible on any ground
    c.strokeStyle = style;
    c.lineWidth = width;
    c.setLineDash(dashed ? [16, 10] : []);
    c.strokeRect(x, y, w * W, h * H);
  }
  c.setLineDash([]);
  if (!text) return;
  c.font = "600 24px system-ui, sans-serif";
  const wide = Math.min(W, c.measureText(text).width + 18);
  const outside = y >= 36 ? y - 36 : Math.min(y + h * H + 4, H - 34);
  const [left, top] = [Math.max(0, Math.min(x, W - wide)), dashed ? Math.max(0, y + h * H - 38) : outside]; // two boxes on the same place keep both tags readable
  c.fillStyle = color;
  c.fillRect(left, top, wide, 34);
  c.fillStyle = "#000";
  c.fillText(text, left + 9, top + 25, W - 18);
}

// A static page has no kernel behind it; there a widget answers from what came with it.
const offline = (model) => !model.widget_manager;

// Tell how long an answer is awaited: a busy kernel answers later, one that is gone never does.
function patience(status) {
  let timer = null;
  const stop = () => clearTimeout(timer);
  const start = (text) => {
    stop();
    status.textContent = text;
    timer = setTimeout(() => { status.textContent = "No answer yet: the kernel is busy, or it is not running (then run this cell again)."; }, 4000);
  };
  return { start, stop };
}

const percent = (x) => `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)} %`;
const clip = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
