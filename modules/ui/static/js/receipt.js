// The receipt of a reply: what ran, how fast, and which parameters were used, clamped or ignored.

import { openDialog } from './dialog.js';
import { bytes, copyText, h, plural, seconds } from './dom.js';
import { loaderTitle } from './models.js';
import { toast } from './toast.js';

// A receipt may come out of an imported file: take only what has the right kind.
const number = (value) => (typeof value === 'number' && Number.isFinite(value) ? value : null);
const object = (value) => (value && typeof value === 'object' && !Array.isArray(value) ? value : {});
const list = (value) => (Array.isArray(value) ? value : []);

function clean(receipt) {
  const usage = object(receipt.usage);
  const numbers = ['prefill_tok_s', 'decode_tok_s', 'ttft_ms', 'total_ms', 'memory_bytes'].map((name) => [name, number(receipt[name])]);
  return {
    ...receipt,
    ...Object.fromEntries(numbers),
    usage: Object.fromEntries(['prompt_tokens', 'completion_tokens', 'cached_tokens'].map((name) => [name, number(usage[name])])),
    applied: object(receipt.applied),
    ignored: object(receipt.ignored),
    warnings: list(receipt.warnings),
  };
}

const rate = (value) => (value ? `${value >= 100 ? Math.round(value) : value.toFixed(1)} tok/s` : null);

/** "128 tokens · 41.2 tok/s · first after 240 ms" */
export function receiptLine(given) {
  const receipt = clean(given);
  const parts = [];
  const tokens = receipt.usage.completion_tokens;
  if (tokens !== null) parts.push(plural(tokens, 'token'));
  if (receipt.decode_tok_s) parts.push(rate(receipt.decode_tok_s));
  if (receipt.ttft_ms !== null) parts.push(`first after ${seconds(receipt.ttft_ms)}`);
  if (receipt.finish_reason === 'length') parts.push('length limit reached');
  if (receipt.finish_reason === 'cancelled') parts.push('stopped');
  return parts.join(' · ');
}

/** How many things in the receipt deserve a look. */
export const receiptWarnings = (receipt) => Object.keys(object(receipt.ignored)).length + list(receipt.warnings).length;

const FINISH = { stop: 'the model ended it', length: 'the token limit was reached', cancelled: 'it was stopped' };

function table(title, entries) {
  const rows = entries.filter(([, value]) => value !== null && value !== undefined && value !== '');
  if (!rows.length) return '';
  return h(
    'section',
    {},
    h('h3', {}, title),
    h('dl', { class: 'sy-facts' }, rows.map(([name, value]) => [h('dt', {}, name), h('dd', { dir: 'auto' }, String(value))])),
  );
}

const show = (value) => (typeof value === 'string' ? value : JSON.stringify(value));

export function showReceipt(node) {
  const receipt = clean(node.receipt);
  const { usage } = receipt;
  const body = h(
    'div',
    { class: 'sy-receipt' },
    table('Run', [
      ['Model', receipt.model],
      ['Backend', loaderTitle(receipt.loader)],
      ['Engine', receipt.engine],
      ['Seed', receipt.seed],
      ['Ended because', FINISH[receipt.finish_reason] || receipt.finish_reason],
      ['Memory', bytes(receipt.memory_bytes)],
    ]),
    table('Tokens and time', [
      ['Prompt', usage.prompt_tokens === null ? null : plural(usage.prompt_tokens, 'token') + (usage.cached_tokens ? `, ${usage.cached_tokens} from the prefix cache` : '')],
      ['Answer', usage.completion_tokens === null ? null : plural(usage.completion_tokens, 'token')],
      ['Prefill', rate(receipt.prefill_tok_s)],
      ['Decode', rate(receipt.decode_tok_s)],
      ['Time to first token', seconds(receipt.ttft_ms)],
      ['Total', seconds(receipt.total_ms)],
    ]),
    table('Parameters ignored', Object.entries(receipt.ignored)),
    receipt.warnings.length ? h('section', {}, h('h3', {}, 'Warnings'), h('ul', {}, receipt.warnings.map((text) => h('li', { dir: 'auto' }, String(text?.message ?? text))))) : '',
    table('Parameters applied', Object.entries(receipt.applied).map(([name, value]) => [name, show(value)])),
  );
  openDialog({ title: 'Receipt', body, wide: true, testid: 'receipt', actions: [{ label: 'Copy as JSON', value: 'copy' }] }).then(async (choice) => {
    if (choice !== 'copy') return;
    await copyText(JSON.stringify(node.receipt, null, 2));
    toast('Receipt copied.', { level: 'success' });
  });
}
