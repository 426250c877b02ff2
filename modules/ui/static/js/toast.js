// Short messages at the foot of the page, each with at most one action ("Undo").

import { h } from './dom.js';
import { icon } from './icons.js';

let stack = null;

function holder() {
  if (!stack || !stack.isConnected) {
    stack = h('div', { class: 'sy-toasts', role: 'status', 'aria-live': 'polite', 'data-testid': 'toasts' });
    document.body.append(stack);
  }
  return stack;
}

/** Show `message`. `level`: info, success, warning or error; errors stay until closed. Returns a function that closes it. */
export function toast(message, { level = 'info', action = null, timeout = level === 'error' ? 0 : 6000 } = {}) {
  const box = h('div', { class: `sy-toast sy-${level}`, role: level === 'error' ? 'alert' : null }, h('span', { dir: 'auto' }, message));
  const close = () => box.remove();
  if (action) {
    const button = h('button', { type: 'button', class: 'sy-toast-action' }, action.label);
    button.addEventListener('click', () => {
      close();
      action.run();
    });
    box.append(button);
  }
  box.append(h('button', { type: 'button', class: 'sy-icon-button sy-small', 'aria-label': 'Close message', onclick: close }, icon('close', 16)));
  for (const old of [...holder().children].slice(0, -3)) old.remove();
  holder().append(box);
  if (timeout) setTimeout(close, timeout);
  return close;
}

/** Show an error of the server or the network. */
export function fail(error, action = null) {
  toast(error.message || String(error), { level: 'error', action });
}
