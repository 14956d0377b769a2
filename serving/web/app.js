// The page of serve.py: choose a person, see interests and starters, tap, compare, watch the A/B; on
// a run of next queries: say something, and see what could be asked next.
//
// Everything that came from a person or a model is put on the page as text (`textContent`), never
// as HTML: a summary may hold anything. Bars get their length through a CSS variable, because the
// server's content security policy refuses style attributes.
"use strict";

const $ = (id) => document.getElementById(id);

const state = {
  examples: [],
  methods: [], // that the run has: without stage dpo, PE and SFT only
  user: null, // id of the person whose starters are shown
  profile: null, // only of a newcomer, of whom the server holds nothing
  impression: null, // signed id of the shown list; null until the list is complete
  early: [], // slots tapped before that
  stream: null, // AbortController of the list that is being written
  compare: null, // AbortController of the comparison
  turns: [], // of the conversation, on a run of next queries
};

// ---- text and elements ----

const count = (n, one) => `${n} ${one}${n === 1 ? "" : "s"}`;
const percent = (x) => `${(100 * x).toFixed(1)} %`;
const share = (x) => String(Math.min(1, Math.max(0, x))); // a cosine below 0 has no length

function element(tag, className = "", ...children) {
  const node = document.createElement(tag);
  node.className = className;
  node.append(...children);
  return node;
}

// Text of a person or a model: its direction is kept to itself, and Chinese is set as Chinese.
function words(tag, className, text) {
  const node = element(tag, className);
  node.textContent = text;
  node.dir = "auto";
  if (/\p{sc=Han}/u.test(text) && !/\p{sc=Kana}|\p{sc=Hira}/u.test(text)) node.lang = "zh";
  return node;
}

function showProblem(error) {
  if (error?.name === "AbortError") return; // stopped by ourselves: something else was asked for
  $("problem").textContent = error?.message ?? "";
  $("problem").hidden = !error;
}

// ---- requests ----

// One line for a reply that is not 2xx. FastAPI's detail is a text, or a list of {loc, msg}.
async function reason(reply) {
  const wait = Math.ceil(reply.headers.get("Retry-After"));
  if (reply.status === 429 && wait > 0) {
    return `The server is busy. Try again in ${count(wait, "second")}.`;
  }
  const { detail } = await reply.json().catch(() => ({}));
  const refused = Array.isArray(detail) && `${detail[0].loc.slice(1).join(".")}: ${detail[0].msg}`;
  return String(refused || detail || `The server answered ${reply.status}.`).slice(0, 200);
}

async function call(path, { body, ...options } = {}) {
  const headers = { "Content-Type": "application/json" };
  if (body) Object.assign(options, { headers, body: JSON.stringify(body) });
  const reply = await fetch(path, options).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Is it running?");
  });
  if (options.method === "DELETE" && reply.status === 404) return reply; // nothing was held
  if (!reply.ok) throw new Error(await reason(reply));
  return reply;
}

const callJson = async (path, options) => (await call(path, options)).json();

// Server-sent events of a POST, as {name, data}; the browser's EventSource can only GET.
async function* serverEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value.replaceAll("\r", "")).split("\n\n");
    rest = blocks.pop(); // not complete yet
    for (const block of blocks) {
      const name = block.match(/^event: ?(.*)$/m)?.[1];
      const data = block.match(/^data: ?(.*)$/m)?.[1];
      if (name && data) yield { name, data: JSON.parse(data) }; // else a comment
    }
  }
}

// Feedback for the next round. keepalive: a tap survives leaving the page.
function sendEvents(events) {
  const signed = events.map((event) => ({ impression_id: state.impression, ...event }));
  return callJson("/v1/events", { method: "POST", keepalive: true, body: { events: signed } });
}

// ---- starters ----

function clearList() {
  Object.assign(state, { impression: null, early: [] });
  $("starters").replaceChildren();
  $("chat").replaceChildren(element("p", "quiet", "Tap a starter: it becomes the first message."));
}

function choosePerson(user, name = "", profile = null) {
  clearList();
  state.stream?.abort(); // the server stops the work, too
  state.compare?.abort();
  Object.assign(state, { user, profile });
  $("starters-title").textContent = name ? `Starters for ${name}` : "Starters";
  for (const id of ["interests", "columns", "gate-text", "status"]) $(id).replaceChildren();
  $("refresh").disabled = $("compare").disabled = !user;
}

