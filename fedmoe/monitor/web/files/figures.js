// Charts of runs: those in view are drawn, in the colours of the theme and the words of the language.
"use strict";

const FIGURES = ["reward", "accuracy", "kl", "entropy", "performance", "rating", "radar", "scatter", "credit", "team", "system", "timing"];
// Texts that the figures bring along; names of policies are nobody's words.
const FIGURE_WORDS = {
  "Reward": "奖励", "Accuracy": "正确率", "Movement since sampling": "采样后的变化（KL）", "Entropy": "熵",
  "Final performance against the base model": "最终表现与基础模型对比", "Rating (band: one sigma)": "评分（带：一个标准差）", "Capability": "能力",
  "Efficiency and reward (size: tokens)": "效率与奖励（大小：词元数）", "Credit, mean of the last fifth": "贡献，最后五分之一的均值", "Team": "团队",
  "System": "机器负载", "Time per iteration": "每次迭代用时",
  "iteration": "迭代", "mean reward per episode": "每局平均奖励", "mean seat score (0 to 1)": "平均席位得分（0 到 1）",
  "KL divergence (nats per token)": "KL 散度（nat/词元）", "entropy (nats per token)": "熵（nat/词元）", "held-out score (0 to 1)": "留出得分（0 到 1）",
  "rating mu (OpenSkill points)": "评分 μ（OpenSkill）", "efficiency (reward per 1000 tokens)": "效率（每千词元奖励）", "share or score (0 to 1)": "比例或得分（0 到 1）",
  "seconds since the start": "开始后的秒数", "percent": "百分比", "seconds": "秒",
  "base model": "基础模型", "trained": "训练后", "team score": "团队得分", "completion": "完成率", "utilisation": "利用率", "cooperation": "合作",
  "CPU": "处理器", "memory": "内存", "GPU": "GPU", "disk": "磁盘", "rollout": "采样", "learn": "学习", "other": "其他",
  "accuracy": "正确率", "valid moves": "有效动作", "efficiency": "效率", "rating": "评分", "stability": "稳定性",
  "shared": "共享", "individual": "个人", "difference": "差异", "versus": "对抗", "reward": "奖励", "tokens": "词元", "win rate": "胜率", "per 1000 tokens": "每千词元",
  "cooperative": "合作", "competitive": "竞争", "team battle": "团队对战", "mixed": "混合",
  "mode": "模式", "learning rate": "学习率", "survival": "选择", "temperature": "温度", "exploration": "探索", "base weight": "基础权重",
};
// Figures whose curves are named after what they show, not after policies; those with such words along an axis.
const NAMED_CURVES = new Set(["performance", "team", "system", "timing"]);
const NAMED_PLACES = { radar: "theta", credit: "x" };

function inWords(text) {
  return language === "zh" && typeof text === "string" && Object.hasOwn(FIGURE_WORDS, text) ? FIGURE_WORDS[text] : text;
}

// The words of a tooltip stand between what Plotly fills in.
function hoverInWords(template) {
  if (language !== "zh" || typeof template !== "string") return template;
  return template.replaceAll(/iteration|reward|win rate|per 1000 tokens|tokens/g, (text) => FIGURE_WORDS[text]);
}

const escaped = (value) => (typeof value === "string" ? plain(value) : Array.isArray(value) ? value.map(escaped) : value);

function traceOf(figure, trace) {
  const shown = themed(trace);
  const name = typeof trace.name === "string" ? trace.name : "";
  if (name) shown.name = plain(NAMED_CURVES.has(figure.name) ? inWords(name) : name);
  for (const key of ["x", "y", "theta", "customdata", "text"]) if (key in trace) shown[key] = escaped(trace[key]);
  const places = NAMED_PLACES[figure.name];
  if (places && places in trace) shown[places] = trace[places].map((text) => plain(inWords(text)));
  if (trace.type === "heatmap" && dark.matches) shown.textfont = { color: colourOf("--text") };
  if (trace.hovertemplate) shown.hovertemplate = hoverInWords(trace.hovertemplate);
  return shown;
}

function layoutOf(figure) {
  const layout = chartLayout(themed(figure.layout));
  for (const name of ["xaxis", "yaxis"]) {
    const title = figure.layout[name] && figure.layout[name].title;
    if (title) layout[name].title = { text: plain(inWords(title.text)), font: { color: colourOf("--soft") } };
  }
  const bands = layout.shapes || [], span = bands.length ? bands.at(-1).x1 - bands[0].x0 : 0;
  const shapes = bands.map((shape) => {
    // A narrow band has no room for its name.
    if (!shape.label || shape.x1 - shape.x0 < span / 8) return { ...shape, label: undefined };
    return { ...shape, label: { ...shape.label, text: plain(inWords(shape.label.text)), font: { size: 10, color: colourOf("--soft") } } };
  });
  if (layout.polar) {
    const line = { gridcolor: colourOf("--line"), linecolor: colourOf("--line") };
    layout.polar = { ...layout.polar, bgcolor: "rgba(0,0,0,0)", radialaxis: { ...layout.polar.radialaxis, ...line }, angularaxis: line };
  }
  return { ...layout, shapes };
}

const inView = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    target.inView = isIntersecting;
    drawIfDue(target);
  }
}, { rootMargin: "200px" });

function drawIfDue(box) {
  if (!box.inView || !box.figure || box.drawn === box.figure) return;
  box.drawn = box.figure;
  Plotly.react(box, box.figure.data.map((trace) => traceOf(box.figure, trace)), layoutOf(box.figure), CHART_OPTIONS);
}

// One chart of every kind for each run, the kinds one below the other, the runs side by side.
function showCharts(box, runs, anew) {
  const due = new Map();
  runs.forEach((run, place) => (run.figures || []).forEach((figure) => due.set(`${figure.name}-${place}`, [run, figure])));
  const there = new Map([...box.children].map((section) => [section.dataset.chart, section]));
  for (const [key, section] of there) {
    if (due.has(key)) continue;
    inView.unobserve(section.lastChild);
    Plotly.purge(section.lastChild);
    section.remove();
  }
  const order = [...due].sort(([, one], [, two]) => FIGURES.indexOf(one[1].name) - FIGURES.indexOf(two[1].name));
  order.forEach(([key, [run, figure]], place) => {
    let section = there.get(key);
    if (!section) {
      section = element("section");
      section.dataset.chart = key;
      section.append(element("h2"), element("p", "", "path"), element("div", "", "chart"));
      inView.observe(section.lastChild);
    }
    if (box.children[place] !== section) box.insertBefore(section, box.children[place] || null);
    section.firstChild.textContent = inWords(figure.title);
    section.children[1].textContent = runs.length > 1 ? run.name : "";
    const chart = section.lastChild, key2 = JSON.stringify(figure);
    if (anew || chart.content !== key2) {
      chart.content = key2;
      chart.figure = figure;
      chart.drawn = null;
      drawIfDue(chart);
    }
  });
}
