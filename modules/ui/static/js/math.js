// LaTeX: $…$, $$…$$, \(…\), \[…\] as marked extensions that leave a placeholder; KaTeX draws it after sanitising.

const escapeText = (text) => text.replace(/[&<>]/g, (char) => ({ '&': '&amp;', '<': '&lt;', '>': '&gt;' })[char]);

const placeholder = (tex, display) =>
  display
    ? `<div data-sy-math="block">${escapeText(tex)}</div>`
    : `<span data-sy-math="inline">${escapeText(tex)}</span>`;

const BLOCK = /^ {0,3}(?:\$\$((?:\\[\s\S]|[^\\$])+?)\$\$|\\\[([\s\S]+?)\\\])[ \t]*(?:\n|$)/;
// A price list ("$5 and $6") is no formula: no space inside the dollars, no digit after the closing one.
const INLINE = /^(?:\$\$((?:\\[\s\S]|[^\\$])+?)\$\$|\$(?![\s$])((?:\\[\s\S]|[^\\$\n])*?[^\s\\$]|\\[^\s])\$(?!\d)|\\\((.+?)\\\)|\\\[([\s\S]+?)\\\])/;

/** marked asks every paragraph where the next formula begins; looking through the whole rest each time would be quadratic. */
function firstParagraph(text) {
  const end = text.indexOf('\n\n');
  return end < 0 ? text : text.slice(0, end);
}

export const mathExtensions = [
  {
    name: 'mathBlock',
    level: 'block',
    start: (text) => firstParagraph(text).match(/(?:^|\n) {0,3}(?:\$\$|\\\[)/)?.index,
    tokenizer(text) {
      const match = BLOCK.exec(text);
      if (match) return { type: 'mathBlock', raw: match[0], tex: (match[1] ?? match[2]).trim() };
      return undefined;
    },
    renderer: (token) => placeholder(token.tex, true),
  },
  {
    name: 'mathInline',
    level: 'inline',
    start: (text) => text.match(/\$|\\\(|\\\[/)?.index,
    tokenizer(text) {
      const match = INLINE.exec(text);
      if (!match) return undefined;
      const display = match[1] ?? match[4];
      return { type: 'mathInline', raw: match[0], tex: (display ?? match[2] ?? match[3]).trim(), display: display !== undefined };
    },
    renderer: (token) => (token.display ? `<span data-sy-math="display">${escapeText(token.tex)}</span>` : placeholder(token.tex, false)),
  },
];

let katex = null;

async function loadKatex() {
  const base = new URL('../vendor/katex/', import.meta.url);
  if (!document.querySelector('link[data-sy-katex]')) {
    const link = document.createElement('link');
    link.rel = 'stylesheet';
    link.href = new URL('katex.min.css', base).href;
    link.dataset.syKatex = '';
    document.head.append(link);
  }
  // The file is UMD: as a module it leaves its export on the global object.
  await import(new URL('katex.min.js', base).href);
  return globalThis.katex;
}

/** Draw every formula below `root`. KaTeX is fetched when the first one appears. */
export async function drawMath(root) {
  const spots = [...root.querySelectorAll('[data-sy-math]:not([data-sy-drawn])')];
  if (!spots.length) return;
  // Taken before the wait: a second call for the same element must not draw the formula's own drawing.
  for (const spot of spots) {
    spot.dataset.syDrawn = '';
    spot.title = spot.textContent.slice(0, 500);
  }
  katex ??= loadKatex();
  const library = await katex;
  for (const spot of spots) {
    const tex = spot.textContent;
    library.render(tex, spot, {
      displayMode: spot.dataset.syMath !== 'inline', throwOnError: false, trust: false, strict: 'ignore', maxExpand: 200, maxSize: 40,
    });
  }
}
