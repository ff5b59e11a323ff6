"use strict";
// Everything from the data goes into the page as text or attributes, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const { windows } = data;
const CARDS = 6, LINES = 5, ROW = 20;
// what changes with the query value that is picked
let table, words;
const OF_VALUE = ["query", "isLoss", "table", "patterns", "stages", "detection", "agreement", "losses"];
data.values[data.place] = Object.fromEntries(OF_VALUE.map((key) => [key, data[key]]));
function take(value) {
  Object.assign(data, data.values[value]);
  table = data.table;
  words = data.isLoss
    ? { helps: "Helpful", harms: "Harmful", up: "it helped; without it the loss would be higher", down: "it harmed; without it the loss would be lower" }
    : { helps: "Raised by removal", harms: "Lowered by removal", up: "removing the sample raises the query", down: "removing the sample lowers the query" };
}
const corrupted = new Set(data.detection ? data.detection.ids : []);
const unit = data.groups ? "group" : "sample";
// the longest window, of equal ones the last, is the one to begin with
let picked = windows.reduce((best, w, i) => (w.stop - w.start >= windows[best].stop - windows[best].start ? i : best), 0);
let sorting = { column: "score", descending: true };
let cursor = null;

const byId = (id) => document.getElementById(id);
const node = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const shape = (tag, attributes = {}, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
const signed = (v) => (v === null || v === undefined ? "–" : v === 0 ? "0" : (v > 0 ? "+" : "−") + short(Math.abs(v)));
const short = (v) => (v === null || v === undefined ? "–" : v !== 0 && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e5) ? v.toExponential(2).replace("-", "−") : String(Number(v.toPrecision(3))).replace("-", "−"));
const fixed = (v, digits = 3) => (v === null || v === undefined ? "–" : v.toFixed(digits).replace("-", "−"));
const percent = (v, digits = 0) => (v === null || v === undefined ? "–" : (100 * v).toFixed(digits) + " %");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const side = (v) => (v > 0 ? "helps" : v < 0 ? "harms" : "");
const many = (n) => (n === 1 ? `1 ${unit} is` : `${n} ${unit}s are`);
const nameOf = (id) => `${unit} ${id}`;
const spanOf = (w) => `${w.name} (steps ${w.start}–${w.stop})`;

function picture(id, alt = "") {
  return data.pictures[id] ? node("img", { class: "sample", src: data.pictures[id], alt: alt || `picture of sample ${id}` }) : null;
}

// ---- axes and lines ----
function axes(width, height, x, y, { left = 58, bottom = 26, top = 10, right = 12, xLabel = "step", form = short } = {}) {
  const px = (v) => left + ((v - x[0]) / (x[1] - x[0] || 1)) * (width - left - right);
  const py = (v) => top + (1 - (v - y[0]) / (y[1] - y[0] || 1)) * (height - top - bottom);
  const root = shape("g");
  for (const tick of ticks(y[0], y[1], 4)) {
    root.append(shape("line", { class: "axis", x1: left, x2: width - right, y1: py(tick), y2: py(tick) }));
    root.append(shape("text", { x: left - 8, y: py(tick) + 4, "text-anchor": "end" }, form(tick)));
  }
  for (const tick of ticks(x[0], x[1], width < 500 ? 4 : 8)) root.append(shape("text", { x: px(tick), y: height - 8, "text-anchor": "middle" }, (xLabel === "%" ? tick + " %" : short(tick))));
  return { root, px, py };
}
function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= raw) * power, found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}
function path(points, px, py) {
  let d = "", pen = "M";
  for (const [x, y] of points) {
    if (y === null) { pen = "M"; continue; }
    d += `${pen}${px(x).toFixed(1)},${py(y).toFixed(1)}`;
    pen = "L";
  }
  return d;
}
function range(values, withZero = false) {
  const known = values.filter((v) => v !== null);
  if (withZero) known.push(0);
  const low = Math.min(...known), high = Math.max(...known), pad = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - pad, high + pad];
}
const canvasOf = (host, height, label) => {
  const width = Math.max(host.clientWidth, 260);
  const root = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
  host.replaceChildren(root);
  return { root, width };
};

