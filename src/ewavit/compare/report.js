"use strict";
// Draws the page from the JSON in #data. It lays out and formats; every statistic was computed in Python.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const redrawn = []; // functions that draw again when the width or the shown arms change
const hidden = new Set();

// ---- elements and numbers

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "color") node.style.color = value;
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const known = (value) => typeof value === "number" && Number.isFinite(value);
const minus = (text) => text.replace("-", "−");
const fixed = (value, digits = judge.digits) => (known(value) ? minus(value.toFixed(digits)) : "–");
const signed = (value) => (known(value) ? (value > 0 ? "+" : "") + fixed(value) : "–");
const signed3 = (value) => (known(value) ? (value > 0 ? "+" : "") + fixed(value, 3) : "–");
const whole = (value) => (known(value) ? Math.round(value).toLocaleString("en") : "–");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const short = (value) => (known(value) ? compact.format(value) : "–");
const share = (value) => (known(value) ? `${Math.round(100 * value)} %` : "–");
const chance = (p) => (!known(p) ? "–" : p < 0.001 ? "<0.001" : p.toFixed(p < 0.1 ? 3 : 2));
// The metric that arms are compared by, in words; a value and a title with its unit.
const { judge } = data;
const trainedHere = Object.keys(data.recipe).length > 0;  // not by another program
const metric = judge.name;
const Metric = metric[0].toUpperCase() + metric.slice(1);
const comma = (unit) => (unit ? `, ${unit}` : "");
const valued = (value) => `${fixed(value)} ${judge.unit}`.trim();
const INTERVAL = "95\u00a0% interval";
const range = ([low, high], text = signed) => (known(low) ? `${text(low)} to ${text(high)}` : "–");
function small(value) {
  if (!known(value)) return "–";
  const rounded = Number(value.toPrecision(3));
  return minus(value !== 0 && Math.abs(value) < 1e-4 ? rounded.toExponential() : String(rounded));
}
function duration(seconds) {
  if (!known(seconds)) return "–";
  if (seconds < 100) return `${+seconds.toPrecision(2)} s`;
  return seconds < 6000 ? `${+(seconds / 60).toPrecision(3)} min` : `${+(seconds / 3600).toPrecision(3)} h`;
}

// ---- arms: colour tells them apart, the shape of the mark tells their role

const { statistics } = data;
const names = { reference: statistics.reference, control: statistics.best_control };
const ofRole = (one) => data.arms.filter(({ name, role }) => name !== names.reference && role === one);
const colored = [...ofRole("method"), ...ofRole("control")]; // methods have the first choice
for (const arm of data.arms) {
  const order = colored.indexOf(arm);
  const here = (list) => list.find((entry) => entry.arm === arm.name) ?? null;
  Object.assign(arm, statistics.arms.find(({ name }) => name === arm.name));
  arm.against = Object.fromEntries(Object.entries(statistics.against).map(([other, list]) => [other, here(list)]));
  arm.color = order < 0 ? "var(--dense)" : `var(--c${order % 6})`;
  arm.dash = order >= 6 ? "7 3" : null;
}
const trained = data.arms.filter((arm) => arm.runs.length);
const shown = () => trained.filter((arm) => !hidden.has(arm.name));

function mark(arm, x, y, radius, attributes) {
  const { color } = arm;
  if (arm.role !== "control") return svg("circle", { cx: x, cy: y, r: radius, color, ...attributes });
  const side = radius * 1.8;
  return svg("rect", { x: x - side / 2, y: y - side / 2, width: side, height: side, color, ...attributes });
}

const sample = (arm) => svg("svg", { width: 26, height: 12, "aria-hidden": "true" },
  svg("path", { d: "M0 6H26", class: "line", color: arm.color, "stroke-dasharray": arm.dash }),
  mark(arm, 13, 6, 4.5, { class: "mean" }));

// ---- one chart: scales, axes, reading a mark by pointer or arrow keys