async function showStarters(refresh = false) {
  showProblem(null);
  state.stream?.abort();
  const { signal } = (state.stream = new AbortController());
  $("status").textContent = "Writing starters …";
  try {
    const body = { user_id: state.user, profile: state.profile, refresh, stream: true };
    const reply = await call("/v1/starters", { method: "POST", body, signal });
    clearList(); // not before: where the server refuses, the list before stays
    for await (const { name, data } of serverEvents(reply.body)) {
      if (signal.aborted) return;
      if (name === "interests") showInterests(data);
      if (name === "starter") addStarter(data);
      if (name === "error") throw new Error(data.detail);
      if (name === "done") return await finishList(data);
    }
    throw new Error("The connection ended before the list was complete.");
  } catch (error) {
    if (!signal.aborted) $("status").textContent = "";
    showProblem(error);
  }
}

// The whole reply is the authority: what streamed is replaced where it differs.
async function finishList({ starters, method, impression_id }) {
  const streamed = [...$("starters").querySelectorAll(".tap")].map((b) => b.textContent);
  if (starters.map((s) => s.text).join("\n") !== streamed.join("\n")) {
    $("starters").replaceChildren();
    starters.forEach(addStarter);
  }
  $("status").textContent = starters.length
    ? `${count(starters.length, "starter")} by ${method}.`
    : "No starter is good enough right now. Refresh to try again.";
  state.impression = impression_id;
  if (!starters.length) return;
  const taps = state.early.map((slot) => ({ type: "tap", slot }));
  await sendEvents([{ type: "shown" }, ...taps]).catch(showProblem);
}

function addStarter(starter) {
  const button = words("button", "tap", starter.text);
  button.addEventListener("click", () => tap(starter, button).catch(showProblem));
  $("starters").append(element("li", "", button, why(starter)));
}

function why({ text, interest, source, utility }) {
  const summary = element("summary", "", "Why this?");
  summary.ariaLabel = `Why this? ${text}`;
  const because = interest !== null
    ? element("p", "", "Because you asked about ", words("q", "", interest), ".")
    : element("p", "", source === "cold start"
      ? "There is no history to start from: popular with similar people."
      : "Written for the kept interests; it names none of them.");
  const origin = element("p", "", `Source: ${source}. Utility: ${utility.toFixed(2)} of 1.`);
  return element("details", "why", summary, because, origin);
}

async function tap(starter, button) {
  for (const other of $("starters").querySelectorAll(".tap")) other.ariaPressed = null;
  button.ariaPressed = "true";
  const note = element("p", "quiet", "A chat model would answer here; this page has none.");
  $("chat").replaceChildren(words("p", "bubble", starter.text), note);
  $("chat").scrollIntoView({ block: "nearest" });
  if (state.impression) await sendEvents([{ type: "tap", slot: starter.slot }]);
  else state.early.push(starter.slot);
}

// ---- interests ----

function showInterests({ interests, threshold }) {
  $("interests").replaceChildren();
  $("gate-text").textContent = "No history yet, so there is nothing to weigh.";
  if (!interests.length) return;
  const kept = interests.filter((interest) => interest.kept).length;
  $("gate-text").textContent = `${kept} of ${interests.length} kept. The line is the gate for ` +
    "people this active. Of near-equal subjects the latest stands for all.";
  const rows = interests.map((interest) => interestRow(interest, threshold));
  $("interests").style.setProperty("--gate", share(threshold));
  $("interests").append(
    element("p", "gate-label", element("span", "", `gate ${threshold.toFixed(2)}`)),
    element("ol", "", ...rows),
  );
}

function interestRow({ text, score, kept }, threshold) {
  const above = score >= threshold; // some are kept even where none is
  const verdict = kept ? `✓ kept${above ? "" : ", below line"}`
    : `– left out${above ? ", above line" : ""}`;
  const bar = element("div", "bar", element("span"));
  bar.style.setProperty("--score", share(score));
  return element("li", kept ? "kept" : "left-out",
    element("div", "row", words("span", "subject", text), element("span", "verdict", verdict)),
    element("div", "scale", bar, element("span", "score", score.toFixed(2))));
}

// ---- person ----

async function loadRun() {
  const { model, methods, task } = await callJson("/v1/model");
  state.methods = methods;
  $("model").textContent = `Model ${model}`;
  if (task === "suggestions") converseInstead();
  else await loadExamples();
}