// ---- the run ----
function drawRun() {
  const host = byId("run-chart"), lanes = windowLanes(), losses = data.losses;
  const curves = losses ? [["training loss of the batch", losses.training, "on-quiet"], [data.query, losses.query, "on-accent"]].filter(([, points]) => points.length > 1) : [];
  const plot = curves.length ? 190 : 0, height = plot + lanes.count * 22 + (curves.length ? 4 : 30);
  const end = Math.max(...windows.map((w) => w.stop)), begin = curves.length ? 0 : Math.min(...windows.map((w) => w.start));
  const { root, width } = canvasOf(host, height, curves.length ? "Losses along the run, and its windows below" : "The windows along the run");
  let px = (v) => 58 + ((v - begin) / (end - begin)) * (width - 70);
  if (curves.length) {
    const last = Math.max(end, ...curves.map(([, points]) => points[points.length - 1][0]));
    const frame = axes(width, plot, [0, last], range(curves.flatMap(([, points]) => points.map((p) => p[1])), true), {});
    px = frame.px;
    const w = windows[picked];
    root.append(shape("rect", { class: "shade", x: px(w.start), y: 10, width: px(w.stop) - px(w.start), height: plot - 36 }), frame.root);
    for (const [name, points, kind] of curves) root.append(shape("path", { class: `series ${kind}`, d: path(points, frame.px, frame.py) }, shape("title", {}, name)));
  } else {
    for (const tick of ticks(begin, end, 6)) root.append(shape("text", { x: px(tick), y: height - 6, "text-anchor": "middle" }, short(tick)));
  }
  windows.forEach((w, i) => {
    const y = plot + lanes.of[i] * 22, wide = px(w.stop) - px(w.start);
    const bar = shape("g", { cursor: "pointer" }, shape("rect", { class: `span${i === picked ? " on" : ""}`, x: px(w.start), y, width: Math.max(wide, 1), height: 18, rx: 2 }), shape("title", {}, spanOf(w)));
    if (wide > 7 * w.name.length) bar.append(shape("text", { x: px(w.start) + wide / 2, y: y + 13, "text-anchor": "middle" }, w.name));
    bar.addEventListener("click", () => pick(i));
    root.append(bar);
  });
  byId("run-note").textContent = (curves.length ? curves.map(([name, , kind]) => (kind === "on-quiet" ? `Grey: ${name}. ` : `Coloured: the query, ${name}. `)).join("") : "") + `${curves.length ? "Below: the" : "The"} windows that were scored, in steps; choose one here or above.`;
}
function windowLanes() {
  const ends = [], of = windows.map((w) => {
    let lane = ends.findIndex((stop) => stop <= w.start);
    if (lane < 0) lane = ends.push(0) - 1;
    ends[lane] = w.stop;
    return lane;
  });
  return { of, count: ends.length };
}

