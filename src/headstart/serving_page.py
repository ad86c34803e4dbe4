"""The page of `headstart serve`: pictures are dropped on it, and what the model says of each stands beside it.

One file that loads nothing. Names, of files and classes, reach the page as text nodes only; thumbnails are drawn from
the file that was chosen and never leave the browser in another form than the file itself, which goes to `predict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .report_page import details, esc, facts, page, page_policy, percent, sentence, span

STYLE = """
header { margin-bottom: 22px; }
h1 .of { color: var(--ink); overflow-wrap: anywhere; }
.drop { border: 2px dashed var(--soft); border-radius: 10px; padding: 34px 20px; text-align: center; }
.drop.over { border-color: var(--val); background: var(--panel); }
.drop p { margin: 0 auto 16px; font-size: 1.2rem; font-weight: 600; }
.drop .note { font-size: .9rem; font-weight: 400; margin: 14px auto 0; }
.buttons { display: flex; flex-wrap: wrap; gap: 10px; justify-content: center; }
button { font: inherit; font-weight: 600; color: var(--ink); background: var(--panel); border: 1px solid var(--soft);
  border-radius: 6px; padding: 8px 18px; min-height: 44px; cursor: pointer; }
button:hover { border-color: var(--ink); }
button.main { background: var(--val); border-color: var(--val); color: var(--strong); }
button:focus-visible, summary:focus-visible { outline: 3px solid var(--ink); outline-offset: 2px; }
#shoot { display: none; }
@media (pointer: coarse) { #shoot { display: inline-block; } .drop { padding: 24px 16px; } .mouse { display: none; } }
.head { display: flex; flex-wrap: wrap; gap: 8px 20px; align-items: center; justify-content: space-between;
  margin: 26px 0 4px; min-height: 44px; }
.head p { margin: 0; color: var(--soft); }
.found { list-style: none; margin: 0; padding: 0; }
.found > li { display: grid; grid-template: auto auto 1fr / 168px minmax(0, 1fr); gap: 4px 28px; align-items: start;
  border-top: 1px solid var(--rule); padding: 20px 0; }
.found canvas, .found .gone { width: 168px; height: 168px; background: var(--panel); border-radius: 6px;
  display: block; grid-row: 1 / 4; }
.found .gone { display: grid; place-items: center; color: var(--soft); font-size: .85rem; text-align: center;
  padding: 8px; }
.found h2 { border: 0; padding: 0; margin: 0; font-size: 1.5rem; font-weight: 650; letter-spacing: -.01em;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
.found h2 .n { color: var(--soft); font-weight: 500; font-variant-numeric: tabular-nums; white-space: nowrap; }
.found .path { color: var(--soft); font-size: .85rem; margin: 0 0 10px; overflow-wrap: anywhere; max-width: none;
  unicode-bidi: isolate; }
.bars { list-style: none; margin: 0; padding: 0; max-width: 620px; }
.bars li { display: grid; grid-template-columns: minmax(70px, 32%) minmax(0, 1fr) 4.8em; gap: 12px; align-items: center;
  font-size: .95rem; padding: 2px 0; }
.bars .name { overflow-wrap: anywhere; unicode-bidi: isolate; }
.bars .n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; color: var(--soft); }
.bars li:first-child .name, .bars li:first-child .n { color: var(--ink); font-weight: 650; }
.track { background: var(--panel); border-radius: 3px; height: 14px; overflow: hidden; }
.track i { display: block; height: 100%; background: var(--soft); opacity: .55; border-radius: 3px; min-width: 1px; }
.bars li:first-child .track i { background: var(--val); opacity: 1; }
.found .waits { color: var(--soft); margin: 0; } .found .error { color: var(--bad); font-weight: 600; margin: 0; }
.facts { border: 0; margin: 0 0 16px; padding: 6px 0 0; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
.classes { columns: 3 180px; margin: 8px 0 0; padding: 0; list-style: none; font-size: .92rem; }
.classes li { overflow-wrap: anywhere; break-inside: avoid; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
[hidden] { display: none !important; }
@media (max-width: 720px) {
  .found > li { grid-template: auto 1fr auto / 96px minmax(0, 1fr); gap: 4px 16px; padding: 16px 0; }
  .found canvas, .found .gone { width: 96px; height: 96px; grid-row: 1 / 3; }
  .found h2 { font-size: 1.25rem; } .bars, .found .state { grid-column: 1 / -1; margin-top: 6px; }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .bars li { grid-template-columns: minmax(60px, 36%) minmax(0, 1fr) 4.8em; gap: 8px; }
}
@media print { .drop, .head button { display: none; } .found > li { break-inside: avoid; } }
"""

SCRIPT = r"""
"use strict";
const $ = id => document.getElementById(id);
const most = Number($("drop").dataset.most), shown = Number($("drop").dataset.shown);
const side = 336, atMost = 24e6;  // of a thumbnail in pixels; bytes of a file that one is drawn of
const percent = share => `${(100 * share).toFixed(1)}\u00a0%`;
let waiting = [], busy = false;

function make(tag, name, text) {
  const one = document.createElement(tag);
  if (name) one.className = name;
  if (text !== undefined) one.textContent = text;
  return one;
}
function add(files) {
  for (const file of files) {
    const item = make("li"), canvas = make("canvas");
    canvas.width = canvas.height = side;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", file.name);
    const title = make("h2", "", "\u2026"), state = make("div", "state");
    state.append(make("p", "waits", "Waiting"));
    item.append(canvas, title, make("p", "path", file.name), state);
    $("found").prepend(item);
    waiting.push({ file, canvas, title, state });
  }
  tell();
  if (!busy) work();
}
function tell() {
  const counted = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  const [open, failed] = [".waits", ".error"].map(name => $("found").querySelectorAll(name).length);
  const asked = $("found").children.length;
  $("result").hidden = !asked;
  let said = (open ? `${asked - open} of ` : "") + counted(asked, "picture");
  if (failed) said += `, ${failed} without an answer`;
  $("tally").textContent = said;
}
async function work() {
  busy = true;
  while (waiting.length) {
    const one = waiting.pop();  // the one on top
    one.state.firstChild.textContent = "Looking\u2026";
    draw(one);
    try { show(one, await ask(one.file)); } catch (error) { fail(one, error.message); }
    tell();
  }
  busy = false;
}
async function draw({ file, canvas }) {
  try {
    if (file.size > atMost) throw Error("large");
    const picture = await createImageBitmap(file), scale = side / Math.max(picture.width, picture.height);
    const wide = picture.width * scale, high = picture.height * scale, pen = canvas.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(picture, (side - wide) / 2, (side - high) / 2, wide, high);
    picture.close();
  } catch { canvas.replaceWith(make("div", "gone", "no preview")); }
}
async function ask(file) {
  if (file.size > most) throw Error(`Larger than ${most / 1e6} MB, which is the most that this server takes.`);
  if (!file.size) throw Error("An empty file.");
  for (let tries = 1; ; tries++) {
    let answer, told;
    const form = new FormData();
    form.append("picture", file, file.name);
    try { answer = await fetch(`predict?top=${shown}`, { method: "POST", body: form }); }
    catch {
      try { await file.slice(0, 1).arrayBuffer(); }
      catch { throw Error("Cannot be read here. Is it a folder, or was it moved?"); }
      throw Error("The server does not answer. Is it still running?");
    }
    if (answer.status === 503 && tries < 30) {
      await new Promise(go => setTimeout(go, 1000));
      continue;
    }
    try { told = await answer.json(); } catch { throw Error(`The server answers with status ${answer.status}.`); }
    if (!told.predictions) throw Error(told.error || `Status ${answer.status}.`);
    if (told.predictions[0].error) throw Error(`Cannot be read: ${told.predictions[0].error}.`);
    return told.predictions[0];
  }
}
function show({ file, title, state, canvas }, found) {
  const said = found.unknown ? "Unknown" : found.pred;
  title.replaceChildren(said, ...(found.unknown ? [] : [" ", make("span", "n", percent(found.prob))]));
  const bars = make("ol", "bars");
  const best = Object.entries(found.probs).sort((a, b) => b[1] - a[1]).slice(0, shown);
  for (const [name, share] of best) {
    const item = make("li"), track = make("div", "track"), bar = make("i");
    bar.style.width = `${100 * share}%`;
    track.setAttribute("aria-hidden", "true");
    track.append(bar);
    item.append(make("span", "name", name), track, make("span", "n", percent(share)));
    bars.append(item);
  }
  if (found.unknown) {
    const note = "Like none of the pictures that the model was trained on. If it had to choose:";
    state.replaceChildren(make("p", "soft", note), bars);
  } else state.replaceWith(bars);
  $("spoken").textContent = `${file.name}: ${said}` + (found.unknown ? "" : `, ${percent(found.prob)}`);
}
function fail({ file, title, state }, words) {
  title.textContent = "No answer";
  state.replaceChildren(make("p", "error", words));
  $("spoken").textContent = `${file.name}: ${words}`;
}
function clear() {
  waiting = [];
  $("found").replaceChildren();
  $("spoken").textContent = "";
  tell();
  $("choose").focus();
}

for (const [button, input] of [["choose", "files"], ["shoot", "camera"]]) {
  $(button).addEventListener("click", () => $(input).click());
  $(input).addEventListener("change", () => { add($(input).files); $(input).value = ""; });
}
$("clear").addEventListener("click", clear);
let depth = 0;
const over = on => $("drop").classList.toggle("over", on);
addEventListener("dragenter", event => { event.preventDefault(); depth += 1; over(true); });
addEventListener("dragleave", () => { depth -= 1; if (depth <= 0) over(false); });
addEventListener("dragover", event => event.preventDefault());
addEventListener("drop", event => {
  event.preventDefault();
  depth = 0; over(false);
  add(event.dataTransfer.files);
});
addEventListener("paste", event => add(event.clipboardData.files));
$("drop").hidden = false;
"""
PAGE_POLICY = page_policy(SCRIPT) + "; connect-src 'self'; base-uri 'none'; form-action 'none'"
_SHOWN = 5


def render_page(told: Mapping[str, Any], max_bytes: int) -> str:
    """The page's HTML.

    Args:
        told: what `GET /model` tells. max_bytes: of a request.
    """
    name = told["name"] or told["backbone"] or "model"
    drop = (
        f'<div class="drop" id="drop" data-most="{max_bytes}" data-shown="{_SHOWN}" hidden>'
        '<p class="mouse">Drop pictures here</p><div class="buttons">'
        '<button type="button" class="main" id="choose">Choose pictures</button>'
        '<button type="button" id="shoot">Take a picture</button></div>'
        '<p class="note soft">JPEG, PNG, WebP, BMP, GIF or TIFF. They go to this server alone, which keeps none.</p>'
        '<input type="file" id="files" accept="image/*" multiple hidden tabindex="-1" aria-label="Pictures">'
        '<input type="file" id="camera" accept="image/*" capture="environment" hidden tabindex="-1"'
        ' aria-label="Camera"></div>'
    )
    result = (
        '<section id="result" aria-label="Answers" hidden><div class="head"><p id="tally"></p>'
        '<button type="button" id="clear">Clear</button></div><ol class="found" id="found"></ol></section>'
        '<p class="unseen" id="spoken" role="status" aria-live="polite"></p>'
    )
    content = (
        f'<header><h1>headstart: <span class="of">{esc(name)}</span></h1></header>'
        '<noscript><p class="banner">This page needs JavaScript.</p></noscript>'
        f"{drop}{result}{_about(told)}"
    )
    return page(f"{name}: headstart", content, style=STYLE, script=SCRIPT, policy=PAGE_POLICY)


def _about(told: Mapping[str, Any]) -> str:
    """What the model is, under what it says."""
    names, spec, test = told["class_names"], told["preprocessing"], told["test"]
    pairs = [("Classes", f"{len(names):,}"), ("Sees", f"{spec['image_size']} x {spec['image_size']} pixels")]
    if told["backbone"]:
        pairs.insert(0, ("Backbone", esc(told["backbone"])))
    if test and test.get("accuracy") is not None and test.get("accuracy_ci95"):
        figure = f'{percent(test["accuracy"])} <span class="soft">({span(test["accuracy_ci95"])})</span>'
        pairs.append((f"Right on {test['n']:,} test pictures", figure))
    listed = "".join(f"<li>{sentence(name)}</li>" for name in names)
    classes = details(f"The {len(names):,} classes", f'<ul class="classes">{listed}</ul>')
    words = (
        '<p class="note soft">It answers with one of its classes whatever it is shown, and is surest of what looks like'
        " the pictures it was trained on.</p>"
    )
    return f"<footer>{facts(pairs)}{words}{classes}</footer>"
