// The words of the page in English and Chinese; the browser's language decides until somebody chooses.
"use strict";

const WORDS = {
  en: {
    token: "Token", log_in: "Log in", log_out: "Log out", login_hint: "The coordinator prints a link at its start that works once. Tokens: fedmoe token create.",
    refused: "The coordinator refused this token.", away: "The coordinator does not answer.", language: "中文",
    experts: "Experts", workers: "Workers", gateway: "Gateway", disk: "Disk", events: "Newest events", loss: "Loss (nats per token)",
    expert: "expert", count: "workers", version: "version", rate: "updates/min", staleness: "staleness", training_loss: "training loss", held_out: "held-out loss",
    worker: "worker", state: "state", step: "step", pace: "tokens/s", end: "to the end", heard: "heard", pushes: "landed / held / refused", device: "device",
    loading: "loading", training: "training", silent: "silent", left: "left", unknown: "–", retired: "retired",
    live: "live", lost: "no connection, trying again", updated: "as of", problem: "Not ready",
    no_gateway: "There is no gateway yet.", no_experts: "No expert yet. Start a worker.", no_workers: "No worker yet.",
    sources: "made of", verdict: "evaluation gate", stored: "updates stored", free: "free", hour: "an hour", room: "room for",
    held_updates: "updates are held", actions: "actions", roll_back: "Roll back", retract: "Retract", retire: "Retire", unretire: "Bring back",
    release: "Release", reject: "Reject", revoke: "Revoke", tokens: "Tokens", held: "Held updates", cancel: "Cancel", confirm: "Do it", to_version: "To version", reason: "Reason",
    say_roll_back: "The expert's next version will have the content of an earlier one. Workers go on from it; nothing is deleted.",
    say_retract: "The expert's next version will be what it would be had this worker contributed nothing. What others learned on top stays.",
    say_retire: "The expert takes no more updates and leaves the gateway. What it is stays, and it can be brought back.",
    say_unretire: "The expert takes updates again and is part of the gateway again.",
    say_release: "The held update lands now, with the staleness that it had when it arrived.",
    say_reject: "The held update will never land; its worker is told so.",
    say_revoke: "The token is refused from now on, and what is under way with it ends.",
    done: "Done.", no_charts: "Charts need plotly on the coordinator: pip install 'fedmoe[web]'", more: "more", role: "you are",
    filter: "Filter", used: "last used", label: "label", number: "number",
  },
  zh: {
    token: "令牌", log_in: "登录", log_out: "退出", login_hint: "协调器启动时会打印一个只能使用一次的链接。新建令牌：fedmoe token create。",
    refused: "协调器拒绝了该令牌。", away: "协调器没有应答。", language: "English",
    experts: "专家", workers: "工作节点", gateway: "网关", disk: "磁盘", events: "最新事件", loss: "损失（nat/词元）",
    expert: "专家", count: "节点数", version: "版本", rate: "更新/分钟", staleness: "陈旧度", training_loss: "训练损失", held_out: "留出损失",
    worker: "工作节点", state: "状态", step: "步", pace: "词元/秒", end: "剩余时间", heard: "最近消息", pushes: "已应用 / 待审 / 拒绝", device: "设备",
    loading: "加载中", training: "训练中", silent: "无消息", left: "已离开", unknown: "–", retired: "已停用",
    live: "实时", lost: "连接中断，正在重试", updated: "时间", problem: "未就绪",
    no_gateway: "还没有网关。", no_experts: "还没有专家，请启动工作节点。", no_workers: "还没有工作节点。",
    sources: "来源", verdict: "评估门", stored: "已存更新", free: "可用", hour: "每小时", room: "可用时间",
    held_updates: "个更新待审", actions: "操作", roll_back: "回滚", retract: "撤回", retire: "停用", unretire: "恢复",
    release: "放行", reject: "拒绝", revoke: "吊销", tokens: "令牌", held: "待审更新", cancel: "取消", confirm: "执行", to_version: "回到版本", reason: "原因",
    say_roll_back: "该专家的下一个版本将具有较早版本的内容。工作节点从它继续；不会删除任何内容。",
    say_retract: "该专家的下一个版本将如同该工作节点从未贡献过。其他节点在其上学到的内容会保留。",
    say_retire: "该专家不再接受更新，并移出网关。其内容保留，可以恢复。",
    say_unretire: "该专家重新接受更新，并重新加入网关。",
    say_release: "该更新现在生效，陈旧度按其到达时计算。",
    say_reject: "该更新将永不生效；会告知其工作节点。",
    say_revoke: "该令牌从现在起被拒绝，正在进行的请求会结束。",
    done: "完成。", no_charts: "图表需要协调器上安装 plotly：pip install 'fedmoe[web]'", more: "更多", role: "身份",
    filter: "筛选", used: "最近使用", label: "标签", number: "编号",
  },
};

let language = localStorage.getItem("fedmoe-language") || (navigator.language.startsWith("zh") ? "zh" : "en");

function word(name) {
  return WORDS[language][name] ?? name;
}

// Puts the words of the chosen language into every element that names one.
function translate() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = word(element.dataset.word);
}

function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("fedmoe-language", language);
  translate();
}