// ---- the heat map ----
const heat = { left: 0 };
const numColumns = () => (table.heat.order ? table.heat.order.length : table.heat.edges.length - 1);
function heatValue(w, c) { return table.heat.order ? table.scores[w][table.heat.order[c]] : table.heat.means[w][c]; }
function mixer() {
  const stops = ["--heat-low", "--heat-down", "--heat-zero", "--heat-up", "--heat-high"].map((name) => colour(name).match(/\w\w/g).map((h) => parseInt(h, 16)));
  const limit = table.limit || 1, linear = limit / 100;
  return (v) => {
    if (v === null) return [128, 128, 128];
    const t = 2 + 2 * Math.sign(v) * Math.min(1, Math.log1p(Math.abs(v) / linear) / Math.log1p(100));
    const i = Math.min(3, Math.floor(t)), f = t - i;
    return stops[i].map((a, k) => a + f * (stops[i + 1][k] - a));
  };
}
function drawHeat() {
  const map = byId("heat-map"), ratio = window.devicePixelRatio || 1, width = map.parentElement.clientWidth, height = windows.length * ROW;
  map.style.height = `${height}px`;
  map.width = Math.round(width * ratio); map.height = Math.round(height * ratio);
  const g = map.getContext("2d"), columns = numColumns(), mix = mixer();
  g.scale(ratio, ratio);
  g.font = "600 12px system-ui, sans-serif"; // that of the picked window, the widest
  heat.left = Math.min(Math.max(...windows.map((w) => g.measureText(w.name).width)) + 10, width * 0.3);
  heat.width = width - heat.left;
  const pixels = Math.max(1, Math.round(heat.width * ratio)), image = g.createImageData(pixels, map.height);
  windows.forEach((_, w) => {
    const top = Math.round(w * ROW * ratio), bottom = Math.round(((w + 1) * ROW - 2) * ratio);
    for (let x = 0; x < pixels; x++) {
      // where a pixel holds several samples it shows the mean of their colours, so that none is left out
      const a = Math.floor((x / pixels) * columns), b = Math.max(a + 1, Math.floor(((x + 1) / pixels) * columns)), mean = [0, 0, 0];
      for (let c = a; c < b; c++) mix(heatValue(w, c)).forEach((part, k) => { mean[k] += part / (b - a); });
      for (let y = top; y < bottom; y++) image.data.set([...mean, 255], 4 * (y * pixels + x));
    }
  });
  g.putImageData(image, Math.round(heat.left * ratio), 0);
  g.textBaseline = "middle";
  windows.forEach((w, i) => {
    g.fillStyle = colour(i === picked ? "--text" : "--quiet");
    g.font = `${i === picked ? "600 " : ""}12px system-ui, sans-serif`;
    g.fillText(shortened(g, w.name, heat.left - 8), 0, i * ROW + ROW / 2 - 1);
  });
  g.strokeStyle = colour("--accent"); g.lineWidth = 2;
  g.strokeRect(heat.left, picked * ROW - 1, heat.width - 1, ROW);
  if (cursor) {
    g.strokeStyle = colour("--text");
    g.strokeRect(heat.left + (cursor.c / columns) * heat.width - 1, cursor.w * ROW - 1, Math.max(heat.width / columns, 3) + 1, ROW);
  }
  map.setAttribute("aria-label", `Heat map of ${data.numSamples} ${unit}s in ${windows.length} windows. Arrow keys move through it, Enter chooses the window.`);
  let at = 0;
  byId("heat-groups").replaceChildren(...table.heat.groups.map(({ name, count }) => {
    const from = heat.left + (at / data.numSamples) * heat.width, wide = (count / data.numSamples) * heat.width;
    at += count;
    const label = node("span", { title: `${name || "all"}: ${count}` }, wide > 34 ? name || "all" : "");
    label.style.left = `${from}px`; label.style.width = `${wide}px`;
    return label;
  }));
}
function shortened(g, text, width) {
  if (g.measureText(text).width <= width) return text;
  // the end of a name tells windows apart as often as its beginning
  for (let n = text.length - 1; n > 2; n--) {
    const half = Math.ceil(n / 2), cut = `${text.slice(0, half)}…${text.slice(text.length - (n - half))}`;
    if (g.measureText(cut).width <= width) return cut;
  }
  return "…";
}
function readout() {
  const { w, c } = cursor, where = spanOf(windows[w]);
  let text;
  if (table.heat.order) {
    const place = table.heat.order[c], id = table.ids[place], pattern = table.patterns[place];
    text = `${nameOf(id)}${data.labels[id] === undefined ? "" : `, label ${data.labels[id]}`}${pattern ? `, ${pattern}` : ""} · ${where} · ${signed(table.scores[w][place])}`;
  } else {
    const size = table.heat.edges[c + 1] - table.heat.edges[c], [id, v] = table.heat.standouts[w][c];
    text = `${size} ${unit}s · ${where} · mean ${signed(table.heat.means[w][c])} · largest: ${nameOf(id)} with ${signed(v)}`;
  }
  byId("heat-readout").textContent = text;
}
function heatAt(event) {
  const box = byId("heat-map").getBoundingClientRect(), x = event.clientX - box.left - heat.left;
  if (x < 0) return null;
  const w = Math.min(windows.length - 1, Math.max(0, Math.floor((event.clientY - box.top) / ROW)));
  let c = Math.min(numColumns() - 1, Math.floor((x / heat.width) * numColumns()));
  // of the samples under one pixel, the one that stands out
  for (let k = c, end = Math.min(numColumns(), c + Math.ceil(numColumns() / heat.width)); k < end; k++) if (Math.abs(heatValue(w, k)) > Math.abs(heatValue(w, c))) c = k;
  return { w, c };
}
function bindHeat() {
  const map = byId("heat-map"), show = (at) => { if (at) { cursor = at; readout(); drawHeat(); } };
  map.addEventListener("pointermove", (event) => show(heatAt(event)));
  map.addEventListener("pointerdown", (event) => { const at = heatAt(event); if (at) { show(at); pick(at.w); } });
  map.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [0, -50], PageDown: [0, 50] }[event.key];
    const at = cursor || { w: picked, c: 0 };
    if (event.key === "Enter" || event.key === " ") pick(at.w);
    else if (move) show(cursor ? { w: Math.min(windows.length - 1, Math.max(0, at.w + move[0])), c: Math.min(numColumns() - 1, Math.max(0, at.c + move[1])) } : at);
    else return;
    event.preventDefault();
  });
}
function drawHeatNotes() {
  byId("heat-note").textContent = (table.patterns.some((p) => p && p !== "no number") ? `A column is a ${unit}, sorted by when it matters (below) and then by the sum of its scores.` : `A column is a ${unit}, sorted by the sum of its scores.`)
    + (table.heat.order ? "" : ` ${numColumns()} bins of about ${Math.round(data.numSamples / numColumns())} ${unit}s each show means.`)
    + (table.unvisited ? ` ${many(table.unvisited)} 0 everywhere, as are those never seen.` : "") + (table.noNumber ? ` ${many(table.noNumber)} in some window without a number (grey).` : "");
  byId("heat-scale").replaceChildren(`−${short(table.limit)}`, node("i"), `+${short(table.limit)}`, node("span", {}, "(logarithmic beyond ±1 %)"));
  byId("heat-readout").textContent = "Point at the map, or go through it with the arrow keys.";
}

