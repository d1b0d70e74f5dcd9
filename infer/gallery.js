// The page shows its first rows without this script, and then a click opens the picture itself.
"use strict";
const held = JSON.parse(document.getElementById("rows").textContent);
const $ = (selector, within = document) => within.querySelector(selector);
const main = $("main"), bar = $(".bar"), foot = $(".foot"), dialog = $("dialog"), large = $(".stage img");
const search = $("input", bar), [methods, states, pages] = bar.querySelectorAll("select");
const failures = [...document.querySelectorAll(".errors li")];
let shown = held.rows.map((_, index) => index), page = 0, current = 0, part = 0;

function make(name, fields = {}, ...inside) {
  const made = Object.assign(document.createElement(name), fields);
  made.append(...inside);
  return made;
}
const fact = ([key, value]) => make("div", {}, make("dt", { textContent: key }), make("dd", { textContent: value }));
const href = file => file.split("/").map(encodeURIComponent).join("/");

function figure(caption, [file, width, height, label, thumb, small]) {
  const name = label || caption;
  const img = make("img", { src: href(thumb || file), alt: name, loading: "lazy", width, height });
  if (small) img.className = "small";
  const link = make("a", { href: href(file) }, img);
  link.setAttribute("aria-label", "Enlarge: " + name);
  return make("figure", {}, link, ...(label ? [make("figcaption", { textContent: label })] : []));
}

function card(index) {
  const row = unpacked(index);
  return make("article", {},
    make("div", { className: "pictures" }, ...row.pictures.map(picture => figure(row.caption, picture))),
    make("p", { className: "caption", textContent: row.caption }),
    make("dl", { className: "settings" }, ...row.settings.map(fact)));
}

function unpacked(index) {
  const [caption, pictures, settings, method, row] = held.rows[index];
  return { caption, pictures, settings, method, row };
}

// Filters and pages ---------------------------------------------------------------------------------------------------

// What can be searched of a row: made when first needed.
const texts = [];
const text = index => texts[index] ??= JSON.stringify(held.rows[index].slice(0, 4)).toLowerCase() + (held.rows[index][4] || "").toLowerCase();

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean).map(word => JSON.stringify(word).slice(1, -1));
  const has = found => words.every(word => found.includes(word));
  shown = [];
  for (let index = 0; index < held.rows.length && states.value !== "failed"; index++)
    if ((!methods.value || held.rows[index][3] === methods.value) && has(text(index))) shown.push(index);
  let left = 0;
  for (const line of failures) {
    line.hidden = states.value === "drawn" || !has(JSON.stringify(line.firstChild.textContent.toLowerCase()));
    left += !line.hidden;
  }
  const section = $(".errors");
  if (section) section.hidden = !left;
}

const count = () => Math.max(1, Math.ceil(shown.length / held.page));

function turn(to, scroll = true) {
  page = Math.min(Math.max(to, 0), count() - 1);
  const start = page * held.page, here = shown.slice(start, start + held.page);
  main.replaceChildren(...here.map(card));
  if (!here.length) main.append(make("p", { className: "nothing", textContent: "No picture has all of this." }));
  tell();
  if (scroll) scrollTo(0, Math.min(scrollY, bar.offsetTop));
  remember();
}

function tell() {
  const start = page * held.page, n = number => number.toLocaleString("en");
  const end = Math.min(start + held.page, shown.length);
  const said = shown.length ? `${n(start + 1)} to ${n(end)} of ${n(shown.length)}` : "none";
  for (const place of document.querySelectorAll("nav .count")) place.textContent = said;
  const several = count() > 1;
  if (pages.options.length !== count())
    pages.replaceChildren(...Array.from({ length: count() }, (_, k) => make("option", { value: k, textContent: `page ${k + 1} of ${count()}` })));
  pages.value = page;
  $(".pages").hidden = foot.hidden = !several;
  for (const button of document.querySelectorAll("nav .back")) button.disabled = page === 0;
  for (const button of document.querySelectorAll("nav .on")) button.disabled = page === count() - 1;
}

// The address keeps filter, page and picture, so that going back, or a link to a colleague, finds them again.
function remember() {
  const told = new URLSearchParams();
  if (search.value) told.set("q", search.value);
  if (methods.value) told.set("method", methods.value);
  if (states.value) told.set("state", states.value);
  if (page) told.set("page", page + 1);
  if (dialog.open) told.set("row", current + 1);
  try { history.replaceState(null, "", "#" + told); } catch { /* some viewers of files allow none */ }
}

function recall() {
  const told = new URLSearchParams(location.hash.slice(1));
  search.value = told.get("q") || "";
  methods.value = told.get("method") || "";
  if (methods.selectedIndex < 0) methods.value = "";
  states.value = told.get("state") || "";
  if (states.selectedIndex < 0) states.value = "";
  if ([...told.keys()].length) {
    filter();
    turn((parseInt(told.get("page")) || 1) - 1, false);
  }
  const row = parseInt(told.get("row")) - 1;
  if (held.rows[row]) open(row);
}

// One picture ---------------------------------------------------------------------------------------------------------

