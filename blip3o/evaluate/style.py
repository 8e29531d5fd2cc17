"""The look of ``report.html``: its style sheet (light and dark by the reader's setting) and its tick and cross."""

STYLE = """
:root{color-scheme:light dark;--paper:#fdfdfb;--ink:#1d1d1b;--soft:#6f6d66;--line:#e3e1da;--wash:#f4f3ee;
--accent:#33608c;--band:#33608c26;--right:#2a7f4f;--wrong:#b4402f}
@media(prefers-color-scheme:dark){:root{--paper:#161615;--ink:#e8e6e0;--soft:#9a978e;--line:#33322f;--wash:#1f1f1d;
--accent:#8ab4de;--band:#8ab4de2e;--right:#63bd8a;--wrong:#e58473}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,"Segoe UI",Roboto,"Helvetica Neue",
Arial,sans-serif;font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:64rem;margin:0 auto;padding:3.5rem 1.5rem 5rem}
h1{font-size:1.9rem;line-height:1.2;font-weight:600;letter-spacing:-.015em;margin:0 0 .5rem}
h2{font-size:1.15rem;font-weight:600;margin:3.5rem 0 .9rem;padding-top:1.1rem;border-top:1px solid var(--line)}
h3{font-size:.95rem;font-weight:600;margin:1.8rem 0 .6rem}
h3 small,.note,figcaption,dt,th,.why{color:var(--soft);font-weight:400}
p{margin:0 0 .8rem;max-width:44rem}.note,.why{font-size:.875rem}a{color:var(--accent)}
.heads{display:grid;align-items:end;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:1.5rem;
margin:2rem 0 0;padding:0}
.heads div{border-left:2px solid var(--line);padding-left:.9rem}.heads dt{font-size:.85rem}
.heads dd{margin:0;font-size:1.65rem;line-height:1.25;font-weight:600;letter-spacing:-.01em;white-space:nowrap}
.heads dd small{display:block;font-size:.8rem;font-weight:400;letter-spacing:0;color:var(--soft)}
.wide{overflow-x:auto;margin-bottom:1rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.38rem .9rem .38rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-size:.8rem}td.n,th.n{text-align:right;white-space:nowrap}tr.first td{font-weight:600}
td:first-child code{white-space:nowrap}.pair{display:grid;gap:0 3rem;
grid-template-columns:repeat(auto-fit,minmax(15rem,1fr))}.pair td:last-child,.pair th:last-child{text-align:right}
.scores td:first-child{width:22%}.scores td.n{width:9%}.scores td.n+td.n{width:16%}
td.bar{width:44%;min-width:9rem;padding-right:1.4rem;vertical-align:middle}
.track{position:relative;height:.7rem;background:var(--wash);border-radius:2px}
.track i,.track b{position:absolute;top:0;bottom:0;border-radius:2px}.track i{left:0;background:var(--accent);
opacity:.55}
.track b{top:calc(50% - 1px);bottom:auto;height:2px;background:var(--ink)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(19rem,1fr));gap:1.4rem 1.8rem}
.cards p{font-size:.9rem;line-height:1.35;margin:0 0 .45rem}
.row{display:flex;gap:.45rem}.shot{position:relative;flex:0 1 4.75rem;margin:0}
img{display:block;width:100%;image-rendering:pixelated;border:1px solid var(--line);border-radius:2px;background:#fff}
.mark{width:1.15rem;height:1.15rem;flex:none}.shot .mark{position:absolute;right:-.3rem;top:-.4rem}
.mark circle{stroke:var(--paper);stroke-width:1.5}.mark path{fill:none;stroke:var(--paper);stroke-width:1.8;
stroke-linecap:round;stroke-linejoin:round}.ok circle{fill:var(--right)}.no circle{fill:var(--wrong)}
.ask{display:flex;gap:.9rem;align-items:flex-start}.ask .shot{flex:0 0 4.75rem}.ask p{margin:0}
.ok-text{color:var(--right)}.no-text{color:var(--wrong)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:1.6rem}figure{margin:0}
figcaption{font-size:.85rem;margin-bottom:.3rem}figcaption strong{color:var(--ink);font-weight:600}
.chart{width:100%;max-width:30rem;height:auto;display:block}.chart text{font-size:10px;fill:var(--soft)}
.chart .grid{stroke:var(--line)}.chart .band{fill:var(--band)}.chart .mean{fill:none;stroke:var(--accent);
stroke-width:1.6;stroke-linejoin:round}.chart .end{fill:var(--accent)}
code{font:.85em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--accent);font-size:.9rem}details{margin-bottom:1rem}
@media print{main{padding:0}h2{break-after:avoid}.cards>*{break-inside:avoid}}
"""
TICK = (
    '<svg class="mark ok" viewBox="0 0 20 20" role="img" aria-label="right"><circle cx="10" cy="10" r="9"/>'
    '<path d="M6 10.5l3 3 5.5-6.5"/></svg>'
)
CROSS = (
    '<svg class="mark no" viewBox="0 0 20 20" role="img" aria-label="wrong"><circle cx="10" cy="10" r="9"/>'
    '<path d="M7 7l6 6M13 7l-6 6"/></svg>'
)
