"""The style sheet of the HTML view. Colours are variables, so that light and dark differ in them alone."""

from __future__ import annotations

from . import palette

_LIGHT = """
--bg:#fff;--fg:#1b1f24;--dim:#59636e;--line:#d8dee4;--soft:#f4f6f8;--mark:#0072B2;--key1:#cfd6dd;--key2:#8796a5;
--key3:#2b3a49;--on:#111;
"""
_DARK = """
--bg:#14181d;--fg:#e6e9ec;--dim:#a3adb8;--line:#333b44;--soft:#1d232a;--mark:#6cc4f5;--key1:#3a444f;--key2:#76879a;
--key3:#dbe4ee;--on:#111;
"""

# Heat is one hue over the background: dark text is legible on the upper levels in both themes.
_HEAT = (0.10, 0.20, 0.34, 0.50, 0.68, 0.84, 1.0)
_ORIGINS = {
    "exact": palette.BLUE, "hit": palette.GREEN, "miss": palette.VERMILION, "fresh": palette.GREY,
    "unused": palette.PURPLE, "computed": "#8b949e",
}  # fmt: skip


def _heat() -> str:
    lines = []
    for level, share in enumerate(_HEAT, 1):
        text = "color:var(--on);" if level >= 5 else ""
        lines.append(f".hfb .s{level}{{background:rgba(230,159,0,{share});{text}}}")
        lines.append(f".hfb path.s{level}{{fill:rgba(230,159,0,{share})}}")
    return "\n".join(lines)


def _origins() -> str:
    return "\n".join(f".hfb .o-{name}{{--o:{colour}}}" for name, colour in _ORIGINS.items())


