// The page of serve.py: starters for a person, a tap fills the composer, a chat model answers where
// the server names one; how the starters came about stands behind "Details". On a run of next
// queries: say something, and see what could be asked next.
//
// Everything that came from a person or a model is put on the page as text (`textContent`), never
// as HTML: a summary may hold anything.
"use strict";

const $ = (id) => document.getElementById(id);

const state = {
  examples: [],
  methods: [], // that the run has: without stage dpo, PE and SFT only
  task: "starters", // or "suggestions"
  chat: null, // name of the model that answers; null: none does
  user: null, // id of the person whose starters are shown; null: a newcomer
  profile: null, // only of a newcomer, of whom the server holds nothing
  interests: [], // of that person, as the gate weighed them
  impression: null, // signed id of the shown list; null until the list is complete
  early: [], // slots tapped before that
  stream: null, // AbortController of the list that is being written
  answer: null, // AbortController of the chat model's answer
  compare: null, // AbortController of the comparison
  turns: [], // of the conversation
};

// ---- text and elements ----

const count = (n, one) => `${n} ${one}${n === 1 ? "" : "s"}`;
const percent = (x) => (100 * x).toFixed(1);
const isChinese = (text) => /\p{sc=Han}/u.test(text) && !/\p{sc=Kana}|\p{sc=Hira}/u.test(text);

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
  if (isChinese(text)) node.lang = "zh";
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
  if (body) options = { method: "POST", headers, body: JSON.stringify(body), ...options };
  const reply = await fetch(path, options).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Is it running?");
  });
  if (options.method === "DELETE" && reply.status === 404) return reply; // nothing was held
  if (!reply.ok) throw new Error(await reason(reply));
  return reply;
}

const callJson = async (path, options) => (await call(path, options)).json();

