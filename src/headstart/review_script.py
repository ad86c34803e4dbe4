"""The review of doubtful labels as it runs in the browser: its style sheet and its script. Nothing here loads anything.

The script reads one JSON block (`id="review-data"`): root, classes, rows (path, label, split, group, drop,
original_label, reason), outside (positions of rows whose path is in full), queue (row, suggested, label_prob,
suggested_prob, image, address). It writes what `manifest.read_manifest` reads. Names reach the page as text nodes only.
"""

from __future__ import annotations

STYLE = """
a { color: var(--val); }
.counted { display: flex; flex-wrap: wrap; gap: 4px 28px; margin: 14px 0 18px; padding: 0; list-style: none;
  font-size: 1.5rem; font-weight: 650; letter-spacing: -.01em; }
.counted li { font-size: inherit; } .counted .none { color: var(--soft); font-weight: 500; }
.severity { font-weight: 650; white-space: nowrap; }
.error { color: var(--bad); } .warning { color: var(--note); }
.severity.note { color: var(--soft); font-size: inherit; }
.findings td p { margin: 0; max-width: 70ch; overflow-wrap: anywhere; } .findings td p + p { margin-top: 3px; }
.findings td:nth-child(2) { width: 100%; } .findings tbody th { min-width: 0; }
.sheet, .groups { display: flex; flex-wrap: wrap; gap: 16px; margin: 10px 0; padding: 0; list-style: none; }
.sheet > li { width: 124px; font-size: .82rem; line-height: 1.35; }
.sheet img, .sheet .gone { width: 124px; height: 124px; object-fit: contain; background: var(--panel); display: grid;
  place-items: center; text-align: center; border-radius: 4px; margin-bottom: 4px; color: var(--soft); }
.sheet .path { color: var(--soft); font-size: .76rem; } .sheet .path, .sheet .said { display: -webkit-box;
  -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; overflow-wrap: anywhere; }
.groups > li { border: 1px solid var(--rule); border-radius: 6px; padding: 10px 12px; min-width: 0; }
.groups .sheet { margin: 0; gap: 12px; }
.sheet-of { scroll-margin-top: 64px; }
details summary h3 { display: inline; margin: 0; color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
.files { font-size: .85rem; padding-left: 1.2em; overflow-wrap: anywhere; }
.start { display: inline-block; background: var(--val); color: var(--strong); font-weight: 600; text-decoration: none;
  padding: 9px 18px; border-radius: 6px; }
.review { border: 1px solid var(--rule); border-radius: 8px; padding: 18px 20px 20px; scroll-margin-top: 12px; }
.review:focus { outline: 3px solid var(--val); outline-offset: 2px; }
.review .top { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 20px; margin-bottom: 8px; }
#keep-label { unicode-bidi: isolate; }
.review .top p { margin: 0; } .review progress { width: 100%; height: 8px; display: block; accent-color: var(--val);
  margin-bottom: 18px; }
.entry { display: grid; grid-template-columns: 300px minmax(0, 1fr); gap: 8px 28px; align-items: start; }
.entry img, .entry .gone { width: 300px; height: 300px; object-fit: contain; background: var(--panel); display: grid;
  place-items: center; border-radius: 6px; color: var(--soft); }
.entry h3 { margin: 0 0 2px; font-size: 1.15rem; overflow-wrap: anywhere; }
.entry .path { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; margin-bottom: 14px; }
.entry .says { overflow-wrap: anywhere; }
.entry .state { min-height: 1.5em; font-weight: 600; overflow-wrap: anywhere; }
.buttons { display: flex; flex-wrap: wrap; gap: 10px; margin: 0 0 12px; align-items: center; }
.buttons select { max-width: 100%; }
button, select { font: inherit; color: var(--ink); background: var(--panel); border: 1px solid var(--soft);
  border-radius: 6px; padding: 8px 14px; min-height: 44px; max-width: 100%; overflow-wrap: anywhere; }
button { cursor: pointer; font-weight: 600; } button:hover:not(:disabled) { border-color: var(--ink); }
button:disabled { opacity: .5; cursor: default; }
button.main { background: var(--val); border-color: var(--val); color: var(--strong); }
button:focus-visible, select:focus-visible, a:focus-visible, summary:focus-visible, input:focus-visible {
  outline: 3px solid var(--ink); outline-offset: 2px; }
kbd { font: inherit; font-size: .8em; border: 1px solid currentColor; border-radius: 3px; padding: 0 5px;
  margin-left: 5px; opacity: .85; }
.digits { font-size: .9rem; color: var(--soft); overflow-wrap: anywhere; margin: 0 0 6px; max-width: none; }
.decided { margin: 8px 0 0; padding: 0; list-style: none; }
.decided li { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 4px 14px; align-items: center;
  border-bottom: 1px solid var(--rule); padding: 6px 0; font-size: .92rem; }
.decided span { overflow-wrap: anywhere; } .decided button { min-height: 34px; padding: 3px 12px; font-weight: 500; }
#decided-part { margin-top: 22px; } header p.note { margin: 14px 0 0; }
.save { margin-top: 26px; } .save label { display: flex; gap: 10px; align-items: baseline; margin: 0 0 14px; }
.save code { white-space: nowrap; } .save label span { overflow-wrap: anywhere; min-width: 0; }
.save pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
[hidden] { display: none !important; }
@media (max-width: 720px) {
  .review { padding: 14px 14px 16px; } .entry { grid-template-columns: minmax(0, 1fr); }
  .entry img, .entry .gone { width: 100%; height: min(300px, 60vw); }
  .sheet > li, .sheet img, .sheet .gone { width: 96px; } .sheet img, .sheet .gone { height: 96px; }
  .counted { font-size: 1.25rem; }
}
@media print { .start, .review, .save button { display: none; } }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("review-data").textContent);
const $ = id => document.getElementById(id);
const panel = $("review"), key = "headstart-review:" + data.root;
const PATH = 0, LABEL = 1, SPLIT = 2, GROUP = 3, DROP = 4, ORIGINAL = 5, REASON = 6;
const COLUMNS = ["path", "label", "split", "group", "drop", "original_label", "reason"];
const outside = new Set(data.outside);
// A name that runs from right to left, or turns the direction, stands for itself beside digits and other names.
const apart = name => /[\u0590-\u08ff\u202a-\u202e\u2066-\u2068\ufb1d-\ufdff\ufe70-\ufefc]/.test(name) ?
  `\u2068${name}\u2069` : name;
const rowOf = new Map(data.rows.map((row, i) => [row[PATH], i]));
const queueOf = new Map(data.queue.map((entry, i) => [data.rows[entry.row][PATH], i]));
let decisions = new Map();  // path -> [what, label it gets, label it had]
let order = [];             // paths as they were decided, the latest last
let at = 0, kept = true;

function restore() {
  try {
    for (const [path, decision] of JSON.parse(localStorage.getItem(key) || "[]")) {
      const row = data.rows[rowOf.get(path)];
      const known = row && row[LABEL] === decision[2] && data.classes.includes(decision[1]);
      if (known) { decisions.set(path, decision); order.push(path); }
    }
    localStorage.setItem(key + "?", "1"); localStorage.removeItem(key + "?");
  } catch { kept = false; }
  $("forgetful").hidden = kept;
  at = nextOpen(0);
}
function store() {
  try { localStorage.setItem(key, JSON.stringify(order.map(path => [path, decisions.get(path)]))); }
  catch { $("forgetful").hidden = false; }
}
function nextOpen(from) {
  const open = i => !decisions.has(data.rows[data.queue[i].row][PATH]);
  for (let i = from; i < data.queue.length; i++) if (open(i)) return i;
  return data.queue.length;
}

// ---- decisions
function decide(what, label) {
  if (at >= data.queue.length) return;
  const row = data.rows[data.queue[at].row], path = row[PATH];
  if (what === "relabel" && label === row[LABEL]) what = "keep";
  forget(path);
  decisions.set(path, [what, what === "relabel" ? label : row[LABEL], row[LABEL]]);
  order.push(path);
  store();
  at += 1;
  show(words(path) + ".");
}
function forget(path) { decisions.delete(path); order = order.filter(other => other !== path); }
function undo(path) {
  if (path === undefined) return;
  forget(path);
  store();
  if (queueOf.has(path)) at = queueOf.get(path);
  show("Undone: " + path + ".");
}
function move(step) { at = Math.min(Math.max(at + step, 0), data.queue.length); show(""); }
function words(path) {
  const [what, label, was] = decisions.get(path);
  if (what === "relabel") return `${apart(path)}: ${apart(was)} becomes ${apart(label)}`;
  return `${apart(path)}: ` + { keep: `stays ${apart(was)}`, drop: "dropped", skip: "skipped, stays as it is" }[what];
}

// ---- what is shown
function show(said) {
  const n = data.queue.length, done = at >= n;
  const counts = { keep: 0, relabel: 0, drop: 0, skip: 0 };
  for (const [what] of decisions.values()) counts[what] += 1;
  const seen = data.queue.filter(entry => decisions.has(data.rows[entry.row][PATH])).length;
  $("where").textContent = done ? `End of the queue` : `Picture ${at + 1} of ${n}`;
  $("tally").textContent = `${seen} of ${n} decided: ${counts.keep} kept, ${counts.relabel} relabelled, ` +
    `${counts.drop} dropped, ${counts.skip} skipped`;
  $("bar").value = seen;
  $("entry").hidden = done;
  $("end").hidden = !done;
  if (done) {
    $("end-words").textContent = seen === n ? "Every picture of the queue is decided. Save the manifest below." :
      `${n - seen} pictures are still open.`;
    $("open-ones").hidden = seen === n;
  } else showEntry(data.queue[at]);
  $("back").disabled = at === 0;
  $("undo").disabled = !order.length;
  showDecided();
  showSave(counts);
  $("spoken").textContent = said + " " + (done ? $("where").textContent : entryWords(data.queue[at]));
}
function entryWords(entry) {
  const row = data.rows[entry.row];
  return `Picture ${at + 1} of ${data.queue.length}, ${row[PATH]}: labelled ${row[LABEL]}, ` +
    `suggested ${entry.suggested}.`;
}
function showEntry(entry) {
  const row = data.rows[entry.row], path = row[PATH], percent = share => `${(100 * share).toFixed(0)}\u00a0%`;
  $("picture").hidden = !entry.image;
  $("no-picture").hidden = !!entry.image;
  if (entry.image) { $("picture").src = entry.image; $("picture").alt = `${path}, labelled ${row[LABEL]}`; }
  $("name").textContent = path.split("/").pop();
  const whole = document.createElement("bdi");  // a path that is copied from here has no marks in it
  whole.textContent = path;
  $("path").replaceChildren(whole, (row[SPLIT] ? ` (${row[SPLIT]})` : "") + " ");
  const link = document.createElement("a");
  link.textContent = "open the file"; link.href = entry.address; link.target = "_blank"; link.rel = "noopener";
  $("path").append(link);
  $("has").textContent = row[LABEL];
  $("has-prob").textContent = percent(entry.label_prob);
  $("likely").textContent = entry.suggested;
  $("likely-prob").textContent = percent(entry.suggested_prob);
  $("keep-label").textContent = row[LABEL];
  $("label").value = decisions.get(path)?.[0] === "relabel" ? decisions.get(path)[1] : entry.suggested;
  const test = row[SPLIT] === "test" ?
    "A test picture: to change it where a model doubts it flatters that model. Only a plain mistake is worth it." : "";
  $("state").textContent = decisions.has(path) ? "Decided: " + words(path).slice(apart(path).length + 2) : test;
}
function showDecided() {
  $("decided-part").hidden = !order.length;
  $("decided-count").textContent = order.length;
  $("decided").replaceChildren(...order.toReversed().map(path => {
    const item = document.createElement("li"), text = document.createElement("span");
    const button = document.createElement("button");
    text.textContent = words(path);
    button.textContent = "Undo"; button.type = "button"; button.setAttribute("aria-label", "Undo " + words(path));
    button.addEventListener("click", event => { undo(path); refocus(event); });
    item.append(text, button);
    return item;
  }));
}
function showSave(counts) {
  const used = manifestRows().filter(row => !row[DROP]).length;
  $("save-words").textContent = `${data.rows.length} rows, of which ${used} are used: ` +
    `${counts.relabel} relabelled and ${counts.drop} dropped here.`;
  const quoted = "'" + data.root.replaceAll("'", "'\\''") + "'";
  $("command").textContent = "headstart fit manifest.csv" + ($("relative").checked ? ` --root ${quoted}` : "");
}

// ---- the manifest
function manifestRows() {
  return data.rows.map((row, i) => {
    const out = [...row], [what, label] = decisions.get(row[PATH]) || [];
    if (what === "relabel") { out[ORIGINAL] ||= row[LABEL]; out[LABEL] = label; out[REASON] = "relabelled in review"; }
    if (what === "drop") { out[DROP] = "1"; out[REASON] = "dropped in review"; }
    if (what === "keep") out[REASON] ||= "label confirmed in review";
    if (!$("relative").checked && !outside.has(i)) out[PATH] = data.root.replace(/\/$/, "") + "/" + row[PATH];
    return out;
  });
}
function manifestText() {
  const cell = text => /[",;\t\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  return [COLUMNS, ...manifestRows()].map(row => row.map(cell).join(",") + "\n").join("");
}
// File names that are no UTF-8 come as lone surrogates, one per byte, and leave as those bytes.
function bytes(text) {
  const encoder = new TextEncoder();
  return text.split(/((?<![\ud800-\udbff])[\udc80-\udcff])/).map((part, i) =>
    i % 2 ? Uint8Array.of(part.charCodeAt(0) - 0xdc00) : encoder.encode(part));
}
function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(bytes(manifestText()), { type: "text/csv" }));
  link.download = "manifest.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  $("spoken").textContent = "manifest.csv saved to the downloads.";
  $("saved").textContent = "Saved to the browser's downloads.";
}

// ---- hands: after a click the panel has the keys again, so that Space skips and does not press the button twice
function refocus(event) { if (event.detail > 0) panel.focus({ preventScroll: true }); }
const acts = {
  keep: () => decide("keep"), relabel: () => decide("relabel", $("label").value), drop: () => decide("drop"),
  skip: () => decide("skip"), back: () => move(-1), undo: () => undo(order.at(-1)),
  "open-ones": () => { at = nextOpen(0); show(""); },
};
for (const [id, act] of Object.entries(acts)) {
  $(id).addEventListener("click", event => {
    act();
    if ($(id).disabled || $(id).closest("[hidden]")) panel.focus({ preventScroll: true }); else refocus(event);
  });
}
const keys = { k: "keep", r: "relabel", d: "drop", s: "skip", " ": "skip", arrowleft: "back", backspace: "back",
  u: "undo" };
// The keys act wherever the focus is, but nobody decides about a picture that is out of sight.
function inSight() {
  const seen = $("entry").hidden ? panel : $("picture").hidden ? $("no-picture") : $("picture");
  const box = seen.getBoundingClientRect();
  const middle = box.top + box.height / 2;
  return middle > 0 && middle < innerHeight;
}
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const on = event.target, name = event.key.toLowerCase();
  if (on.tagName === "SELECT") {
    if (name === "enter") { event.preventDefault(); acts.relabel(); panel.focus({ preventScroll: true }); }
    return;
  }
  if (name === " " && on !== panel) return;  // presses buttons, opens parts, scrolls
  const digit = /^[1-9]$/.test(name) && data.classes[Number(name) - 1];
  const act = digit ? () => decide("relabel", digit) : name === "arrowright" ? () => move(1) : acts[keys[name]];
  if (!act) return;
  event.preventDefault();
  if (inSight()) act(); else panel.scrollIntoView({ block: "start" });
  if (!panel.contains(on)) panel.focus({ preventScroll: true });
});
$("save").addEventListener("click", save);
$("relative").addEventListener("change", () => show(""));
$("bar").max = data.queue.length;
$("label").append(...data.classes.map(name => new Option(name, name)));
$("digits").textContent = "Number keys relabel at once: " +
  data.classes.slice(0, 9).map((name, i) => `${i + 1} ${apart(name)}`).join(", ") + ".";
restore();
show("");
$("review-part").hidden = false;
if (location.hash === "#review") panel.focus();
"""
