"""The look of the ledger page beyond that of every report, and the script that sorts and filters its table.

The state of the table lives in the address, `#sort=draw-test&dir=desc&family=flow&level=E3`, so that it can be shared.
Without the script the page is whole: everything is there, in the order of the drawings that are right.
"""

STYLE = """
header, main, footer, nav div { max-width: 84rem; }
.count { color: var(--soft); font-size: .88rem; margin: 0; align-self: center; }
.filters { display: flex; flex-wrap: wrap; gap: .7rem 2rem; margin: 0 0 1.4rem; }
.filters fieldset { border: 0; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .35rem; min-width: 0; }
.filters legend { float: left; color: var(--soft); font-size: .84rem; padding: .3rem .5rem .3rem 0; }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
:is(a, button):focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
.filters button { border: 1px solid var(--line); background: var(--card); border-radius: 99px; font-size: .84rem;
  padding: .22rem .75rem; }
.filters button:hover { border-color: var(--accent); }
.filters button[aria-pressed=true] { background: var(--accent); border-color: var(--accent); color: var(--ground); }
main a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: .18em; }
/* prompts */
.tiles { display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: .5rem; margin: 0; padding: 0;
  list-style: none; }
.prompts { gap: .8rem; counter-reset: prompt; }
.prompts li { font-size: .82rem; line-height: 1.35; color: var(--soft); }
.prompts li > span { display: block; margin-top: .45rem; }
.prompts li > span::before { counter-increment: prompt; content: counter(prompt) " "; color: var(--ink);
  font-weight: 650; }
.prompts img { display: block; width: 100%; height: auto; border-radius: 7px; box-shadow: 0 0 0 1px var(--line); }
/* the table of systems */
.league { border-collapse: separate; border-spacing: 0; font-size: .9rem; }
.league thead th { position: sticky; top: 2.55rem; z-index: 1; background: var(--ground); vertical-align: bottom;
  border-bottom: 1px solid var(--line); padding: .5rem .8rem .45rem 0; line-height: 1.25; }
.league thead button { text-align: left; font-size: .84rem; }
.league thead th:nth-child(n + 9) { white-space: normal; min-width: 4.6rem; }
.league thead button:hover { color: var(--accent); }
.league thead button.minor { display: block; font-size: .74rem; }
.league thead button.on { color: var(--ink); font-weight: 650; }
.league thead button.on::after { content: " \\2193"; } .league thead button.on.asc::after { content: " \\2191"; }
.league tbody th, .league tbody td { border: 0; vertical-align: top; padding: .5rem .8rem .3rem 0; }
.league tbody { scroll-margin-top: 6.5rem; }
.league .figures > * { padding-top: 1.15rem; }
.league .more > td { padding: .25rem 0 1.25rem; border-bottom: 1px solid var(--line); }
.league tbody:target .figures > :first-child { box-shadow: -.8rem 0 0 -.55rem var(--accent); }
.league tbody th { white-space: normal; color: var(--ink); min-width: 9.5rem; }
.league tbody th b { font-size: 1.06rem; font-weight: 650; letter-spacing: -.01em; display: block; }
.league tbody th small, .league td small { color: var(--soft); font-size: .78rem; font-weight: 400;
  white-space: nowrap; }
.league tbody th small { display: block; white-space: normal; line-height: 1.35; }
.league td.number { white-space: nowrap; font-variant-numeric: tabular-nums; line-height: 1.4; }
.league td.number > small { display: block; }
.score { display: grid; grid-template-columns: 2.5rem auto; gap: 0 .1rem; align-items: baseline; min-width: 6rem; }
.score + .score { margin-top: .35rem; color: var(--soft); }
.score .bar { grid-column: 1 / -1; height: .34rem; min-width: 0; margin-top: .12rem; }
.score b.value { font-weight: 620; } .score + .score b.value { font-weight: 400; }
.score + .score .bar :is(i, b) { background: var(--soft); }
.untaught { font-style: italic; }
.badge { display: inline-block; border: 1px solid var(--line); border-radius: 5px; padding: 0 .35rem;
  font-size: .76rem; font-weight: 600; line-height: 1.5; background: var(--card); }
.levels { display: flex; flex-wrap: wrap; gap: .25rem; min-width: 4.3rem; }
.claims-of { display: block; margin-top: .4rem; font-size: .8rem; line-height: 1.35; }
.told { display: grid; grid-template-columns: minmax(0, 44rem) minmax(16rem, 1fr); gap: .6rem 2rem;
  align-items: center; }
.told p { margin: 0; color: var(--soft); font-size: .84rem; line-height: 1.45; }
.told p + p { margin-top: .35rem; } .told p b { color: var(--ink); font-weight: 560; }
.tile { position: relative; display: block; aspect-ratio: 1; border-radius: 7px; background: var(--strip) 0 0 / 800%;
  background-position-x: calc(var(--i) * 100% / 7); box-shadow: 0 0 0 1px var(--line); }
.tile i { position: absolute; right: -.3rem; bottom: -.3rem; width: 1.15rem; height: 1.15rem; border-radius: 50%;
  font: 700 .68rem/1.15rem ui-sans-serif, system-ui, sans-serif; text-align: center; color: var(--ground); }
.tile i.good { background: var(--good); } .tile i.bad { background: var(--bad); opacity: .85; }
.none { border: 1px dashed var(--line); border-radius: 9px; padding: 1.1rem; text-align: center; }
.reference .figures > th b::after { content: "another budget"; margin-left: .5rem; font-size: .7rem; font-weight: 600;
  color: var(--unsure); border: 1px solid currentColor; border-radius: 99px; padding: .05rem .45rem;
  white-space: nowrap; letter-spacing: 0; vertical-align: .1em; }
/* plot, claims, words */
.plot { width: 100%; max-width: 62rem; min-width: 40rem; height: auto; display: block; }
.plot text { fill: var(--soft); font-size: 12px; } .plot a text { fill: var(--ink); font-weight: 560; }
.plot line { stroke: var(--line); } .plot .dot { fill: var(--accent); } .plot .range { stroke: var(--accent);
  stroke-width: 5; stroke-linecap: round; opacity: .22; }
.plot .reference .dot { fill: none; stroke: var(--unsure); stroke-width: 2; }
.plot .reference .range { stroke: var(--unsure); }
.claim { padding: 0; overflow: hidden; } .claim > * { padding: .9rem 1.1rem; } .claim > * + * { margin-top: 0; }
.claim h3 { margin: 0 0 .25rem; font-size: 1.02rem; } .claim p { color: var(--soft); font-size: .9rem; }
.claim table { font-size: .9rem; } .claim > .scroll { padding-top: 0; }
.claim tr:last-child td { border-bottom: 0; } .claim td:first-child { min-width: 14rem; }
.claim .mark { white-space: nowrap; font-weight: 600; font-size: .88rem; }
.words { max-width: 46rem; padding-left: 1.2rem; margin: .8rem 0 0; } .words li { margin: 0 0 .6rem; }
.words li::marker { color: var(--soft); }
details > summary { cursor: pointer; color: var(--accent); margin-bottom: .8rem; }
.others td { vertical-align: top; line-height: 1.4; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
[hidden] { display: none !important; }
@media (max-width: 74rem) {  /* rows become cards, the head becomes a row of buttons to sort by */
  .league, .league :is(thead, tbody, tr, th, td) { display: block; }
  .league thead tr { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding-bottom: .6rem; }
  .league thead tr::before { content: "Sort by"; font-size: .84rem; color: var(--soft); padding: .1rem 0; }
  .league thead th { position: static; padding: 0; border: 0; display: flex; gap: .5rem; align-items: baseline; }
  .league tbody { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.1rem;
    margin-bottom: 1rem; scroll-margin-top: 3.2rem; }
  .league .figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.4rem, 1fr)); gap: .8rem 1rem; }
  .league .figures > *, .league .figures > :first-child, .league .more > td { padding: 0; border: 0; }
  .league .figures > th { grid-column: 1 / -1; }
  .league .figures > td::before { content: attr(data-label); display: block; color: var(--soft); font-size: .76rem; }
  .league .figures > td.evidence { grid-column: 1 / -1; } .league td.evidence::before { display: none !important; }
  .claims-of { margin-top: .3rem; }
  .league .more { margin-top: 1rem; } .told { grid-template-columns: minmax(0, 1fr); gap: .8rem; }
}
@media (max-width: 44rem) { .tiles { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .filters { flex-direction: column; } .filters legend { float: none; padding: 0 0 .3rem; } }
"""