async function loadExamples() {
  state.examples = await callJson("/v1/examples");
  const label = (user) => `${user.user_id} · ${count(user.sessions.length, "session")}`;
  $("example").append(...state.examples.map((user) => element("option", "", label(user))));
  if (state.examples.length) return showExample();
  document.querySelector("[value=example]").disabled = true; // these people are real
  document.querySelector("[value=own]").click();
}

function showExample() {
  const { profile, sessions } = state.examples[$("example").selectedIndex];
  const facts = Object.entries(profile ?? {}).map(([name, value]) => `${name}: ${value}`);
  $("example-profile").textContent = facts.join(", ");
  const rows = sessions.map((session) => words("li", "", session.summary ?? "(messages)"));
  $("history-list").replaceChildren(...rows.reverse());
  $("use-example").disabled = false;
  if (state.user) choosePerson(null); // nobody's starters stand beside another person
}

async function useExample() {
  const { user_id } = state.examples[$("example").selectedIndex];
  choosePerson(user_id, user_id);
  showStarters(); // not awaited: another person may be chosen meanwhile
}

function parseHistory(text) {
  const lines = text.match(/\S.*/g) ?? []; // not the empty ones
  return lines.map((line, i) => ({ session_id: `line-${i + 1}`, summary: line.trim() }));
}

function parseProfile(text) {
  const facts = text.split("\n").flatMap((line, i) => {
    if (!line.trim()) return [];
    const [, name, value] = line.match(/^\s*([^:：]*[^:：\s])\s*[:：]\s*(.*\S)/) ?? [];
    if (!name) throw new Error(`Profile, line ${i + 1}: write it as “name: value”.`);
    return [[name, value]];
  });
  return facts.length ? Object.fromEntries(facts) : null;
}

// Not crypto.randomUUID: browsers offer that to https and localhost only.
const randomName = () => `web-${crypto.getRandomValues(new Uint32Array(4)).join("-")}`;

// A pasted history is a new person; the one before is forgotten while its name is still known. The
// browser keeps the name, not the tab: a closed tab would leave a history that nobody can delete.
async function useOwnHistory() {
  const sessions = parseHistory($("lines").value);
  const profile = parseProfile($("profile").value);
  await forgetLast();
  const user = randomName();
  localStorage.setItem("user", user); // before the server knows it: always ours to delete
  $("forget").hidden = false;
  const path = `/v1/users/${user}/sessions`;
  if (sessions.length) await call(path, { method: "PUT", body: { sessions, profile } });
  choosePerson(user, "the pasted history", sessions.length ? null : profile);
  showStarters();
}

async function forgetLast() {
  $("forgotten").textContent = "";
  const user = localStorage.getItem("user");
  if (user) await call(`/v1/users/${encodeURIComponent(user)}`, { method: "DELETE" });
  localStorage.removeItem("user");
  if (user === state.user) choosePerson(null);
}

async function forgetMe() {
  await forgetLast();
  $("own-form").reset();
  $("forget").hidden = true;
  $("forgotten").textContent = "Forgotten: history, profile, starters and taps are deleted.";
  $("lines").focus(); // the button that had the focus is gone
}

// ---- comparison and A/B ----

async function compare() {
  const { signal } = (state.compare = new AbortController());
  const columns = state.methods.map((method) => element("article", "", element("h3", "", method)));
  $("columns").replaceChildren(...columns);
  await Promise.all(state.methods.map((method, i) => fillColumn(columns[i], method, signal)));
}

async function fillColumn(column, method, signal) {
  const note = element("p", "quiet", "Writing …");
  column.append(note);
  const body = { user_id: state.user, profile: state.profile, method };
  try {
    const { starters } = await callJson("/v1/starters", { method: "POST", body, signal });
    const rows = starters.map(({ text, utility }) => element("li", "",
      words("span", "", text), element("span", "quiet", `utility ${utility.toFixed(2)}`)));
    note.textContent = starters.length ? "" : "No starter is good enough.";
    column.append(element("ol", "", ...rows));
  } catch (error) {
    note.textContent = error.message;
  }
}

async function showRates() {
  const rates = await callJson("/v1/ab");
  const top = Math.max(...rates.map((r) => r.high));
  $("ab-table").hidden = !rates.length;
  $("ab-table").tBodies[0].replaceChildren(...rates.map((r) => rateRow(r, top)));
  $("ab-text").textContent = rates.length
    ? `With 95 % intervals over people. Updated at ${new Date().toLocaleTimeString()}.`
    : "No list has been shown yet.";
}