// ---- samples of the picked window ----
function drawCurves() {
  const host = byId("curve-chart"), stages = table.stages;
  host.hidden = stages.length < 2;
  if (host.hidden) return;
  const at = stages.map((w) => (windows[w].start + windows[w].stop) / 2), [helps, harms] = table.listed[picked];
  const lines = [...helps.slice(0, LINES).map((p) => [p, "helps"]), ...harms.slice(0, LINES).map((p) => [p, "harms"])];
  if (!lines.length) { host.replaceChildren(); return; }
  const { root, width } = canvasOf(host, 240, `Scores of the leading ${unit}s of ${windows[picked].name} over the windows of the run`);
  const first = windows[stages[0]].start, last = windows[stages[stages.length - 1]].stop;
  const frame = axes(width, 240, [first, last], range(lines.flatMap(([p]) => stages.map((w) => table.scores[w][p])), true), { form: signed, left: 70, right: 44 });
  if (stages.includes(picked)) root.append(shape("rect", { class: "shade", x: frame.px(windows[picked].start), y: 10, width: frame.px(windows[picked].stop) - frame.px(windows[picked].start), height: 204 }));
  root.append(frame.root, shape("line", { class: "zero", x1: frame.px(first), x2: frame.px(last), y1: frame.py(0), y2: frame.py(0) }));
  const ends = [];
  for (const [p, kind] of lines) {
    const points = stages.map((w, i) => [at[i], table.scores[w][p]]), d = path(points, frame.px, frame.py), id = table.ids[p];
    const line = shape("path", { class: `series on-${kind}`, d, "data-sample": id });
    const hit = shape("path", { class: "hit", d }, shape("title", {}, `${nameOf(id)}${data.labels[id] === undefined ? "" : `, label ${data.labels[id]}`}`));
    hit.addEventListener("pointerenter", () => strong(id)); hit.addEventListener("pointerleave", () => strong(null));
    root.append(line, hit);
    const y = points[points.length - 1][1];
    if (y !== null) ends.push([frame.py(y), id, kind]);
  }
  let free = -Infinity;
  for (const [y, id, kind] of ends.sort((a, b) => a[0] - b[0])) {
    if (y < free) continue; // a number that would cover another is left to the hover
    free = y + 12;
    root.append(shape("text", { class: kind, x: frame.px(at[at.length - 1]) + 6, y: y + 4 }, String(id)));
  }
  byId("curve-note").textContent = `The ${LINES} most ${data.isLoss ? "helpful and harmful" : "raised and lowered"} ${unit}s of ${windows[picked].name}, in each window of the run; numbers are their ids.`;
}
function strong(id) {
  for (const line of document.querySelectorAll("#curve-chart .series")) {
    const own = line.dataset.sample === String(id);
    line.classList.toggle("strong", own); line.classList.toggle("faint", id !== null && !own);
  }
}
function sparkline(p, kind) {
  const stages = table.stages;
  if (stages.length < 2) return null;
  const values = stages.map((w) => table.scores[w][p]), y = range(values, true), px = (v) => 2 + (v / (stages.length - 1)) * 96, py = (v) => 26 - ((v - y[0]) / (y[1] - y[0])) * 24;
  return shape("svg", { viewBox: "0 0 100 28", height: 28, preserveAspectRatio: "none", role: "img", "aria-label": `scores over ${stages.length} windows: ${values.map(signed).join(", ")}` },
    shape("line", { class: "zero", x1: 2, x2: 98, y1: py(0), y2: py(0), "vector-effect": "non-scaling-stroke" }),
    shape("path", { class: `series on-${kind}`, d: path(values.map((v, i) => [i, v]), px, py), "vector-effect": "non-scaling-stroke" }));
}
function drawCards() {
  ["helps", "harms"].forEach((kind, i) => {
    byId(`${kind}-title`).textContent = `${words[kind]}, most first`;
    byId(kind).replaceChildren(...table.listed[picked][i].slice(0, CARDS).map((p) => {
      const id = table.ids[p], marked = corrupted.has(id) ? "corrupted" : null;
      const what = [data.labels[id] === undefined ? null : `label ${data.labels[id]}`, table.patterns[p], marked, data.groups ? `samples ${data.groups[id].slice(0, 6).join(", ")}` : null].filter(Boolean).join(", ");
      const card = node("li", {}, picture(id), data.texts[id] === undefined ? null : node("blockquote", {}, data.texts[id]), node("div", {}, `${nameOf(id)} `), node("b", { class: kind }, signed(table.scores[picked][p])), node("div", { class: "what" }, what), sparkline(p, kind));
      card.addEventListener("pointerenter", () => strong(id)); card.addEventListener("pointerleave", () => strong(null));
      return card;
    }));
  });
}
function columnsOf() {
  const any = (object) => Object.keys(object).length > 0;
  return [
    { key: "id", title: unit, numeric: true, value: (p) => table.ids[p] },
    any(data.pictures) && { key: "picture", title: "picture", cell: (p) => picture(table.ids[p]) || "" },
    any(data.texts) && { key: "text", title: "text", wide: true, value: (p) => data.texts[table.ids[p]], cell: (p) => node("div", { class: "text" }, data.texts[table.ids[p]] ?? "–") },
    any(data.labels) && { key: "label", title: "label", value: (p) => data.labels[table.ids[p]] },
    { key: "score", title: "score", numeric: true, value: (p) => table.scores[picked][p], form: signed, tinted: true },
    table.patterns.some(Boolean) && { key: "pattern", title: "pattern", value: (p) => table.patterns[p] },
    table.stages.length > 1 && { key: "sum", title: "sum", numeric: true, value: (p) => table.stages.reduce((sum, w) => sum + table.scores[w][p], 0), form: signed, tinted: true },
    table.retrained && { key: "true", title: "by retraining", value: (p) => (table.retrained[picked][p] ? "yes" : "no") },
    data.detection && { key: "corrupted", title: "corrupted", value: (p) => (corrupted.has(table.ids[p]) ? "yes" : "no") },
  ].filter(Boolean);
}
function compare(a, b) {
  if (a === null || a === undefined || b === null || b === undefined) return (a === null || a === undefined) - (b === null || b === undefined);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
}
function drawTable() {
  const root = byId("sample-table"), columns = columnsOf(), by = columns.find((c) => c.key === sorting.column) || columns[0], [helps, harms] = table.listed[picked];
  root.querySelector("caption").textContent = spanOf(windows[picked]);
  byId("sample-note").textContent = `The ${helps.length} ${unit}s with the largest scores above 0 and the ${harms.length} with the smallest below. A heading sorts by its column.`;
  root.querySelector("thead").replaceChildren(node("tr", {}, ...columns.map((column) => {
    const heading = node("th", { scope: "col", class: column.numeric ? "number" : null });
    if (!column.value) { heading.append(column.title); return heading; }
    heading.setAttribute("aria-sort", column === by ? (sorting.descending ? "descending" : "ascending") : "none");
    const button = node("button", { type: "button", "data-column": column.key }, column.title);
    button.addEventListener("click", () => {
      sorting = { column: column.key, descending: column === by ? !sorting.descending : Boolean(column.numeric) };
      drawTable();
      root.querySelector(`[data-column="${column.key}"]`).focus();
    });
    heading.append(button);
    return heading;
  })));
  const rows = [...helps, ...harms].sort((a, b) => (sorting.descending ? -1 : 1) * compare(by.value(a), by.value(b)));
  root.querySelector("tbody").replaceChildren(...rows.map((p) => node("tr", {}, ...columns.map((column) => {
    const value = column.value && column.value(p), text = column.cell ? column.cell(p) : column.form ? column.form(value) : value ?? "–";
    return node("td", { class: [column.numeric ? "number" : "", column.wide ? "wide" : "", column.tinted ? side(value) : ""].join(" ").trim() || null }, typeof text === "object" ? text : String(text));
  }))));
}