function extent(values, pad = 0.04) {
  const real = values.filter(known);
  if (!real.length) return [0, 1];
  const [low, high] = [Math.min(...real), Math.max(...real)];
  const room = high > low ? pad * (high - low) : Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

function ticks([low, high], count) {
  const raw = (high - low) / Math.max(2.5, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * (raw < 1.5 * power ? 1 : raw < 3.5 * power ? 2 : raw < 7.5 * power ? 5 : 10);
  const first = Math.ceil(low / step - 1e-9);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const length = Math.floor(high / step + 1e-9) - first + 1;
  const values = Array.from({ length }, (_, i) => (first + i) * step);
  return values.map((value) => [value, digits > 4 ? small(value) : minus(value.toFixed(digits))]);
}

function axes(box, settings) {
  const { label, x, y, height, left = 44, right = 14, top = 12, xTitle = "", xText = null, strips = [] } = settings;
  const bottom = xTitle ? 40 : 24;
  const width = Math.max(240, box.clientWidth);
  const root = svg("svg", { width, height, role: "img", "aria-label": label, tabindex: 0 });
  const X = (value) => left + ((value - x[0]) / (x[1] - x[0])) * (width - left - right);
  const Y = (value) => height - bottom - ((value - y[0]) / (y[1] - y[0])) * (height - top - bottom);
  for (const [value, text] of y ? ticks(y, (height - top - bottom) / 56) : []) {
    root.append(svg("path", { class: "grid", d: `M${left} ${Y(value)}H${width - right}` }));
    root.append(svg("text", { x: left - 8, y: Y(value) + 4, "text-anchor": "end" }, text));
  }
  for (const [value, text] of ticks(x, (width - left - right) / 96)) {
    for (const [y1, y2] of strips) root.append(svg("path", { class: "grid", d: `M${X(value)} ${y1}V${y2}` }));
    const words = xText ? xText(value) : text;
    const half = 3.6 * words.length;
    const anchor = X(value) + half > width ? "end" : X(value) < half ? "start" : "middle";
    root.append(svg("text", { x: X(value), y: height - bottom + 18, "text-anchor": anchor }, words));
  }
  root.append(svg("text", { x: width - right, y: height - 4, "text-anchor": "end" }, xTitle));
  box.append(root);
  return { root, X, Y, width, left, right, top, bottom, height };
}

const tip = at("tip");
function readable({ root, top, height, bottom }, stops, byColumn) {
  let current = -1;
  const cursor = byColumn
    ? svg("line", { class: "cursor", y1: top, y2: height - bottom })
    : svg("circle", { class: "cursor", r: 8 });
  const hide = () => {
    tip.hidden = true;
    cursor.remove();
    current = -1;
  };
  const show = (index) => {
    if (index === current) return;
    current = index;
    const { x, y, title, rows } = stops[index];
    const lines = rows.map(([color, name, value]) =>
      html("div", {}, color ? html("i", { color }) : null, html("span", {}, name), html("span", {}, value)));
    tip.replaceChildren(html("b", {}, title), ...lines);
    fill(cursor, byColumn ? { x1: x, x2: x } : { cx: x, cy: y }, []);
    root.append(cursor);
    tip.hidden = false;
    const [frame, size] = [root.getBoundingClientRect(), tip.getBoundingClientRect()];
    const inside = (start, long, all) => Math.max(8, Math.min(start, all - long - 8));
    const right = frame.left + x + 14;
    const left = right + size.width > innerWidth - 8 ? right - size.width - 28 : right;
    tip.style.left = `${inside(left, size.width, innerWidth)}px`;
    tip.style.top = `${scrollY + inside(frame.top + (byColumn ? top : y + 14), size.height, innerHeight)}px`;
  };
  const point = (event) => {
    const frame = root.getBoundingClientRect();
    const distance = stops.map(({ x, y }) =>
      Math.hypot(event.clientX - frame.left - x, byColumn ? 0 : event.clientY - frame.top - y));
    const nearest = distance.indexOf(Math.min(...distance));
    if (byColumn || distance[nearest] < 28) show(nearest);
    else hide();
  };
  const keys = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  if (!stops.length) return;
  fill(root, {
    onpointermove: point, onpointerdown: point, onblur: hide,
    onpointerleave: (event) => event.pointerType === "mouse" && hide(), // what a tap shows stays till the next
    onfocus: () => root.matches(":focus-visible") && show(byColumn ? stops.length - 1 : 0),
    onkeydown: (event) => {
      if (event.key === "Escape") hide();
      if (!(event.key in keys)) return;
      event.preventDefault();
      show((Math.max(current, 0) + keys[event.key] + stops.length) % stops.length);
    },
  }, []);
}

/** A place for a figure. `draw` is called whenever needed; it returns a function that lists the numbers. */
function figure(holder, draw, caption = null) {
  const canvas = html("div", { class: "canvas" });
  const named = { role: "region", "aria-label": "Numbers of the figure" };
  const numbers = html("div", { class: "numbers", tabindex: 0, ...named });
  const details = html("details", {}, html("summary", {}, "Numbers"), numbers);
  const note = html("p", { class: "caption" });
  holder.append(canvas, ...(caption ? [note] : []), details);
  let table = null;
  const list = () => details.open && numbers.replaceChildren(plainTable(table()));
  const again = () => {
    canvas.replaceChildren();
    tip.hidden = true;
    table = draw(canvas);
    if (caption) note.textContent = caption();
    list();
  };
  details.addEventListener("toggle", list);
  redrawn.push(again);
}

function plainTable([head, ...body]) {
  const row = ([first, ...others]) =>
    html("tr", {}, html("th", { scope: "row" }, first), others.map((cell) => html("td", {}, cell)));
  const heads = head.map((cell) => html("th", { scope: "col" }, cell));
  return html("table", {}, html("thead", {}, html("tr", {}, heads)), html("tbody", {}, body.map(row)));
}

/** Two or more buttons of which one is pressed. */
function choice(holder, options, pressed, changed) {
  const buttons = options.map(([value, text]) =>
    html("button", { type: "button", "aria-pressed": value === pressed, onclick: () => {
      for (const [i, button] of buttons.entries()) button.setAttribute("aria-pressed", options[i][0] === value);
      changed(value);
      redrawn.forEach((draw) => draw());
    } }, text));
  holder.append(html("div", { class: "switch" }, buttons));
}

// ---- charts of three kinds: lines over images, points, and rows with an interval

/** series: {name, color, dash, x, y, low, high, kind}; all of them read at the columns of the longest. */
function lines(box, { series, label, height, text, xTitle = `training ${data.kind}`, direct = false, zero = false,
  lowFirst = false }) {
  const columns = [...new Set(series.flatMap(({ x }) => x))].sort((a, b) => a - b);
  const longest = Math.max(...series.map(({ name }) => Math.min(name.length, 20)));
  const right = direct && box.clientWidth > 640 ? longest * 7 + 30 : 14;
  const values = series.flatMap(({ y, low = [], high = [] }) => [...y, ...low, ...high]);
  const y = extent(zero ? [0, ...values] : values);
  if (zero) y[0] = 0;
  const x = columns.length > 1 ? [zero ? 0 : columns[0], columns.at(-1)] : [0, columns[0]];
  const chart = axes(box, { label, height, x, y, left: zero ? 56 : 44, right, xTitle, xText: short });
  const { root, X, Y } = chart;
  const path = (places, values) => places.map((place, i) => {
    if (!known(values[i])) return "";
    return `${i && known(values[i - 1]) ? "L" : "M"}${X(place).toFixed(1)} ${Y(values[i]).toFixed(1)}`;
  }).join("");
  for (const { name, x: places, low, high, color } of series.filter(({ low }) => low)) {
    const both = places.map((_, i) => i).filter((i) => known(low[i]) && known(high[i]));
    const along = (indices, values) => path(indices.map((i) => places[i]), indices.map((i) => values[i]));
    const d = `${along(both, high)}${along([...both].reverse(), low).replace("M", "L")}Z`;
    const flat = both.length < 2; // one evaluated epoch: the band is an upright line
    const only = flat ? { class: "interval", stroke: "currentColor" } : { class: "band" };
    if (both.length) root.append(svg("path", { ...only, "data-name": name, color, d }));
  }
  for (const { x: places, y: values, color = "var(--muted)", dash, kind = "line", name } of series) {
    const [cx, cy] = [X(places[0]), Y(values[0])];
    if (places.length === 1 && known(values[0]))
      root.append(svg("circle", { class: "mean", "data-name": name, color, cx, cy, r: 5 }));
    const d = path(places, values);
    root.append(svg("path", { class: kind, "data-name": name, color, d, "stroke-dasharray": dash }));
  }
  if (right > 14) labelEnds(chart, series);
  const read = (column) => series.map(({ x: places, y: values, color = "var(--muted)", name }) =>
    ({ color, name, value: values[places.indexOf(column)] }));
  const told = (column) => read(column).filter(({ value }) => known(value))
    .sort((a, b) => (lowFirst ? a.value - b.value : b.value - a.value))
    .map(({ color, name, value }) => [color, name, text(value)]);
  readable(chart, columns.map((column) =>
    ({ x: X(column), title: `${whole(column)} ${data.kind}`, get rows() { return told(column); } })), true);
  return () => [[`training ${data.kind}`, ...series.map(({ name }) => name)],
    ...columns.map((column) => [whole(column), ...read(column).map(({ value }) => text(value))])];
}

/** Names at the ends of the lines, pushed apart. */
function labelEnds({ root, X, Y, top, height, bottom }, series) {
  const ends = series.filter(({ y }) => known(y.at(-1)))
    .map(({ name, color, x, y }) => ({ name, color, x: X(x.at(-1)), from: Y(y.at(-1)), to: Y(y.at(-1)) }))
    .sort((a, b) => a.from - b.from);
  const gap = Math.min(15, (height - top) / ends.length);
  for (let i = 1; i < ends.length; i++) ends[i].to = Math.max(ends[i].to, ends[i - 1].to + gap);
  const over = ends.length ? Math.max(0, ends.at(-1).to - (height - bottom)) : 0;
  if (over) ends.at(-1).to -= over;
  for (let i = ends.length - 2; over && i >= 0; i--) ends[i].to = Math.min(ends[i].to, ends[i + 1].to - gap);
  for (const { name, color, x, from, to } of ends) {
    root.append(svg("path", { class: "leader", "data-name": name, color, d: `M${x + 3} ${from}L${x + 16} ${to}` }));
    root.append(svg("text", { class: "direct", "data-name": name, color, x: x + 20, y: to + 4 }, cut(name, 20)));
  }
}
const cut = (name, length) => (name.length > length ? `${name.slice(0, length - 1)}…` : name);

const LABEL_PLACES = [[10, 4, "start"], [-10, 4, "end"], [0, -11, "middle"], [0, 19, "middle"],
  [10, -9, "start"], [10, 17, "start"]]; // beside a mark, in order of preference

/** groups: {arm, points: [{x, y, title, rows}], mean: {...}}. */
function scatter(box, { groups, ...settings }) {
  const all = groups.flatMap(({ points, mean }) => [...points, mean]);
  const [x, y] = [extent(all.map((point) => point.x), 0.08), extent(all.map((point) => point.y), 0.08)];
  const chart = axes(box, { x, y, ...settings });
  const { root, X, Y, width, right } = chart;
  const drawn = (point) => known(point.x) && known(point.y);
  const place = (point) => ({ ...point, x: X(point.x), y: Y(point.y) });
  const stops = [];
  for (const { arm, points } of groups) for (const point of points.filter(drawn).map(place)) {
    root.append(mark(arm, point.x, point.y, 3, { class: "seed" }));
    stops.push(point);
  }
  const means = groups.filter(({ mean }) => drawn(mean)).map(({ arm, mean }) => ({ arm, ...place(mean) }));
  const around = (radius) => ({ x, y }) => [x - radius, y - radius, x + radius, y + radius];
  const taken = [...stops.map(around(3)), ...means.map(around(7))];
  const meets = (a, b) => a[2] > b[0] && a[0] < b[2] && a[3] > b[1] && a[1] < b[3];
  for (const { arm, x, y } of means) root.append(mark(arm, x, y, 6, { class: "mean" }));
  for (const { arm, x, y } of means) {
    const name = cut(arm.name, 20);
    const long = name.length * 6.8;
    for (const [dx, dy, anchor] of LABEL_PLACES) {
      const from = x + dx - (anchor === "end" ? long : anchor === "middle" ? long / 2 : 0);
      const area = [from, y + dy - 11, from + long, y + dy + 3];
      if (area[0] < chart.left || area[2] > width - right + 8 || area[1] < 0) continue;
      if (taken.some((other) => meets(area, other))) continue;
      taken.push(area);
      const attributes = { class: "direct", color: arm.color, x: x + dx, y: y + dy, "text-anchor": anchor };
      root.append(svg("text", attributes, name));
      break;
    }
  }
  readable(chart, [...means, ...stops], false);
}

/** items: {arm, mean, low, high, seeds: [[seed, value]], text, rows}; values beyond `x` sit on its edge. */
function rows(box, { items, x, zero, sides = null, ...settings }) {
  const wide = box.clientWidth > 600;
  const [row, top] = [wide ? 44 : 54, sides ? 30 : 8];
  const middle = (i) => top + (i + 0.5) * row + (wide ? -4 : 7);
  // Lines of the grid run through; on narrow pages they leave out the words above each row.
  const strips = wide ? [[top, top + items.length * row]] : items.map((_, i) => [middle(i) - 10, middle(i) + 19]);
  const longest = Math.max(...items.map(({ arm }) => Math.min(arm.name.length, 24)));
  const [left, right] = wide ? [Math.min(190, longest * 7.6 + 12), 170] : [8, 8];
  const chart = axes(box, { x, y: null, height: top + items.length * row + 42, left, right, top, strips, ...settings });
  const { root, X, width } = chart;
  const clamp = (value) => X(Math.min(x[1], Math.max(x[0], value)));
  for (const [y1, y2] of strips) root.append(svg("path", { class: "zero", d: `M${X(zero)} ${y1}V${y2}` }));
  if (sides) for (const [i, side] of sides.entries())
    root.append(svg("text", { x: X(zero) + (i ? 8 : -8), y: 13, "text-anchor": i ? "start" : "end" }, side));
  const stops = [];
  items.forEach(({ arm, mean, low, high, seeds, text, rows: told }, i) => {
    const y = middle(i);
    const { color } = arm;
    const words = { y: wide ? y + 7 : y - 16 };
    const name = cut(arm.name, wide ? 24 : 22);
    root.append(svg("text", { class: "name", x: 0, ...words }, svg("title", {}, arm.name), name));
    root.append(svg("text", { class: "value", x: width, "text-anchor": "end", ...words }, text));
    const place = clamp(mean);
    const outside = known(mean) && place !== X(mean);
    if (known(low) && !outside) {
      root.append(svg("path", { class: "interval", color, d: `M${clamp(low)} ${y}H${clamp(high)}` }));
      for (const [value, sign] of [[low, -1], [high, 1]]) {
        const end = clamp(value);
        const back = end - (end === X(value) ? 0 : 6 * sign); // an arrowhead where it goes on
        root.append(svg("path", { class: "line", color, d: `M${back} ${y - 5}L${end} ${y}L${back} ${y + 5}` }));
      }
    }
    for (const [, value] of seeds) if (known(value)) root.append(mark(arm, clamp(value), y + 13, 3, { class: "seed" }));
    if (!known(mean)) return;
    const side = mean < zero ? 1 : -1;
    const head = `M${place + 9 * side} ${y - 6}L${place - 3 * side} ${y}l${12 * side} 6Z`;
    root.append(outside ? svg("path", { class: "mean", color, d: head }) : mark(arm, place, y, 6, { class: "mean" }));
    stops.push({ x: place, y, title: arm.name, rows: told });
  });
  readable(chart, stops, false);
}

/** What a figure of `rows` or of one number per seed lists. */
const seedColumns = () => data.seeds.map((seed) => `seed ${seed}`);
const perSeed = (seeds, text) => data.seeds.map((seed) => text(seeds.find(([one]) => one === seed)?.[1]));

// ---- the page from top to bottom

const pairs = (facts) => Object.entries(facts).map(([key, value]) =>
  html("div", {}, html("dt", {}, key), html("dd", {}, typeof value === "string" ? value : JSON.stringify(value))));

function header() {
  at("name").append(data.name, ...(data.limited ? [html("span", { class: "badge" }, "quick look")] : []));
  const typeset = (text) => text.replaceAll(" %", "\u00a0%").replace(/(?<=\s)-(?=\d)/g, "−");
  const capital = (word) => word[0].toUpperCase() + word.slice(1);
  at("verdict").textContent = typeset(statistics.claim.replace(/^(whether|primary contrast)/, capital));  // arm names stay
  at("setting").textContent = typeset(`${statistics.setting}.`);
  at("verdicts").append(...statistics.verdicts.map(({ arm: name, sentence }) =>
    html("li", {}, sample(data.arms.find((arm) => arm.name === name)), html("span", {}, typeset(sentence)))));
  at("facts").append(...pairs({ Data: data.data, Seeds: data.seeds.join(", "), ...(data.device && { Device: data.device }), When: data.date }));
  const theme = document.documentElement.dataset;
  const dark = () => (theme.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => (at("theme").textContent = dark() ? "Light theme" : "Dark theme");
  at("theme").addEventListener("click", () => {
    theme.theme = dark() ? "light" : "dark";
    label();
  });
  label();
}

/** A forest plot of one outcome: paired differences of all arms with the arm that `other()` names. */
function forest(holder, { other, outcome, title, unit, signed: text, sides, note }) {
  figure(holder, (box) => {
    const items = data.arms.filter((arm) => arm.against[other()]).map((arm) => {
      const pair = arm.against[other()];
      const { mean, interval, differences: values, p_value, holm_p } = outcome(pair);
      const [low, high] = interval;
      const seeds = pair.seeds.map((seed, i) => [seed, values[i]]);
      const told = [["difference", text(mean)], [INTERVAL, range(interval, text)], ["p, paired t", chance(p_value)],
        ...(holm_p === undefined ? [] : [["p, Holm", chance(holm_p)]]),
        ...seeds.slice(0, 12).map(([seed, value]) => [`seed ${seed}`, text(value)])];
      const ends = known(low) ? `  [${text(low)}, ${text(high)}]` : ", no interval";
      const words = known(mean) ? text(mean) + ends : "no finished pair";
      return { arm, mean, low, high, seeds, text: words, rows: told.map((row) => ["", ...row]) };
    });
    if (!items.length) return nothing(box, "There is no other arm to compare with.");
    // One arm that diverged must not flatten the others: it leaves the scale.
    const reach = items.map(({ low, high, mean, seeds }) =>
      Math.max(0, ...[low, high, mean, ...seeds.map(([, value]) => value)].filter(known).map(Math.abs)));
    const sorted = reach.filter((value) => value > 0).sort((a, b) => a - b);
    const far = sorted.length ? Math.min(sorted.at(-1), 4 * sorted[Math.floor(sorted.length / 2)]) * 1.05 : 1;
    const spoken = items.map(({ arm, text: words }) => `${arm.name} ${words}`).join("; ");
    rows(box, { items, x: [-far, far], zero: 0, sides, xTitle: `${title} minus ${cut(other(), 30)}’s${comma(unit)}`,
      label: `Forest plot of the paired differences in ${title} against ${other()}: ${spoken}` });
    return () => [["arm", "difference", INTERVAL, ...seedColumns()], ...items.map(({ arm, mean, low, high, seeds }) =>
      [arm.name, text(mean), range([low, high], text), ...perSeed(seeds, text)])];
  }, () => note);
}

const SIDES = { higher: ["worse ←", "→ better"], lower: ["better ←", "→ worse"] };

function differences() {
  let against = names.reference;
  const options = data.arms.map(({ name }) =>
    html("option", { value: name }, cut(name, 30) + (name === names.control ? ", the best control" : "")));
  const select = html("select", { id: "against", onchange: () => {
    against = select.value;
    redrawn.forEach((draw) => draw());
  } }, options);
  select.value = against;
  at("reference").append(html("label", { for: "against" }, "against "), select);
  const other = () => against;
  forest(at("differences"), { other, outcome: (pair) => pair, title: metric, unit: judge.difference_unit, signed,
    sides: SIDES[judge.higher_is_better ? "higher" : "lower"],
    note: `Large mark: mean over the seeds; line: its ${INTERVAL}; small marks: one seed each. ` +
      "Squares are controls, circles are methods; an arrowhead points to what lies outside." });
  forest(at("losses"), { other, outcome: ({ loss }) => loss, title: "loss", unit: "", signed: signed3,
    sides: SIDES.lower, note: "The second outcome: a loss has less noise than most metrics and needs fewer seeds." });
}
function nothing(box, text) {
  box.append(html("p", { class: "caption" }, text));
  return () => [[""]];
}

function legend() {
  const fade = (name) => {
    for (const part of document.querySelectorAll("[data-name]"))
      part.classList.toggle("faded", name !== null && part.dataset.name !== name);
  };
  at("legend").append(...trained.map((arm) => {
    const [on, off] = [() => hidden.has(arm.name) || fade(arm.name), () => fade(null)];
    const toggle = (event) => {
      if (!hidden.delete(arm.name)) hidden.add(arm.name);
      event.currentTarget.setAttribute("aria-pressed", !hidden.has(arm.name));
      redrawn.forEach((draw) => draw());
    };
    const events = { onclick: toggle, onpointerenter: on, onfocus: on, onpointerleave: off, onblur: off };
    return html("button", { type: "button", "aria-pressed": "true", ...events }, sample(arm), html("span", {}, arm.name));
  }));
}

function curves() {
  const last = Math.max(0, ...trained.flatMap((arm) => arm.curve.images));
  let from = 0;
  if (trained.some((arm) => arm.curve.images.length > 5))
    choice(at("span"), [[0, "whole training"], [0.6, "last 40\u00a0%"]], from, (value) => (from = value));
  figure(at("curves"), (box) => {
    const series = shown().map(({ name, color, dash, curve: { images, mean, low, high } }) => {
      const [x, y, ...band] = [images, mean, low, high].map((list) => list.filter((_, i) => images[i] >= from * last));
      return { name, color, dash, x, y, low: band[0], high: band[1] };
    });
    if (!series.length) return nothing(box, "No arm is shown.");
    const ends = shown().map((arm) => `${arm.name} ends at ${valued(arm.mean)}`).join(", ");
    return lines(box, { series, height: 380, text: fixed, direct: true, lowFirst: !judge.higher_is_better,
      label: `${Metric} against training ${data.kind}: ${ends}` });
  }, () => `${Metric}${trainedHere ? ` on ${data.recipe.holdout ? "held-out training" : "test"} ${data.kind}` : ""}${comma(judge.unit)}. ` +
    "Line: mean over the seeds; band: from the worst seed to the best.");
}

function cost() {
  const longest = Math.max(0, ...trained.map(({ seconds }) => seconds));
  const [scale, word] = longest < 100 ? [1, "seconds"] : longest < 6000 ? [60, "minutes"] : [3600, "hours"];
  const units = { // [title, of an arm or a run, text]
    time: [`training time, ${word}`, ({ seconds }) => (known(seconds) ? seconds / scale : null), small],
    images: [`training ${data.kind}`, ({ images }) => images, short],
    memory: ["peak memory, MiB", ({ peak_memory_mib }) => peak_memory_mib, whole],
  };
  let unit = "time";
  const words = { images: data.kind };
  choice(at("unit"), Object.keys(units).map((key) => [key, words[key] ?? key]), unit, (value) => (unit = value));
  figure(at("cost"), (box) => {
    const [xTitle, of, format] = units[unit];
    const point = (x, y, title) => ({ x, y, title, rows: [["", metric, valued(y)], ["", xTitle, format(x)]] });
    const groups = shown().map((arm) => ({ arm, mean: point(of(arm), arm.mean, `${arm.name}, mean`),
      points: arm.runs.map((run) => point(of(run), run[judge.column], `${arm.name}, seed ${run.seed}`)) }));
    if (!groups.length) return nothing(box, "No arm is shown.");
    if (!groups.some(({ mean }) => known(mean.x))) return nothing(box, "It was not measured.");
    const spoken = groups.map(({ arm, mean }) => `${arm.name} ${valued(mean.y)} at ${format(mean.x)}`).join(", ");
    scatter(box, { groups, height: 400, xTitle, xText: format, label: `${Metric} against ${xTitle}: ${spoken}` });
    return () => [["run", metric, xTitle], ...groups.flatMap(({ mean, points }) => [mean, ...points])
      .map(({ title, y, x }) => [title, fixed(y), format(x)])];
  }, () => `Final ${metric}${comma(judge.unit)}. Large: mean of the arm; small: one run.`);
}

function time() {
  figure(at("time"), (box) => {
    const items = shown().map((arm) => {
      const { time_to_reference: mean, reached, paired } = arm;
      const seeds = arm.runs.map(({ seed, time_to_dense }) => [seed, time_to_dense]);
      const told = seeds.slice(0, 12).map(([seed, value]) => ["", `seed ${seed}`, known(value) ? share(value) : "not reached"]);
      return { arm, mean, seeds, rows: told, text: reached ? `${share(mean)}, ${reached} of ${paired} seeds` : "not reached" };
    });
    if (!items.length) return nothing(box, "No arm is shown.");
    const far = Math.max(1, ...items.flatMap(({ seeds }) => seeds.map(([, value]) => value ?? 0)));
    const spoken = items.map(({ arm, text }) => `${arm.name} ${text}`).join("; ");
    rows(box, { items, x: [0, far * 1.03], zero: 1, xText: share,
      xTitle: `share of ${cut(names.reference, 20)}’s training ${data.kind}`,
      label: `Time to the final ${metric} of ${names.reference}: ${spoken}` });
    return () => [["arm", "mean", "reached", ...seedColumns()], ...items.map(({ arm, mean, seeds }) =>
      [arm.name, share(mean), `${arm.reached} of ${arm.paired}`, ...perSeed(seeds, share)])];
  }, () => `When an arm first was as good as ${names.reference} is at the end of its training. ` +
    "The mean is over the seeds that got there.");
}

const mixed = trained.filter((arm) => Object.keys(arm.spread.layers).length);

function spread() {
  at("spread-section").hidden = !mixed.length;
  if (!mixed.length) return;
  for (const arm of mixed) {
    const holder = html("div", {}, html("h3", {}, arm.name));
    at("spread").append(holder);
    const layers = Object.entries(arm.spread.layers);
    const depth = (i) => Math.round((100 * i) / Math.max(1, layers.length - 1));
    figure(holder, (box) => {
      holder.hidden = hidden.has(arm.name);
      if (holder.hidden) return () => [[""]];
      const x = arm.curve.images;
      const series = layers.map(([name, y], i) =>
        ({ name, x, y, color: `color-mix(in oklab, var(--late) ${depth(i)}%, var(--early))` }));
      const { predicted } = arm.spread;
      if (predicted.some(known)) series.push({ name: "predicted, mean of layers", kind: "predicted", x, y: predicted });
      const ends = layers.map(([name, y]) => `${name} ${small(y.at(-1))}`).join(", ");
      return lines(box, { series, height: 190, text: small, zero: true, xTitle: "",
        label: `Expert spread of ${arm.name} by layer; at the end ${ends}` });
    });
  }
  const first = Object.keys(mixed[0].spread.layers);
  const last = first.length > 1 ? first.at(-1) : null;
  const keys = [html("span", { class: "key" }, first[0], html("span", { class: "ramp" }), last)];
  if (mixed.some((arm) => arm.spread.predicted.some(known)))
    keys.push(html("span", { class: "key" }, html("span", { class: "dash" }), "predicted by theory, mean of the layers"));
  at("spread-keys").append(...keys);
}

function schedules() {
  const panel = (holder, title, key, arms) => {
    holder.hidden = !arms.length;
    holder.append(html("h3", {}, title));
    figure(holder, (box) => {
      const series = shown().filter((arm) => arms.includes(arm)).map(({ name, color, dash, curve, schedule }) =>
        ({ name, color, dash, x: curve.images, y: schedule[key] }));
      if (!series.length) return nothing(box, "No arm is shown.");
      const peaks = series.map(({ name, y }) => `${name} peaks at ${small(Math.max(...y))}`).join(", ");
      return lines(box, { series, height: 220, text: small, zero: true, label: `${title}: ${peaks}` });
    });
  };
  at("schedules-section").hidden = !trainedHere;
  panel(at("share"), "Share rate", "share_rate", mixed);
  panel(at("rate"), "Learning rate", "lr", trained);
}

function columnGroups() {
  const column = (title, value, format, more = {}) => ({ title, value, text: (arm) => format(value(arm)), ...more });
  const number = (title, key, format) => column(title, (arm) => arm[key], format);
  const against = (key) => {
    const p = (title, name) => column(title, (arm) => arm.against[key]?.[name], chance);
    const right = (arm) => arm.against[key]?.mcnemar;
    return [
      column("difference", (arm) => arm.against[key]?.mean, signed),
      { title: INTERVAL, value: (arm) => arm.against[key]?.interval[0],
        text: (arm) => range(arm.against[key]?.interval ?? []) },
      p("p, paired t", "p_value"), p("p, permutation", "permutation_p"), p("p, Holm", "holm_p"),
      column("difference in loss", (arm) => arm.against[key]?.loss.mean, signed3),
      { title: `${INTERVAL} of it`, value: (arm) => arm.against[key]?.loss.interval[0],
        text: (arm) => range(arm.against[key]?.loss.interval ?? [], signed3) },
      column("p of it", (arm) => arm.against[key]?.loss.p_value, chance),
      column("p, McNemar", (arm) => right(arm)?.p_value, chance, { more: (arm) =>
        (right(arm) ? ` (${whole(right(arm).only_arm)} : ${whole(right(arm).only_reference)})` : "") }),
    ];
  };
  const groups = [
    ["", [number("arm", "name", String)]],
    ["Setting", [{ ...number("role", "role", String), kind: "text" }, number("learning rate", "lr", small),
      column("runs", (arm) => arm.runs.length, (runs) => `${runs} of ${data.seeds.length}`)]],
    [`${Metric}${comma(judge.unit)}`, [number("mean", "mean", fixed), number("sd", "sd", fixed)]],
    [`Against ${names.reference}${comma(judge.difference_unit)}`, against(names.reference)],
  ];
  if (names.control && names.control !== names.reference)
    groups.push([`Against ${names.control}, the best control${comma(judge.difference_unit)}`, against(names.control)]);
  groups.push(["Cost of a training", [number("time", "seconds", duration), number(data.kind, "images", whole),
    number("peak memory, MiB", "peak_memory_mib", whole),
    column(`time to ${names.reference}`, (arm) => arm.time_to_reference, share,
      { more: (arm) => ` (${arm.reached} of ${arm.paired})` })]]);
  return groups;
}

function table() {
  const groups = columnGroups();
  const columns = groups.flatMap(([, list]) =>
    list.map((column, i) => ({ ...column, kind: `${column.kind ?? ""} ${i ? "" : "first"}` })));
  const body = html("tbody");
  const cell = (arm) => ({ text, more, kind }, i) =>
    html(i ? "td" : "th", { class: kind, scope: i ? null : "row", title: i ? null : arm.name }, text(arm),
      more?.(arm) ? html("small", {}, more(arm)) : null);
  const list = (arms) => body.replaceChildren(...arms.map((arm) => html("tr", {}, columns.map(cell(arm)))));
  const heads = columns.map(({ title, value, kind }) => {
    const head = html("th", { class: kind, scope: "col" }, html("button", { type: "button", onclick: () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
      const missing = (arm) => (value(arm) ?? null) === null; // last, up and down
      const order = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b) * sign;
      list([...data.arms].sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : order(value(a), value(b)))));
    } }, title));
    return head;
  });
  const over = groups.map(([title, { length }]) =>
    html(title ? "th" : "td", { class: "first", colspan: length, scope: title ? "colgroup" : null }, title));
  at("table").append(html("table", {},
    html("thead", {}, html("tr", { class: "groups" }, over), html("tr", {}, heads)), body));
  list(data.arms);
}