function rateRow({ method, rate, low, high, taps, starters, users }, top) {
  const whisker = element("span", "whisker");
  for (const [end, x] of Object.entries({ low, high, rate })) {
    whisker.style.setProperty(`--${end}`, share(x / top));
  }
  const interval = element("span", "quiet", `${(100 * low).toFixed(1)}–${percent(high)}`);
  const rates = element("td", "", element("b", "", percent(rate)), " ", interval, whisker);
  const counted = `${taps} of ${starters}, ${users === 1 ? "1 person" : `${users} people`}`;
  return element("tr", "", element("th", "", method), rates, element("td", "", counted));
}

// ---- next queries, where the run has no starters ----

function converseInstead() {
  for (const id of ["person", "resonance", "side-by-side", "refresh"]) $(id).hidden = true;
  document.querySelector("main").className = "alone";
  $("tagline").textContent = "What could be asked next? A conversation in, next queries out.";
  $("starters-title").textContent = "Next queries";
  $("say-form").hidden = false;
  beginConversation(localStorage.getItem("talker") ?? randomName()); // what is left can be deleted
}

function beginConversation(user) {
  clearList();
  Object.assign(state, { user, turns: [] });
  localStorage.setItem("talker", user);
  $("chat").replaceChildren(element("p", "quiet", "A chat model would answer; this page has none."));
  $("status").textContent = "Say something: what could come next appears here.";
}

async function say(text) {
  if (!text.trim()) return;
  state.turns = [...state.turns, { role: "user", content: text }].slice(-200);
  $("chat").append(words("p", "bubble", text));
  $("say").value = "";
  state.stream?.abort(); // of the message before
  const { signal } = (state.stream = new AbortController());
  Object.assign(state, { impression: null });
  $("starters").replaceChildren();
  $("status").textContent = "Writing next queries …";
  const body = { turns: state.turns, user_id: state.user };
  try {
    const reply = await callJson("/v1/suggestions", { method: "POST", body, signal });
    if (!signal.aborted) await showNext(reply);
  } catch (error) {
    if (!signal.aborted) $("status").textContent = "";
    throw error;
  }
}

async function showNext({ suggestions, declined, method, cut, impression_id }) {
  $("starters").replaceChildren(...suggestions.map(nextQuery));
  const beyond = cut ? ` ${count(cut, "message")} did not fit whole into the prompt.` : "";
  $("status").textContent = (declined ? "Declined: the policy takes this to be unsafe."
    : suggestions.length ? `${count(suggestions.length, "suggestion")} by ${method}.`
    : "No suggestion is good enough here.") + beyond;
  state.impression = impression_id;
  if (impression_id) await sendEvents([{ type: "shown" }]);
}

function nextQuery({ slot, text, reward, uncertainty }) {
  const button = words("button", "tap", text);
  button.addEventListener("click", () => {
    showProblem(null);
    sendEvents([{ type: "tap", slot }]).catch(showProblem);
    say(text).catch(showProblem);
  });
  const rated = `reward ${reward.toFixed(2)} ± ${uncertainty.toFixed(2)}`;
  return element("li", "", button, element("span", "quiet", rated));
}

async function startOver() {
  state.stream?.abort(); // or its answer would be shown behind the deletion
  await call(`/v1/users/${encodeURIComponent(state.user)}`, { method: "DELETE" });
  beginConversation(randomName());
  $("say").focus();
}

// One run at a time: a double click must not make two people of one history.
function on(id, event, work) {
  let busy = false;
  $(id).addEventListener(event, async (happened) => {
    happened.preventDefault();
    if (busy) return;
    busy = true;
    showProblem(null);
    await work().catch(showProblem);
    busy = false;
  });
}

$("whose").addEventListener("change", ({ target }) => {
  $("example-form").hidden = target.value !== "example";
  $("own-form").hidden = target.value !== "own";
});
$("example").addEventListener("change", showExample);
$("refresh").addEventListener("click", () => showStarters(true));
on("example-form", "submit", useExample);
on("own-form", "submit", useOwnHistory);
on("forget", "click", forgetMe);
on("compare", "click", compare);
on("say-form", "submit", () => say($("say").value));
on("over", "click", startOver);
on("ab-refresh", "click", showRates);
const offerToForget = () => ($("forget").hidden = !localStorage.getItem("user"));
window.addEventListener("storage", ({ oldValue }) => { // in another tab of this browser
  offerToForget();
  if (oldValue && oldValue === state.user) choosePerson(null);
});
offerToForget();
Promise.all([loadRun(), showRates()]).catch(showProblem);
