// A heatmap on a canvas. The page's theme comes from Streamlit's CSS variables; nothing here is HTML made of data.
const views = new WeakMap();

export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  let view = views.get(parentElement);
  if (!view) views.set(parentElement, (view = build(parentElement)));
  view.send = (cell) => setTriggerValue("cell", cell);
  const told = JSON.stringify([data.selected, data.first]);
  if (told !== view.told) {
    view.selected = data.selected;
    view.told = told;
  }
  view.data = data;
  view.canvas.setAttribute("aria-label", `${data.name}: ${data.rows.length} rows, ${data.columns.length} columns; arrow keys move`);
  draw(view);
  return () => {
    view.observer.disconnect();
    view.theme.disconnect();
    view.root.remove();
    views.delete(parentElement);
  };
}

function build(parent) {
  const root = document.createElement("div");
  root.style.cssText = "position:relative;width:100%";
  const scroll = document.createElement("div");
  scroll.style.cssText = "overflow-x:auto;width:100%";
  const canvas = document.createElement("canvas");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "grid");
  canvas.style.cssText = "display:block;cursor:crosshair;outline-offset:-2px";
  const tip = document.createElement("div");
  tip.style.cssText =
    "position:fixed;display:none;pointer-events:none;white-space:pre;z-index:1000000;padding:6px 9px;border-radius:6px;" +
    "font:12px/1.4 ui-monospace,monospace;box-shadow:0 2px 10px rgba(0,0,0,.25);max-width:480px;overflow:hidden";
  const save = document.createElement("button");
  save.textContent = "PNG";
  save.title = "Save this picture";
  save.style.cssText =
    "position:absolute;right:0;top:0;font:11px sans-serif;padding:2px 7px;border-radius:5px;cursor:pointer;" +
    "background:transparent;color:inherit;border:1px solid currentColor;opacity:.55";
  scroll.append(canvas);
  root.append(scroll, save, tip);
  parent.append(root);
  const view = { root, scroll, canvas, tip, selected: null };
  canvas.addEventListener("mousemove", (event) => hover(view, event));
  canvas.addEventListener("mouseleave", () => (tip.style.display = "none"));
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(view, event);
    if (cell) choose(view, cell, 0);
  });
  canvas.addEventListener("keydown", (event) => key(view, event));
  canvas.addEventListener("blur", () => forget(view));
  save.addEventListener("click", () => {
    const link = document.createElement("a");
    link.download = `${view.data.name}.png`;
    link.href = canvas.toDataURL("image/png");
    link.click();
  });
  view.observer = new ResizeObserver(() => view.data && draw(view));
  view.observer.observe(scroll);
  view.theme = new MutationObserver(() => view.data && draw(view));
  view.theme.observe(document.documentElement, { attributes: true, attributeFilter: ["style", "class", "data-theme"] });
  return view;
}

function layout(view, context) {
  const { data, scroll } = view;
  const rows = data.rows.length;
  const columns = data.columns.length;
  context.font = "11px ui-monospace, monospace";
  const left = 14 + Math.max(24, ...data.rows.map((row) => context.measureText(row).width));
  const longest = Math.max(10, ...data.columns.map((column) => context.measureText(column).width));
  const top = data.square ? 24 : Math.min(110, 16 + longest * 0.75);
  const room = Math.max(200, scroll.clientWidth - left - Math.min(80, longest * 0.75) - 6);
  let width = Math.max(data.text ? 30 : 8, Math.min(data.square ? 40 : 120, room / columns));
  const height = data.square ? width : Math.max(15, Math.min(22, 620 / rows));
  return { left, top, width, height, rows, columns, tail: Math.min(80, longest * 0.75), bottom: 34 };
}

