"""Style sheet of the page of `rotatek-inspect --html`: light, dark, print, and a phone's width."""

STYLE = "".join(
    """
:root{color-scheme:light dark;--page:#f6f7f8;--card:#fff;--ink:#1b1f24;--soft:#59626d;--line:#d5dae0;--hi:#1c5a9e;--on:#fff;
--off:#c9d0d8;--a:#1c5a9e;--b:#b8520a;--c:#2a7a4c;--d:#8a3fa0;--e:#a8325a;--less:#b8520a}
@media screen and (prefers-color-scheme:dark){:root{--page:#121518;--card:#1b1f24;--ink:#e6e9ec;--soft:#a2acb7;--line:#363d46;
--hi:#6fb4f7;--on:#10151a;--off:#454e59;--a:#6fb4f7;--b:#f09a58;--c:#67c792;--d:#c995dd;--e:#f08aac;--less:#f09a58}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
overflow-wrap:anywhere}
header,main,footer{max-width:1180px;margin:0 auto;padding:12px}
h1{font-size:1.45rem;margin:.4em 0}h2{font-size:1.08rem;margin:0 0 .2em}h3{font-size:.95rem;margin:.6em 0 .3em}
p{margin:.3em 0 .6em}.how,.said,figcaption,footer{color:var(--soft);font-size:.88rem}.said{color:var(--ink)}
main,.column{display:grid;gap:12px;grid-template-columns:minmax(0,1fr);align-content:start}
@media (min-width:760px){main.columns{grid-template-columns:repeat(2,minmax(0,1fr))}}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;min-width:0}
.panels{display:grid;gap:12px 24px;grid-template-columns:minmax(0,1fr)}
@media (min-width:760px){.pair .panels{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media (max-width:480px){header,main,footer{padding:8px}section{padding:8px}}
.plots{display:grid;gap:8px;grid-template-columns:minmax(0,1fr)}
.plots.small{grid-template-columns:repeat(2,minmax(0,1fr))}
figure{margin:0}svg{display:block;width:100%;height:auto;max-width:470px}
svg text{font-size:11.5px;fill:var(--soft);font-family:inherit}svg text.on{fill:var(--on)}svg text.ink{fill:var(--ink)}
ul.key{list-style:none;margin:.3em 0;padding:0;display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.85rem;color:var(--soft)}
ul.key i{display:inline-block;width:12px;height:12px;border-radius:2px;margin-right:5px;vertical-align:-1px;border:1px solid transparent}
ul.key i.ramp{width:60px;background:linear-gradient(90deg,transparent,var(--hi));border-color:var(--line)}
i.none{border-color:var(--line)!important}i.full,i.hi,i.hi8,i.hi4{background:var(--hi)}i.hi8{opacity:.65}i.hi4{opacity:.38}i.off{background:var(--off)}
i.f-a{background:var(--a)}i.f-b{background:var(--b)}i.f-c{background:var(--c)}i.f-d{background:var(--d)}i.f-e{background:var(--e)}
.cells{fill:var(--hi)}.cells path{stroke:var(--line);stroke-width:.6}.cells .less{fill:var(--less)}
.cells .marked{stroke:var(--ink);stroke-width:1.4}.cells~text{pointer-events:none}
.hi,.hi8,.hi4{fill:var(--hi)}.hi8{fill-opacity:.65}.hi4{fill-opacity:.38}.off{fill:var(--off)}.over{fill:none;stroke:var(--b);stroke-width:.9}.floor{fill:var(--line);fill-opacity:.35}
.grid{stroke:var(--line);stroke-width:.7}.axis{stroke:var(--soft)}.reference{stroke:var(--soft);stroke-dasharray:4 3}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}.thin{stroke-width:.8;stroke-opacity:.45}
.s-a{stroke:var(--a)}.s-b{stroke:var(--b)}.s-c{stroke:var(--c)}.s-d{stroke:var(--d)}.s-e{stroke:var(--e)}
.f-a{fill:var(--a)}.f-b{fill:var(--b)}.f-c{fill:var(--c)}.f-d{fill:var(--d)}.f-e{fill:var(--e)}
.dots{fill-opacity:.5}.ring{stroke:var(--ink);stroke-width:1.5}
details{margin-top:.5em;font-size:.85rem}summary{cursor:pointer;color:var(--soft)}
.scroll{overflow:auto;max-height:26rem;border:1px solid var(--line);border-radius:4px;margin:.4em 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:2px 8px;text-align:right;font-weight:400;white-space:nowrap}
thead th{position:sticky;top:0;background:var(--card);color:var(--soft);border-bottom:1px solid var(--line)}
.facts{overflow:auto}.facts th,.facts td{text-align:left;white-space:normal;vertical-align:top;min-width:6rem}
.facts tbody th{color:var(--soft);overflow-wrap:normal;min-width:6.8rem}.facts tr.differs td{font-weight:600}
@media print{body{font-size:11px}section{break-inside:avoid-page;border-color:#999}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}details:not([open]){display:none}.scroll{max-height:none;overflow:visible}}
""".splitlines()
)
