// Groups with their replicas, the last decisions, and what is missing.
import { byId, clock, make, setText, shown } from "./dom.js";

const LAST = 12;

export function showGroups(groups) {
  byId("groups").replaceChildren(...groups.map(card));
}

function card(group) {
  const ready = group.replicas.filter((replica) => replica.state === "ready").length;
  const short = ready < group.target_replicas;
  const head = make("div", "row", make("h3", "", group.name), make("span", "grow"),
    make("span", short ? "pill bad" : "pill ok", `${ready} of ${group.target_replicas} ready`));
  const columns = ["Replica", "State", "Pool", "Node", "Busy", "Rows/s it can", "Critical"];
  const table = make("table", "", make("thead", "", make("tr", "", ...columns.map((name, at) => heading(name, at > 3)))),
    make("tbody", "", ...group.replicas.map(line)));
  const failures = group.failures.slice(-2).map((each) => make("p", "muted", `${clock(each.time)} ${each.reason}`));
  const scroll = make("div", "scroll", table);
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", `Replicas of ${group.name}`);
  return make("article", "card", head, scroll, ...failures);
}

function heading(name, number) {
  const cell = make("th", number ? "n" : "", name);
  cell.scope = "col";
  return cell;
}

function line(replica) {
  const meter = make("meter", "");
  meter.value = replica.utilization ?? 0;
  meter.setAttribute("aria-hidden", "true");
  const percent = (share) => (share === null ? "–" : shown(share * 100, 0, " %"));
  return make("tr", "", make("td", "id", replica.id), make("td", `state ${replica.state === "ready" ? "up" : "change"}`,
    replica.state), make("td", "", replica.pool), make("td", "id", replica.node),
  make("td", "n", meter, " ", percent(replica.utilization)), make("td", "n", shown(replica.speed_rows_per_s)),
  make("td", "n", percent(replica.critical_share)));
}

export function showDecisions(decisions) {
  const lines = decisions.slice(-LAST).reverse().map((each) => make("li", "", make("time", "muted", clock(each.time)),
    make("span", "", make("b", "", each.group), ` ${each.pool} `, make("b", "", `${each.from} → ${each.to}`)),
    make("span", "reason", each.reason)));
  byId("decisions").replaceChildren(...(lines.length ? lines : [make("li", "muted", "None yet.")]));
}

export function showHealth(health) {
  const fine = health.status === "ok" && !health.missing.length;
  setText(byId("health"), fine ? "healthy" : health.status);
  byId("health").className = fine ? "pill ok" : "pill bad";
  const parts = [...new Set([...health.missing, ...Object.keys(health.reasons)])];
  byId("missing").hidden = !parts.length;
  byId("missing-list").replaceChildren(...parts.map((part) => make("li", "", make("b", "", part), " ",
    health.reasons[part] ?? "is missing; no reason is known yet.")));
}