CSS = f"""
.hfb{{{_LIGHT}background:var(--bg);color:var(--fg);font:14px/1.45 system-ui,-apple-system,"Segoe UI",sans-serif;
padding:18px 20px;border:1px solid var(--line);border-radius:8px;max-width:1080px;box-sizing:border-box;
text-align:left;overflow-wrap:anywhere;color-scheme:light}}
@media (prefers-color-scheme:dark){{.hfb{{{_DARK}color-scheme:dark}}}}
body[data-jp-theme-light="true"] .hfb,body.vscode-light .hfb,html[theme="light"] .hfb,
html[data-theme="light"] .hfb{{{_LIGHT}color-scheme:light}}
body[data-jp-theme-light="false"] .hfb,body.vscode-dark .hfb,html[theme="dark"] .hfb,
html[data-theme="dark"] .hfb{{{_DARK}color-scheme:dark}}
.hfb *{{box-sizing:border-box}}
.hfb h2{{font-size:18px;margin:0 0 10px;color:var(--fg)}}
.hfb h3{{font-size:14px;margin:20px 0 6px;color:var(--fg);font-weight:600}}
.hfb .dim,.hfb .note{{color:var(--dim);font-size:12px;font-weight:400}}
.hfb .note{{margin:4px 0}}
.hfb .figs{{display:flex;flex-wrap:wrap;gap:8px;margin:0;padding:0}}
.hfb .figs div{{background:var(--soft);border-radius:6px;padding:6px 10px}}
.hfb .figs span,.hfb .figs b{{display:block}}
.hfb .figs span{{font-size:11px;color:var(--dim)}}
.hfb .figs b{{font-weight:600}}
.hfb .banner{{border-left:4px solid {palette.VERMILION};background:var(--soft);padding:8px 12px;margin:10px 0}}
.hfb .answer{{border-left:4px solid var(--mark);background:var(--soft);padding:6px 12px;margin:6px 0;
white-space:pre-wrap}}
.hfb .bar{{display:flex;height:30px;border-radius:4px;overflow:hidden;border:1px solid var(--line)}}
.hfb .bar span{{flex:1 1 0;min-width:0;border-right:1px solid var(--bg);background-color:var(--o);color:#fff;
font-size:11px;line-height:30px;text-align:center;overflow:hidden;white-space:nowrap;
text-shadow:0 0 3px #000,0 0 2px #000}}
.hfb .o-miss{{background-image:repeating-linear-gradient(45deg,transparent 0 5px,rgba(0,0,0,.35) 5px 8px)}}
.hfb .o-fresh{{background-image:repeating-linear-gradient(0deg,transparent 0 4px,rgba(0,0,0,.3) 4px 6px)}}
.hfb .o-unused{{background-image:repeating-linear-gradient(90deg,transparent 0 4px,rgba(0,0,0,.35) 4px 6px)}}
.hfb .o-exact{{background-image:linear-gradient(rgba(255,255,255,.55),rgba(255,255,255,.55));background-size:100% 4px;
background-repeat:no-repeat}}
.hfb .o-computed{{background-image:radial-gradient(rgba(0,0,0,.35) 1px,transparent 1.5px);background-size:6px 6px}}
.hfb .key{{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:12px;color:var(--dim);margin:6px 0;align-items:center}}
.hfb .key b{{display:inline-block;width:20px;height:13px;border-radius:3px;margin-right:5px;vertical-align:-2px}}
.hfb .key b[class^=o]{{background-color:var(--o)}}
.hfb .key b[class^=s],.hfb .key b.plain{{border:1px solid var(--line)}}
.hfb svg{{display:block;width:100%;border:1px solid var(--line);border-radius:3px;background:var(--bg)}}
.hfb svg path.m,.hfb svg rect.m{{fill:var(--mark)}}
.hfb svg path.k1{{fill:var(--key1)}}.hfb svg path.k2{{fill:var(--key2)}}.hfb svg path.k3{{fill:var(--key3)}}
.hfb .scroll{{overflow-x:auto}}
.hfb table{{border-collapse:collapse;font-size:12px;margin:8px 0;color:var(--fg);background:none}}
.hfb th,.hfb td{{text-align:right;padding:3px 10px;border-bottom:1px solid var(--line);background:none;
white-space:nowrap}}
.hfb th:nth-child(-n+2),.hfb td:nth-child(-n+2){{text-align:left}}
.hfb td b{{display:inline-block;width:14px;height:11px;border-radius:2px;margin-right:6px;background-color:var(--o)}}
.hfb .part{{border-left:4px solid var(--o);padding:2px 0 2px 10px;margin:8px 0}}
.hfb .toks{{font:12.5px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;margin:2px 0;
overflow:hidden}}
.hfb i{{font-style:normal;unicode-bidi:isolate;border-radius:2px}}
.hfb i.r,.hfb .key i.r{{border-bottom:3px solid var(--mark);font-weight:700}}
.hfb .key i{{padding:0 3px;margin-right:2px}}
.hfb i.c{{border-bottom:1px dotted var(--dim)}}
.hfb i.e{{color:var(--dim)}}
.hfb em{{color:var(--dim);font-style:italic}}
.hfb .lane{{display:flex;align-items:center;margin:3px 0;font-size:12px}}
.hfb .lane>span{{flex:0 0 116px;color:var(--dim)}}
.hfb .lane>div{{flex:1;position:relative;height:24px;background:var(--soft);border-radius:3px;overflow:hidden}}
.hfb .lane u{{position:absolute;top:2px;bottom:2px;min-width:1px;border-radius:2px;background:var(--o);color:#fff;
font-size:11px;line-height:20px;text-indent:4px;overflow:hidden;white-space:nowrap;text-decoration:none;
text-shadow:0 0 3px #000,0 0 2px #000}}
.hfb details>summary{{cursor:pointer;font-weight:600;margin:18px 0 6px}}
.hfb .map{{display:flex;gap:8px}}
.hfb .map>div:first-child{{flex:0 0 52px;display:flex;flex-direction:column;justify-content:space-between;
font-size:11px;color:var(--dim);text-align:right}}
.hfb .map>div:last-child{{flex:1;min-width:0}}
{_heat()}
{_origins()}
"""
