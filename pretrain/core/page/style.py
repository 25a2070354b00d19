"""The style sheet of a run's page: one light theme, wide enough for pictures in a row."""

STYLE = """
:root { color-scheme: light; --ink: #212529; --pale: #6e757d; --line: #dee2e6; --blue: #1f77dc; --red: #e65014; }
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink); background: #f4f5f7;
       margin: 0 auto; max-width: 1560px; padding: 24px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 0 0 4px; }
.pale { color: var(--pale); } .path { overflow-wrap: anywhere; }
section { overflow-x: auto; background: white; border: 1px solid var(--line); border-radius: 8px;
  padding: 16px 20px; margin-top: 16px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 12px 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 8px 16px; }
.card b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.card.first { background: var(--blue); border-color: var(--blue); color: white; }
.card.first b { font-size: 34px; line-height: 1.2; }
.pictures { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: 6px; max-width: 100%;
         box-sizing: border-box; }
figure img { display: block; max-width: 100%; }
figcaption { font-size: 13px; padding: 2px 8px; overflow-wrap: anywhere; }
.bad { border-left: 5px solid var(--red); } .good { border-left: 5px solid #00a078; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 12px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .text { text-align: left; }
th { position: sticky; top: 0; background: white; }
.scroll { max-height: 560px; overflow: auto; }
.bar { display: inline-block; width: 90px; height: 9px; background: #e9ecef; border-radius: 3px; margin-right: 8px; }
.bar i { display: block; height: 9px; background: var(--blue); border-radius: 3px; }
.side { display: flex; flex-wrap: wrap; gap: 28px; align-items: flex-start; }
pre { background: #f4f5f7; padding: 12px; border-radius: 6px; overflow: auto; font-size: 13px; }
summary { cursor: pointer; font-weight: 600; padding: 3px 0; }
.charts { display: grid; gap: 20px 24px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); }
.chart { min-width: 0; max-width: 640px; } .chart h3 { font-size: 15px; margin: 6px 0 0; }
.chart svg { display: block; width: 100%; height: auto; } .chart text { font-size: 12px; fill: var(--pale); }
.chart svg svg { overflow: hidden; } .chart .grid { stroke: #e9ecef; }
.chart line.mark { stroke: var(--red); stroke-dasharray: 2 3; } .chart circle.mark { fill: var(--red); }
.chart text.mark { fill: white; font-size: 10px; font-weight: 700; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; font-size: 13px; color: var(--pale); min-height: 20px; }
.legend span { overflow-wrap: anywhere; } .legend b { color: var(--ink); font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: 12px; min-height: 3px; margin-right: 5px; vertical-align: 3px; }
.card small { display: block; color: var(--pale); } .card.first small { color: inherit; }
.progress { height: 8px; border-radius: 4px; background: #e9ecef; }
.progress i { display: block; height: 8px; border-radius: 4px; background: var(--blue); }
.timeline { list-style: none; margin: 12px 0 0; padding: 0; }
.timeline li { display: flex; gap: 10px; align-items: baseline; padding: 3px 0; overflow-wrap: anywhere; }
.timeline i { flex: none; width: 10px; height: 10px; margin: 0 4px; border-radius: 5px; background: #adb5bd; }
.timeline i.number { width: 18px; height: 18px; margin: 0; border-radius: 9px; background: var(--red); color: white;
  font: 700 11px/18px system-ui, sans-serif; text-align: center; }
.timeline .when { flex: none; min-width: 86px; color: var(--pale); font-variant-numeric: tabular-nums; }
.strip { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); }
.strip.narrow { grid-template-columns: repeat(auto-fill, minmax(min(100%, 150px), 1fr)); }
.strip figure { max-width: 640px; } .strip.narrow figure { max-width: 280px; } .strip img { width: 100%; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 8px; }
@media (max-width: 600px) { body { padding: 10px; } section { padding: 12px; } .card { padding: 6px 12px; } }
.warn { background: #fff4e5; border-color: #f0b060; }
"""
