// Shows the runs that the server sends. Texts are set as text, never as HTML.
"use strict";

addWords({
  en: {
    title: "FedMoE arena", runs: "Runs", episodes: "Episodes", run: "Run", policy: "Policy", order: "Order", newest: "newest", lowest: "lowest reward",
    highest: "highest reward", least: "Reward from", most: "to", save: "Save these as JSONL", all: "all", score: "held-out score (interval)", best: "best held-out score (interval)",
    questions: "questions", rating: "rating ± sigma", reward: "reward", kl: "KL", entropy: "entropy", staleness: "staleness", policies: "Policies",
    wins: "Win rate (interval) against", decisions: "Decisions", iteration: "iteration", what: "what", change: "change", reason: "why",
    none: "nothing was recorded yet", no_episodes: "no episode that fits was kept", sample: "SAMPLE DATA: not a real run", saw: "saw", said: "said", recent: "Reward, KL, entropy and staleness: means of the last fifth.",
    machine: "Machine", cpu: "CPU", memory: "memory", process: "this run", gpu: "GPU", gpu_memory: "GPU memory", disk: "disk used", free: "disk free", pace: "tokens/s",
    team: "team", seat: "seat", limit: "ran into the limit of tokens", cut: "the rest is left out", question: "question", whole: "whole run", task: "task", base: "base", mode: "mode", seed: "seed", iterations: "iterations", no_charts: "Charts need plotly: pip install 'fedmoe[web]'",
  },
  zh: {
    title: "FedMoE 竞技场", runs: "运行", episodes: "对局", run: "运行", policy: "策略", order: "排序", newest: "最新", lowest: "奖励最低", highest: "奖励最高",
    least: "奖励从", most: "到", save: "另存为 JSONL", all: "全部", score: "留出得分（区间）", best: "最佳留出得分（区间）", questions: "题数", rating: "评分 ± 标准差",
    reward: "奖励", kl: "KL", entropy: "熵", staleness: "陈旧度", policies: "策略", wins: "对各对手的胜率（区间）", decisions: "决策", iteration: "迭代",
    what: "内容", change: "变化", reason: "原因", none: "尚无记录", no_episodes: "没有符合条件的对局", sample: "示例数据：不是真实运行", saw: "所见", said: "所答",
    recent: "奖励、KL、熵和陈旧度为最后五分之一的均值。", machine: "机器", cpu: "处理器", memory: "内存", process: "本次运行", gpu: "GPU", gpu_memory: "GPU 显存", disk: "磁盘已用",
    free: "磁盘可用", pace: "词元/秒", team: "团队", seat: "席位", limit: "达到词元上限", cut: "其余省略", question: "问题", whole: "整个运行", task: "任务", base: "基础模型", mode: "模式", seed: "种子", iterations: "迭代", no_charts: "图表需要 plotly：pip install 'fedmoe[web]'",
  },
});
let state = null; // the newest message
const EPISODE_MILLISECONDS = 5000;
let episodesAt = -EPISODE_MILLISECONDS;

const interval = (values, digits = 3) => (values === null || values[0] === null ? "–" : `${number(values[0], digits)} (${number(values[1], digits)} – ${number(values[2], digits)})`);
const percent = (value) => (value === null ? "–" : `${value.toFixed(0)} %`);
const gigabytes = (value) => (value === null ? "–" : `${(value / 1e9).toFixed(1)} GB`);
const recentNames = ["reward", "kl", "entropy", "staleness"];

function showOverview() {
  byId("overview").hidden = state.runs.length < 2;
  const rows = state.runs.map((run) => {
    if (run.problem) return [run.name, ["–", "soft"], [run.problem, "long"], "–", "–"];
    const scored = run.policies.filter((row) => row.score && row.score[0] !== null);
    const best = scored.reduce((one, two) => (one === null || two.score[0] > one.score[0] ? two : one), null);
    const rewards = run.policies.map((row) => row.reward).filter((value) => value !== null);
    const mean = rewards.length ? rewards.reduce((sum, value) => sum + value, 0) / rewards.length : null;
    return [run.name, run.iterations[1], [best ? `${best.policy} ${interval(best.score)}` : "–", "long"], number(mean, 3), number(run.machine.tokens_per_second, 0)];
  });
  fill(byId("compared"), ["run", "iteration", "best", "reward", "pace"].map(word), rows, word("none"));
}