function failures() {
  const failed = data.arms.flatMap(({ name, errors }) => Object.entries(errors).map(([seed, error]) =>
    html("li", {}, html("b", {}, `${name}, seed ${seed}`), html("code", {}, error))));
  at("failed-section").hidden = !failed.length;
  at("failed").append(...failed);
}

function tuning() {
  at("tuning-section").hidden = !data.tuning.length;
  const label = (settings) => Object.entries(settings ?? {}).map(([name, value]) => `${name} ${small(value)}`).join(", ");
  const tried = [...new Set(data.tuning.map((run) => label(run.tried)))];
  const tuned = data.arms.filter(({ name }) => data.tuning.some(({ arm }) => arm === name));
  const found = (name, settings) => data.tuning.filter((run) => run.arm === name && label(run.tried) === settings)
    .map((run) => fixed(run[judge.column])).join(", ") || "–";
  const made = plainTable([["settings", ...tuned.map(({ name }) => name)],
    ...tried.map((settings) => [settings, ...tuned.map(({ name }) => found(name, settings))])]);
  tuned.forEach(({ chosen }, i) => tried.forEach((settings, row) =>
    made.tBodies[0].rows[row].cells[i + 1].classList.toggle("chosen", settings === label(chosen))));
  at("tuning").append(made, ...data.choices.map((text) => html("p", { class: "caption" }, `${text}.`)));
}

function making() {
  at("best").textContent = names.control ?? "none";
  at("command").textContent = data.command;
  at("versions").append(...pairs({ ...(data.device && { device: data.device }), ...data.versions }));
  at("recipe-details").hidden = at("overrides-details").hidden = !trainedHere;
  at("recipe").append(...pairs(data.recipe));
  at("overrides").append(...pairs(Object.fromEntries(data.arms.map(({ name, overrides }) => [name, overrides]))));
}

[header, legend, differences, curves, cost, time, spread, schedules, table, failures, tuning, making].forEach((part) => part());
redrawn.forEach((draw) => draw());
let width = document.body.clientWidth;
new ResizeObserver(() => {
  if (document.body.clientWidth === width) return;
  width = document.body.clientWidth;
  redrawn.forEach((draw) => draw());
}).observe(document.body);