function draw(view) {
  const { canvas, data } = view;
  const context = canvas.getContext("2d");
  const at = (view.at = layout(view, context));
  const wide = Math.max(at.left + at.columns * at.width + at.tail + 6, at.left + 330); // the legend has room
  const high = at.top + at.rows * at.height + at.bottom;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = wide * ratio;
  canvas.height = high * ratio;
  canvas.style.width = `${wide}px`;
  canvas.style.height = `${high}px`;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  const look = theme(view.root);
  view.tip.style.background = look.text;
  view.tip.style.color = look.background;
  context.fillStyle = look.background;
  context.fillRect(0, 0, wide, high);
  const scale = colours(data, look);
  context.textBaseline = "middle";
  for (let row = 0; row < at.rows; row++) {
    const y = yOf(view, row);
    context.font = "11px ui-monospace, monospace";
    if (at.height >= 11 || row % Math.ceil(11 / at.height) === 0) {
      context.fillStyle = look.text;
      context.textAlign = "right";
      context.fillText(data.rows[row], at.left - 6, y + at.height / 2);
    }
    context.textAlign = "left";
    for (let column = 0; column < at.columns; column++) {
      const value = data.values[row][column];
      if (value === null || value === undefined) continue;
      const x = at.left + column * at.width;
      const colour = scale(value);
      context.fillStyle = `rgb(${colour})`;
      context.fillRect(x, y, at.width - 1, at.height - 1);
      const text = data.text && data.text[row][column];
      if (text) {
        context.font = "10.5px ui-monospace, monospace";
        context.fillStyle = bright(colour) ? "#14181f" : "#f6f8fb";
        context.fillText(fitted(context, text, at.width - 5), x + 2.5, y + at.height / 2);
      }
    }
  }
  context.fillStyle = look.text;
  context.font = "11px ui-monospace, monospace";
  for (let column = 0; column < at.columns; column++) {
    if (data.square && column % Math.ceil(18 / at.width)) continue;
    context.save();
    context.translate(at.left + (column + 0.5) * at.width, at.top - 7);
    if (!data.square) context.rotate(-Math.PI / 4);
    context.textAlign = data.square ? "center" : "left";
    context.fillText(fitted(context, data.columns[column], 130), 0, 0);
    context.restore();
  }
  legend(context, data, at, look, scale, wide, high);
  if (view.selected) {
    const [row, column] = view.selected;
    if (row >= 0 && row < at.rows && column >= 0 && column < at.columns) {
      context.strokeStyle = look.text;
      context.lineWidth = 2;
      context.strokeRect(at.left + column * at.width - 0.5, yOf(view, row) - 0.5, at.width, at.height);
      context.strokeStyle = look.accent;
      context.lineWidth = 1;
      context.strokeRect(at.left + column * at.width + 1.5, yOf(view, row) + 1.5, at.width - 4, at.height - 4);
    }
  }
}

function legend(context, data, at, look, scale, wide, high) {
  const [low, high_] = range(data);
  const length = 120;
  const y = high - 22;
  for (let i = 0; i < length; i++) {
    context.fillStyle = `rgb(${scale(low + ((high_ - low) * i) / (length - 1))})`;
    context.fillRect(at.left + i, y, 1, 8);
  }
  context.fillStyle = look.text;
  context.font = "11px sans-serif";
  context.textAlign = "left";
  const unit = data.unit.replace(/\n/g, " ");
  context.fillText(`${short(low)} to ${short(high_)}${unit ? `   ${unit}` : ""}`, at.left + length + 8, y + 4);
  if (data.rowName && !data.square) context.fillText(data.rowName, 2, 10);
}

function yOf(view, row) {
  const { at, data } = view;
  return at.top + (data.upwards ? at.rows - 1 - row : row) * at.height;
}

function cellAt(view, event) {
  const { at, data, canvas } = view;
  const box = canvas.getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left - at.left) / at.width);
  const line = Math.floor((event.clientY - box.top - at.top) / at.height);
  if (column < 0 || column >= at.columns || line < 0 || line >= at.rows) return null;
  return [data.upwards ? at.rows - 1 - line : line, column];
}

