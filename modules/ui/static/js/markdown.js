// Markdown of a message -> safe DOM. Everything a model or a user wrote passes through `fragment`.

import { Marked } from '../vendor/marked/marked.esm.js';
import DOMPurify from '../vendor/dompurify/purify.es.mjs';
import { attachmentUrl } from './api.js';
import { mathExtensions } from './math.js';

const escapes = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;', "'": '&#39;' };
export const escapeHtml = (text) => text.replace(/[&<>"']/g, (char) => escapes[char]);

// Longer blocks are shown as plain text: a table of 50,000 rows would freeze the page.
export const PLAIN_LIMIT = 100_000;

const TAGS = [
  'a', 'abbr', 'b', 'blockquote', 'br', 'code', 'dd', 'del', 'details', 'div', 'dl', 'dt', 'em', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6', 'hr',
  'i', 'img', 'ins', 'kbd', 'li', 'mark', 'ol', 'p', 'pre', 'q', 's', 'samp', 'small', 'span', 'strong', 'sub', 'summary', 'sup', 'table',
  'tbody', 'td', 'tfoot', 'th', 'thead', 'tr', 'u', 'ul', 'var',
];
// No class, style, id or name: a message must not be able to dress up as the page around it.
const ATTRIBUTES = ['href', 'src', 'alt', 'title', 'start', 'align', 'colspan', 'rowspan', 'open', 'dir', 'lang', 'data-sy-lang', 'data-sy-math', 'data-sy-task'];
const LINK = /^(?:https?:|mailto:|#)/i;
const INLINE_IMAGE = /^data:image\/(?:png|jpeg|gif|webp);base64,/i;
// An image that was attached to a message here; the server keeps it under this name.
const ATTACHED = /^cid:([0-9a-f]{64}\.(?:png|jpeg|gif|webp))$/;

const purify = DOMPurify(window);
purify.addHook('afterSanitizeAttributes', (node) => {
  if (node.tagName === 'IMG') holdImage(node);
  else if (node.hasAttribute?.('src')) node.removeAttribute('src');
  if (node.tagName === 'A') {
    if (!LINK.test(node.getAttribute('href') || '')) node.removeAttribute('href');
    node.setAttribute('target', '_blank');
    node.setAttribute('rel', 'noopener noreferrer nofollow');
  }
});

/** A remote image is a request to a stranger's server that can carry the chat in its address: ask first. */
function holdImage(node) {
  const source = node.getAttribute('src') || '';
  if (INLINE_IMAGE.test(source)) return;
  const attached = ATTACHED.exec(source);
  if (attached) {
    node.setAttribute('src', attachmentUrl(attached[1]));
    node.setAttribute('loading', 'lazy');
    return;
  }
  node.removeAttribute('src');
  if (/^https?:\/\//i.test(source)) node.setAttribute('data-sy-src', source);
}

const marked = new Marked({
  gfm: true,
  breaks: true,
  extensions: null,
  renderer: {
    code({ text, lang }) {
      const name = (lang || '').trim().split(/\s+/)[0].slice(0, 40);
      return `<pre data-sy-lang="${escapeHtml(name)}"><code>${escapeHtml(text)}\n</code></pre>`;
    },
    checkbox({ checked }) {
      return `<span data-sy-task="${checked ? 'done' : 'open'}">${checked ? '☑' : '☐'} </span>`;
    },
  },
});
marked.use({ extensions: mathExtensions });

export const lexer = (text) => marked.lexer(text);

/** Whether nested quotes or lists are too deep for the parser's recursion. */
const tooDeep = (text) => /^[ \t]*(?:[>*+-][ \t]*){60}/m.test(text) || /(?:[[(*_~]){2000}/.test(text) || /(?:<[a-z]+>\s*){500}/i.test(text);

function plain(text) {
  const pre = document.createElement('pre');
  pre.className = 'sy-plain';
  pre.textContent = text;
  const holder = document.createDocumentFragment();
  holder.append(pre);
  return holder;
}

/** A safe DocumentFragment of Markdown text. Falls back to plain text for what would be too slow or too deep to render. */
export function fragment(text) {
  if (text.length > PLAIN_LIMIT * 4 || tooDeep(text)) return plain(text);
  let html;
  try {
    const tokens = marked.lexer(text).map((token) =>
      token.raw.length > PLAIN_LIMIT && token.type !== 'code'
        ? { type: 'code', raw: token.raw, text: token.raw, lang: '' }
        : token,
    );
    html = marked.parser(tokens);
  } catch (error) {
    if (error instanceof RangeError) return plain(text);
    throw error;
  }
  const safe = purify.sanitize(html, { ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ATTRIBUTES, ALLOW_DATA_ATTR: false, RETURN_DOM_FRAGMENT: true });
  for (const cell of safe.querySelectorAll('p,li,h1,h2,h3,h4,h5,h6,blockquote,td,th')) cell.dir = 'auto';
  return safe;
}
