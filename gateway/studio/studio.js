"use strict";

const $ = (id) => document.getElementById(id);
const ENDED = new Set(["completed", "failed", "cancelled"]);
const PHASES = ["encoding", "denoising", "decoding"];
const CLUSTER_PERIOD_MS = 4000;
const LIST_PERIOD_MS = 2000;
const PAGE = 24;

const models = new Map();
const videos = new Map(); // id -> Video, in the order shown
let shown = null; // id of the video on the stage
let stream = null; // its EventSource
let degrees = []; // of each of its steps, as far as seen
let noiseOf = null;

async function api(path, method = "GET", body = undefined) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  const response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  const answer = await response.json();
  if (!response.ok && !answer.status) throw Object.assign(new Error(answer.error.message), answer.error);
  return answer;
}

// --- the form ---

async function loadModels() {
  const all = (await api("/v1/models")).data;
  $("expand-line").hidden = !all.some((model) => model.kind === "language");
  const data = all.filter((model) => model.kind === "video");
  if (data.length === models.size && data.every((model) => models.has(model.id))) return;
  models.clear();
  for (const model of data) models.set(model.id, model.video);
  fill($("model"), data.map((model) => [model.id, model.id]), data[0]?.id);
  describeModel();
}

function describeModel() {
  const limits = models.get($("model").value);
  $("make").disabled = !limits;
  if (!limits) return;
  fill($("size"), limits.sizes.map((size) => [size, size.replace("x", " × ")]), limits.default_size);
  const length = (frames) => `${frames} frames, ${+(frames / limits.default_fps).toFixed(2)} s`;
  fill($("frames"), limits.frames.map((frames) => [frames, length(frames)]), limits.default_frames);
  slider("steps", limits.steps, limits.default_steps);
  slider("guidance_scale", limits.guidance_scale, limits.default_guidance_scale);
  sayValues();
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value, false, String(value) === String(chosen))));
}

function slider(id, [least, most], value) {
  Object.assign($(id), { min: least, max: most });
  $(id).value = value;
}

function sayValues() {
  $("steps-value").textContent = $("steps").value;
  $("guidance-value").textContent = Number($("guidance_scale").value).toFixed(1);
}

async function make(event) {
  event.preventDefault();
  complain(null);
  const asked = { prompt: $("prompt").value, model: $("model").value, size: $("size").value };
  for (const id of ["frames", "steps", "guidance_scale"]) asked[id] = Number($(id).value);
  if ($("expand_prompt").checked && !$("expand-line").hidden) asked.expand_prompt = true;
  if ($("seed").value.trim()) asked.seed = Number($("seed").value);
  if ($("negative_prompt").value.trim()) asked.negative_prompt = $("negative_prompt").value;
  $("make").disabled = true;
  try {
    const video = await api("/v1/videos", "POST", asked);
    remember([video], true);
    show(video.id);
  } catch (error) {
    complain(error);
  } finally {
    $("make").disabled = models.size === 0;
  }
}

function complain(error) {
  document.querySelectorAll(".wrong").forEach((field) => field.classList.remove("wrong"));
  $("complaint").hidden = !error;
  if (!error) return;
  $("complaint").textContent = error.message;
  if (error.param) $(error.param)?.classList.add("wrong");
}

// --- the stage ---

function show(id) {
  stream?.close();
  stream = null;
  shown = id;
  degrees = [];
  noiseOf = null;
  history.replaceState(null, "", id ? `#${id}` : location.pathname);
  drawGallery();
  if (!id) return drawStage();
  $("player").removeAttribute("src");
  $("timeline").hidden = true;
  drawStage();
  stream = new EventSource(`/v1/videos/${id}/events`);
  stream.onmessage = (message) => hear(id, JSON.parse(message.data));
  stream.onerror = () => {
    if (stream?.readyState === EventSource.CLOSED && shown === id) forget(id);
  };
}

