"""The look of a report: one page, light or dark as the reader's system is, nothing fetched from anywhere."""

STYLE = """
:root { color-scheme: light dark;
  --ground: #faf9f6; --card: #ffffff; --ink: #22211e; --soft: #6e6a62; --line: #e5e1d8; --wash: #f1eee7;
  --good: #1d7044; --bad: #b23a2e; --unsure: #8a6a12; --accent: #35618e; --truth: #1d7044; --mine: #d6249f; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #161719; --card: #1e2023; --ink: #e8e5df; --soft: #9d9990; --line: #303338; --wash: #26292d;
  --good: #6fcf97; --bad: #f08a7d; --unsure: #e0bf6a; --accent: #8db8e4; --truth: #6fcf97; --mine: #ff6fd0; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
header, main, footer { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 3.5rem; }
h1 { font-size: clamp(1.9rem, 5vw, 2.8rem); line-height: 1.15; letter-spacing: -.02em; font-weight: 650;
  margin: 0 0 .8rem; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 0 0 .3rem; font-weight: 620; }
.lead { color: var(--soft); max-width: 44rem; margin: 0 0 1.2rem; font-size: 1.06rem; }
.note { color: var(--soft); max-width: 44rem; margin: 0 0 1.2rem; }
.facts { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; margin: 0; padding: 0; list-style: none;
  color: var(--soft); font-size: .9rem; }
.facts b { color: var(--ink); font-weight: 600; }
nav { position: sticky; top: 0; z-index: 2; background: var(--ground); border-bottom: 1px solid var(--line);
  margin-top: 1.6rem; }
nav div { max-width: 70rem; margin: 0 auto; padding: .55rem 1.25rem; display: flex; gap: 1.1rem; overflow-x: auto;
  white-space: nowrap; font-size: .88rem; scrollbar-width: none; }
nav a { color: var(--soft); text-decoration: none; }
nav a:hover, nav a:focus-visible { color: var(--accent); }
section { padding: 2.6rem 0 .4rem; scroll-margin-top: 2rem; }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least, 15rem)), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .9rem; min-width: 0; }
.card :where(p, dl) { margin: 0; overflow-wrap: anywhere; }
.card > * + *, .beside > div > * + * { margin-top: .6rem; }
.card p.answer { line-height: 1.45; }
.card .asked { color: var(--soft); font-size: .93rem; line-height: 1.4; }
.beside { display: flex; gap: 1.1rem; align-items: flex-start; }
.beside > figure { flex: 0 0 min(10rem, 42%); } .beside > div { flex: 1 1 0; min-width: 0; }
.pictures { display: flex; gap: .55rem; align-items: flex-start; }
.pictures > figure { flex: 1 1 0; max-width: 16rem; }
figure { margin: 0; min-width: 0; }
figure .frame { position: relative; display: block; border-radius: 7px; overflow: hidden;
  box-shadow: 0 0 0 1px var(--line); background: var(--wash); }
figure img { display: block; width: 100%; height: auto; }
figure svg { position: absolute; inset: 0; width: 100%; height: 100%; }
figure rect { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
rect.mine { stroke: var(--mine); } rect.truth { stroke: var(--truth); stroke-dasharray: 5 4; }
.sheet { aspect-ratio: 1; }
figcaption { color: var(--soft); font-size: .78rem; line-height: 1.35; margin-top: .35rem; text-align: center; }
.steps { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(5.2rem, 1fr); gap: .5rem; overflow-x: auto; }
.story { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .9rem; max-width: 50rem; }
.story figcaption { text-align: left; font-size: .86rem; }
.arrow { align-self: center; color: var(--soft); flex: 0 0 auto; }
.qa > div { display: grid; grid-template-columns: 1.3rem 1fr; font-size: .93rem; line-height: 1.4; }
.qa > div + div { margin-top: .45rem; }
.qa dt { color: var(--soft); grid-column: 2; } .qa dd { margin: 0; grid-column: 2; font-weight: 560; }
.qa .mark { grid-column: 1; grid-row: 1; } .qa small { color: var(--soft); font-weight: 400; }
.mark { font-weight: 700; } .verdict { font-size: .88rem; font-weight: 560; }
.good { color: var(--good); } .bad { color: var(--bad); } .unsure { color: var(--unsure); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: .84rem; white-space: nowrap; }
th, td { padding: .5rem .7rem .5rem 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { color: var(--soft); }
.sweep { table-layout: fixed; min-width: 46rem; }
.sweep td { padding: .3rem .6rem .3rem 0; }
.sweep th { padding-right: .6rem; white-space: normal; font-size: .76rem; line-height: 1.3; vertical-align: bottom; }
.sweep th:first-child { width: 3.2rem; } .sweep th:nth-child(2) { width: 4.2rem; }
.bar { position: relative; display: block; width: 100%; min-width: 8rem; height: .6rem; background: var(--wash);
  border-radius: 99px; overflow: hidden; }
.bar i, .bar b { position: absolute; top: 0; bottom: 0; } .bar i { background: var(--accent); opacity: .32; }
.bar b { width: 3px; margin-left: -1.5px; background: var(--accent); }
pre { background: var(--wash); border-radius: 9px; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
footer { color: var(--soft); font-size: .88rem; padding-top: 2.5rem; padding-bottom: 3.5rem; }
@media (max-width: 34rem) { header { padding-top: 2rem; } section { padding-top: 2rem; } .card { padding: .75rem; }
  .steps { grid-auto-flow: row; grid-template-columns: repeat(5, minmax(0, 1fr)); }
  .story { grid-template-columns: repeat(2, minmax(0, 1fr)); } td.wide, th.wide { display: none; }
  .figures td { padding-right: .5rem; } .bar { min-width: 4.5rem; } }
@media print { nav { display: none; } .card { break-inside: avoid; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="lead">$lead</p>
<ul class="facts">$facts</ul>
</header>
<nav aria-label="Sections"><div>$links</div></nav>
<main>$sections</main>
<footer>$foot</footer>
$script
</body>
</html>
"""
