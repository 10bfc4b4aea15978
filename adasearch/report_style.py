"""The one style sheet of ``report.html``: light and dark, phone and paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1d2430; --soft: #5c6675; --paper: #ffffff; --card: #f5f7fa; --rule: #dde2ea;
  --accent: #2563c9; --second: #b4540a; --good: #1a7f4b; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e9ef; --soft: #9aa5b5; --paper: #14181f; --card: #1d232d; --rule: #323b49;
    --accent: #6ea2ff; --second: #f0a35e; --good: #5fce96; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { max-width: 46rem; margin: .5rem 0; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.soft, figcaption { color: var(--soft); font-size: .92rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: 1rem 0 0; font-size: .92rem; }

.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .8rem; }
.cards { margin: 1.5rem 0 1rem; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.65rem; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .88rem; }
.verdict { border-left: 4px solid var(--accent); background: var(--card); border-radius: 0 .5rem .5rem 0; }
.verdict { padding: .7rem 1rem; }
.verdict p { margin: .2rem 0; }
.good { color: var(--good); }
.bad { color: var(--bad); }

.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .38rem .6rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; border-bottom-width: 2px; white-space: normal; }
th.left, td.left { text-align: left; }
td.text { white-space: normal; min-width: 15rem; overflow-wrap: anywhere; }
tr.strong td { font-weight: 650; }
tr.more td { border-bottom: none; }
tr.total td { border-top: 2px solid var(--rule); font-weight: 650; }

figure { margin: 1rem 0; }
svg { width: 100%; height: auto; display: block; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; }
pre { padding: .8rem 1rem; overflow-x: auto; }
code, pre { font: .88rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }

svg text { fill: var(--soft); font-size: 12px; }
svg .axis, svg .label { fill: var(--ink); }
svg .middle { text-anchor: middle; }
svg .end { text-anchor: end; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .dense { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 6 4; }
svg .best { fill: none; stroke: var(--good); stroke-width: 2; }
svg .bar { stroke-width: 1.2; stroke-opacity: .45; }
svg line.proposal { stroke: var(--accent); }
svg line.recipe { stroke: var(--second); }
svg line.stopped { stroke: var(--soft); }
svg circle.proposal, svg rect.share { fill: var(--accent); }
svg line.front { stroke: var(--good); }
svg line.knee { stroke: var(--bad); }
svg circle.front { fill: var(--good); }
svg circle.knee { fill: var(--bad); stroke: var(--ink); stroke-width: 1.5; r: 6px; }
svg polygon.recipe { fill: var(--second); }
svg circle.stopped { fill: var(--paper); stroke: var(--soft); stroke-width: 1.5; }
svg .kept.attention { fill: var(--second); }
svg .kept.mlp { fill: var(--accent); }

.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; color: var(--soft); font-size: .88rem; }
.key i { display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem; border-radius: 50%; }
.key i { background: var(--accent); }
.key i.recipe { background: var(--second); border-radius: 0; transform: rotate(45deg) scale(.85); }
.key i.stopped { background: none; border: 1.5px solid var(--soft); }
.key i.front { background: var(--good); }
.key i.knee { background: var(--bad); border: 1.5px solid var(--ink); }
.key i.line { width: 1.3rem; height: 2px; border-radius: 0; vertical-align: middle; background: var(--good); }
.key i.dense { background: none; border-top: 2px dashed var(--soft); height: 0; }

@media (max-width: 40rem) {
  body { font-size: 15px; }
  main { padding: 1.2rem .9rem 3rem; }
  td.text { min-width: 24rem; }
  .figure { overflow-x: auto; }
  .figure svg { min-width: 34rem; }
}
@media print {
  :root {
    color-scheme: light;
    --ink: #000; --soft: #444; --paper: #fff; --card: #f7f7f7; --rule: #ccc;
    --accent: #2563c9; --second: #b4540a; --good: #1a7f4b; --bad: #b3261e;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11pt; }
  nav { display: none; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; }
  figure, .cards, tr { break-inside: avoid; }
  .wide { overflow: visible; }
  table { font-size: .75rem; }
}
"""