// Parts of a run's section, made once, so that what is scrolled or focused there stays.
function partsOf(section) {
  if (section.parts) return section.parts;
  const table = (kind) => {
    const box = element("div", "", kind);
    box.tabIndex = 0;
    box.append(element("table"));
    return box;
  };
  const parts = {
    name: element("h2"), path: element("p", "", "path"), problem: element("p", "", "soft"), sample: element("p", "", "sample"), facts: element("p", "", "hint"),
    policiesHead: element("h3"), policies: table("scroll cards"), recent: element("p", "", "hint"), winsHead: element("h3"), wins: table("scroll"),
    machineHead: element("h3"), machine: element("dl"), decisionsHead: element("h3"), decisions: table("decisions cards"),
  };
  section.append(...Object.values(parts));
  section.parts = parts;
  return parts;
}

function showRun(section, run) {
  const parts = partsOf(section), ends = !!run.problem;
  parts.name.textContent = run.name;
  parts.path.textContent = run.path === run.name ? "" : run.path;
  parts.problem.textContent = run.problem;
  for (const [name, node] of Object.entries(parts)) node.hidden = ends && !["name", "path", "problem"].includes(name);
  if (ends) return;
  parts.sample.hidden = !run.sample;
  parts.sample.textContent = word("sample");
  const facts = [["task", run.task], ["base", run.base_model], ["mode", inWords(run.mode.replaceAll("_", " "))], ["seed", run.seed], ["iterations", run.iterations.join(" – ")]];
  parts.facts.textContent = facts.filter(([, value]) => value).map(([name, value]) => `${word(name)} ${value}`).join(" · ");
  for (const name of ["policies", "wins", "machine", "decisions"]) parts[`${name}Head`].textContent = word(name);
  const rows = run.policies.map((row) => [
    row.policy, interval(row.score), number(row.questions, 0), row.rating === null ? "–" : `${number(row.rating, 1)} ± ${number(row.sigma, 1)}`,
    ...recentNames.map((name) => number(row[name], 3)),
  ]);
  fill(parts.policies.firstChild, ["policy", "score", "questions", "rating", ...recentNames].map(word), rows, word("none"));
  parts.recent.textContent = word("recent");
  showWins(parts.wins.firstChild, run);
  showMachine(parts.machine, run.machine);
  // A team is named after its policies, A+B: its name may break behind the sign only.
  const changes = run.decisions.map((row) => [row.iteration, row.policy.replaceAll("+", "+\u200b") || word("whole"), inWords(row.what.replaceAll("_", " ")), [row.before, row.after].filter(Boolean).join(" → "), row.reason]);
  fill(parts.decisions.firstChild, ["iteration", "policy", "what", "change", "reason"].map(word), changes, word("none"));
}

function showWins(table, run) {
  const opponents = [...new Set(run.wins.map((win) => win.opponent))];
  const of = (policy, opponent) => run.wins.find((win) => win.policy === policy && win.opponent === opponent);
  const rows = run.policies.map(({ policy }) => [policy, ...opponents.map((name) => interval((of(policy, name) || { win: null }).win, 2))]);
  fill(table, [word("policy"), ...opponents.map(inWords)], run.wins.length ? rows : [], word("none"));
}

function showMachine(list, machine) {
  const values = [
    ["cpu", percent(machine.cpu_percent)], ["memory", percent(machine.memory_percent)], ["process", gigabytes(machine.process_bytes)], ["gpu", percent(machine.gpu_percent)],
    ["gpu_memory", gigabytes(machine.gpu_memory_bytes)], ["disk", percent(machine.disk_percent)], ["free", gigabytes(machine.disk_free_bytes)], ["pace", number(machine.tokens_per_second, 0)],
  ];
  list.replaceChildren(...values.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", word(name)), element("dd", value));
    return pair;
  }));
}

