"""The style sheet of the page, light or dark as the reader's system prefers, and its script: search and links."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2330; --soft: #5a6577; --line: #d9dee7; --faint: #eceff4;
  --c1: #2f6fde; --c2: #b8560f; --c3: #1f7f60; --c4: #626d7f; --c5: #d1346b; --c6: #8457c9; --onfill: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151c; --card: #1a202a; --ink: #e6eaf1; --soft: #9aa6b8; --line: #323b49; --faint: #262e3a;
    --c1: #6ea2ff; --c2: #f2a05f; --c3: #4cc79e; --c4: #95a2b6; --c5: #f0648f; --c6: #b08cf0; --onfill: #10141b;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 24px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 24px; margin: 0 0 2px; } h2 { font-size: 20px; margin: 36px 0 12px; }
h3 { font-size: 15px; margin: 0 0 2px; }
p { margin: 4px 0; } .soft, .note { color: var(--soft); } .note { font-size: 13px; }
code { font: 0.92em ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; }
a { color: var(--c1); }
nav { margin: 8px 0; } nav a { margin-right: 14px; }
.grid2, .grid3, .cards { display: grid; gap: 14px; margin: 14px 0; }
.grid2 { grid-template-columns: repeat(auto-fill, minmax(min(590px, 100%), 1fr)); }
.grid3 { grid-template-columns: repeat(auto-fill, minmax(min(385px, 100%), 1fr)); }
.cards { grid-template-columns: repeat(auto-fill, minmax(138px, 1fr)); gap: 10px; }
.panel, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
  break-inside: avoid; min-width: 0; }
.whole-row { grid-column: 1 / -1; } .panel { margin: 14px 0; } .grid2 .panel, .grid3 .panel { margin: 0; }
.card { padding: 10px 14px; } .card b { display: block; font-size: 21px; line-height: 1.25; white-space: nowrap; }
.card span { color: var(--soft); font-size: 13px; }
.warn { border-left: 4px solid var(--c2); } .bad { border-left: 4px solid var(--c5); }
.legend { color: var(--soft); font-size: 13px; margin: 2px 0 4px; }
.legend span { margin-right: 14px; white-space: nowrap; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 5px;
  vertical-align: -1px; background: currentColor; }
.drawing > svg { display: block; width: 100%; height: auto; overflow: visible; } .plot { overflow: hidden; }
svg text { font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
.tick, .unit { fill: var(--soft); } .mark { fill: var(--ink); paint-order: stroke;
  stroke: var(--card); stroke-width: 3px; }
svg .inbar { fill: var(--onfill); font-size: 13px; }
.grid { stroke: var(--faint); stroke-width: 1; } .axis { stroke: var(--line); stroke-width: 1; }
.c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); }
.fill { fill: currentColor; } .open { opacity: 0.45; }
.line, .dot { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; } .dot { stroke-width: 5; stroke-linecap: round; }
.area { fill: currentColor; opacity: 0.16; }
.quantile { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 3 2; }
.hover { fill: transparent; } .hover:hover { fill: var(--soft); fill-opacity: 0.16; }
.scroll, .drawing { overflow-x: auto; }
.zoom { position: sticky; top: 0; z-index: 1; padding: 6px 0; background: var(--page); font-size: 13px; }
.zoom[hidden] { display: none; }
.zoom button { font: inherit; margin-right: 6px; padding: 4px 10px; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; cursor: pointer; }
.zoom output { color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--faint); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } .num { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tight { font-size: 12.5px; } .tight td, .tight th { padding: 5px 0 5px 6px; }
.tight td:first-child { padding-left: 0; }
td ul { margin: 0; padding-left: 16px; }
.wide td { overflow-wrap: anywhere; }
.columns { columns: 3 300px; column-gap: 30px; }
.columns div { display: flex; justify-content: space-between; gap: 12px; font-size: 13px; padding: 2px 0;
  border-bottom: 1px solid var(--faint); break-inside: avoid; }
.columns div span { color: var(--soft); }
.columns div b { font-weight: 500; text-align: right; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
.verdict { border-left: 4px solid var(--c1); }
input[type=search] { font: inherit; font-size: 14px; padding: 5px 9px; margin: 6px 0; width: min(340px, 100%);
  color: var(--ink); background: var(--page); border: 1px solid var(--line); border-radius: 6px; }
tr:target td { background: var(--faint); } tr[hidden] { display: none; } td .num { text-align: inherit; }
td a { color: inherit; text-decoration: none; } td a:hover { text-decoration: underline; }
@media (max-width: 700px) {
  body { padding: 16px 10px 40px; } svg.broad { min-width: 760px; }
  svg.broad text { font-size: 17.5px; } svg.middle text { font-size: 18.5px; } svg.small text { font-size: 12px; }
  svg .inbar { font-size: 17px; } .panel { padding: 12px; }
  .cards-if-narrow tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--line); }
  .cards-if-narrow tr[hidden], .cards-if-narrow tr:first-child, .cards-if-narrow .none { display: none; }
  .cards-if-narrow td { display: flex; gap: 10px; justify-content: space-between; padding: 2px 0; border: 0;
    text-align: right; overflow-wrap: anywhere; }
  .cards-if-narrow td::before { content: attr(data-label); color: var(--soft); text-align: left; flex: none;
    max-width: 50%; }
  .cards-if-narrow td ul { text-align: left; }
}
@media print { body { max-width: none; background: #fff; } .hover, .zoom { display: none; } }
"""