// Server-sent events of a POST, as {name, data}, up to `done`; the browser's EventSource can only
// GET. Throws what an `error` event says, and where the stream ends before `done`.
async function* serverEvents(path, body, signal) {
  const reply = await call(path, { body, signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection ended before the answer was complete.");
    const blocks = (rest + value.replaceAll("\r", "")).split("\n\n");
    rest = blocks.pop(); // not complete yet
    for (const block of blocks) {
      const name = block.match(/^event: ?(.*)$/m)?.[1];
      const data = JSON.parse(block.match(/^data: ?(.*)$/m)?.[1] ?? "null"); // null: a comment
      if (name === "error") throw new Error(data.detail);
      if (name) yield { name, data };
      if (name === "done") return;
    }
  }
}

// Feedback for the next round. keepalive: a tap survives leaving the page.
function sendEvents(events) {
  const signed = events.map((event) => ({ impression_id: state.impression, ...event }));
  return callJson("/v1/events", { keepalive: true, body: { events: signed } });
}

// ---- starters ----

function clearList() {
  Object.assign(state, { impression: null, early: [], interests: [] });
  for (const id of ["starters", "interests", "expected", "gate-text"]) $(id).replaceChildren();
}

// Whose starters the page shows from here on; nobody's: name "".
function choosePerson(user, name = "", profile = null) {
  for (const work of [state.stream, state.compare, state.answer]) work?.abort();
  clearList();
  Object.assign(state, { user, profile, turns: [] });
  $("starters-title").textContent = name ? `Starters for ${name}` : "Starters";
  for (const id of ["columns", "chat"]) $(id).replaceChildren();
  $("status").textContent = name ? "" : "Choose a person to see starters.";
  $("say").value = "";
  $("refresh").disabled = !user; // a newcomer has the same popular ones again
  $("compare").disabled = !name;
  $("reasons").hidden = !name; // of nobody there is nothing to tell
}

async function showStarters(refresh = false) {
  showProblem(null);
  state.stream?.abort(); // the server stops the work, too
  const { signal } = (state.stream = new AbortController());
  $("status").textContent = "Writing starters …";
  const body = { user_id: state.user, profile: state.profile, refresh, stream: true };
  let begun = false;
  try {
    for await (const { name, data } of serverEvents("/v1/starters", body, signal)) {
      if (signal.aborted) return;
      if (!begun) clearList(); // not before: where the server refuses, the list before stays
      begun = true;
      if (name === "interests") showInterests(data);
      if (name === "starter") addStarter(data);
      if (name !== "done") continue;
      // An example is everybody's: what it was shown before, whoever opens the page has not seen.
      const shared = state.examples.some((user) => user.user_id === state.user);
      if (shared && !refresh && !data.starters.length) return showStarters(true);
      await finishList(data);
    }
  } catch (error) {
    if (!signal.aborted) $("status").textContent = "";
    showProblem(error);
  }
}

// The whole reply is the authority: what streamed is replaced where it differs.
async function finishList({ starters, method, model, reason: why, impression_id }) {
  const streamed = [...$("starters").querySelectorAll(".tap")].map((b) => b.textContent);
  if (starters.map((s) => s.text).join("\n") !== streamed.join("\n")) {
    $("starters").replaceChildren();
    starters.forEach(addStarter);
  }
  $("expected").replaceChildren(...starters.map((starter) => rated(starter, model)));
  $("status").textContent = starters.length
    ? `${count(starters.length, "starter")} by ${method}.`
    : `No starter: ${why ?? "none is good enough"}.`;
  state.impression = impression_id;
  if (!impression_id) return; // of a newcomer nothing is kept
  const taps = state.early.map((slot) => ({ type: "tap", slot }));
  await sendEvents([{ type: "shown" }, ...taps]).catch(showProblem);
}

function addStarter(starter) {
  const text = because(starter, isChinese(starter.text));
  const line = words("p", "because quiet", text);
  $("starters").append(element("li", "", tapButton(starter), line));
}

// One reason, in the language of the starter, that holds: an interest is named by the starter, and
// where no interest was kept, what is popular was taken.
function because({ interest }, chinese) {
  if (interest !== null) {
    return chinese ? `因为你问过“${interest}”` : `Because you asked about “${interest}”`;
  }
  if (state.interests.some(({ kept }) => kept)) {
    return chinese ? "因为你以往的话题；不单指其中哪一个"
      : "Because of your past subjects together; no single one of them";
  }
  return chinese ? "因为还没有可提起的历史；它在其他人中受欢迎"
    : "Because there is no history to bring up yet, and it is popular with others";
}

function tapButton({ slot, text }) {
  const button = words("button", "tap", text);
  button.addEventListener("click", () => tap(slot, button).catch(showProblem));
  return button;
}

async function tap(slot, button) {
  for (const other of $("starters").querySelectorAll(".tap")) other.ariaPressed = null;
  button.ariaPressed = "true";
  $("say").value = button.textContent; // to be changed before it is sent, or not
  $("say").focus();
  if (state.impression) await sendEvents([{ type: "tap", slot }]);
  else state.early.push(slot);
}

// ---- conversation ----

async function send() {
  const text = $("say").value.trim();
  if (!text) return;
  $("say").value = "";
  state.turns = [...state.turns, { role: "user", content: text }].slice(-200);
  $("chat").append(words("p", "bubble", text));
  state.answer?.abort(); // of the message before
  const { signal } = (state.answer = new AbortController());
  if (state.chat) await showAnswer(signal).catch(showProblem);
  else if (!$("chat").querySelector(".note")) {
    const note = "Nothing answers: this server has no chat model (endpoint.model).";
    $("chat").append(element("p", "note quiet", note));
  }
  if (state.task === "suggestions" && !signal.aborted) await showNext(signal);
}

async function showAnswer(signal) {
  const line = words("p", "answer", "");
  $("chat").append(line);
  $("chat").ariaBusy = "true"; // it is read out once, when it is whole
  try {
    const body = { turns: state.turns };
    for await (const { name, data } of serverEvents("/v1/answers", body, signal)) {
      if (name === "text") line.append(data.text);
      line.scrollIntoView({ block: "nearest" });
    }
  } finally {
    $("chat").ariaBusy = null;
    const said = line.textContent;
    if (isChinese(said)) line.lang = "zh";
    if (!said) line.remove();
    // Where somebody has spoken since, it belongs before that.
    else if (!signal.aborted) state.turns.push({ role: "assistant", content: said.slice(0, 30000) });
  }
}

// ---- details ----

// The gate in words. Some are brought up below its line: a few always are; some above it are not.
function showInterests({ interests, threshold }) {
  state.interests = interests;
  const kept = interests.filter((interest) => interest.kept).length;
  $("gate-text").textContent = interests.length
    ? `${count(kept, "subject")} of ${interests.length}. Of near-equal ones the latest stands for ` +
      "all, and a few are brought up even where none is likely to return."
    : "No history that could be brought up: there is nothing to weigh.";
  $("interests").replaceChildren(...interests.map(({ text, score, kept: isKept }) => {
    const likely = score >= threshold ? "likely to return" : "less likely to return";
    const verdict = `${isKept ? "✓ brought up" : "– left out"}, ${likely}`;
    return element("li", isKept ? "kept" : "left-out", words("span", "subject", text),
      element("span", "verdict quiet", verdict));
  }));
}

function rated({ text, utility }, model) {
  const times = Math.round(1 / utility);
  const tapped = model === "sit" ? "this run has no ranker" // its stage has not run
    : times < 2 ? "a tap more often than not" : `a tap in about ${times} showings`;
  return element("li", "", words("span", "", text), element("span", "quiet", tapped));
}

async function compare() {
  const { signal } = (state.compare = new AbortController());
  const columns = state.methods.map((method) => element("article", "", element("h4", "", method)));
  $("columns").replaceChildren(...columns);
  await Promise.all(state.methods.map((method, i) => fillColumn(columns[i], method, signal)));
}

async function fillColumn(column, method, signal) {
  const note = element("p", "quiet", "Writing …");
  column.append(note);
  const body = { user_id: state.user, profile: state.profile, method };
  try {
    const { starters, model, reason: why } = await callJson("/v1/starters", { body, signal });
    note.textContent = starters.length ? "" : `No starter: ${why ?? "none is good enough"}.`;
    column.append(element("ol", "", ...starters.map((starter) => rated(starter, model))));
  } catch (error) {
    note.textContent = error.message;
  }
}

async function showRates() {
  const rates = await callJson("/v1/ab");
  $("rates").replaceChildren(...rates.map((r) => element("li", "",
    `${r.method}: ${r.taps} of ${r.starters} shown starters were tapped, ${percent(r.rate)} % ` +
    `(95 % interval over ${r.users === 1 ? "1 person" : `${r.users} people`}: ` +
    `${percent(r.low)} to ${percent(r.high)} %).`)));
  if (!rates.length) $("rates").append(element("li", "", "No list has been shown yet."));
}

// ---- person ----

async function loadRun() {
  const { model, methods, task, chat } = await callJson("/v1/model");
  Object.assign(state, { methods, task, chat });
  $("model").textContent = `Model ${model}`;
  $("say-help").textContent = chat ? `${chat} answers; this server keeps nothing of it.`
    : "Nothing will answer: this server has no chat model (endpoint.model).";
  if (task === "suggestions") converseInstead();
  else await loadExamples();
}

async function loadExamples() {
  state.examples = await callJson("/v1/examples");
  const label = (user) => `${user.user_id} · ${count(user.sessions.length, "session")}`;
  $("example").append(...state.examples.map((user) => element("option", "", label(user))));
  if (state.examples.length) return useExample();
  document.querySelector("[value=example]").disabled = true; // these people are real
  document.querySelector("[value=own]").click();
  choosePerson(null, "a newcomer");
  showStarters();
}

function useExample() {
  const { user_id, profile, sessions } = state.examples[$("example").selectedIndex];
  const facts = Object.entries(profile ?? {}).map(([name, value]) => `${name}: ${value}`);
  $("example-profile").textContent = facts.join(", ");
  const rows = sessions.map((session) => words("li", "", session.summary ?? "(messages)"));
  $("history-list").replaceChildren(...rows.reverse());
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
  offerToForget();
  const path = `/v1/users/${user}/sessions`;
  if (sessions.length) await call(path, { method: "PUT", body: { sessions, profile } });
  choosePerson(user, sessions.length ? "the pasted history" : "a newcomer",
    sessions.length ? null : profile);
  showStarters();
  $("talk").scrollIntoView({ block: "nearest" }); // on a phone they stand further up
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
  offerToForget();
  $("forgotten").textContent = "Forgotten: history, profile, starters and taps are deleted.";
  document.querySelector("[name=whose]:checked").focus(); // the button that had the focus is gone
}

// However the history is chosen now: it may have been pasted before this page was opened.
const offerToForget = () => ($("pasted").hidden = !localStorage.getItem("user"));

// ---- next queries, where the run has no starters ----

function converseInstead() {
  for (const id of ["person", "others"]) $(id).hidden = true;
  document.querySelector("main").className = "alone";
  $("over").hidden = false;
  $("say").placeholder = "Say something";
  $("say-help").append(" Messages are kept here under a random name until you choose “Start over”.");
  beginConversation(localStorage.getItem("talker") ?? randomName()); // what is left can be deleted
}

function beginConversation(user) {
  choosePerson(user);
  localStorage.setItem("talker", user);
  $("starters-title").textContent = "What could be asked next";
  $("status").textContent = "Say something: what could come next appears here.";
}

async function showNext(signal) {
  Object.assign(state, { impression: null, early: [] });
  $("starters").replaceChildren();
  $("status").textContent = "Writing next queries …";
  const body = { turns: state.turns, user_id: state.user };
  try {
    const reply = await callJson("/v1/suggestions", { body, signal });
    if (!signal.aborted) await finishNext(reply);
  } catch (error) {
    if (!signal.aborted) $("status").textContent = "";
    throw error;
  }
}

async function finishNext({ suggestions, declined, method, cut, impression_id }) {
  $("starters").replaceChildren(...suggestions.map((suggestion) => {
    const shop = suggestion.source !== "policy"; // what can answer it is known
    const line = shop ? [words("p", "because quiet", `Because ${suggestion.source} answers it`)] : [];
    return element("li", "", tapButton(suggestion), ...line);
  }));
  const beyond = cut ? ` ${count(cut, "message")} did not fit whole into the prompt.` : "";
  $("status").textContent = (declined ? "Declined: the policy takes this to be unsafe."
    : suggestions.length ? `${count(suggestions.length, "suggestion")} by ${method}.`
    : "No suggestion is good enough here.") + beyond;
  state.impression = impression_id;
  if (impression_id) await sendEvents([{ type: "shown" }]);
}

async function startOver() {
  state.answer?.abort(); // or its answer would be shown behind the deletion
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
  if (target.value === "example") useExample();
});
$("example").addEventListener("change", useExample);
$("refresh").addEventListener("click", () => showStarters(true));
$("say-form").addEventListener("submit", (happened) => {
  happened.preventDefault();
  showProblem(null);
  send().catch(showProblem);
});
$("details").addEventListener("toggle", () => $("details").open && showRates().catch(showProblem));
on("own-form", "submit", useOwnHistory);
on("forget", "click", forgetMe);
on("compare", "click", compare);
on("over", "click", startOver);
window.addEventListener("storage", ({ oldValue }) => { // in another tab of this browser
  offerToForget();
  if (oldValue && oldValue === state.user) choosePerson(null);
});
offerToForget();
loadRun().catch(showProblem);
