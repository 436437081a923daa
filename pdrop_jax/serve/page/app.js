// The page: a picture, a question and a budget go in; the answer and what each stage saw come out.

import { Refused, about, ask, health } from "./api.js";
import { drawKept, drawScores, load } from "./draw.js";

const IMAGE_BYTES = 2 ** 25; // what the server takes for one image
const SENT_AS_THEY_ARE = ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"];
const SAMPLE_QUESTION = "What is in row 3, column 2?";
const FADE = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 450; // ms

const $ = (id) => document.getElementById(id);
const [form, file, well, question, slider, against] = ["form", "file", "well", "question", "budget", "against"].map($);

let model = null; // see api.about
let picture = null; // {url, name}
let running = null; // AbortController of what is being asked
let asked = false; // whether moving the slider asks again
let shown = null; // the run that the stages show
const runs = new Map(); // what has been answered, by picture, question and budget

// ---- the server

async function connect() {
  for (;;) {
    try {
      const state = await health();
      if (state === "ready") break;
      say(state === "warming up" ? "The server is compiling its programs …" : `The server is ${state}.`);
    } catch {
      say("The server cannot be reached. Trying again …");
    }
    await new Promise((resolve) => setTimeout(resolve, 1500));
  }
  say("");
  try {
    model = await about($("key").value);
  } catch (error) {
    return complain(error);
  }
  complain(null);
  $("model").textContent = `${model.name}, ${model.layers} layers`;
  slider.max = model.budgets.length - 1;
  slider.value = model.budgets.findIndex((budget) => budget.name === model.defaultBudget);
  slider.disabled = model.budgets.length < 2;
  const names = model.budgets.map(({ name }) => name);
  const ends = names.length > 5 ? [names[0], names.at(-1)] : names;
  $("ends").replaceChildren(...ends.map((name) => Object.assign(document.createElement("span"), { textContent: name })));
  against.replaceChildren(...model.budgets.map(({ name }) => new Option(name)));
  $("compare").hidden = model.budgets.length < 2;
  showBudget();
  showPair();
}

const say = (text) => ($("state").textContent = text);

// ---- errors, each as one sentence

function sentence(error) {
  if (!(error instanceof Refused)) {
    return error instanceof TypeError
      ? "The server cannot be reached, or the connection broke off: check that it is running, and ask again."
      : error.message;
  }
  switch (error.status) {
    case 401:
      return "This server wants an API key: enter it above, and ask again.";
    case 413:
      return "The picture is larger than this server takes: choose a smaller one.";
    case 429:
      return "The server is full, because as many questions wait as it takes: ask again in a few seconds.";
    case 503:
      return "The server is starting or stopping: ask again in a moment.";
    default:
      return `${error.message.charAt(0).toUpperCase()}${error.message.slice(1).replace(/\.$/, "")}.`;
  }
}

function complain(error) {
  $("notice").hidden = error === null;
  $("notice").textContent = error === null ? "" : sentence(error);
  if (error?.status === 401) $("key-row").hidden = false;
  if (error) $("notice").scrollIntoView({ block: "nearest" });
}

// ---- the picture

function readAsUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${blob.name ?? "The picture"} cannot be read.`));
    reader.readAsDataURL(blob);
  });
}

async function take(chosen) {
  if (!chosen) return;
  const name = chosen.name || "The pasted picture";
  try {
    if (!chosen.type.startsWith("image/")) throw new Error(`${name} is not a picture: choose a JPEG, PNG, WebP or GIF file.`);
    if (chosen.size > IMAGE_BYTES) {
      const [size, most] = [chosen.size, IMAGE_BYTES].map((bytes) => Math.ceil(bytes / 2 ** 20));
      throw new Error(`${name} has ${size} MiB, but this server takes pictures of up to ${most} MiB: choose a smaller one.`);
    }
    let url = await readAsUrl(chosen);
    const image = await load(url).catch(() => {
      throw new Error(`${name} cannot be read as a picture: choose a JPEG, PNG, WebP or GIF file.`);
    });
    if (!SENT_AS_THEY_ARE.includes(chosen.type)) url = converted(image); // what the browser knows and the server may not
    show({ url, name: chosen.name || "pasted picture" });
  } catch (error) {
    complain(error);
  }
}

function converted(image) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth || 1024, image.naturalHeight || 1024];
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}

function show(chosen) {
  picture = chosen;
  $("picture").src = chosen.url;
  $("picture").hidden = false;
  $("empty").hidden = true;
  $("name").textContent = chosen.name;
  well.classList.add("full");
  forget();
  complain(null);
}

function forget() {
  running?.abort();
  asked = false;
  answering(null);
  stages(null);
  showPair();
}

// ---- asking

const budgetNow = () => model.budgets[slider.value];
const keyOf = (budget) => JSON.stringify([picture?.url, question.value.trim(), budget]);
const runOf = (budget) => (picture ? runs.get(keyOf(budget)) : undefined);

// The run of a budget, from memory if it was asked before; `grow` is called with the answer so far.
async function run(budget, signal, grow) {
  const key = keyOf(budget);
  if (runs.has(key)) return runs.get(key);
  let answer = "";
  const found = { budget, answer, details: null };
  const request = { picture: picture.url, question: question.value.trim(), budget, key: $("key").value, signal };
  for await (const { text, details } of ask(request)) {
    if (text) grow((answer += text));
    if (details) found.details = details;
  }
  found.answer = answer.trim();
  runs.set(key, found);
  return found;
}

async function start() {
  running?.abort();
  const missing = !model
    ? "The server is not ready yet: ask again in a moment."
    : !picture
      ? "There is no picture yet: drop one in, or use the sample."
      : !question.value.trim()
        ? "There is no question yet: type one."
        : null;
  if (missing) return complain(new Error(missing));
  complain(null);
  const { signal } = (running = new AbortController());
  const now = budgetNow().name;
  try {
    if (!runOf(now)) answering("");
    const found = await run(now, signal, answering);
    if (signal.aborted) return;
    asked = true;
    answering(found.answer, found.details);
    await stages(found);
    showPair();
    if (model.budgets.length > 1) {
      // One after the other: together they would slow each other down.
      await run(against.value, signal, (text) => showPair({ [against.value]: text }));
      if (!signal.aborted) showPair();
    }
  } catch (error) {
    if (signal.aborted) return;
    answering(null);
    complain(error);
  }
}

function answering(text, details = null) {
  $("answer").textContent = text ?? "";
  $("answer").classList.toggle("waiting", text !== null && !details);
  $("answer").setAttribute("aria-busy", text !== null && !details);
  $("facts").textContent = details
    ? `First token after ${ms(details.queue_ms + details.prefill_ms)}, the whole answer after ${ms(total(details))}` +
      (details.cached_tokens ? `; ${details.cached_tokens} prompt tokens were cached.` : ".")
    : "";
}

const total = (details) => details.queue_ms + details.prefill_ms + details.decode_ms;
const ms = (x) => (x < 9.95 ? `${x.toFixed(1)} ms` : x < 1e4 ? `${Math.round(x)} ms` : `${(x / 1000).toFixed(1)} s`);

// ---- the budget

function bars(shares) {
  return shares.map((share) => {
    const bar = document.createElement("i");
    bar.style.setProperty("--share", Math.max(share, 0.02));
    return bar;
  });
}

function showBudget() {
  const { name, shares, share } = budgetNow();
  const text = `${name}: ${Math.round(100 * share)} % on average`;
  $("budget-name").textContent = text;
  slider.setAttribute("aria-valuetext", text);
  const box = $("layers");
  if (box.children.length === shares.length) {
    shares.forEach((x, n) => box.children[n].style.setProperty("--share", Math.max(x, 0.02)));
  } else {
    box.replaceChildren(...bars(shares));
  }
  if (against.value === name) against.selectedIndex = slider.value === "0" ? model.budgets.length - 1 : 0;
}

// ---- what each stage saw

async function stages(found) {
  const before = shown;
  shown = found;
  $("stages-hint").hidden = found !== null;
  const strip = $("strip");
  if (!found) return strip.replaceChildren();
  const views = found.details.images.flatMap((image) => image.views);
  const images = await Promise.all(views.map((view) => load(view.picture)));
  if (shown !== found) return;
  const items = found.details.stages.map((stage, s) => {
    const item = document.createElement("li");
    const box = document.createElement("div");
    box.className = "views";
    for (const view of views) {
      const canvas = document.createElement("canvas");
      canvas.setAttribute("role", "img");
      box.append(canvas);
    }
    const caption = document.createElement("p");
    caption.className = "caption";
    item.append(box, caption);
    return item;
  });
  strip.replaceChildren(...items);
  found.images = images;
  paintStages(before !== found);
}

function paintStages(fade = false) {
  const scores = document.querySelector("[name=mode]:checked").value === "scores";
  $("legend").hidden = !scores || !shown;
  if (!shown) return;
  const { stages: all, images } = shown.details;
  const views = images.flatMap((image) => image.views);
  const first = all[0].image_tokens;
  all.forEach((stage, s) => {
    const item = $("strip").children[s];
    const layers = stage.layers[1] - stage.layers[0] === 1 ? `Layer ${stage.layers[0]}` : `Layers ${stage.layers[0]}–${stage.layers[1] - 1}`;
    const ranked = scores && s < all.length - 1;
    const strong = document.createElement("b");
    strong.textContent = layers;
    const rest = document.createElement("span");
    rest.textContent = ` ${stage.image_tokens} of ${first} image tokens`;
    item.lastChild.replaceChildren(strong, rest);
    [...item.firstChild.children].forEach((canvas, v) => {
      canvas.setAttribute(
        "aria-label",
        ranked ? `Scores of the ${stage.image_tokens} image tokens at the drop after layer ${stage.layers[1] - 1}`
          : `${layers}: ${stage.image_tokens} of ${first} image tokens are kept`,
      );
      const draw = (amount) =>
        ranked
          ? drawScores(canvas, shown.images[v], views[v], views[v].scores[s])
          : drawKept(canvas, shown.images[v], views[v], views[v].kept[s], amount);
      if (!fade || !FADE || ranked || !s) return draw(1);
      const begin = performance.now() + s * 0.55 * FADE; // one stage after the other
      const step = (now) => {
        if (!canvas.isConnected) return;
        const at = Math.min(1, Math.max(0, (now - begin) / FADE));
        draw(1 - (1 - at) ** 3);
        if (at < 1) requestAnimationFrame(step);
      };
      draw(0);
      requestAnimationFrame(step);
    });
  });
}

// ---- side by side

function showPair(growing = {}) {
  if (!model || model.budgets.length < 2) return;
  const other = model.budgets.find((budget) => budget.name === against.value);
  const base = runOf(other.name)?.details;
  $("pair").replaceChildren(side(other, growing, null), side(budgetNow(), growing, base));
}

function side(budget, growing, base) {
  const found = runOf(budget.name);
  const box = document.createElement("article");
  box.className = "side";
  const title = document.createElement("h3");
  title.textContent = budget.name;
  const layers = document.createElement("div");
  layers.className = "layers";
  layers.setAttribute("aria-hidden", "true");
  layers.append(...bars(budget.shares));
  const text = document.createElement("p");
  text.className = "text";
  text.textContent = found ? found.answer : (growing[budget.name] ?? "");
  text.classList.toggle("waiting", !found && budget.name in growing);
  box.append(title, layers, text);
  const details = found?.details;
  const tokens = (d) => d.stages.reduce((n, s) => n + s.image_tokens * (s.layers[1] - s.layers[0]), 0) / model.layers;
  const rows = [
    ["Tokens a layer", tokens, (x) => x.toFixed(x < 100 ? 1 : 0)],
    ["To the first token", (d) => d.prefill_ms, ms],
    ["Decoding", (d) => d.decode_ms, ms],
    ["KV cache", (d) => d.cache_bytes, (x) => (x < 2 ** 30 ? `${(x / 2 ** 20).toFixed(x < 1e8 ? 2 : 0)} MiB` : `${(x / 2 ** 30).toFixed(2)} GiB`)],
  ];
  const list = document.createElement("dl");
  for (const [label, value, format] of rows) {
    const [dt, dd] = ["dt", "dd"].map((tag) => document.createElement(tag));
    dt.textContent = label;
    dd.textContent = details ? format(value(details)) : "–";
    if (details && base && value(base)) {
      const change = Math.round(100 * (value(details) / value(base) - 1));
      const note = document.createElement("small");
      note.textContent = change ? `${change > 0 ? "+" : "−"}${Math.abs(change)} %` : "±0 %";
      note.classList.toggle("more", change >= 0);
      dd.append(" ", note);
    }
    list.append(dt, dd);
  }
  box.append(list);
  return box;
}

// ---- events

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (model) start();
  else connect().then(() => model && start());
});
file.addEventListener("change", () => take(file.files[0]).then(() => (file.value = "")));
$("sample").addEventListener("click", async () => {
  try {
    const blob = await (await fetch("sample.png")).blob();
    show({ url: await readAsUrl(blob), name: "sample picture" });
    if (!question.value.trim()) question.value = SAMPLE_QUESTION;
    question.focus();
  } catch (error) {
    complain(error);
  }
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    well.classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  const [pasted] = event.clipboardData.files;
  if (pasted) take(pasted);
});
slider.addEventListener("input", () => {
  showBudget();
  showPair();
});
slider.addEventListener("change", () => asked && start());
question.addEventListener("input", () => asked && forget());
against.addEventListener("change", () => {
  showPair();
  if (asked) start();
});
$("key").addEventListener("change", connect);
for (const input of document.querySelectorAll("[name=mode]")) input.addEventListener("change", () => paintStages());

connect();
