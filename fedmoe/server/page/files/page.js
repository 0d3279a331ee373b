// Shows the state that the coordinator sends, and lets an administrator act. Texts are set as text, never as HTML.
"use strict";

const MOST_WORKERS = 200;
const CHART_MILLISECONDS = 2000;
const byId = (id) => document.getElementById(id);
let state = null; // the newest message
let charted = { at: 0, key: "" };

function element(name, text = "", kind = "") {
  const node = document.createElement(name);
  if (text !== "") node.textContent = text;
  if (kind) node.className = kind;
  return node;
}

const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));

function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} d`;
}

function bytes(count) {
  return count < 1e9 ? `${(count / 1e6).toFixed(1)} MB` : `${(count / 1e9).toFixed(2)} GB`;
}

// Fills a table; a cell is text, [text, class], or a list of buttons. Rows that stay the same are left alone.
function fill(table, heads, rows, empty) {
  const key = JSON.stringify([language, heads, rows.map((row) => row.map((cell) => (cell instanceof Buttons ? cell.key : cell)))]);
  if (table.dataset.key === key) return;
  table.dataset.key = key;
  const head = element("thead");
  const line = element("tr");
  for (const name of heads) {
    const cell = element("th", name);
    cell.scope = "col";
    line.append(cell);
  }
  head.append(line);
  const body = element("tbody");
  for (const row of rows) {
    const line = element("tr");
    for (const cell of row) {
      if (cell instanceof Buttons) line.append(cell.cell());
      else line.append(Array.isArray(cell) ? element("td", ...cell) : element("td", String(cell)));
    }
    body.append(line);
  }
  if (!rows.length) {
    const cell = element("td", empty, "soft");
    cell.colSpan = heads.length;
    const line = element("tr");
    line.append(cell);
    body.append(line);
  }
  table.replaceChildren(head, body);
}

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

function pairs(list, rows) {
  list.replaceChildren(...rows.flatMap(([name, value, kind]) => [element("dt", name), element("dd", value, kind || "")]));
}

const isAdmin = () => state.role === "admin";

function show() {
  byId("moment").textContent = `${word("updated")} ${new Date(state.at * 1000).toLocaleTimeString(language)}`;
  byId("role").textContent = `${word("role")}: ${state.role}`;
  byId("problem").hidden = !state.problem;
  byId("problem").textContent = state.problem ? `${word("problem")}: ${state.problem}` : "";
  showExperts();
  showWorkers();
  showGateway();
  showDisk();
  showEvents();
  showChart();
  showAdministration();
}

function newest(losses, name) {
  for (let place = losses.length - 1; place >= 0; place -= 1) if (losses[place][name] !== null) return losses[place][name];
  return null;
}

function showExperts() {
  const heads = ["expert", "version", "count", "rate", "staleness", "training_loss", "held_out"].map(word);
  if (isAdmin()) heads.push(word("actions"));
  const rows = state.experts.map((expert) => {
    const row = [
      [expert.retired ? `${expert.name} (${word("retired")})` : expert.name, expert.retired ? "soft" : ""], expert.version, expert.workers,
      number(expert.updates_per_minute, 1), number(expert.staleness, 1),
      number(newest(expert.losses, "training"), 3), number(newest(expert.losses, "held_out"), 3),
    ];
    if (isAdmin()) row.push(expertButtons(expert));
    return row;
  });
  fill(byId("experts"), heads, rows, word("no_experts"));
}

function expertButtons(expert) {
  const name = expert.name;
  const retired = ["unretire", () => ask("unretire", name, "/unretire_expert", { expert: name })];
  const active = [
    ["roll_back", () => ask("roll_back", name, "/rollback", { expert: name }, { version: Math.max(0, expert.version - 1) })],
    ["retire", () => ask("retire", name, "/retire_expert", { expert: name })],
  ];
  return new Buttons(["expert", name, expert.version, expert.retired], expert.retired ? [retired] : active);
}

function showWorkers() {
  const asked = byId("filter").value.toLowerCase();
  const all = state.workers.filter((row) => `${row.worker} ${row.expert} ${row.state || ""}`.toLowerCase().includes(asked));
  const workers = all.slice(0, MOST_WORKERS);
  byId("filter").hidden = state.workers.length < 10;
  byId("more").textContent = all.length > workers.length ? `+ ${all.length - workers.length} ${word("more")}` : "";
  const heads = ["worker", "expert", "state", "step", "pace", "end", "heard", "pushes"].map(word);
  if (isAdmin()) heads.push(word("actions"));
  const rows = workers.map((row) => {
    const name = row.state || "unknown";
    const ago = Math.max(0, state.at - row.heard_at);
    const cells = [
      row.worker, row.expert, [row.phase && name === "loading" ? `${word(name)}: ${row.phase}` : word(name), name],
      row.step === null ? "–" : row.steps ? `${row.step} / ${row.steps}` : row.step,
      number(row.tokens_per_second, 0), duration(row.seconds_left), duration(5 * Math.round(ago / 5)),
      [`${row.pushes.landed} / ${row.pushes.held} / ${row.pushes.refused}${row.pushes.refusal ? `: ${row.pushes.refusal}` : ""}`, row.pushes.refusal ? "long" : ""],
    ];
    if (isAdmin()) cells.push(new Buttons(["worker", row.worker, row.expert], [["retract", () => ask("retract", `${row.worker} / ${row.expert}`, "/retract", { expert: row.expert, worker: row.worker })]]));
    return cells;
  });
  fill(byId("workers"), heads, rows, word("no_workers"));
}

function showGateway() {
  const gateway = state.gateway;
  if (!gateway) {
    pairs(byId("gateway"), [[word("gateway"), word("no_gateway"), "soft"]]);
    return;
  }
  const sources = Object.entries(gateway.sources).map(([name, version]) => `${name} ${version}`).join(", ");
  const rows = [[word("version"), `${gateway.version} (${gateway.strategy})`], [word("sources"), sources]];
  if (gateway.verdict) rows.push([word("verdict"), gateway.verdict]);
  pairs(byId("gateway"), rows);
}

function showDisk() {
  const disk = state.disk;
  if (!disk) {
    pairs(byId("disk"), [["–", "", "soft"]]);
    return;
  }
  const rows = [[word("stored"), bytes(disk.stored)], [word("hour"), bytes(disk.bytes_per_hour)]];
  if (disk.free !== null) rows.push([word("free"), bytes(disk.free)]);
  if (disk.hours_left !== null) rows.push([word("room"), duration(disk.hours_left * 3600)]);
  pairs(byId("disk"), rows);
}

function showEvents() {
  const items = state.events.slice(0, 50).map((event) => {
    const item = element("li");
    item.append(element("time", new Date(event.at * 1000).toLocaleTimeString(language)));
    item.append([event.kind, event.expert, event.worker, event.text].filter(Boolean).join("  "));
    return item;
  });
  byId("events").replaceChildren(...items);
}

function showChart() {
  if (typeof Plotly === "undefined") {
    byId("chart-hint").hidden = false;
    return;
  }
  const drawn = state.experts.filter((expert) => expert.losses.length).slice(0, 12);
  const key = JSON.stringify([language, drawn.map((expert) => [expert.name, expert.losses.length, expert.losses.at(-1).at])]);
  if (key === charted.key || performance.now() - charted.at < CHART_MILLISECONDS || !drawn.length) return;
  charted = { at: performance.now(), key };
  const colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
  const curves = drawn.flatMap((expert, place) => ["training", "held_out"].map((name) => {
    const points = expert.losses.filter((point) => point[name] !== null);
    return {
      x: points.map((point) => new Date(point.at * 1000)), y: points.map((point) => point[name]),
      name: `${expert.name}, ${word(name === "training" ? "training_loss" : "held_out")}`, mode: points.length < 3 ? "markers" : "lines",
      line: { color: colours[place % colours.length], width: name === "training" ? 1 : 3, dash: name === "training" ? "dot" : "solid" },
    };
  })).filter((curve) => curve.x.length);
  const style = getComputedStyle(document.body);
  const line = style.getPropertyValue("--line");
  Plotly.react("chart", curves, {
    height: 300, margin: { l: 45, r: 10, t: 10, b: 30 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: style.color }, xaxis: { gridcolor: line }, yaxis: { gridcolor: line }, showlegend: true, legend: { orientation: "h", y: -0.15 },
  }, { displayModeBar: false, responsive: true });
}

// What is asked for only as an administrator, and only while it changes or is looked at.
let heldCount = -1;

async function showAdministration() {
  if (!isAdmin()) return;
  byId("tokens-section").hidden = false;
  if (state.held_updates === heldCount) return;
  heldCount = state.held_updates;
  byId("held-section").hidden = !heldCount;
  if (!heldCount) return;
  const held = (await call("GET", "/quarantine")).updates;
  const rows = held.map((update) => [
    update.number, update.expert, update.worker, [update.reason, "long"],
    new Buttons(["held", update.number], [
      ["release", () => ask("release", `${update.number}`, "/quarantine/release", { number: update.number })],
      ["reject", () => ask("reject", `${update.number}`, "/quarantine/reject", { number: update.number })],
    ]),
  ]);
  fill(byId("held"), ["number", "expert", "worker", "reason", "actions"].map(word), rows, "");
}

async function showTokens() {
  const tokens = (await call("GET", "/tokens")).tokens.filter((token) => token.usable);
  const rows = tokens.map((token) => [
    token.hash.slice(0, 12), token.label, token.role, token.worker || "",
    token.used_at ? new Date(token.used_at * 1000).toLocaleString(language) : "–",
    new Buttons(["token", token.hash], [["revoke", () => ask("revoke", token.label || token.hash.slice(0, 12), "/tokens/revoke", { hash: token.hash })]]),
  ]);
  fill(byId("tokens"), [word("token"), word("label"), word("role"), word("worker"), word("used"), word("actions")], rows, "–");
}

async function call(method, path, body) {
  const options = { method, headers: { Accept: "application/json" } };
  if (body) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  const response = await fetch(path, options);
  const text = await response.text();
  const answer = text ? JSON.parse(text) : {};
  if (!response.ok) throw new Error(answer.detail || response.statusText);
  return answer;
}

// Says what will happen, and does it once that is confirmed.
const WITH_REASON = new Set(["roll_back", "retract", "retire", "reject"]);

function ask(action, about, path, body, { version } = {}) {
  const dialog = byId("dialog");
  byId("dialog-title").textContent = `${word(action)}: ${about}`;
  byId("dialog-text").textContent = word(`say_${action}`);
  byId("dialog-answer").textContent = "";
  byId("dialog-reason").value = "";
  byId("dialog-reason-label").hidden = !WITH_REASON.has(action);
  byId("dialog-version-label").hidden = version === undefined;
  if (version !== undefined) byId("dialog-version").value = version;
  byId("dialog-confirm").onclick = async () => {
    const message = { ...body };
    if (WITH_REASON.has(action)) message.reason = byId("dialog-reason").value;
    if (version !== undefined) message.to_version = Number(byId("dialog-version").value);
    byId("dialog-confirm").disabled = true;
    try {
      await call("POST", path, message);
      dialog.close();
      heldCount = -1;
      if (action === "revoke") await showTokens();
    } catch (error) {
      byId("dialog-answer").textContent = error.message;
    } finally {
      byId("dialog-confirm").disabled = false;
    }
  };
  dialog.showModal();
}

function setLive(isLive) {
  const badge = byId("live");
  badge.textContent = word(isLive ? "live" : "lost");
  badge.className = `badge ${isLive ? "good" : "bad"}`;
}

function listen() {
  const source = new EventSource("/live");
  source.onopen = () => setLive(true);
  source.onmessage = (event) => {
    state = JSON.parse(event.data);
    setLive(true);
    if (!document.hidden) show();
  };
  source.onerror = async () => {
    setLive(false);
    // A refusal ends the source for good: the token may have ended.
    if (source.readyState === EventSource.CLOSED) {
      const answer = await fetch("/status").catch(() => null);
      if (answer && answer.status === 401) location.replace("/login");
      else setTimeout(listen, 2000);
    }
  };
}

document.addEventListener("visibilitychange", () => { if (!document.hidden && state) show(); });
byId("language").addEventListener("click", () => {
  switchLanguage();
  byId("filter").placeholder = word("filter");
  if (state) show();
});
byId("log-out").addEventListener("click", async () => {
  await fetch("/session/end", { method: "POST" });
  localStorage.removeItem("fedmoe-logged-in");
  location.replace("/login");
});
byId("filter").addEventListener("input", () => { if (state) showWorkers(); });
byId("tokens-details").addEventListener("toggle", (event) => { if (event.target.open) showTokens(); });
byId("filter").placeholder = word("filter");
byId("log-out").hidden = !localStorage.getItem("fedmoe-logged-in");
translate();
setLive(false);
listen();
