// What a rendered message gets after sanitising: code headers, highlighting, formulas, links in place of remote images.

import { copyText, h } from './dom.js';
import { icon } from './icons.js';
import { drawMath } from './math.js';
import { toast } from './toast.js';

const HIGHLIGHT_LIMIT = 40_000;
const queue = [];
let running = false;
let highlighter = null;

/** Dress up everything new below `root`; safe to call again. */
export function decorate(root) {
  for (const pre of root.querySelectorAll('pre[data-sy-lang]:not([data-sy-dressed])')) dressCode(pre);
  for (const table of root.querySelectorAll('table:not([data-sy-dressed])')) {
    table.dataset.syDressed = '';
    const scroller = h('div', { class: 'sy-table', tabindex: '0', role: 'region', 'aria-label': 'Table' });
    table.replaceWith(scroller);
    scroller.append(table);
  }
  for (const image of root.querySelectorAll('img[data-sy-src]')) image.replaceWith(imageLink(image));
  drawMath(root).catch(() => toast('Formulas could not be drawn: the KaTeX files are missing.', { level: 'warning' }));
}

/** A frame around a code block: language, copy button. Returns the frame. */
export function dressCode(pre) {
  pre.dataset.syDressed = '';
  const language = pre.dataset.syLang || '';
  const frame = h(
    'div',
    { class: 'sy-code' },
    h('div', { class: 'sy-code-head' }, h('span', {}, language || 'text'), copyButton(() => pre.textContent)),
  );
  pre.replaceWith(frame);
  pre.tabIndex = 0;
  frame.append(pre);
  const code = pre.querySelector('code');
  if (code && language && code.textContent.length < HIGHLIGHT_LIMIT) {
    queue.push([code, language]);
    if (!running) drain();
  }
  return frame;
}

export function copyButton(read, label = 'Copy code') {
  const button = h('button', { type: 'button', class: 'sy-copy', 'aria-label': label, title: label }, icon('copy', 16), h('span', {}, 'Copy'));
  button.addEventListener('click', async () => {
    try {
      await copyText(read());
      button.lastChild.textContent = 'Copied';
    } catch {
      button.lastChild.textContent = 'Press Ctrl+C';
    }
    setTimeout(() => (button.lastChild.textContent = 'Copy'), 1600);
  });
  return button;
}

// Highlighting waits for idle time: it changes colours only, so nobody needs it in the frame that brings the text.
async function drain() {
  running = true;
  try {
    highlighter ??= import('../vendor/highlight/highlight.min.js').then((module) => module.default);
    const hljs = await highlighter;
    while (queue.length) {
      await idle();
      const until = performance.now() + 8;
      while (queue.length && performance.now() < until) highlight(hljs, ...queue.shift());
    }
  } finally {
    running = false;
  }
}

const idle = () => new Promise((done) => (window.requestIdleCallback ? requestIdleCallback(done, { timeout: 200 }) : setTimeout(done, 16)));

function highlight(hljs, code, language) {
  if (!code.isConnected || !hljs.getLanguage(language)) return;
  const { value } = hljs.highlight(code.textContent, { language, ignoreIllegals: true });
  // highlight.js escapes the text and adds only <span class="hljs-…">; parse it inert and take over just that.
  const parsed = new DOMParser().parseFromString(value, 'text/html').body;
  code.replaceChildren(...[...parsed.childNodes].map(copySpan));
}

function copySpan(node) {
  if (node.nodeType === Node.TEXT_NODE) return document.createTextNode(node.data);
  const span = h('span', { class: [...node.classList].filter((name) => /^hljs-|_$/.test(name)).join(' ') });
  span.append(...[...node.childNodes].map(copySpan));
  return span;
}

/** The page never asks another host for anything (the server's CSP says so too): a remote image opens in a tab of its own. */
function imageLink(image) {
  const source = image.dataset.sySrc;
  let host = 'another server';
  try {
    host = new URL(source).host;
  } catch {
    // The address is shown as it is in the tooltip.
  }
  return h(
    'a',
    { class: 'sy-remote-image', href: source, target: '_blank', rel: 'noopener noreferrer nofollow', title: source, 'data-testid': 'remote-image' },
    icon('image', 18),
    h('span', { dir: 'auto' }, image.alt ? `${image.alt}: image from ${host}` : `Image from ${host}`),
    h('small', {}, 'not loaded, opens in a new tab'),
  );
}