// ---- patterns, stages, detection, agreement, costs ----
function drawPatterns() {
  byId("patterns").hidden = !data.patterns;
  if (!data.patterns) return;
  byId("pattern-rows").replaceChildren(...data.patterns.rows.map((row) => {
    const bar = node("i"); bar.style.width = `${100 * row.share}%`;
    return node("div", { class: "pattern" }, node("b", {}, row.name), node("div", { class: "track", role: "img", "aria-label": `${row.name}: ${percent(row.share, 1)}` }, bar),
      node("span", { class: "share" }, `${percent(row.share, 1)} (${row.count})`), node("span", { class: "rule" }, row.rule + (row.count ? `; such as ${row.examples.join(", ")}` : "")));
  }));
  byId("pattern-note").textContent = `The rule is dit_fast.analysis.patterns with its default thresholds, over ${data.patterns.windows.length} windows that follow one another. Finer windows show more fluctuation.`;
}
function drawStages() {
  byId("stages").hidden = !data.stages;
  if (!data.stages) return;
  const kind = byId("stage-kind").value, found = data.stages.kinds[kind], names = data.stages.names, root = byId("stage-table"), stops = [colour("--heat-zero"), colour("--heat-high"), colour("--heat-low")];
  const titles = { kendall: "Kendall's τ", spearman: "Spearman", pearson: "Pearson", jaccard: `Jaccard of the top ${found.k}` };
  byId("stage-note").textContent = `Whether the same ${unit}s matter in two windows: 1 for the same order, 0 for none. ${titles[kind]}: ${fixed(found.mean, 2)} on average over pairs.${data.stages.leftOut ? ` ${many(data.stages.leftOut)} left out: 0 everywhere, or without a number in some window.` : ""}`;
  root.replaceChildren(node("caption", {}, `${titles[kind]} of every two windows`),
    node("thead", {}, node("tr", {}, node("td", {}), ...names.map((name, i) => node("th", { scope: "col", title: name }, String(i + 1))))),
    node("tbody", {}, ...names.map((name, i) => node("tr", {}, node("th", { scope: "row" }, `${i + 1} ${name}`), ...found.matrix[i].map((v, j) => {
      const cell = node("td", { title: `${name} and ${names[j]}` }, fixed(v, 2));
      if (v !== null) cell.style.background = `color-mix(in srgb, ${v >= 0 ? stops[1] : stops[2]} ${(Math.abs(v) * 62).toFixed(0)}%, ${stops[0]})`;
      return cell;
    })))));
}
function drawDetection() {
  byId("detection").hidden = !data.detection;
  if (!data.detection) return;
  const { rows, share, count } = data.detection, { root, width } = canvasOf(byId("detection-chart"), 260, `Share of the corrupted ${unit}s found against share inspected, for each window`);
  const frame = axes(width, 260, [0, 100], [0, 100], { xLabel: "%", form: (v) => v + " %" });
  root.append(frame.root, shape("line", { class: "zero", x1: frame.px(0), y1: frame.py(0), x2: frame.px(100), y2: frame.py(100) }));
  const order = rows.map((_, i) => i).filter((i) => i !== picked).concat(picked);
  for (const i of order) root.append(shape("path", { class: `series ${i === picked ? "strong on-accent" : "faint on-quiet"}`, d: path(rows[i].points.map(([x, y]) => [100 * x, 100 * y]), frame.px, frame.py) }, shape("title", {}, rows[i].name)));
  byId("detection-note").textContent = `${count} corrupted ${unit}s, ${percent(share, 1)} of all. Across: the share inspected, the most harmful first. Upwards, and in the last columns: the share of the corrupted found. Bold: ${windows[picked].name}; pale: the other windows; dashed: inspecting at random.`;
  const numbers = rows.map((row) => [row.name, fixed(row.auc), fixed(row.precision), percent(row.found[0]), percent(row.found[1])]);
  plain(byId("detection-table"), ["window", "AUC", "average precision", "first 10 %", "first 20 %"], [...numbers, ["random (expected)", "0.500", fixed(share), "10 %", "20 %"]], picked);
}
function plain(root, headings, rows, marked = -1) {
  const cell = (tag, text, i, bold) => { const made = node(tag, { class: i ? "number" : null, scope: tag === "th" ? "col" : null }, text); if (bold) made.style.fontWeight = 600; return made; };
  root.replaceChildren(node("thead", {}, node("tr", {}, ...headings.map((text, i) => cell("th", text, i)))), node("tbody", {}, ...rows.map((row, r) => node("tr", {}, ...row.map((text, i) => cell("td", text, i, r === marked))))));
}
function drawOnce() {
  windows.forEach((w, i) => {
    const input = node("input", { type: "radio", name: "window", value: i, "aria-label": spanOf(w) });
    input.checked = i === picked;
    input.addEventListener("change", () => pick(i));
    byId("windows").append(node("label", { title: spanOf(w) }, input, node("span", {}, w.name)));
  });
  byId("cost-table").append(node("tbody", {}, ...data.costs.map(([name, value]) => node("tr", {}, node("th", { scope: "row" }, name), node("td", { class: "wide" }, value)))));
  const choice = byId("value");
  choice.append(...data.values.map((value, i) => node("option", { value: i }, value.query)));
  choice.value = data.place;
  choice.parentElement.hidden = data.values.length < 2;
  choice.addEventListener("change", () => { take(Number(choice.value)); drawValue(); draw(); });
  byId("stage-kind").addEventListener("change", drawStages);
  bindHeat();
}
function drawValue() {
  cursor = null;
  if (data.untitled) document.title = document.querySelector("h1").textContent = `Influence on ${data.query}`;
  byId("summary").textContent = `${data.numSamples.toLocaleString("en")} ${unit}s, ${windows.length} window${windows.length === 1 ? "" : "s"}. The query is ${data.query}${data.numQueries > 1 ? `, one of ${data.numQueries} values asked${data.values.length > 1 ? "" : " (report's value= picks another)"}` : ""}.`;
  byId("legend").replaceChildren(...[["--helps", `Red, above 0: ${words.up}`], ["--harms", `Blue, below 0: ${words.down}`]].map(([name, text]) => { const item = node("li", {}, text); item.style.setProperty("--swatch", `var(${name})`); return item; }));
  if (data.stages) {
    const names = { kendall: "Kendall", spearman: "Spearman", pearson: "Pearson", jaccard: "Jaccard of the top tenth" }, choice = byId("stage-kind"), before = choice.value;
    choice.replaceChildren(...Object.keys(data.stages.kinds).map((kind) => node("option", { value: kind }, names[kind])));
    if (before in data.stages.kinds) choice.value = before;
  }
  byId("agreement").hidden = !data.agreement;
  if (data.agreement) plain(byId("agreement-table"), ["window", "samples", "Pearson", "Spearman", "Kendall", "top 10 %"], data.agreement.map((r) => [r.window, String(r.samples), fixed(r.pearson), fixed(r.spearman), fixed(r.kendall), percent(r.top)]));
  drawHeatNotes();
  drawPatterns();
}
function showPicked() {
  const strip = byId("windows"), label = strip.children[picked];
  label.firstChild.checked = true;
  strip.scrollLeft = label.offsetLeft - strip.offsetLeft - (strip.clientWidth - label.offsetWidth) / 2;
}
function pick(i) {
  picked = i;
  showPicked();
  draw();
}
function draw() {
  for (const place of document.querySelectorAll(".picked")) place.textContent = windows[picked].name;
  drawRun(); drawHeat(); drawCurves(); drawCards(); drawTable(); drawStages(); drawDetection();
}
take(data.place);
drawOnce();
drawValue();
showPicked();
draw();
let waiting = 0, drawnWidth = window.innerWidth;
addEventListener("resize", () => {
  if (window.innerWidth === drawnWidth) return;
  drawnWidth = window.innerWidth;
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(draw);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