async function hear(id, event) {
  if (shown !== id) return;
  if (event.object === "video.deleted") return forget(id);
  if (event.state === "queued") degrees = [];
  for (let step = degrees.length; step < event.step; step += 1) degrees.push(event.degree_of_parallelism || degrees.at(-1) || 1);
  const { object, ...changes } = event;
  videos.set(id, { ...videos.get(id), ...changes });
  if (ENDED.has(event.state)) {
    stream?.close();
    stream = null;
    videos.set(id, await api(`/v1/videos/${id}`));
    if (event.state === "completed" && shown === id) await present(id);
  }
  drawStage();
  drawGallery();
}

async function present(id) {
  $("player").style.aspectRatio = videos.get(id).size.replace("x", " / ");
  $("player").src = `/v1/videos/${id}/content`;
  $("download").href = $("player").src;
  $("download").download = `${id}.mp4`;
  $("player").play().catch(() => {});
  try {
    drawTimeline((await api(`/v1/videos/${id}/timeline`)).spans);
  } catch {
    $("timeline").hidden = true;
  }
}

function drawStage() {
  const video = videos.get(shown);
  const done = video?.state === "completed";
  const ended = ENDED.has(video?.state);
  $("empty").hidden = Boolean(video);
  $("work").hidden = !video || ended;
  $("screen").hidden = !done;
  $("about").hidden = !video;
  $("again").disabled = !video;
  if (!video) return;
  $("state").textContent = video.state;
  $("state").className = video.state;
  $("detail").textContent = detail(video);
  $("shown-prompt").textContent = video.prompt ?? "";
  $("shown-caption").hidden = !video.expanded_prompt;
  $("shown-caption").textContent = `Expanded: ${video.expanded_prompt}`;
  $("facts").textContent = facts(video);
  $("cancel").hidden = ended;
  $("download").hidden = !done;
  if (!ended) drawWork(video);
}

function detail(video) {
  if (video.error) return video.error.message;
  const parts = [];
  if (video.queue_place) parts.push(video.queue_place === 1 ? "next to start" : `number ${video.queue_place} in the queue`);
  if (video.state === "denoising") parts.push(`step ${video.step} of ${video.steps}`);
  if (video.degree_of_parallelism) parts.push(`on ${video.degree_of_parallelism} ${video.degree_of_parallelism === 1 ? "GPU" : "GPUs"}`);
  if (video.estimate_s != null) parts.push(`about ${video.estimate_s < 10 ? video.estimate_s.toFixed(1) : Math.round(video.estimate_s)} s left`);
  return parts.join(", ");
}

function facts(video) {
  if (!video.size) return "";
  const made = new Date(video.created_at * 1000).toLocaleString();
  const size = video.size.replace("x", " × ");
  const wishes = [video.priority && `priority ${video.priority}`, video.deadline_at && `by ${new Date(video.deadline_at * 1000).toLocaleTimeString()}`];
  const asked = wishes.filter(Boolean).map((wish) => ` · ${wish}`).join("");
  return `${video.model} · ${size} · ${video.frames} frames · ${video.seconds} s · ${video.steps} steps · seed ${video.seed}${asked} · ${made}`;
}

function drawWork(video) {
  const at = PHASES.indexOf(video.state);
  document.querySelectorAll(".panel").forEach((panel) => {
    const phase = PHASES.indexOf(panel.dataset.phase);
    panel.classList.toggle("now", phase === at);
    panel.classList.toggle("done", phase < at);
  });
  $("words").textContent = video.expanded_prompt ?? video.prompt ?? "";
  $("steps-caption").textContent = video.state === "denoising" ? `Step ${video.step} of ${video.steps}` : "Steps";
  const steps = video.steps ?? 0;
  if ($("step-bar").children.length !== steps) {
    $("step-bar").replaceChildren(...Array.from({ length: steps }, () => document.createElement("li")));
  }
  [...$("step-bar").children].forEach((item, index) => {
    const degree = degrees[index] ?? 0;
    item.className = degree ? `d${degree >= 8 ? 8 : degree >= 4 ? 4 : degree >= 2 ? 2 : 1}` : "";
  });
  drawNoise(video);
}

