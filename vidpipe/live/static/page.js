"use strict";

const $ = (id) => document.getElementById(id);
const HEAD = 16; // bytes before the two JPEG files: number, length of the first, age
const HISTORY_S = 60;

// The token comes in the address once and is kept for this tab only.
const query = new URLSearchParams(location.search);
if (query.has("token")) {
  sessionStorage.setItem("token", query.get("token"));
  history.replaceState(null, "", location.pathname);
}
const token = () => sessionStorage.getItem("token") || "";

let socket = null;
let state = null;
let chosen = null; // name of the filter that is shown
let shown = null; // { before, after }: the bitmaps on the canvas
let split = 0.5;
let delay = 0.25;
const history_ = []; // { at, latency, rate, budget }
const travel = { bytes: 0, pictures: 0, since: performance.now(), age: null };
const held = new Set(); // inputs that the user is moving: figures must not move them

function connect() {
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const key = token() ? `?token=${encodeURIComponent(token())}` : "";
  socket = new WebSocket(`${scheme}://${location.host}/ws${key}`);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => { delay = 0.25; notice(""); $("events").replaceChildren(); if (chosen) send({ type: "watch", filter: chosen }); };
  socket.onmessage = (event) => {
    if (typeof event.data === "string") receive(JSON.parse(event.data));
    else draw(event.data);
  };
  socket.onclose = lost;
}

async function lost() {
  sign("bad", "not connected");
  try {
    const answer = await fetch("api/state", { headers: auth() });
    if (answer.status === 401) {
      const given = prompt("This filter asks for its token:");
      if (given) { sessionStorage.setItem("token", given.trim()); delay = 0; }
      else return notice("The token is missing or wrong. Load the page again to enter it.");
    }
  } catch { notice("The filter does not answer. Trying again..."); }
  setTimeout(connect, delay * 1000);
  delay = Math.min(delay * 2 || 0.25, 4);
}

const auth = () => (token() ? { Authorization: `Bearer ${token()}` } : {});
const send = (message) => {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
};
const control = (changes) => send({ type: "control", filter: chosen, ...changes });

function sign(kind, text) {
  $("sign").className = `sign ${kind}`;
  $("sign").textContent = text;
  $("stage").classList.toggle("on", kind === "on");
}

let noticeTimer = 0;
function notice(text, seconds = 0) {
  $("notice").hidden = !text;
  $("notice").textContent = text;
  clearTimeout(noticeTimer);
  if (seconds) noticeTimer = setTimeout(() => notice(""), seconds * 1000);
}

function receive(message) {
  if (message.type === "error") return notice(message.error, 6);
  if (message.type === "snapshot") return showFiles();
  if (message.type !== "state") return;
  state = message;
  const names = Object.keys(state.filters);
  if (!names.includes(chosen)) chosen = names[0];
  options($("filter"), names, chosen);
  $("filter-label").hidden = names.length < 2;
  const filter = state.filters[chosen];
  if (filter) showFilter(filter);
  showSinks();
  for (const event of message.events) showEvent(event);
}

function options(select, values, value) {
  if (select.dataset.values !== values.join("\n")) {
    select.dataset.values = values.join("\n");
    select.replaceChildren(...values.map((v) => new Option(v, v)));
  }
  if (!held.has(select) && value !== undefined) select.value = value;
}

const brief = (name) => name.replace(/^.*[\\/]/, "").replace(/\.onnx$/, "");

function showFilter(filter) {
  const source = state.sources[filter.source];
  if (state.error) sign("bad", "stopped: an error");
  else if (source && source.state === "lost") sign("bad", "source lost, showing the last picture");
  else if (filter.frozen) sign("bad", "frozen");
  else if (!filter.enabled) sign("off", "off");
  else if (filter.active) sign("on", `active: ${brief(filter.tier_now)}`);
  else sign("off", "on, but only scaling: the models miss the budget");
  press($("enabled"), filter.enabled, filter.enabled ? "On" : "Off");
  press($("frozen"), filter.frozen, filter.frozen ? "Frozen" : "Freeze");
  options($("tier"), ["auto", ...filter.tiers], filter.tier);
  for (const option of $("tier").options) {
    option.textContent = option.value === "auto" ? `auto (${brief(filter.tier_now)})` : brief(option.value);
  }
  slide($("strength"), filter.strength);
  $("strength-value").textContent = `${Math.round(filter.strength * 100)} %`;
  $("wipe-on").checked = filter.wipe !== null;
  $("wipe").disabled = filter.wipe === null;
  $("wipe-value").textContent = filter.wipe === null ? "" : `${Math.round(filter.wipe * 100)} %`;
  if (filter.wipe !== null) slide($("wipe"), filter.wipe);
  $("provider").textContent = filter.provider + (filter.precision ? `, ${filter.precision}` : "");
  $("size").textContent = filter.size || "";
  if (source) {
    $("source").textContent = `${source.state}, ${source.spec || ""}` +
      (source.reason ? ` (${source.reason})` : "") +
      (source.losses ? `, lost ${source.losses} times` : "");
    $("entrance").textContent = `${source.drops.entrance} of ${source.frames} frames, at the entrance`;
  }
}

