"use strict";
// The state is one query, {text, minus, filter, like, name, image}, which the browser's history keeps: Back works.
const $ = id => document.getElementById(id);
const TOP = 48, SKELETONS = 12;
let query = {}, running = null, preview = null;

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

// Sends a form and gives the JSON that comes back; an error is a sentence.
async function ask(path, fields, signal) {
  const form = new FormData();
  for (const [name, value] of fields) form.append(name, value);
  let response;
  try {
    response = await fetch(path, {method: "POST", body: form, signal});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server can't be reached. Is it still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error || `The server answers with error ${response.status}.`);
  return answer;
}

function complain(error) {
  $("error").textContent = error ? error.message : "";
  $("error").hidden = !error;
}

// Shows the query in the fields, and looks for it.
function show(next) {
  query = next;
  for (const name of ["text", "minus", "filter"]) $(name).value = query[name] || "";
  if (query.minus || query.filter) $("more").open = true;
  if (preview) URL.revokeObjectURL(preview);
  preview = query.image ? URL.createObjectURL(query.image) : null;
  const like = query.like !== undefined;
  $("chip").hidden = !like && !preview;
  $("text").placeholder = like || preview ? "Add words" : "Describe an image";
  if (like || preview) {
    $("chip-image").src = preview || query.thumbnail;
    $("chip-text").textContent = like ? "More like this" : "Your image";
  }
  $("labels").hidden = !preview;
  $("bars").replaceChildren();
  if (preview) {
    $("preview").src = preview;
    if ($("words").value) label();
  }
  search();
}

function go(next) {
  const words = ["text", "minus", "filter", "like"].filter(name => next[name] || next[name] === 0);
  const address = new URLSearchParams(words.map(name => [name, next[name]])).toString();
  history.pushState(next, "", address ? `/?${address}` : "/");
  show(next);
}

async function search() {
  running?.abort();
  const mine = running = new AbortController();
  complain(null);
  const fields = ["text", "minus", "filter", "like", "image"].filter(name => query[name] || query[name] === 0).map(name => [name, query[name]]);
  const asked = query.text || query.image || query.like !== undefined;
  $("empty").hidden = Boolean(asked);
  $("status").textContent = asked ? "Looking …" : "";
  $("results").replaceChildren(...(asked ? Array.from({length: SKELETONS}, skeleton) : []));
  if (!asked) return;
  try {
    const began = performance.now();
    const {results} = await ask("/search", [...fields, ["top", TOP]], mine.signal);
    const seconds = ((performance.now() - began) / 1000).toFixed(2);
    $("results").replaceChildren(...results.map(card));
    const count = results.length === 1 ? "1 image" : `The nearest ${results.length} images`;
    $("status").textContent = results.length ? `${count}, in ${seconds} s` : "No image meets the condition.";
  } catch (error) {
    if (mine.signal.aborted) return;
    $("results").replaceChildren();
    $("status").textContent = "";
    complain(error);
  }
}

// A drawing that is transparent somewhere keeps clear of its frame, which a photo fills.
function fit({target}) {
  const small = Object.assign(make("canvas", ""), {width: 8, height: 8}).getContext("2d");
  small.drawImage(target, 0, 0, 8, 8);
  const transparent = small.getImageData(0, 0, 8, 8).data.some((value, at) => at % 4 === 3 && value < 255);
  target.classList.toggle("drawing", transparent);
}

function skeleton() {
  return make("li", "wait", make("div", "picture"));
}

function card(hit) {
  const name = hit.caption || hit.id.split("/").pop();
  const image = make("img", "");
  image.alt = name;
  image.loading = "lazy";
  image.addEventListener("error", () => image.replaceWith("No image to show"));
  image.addEventListener("load", fit);
  image.src = hit.thumbnail;
  const words = make("span", "words", make("span", "caption", name), make("span", "score", hit.score.toFixed(3)));
  const button = make("button", "card", make("span", "picture", image), words);
  button.type = "button";
  button.title = hit.id;
  button.setAttribute("aria-label", `${name}, score ${hit.score.toFixed(3)}: more like this`);
  button.addEventListener("click", () => {
    go({like: hit.row, thumbnail: hit.thumbnail, filter: query.filter});
    scrollTo({top: 0, behavior: "smooth"});
  });
  return make("li", "", button);
}

async function label() {
  const words = $("words").value.split(",").map(word => word.trim()).filter(Boolean);
  const image = query.image;
  if (!words.length || !image) return;
  complain(null);
  try {
    const {labels} = await ask("/label", [["image", image], ...words.map(word => ["label", word])]);
    if (image !== query.image) return;
    $("bars").replaceChildren(...labels.map(bar));
  } catch (error) {
    complain(error);
  }
}

function bar({label, probability}) {
  const share = `${(100 * probability).toFixed(1)} %`;
  const line = make("i", "");
  line.style.width = share.replace(" ", "");
  return make("li", "", make("span", "", label), make("span", "", share), line);
}

function use(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    complain(new Error(`${file.name || "This"} is not an image. Drop a JPEG, PNG, WebP, GIF or AVIF file.`));
    return;
  }
  go({image: file, minus: $("minus").value.trim(), filter: $("filter").value.trim()});
}

