// What all pages share: words in two languages, tables, the live state, colours of charts. Texts are set as text.
"use strict";

const WORDS = {
  en: { language: "中文", live: "live", lost: "no connection, trying again", more: "more" },
  zh: { language: "English", live: "实时", lost: "连接中断，正在重试", more: "更多" },
};
const byId = (id) => document.getElementById(id);
const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
let language = localStorage.getItem("fedmoe-language") || (navigator.language.startsWith("zh") ? "zh" : "en");

function addWords(words) {
  for (const name of Object.keys(words)) Object.assign(WORDS[name], words[name]);
}

function word(name) {
  return Object.hasOwn(WORDS[language], name) ? WORDS[language][name] : Object.hasOwn(WORDS.en, name) ? WORDS.en[name] : name;
}

// Puts the words of the chosen language into every element that names one.
function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = word(node.dataset.word);
  for (const node of document.querySelectorAll("[data-hint]")) node.placeholder = node.ariaLabel = word(node.dataset.hint);
}

// The button that changes the language, and what is shown anew then.
function languageButton(show) {
  byId("language").addEventListener("click", () => {
    language = language === "zh" ? "en" : "zh";
    localStorage.setItem("fedmoe-language", language);
    translate();
    show();
  });
}

function element(name, text = "", kind = "") {
  const node = document.createElement(name);
  if (text !== "") node.textContent = text;
  if (kind) node.className = kind;
  return node;
}

// A cell of buttons: `key` changes with what they do, `actions` are [word, what is done].
class Buttons {
  constructor(key, actions) {
    this.key = key;
    this.actions = actions;
  }

  cell() {
    const cell = element("td");
    for (const [name, act] of this.actions) {
      const button = element("button", word(name));
      button.type = "button";
      button.addEventListener("click", act);
      cell.append(button);
    }
    return cell;
  }
}

function cellOf(cell, head) {
  const node = cell instanceof Buttons ? cell.cell() : Array.isArray(cell) ? element("td", String(cell[0]), cell[1]) : element("td", String(cell));
  node.dataset.head = head;
  return node;
}

// The browser's own way to write times where it speaks the chosen language.
const locale = () => (navigator.language.startsWith(language) ? navigator.language : language);

// Fills a table; a cell is text, [text, class] or Buttons; on a phone each row is a card. Rows that stay the same are left alone, and so is the focus.
function fill(table, heads, rows, empty) {
  const key = JSON.stringify([language, heads]);
  if (table.dataset.heads !== key) {
    table.dataset.heads = key;
    const head = element("tr");
    for (const name of heads) head.append(Object.assign(element("th", name), { scope: "col" }));
    const top = element("thead");
    top.append(head);
    table.replaceChildren(top, element("tbody"));
  }
  const body = table.tBodies[0];
  const keys = rows.map((row) => JSON.stringify([row.map((cell) => (cell instanceof Buttons ? cell.key : cell))]));
  if (!rows.length) {
    const cell = element("td", empty, "soft");
    cell.colSpan = heads.length;
    const line = element("tr");
    line.append(cell);
    body.replaceChildren(line);
    return;
  }
  while (body.rows.length > rows.length) body.lastChild.remove();
  rows.forEach((row, place) => {
    const line = body.rows[place] || body.appendChild(element("tr"));
    if (line.shown === keys[place] && line.heads === key) return;
    line.shown = keys[place];
    line.heads = key;
    line.replaceChildren(...row.map((cell, column) => cellOf(cell, heads[column])));
  });
}

function setLive(isLive) {
  byId("live").textContent = word(isLive ? "live" : "lost");
  byId("live").className = `badge ${isLive ? "good" : "bad"}`;
  byId("live").dataset.word = isLive ? "live" : "lost";
}

// Listens for states until the page is closed; `refused` is called where the server does not let it listen any more.
// A server that says something at least every so many milliseconds is asked anew after a longer silence: a connection
// can be dead without anybody telling.
function listen(receive, refused = () => {}, silence = Infinity) {
  const source = new EventSource("/live");
  let heardAt = performance.now();
  const watch = silence === Infinity ? 0 : setInterval(() => {
    if (performance.now() - heardAt < silence) return;
    clearInterval(watch);
    source.close();
    setLive(false);
    listen(receive, refused, silence);
  }, silence / 4);
  source.onopen = () => setLive(true);
  source.onmessage = (event) => {
    heardAt = performance.now();
    setLive(true);
    receive(JSON.parse(event.data));
  };
  source.onerror = () => {
    setLive(false);
    // The browser tries again by itself unless it was refused, as by a server that is just starting.
    if (source.readyState !== EventSource.CLOSED) return;
    clearInterval(watch);
    refused();
    setTimeout(listen, 2000, receive, refused, silence);
  };
}

// Charts. Plotly reads a little HTML in texts: those of others must not be taken for it.
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const dark = matchMedia("(prefers-color-scheme: dark)");
const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A colour made for a white ground, on the dark one: white becomes the panel, tints become dull, dark ones light.
function onDark(colour, name) {
  if (!/^#[0-9a-f]{6}$/i.test(colour)) return colour;
  const [red, green, blue] = [1, 3, 5].map((place) => parseInt(colour.slice(place, place + 2), 16) / 255);
  const high = Math.max(red, green, blue), low = Math.min(red, green, blue), lightness = (high + low) / 2;
  if (low > 0.99) return colourOf("--panel");
  const span = high - low, spread = span / (1 - Math.abs(2 * lightness - 1) || 1);
  const turn = span === 0 ? 0 : high === red ? ((green - blue) / span + 6) % 6 : high === green ? (blue - red) / span + 2 : (red - green) / span + 4;
  const hsl = (saturation, light) => `hsl(${Math.round(60 * turn)} ${Math.round(100 * saturation)}% ${Math.round(100 * light)}%)`;
  if (name === "colorscale") return hsl(spread, 0.35); // light text stands on it
  if (lightness > 0.85) return hsl(Math.min(spread, 0.35), 0.2);
  return lightness < 0.5 ? hsl(Math.min(spread, 0.75), 0.6) : colour;
}

// A figure's values with its colours as the theme needs them.
function themed(value, name = "") {
  if (typeof value === "string") return dark.matches && /color/i.test(name) ? onDark(value, name) : value;
  if (Array.isArray(value)) return /^(x|y|z|r|array|arrayminus|customdata)$/.test(name) ? value : value.map((part) => themed(part, name));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, themed(part, key)]));
}

function chartLayout(layout) {
  const text = colourOf("--text"), line = colourOf("--line");
  const axis = (given) => ({ ...given, color: text, gridcolor: line, zerolinecolor: line });
  return {
    ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { ...layout.font, color: text },
    hoverlabel: { bgcolor: colourOf("--panel"), bordercolor: line, font: { color: text } },
    xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
  };
}
const CHART_OPTIONS = { displayModeBar: false, displaylogo: false, responsive: true };
