// Shows the runs that the server sends. Texts are set as text, never as HTML.
"use strict";

const WORDS = {
  en: {
    title: "FedMoE arena", episodes: "Episodes", run: "Run", policy: "Policy", order: "Order", newest: "newest", lowest: "lowest reward",
    highest: "highest reward", all: "all", other: "中文", live: "live", lost: "no connection; trying again", score: "held-out score (interval)",
    questions: "questions", rating: "rating", reward: "reward", kl: "KL", entropy: "entropy", staleness: "staleness", policies: "Policies",
    wins: "Win rate against", decisions: "Decisions", iteration: "iteration", what: "what", change: "change", reason: "why",
    none: "nothing was recorded yet", sample: "SAMPLE DATA: not a real run", saw: "saw", said: "said", recent: "Reward, KL, entropy and staleness: means of the last fifth.",
  },
  zh: {
    title: "FedMoE 竞技场", episodes: "对局", run: "运行", policy: "策略", order: "排序", newest: "最新", lowest: "奖励最低", highest: "奖励最高",
    all: "全部", other: "English", live: "实时", lost: "连接中断，正在重试", score: "留出得分（区间）", questions: "题数", rating: "评分",
    reward: "奖励", kl: "KL", entropy: "熵", staleness: "陈旧度", policies: "策略", wins: "对各对手的胜率", decisions: "决策", iteration: "迭代",
    what: "内容", change: "变化", reason: "原因", none: "尚无记录", sample: "示例数据：不是真实运行", saw: "所见", said: "所答",
    recent: "奖励、KL、熵和陈旧度为最后五分之一的均值。", accuracy: "正确率", performance: "最终表现与基础模型对比", radar: "能力",
    scatter: "效率与奖励（大小：词元数）", credit: "贡献，最后五分之一的均值", team: "团队", system: "机器负载", timing: "每次迭代用时",
  },
};
const byId = (id) => document.getElementById(id);
let language = localStorage.getItem("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
const dark = matchMedia("(prefers-color-scheme: dark)");
let state = null; // the newest message
const word = (name) => WORDS[language][name] || WORDS.en[name] || name;
const number = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const interval = (values) => (values === null || values[0] === null ? "–" : `${number(values[0])} (${number(values[1])} – ${number(values[2])})`);

function element(name, text = "", kind = "") {
  const node = document.createElement(name);
  if (text !== "") node.textContent = text;
  if (kind) node.className = kind;
  return node;
}

function table(heads, rows) {
  const made = element("table"), head = made.createTHead().insertRow(), body = made.createTBody();
  for (const name of heads) head.append(element("th", name));
  for (const row of rows) body.insertRow().append(...row.map((cell) => (Array.isArray(cell) ? element("td", ...cell) : element("td", String(cell)))));
  const box = element("div", "", "scroll");
  box.tabIndex = 0;
  box.append(rows.length ? made : element("p", word("none"), "soft"));
  return box;
}

function winTable(run) {
  const opponents = [...new Set(run.wins.map((win) => win.opponent))];
  const of = (policy, opponent) => run.wins.find((win) => win.policy === policy && win.opponent === opponent);
  const rows = run.policies.map(({ policy }) => [policy, ...opponents.map((name) => number((of(policy, name) || { win: [null] }).win[0], 2))]);
  return table([word("policy"), ...opponents], run.wins.length ? rows : []);
}

function runSection(run) {
  const section = element("section");
  section.append(element("h2", run.name));
  if (run.problem) return section.append(element("p", run.problem, "soft")), section;
  if (run.sample) section.append(element("p", word("sample"), "sample"));
  section.append(element("p", run.facts, "soft"), element("h3", word("policies")));
  const columns = ["reward", "kl", "entropy", "staleness"];
  const heads = ["policy", "score", "questions", "rating", ...columns].map(word);
  section.append(table(heads, run.policies.map((row) => [row.policy, interval(row.score), number(row.questions, 0), number(row.rating, 1), ...columns.map((name) => number(row[name]))])));
  section.append(element("p", word("recent"), "soft"), element("h3", word("wins")), winTable(run), element("h3", word("decisions")));
  const changes = run.decisions.map((row) => [row.iteration, row.policy, row.what, `${row.before} → ${row.after}`, [row.reason, "long"]]);
  section.append(table(["iteration", "policy", "what", "change", "reason"].map(word), changes));
  return section;
}

// Plotly reads a little HTML in labels: texts of records must not be taken for it.
const plain = (value) => (typeof value === "string" ? value.replaceAll("&", "&amp;").replaceAll("<", "&lt;") : Array.isArray(value) ? value.map(plain) : value);

function charts() {
  const box = byId("charts"), wanted = new Map();
  const colour = getComputedStyle(document.body).color;
  state.runs.forEach((run, place) => (run.figures || []).forEach((figure) => wanted.set(`chart-${figure.name}-${place}`, [run, figure])));
  for (const node of [...box.children]) if (!wanted.has(node.dataset.chart)) node.remove();
  const order = [...wanted].sort(([, one], [, two]) => titles.indexOf(one[1].name) - titles.indexOf(two[1].name));
  for (const [key, [run, figure]] of order) {
    let section = [...box.children].find((node) => node.dataset.chart === key);
    if (!section) {
      section = element("section");
      section.dataset.chart = key;
      section.append(element("h2"), element("p", state.runs.length > 1 ? run.name : "", "soft"), element("div"));
      box.append(section);
    }
    section.firstChild.textContent = language === "zh" && WORDS.zh[figure.name] ? WORDS.zh[figure.name] : figure.title;
    const data = figure.data.map((trace) => ({ ...trace, ...Object.fromEntries(["name", "x", "y", "theta", "customdata"].filter((name) => name in trace).map((name) => [name, plain(trace[name])])) }));
    const clear = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { ...figure.layout.font, color: colour } };
    const layout = { ...figure.layout, ...clear };
    const line = getComputedStyle(document.body).getPropertyValue("--line");
    for (const name of ["xaxis", "yaxis"]) layout[name] = { ...layout[name], color: colour, gridcolor: line, zerolinecolor: line };
    for (const name of ["xaxis", "yaxis"]) if (layout[name].title) layout[name].title = { ...layout[name].title, font: { color: colour } };
    if (dark.matches) layout.shapes = (layout.shapes || []).map((shape) => ({ ...shape, opacity: 0.15 }));
    if (layout.polar) layout.polar = { ...layout.polar, bgcolor: "rgba(0,0,0,0)" };
    Plotly.react(section.lastChild, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }
}
const titles = ["reward", "accuracy", "kl", "entropy", "performance", "rating", "radar", "scatter", "credit", "team", "system", "timing"];

function options(select, pairs) {
  const key = JSON.stringify(pairs), before = select.value;
  if (select.dataset.key === key) return;
  select.dataset.key = key;
  select.replaceChildren(...pairs.map(([value, text]) => Object.assign(element("option", text), { value })));
  if (pairs.some(([value]) => value === before)) select.value = before;
}

function filters() {
  options(byId("run"), state.runs.map((run, place) => [String(place), run.name]));
  const policies = (state.runs[Number(byId("run").value)] || {}).policies || [];
  options(byId("policy"), [["", word("all")], ...policies.map(({ policy }) => [policy, policy])]);
}

async function episodes() {
  const query = new URLSearchParams({ run: byId("run").value, policy: byId("policy").value, order: byId("order").value });
  const answer = await fetch(`/episodes?${query}`);
  if (!answer.ok) return;
  const rows = await answer.json();
  if (byId("order").value === "newest") rows.reverse();
  const shown = rows.map((row) => {
    const box = element("details");
    const seats = row.seats.map((seat) => `${seat.policy} ${number(seat.reward, 2)}`).join(" · ");
    box.append(element("summary", `${word("iteration")} ${row.iteration}, ${row.mode}: ${seats}`));
    for (const seat of row.seats) {
      box.append(element("h3", `${seat.policy}, ${word("reward")} ${number(seat.reward, 2)}`));
      for (const turn of seat.turns) box.append(element("pre", `${word("saw")}: ${turn.saw}`), element("pre", `${word("said")}: ${turn.said}`));
    }
    return box;
  });
  byId("episodes").replaceChildren(...(shown.length ? shown : [element("p", word("none"), "soft")]));
}

function show() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = word(node.dataset.word);
  byId("language").textContent = word("other");
  if (state === null) return;
  byId("runs").replaceChildren(...state.runs.map(runSection));
  filters();
  charts();
}

byId("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("language", language);
  show();
  episodes();
});
byId("run").addEventListener("change", filters);
byId("filter").addEventListener("change", episodes);
dark.addEventListener("change", show);
const source = new EventSource("/live");
source.addEventListener("message", (event) => {
  const first = state === null;
  state = JSON.parse(event.data);
  byId("state").textContent = word("live");
  show();
  if (first) episodes();
});
source.addEventListener("error", () => { byId("state").textContent = word("lost"); });
show();