function startAnew() {
  if (location.search || query.image) go({});
  $("text").value = "";
  complain(null);
  $("text").focus();
}

// The neighbour in the grid that an arrow key leads to.
function neighbour(current, key) {
  const cards = [...document.querySelectorAll(".card")];
  const at = cards.indexOf(current);
  const columns = cards.filter(other => other.offsetTop === cards[0].offsetTop).length;
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[key];
  return at + step < 0 ? $("text") : cards[at + step];
}

for (const name of ["chip-image", "preview"]) $(name).addEventListener("load", fit);
$("search").addEventListener("submit", event => {
  event.preventDefault();
  const {image, like, thumbnail} = query;
  go({image, like, thumbnail, text: $("text").value.trim(), minus: $("minus").value.trim(), filter: $("filter").value.trim()});
});
for (const name of ["minus", "filter"]) {
  $(name).addEventListener("keydown", event => event.key === "Enter" && $("search").requestSubmit());
}
$("label").addEventListener("submit", event => {
  event.preventDefault();
  label();
});
$("clear").addEventListener("click", () => {
  go({text: $("text").value.trim(), minus: query.minus, filter: query.filter});
  $("text").focus();
});
$("file").addEventListener("change", () => {
  use($("file").files[0]);
  $("file").value = "";
});
addEventListener("paste", event => {
  const file = [...event.clipboardData.files].find(one => one.type.startsWith("image/"));
  if (file) {
    event.preventDefault();
    use(file);
  }
});
addEventListener("dragover", event => {
  event.preventDefault();
  $("drop").hidden = ![...event.dataTransfer.types].includes("Files");
});
addEventListener("dragleave", event => {
  if (!event.relatedTarget) $("drop").hidden = true;
});
addEventListener("drop", event => {
  event.preventDefault();
  $("drop").hidden = true;
  use(event.dataTransfer.files[0]);
});
addEventListener("keydown", event => {
  const typing = event.target.matches("input:not([type=file])");
  if (event.key === "Escape") startAnew();
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("text").focus();
  }
  if (event.key === "ArrowDown" && event.target === $("text")) {
    event.preventDefault();
    document.querySelector(".card")?.focus();
  } else if (event.target.matches(".card") && event.key.startsWith("Arrow")) {
    event.preventDefault();
    neighbour(event.target, event.key)?.focus();
  }
});
addEventListener("popstate", event => show(event.state || fromAddress()));

function fromAddress() {
  const given = Object.fromEntries(new URLSearchParams(location.search));
  if (given.like !== undefined) given.thumbnail = `/thumbnail/${encodeURIComponent(given.like)}`;
  return given;
}

fetch("/about").then(response => response.json()).then(({model, pictures}) => {
  $("about").textContent = `${pictures.toLocaleString("en")} images · ${model}`;
}).catch(() => {});
show(history.state || fromAddress());
