// Incremental Markdown for a reply that is still being written.
//
// Finished top-level blocks are frozen DOM; only the last block is rendered again, at most once per frame. An open code
// fence grows as text. Work per flush therefore depends on the new text and the last block, never on the whole reply.

import { dressCode, decorate } from './decorate.js';
import { h } from './dom.js';
import { fragment, lexer } from './markdown.js';

const FENCE = /^ {0,3}(`{3,}(?=[^`\n]*\n)|~{3,})([^\n]*)\n/;
const LINES_PER_CHUNK = 200; // an open fence is split into blocks, so that layout touches only the last one
const TAIL_LIMIT = 12_000; // a longer unfinished block is appended as plain text until it ends
// What one block cannot know about another: link definitions, HTML that spans blank lines. Such replies are rendered whole at the end.
const NEEDS_WHOLE = /^ {0,3}\[[^\]\n]+\]:|^ {0,3}<[a-z!/]/im;

export class StreamRenderer {
  /** Renders into `target`. `onflush` runs after each change of the DOM. */
  constructor(target, onflush = () => {}) {
    this.target = target;
    this.onflush = onflush;
    this.text = '';
    this.tail = '';
    this.tailNode = null;
    this.plainNode = null;
    this.fence = null;
    this.frame = 0;
    this.notBefore = 0;
  }

  push(text) {
    this.text += text;
    this.tail += text;
    if (!this.frame) this.frame = requestAnimationFrame((now) => this.#onFrame(now));
  }

  #onFrame(now) {
    this.frame = 0;
    if (now < this.notBefore) {
      this.frame = requestAnimationFrame((later) => this.#onFrame(later));
      return;
    }
    const start = performance.now();
    this.flush();
    // Leave the page at least half of the time, however large the last block grows.
    const spent = performance.now() - start;
    this.notBefore = spent > 8 ? performance.now() + spent : 0;
  }

  flush() {
    while (this.#step());
    this.onflush();
  }

  /** Render what is left and tidy up. Returns true when the whole reply was rendered again. */
  end() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    if (NEEDS_WHOLE.test(this.text)) {
      this.target.replaceChildren(fragment(this.text));
    } else {
      while (this.#step());
      if (this.fence) this.#closeFence(this.tail);
      else if (this.tail) this.#freeze(this.tail);
      this.tail = '';
    }
    this.tailNode?.remove();
    decorate(this.target);
    this.onflush();
  }

  dispose() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
  }

  /** One piece of progress; true when there may be more to do at once. */
  #step() {
    if (this.fence) return this.#stepFence();
    const opening = FENCE.exec(this.tail);
    if (opening) {
      this.#openFence(opening);
      return true;
    }
    if (this.plainNode) return this.#stepPlain();
    const tokens = this.#lex();
    if (!tokens.length) return false;
    let last = tokens.length - 1;
    while (last > 0 && tokens[last].type === 'space') last -= 1;
    if (last > 0) {
      const done = tokens.slice(0, last).map((token) => token.raw).join('');
      this.#freeze(done);
      this.tail = this.tail.slice(done.length);
      return true;
    }
    if (this.tail.length > TAIL_LIMIT) return this.#goPlain();
    this.#renderTail();
    return false;
  }

  #lex() {
    try {
      return lexer(this.tail);
    } catch (error) {
      if (error instanceof RangeError) return [{ type: 'text', raw: this.tail }];
      throw error;
    }
  }

  #freeze(text) {
    this.tailNode?.remove();
    this.tailNode = null;
    const block = fragment(text);
    const holder = h('div', { class: 'sy-block' });
    holder.append(block);
    this.target.append(holder);
    decorate(holder);
  }

  #renderTail() {
    if (!this.tailNode) {
      this.tailNode = h('div', { class: 'sy-block sy-tail' });
      this.target.append(this.tailNode);
    }
    this.tailNode.replaceChildren(fragment(this.tail));
    decorate(this.tailNode);
  }

  // --- a very long block: plain text until a blank line ends it ---

  #goPlain() {
    this.tailNode?.remove();
    this.tailNode = h('div', { class: 'sy-block sy-tail sy-plain' });
    this.target.append(this.tailNode);
    this.plainNode = document.createTextNode('');
    this.tailNode.append(this.plainNode);
    this.shown = 0;
    return this.#stepPlain();
  }

  #stepPlain() {
    const end = this.tail.indexOf('\n\n', Math.max(0, this.shown - 1));
    if (end < 0) {
      const fresh = this.tail.slice(this.shown);
      if (this.plainNode.length > 20_000) {
        this.plainNode = document.createTextNode('');
        this.tailNode.append(this.plainNode);
      }
      this.plainNode.appendData(fresh);
      this.shown = this.tail.length;
      return false;
    }
    this.plainNode = null;
    const block = this.tail.slice(0, end + 2);
    this.tail = this.tail.slice(end + 2);
    this.#freeze(block);
    return this.tail.length > 0;
  }

  // --- an open code fence ---

  #openFence([all, marker, info]) {
    this.tailNode?.remove();
    this.tailNode = null;
    this.tail = this.tail.slice(all.length);
    const pre = h('pre', { 'data-sy-lang': info.trim().split(/\s+/)[0].slice(0, 40) });
    const code = h('code');
    pre.append(code);
    const holder = h('div', { class: 'sy-block sy-open-fence' }, pre);
    this.target.append(holder);
    this.fence = { close: new RegExp(`^ {0,3}${marker}[~\`]* *$`), mark: marker[0], pre, code, holder, node: null, lines: 0 };
  }

  #stepFence() {
    const { close, mark } = this.fence;
    let from = 0;
    for (;;) {
      const newline = this.tail.indexOf('\n', from);
      if (newline < 0) break;
      if (!this.midLine && close.test(this.tail.slice(from, newline))) {
        const code = this.tail.slice(0, from);
        this.tail = this.tail.slice(newline + 1);
        this.#closeFence(code);
        return this.tail.length > 0;
      }
      this.midLine = false;
      from = newline + 1;
    }
    // The unfinished last line is shown too, unless it could become the closing fence.
    const rest = this.tail.slice(from);
    const held = !this.midLine && new RegExp(`^ {0,3}[${mark}]* *$`).test(rest) ? rest : '';
    const ready = this.tail.slice(0, this.tail.length - held.length);
    if (ready) {
      this.#appendCode(ready);
      this.midLine = !ready.endsWith('\n');
      this.tail = held;
    }
    return false;
  }

  #appendCode(text) {
    const fence = this.fence;
    if (!fence.node || fence.lines > LINES_PER_CHUNK) {
      fence.node = document.createTextNode('');
      fence.lines = 0;
      fence.code.append(h('span', { class: 'sy-code-chunk' }, fence.node));
    }
    fence.node.appendData(text);
    for (let at = text.indexOf('\n'); at >= 0; at = text.indexOf('\n', at + 1)) fence.lines += 1;
  }

  #closeFence(code) {
    const leftover = this.fence.close.test(code.trimEnd()) && !this.midLine ? '' : code;
    if (leftover) this.#appendCode(leftover);
    const { pre, holder, code: node } = this.fence;
    const whole = node.textContent;
    node.replaceChildren(whole);
    holder.classList.remove('sy-open-fence');
    dressCode(pre);
    this.fence = null;
    this.midLine = false;
  }
}
