"""The report's style sheet: light, dark and print; a table on a screen, cards on a phone."""

CSS = """
:root {
  color-scheme: light dark;
  --ink: #1c1c1c; --soft: #595959; --paper: #ffffff; --rule: #d9d9d9; --tint: #f6f6f4;
  --yes: #00664a; --yes-tint: #e2f3ed; --no: #a33c00; --no-tint: #fbeadf; --open: #4d4d4d; --open-tint: #ececec;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8e6e3; --soft: #aaa7a2; --paper: #17181a; --rule: #3a3c40; --tint: #202225;
    --yes: #6fdab8; --yes-tint: #10362b; --no: #ffab78; --no-tint: #43210d; --open: #cfcfcf; --open-tint: #333538;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .8rem; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-bottom: .25rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }
.summary { list-style: none; display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; margin: 0; padding: 0; }
.verdict {
  display: inline-block; padding: .08rem .5rem; border-radius: .3rem; font-size: .82rem; font-weight: 600;
  line-height: 1.35; border: 1px solid currentColor;
}
.yes { color: var(--yes); background: var(--yes-tint); }
.no { color: var(--no); background: var(--no-tint); border-style: double; border-width: 3px; }
.open { color: var(--open); background: var(--open-tint); border-style: dashed; }
table { width: 100%; border-collapse: collapse; font-size: .85rem; line-height: 1.4; table-layout: fixed; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--rule); }
th, td { padding: .5rem .6rem .5rem 0; vertical-align: top; overflow-wrap: break-word; }
td { border-bottom: 1px solid var(--rule); font-variant-numeric: tabular-nums; }
.claims th:nth-child(1) { width: 8.6rem; }
.claims th:nth-child(2) { width: 23%; }
.claims th:nth-child(3) { width: 19%; }
.claims th:nth-child(4) { width: 18%; }
.claims th:nth-child(6) { width: 5.5rem; }
.claims th:nth-child(7) { width: 4.2rem; }
.devices th:nth-child(1) { width: 7.6rem; }
.devices th:nth-child(2) { width: 31%; }
.devices th:nth-child(n+3):nth-child(-n+4) { width: 7.5rem; }
.devices th:nth-child(n+5):nth-child(-n+6) { width: 6rem; }
th::first-letter { text-transform: uppercase; }
.id { font-weight: 700; }
.about { color: var(--soft); font-size: .78rem; margin-top: .15rem; }
dl { margin: 0; }
.kinds { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.2rem; max-width: 58rem; }
.kinds dt { font-weight: 600; white-space: nowrap; }
dd { margin: 0; overflow-wrap: anywhere; }
.sample { width: 40px; height: 12px; stroke: currentColor; stroke-width: 1.8; fill: none; margin-right: .4rem; }
figure {
  margin: 0 0 2.2rem; padding: 1rem; background: var(--tint); border: 1px solid var(--rule); border-radius: .5rem;
}
figure img {
  display: block; width: 100%; height: auto; margin: 0 auto; background: #fff; border-radius: .25rem;
}
code { font-size: .9em; }
figcaption { font-size: .85rem; color: var(--soft); margin: .7rem auto 0; max-width: 920px; overflow-wrap: anywhere; }
.settings { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1.2rem; font-size: .85rem; }
.settings dt { color: var(--soft); overflow-wrap: anywhere; }
.settings .settings { font-size: 1em; }
@media (max-width: 760px) {
  main { padding: 1.2rem .9rem 3rem; }
  .rows thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .rows, .rows tbody, .rows tr, .rows td { display: block; }
  .rows tr { border: 1px solid var(--rule); border-radius: .5rem; padding: .5rem .8rem; margin-bottom: .8rem; }
  .rows td { display: grid; grid-template-columns: 5.5rem 1fr; gap: .6rem; border: 0; padding: .2rem 0; }
  .rows td { overflow-wrap: anywhere; }
  .rows td::before { content: attr(data-column); color: var(--soft); }
  .rows .verdict { justify-self: start; }
  .kinds, .settings { grid-template-columns: 1fr; gap: 0; }
  .kinds dd, .settings dd { margin-bottom: .6rem; }
  .settings .settings { padding-left: .8rem; border-left: 2px solid var(--rule); }
  figure { padding: .6rem; }
}
@media print {
  :root {
    color-scheme: light;
    --ink: #000; --soft: #444; --paper: #fff; --rule: #bbb; --tint: #fff;
    --yes: #00543c; --yes-tint: #fff; --no: #8a3200; --no-tint: #fff; --open: #444; --open-tint: #fff;
  }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  figure { border: 0; padding: 0; }
  figure, tr, .kinds dt, .kinds dd { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  thead { display: table-header-group; }
}
"""