function open(index, which = held.rows[index][1].length - 1) {
  current = index;
  const row = unpacked(index);
  part = Math.min(Math.max(which, 0), row.pictures.length - 1);
  const [file, , , label, , small] = row.pictures[part];
  large.className = small ? "small" : "";
  large.onload = fit;
  large.src = href(file);
  large.alt = label || row.caption;
  $(".caption", dialog).textContent = row.caption;
  $(".settings", dialog).replaceChildren(...row.settings.map(fact));
  $(".buttons a", dialog).href = href(file);
  const several = row.pictures.length > 1;
  $(".strip").replaceChildren(...(several ? row.pictures : []).map(([file, , , label, thumb], k) => {
    const button = make("button", { type: "button", onclick: () => open(index, k) }, make("img", { src: href(thumb || file), alt: "" }), label);
    button.setAttribute("aria-pressed", k === part);
    return button;
  }));
  const at = shown.indexOf(index);
  $(".place").textContent = `${file}${at < 0 ? "" : `, ${(at + 1).toLocaleString("en")} of ${shown.length.toLocaleString("en")}`}`;
  $(".copy-row").hidden = $(".copy-command").hidden = !row.row;
  if (!dialog.open) dialog.showModal();
  remember();
}

function fit() {
  const stage = $(".stage");
  const room = Math.min(stage.clientWidth / large.naturalWidth, stage.clientHeight / large.naturalHeight);
  // Whole multiples keep the pixels of a small picture square; 768 px is large enough for those.
  const scale = room >= 1 && large.className ? Math.max(1, Math.floor(Math.min(room, 768 / large.naturalWidth))) : Math.min(room, 1);
  large.style.width = large.naturalWidth * scale + "px";
}

function step(by) {
  const at = shown.indexOf(current);
  if (!shown.length) return;
  const next = at < 0 ? 0 : (at + by + shown.length) % shown.length;
  open(shown[next]);
}

// Copying -------------------------------------------------------------------------------------------------------------

const quoted = word => "'" + word.replaceAll("'", "'\\''") + "'";
const command = rows => `printf '%s\\n' ${rows.split("\n").map(quoted).join(" ")} > row.jsonl\n${held.command} --prompts row.jsonl --out again`;

async function copy(text, button) {
  const before = button.textContent;
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch { // a page opened from a file may have no clipboard of its own
    const paste = make("textarea", { className: "paste", value: text, readOnly: true });
    (dialog.open ? dialog : document.body).append(paste);
    paste.select();
    done = document.execCommand("copy");
    paste.remove();
  }
  button.textContent = done ? "Copied" : "Not copied";
  setTimeout(() => { button.textContent = before; }, 1500);
}

// Events --------------------------------------------------------------------------------------------------------------

main.addEventListener("click", event => {
  const link = event.target.closest("figure a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const article = link.closest("article");
  open(shown[page * held.page + [...main.children].indexOf(article)], [...article.querySelectorAll("figure a")].indexOf(link));
});
for (const nav of [bar, foot]) {
  $(".back", nav).addEventListener("click", () => turn(page - 1));
  $(".on", nav).addEventListener("click", () => turn(page + 1));
}
pages.addEventListener("change", () => turn(+pages.value));
for (const [place, kind] of [[search, "input"], [methods, "change"], [states, "change"]])
  place.addEventListener(kind, () => { filter(); turn(0); });
$(".close").addEventListener("click", () => dialog.close());
$(".stage .back").addEventListener("click", () => step(-1));
$(".stage .on").addEventListener("click", () => step(1));
$(".copy-row").addEventListener("click", event => copy(held.rows[current][4], event.currentTarget));
$(".copy-command").addEventListener("click", event => copy(command(held.rows[current][4]), event.currentTarget));
for (const button of document.querySelectorAll(".errors button"))
  button.addEventListener("click", () => copy(button.closest("li").dataset.copy, button));
dialog.addEventListener("close", () => {
  const at = shown.indexOf(current);
  if (at >= 0 && Math.floor(at / held.page) !== page) turn(Math.floor(at / held.page), false);
  const article = at < 0 ? null : main.children[at - page * held.page];
  const link = article && $("figure:last-child a", article);
  if (link) { link.focus({ preventScroll: true }); link.scrollIntoView({ block: "nearest" }); }
  remember();
});
let touched = null;
$(".stage").addEventListener("touchstart", event => { touched = event.touches.length === 1 ? event.touches[0] : null; }, { passive: true });
$(".stage").addEventListener("touchend", event => {
  const end = event.changedTouches[0];
  if (!touched || (globalThis.visualViewport && visualViewport.scale > 1)) return;
  const x = end.clientX - touched.clientX, y = end.clientY - touched.clientY;
  if (Math.abs(x) > 50 && Math.abs(x) > 2 * Math.abs(y)) step(x < 0 ? 1 : -1);
});
addEventListener("resize", () => dialog.open && large.naturalWidth && fit());
addEventListener("hashchange", recall);
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const keys = dialog.open
    ? { ArrowRight: () => step(1), ArrowLeft: () => step(-1), c: () => $(".copy-command").click(), r: () => $(".copy-row").click() }
    : { n: () => page < count() - 1 && turn(page + 1), p: () => page && turn(page - 1), "/": () => search.focus() };
  const act = keys[event.key];
  if (act) { event.preventDefault(); act(); }
});

// What there is to choose from.
const found = new Map();
for (const row of held.rows) found.set(row[3], (found.get(row[3]) || 0) + 1);
methods.append(make("option", { value: "", textContent: "all methods" }));
for (const [name, many] of found) methods.append(make("option", { value: name, textContent: `${name} (${many.toLocaleString("en")})` }));
methods.hidden = found.size < 2;
states.hidden = !failures.length;
bar.hidden = held.rows.length < 2 && !failures.length;
const more = $(".more");
if (more) more.hidden = true;
tell();
recall();
