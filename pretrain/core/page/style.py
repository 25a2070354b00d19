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
.warn { background: #fff4e5; border-color: #f0b060; }
"""
