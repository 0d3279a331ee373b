// Shows the state that the coordinator sends, and lets an administrator act. Texts are set as text, never as HTML.
"use strict";

const MOST_WORKERS = 200;
const MOST_CURVES = 12;
const CHART_MILLISECONDS = 2000;
const LOG_MILLISECONDS = 2000;
const SILENT_MILLISECONDS = 20000; // a state comes every five seconds at least
let state = null; // the newest message
let charted = { at: -CHART_MILLISECONDS, key: "" };

function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} d`;
}

function bytes(count) {
  return count < 1e9 ? `${(count / 1e6).toFixed(1)} MB` : `${(count / 1e9).toFixed(2)} GB`;
}

function pairs(list, rows) {
  list.replaceChildren(...rows.flatMap(([name, value, kind]) => [element("dt", name), element("dd", value, kind || "")]));
}

const isAdmin = () => state.role === "admin";

function show() {
  byId("moment").textContent = `${word("updated")} ${new Date(state.at * 1000).toLocaleTimeString(locale())}`;
  byId("role").textContent = `${word("role")}: ${word(state.role)}`;
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
  const heads = ["expert", "version", "count", "rate", "staleness", "training_loss", "held_out", "kept"].map(word);
  if (isAdmin()) heads.push(word("actions"));
  const rows = state.experts.map((expert) => {
    const row = [
      [expert.retired ? `${expert.name} (${word("retired")})` : expert.name, expert.retired ? "soft" : ""], expert.version, expert.workers,
      number(expert.updates_per_minute, 1), number(expert.staleness, 1),
      number(newest(expert.losses, "training"), 3), number(newest(expert.losses, "held_out"), 3),
      expert.gain_kept === null ? "–" : `${(100 * expert.gain_kept).toFixed(0)} %`,
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
  const heads = ["worker", "expert", "state", "step", "pace", "end", "device", "heard", "pushes", "actions"].map(word);
  const rows = workers.map((row) => {
    const name = row.state || "unknown";
    const ago = Math.max(0, state.at - row.heard_at);
    const cells = [
      row.worker, row.expert, [row.phase && name === "loading" ? `${word(name)}: ${row.phase}` : word(name), name],
      row.step === null ? "–" : row.steps ? `${row.step} / ${row.steps}` : row.step,
      number(row.tokens_per_second, 0), duration(row.seconds_left), deviceOf(row), duration(5 * Math.round(ago / 5)),
      [`${row.pushes.landed} / ${row.pushes.held} / ${row.pushes.refused}${row.pushes.refusal ? `: ${row.pushes.refusal}` : ""}`, row.pushes.refusal ? "long" : ""],
    ];
    const actions = [["log", () => showLog(row.worker, row.expert)]];
    if (isAdmin()) actions.push(["retract", () => ask("retract", `${row.worker} / ${row.expert}`, "/retract", { expert: row.expert, worker: row.worker })]);
    return [...cells, new Buttons(["worker", row.worker, row.expert, actions.length], actions)];
  });
  fill(byId("workers"), heads, rows, word("no_workers"));
}

// What a worker trains on, and what of its memory is held: the GPU's, or by the process.
function deviceOf(row) {
  const memory = row.device_total !== null && row.device_memory !== null ? `${gigabytes(row.device_memory)} / ${gigabytes(row.device_total)} GB` : row.memory !== null ? `${gigabytes(row.memory)} GB` : "";
  return [row.device, memory].filter(Boolean).join(", ") || "–";
}

const gigabytes = (count) => (count / 1e9).toFixed(count < 1e10 ? 1 : 0);

async function showLog(worker, expert) {
  const dialog = byId("log-dialog"), lines = byId("log-lines");
  byId("log-title").textContent = `${worker} / ${expert}`;
  lines.textContent = "";
  dialog.showModal();
  let after = 0;
  while (dialog.open) {
    try {
      const log = await call("GET", `/worker_log?${new URLSearchParams({ worker, expert, after })}`);
      const atEnd = lines.scrollTop + lines.clientHeight >= lines.scrollHeight - 4;
      lines.append(log.lines.map((line) => `${line}\n`).join(""));
      after = log.next;
      if (!lines.textContent) lines.textContent = word("no_log");
      else if (lines.textContent.startsWith(word("no_log")) && log.lines.length) lines.firstChild.remove();
      if (atEnd) lines.scrollTop = lines.scrollHeight;
    } catch (error) {
      lines.textContent = error.message;
      return;
    }
    await new Promise((resolve) => { setTimeout(resolve, LOG_MILLISECONDS); });
  }
}

// What the gate says, part by part; parts may hold others. What is not known stays as it is.
function gateText(text) {
  if (language !== "zh") return text;
  return text.split("; ").map((part) => {
    for (const [english, chinese] of GATE_SENTENCES) {
      const values = part.match(english);
      if (values) return chinese.replace(/{(\d)}/g, (_, place) => gateText(values[place]));
    }
    return part;
  }).join("；");
}

function showGateway() {
  const { gateway, gate } = state;
  const sources = gateway ? Object.entries(gateway.sources).map(([name, version]) => `${name} ${version}`).join(", ") : "";
  const rows = gateway
    ? [[word("version"), gateway.version], [word("strategy"), gateway.strategy], [word("sources"), sources]]
    : [[word("gateway"), word("no_gateway"), "soft"]];
  if (gate && gate.reason) rows.push([word("verdict"), `${gate.at === null ? "" : `${new Date(gate.at * 1000).toLocaleTimeString(locale())}  `}${gateText(gate.reason)}`]);
  rows.push([word("gate"), gate ? gateText(gate.status) : word("no_gate"), gate ? "" : "soft"]);
  pairs(byId("gateway"), rows);
}

function showDisk() {
  const disk = state.disk;
  if (!disk) {
    pairs(byId("disk"), [["–", isAdmin() || state.role === "viewer" ? "" : word("hidden"), "soft"]]);
    return;
  }
  const rows = [[word("stored"), bytes(disk.stored)], [word("hour"), bytes(disk.bytes_per_hour)]];
  if (disk.free !== null) rows.push([word("free"), bytes(disk.free)]);
  rows.push([word("room"), disk.hours_left === null ? word("idle") : hours(disk.hours_left)]);
  pairs(byId("disk"), rows);
}

const eventWord = (name) => (language === "zh" && Object.hasOwn(EVENT_WORDS, name) ? EVENT_WORDS[name] : name);
// An event's text is made of words with values; what somebody wrote stands behind such a word.
const eventText = (text) => text.replace(/(^|, )(version|to version|staleness|name|reason|number) /g, (_, before, name) => `${before}${eventWord(name)} `);
const hours = (count) => (count < 100 ? count.toFixed(1) : count < 1e6 ? Math.round(count).toLocaleString(locale()) : "> 1,000,000");

function showEvents() {
  const key = `${language} ${state.events.length ? state.events[0].id : ""}`;
  if (byId("events").dataset.key === key) return;
  byId("events").dataset.key = key;
  const items = state.events.slice(0, 50).map((event) => {
    const item = element("li");
    item.append(element("time", new Date(event.at * 1000).toLocaleTimeString(locale())));
    item.append([eventWord(event.kind), event.expert, event.worker, eventText(event.text)].filter(Boolean).join("  "));
    return item;
  });
  byId("events").replaceChildren(...items);
}

function showChart() {
  if (typeof Plotly === "undefined") {
    byId("chart-hint").hidden = false;
    byId("chart-hint").textContent = word("no_charts");
    return;
  }
  const all = state.experts.filter((expert) => expert.losses.length), drawn = all.slice(0, MOST_CURVES);
  byId("chart-hint").hidden = all.length <= drawn.length;
  byId("chart-hint").textContent = `+ ${all.length - drawn.length} ${word("more")}`;
  const key = JSON.stringify([language, dark.matches, drawn.map((expert) => [expert.name, expert.losses.length, expert.losses.at(-1).at])]);
  if (key === charted.key || !drawn.length) return;
  const pause = charted.at + CHART_MILLISECONDS - performance.now();
  if (pause > 0) {
    clearTimeout(charted.timer);
    charted.timer = setTimeout(showChart, pause);
    return;
  }
  charted = { at: performance.now(), key };
  const colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
  const curves = drawn.flatMap((expert, place) => ["training", "held_out"].map((name) => {
    const points = expert.losses.filter((point) => point[name] !== null);
    return {
      x: points.map((point) => new Date(point.at * 1000)), y: points.map((point) => point[name]),
      name: `${plain(expert.name)}, ${word(name === "training" ? "training_loss" : "held_out")}`, mode: points.length < 3 ? "markers" : "lines",
      line: { color: colours[place % colours.length], width: name === "training" ? 1 : 3, dash: name === "training" ? "dot" : "solid" },
    };
  })).filter((curve) => curve.x.length);
  const layout = { height: 320, margin: { l: 45, r: 10, t: 10, b: 30 }, xaxis: {}, yaxis: {}, showlegend: true, legend: { orientation: "h", y: -0.15 } };
  Plotly.react("chart", themed(curves), chartLayout(layout), CHART_OPTIONS);
}

// What is asked for only as an administrator, and only while it changes or is looked at.
let heldCount = -1;

async function showAdministration() {
  byId("tokens-section").hidden = !isAdmin();
  if (!isAdmin() || state.held_updates === heldCount) return;
  heldCount = state.held_updates;
  byId("held-section").hidden = !heldCount;
  if (!heldCount) return;
  const held = await asked("/quarantine", "updates", "held");
  const rows = held.map((update) => [
    update.number, update.expert, update.worker, [update.reason, "long"],
    new Buttons(["held", update.number], [
      ["release", () => ask("release", `${update.number}`, "/quarantine/release", { number: update.number })],
      ["reject", () => ask("reject", `${update.number}`, "/quarantine/reject", { number: update.number })],
    ]),
  ]);
  fill(byId("held"), ["number", "expert", "worker", "reason", "actions"].map(word), rows, "–");
}

async function showTokens() {
  const tokens = (await asked("/tokens", "tokens", "tokens")).filter((token) => token.usable);
  const rows = tokens.map((token) => [
    token.hash.slice(0, 12), [token.label, "long"], word(token.role), token.worker || "",
    token.used_at ? new Date(token.used_at * 1000).toLocaleString(locale()) : "–",
    new Buttons(["token", token.hash], [["revoke", () => ask("revoke", token.label || token.hash.slice(0, 12), "/tokens/revoke", { hash: token.hash })]]),
  ]);
  fill(byId("tokens"), ["token", "label", "token_role", "worker", "used", "actions"].map(word), rows, "–");
}

// A list that the coordinator gives to administrators; nothing, and why, where it does not.
async function asked(path, name, table) {
  try {
    return (await call("GET", path))[name];
  } catch (error) {
    heldCount = -1;
    byId(table).replaceChildren(element("caption", `${word("failed")}: ${error.message}`, "bad"));
    byId(table).removeAttribute("data-heads");
    return [];
  }
}

async function call(method, path, body) {
  const options = { method, headers: { Accept: "application/json" } };
  if (body) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  const response = await fetch(path, options).catch(() => { throw new Error(word("away")); });
  if (response.status === 401) toLogin();
  const text = await response.text();
  let answer = {};
  try {
    answer = text ? JSON.parse(text) : {};
  } catch {
    // A proxy's own page; its status says enough.
  }
  if (!response.ok) throw new Error(answer.detail || `${response.status} ${response.statusText}`);
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

function toLogin() {
  localStorage.removeItem("fedmoe-logged-in");
  location.replace("/login?ended");
}

// The stream is refused for good where the token has ended; else the coordinator is just starting.
async function refused() {
  const answer = await fetch("/status").catch(() => null);
  if (answer && answer.status === 401) toLogin();
}

document.addEventListener("visibilitychange", () => { if (!document.hidden && state) show(); });
dark.addEventListener("change", () => { if (state) show(); });
languageButton(() => {
  heldCount = -1;
  if (state) show();
  if (byId("tokens-details").open) showTokens();
});
byId("log-out").addEventListener("click", async () => {
  await fetch("/session/end", { method: "POST" }).catch(() => {});
  localStorage.removeItem("fedmoe-logged-in");
  location.replace("/login");
});
// Logged out in another tab.
window.addEventListener("storage", (event) => { if (event.key === "fedmoe-logged-in" && event.newValue === null) location.replace("/login"); });
byId("filter").addEventListener("input", () => { if (state) showWorkers(); });
byId("dialog").querySelector("form").addEventListener("submit", (event) => {
  // Enter in a field must not count as the cancel button.
  if (event.submitter === null || event.submitter.value !== "cancel") event.preventDefault();
});
byId("tokens-details").addEventListener("toggle", (event) => { if (event.target.open) showTokens(); });
byId("log-out").hidden = !localStorage.getItem("fedmoe-logged-in");
translate();
setLive(false);
listen((message) => {
  state = message;
  if (!document.hidden) show();
}, refused, SILENT_MILLISECONDS);