SCRIPT = """
const UNITS = [["h", 3600, 3], ["min", 60, 3], ["s", 1, 2], ["ms", 0.001, 0]];
function draw(plot, from, to) {
  const start = +plot.dataset.start, x = plot.x.baseVal.value, ticks = plot.parentElement.querySelector(".ticks");
  const scale = plot.width.baseVal.value / (plot.dataset.end - start), span = to - from;
  plot.setAttribute("viewBox", `${x + (from - start) * scale} 0 ${span * scale} ${plot.height.baseVal.value}`);
  const [unit, size] = UNITS.find(([name, size, least]) => span >= least * size);
  const rough = span / size / 10, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999), texts = [];
  for (let n = Math.ceil((from - start) / size / step - 1e-6); n * step * size <= to - start + 1e-9; n++) {
    const text = plot.parentElement.querySelector("text.tick").cloneNode();
    text.setAttribute("text-anchor", "middle");
    text.setAttribute("x", x + (n * step * size + start - from) / span * plot.width.baseVal.value);
    text.setAttribute("y", ticks.dataset.y);
    text.textContent = +(n * step).toPrecision(8);
    texts.push(text);
  }
  if (texts.length) texts.at(-1).textContent += " " + unit;
  ticks.replaceChildren(...texts);
}
for (const bar of document.querySelectorAll(".zoom")) {
  const plots = [...bar.parentElement.querySelectorAll(".plot")], shown = bar.querySelector("output");
  const first = Math.min(...plots.map((plot) => plot.dataset.start));
  const whole = Math.max(...plots.map((plot) => plot.dataset.end)) - first;
  let from = first, span = whole;
  const show = (start, wanted) => {
    span = Math.min(Math.max(wanted, whole / 1000), whole);
    from = Math.min(Math.max(start, first), first + whole - span);
    for (const plot of plots) {
      const isWhole = span === whole;
      draw(plot, isWhole ? +plot.dataset.start : from, isWhole ? +plot.dataset.end : from + span);
    }
    shown.value = span < whole ? `${(100 * span / whole).toPrecision(2)} % of the time` : "";
  };
  const actions = {
    in: () => show(from + span / 4, span / 2), out: () => show(from - span / 2, span * 2),
    back: () => show(from - span / 2, span), on: () => show(from + span / 2, span), all: () => show(first, whole),
  };
  bar.hidden = false;
  for (const button of bar.querySelectorAll("button")) button.addEventListener("click", actions[button.name]);
}
for (const box of document.querySelectorAll("input[type=search]")) {
  const rows = [...box.nextElementSibling.querySelectorAll("tr")].slice(1);
  box.addEventListener("input", () => {
    const wanted = box.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}
for (const row of document.querySelectorAll("tr[id]")) {
  const cell = row.cells[0], link = document.createElement("a");
  link.href = "#" + row.id;
  link.append(...cell.childNodes);
  cell.append(link);
}
"""