// Not the latent itself, which never leaves the workers: noise that settles into bands of colour as steps pass.
function drawNoise(video) {
  const share = video.steps ? video.step / video.steps : 0;
  const key = `${video.id} ${video.step}`;
  if (noiseOf === key) return;
  noiseOf = key;
  const canvas = $("noise");
  const context = canvas.getContext("2d");
  const picture = context.createImageData(canvas.width, canvas.height);
  const hue = ((video.seed ?? 0) % 360) / 57.3;
  for (let index = 0; index < picture.data.length; index += 4) {
    const x = (index / 4) % canvas.width / canvas.width;
    const y = Math.floor(index / 4 / canvas.width) / canvas.height;
    for (let channel = 0; channel < 3; channel += 1) {
      const calm = 110 + 90 * Math.sin(4 * y + 2 * Math.sin(3 * x + hue) + 2.1 * channel + hue);
      const noise = 255 * Math.random();
      picture.data[index + channel] = share * calm * [1, 0.8, 0.6][channel] + (1 - share) * noise;
    }
    picture.data[index + 3] = 255;
  }
  context.putImageData(picture, 0, 0);
}

function drawTimeline(spans) {
  const begin = Math.min(...spans.map((span) => span.started_at_s));
  const whole = Math.max(...spans.map((span) => span.ended_at_s)) - begin;
  $("timeline").hidden = !(whole > 0);
  if (!(whole > 0)) return;
  const rows = new Map();
  for (const span of [...spans].sort((a, b) => (a.slot ?? -1) - (b.slot ?? -1))) {
    const name = span.slot === null ? "encoder" : `GPU ${span.slot}`;
    if (!rows.has(name)) rows.set(name, []);
    rows.get(name).push(span);
  }
  const drawn = [...rows].map(([name, there]) => {
    const track = element("div", "track");
    for (const span of there) {
      const mark = element("span", `span ${span.phase}`);
      mark.style.left = `${(100 * (span.started_at_s - begin)) / whole}%`;
      mark.style.width = `${(100 * (span.ended_at_s - span.started_at_s)) / whole}%`;
      const step = span.step === null ? span.phase : `step ${span.step}`;
      const together = span.degree_of_parallelism > 1 ? ` on ${span.degree_of_parallelism} GPUs together` : "";
      mark.title = `${span.instance}: ${step}${together}, ${(span.ended_at_s - span.started_at_s).toFixed(3)} s`;
      track.append(mark);
    }
    const row = element("div", "row");
    row.append(element("span", "", name), track);
    return row;
  });
  const legend = element("div", "legend");
  legend.append(element("span", "", "0 s"), element("span", "", `${whole.toFixed(2)} s`));
  $("timeline").replaceChildren(...drawn, legend);
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

async function act(method, path) {
  const id = shown;
  try {
    await api(`/v1/videos/${id}${path}`, method);
    if (method === "DELETE") forget(id);
  } catch (error) {
    complain(error);
    if (error.code === "video_not_found") forget(id);
  }
}

function forget(id) {
  videos.delete(id);
  if (shown === id) show(null);
  drawGallery();
}

// --- earlier videos ---

function remember(list, first = false) {
  const known = first ? [...videos] : [];
  if (first) videos.clear();
  for (const video of list) videos.set(video.id, video);
  for (const [id, video] of known) if (!videos.has(id)) videos.set(id, video);
}

async function refresh() {
  const page = await api(`/v1/videos?limit=${PAGE}`);
  const listed = new Set(page.data.map((video) => video.id));
  const oldest = page.data.at(-1)?.created_at ?? 0;
  // What the first page should have and has not was deleted elsewhere.
  for (const [id, video] of [...videos]) if (!listed.has(id) && (!page.has_more || video.created_at > oldest)) videos.delete(id);
  const live = videos.get(shown);
  remember(page.data, true);
  // The stream knows more of the video on the stage than the list does.
  if (live && stream && videos.has(shown)) videos.set(shown, live);
  if (videos.size <= PAGE) $("older").hidden = !page.has_more;
  if (shown && !videos.has(shown)) show(null);
  drawGallery();
}

async function older() {
  const page = await api(`/v1/videos?limit=${PAGE}&after=${[...videos.keys()].at(-1)}`);
  remember(page.data);
  $("older").hidden = !page.has_more;
  drawGallery();
}

function drawGallery() {
  $("none").hidden = videos.size > 0;
  const before = new Map([...$("gallery").children].map((item) => [item.dataset.id, item]));
  const items = [...videos.values()].map((video) => {
    const item = before.get(video.id) ?? newCard(video.id);
    drawCard(item, video);
    return item;
  });
  if (items.length !== $("gallery").children.length || items.some((item, index) => $("gallery").children[index] !== item)) {
    $("gallery").replaceChildren(...items);
  }
}

function newCard(id) {
  const item = $("card").content.firstElementChild.cloneNode(true);
  item.dataset.id = id;
  item.firstElementChild.addEventListener("click", () => {
    show(id);
    $("stage").scrollIntoView({ block: "nearest", behavior: "smooth" });
  });
  return item;
}

function drawCard(item, video) {
  const [card, image] = [item.querySelector(".card"), item.querySelector("img")];
  card.setAttribute("aria-current", video.id === shown);
  item.querySelector(".caption").textContent = video.prompt ?? "";
  item.querySelector(".veil").style.height = ENDED.has(video.state) ? 0 : `${video.progress}%`;
  const chip = item.querySelector(".chip");
  chip.textContent = ENDED.has(video.state) ? video.state : `${video.state} ${video.progress} %`;
  chip.className = `chip ${video.state}`;
  if (video.state === "completed" && image.hidden) {
    image.hidden = false;
    image.src = `/v1/videos/${video.id}/content?variant=thumbnail`;
  }
}

// --- the stack ---

async function lookAtStack() {
  try {
    const cluster = await api("/v1/cluster");
    const running = ["encoding", "denoising", "decoding"].reduce((sum, state) => sum + cluster.videos[state], 0);
    const gpus = cluster.slots.length === 1 ? "1 GPU" : `${cluster.slots.length} GPUs`;
    const busy = `${gpus}, ${running} running, ${cluster.videos.queued} waiting`;
    $("stack").classList.toggle("ready", cluster.ready);
    $("stack-text").textContent = cluster.ready ? busy : `Waiting for ${cluster.missing.join(", ")}`;
    await loadModels();
  } catch (error) {
    $("stack").classList.remove("ready");
    $("stack-text").textContent = error instanceof TypeError ? "The server does not answer" : error.message;
  }
}

// Repeats a look for as long as the page is open, never two at a time, and not while nobody sees it.
async function repeat(look, periodMs) {
  for (;;) {
    if (!document.hidden) await look().catch(() => {});
    await new Promise((resolve) => setTimeout(resolve, periodMs));
  }
}

$("composer").addEventListener("submit", make);
$("composer").addEventListener("input", sayValues);
$("model").addEventListener("change", describeModel);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("composer").requestSubmit();
});
$("again").addEventListener("click", () => { $("seed").value = videos.get(shown)?.seed ?? ""; });
$("cancel").addEventListener("click", () => act("POST", "/cancel"));
$("delete").addEventListener("click", () => act("DELETE", ""));
$("older").addEventListener("click", () => older().catch(complain));

$("make").disabled = true;
repeat(lookAtStack, CLUSTER_PERIOD_MS);
refresh()
  .catch(() => {})
  .finally(() => {
    const wanted = location.hash.slice(1);
    if (videos.has(wanted)) show(wanted);
    repeat(refresh, LIST_PERIOD_MS);
  });
