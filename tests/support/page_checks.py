"""What is asked of every page in a browser, as scripts: charts, text, colours."""

OPEN = "document.querySelectorAll('details').forEach(d => { d.open = true });"
EMPTY = (
    OPEN
    + """
const shown = e => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== 'hidden';
return [...document.querySelectorAll('svg:not([aria-hidden])')].filter(shown).filter(svg => {
  const box = svg.getBoundingClientRect();
  const inside = [...svg.querySelectorAll('path, rect, use, line, circle, polyline, image')]
    .filter(e => { const b = e.getBoundingClientRect(); return b.width + b.height > 0; });
  return box.width < 50 || box.height < 10 || inside.length === 0;
}).map(svg => svg.getAttribute('aria-label'));
"""
)
OVERFLOWING = (
    OPEN
    + """
const wide = document.documentElement.clientWidth;
const scrolls = e => { for (; e; e = e.parentElement) {
  if (['auto', 'scroll'].includes(getComputedStyle(e).overflowX)) return true; } return false; };
const found = [];
if (document.documentElement.scrollWidth > wide) found.push('the page');
document.querySelectorAll('body *').forEach(e => {
  const box = e.getBoundingClientRect();
  if (!box.width || !box.height || e.closest('script, style')) return;
  const svg = e.closest('svg');
  if (svg && e.tagName === 'text') {
    const outer = svg.getBoundingClientRect();
    if (box.left < outer.left - 1 || box.right > outer.right + 1
        || box.top < outer.top - 2 || box.bottom > outer.bottom + 2)
      found.push('text of a chart: ' + e.textContent);
  } else if (!svg && !scrolls(e) && (box.right > wide + 1 || box.left < -1
        || (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline'))) {
    found.push(e.tagName + '.' + e.className + ': ' + e.textContent.trim().slice(0, 60));
  }
});
return found;
"""
)
OVERLAPPING = """
const found = [];
document.querySelectorAll('svg').forEach(svg => {
  const texts = [...svg.querySelectorAll('text')].map(t => [t, t.getBoundingClientRect()])
    .filter(([t, b]) => b.width > 0);
  texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
    const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (x > 2 && y > 4) found.push(a.textContent + ' on ' + b.textContent);
  }));
});
return found;
"""
CONTRAST = """
const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(Number)
  .map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
  return .2126 * r + .7152 * g + .0722 * b; };
const body = light(getComputedStyle(document.body).backgroundColor);
return [...document.querySelectorAll('h1, h2, p, td, figcaption, summary, svg text')].map(e => {
  const style = getComputedStyle(e);
  const own = light(e.tagName === 'text' ? style.fill : style.color);
  return (Math.max(own, body) + .05) / (Math.min(own, body) + .05);
}).reduce((a, b) => Math.min(a, b), 21);
"""


def faults(session, page, *, width, theme):
    """What is wrong with a page on a screen; empty if nothing is."""
    session.open(page, width=width, theme=theme)
    messages = [f"empty: {element}" for element in session.run(EMPTY)]
    messages += [f"overflows: {element}" for element in session.run(OVERFLOWING)]
    messages += [f"overlaps: {element}" for element in session.run(OVERLAPPING)]
    contrast = session.run(CONTRAST)
    if contrast < 4.5:  # of WCAG, for text
        messages.append(f"contrast: {contrast:.1f}")
    if session.run("return document.querySelectorAll('svg').length") < 3:
        messages.append("charts are missing")
    return messages
