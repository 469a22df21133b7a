// Groups with their replicas, the last decisions, and what is missing. All of it is changed in place: where somebody
// scrolled, what they selected and where their focus is stays.
import { byId, clock, keep, make, setName, setText, short, shown } from "./dom.js";

const LAST = 12;
const COLUMNS = [["Replica"], ["State"], ["Pool"], ["Node"], ["Busy", "n"], ["Rows/s it can", "n"], ["Critical", "n"]];

export function showGroups(groups) {
  keep(byId("groups"), groups, (group) => group.name, card, fillCard);
}

function card(group) {
  const table = withRoles(make("table", "",
    make("thead", "", make("tr", "", ...COLUMNS.map(heading))), make("tbody", "")));
  const scroll = make("div", "scroll", table);
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", `Replicas of ${group.name}`);
  return make("article", "card", make("div", "row", make("h3", "", group.name), make("span", "grow"),
    make("span", "pill")), scroll, make("div", "failures"));
}

function fillCard(article, group) {
  const ready = group.replicas.filter((replica) => replica.state === "ready").length;
  const pill = article.querySelector(".pill");
  setText(pill, `${ready} of ${group.target_replicas} ready`);
  pill.className = ready < group.target_replicas ? "pill bad" : "pill ok";
  keep(article.querySelector("tbody"), group.replicas, (replica) => replica.id, line, fillLine);
  keep(article.querySelector(".failures"), group.failures.slice(-2), (each) => `${each.time} ${each.reason}`,
    (each) => make("p", "muted", `${clock(each.time)} ${each.reason}`), () => {});
}

// On a phone the style sheet lays a table out as blocks, which would take its meaning away.
const ROLES = { TABLE: "table", THEAD: "rowgroup", TBODY: "rowgroup", TR: "row", TH: "columnheader", TD: "cell" };

function withRoles(top) {
  for (const each of [top, ...top.querySelectorAll("*")]) {
    if (ROLES[each.tagName]) each.setAttribute("role", ROLES[each.tagName]);
  }
  return top;
}

function heading([name, kind]) {
  const cell = make("th", kind ?? "", name);
  cell.scope = "col";
  return cell;
}

function line() {
  const meter = make("meter", "");
  meter.setAttribute("aria-hidden", "true");
  const row = make("tr", "", make("td", "id"), make("td", "state"), make("td", "id"), make("td", "id"),
    make("td", "n", meter, make("span", "")), make("td", "n"), make("td", "n"));
  COLUMNS.forEach(([name], at) => { row.children[at].dataset.label = name; });
  return withRoles(row);
}

function fillLine(row, replica) {
  const [id, state, pool, node, busy, speed, critical] = row.children;
  const percent = (share) => (share === null ? "–" : shown(share * 100, 0, " %"));
  for (const [cell, text] of [[id, replica.id], [pool, replica.pool], [node, replica.node]]) {
    setText(cell, short(text));
    setName(cell, text);
  }
  setText(state, replica.state);
  state.className = `state ${replica.state === "ready" ? "up" : "change"}`;
  busy.firstChild.value = replica.utilization ?? 0;
  setText(busy.lastChild, percent(replica.utilization));
  setText(speed, shown(replica.speed_rows_per_s));
  setText(critical, percent(replica.critical_share));
}

export function showDecisions(decisions) {
  byId("no-decisions").hidden = decisions.length > 0;
  keep(byId("decisions"), decisions.slice(-LAST).reverse(),
    (each) => JSON.stringify([each.time, each.group, each.pool, each.from, each.to, each.reason]),
    (each) => make("li", "", make("div", "row", make("b", "", each.group),
      make("span", "step", `${each.from} → ${each.to}`), make("span", "muted", each.pool), make("span", "grow"),
      make("time", "muted", clock(each.time))), make("span", "reason", each.reason)), () => {});
}

export function showHealth(health) {
  const fine = health.status === "ok" && !health.missing.length;
  setText(byId("health"), fine ? "healthy" : health.status);
  byId("health").className = fine ? "pill ok" : "pill bad";
  const parts = [...new Set([...health.missing, ...Object.keys(health.reasons)])];
  byId("missing").hidden = !parts.length;
  keep(byId("missing-list"), parts, (part) => part,
    (part) => make("li", "", make("b", "", part), " ", make("span", "")),
    (item, part) => setText(item.lastChild, health.reasons[part] ?? "is missing; no reason is known yet."));
}
