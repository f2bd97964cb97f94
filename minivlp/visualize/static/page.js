// Brings the widgets of a static page alive: no kernel, no widget manager, no network. A page holds the widgets' values
// in <script id="widget-state">, as notebooks store them, and one <div class="live-widget" data-model="…"> per widget.
// A widget that cannot start keeps the picture that stands in its place.
const states = JSON.parse(document.getElementById("widget-state").textContent);
const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);

// What `render` knows as its model: values, and calls when one changes.
function modelOf({ state, buffers = [] }) {
  const values = { ...state }, calls = {};
  for (const { path, data } of buffers) values[path[0]] = bytes(data); // our bytes are values themselves, never inside one
  const model = {
    get: (name) => values[name],
    set(name, value) {
      if (values[name] === value) return;
      values[name] = value;
      (calls[`change:${name}`] ?? []).forEach((call) => call(model, value));
    },
    on: (name, call) => { calls[name] = [...(calls[name] ?? []), call]; },
    off: (name, call) => { calls[name] = (calls[name] ?? []).filter((other) => other !== call); },
    save_changes() {}, // nobody is there to be told
    send() {},
  };
  return model;
}

const styles = new Set(), models = {};
for (const place of document.querySelectorAll(".live-widget")) {
  try {
    const model = (models[place.dataset.model] ??= modelOf(states[place.dataset.model]));
    const address = URL.createObjectURL(new Blob([model.get("_esm")], { type: "text/javascript" }));
    const { default: widget } = await import(address);
    URL.revokeObjectURL(address);
    styles.add(model.get("_css"));
    const el = document.createElement("div");
    await widget.render({ model, el });
    place.replaceChildren(el);
    place.dataset.alive = "true";
  } catch (error) {
    console.warn("a widget stays a picture:", error);
  }
}
document.head.append(...[...styles].map((css) => Object.assign(document.createElement("style"), { textContent: css })));
