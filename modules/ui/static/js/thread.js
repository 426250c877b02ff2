// The list of messages on screen: reconciles with snapshots, keeps the place while scrolling, shows long chats in windows.

import { h, reducedMotion } from './dom.js';
import { icon } from './icons.js';
import { MessageView } from './message.js';

const WINDOW = 400; // messages in the page when a chat opens; older ones come as one scrolls up
const STEP = 200;
const SLICE_MS = 12;

export class Thread {
  constructor(commands) {
    this.commands = commands;
    this.views = new Map();
    this.nodes = [];
    this.first = 0; // index of the oldest message in the page
    this.stick = true;
    this.job = 0;
    this.older = h('button', { type: 'button', class: 'sy-older', hidden: true, onclick: () => this.#showOlder() });
    this.list = h('div', { class: 'sy-messages' });
    this.end = h('div', { class: 'sy-thread-end' });
    this.log = h('div', { class: 'sy-log', role: 'log', 'aria-live': 'off', 'aria-label': 'Chat', tabindex: '0', 'data-testid': 'log' }, this.older, this.list, this.end);
    this.jump = h(
      'button',
      { type: 'button', class: 'sy-jump', 'aria-label': 'Jump to the newest message', title: 'Jump to the newest message', hidden: true, 'data-testid': 'jump', onclick: () => this.toBottom(true) },
      icon('down', 18),
    );
    this.element = h('div', { class: 'sy-thread' }, this.log, this.jump);
    this.#watchScrolling();
  }

  // --- scrolling ---

  #watchScrolling() {
    // Only the reader's own scrolling lets go of the end; growth of the text never does.
    const check = () =>
      requestAnimationFrame(() => {
        this.stick = this.#distance() < 80;
        this.jump.hidden = this.stick;
      });
    for (const kind of ['wheel', 'touchmove', 'pointerup', 'keyup']) this.log.addEventListener(kind, check, { passive: true });
    this.log.addEventListener('scroll', () => {
      if (this.#distance() > 300) this.jump.hidden = this.stick;
      if (this.log.scrollTop < 600 && this.first > 0 && !this.job) this.#showOlder();
    }, { passive: true });
    new ResizeObserver(() => this.follow()).observe(this.log);
  }

  #distance() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight;
  }

  /** Keep the end in view while text grows, unless the reader scrolled away. */
  follow() {
    if (this.stick) this.log.scrollTop = 1e9;
  }

  toBottom(smooth = false) {
    this.stick = true;
    this.jump.hidden = true;
    this.log.scrollTo({ top: 1e9, behavior: smooth && !reducedMotion() ? 'smooth' : 'instant' });
  }

  // --- messages ---

  /** Show another chat. */
  reset(nodes) {
    cancelAnimationFrame(this.job);
    this.job = 0;
    this.views.clear();
    this.list.replaceChildren();
    this.nodes = nodes;
    this.stick = true;
    this.first = nodes.length;
    this.#fill(Math.max(0, nodes.length - WINDOW), true);
  }

  /** Take over a newer snapshot of the same chat. */
  update(nodes) {
    const known = new Set(nodes.map((node) => node.id));
    const firstId = this.nodes[this.first]?.id;
    for (const [id, view] of this.views) {
      if (known.has(id)) continue;
      view.element.remove();
      this.views.delete(id);
    }
    const grown = nodes.length > 0 && !this.views.has(nodes.at(-1).id);
    this.nodes = nodes;
    const at = nodes.findIndex((node) => node.id === firstId);
    this.first = at >= 0 ? at : Math.max(0, Math.min(this.first, nodes.length - WINDOW));
    let cursor = this.list.firstChild;
    for (const node of nodes.slice(this.first)) {
      let view = this.views.get(node.id);
      if (view) view.update(node);
      else view = this.#add(node);
      if (view.element === cursor) cursor = cursor.nextSibling;
      else this.list.insertBefore(view.element, cursor);
    }
    this.#showOlderButton();
    if (grown) this.toBottom();
    else this.follow();
  }

  #add(node) {
    const view = new MessageView(node, this.commands);
    this.views.set(node.id, view);
    return view;
  }

  view(id) {
    return this.views.get(id);
  }

  /** Bring messages down to index `target` into the page, newest first, in slices that leave the page responsive. */
  #fill(target, atOnce) {
    const start = performance.now();
    const fresh = [];
    while (this.first > target && performance.now() - start < (atOnce ? 60 : SLICE_MS)) {
      this.first -= 1;
      const node = this.nodes[this.first];
      if (!this.views.has(node.id)) fresh.unshift(this.#add(node).element);
    }
    const height = this.log.scrollHeight;
    const top = this.log.scrollTop;
    this.list.prepend(...fresh);
    if (this.stick) this.follow();
    else if (fresh.length && this.log.scrollTop === top) this.log.scrollTop = top + this.log.scrollHeight - height;
    this.job = this.first > target ? requestAnimationFrame(() => this.#fill(target, false)) : 0;
    if (!this.job) {
      this.#showOlderButton();
      this.log.dataset.filled = '1';
    } else delete this.log.dataset.filled;
  }

  #showOlder() {
    this.#fill(Math.max(0, this.first - STEP), false);
  }

  #showOlderButton() {
    this.older.hidden = this.first === 0;
    this.older.textContent = `Show earlier messages (${this.first})`;
  }
}