function press(button, on, text) {
  button.setAttribute("aria-pressed", String(on));
  button.textContent = text;
}
const slide = (input, value) => { if (!held.has(input)) input.value = value; };
const ms = (value) => (value === null ? "" : value.toFixed(0));

function showSinks() {
  const rows = [];
  let worst = null;
  let rate = 0;
  for (const [name, sink] of Object.entries(state.sinks)) {
    const row = document.createElement("tr");
    const dropped = Object.entries(sink.drops).map(([why, n]) => `${n} ${why}`).join(", ") || "0";
    for (const text of [`${name}: ${sink.state}`, sink.rate.toFixed(1), ms(sink.p50_ms),
      ms(sink.p95_ms), ms(sink.p99_ms), dropped]) {
      row.insertCell().textContent = text;
    }
    rows.push(row);
    if (sink.filter === chosen && sink.p99_ms !== null) {
      worst = Math.max(worst ?? 0, sink.p99_ms);
      rate = Math.max(rate, sink.rate);
    }
  }
  $("sinks").replaceChildren(...rows);
  const now = performance.now() / 1000;
  const budget = state.filters[chosen]?.latency_budget_ms ?? 0;
  history_.push({ at: now, latency: worst, rate, budget });
  while (history_[0].at < now - HISTORY_S) history_.shift();
  $("latency-now").textContent = worst === null ? "" : `${worst.toFixed(0)} ms`;
  $("rate-now").textContent = `${rate.toFixed(1)} fps`;
  drawChart(now);
}

function drawChart(now) {
  const canvas = $("chart");
  const scale = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const last = history_[history_.length - 1];
  const top = 1.15 * Math.max(10, last.budget, ...history_.map((h) => h.latency ?? 0));
  const most = 1.15 * Math.max(10, ...history_.map((h) => h.rate));
  const right = width - 46; // the labels of the rate stand beside the curves
  const x = (at) => right - ((now - at) / HISTORY_S) * right;
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = color("--dim");
  pen.strokeStyle = color("--line");
  for (const part of [0.25, 0.5, 0.75]) {
    const y = height * (1 - part);
    pen.beginPath(); pen.moveTo(0, y); pen.lineTo(right, y); pen.stroke();
    pen.textAlign = "left"; pen.fillText(`${(top * part).toFixed(0)} ms`, 2, y - 3);
    pen.textAlign = "right"; pen.fillText(`${(most * part).toFixed(0)} fps`, width - 2, y + 4);
  }
  const line = (name, value, limit, dash = []) => {
    pen.strokeStyle = color(name);
    pen.lineWidth = 2;
    pen.setLineDash(dash);
    pen.beginPath();
    let down = false;
    for (const h of history_) {
      if (value(h) === null) { down = false; continue; }
      const y = height * (1 - value(h) / limit);
      if (down) pen.lineTo(x(h.at), y); else pen.moveTo(x(h.at), y);
      down = true;
    }
    pen.stroke();
    pen.setLineDash([]);
    pen.lineWidth = 1;
  };
  line("--bad", (h) => h.budget || null, top, [5, 4]);
  line("--rate", (h) => h.rate, most);
  line("--accent", (h) => h.latency, top);
}

function showEvent(event) {
  const item = document.createElement("li");
  const { number, time_s, event: kind, filter, source, sink, ...rest } = event;
  const words = Object.entries(rest).map(([k, v]) => `${k} ${typeof v === "string" ? brief(v) : JSON.stringify(v)}`);
  item.textContent = `${time_s.toFixed(1)} s ${filter || source || sink || ""} ${kind}: ${words.join(", ")}`;
  $("events").prepend(item);
  while ($("events").children.length > 50) $("events").lastChild.remove();
}