function showRuns() {
  const box = byId("runs");
  while (box.children.length > state.runs.length) box.lastChild.remove();
  state.runs.forEach((run, place) => showRun(box.children[place] || box.appendChild(element("section")), run));
}

function options(select, pairs) {
  const key = JSON.stringify(pairs), before = select.value;
  if (select.dataset.key === key) return;
  select.dataset.key = key;
  select.replaceChildren(...pairs.map(([value, text]) => Object.assign(element("option", text), { value })));
  if (pairs.some(([value]) => value === before)) select.value = before;
}

function showFilters() {
  options(byId("run"), state.runs.map((run, place) => [String(place), run.name]));
  const policies = (state.runs[Number(byId("run").value)] || {}).policies || [];
  options(byId("policy"), [["", word("all")], ...policies.map(({ policy }) => [policy, policy])]);
  byId("save").href = `/episodes?${asked()}&form=jsonl`;
}

const asked = () => new URLSearchParams(["run", "policy", "order", "least", "most"].map((name) => [name, byId(name).value])).toString();

async function showEpisodes() {
  episodesAt = performance.now();
  const query = asked(), answer = await fetch(`/episodes?${query}`).catch(() => null);
  if (answer === null || query !== asked()) return; // asked anew meanwhile
  const content = await answer.json();
  if (!answer.ok) {
    byId("episodes").replaceChildren(element("p", content.detail, "bad"));
    return;
  }
  if (byId("order").value === "newest") content.reverse();
  byId("episodes").replaceChildren(...(content.length ? content.map(episodeOf) : [element("p", word("no_episodes"), "soft")]));
}

function episodeOf(row) {
  const box = element("details");
  const seats = row.seats.map((seat) => `${seat.policy} ${number(seat.reward, 2)}`).join(" · ");
  box.append(element("summary", `${word("iteration")} ${row.iteration}, ${inWords(row.mode.replaceAll("_", " "))}: ${seats}`));
  // Texts are long and there are many: they are put in when somebody looks.
  box.addEventListener("toggle", () => {
    if (box.children.length > 1) return;
    if (row.question) box.append(element("p", `${word("question")}: ${row.question}`, "hint"));
    for (const seat of row.seats) {
      const team = row.seats.length > 1 ? `, ${word("team")} ${seat.team}` : "";
      box.append(element("h3", `${seat.policy}${team}, ${word("reward")} ${number(seat.reward, 2)}`));
      for (const turn of seat.turns) {
        const notes = [turn.ended ? "" : word("limit"), turn.cut ? word("cut") : ""].filter(Boolean).map((note) => ` [${note}]`).join("");
        box.append(element("pre", `${word("saw")}: ${turn.saw}`), element("pre", `${word("said")}: ${turn.said}${notes}`));
      }
    }
  });
  return box;
}

function episodesAreRead() {
  return document.querySelector("#episodes details[open]") !== null || byId("episodes").contains(document.activeElement);
}

function show(anew = false) {
  if (state === null) return;
  showOverview();
  showRuns();
  showFilters();
  showCharts(byId("charts"), state.runs, anew);
}

function showAnew() {
  show(true);
  if (state !== null) showEpisodes();
}

byId("run").addEventListener("change", showFilters);
byId("filter").addEventListener("change", () => { showFilters(); showEpisodes(); });
byId("filter").addEventListener("submit", (event) => event.preventDefault());
dark.addEventListener("change", showAnew);
document.addEventListener("visibilitychange", () => { if (!document.hidden) show(); });
languageButton(showAnew);
translate();
setLive(false);
listen((message) => {
  state = message;
  if (document.hidden) return;
  show();
  if (!episodesAreRead() && performance.now() - episodesAt > EPISODE_MILLISECONDS) showEpisodes();
});
