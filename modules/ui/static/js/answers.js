// Answers side by side: the ground truth first, what differs from it marked; or blind, with a vote.

import { post } from './api.js';
import { h } from './dom.js';
import { button } from './form.js';
import { fail } from './toast.js';

/** The same order for the same run and question, and no order that tells who is who. */
function shuffled(items, seed) {
  let state = [...seed].reduce((sum, letter) => (sum * 31 + letter.charCodeAt(0)) >>> 0, 7);
  const order = [...items];
  for (let at = order.length - 1; at > 0; at -= 1) {
    state = (state * 1664525 + 1013904223) >>> 0;
    const other = state % (at + 1);
    [order[at], order[other]] = [order[other], order[at]];
  }
  return order;
}

export class Answers {
  constructor(run) {
    this.run = run;
    this.votes = { ...run.votes };
    this.blind = false;
    this.element = h('section', { class: 'sy-answers', 'aria-label': 'Answers side by side' });
    this.rows = run.rows.map((row, index) => ({ ...row, index })).filter((row) => row.answers.length);
    if (this.rows.length) this.#draw();
  }

  #draw() {
    const { questions } = this.run.plan.questions;
    const toggle = button(this.blind ? 'Show who is who' : 'Vote blind', () => {
      this.blind = !this.blind;
      this.#draw();
    }, false, 'answers-blind');
    this.element.replaceChildren(
      h('div', { class: 'sy-page-head' }, h('h2', {}, 'Answers side by side'), this.rows.length > 1 ? toggle : ''),
      this.blind ? h('p', { class: 'sy-hint' }, 'Choose the better answer to each question without knowing whose it is.') : this.#tally(),
      ...questions.map((question, at) => this.#question(question, at)),
    );
  }

  #tally() {
    const counts = new Map();
    for (const row of Object.values(this.votes)) counts.set(row, (counts.get(row) || 0) + 1);
    if (!counts.size) return this.run.reference === null || this.run.reference === undefined ? '' : h('p', { class: 'sy-hint' }, h('mark', { class: 'sy-differs' }, 'Marked'), ' is what differs from the ground truth.');
    const words = [...counts].sort((a, b) => b[1] - a[1]).map(([row, count]) => `${this.#name(this.run.rows[row])} ${count}`);
    return h('p', { 'data-testid': 'answers-tally' }, `Votes: ${words.join(', ')}.`);
  }

  #name(row) {
    return `${row.model} through ${row.loader_title || row.loader}`;
  }

  #question(question, at) {
    const order = this.blind ? shuffled(this.rows, `${this.run.id}${at}`) : [...this.rows].sort((a, b) => (b.index === this.run.reference) - (a.index === this.run.reference));
    return h('article', { class: 'sy-question', 'data-testid': 'answers-question' }, h('h3', { dir: 'auto' }, `${at + 1}. ${question}`),
      h('div', { class: 'sy-columns' }, order.map((row, place) => this.#answer(row, at, place))));
  }

  #answer(row, at, place) {
    const answer = row.answers[at];
    if (!answer) return h('div', { class: 'sy-answer' }, h('p', { class: 'sy-hint' }, 'No answer.'));
    const chosen = this.votes[at] === row.index;
    if (this.blind) {
      const vote = button(chosen ? 'Chosen' : 'This one is better', () => this.#vote(at, row.index), chosen, 'answers-vote');
      vote.setAttribute('aria-pressed', String(chosen));
      return h('div', { class: 'sy-answer' }, h('h4', {}, `Answer ${String.fromCharCode(65 + place)}`), h('p', { dir: 'auto' }, answer.text || '(nothing)'), vote);
    }
    const truth = row.index === this.run.reference;
    const { agreement } = answer;
    const unit = agreement?.unit === 'words' ? 'word' : 'token';
    const facts = truth
      ? 'ground truth'
      : agreement && (agreement.parts_at === null ? 'the same' : `parts at ${unit} ${agreement.parts_at + 1}, ${Math.round(agreement.common * 100)} % in common`);
    const text = truth || !answer.segments ? answer.text || '(nothing)' : answer.segments.map(([piece, same]) => (same ? piece : h('mark', { class: 'sy-differs' }, piece)));
    return h('div', { class: 'sy-answer', 'data-truth': truth },
      h('h4', { dir: 'auto' }, this.#name(row)), h('p', { dir: 'auto' }, text),
      h('p', { class: 'sy-hint' }, [facts, answer.decode_tok_s ? `${answer.decode_tok_s.toFixed(1)} tok/s` : null, chosen ? 'voted the better one' : null].filter(Boolean).join(' · ')));
  }

  async #vote(question, row) {
    try {
      const same = this.votes[question] === row;
      this.votes = (await post(`evaluations/${this.run.id}/vote`, { question, row: same ? -1 : row })).votes;
      this.#draw();
    } catch (error) {
      fail(error);
    }
  }
}