SCRIPT = """
(() => {
  const table = document.getElementById("league"), bodies = [...table.tBodies];
  const sorters = [...table.querySelectorAll("button[data-sort]")];
  const filters = [...document.querySelectorAll("button[data-filter]")];
  const count = document.getElementById("count");
  const start = {sort: table.dataset.sort, dir: table.dataset.dir, family: "", level: ""};
  let state = {...start};

  const value = (body, key) => body.getAttribute("data-" + key) ?? "";
  const compare = (key, sign) => (a, b) => {
    const x = value(a, key), y = value(b, key);
    if (x === "" || y === "") return (x === "") - (y === "");  // what was not measured comes last both ways
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, "en", {sensitivity: "base"}) : x - y;
    return sign * order;
  };

  function show() {
    const sorted = [...bodies].sort(compare(state.sort, state.dir === "asc" ? 1 : -1));
    sorted.forEach(body => table.append(body));
    for (const button of sorters) {
      const on = button.dataset.sort === state.sort;
      button.classList.toggle("on", on);
      button.classList.toggle("asc", on && state.dir === "asc");
    }
    for (const head of table.tHead.rows[0].cells) {
      const on = head.querySelector("button.on");
      head.setAttribute("aria-sort", on ? (state.dir === "asc" ? "ascending" : "descending") : "none");
    }
    let shown = 0;
    for (const body of bodies) {
      const has = (key, wanted) => !wanted || value(body, "of-" + key).split("|").includes(wanted);
      body.hidden = !(has("family", state.family) && has("level", state.level));
      shown += !body.hidden;
    }
    for (const button of filters) {
      button.setAttribute("aria-pressed", String(state[button.dataset.filter] === button.dataset.value));
    }
    count.textContent = shown === bodies.length ? `${shown} rows` : `${shown} of ${bodies.length} rows`;
  }

  function read() {  // an address without "=" is the place of a section, not a state
    const asked = new URLSearchParams(location.hash.slice(1)), known = {...start};
    if (location.hash && !location.hash.includes("=")) return;
    const sorter = sorters.find(b => b.dataset.sort === asked.get("sort"));
    if (sorter) Object.assign(known, {sort: sorter.dataset.sort, dir: sorter.dataset.first});
    if (["asc", "desc"].includes(asked.get("dir"))) known.dir = asked.get("dir");
    for (const button of filters) {
      if (button.dataset.value && asked.get(button.dataset.filter) === button.dataset.value) {
        known[button.dataset.filter] = button.dataset.value;
      }
    }
    state = known;
  }

  function go(changes) {
    Object.assign(state, changes);
    const told = Object.fromEntries(Object.entries(state).filter(([key, value]) => value));
    history.replaceState(null, "", "#" + new URLSearchParams(told));
    show();
  }

  for (const button of sorters) {
    const {sort, first} = button.dataset;
    button.addEventListener("click", () => go({sort, dir: state.sort !== sort ? first :
      state.dir === "asc" ? "desc" : "asc"}));
  }
  for (const button of filters) {
    const {filter, value} = button.dataset;
    button.addEventListener("click", () => go({[filter]: state[filter] === value ? "" : value}));
  }
  addEventListener("hashchange", () => { read(); show(); });
  read();
  show();
})();
"""