async function showFiles() {
  for (const which of ["before", "after"]) {
    const answer = await fetch(`api/snapshot/${which}.png`, { headers: auth() });
    if (!answer.ok) return;
    const link = $(`${which}-png`);
    if (link.href) URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(await answer.blob());
  }
  $("files").hidden = false;
}

async function draw(data) {
  const head = new DataView(data);
  const length = head.getUint32(4, true);
  travel.age = head.getFloat64(8, true);
  travel.bytes += data.byteLength;
  travel.pictures += 1;
  try {
    const blob = (from, to) => new Blob([data.slice(from, to)], { type: "image/jpeg" });
    const after = await createImageBitmap(blob(HEAD + length));
    const before = length ? await createImageBitmap(blob(HEAD, HEAD + length)) : after;
    const old = shown;
    shown = { before, after };
    requestAnimationFrame(paint);
    if (old) { old.before.close(); old.after.close(); }
  } finally {
    send({ type: "drawn" });
  }
  const passed = (performance.now() - travel.since) / 1000;
  if (passed > 1) {
    $("travel").textContent = `${(travel.pictures / passed).toFixed(1)} pictures a second, ` +
      `${((travel.bytes * 8) / passed / 1e6).toFixed(1)} Mbit/s, ` +
      `${(travel.age * 1000).toFixed(0)} ms old when sent`;
    Object.assign(travel, { bytes: 0, pictures: 0, since: performance.now() });
  }
}

function paint() {
  if (!shown) return;
  const canvas = $("picture");
  const { before, after } = shown;
  if (canvas.width !== after.width || canvas.height !== after.height) {
    canvas.width = after.width;
    canvas.height = after.height;
  }
  const pen = canvas.getContext("2d");
  const edge = Math.round(split * canvas.width);
  pen.drawImage(after, 0, 0);
  if (edge > 0) {
    const part = split * before.width;
    pen.drawImage(before, 0, 0, part, before.height, 0, 0, edge, canvas.height);
    pen.fillStyle = "#fff";
    pen.fillRect(edge - 1, 0, 2, canvas.height);
  }
}

function moveSplit(value) {
  split = Math.min(1, Math.max(0, value));
  $("slider").value = split * 100;
  paint();
}

function setup() {
  $("slider").oninput = (e) => moveSplit(e.target.value / 100);
  const drag = (e) => {
    if (!e.buttons) return;
    const box = $("picture").getBoundingClientRect();
    moveSplit((e.clientX - box.left) / box.width);
  };
  $("picture").onpointerdown = (e) => { $("picture").setPointerCapture(e.pointerId); drag(e); };
  $("picture").onpointermove = drag;
  const on = () => state?.filters[chosen];
  $("enabled").onclick = () => on() && control({ enabled: !on().enabled });
  $("frozen").onclick = () => on() && control({ frozen: !on().frozen });
  $("snapshot").onclick = () => send({ type: "snapshot", filter: chosen });
  $("tier").onchange = (e) => control({ tier: e.target.value });
  $("strength").oninput = (e) => control({ strength: Number(e.target.value) });
  $("wipe-on").onchange = (e) => control({ wipe: e.target.checked ? Number($("wipe").value) : null });
  $("wipe").oninput = (e) => control({ wipe: Number(e.target.value) });
  $("filter").onchange = (e) => { chosen = e.target.value; send({ type: "watch", filter: chosen }); };
  for (const id of ["strength", "wipe", "tier", "filter"]) {
    const input = $(id);
    input.addEventListener("pointerdown", () => held.add(input));
    input.addEventListener("focus", () => input.tagName === "SELECT" && held.add(input));
    for (const end of ["pointerup", "change", "blur"]) {
      input.addEventListener(end, () => setTimeout(() => held.delete(input), 400));
    }
  }
  document.onkeydown = (e) => {
    if (e.ctrlKey || e.altKey || e.metaKey || /^(INPUT|SELECT|TEXTAREA|BUTTON|A)$/.test(e.target.tagName)) return;
    const tiers = ["auto", ...(on()?.tiers ?? [])];
    const keys = {
      " ": () => $("enabled").click(),
      f: () => $("frozen").click(),
      s: () => $("snapshot").click(),
      w: () => $("wipe-on").click(),
      t: () => on() && control({ tier: tiers[(tiers.indexOf(on().tier) + 1) % tiers.length] }),
      ArrowLeft: () => moveSplit(split - 0.02),
      ArrowRight: () => moveSplit(split + 0.02),
    };
    if (keys[e.key]) { e.preventDefault(); keys[e.key](); }
  };
  connect();
}

setup();