function hover(view, event) {
  const { data, tip } = view;
  const cell = cellAt(view, event);
  if (!cell) {
    tip.style.display = "none";
    return;
  }
  const [row, column] = cell;
  const value = data.values[row][column];
  const words = data.hover && data.hover[row][column];
  const named = `${data.rowName ? `${data.rowName} ` : ""}${data.rows[row]}  ${data.columns[column]}`;
  tip.textContent = `${named}\n${value === null ? "–" : short(value)}${words ? `\n${words}` : ""}`;
  tip.style.display = "block";
  const far = event.clientX + tip.offsetWidth + 24 > window.innerWidth;
  tip.style.left = `${far ? event.clientX - tip.offsetWidth - 14 : event.clientX + 14}px`;
  tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8)}px`;
}

function key(view, event) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] };
  const step = steps[event.key];
  if (!step) return;
  event.preventDefault();
  const { at, data } = view;
  const [row, column] = view.selected || [at.rows - 1, at.columns - 1];
  const up = data.upwards ? step[0] : -step[0];
  const next = [Math.min(at.rows - 1, Math.max(0, row + up)), Math.min(at.columns - 1, Math.max(0, column + step[1]))];
  choose(view, next, 90);
}

function choose(view, cell, delay) {
  view.selected = cell;
  view.told = JSON.stringify([cell, view.data.first]);
  draw(view);
  clearTimeout(view.timer);
  view.timer = setTimeout(() => {
    view.timer = undefined;
    view.send(cell);
  }, delay); // a held key sends where it ends
}

// A cell that is not sent yet when the canvas is left: sent after a click on another page's link, it would empty that page.
function forget(view) {
  if (view.timer === undefined) return;
  clearTimeout(view.timer);
  view.timer = undefined;
  view.selected = view.data.selected;
  draw(view);
}

function range(data) {
  const all = data.values.flat().filter((value) => value !== null && value !== undefined);
  const low = data.lowest ?? Math.min(...all);
  const high = data.highest ?? Math.max(...all);
  if (!data.diverging) return [low, high > low ? high : low + 1];
  const most = Math.max(Math.abs(low), Math.abs(high)) || 1;
  return [-most, most];
}

// Blue to orange through the page's own ground: told apart by all common kinds of colour blindness.
function colours(data, look) {
  const [low, high] = range(data);
  const ends = look.dark ? { blue: [92, 163, 235], orange: [240, 150, 70] } : { blue: [31, 92, 160], orange: [196, 100, 20] };
  const ground = look.dark ? [34, 38, 46] : [246, 248, 251];
  return (value) => {
    const share = Math.min(1, Math.max(0, (value - low) / (high - low)));
    if (!data.diverging) return mixed(ground, ends.blue, share);
    return share < 0.5 ? mixed(ground, ends.blue, 1 - 2 * share) : mixed(ground, ends.orange, 2 * share - 1);
  };
}

function mixed(from, to, share) {
  return from.map((one, i) => Math.round(one + (to[i] - one) * share));
}

function bright([r, g, b]) {
  return 0.299 * r + 0.587 * g + 0.114 * b > 140;
}

function theme(element) {
  const own = getComputedStyle(element);
  const pick = (name, other) => own.getPropertyValue(name).trim() || other;
  const background = pick("--st-background-color", "#ffffff");
  const dark = !bright(rgb(background));
  return { background, dark, text: pick("--st-text-color", dark ? "#f0f0f0" : "#20242c"), accent: pick("--st-primary-color", "#2a6fbb") };
}

function rgb(text) {
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = text;
  probe.fillRect(0, 0, 1, 1);
  return [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3);
}

function fitted(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  let cut = text;
  while (cut.length > 1 && context.measureText(`${cut}…`).width > room) cut = cut.slice(0, -1);
  return `${cut}…`;
}

function short(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 100000)) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}
