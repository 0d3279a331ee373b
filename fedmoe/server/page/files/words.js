// The words of the federation's page in English and Chinese.
"use strict";

addWords({
  en: {
    token: "Token", log_in: "Log in", log_out: "Log out", login_hint: "The coordinator prints a link at its start that works once. Tokens: fedmoe token create.",
    refused: "The coordinator refused this token.", away: "The coordinator does not answer.", ended: "Your login has ended: its token was revoked or its time is over. Log in anew.",
    experts: "Experts", workers: "Workers", gateway: "Gateway", disk: "Disk", events: "Newest events", loss: "Loss (nats per token)",
    expert: "expert", count: "workers", version: "version", rate: "updates/min", staleness: "staleness", training_loss: "training loss", held_out: "held-out loss",
    kept: "gain kept by the gateway", worker: "worker", state: "state", step: "step", pace: "tokens/s", end: "to the end", heard: "heard", pushes: "landed / held / refused",
    device: "device, memory", loading: "loading", training: "training", silent: "silent", left: "left", unknown: "–", retired: "retired",
    updated: "as of", problem: "Not ready", no_gateway: "There is no gateway yet.", no_experts: "No expert yet. Start a worker.", no_workers: "No worker yet.",
    sources: "made of", verdict: "newest verdict", gate: "evaluation gate", no_gate: "off: every gateway is served", strategy: "strategy",
    stored: "updates stored", free: "free", hour: "an hour, now", room: "hours left", idle: "none at this pace", hidden: "for administrators and viewers",
    actions: "actions", roll_back: "Roll back", retract: "Retract", retire: "Retire", unretire: "Bring back", log: "Log", close: "Close", no_log: "It has sent no line yet.",
    release: "Release", reject: "Reject", revoke: "Revoke", tokens: "Tokens", held: "Held updates", cancel: "Cancel", confirm: "Do it", to_version: "To version", reason: "Reason",
    say_roll_back: "The expert's next version will have the content of an earlier one. Workers go on from it; nothing is deleted.",
    say_retract: "The expert's next version will be what it would be had this worker contributed nothing. What others learned on top stays.",
    say_retire: "The expert takes no more updates and leaves the gateway. What it is stays, and it can be brought back.",
    say_unretire: "The expert takes updates again and is part of the gateway again.",
    say_release: "The held update lands now, with the staleness that it had when it arrived.",
    say_reject: "The held update will never land; its worker is told so.",
    say_revoke: "The token is refused from now on, and what is under way with it ends.",
    no_charts: "Charts need plotly on the coordinator: pip install 'fedmoe[web]'", role: "you are", filter: "Filter", used: "last used", label: "label", token_role: "role", number: "number", failed: "This did not work",
  },
  zh: {
    token: "令牌", log_in: "登录", log_out: "退出", login_hint: "协调器启动时会打印一个只能使用一次的链接。新建令牌：fedmoe token create。",
    refused: "协调器拒绝了该令牌。", away: "协调器没有应答。", ended: "登录已结束：令牌已被吊销或已过期。请重新登录。",
    experts: "专家", workers: "工作节点", gateway: "网关", disk: "磁盘", events: "最新事件", loss: "损失（nat/词元）",
    expert: "专家", count: "节点数", version: "版本", rate: "更新/分钟", staleness: "陈旧度", training_loss: "训练损失", held_out: "留出损失",
    kept: "网关保留的增益", worker: "工作节点", state: "状态", step: "步", pace: "词元/秒", end: "剩余时间", heard: "最近消息", pushes: "已应用 / 待审 / 拒绝",
    device: "设备、内存", loading: "加载中", training: "训练中", silent: "无消息", left: "已离开", unknown: "–", retired: "已停用",
    updated: "时间", problem: "未就绪", no_gateway: "还没有网关。", no_experts: "还没有专家，请启动工作节点。", no_workers: "还没有工作节点。",
    sources: "来源", verdict: "最新裁决", gate: "评估门", no_gate: "未启用：所有网关都会提供服务", strategy: "策略",
    stored: "已存更新", free: "可用", hour: "目前每小时", room: "剩余小时数", idle: "目前没有增长", hidden: "仅管理员和查看者可见",
    actions: "操作", roll_back: "回滚", retract: "撤回", retire: "停用", unretire: "恢复", log: "日志", close: "关闭", no_log: "尚未发送日志。",
    release: "放行", reject: "拒绝", revoke: "吊销", tokens: "令牌", held: "待审更新", cancel: "取消", confirm: "执行", to_version: "回到版本", reason: "原因",
    say_roll_back: "该专家的下一个版本将具有较早版本的内容。工作节点从它继续；不会删除任何内容。",
    say_retract: "该专家的下一个版本将如同该工作节点从未贡献过。其他节点在其上学到的内容会保留。",
    say_retire: "该专家不再接受更新，并移出网关。其内容保留，可以恢复。",
    say_unretire: "该专家重新接受更新，并重新加入网关。",
    say_release: "该更新现在生效，陈旧度按其到达时计算。",
    say_reject: "该更新将永不生效；会告知其工作节点。",
    say_revoke: "该令牌从现在起被拒绝，正在进行的请求会结束。",
    no_charts: "图表需要协调器上安装 plotly：pip install 'fedmoe[web]'", role: "身份", filter: "筛选", used: "最近使用", label: "标签", token_role: "角色", number: "编号", failed: "操作未成功",
    admin: "管理员", viewer: "查看者", join: "加入者", invite: "邀请",
  },
});
// Kinds of events, and the words in their texts.
const EVENT_WORDS = {
  registered: "已注册", landed: "已应用", held: "待审", version: "版本", "to version": "回到版本", staleness: "陈旧度", name: "名称", reason: "原因", number: "编号",
  "expert rolled back": "专家已回滚", "worker retracted": "节点贡献已撤回", "update lost": "更新丢失", "gateway merged": "网关已合并", "expert rebased": "专家已变基",
  "held update rejected": "待审更新被拒绝", "expert renamed": "专家已改名", "expert retired": "专家已停用", "expert unretired": "专家已恢复",
};
